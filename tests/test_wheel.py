"""What is installed without a clone: a wheel, with the configurations in it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rlhf_lightning.commands.configs import names
from tests.patience import PATIENCE
from tests.test_configs import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The content of the wheel, as pip lays it out."""
    directory = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = directory.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(directory / "site")
    return directory / "site"


@pytest.fixture
def program(installed, tmp_path):
    """Runs it in an empty directory; the package comes from the wheel alone."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(installed)}
        command = [sys.executable, "-P", "-m", "rlhf_lightning.cli", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=PATIENCE, check=False
        )

    return run


def test_it_holds_the_package_and_its_configurations_and_nothing_else(installed):
    assert {path.name for path in installed.iterdir()} == {"rlhf_lightning", "rlhf_lightning-0.1.0.dist-info"}
    inside = installed / "rlhf_lightning" / "configs"
    assert {path.relative_to(inside).with_suffix("").as_posix() for path in inside.rglob("*.yaml")} == set(names())
    assert (installed / "rlhf_lightning" / "py.typed").is_file()


def test_a_configuration_is_listed_run_and_copied_without_a_clone(program, installed, tmp_path):
    listed = program("configs")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == names()
    few = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--model.warmup_ratio=0"]
    done = program("fit", "--config", "builtin:quickstart/sft", *few)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "models" / "quickstart_sft" / "config.json").is_file()
    copied = program("configs", "copy", "quickstart", "mine/all.yaml")
    assert copied.returncode == 0, copied.stderr
    original = installed / "rlhf_lightning" / "configs"
    assert (tmp_path / "mine" / "all.yaml").read_text() == (original / "quickstart.yaml").read_text()
    assert (tmp_path / "mine" / "quickstart" / "ppo.yaml").is_file(), "where the pipeline names it"


def test_the_source_distribution_has_the_documentation():
    from hatchling.builders.sdist import SdistBuilder

    packed = {file.distribution_path for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    pages = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*")]}
    assert len(pages) > 10
    assert packed >= pages | {"LICENSE", "configs/quickstart.yaml"}
