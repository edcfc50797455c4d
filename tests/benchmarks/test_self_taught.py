"""configs/self_taught as it is shipped: minutes on a CPU.

python -m pytest -m benchmark tests/benchmarks/test_self_taught.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.benchmark
def test_a_tiny_judge_teaches_itself_to_be_right_in_both_orders(tmp_path):
    config = ROOT / "configs" / "self_taught" / "pipeline.yaml"
    program = [sys.executable, "-m", "rlhf_lightning.cli", "pipeline", "--config", str(config)]
    subprocess.run(program, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    directories = ["runs/self_taught/judge_1", "runs/self_taught/judge_2", "reports/self_taught"]
    before, *after = [json.loads((tmp_path / each / "metrics.json").read_text())["metrics"] for each in directories]
    assert 0.4 < before["constructed/accuracy"]["value"] < 0.6
    for each in after:
        assert each["constructed/accuracy"]["low"] > 0.9
        assert each["constructed/consistency"]["value"] > 0.9
