"""The planned memory against the measured, on one CUDA device: python -m pytest -m gpu tests/gpu/test_plan.py -s"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rlhf_lightning.commands.plan import plan
from tests.test_configs import ROOT

CONFIGS = ROOT / "configs"
ZERO2 = CONFIGS / "hardware" / "zero2.yaml"
OFFLOAD = CONFIGS / "hardware" / "zero2_offload.yaml"
PLAIN = CONFIGS / "hardware" / "gpu_16_mixed.yaml"
PROGRAM = """
import sys, torch
from rlhf_lightning.commands.main import main
code = main(sys.argv[1:])
print(torch.cuda.max_memory_allocated())
sys.exit(code)
"""


def measure(arguments: list[str], capsys) -> float:
    """Planned over measured peak of a run of 3 optimizer steps, in a process of its own: what an earlier run has left
    on the device or in a library would count. Prints both."""
    planned = plan(arguments).footprint
    program = [sys.executable, "-c", PROGRAM, "fit", *arguments]
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    measured = int(done.stdout.split()[-1])
    with capsys.disabled():
        phase = max(planned.phases, key=planned.phases.__getitem__)
        print(f"\nplanned {planned.peak / 1e9:.2f} GB ({phase}), measured {measured / 1e9:.2f} GB")
    return planned.peak / measured


def arguments_of(config: str, overlay, model, *more: str) -> list[str]:
    arguments = ["--config", str(CONFIGS / f"{config}.yaml"), "--config", str(overlay), "--trainer.devices", "1"]
    arguments += ["--model.backbone", str(model), "--data.train", "builtin:courtesy", "--trainer.max_steps", "3"]
    arguments += ["--trainer.limit_val_batches", "2", "--trainer.accumulate_grad_batches", "2"]
    return [*arguments, "--trainer.callbacks", "[]", "--trainer.logger", "false", *more]


@pytest.mark.parametrize("overlay", [ZERO2, OFFLOAD, PLAIN], ids=lambda path: path.stem)
@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("config", ["reward_model", "dpo"])
def test_half_a_billion_weights_take_what_was_planned(
    capsys, tmp_path, monkeypatch, qwen2_half_billion, config, overlay, checkpointing
):
    monkeypatch.chdir(tmp_path)
    more = ["--model.gradient_checkpointing", checkpointing, "--data.batch_size", "32"]
    more += ["--model.lora", "null", "--model.reference", "frozen"] if config == "dpo" else []
    ratio = measure(arguments_of(config, overlay, qwen2_half_billion, *more), capsys)
    assert ratio == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_adapters_on_eight_billion_weights_take_what_was_planned(capsys, tmp_path, monkeypatch, llama_8b, layout):
    monkeypatch.chdir(tmp_path)
    more = ["--model.layout", layout, "--data.batch_size", "16"]
    ratio = measure(arguments_of("dpo", ZERO2, llama_8b, *more), capsys)
    # Packed rows are fewer tokens than the longest row times their number, which is what the plan takes.
    assert ratio == pytest.approx(1, abs=0.1) if layout == "padded" else ratio > 0.9
