"""The program in a process of its own: installed, and with a model by its hub name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.patience import PATIENCE
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
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_console_script_is_installed():
    script = shutil.which("rlhf-lightning", path=str(Path(sys.executable).parent))
    assert script is not None
    assert "rlhf-lightning fit" in subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout


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
