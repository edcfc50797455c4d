"""The program in processes of its own: the quickstart from end to end, and a model by its hub name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_configs import ROOT

QUICKSTART = ["--config", str(ROOT / "configs" / "quickstart" / "reward_model.yaml")]


def run(directory: Path, *arguments: str, **environment: str) -> str:
    """Run the program in a directory; return what it printed."""
    result = subprocess.run(
        [sys.executable, "-m", "rlhf_lightning.cli", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_console_script_is_installed():
    script = shutil.which("rlhf-lightning", path=str(Path(sys.executable).parent))
    assert script is not None
    assert "rlhf-lightning fit" in subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout


def test_the_quickstart_learns_and_leaves_its_models_and_a_report(tmp_path):
    """Far above chance, and not above the oracle by more than chance: 0.885 + 3 standard errors of 200 pairs."""
    text = run(tmp_path, "pipeline", "--config", str(ROOT / "configs" / "quickstart.yaml"))
    values = {name: float(value) for name, value in re.findall(r"^│ ([\w ]+?) +│ +([\d.]+) │ +200 │$", text, re.M)}
    assert 0.70 < values["pairwise accuracy"] < 0.955
    assert values["pooled AUROC"] > 0.65
    assert values["margin AUROC"] > 0.75
    assert values["loss"] < 0.62
    for name in ("sft", "reward_model", "ppo"):
        assert (tmp_path / "models" / f"quickstart_{name}" / "model.safetensors").is_file()
    numbers = json.loads((tmp_path / "reports" / "quickstart" / "metrics.json").read_text())["metrics"]
    assert numbers["rm/auroc"]["value"] == pytest.approx(values["pooled AUROC"], abs=1e-4)
    assert numbers["policy/anchored_gain"]["low"] > 25
    assert 1 < numbers["policy/kl_nats"]["value"] < 40
    assert "Reward against the distance" in (tmp_path / "reports" / "quickstart" / "report.html").read_text()


def test_a_model_is_found_by_its_hub_name(tmp_path, tiny_qwen2):
    """Through the hub client, from its cache on disk, laid out as after a download."""
    repository = tmp_path / "hub" / "models--somebody--tiny-qwen2"
    commit = "0" * 40
    shutil.copytree(tiny_qwen2, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    cache = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    arguments = ["--model.backbone", "somebody/tiny-qwen2", "--trainer.limit_val_batches", "1"]
    text = run(tmp_path, "validate", *QUICKSTART, *arguments, **cache)
    assert "pooled AUROC" in text
