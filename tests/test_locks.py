"""Two runs that write to one place: one is refused, or gets a place of its own; a killed one blocks nobody."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from rlhf_lightning.commands.main import main
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.files.locks import alone
from rlhf_lightning.training.own_directories import locks_of, take_version
from rlhf_lightning.training.reference_cache import ReferenceCache
from tests.patience import PATIENCE
from tests.test_configs import ROOT

FIT = [
    *("fit", "--config", str(ROOT / "configs" / "quickstart" / "reward_model.yaml")),
    *("--data.limit", "16", "--trainer.max_epochs", "1"),
    *("--trainer.enable_progress_bar", "false"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_run_is_refused_while_another_writes_there_and_nothing_of_it_is_written(tmp_path, capsys):
    export = Path("models/quickstart_reward_model")
    held = {
        export.parent / f".{export.name}.lock": [],
        Path("mine/.lock"): ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath", "mine"],
        Path("logs/name/version_3/.lock"): [
            *("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "logs"),
            *("--trainer.logger.name", "name", "--trainer.logger.version", "3"),
        ],
    }
    for lock, arguments in held.items():
        with alone(lock, "held by the test"):
            assert main([*FIT, *arguments]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("rlhf-lightning: error: ")
        assert "another run is writing there" in line
        assert not list(tmp_path.rglob("*.ckpt"))
        assert not list(tmp_path.glob("runs/*/version_*"))
        assert not export.exists()


def test_runs_that_begin_together_get_versions_of_their_own(tmp_path):
    def trainer() -> Trainer:
        loggers = [kind(str(tmp_path), name="run") for kind in (TensorBoardLogger, CSVLogger)]
        made = Trainer(logger=loggers, accelerator="cpu", devices=1, enable_progress_bar=False)
        assert [logger.version for logger in made.loggers] == [0, 0]
        for logger in made.loggers:
            logger._version = None
        return made

    first, second = trainer(), trainer()
    for each in (first, second):  # both have looked
        for logger in each.loggers:
            logger._get_next_version = lambda: 0
    for number, each in enumerate((first, second)):
        take_version(each)
        assert {logger.log_dir for logger in each.loggers} == {str(tmp_path / "run" / f"version_{number}")}
    with contextlib.ExitStack() as locks:
        for each in (first, second):
            for lock, busy in {path: busy for path, busy in locks_of(each) if path.is_relative_to(tmp_path)}.items():
                locks.enter_context(alone(lock, busy))


def test_an_evaluation_is_refused_while_another_writes_there_and_its_files_stay(tmp_path, capsys):
    pairs = [{"prompt": f"p{i}", "chosen": "good " * (i + 1), "rejected": f"bad {i}"} for i in range(4)]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    Path("rules.py").write_text("def long(prompts, responses):\n    return [len(text) for text in responses]\n")
    Path("out").mkdir()
    Path("out/metrics.json").write_text("{}")
    command = ["evaluate", "--reward_model", "rules:long", "--pairs", "pairs.jsonl", "--out", "out"]
    with alone(Path("out/kept/.lock"), "held by the test"):
        assert main(command) == 2
    assert "out: out: another evaluation is writing there" in capsys.readouterr().err
    assert Path("out/metrics.json").read_text() == "{}"
    assert main(command) == 0
    assert "metrics" in json.loads(Path("out/metrics.json").read_text())


def _die_with(lock: Path) -> None:
    with alone(lock, "busy"):
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_die_with, args=(tmp_path / "lock",))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    with (
        alone(tmp_path / "lock", "busy"),
        pytest.raises(ConfigurationError, match="busy"),
        alone(tmp_path / "lock", "busy"),
    ):
        pass


def test_reference_log_probs_are_computed_by_one_run_at_a_time(tmp_path, monkeypatch):
    cache = ReferenceCache(["key"], cache_dir=tmp_path)
    with cache.computing(), pytest.raises(ConfigurationError, match="busy"), alone(cache.directory / "lock", "busy"):
        pass
    monkeypatch.setattr(os, "access", lambda *_: False)  # of another user; root may write anywhere
    with pytest.raises(ConfigurationError, match=r"cannot be written; give model\.reference_cache"), cache.computing():
        pass
