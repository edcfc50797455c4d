"""What is installed without a clone: a wheel, with the configurations in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from rlhf_lightning.commands.configs import names
from tests.patience import PATIENCE
from tests.test_configs import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    """The content of the wheel, as pip lays it out."""
    zipfile.ZipFile(wheel).extractall(wheel.parent / "site")
    return wheel.parent / "site"


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


@pytest.mark.reliability
def test_the_quickstart_runs_where_nothing_but_the_wheel_is_installed(wheel, tmp_path):
    """In an environment with the wheel and its dependencies, by the program that pip has made; about 150 s of CPU."""
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    # Of the directories named in it, no .pth file is read: an editable installation stays out of sight.
    (site / "dependencies.pth").write_text("\n".join(each for each in sys.path if each.endswith("-packages")))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    away = tmp_path / "away"
    away.mkdir()
    where = subprocess.run(
        [python, "-c", "import rlhf_lightning as made; print(made.__file__)"],
        cwd=away,
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site)
    done = subprocess.run(
        [python.with_name("rlhf-lightning"), "pipeline", "--config", "builtin:quickstart"],
        cwd=away,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print("\n".join(done.stdout.splitlines()[-6:]))
    numbers = json.loads((away / "reports" / "quickstart" / "metrics.json").read_text())["metrics"]
    assert 0.70 < numbers["rm/auroc"]["value"] < 0.80
    assert numbers["policy/anchored_gain"]["low"] > 25
    assert (away / "reports" / "quickstart" / "report.html").is_file()


def test_the_source_distribution_has_the_documentation():
    from hatchling.builders.sdist import SdistBuilder

    packed = {file.distribution_path for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    pages = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*")]}
    assert len(pages) > 10
    assert packed >= pages | {"LICENSE", "configs/quickstart.yaml"}
