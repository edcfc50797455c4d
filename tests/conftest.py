"""Tiny models, made once per session; nothing is downloaded."""

from __future__ import annotations

import gc
import os
import subprocess

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a busy machine make tiny models many times slower
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the hub is a mistake

from pathlib import Path

import hypothesis
import pytest

from rlhf_lightning.models import probe
from rlhf_lightning.tiny import builtin_texts, make_tiny_model

# No test fails by the clock, on however slow a machine.
hypothesis.settings.register_profile(
    "slow machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("slow machine")

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory):
    """`builtin:tiny` is made afresh in every test run."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def _tiny(tmp_path_factory, architecture: str) -> Path:
    # Loud weights: with the usual 0.02 a model that ignores its input passes a loose tolerance.
    directory = tmp_path_factory.mktemp("models") / architecture
    return make_tiny_model(directory, builtin_texts(), architecture=architecture, initializer_range=0.2)


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory) -> Path:
    return _tiny(tmp_path_factory, "qwen2")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return _tiny(tmp_path_factory, "llama")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    return _tiny(tmp_path_factory, "bert")


@pytest.fixture
def forked_proof(monkeypatch):
    """The process that proves a directory is forked from one that has imported transformers, which costs seconds."""
    from tests.programs import forked

    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, forked(probe.main, *command[3:]), stderr="")

    monkeypatch.setattr("rlhf_lightning.commands.export.subprocess.run", run)


LONGEST = ("quickstart", "resume", "evaluate", "ppo", "pipeline", "planning", "export", "cli", "two_processes", "zero")
"""Files that take longest, without `test_`; two processes end at the same time when they begin with them."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # pytest-xdist would begin with the files that have most tests


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what was imported is not looked through again and again


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
