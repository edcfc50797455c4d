"""DeepSpeed ZeRO-2 in 16-mixed on one CUDA device: python -m pytest -m gpu tests/gpu/test_zero.py -s"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from rlhf_lightning.commands.main import main
from rlhf_lightning.training.checkpoints import is_sharded
from tests.test_configs import ROOT


@pytest.mark.parametrize("strategy", ["zero2", "zero2_offload"])
@pytest.mark.parametrize(
    "kind", [["reward_model"], ["dpo"], ["dpo", "--model.lora.r", "16"]], ids=["reward model", "DPO", "DPO with LoRA"]
)
def test_the_true_shape_trains_repeats_its_numbers_goes_on_and_is_exported(
    capsys, tmp_path, monkeypatch, qwen2_half_billion, strategy, kind
):
    name, *more = kind
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", str(ROOT / "configs" / f"{name}.yaml")]
    arguments += ["--config", str(ROOT / "configs" / "hardware" / "zero2.yaml"), "--trainer.strategy", strategy]
    arguments += ["--trainer.devices", "1", "--trainer.limit_train_batches", "32", "--trainer.max_epochs", "1"]
    arguments += ["--data.train", "builtin:courtesy", "--data.max_length", "256", "--trainer.logger.name", "run"]
    arguments += ["--model.backbone", str(qwen2_half_billion), *more]
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    assert main(["fit", *arguments]) == 0
    fitted = capsys.readouterr().out
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"{' '.join(kind)}, {strategy}: {time.perf_counter() - began:.0f} s, peak GPU memory {peak:.2f} GiB")
    checkpoint = next(line.split()[-1] for line in fitted.splitlines() if line.startswith("checkpoint:"))
    assert is_sharded(checkpoint)
    assert main(["test", *arguments, "--ckpt_path", checkpoint]) == 0
    numbers = [re.findall(r"│ +(-?[\d.]+) │", text) for text in (fitted, capsys.readouterr().out)]
    assert numbers[0] == numbers[1] != []
    assert main(["export", "--ckpt_path", checkpoint, "--out", "exported"]) == 0
    assert "largest difference" in capsys.readouterr().out
    assert main(["fit", *arguments, "--trainer.max_epochs", "2", "--ckpt_path", "last"]) == 0
    assert Path(checkpoint).parent == next(Path("runs/run").glob("version_*")) / "checkpoints", "one directory"


def test_adapters_on_eight_billion_weights_train_repeat_their_numbers_go_on_and_are_exported(
    capsys, tmp_path, monkeypatch, llama_8b
):
    """configs/dpo.yaml on one GPU, short rows; prints seconds, tokens per second and the peak."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", str(ROOT / "configs" / "dpo.yaml")]
    arguments += ["--data.train", "builtin:courtesy"]
    arguments += ["--model.backbone", str(llama_8b), "--data.max_length", "256", "--trainer.max_steps", "4"]
    arguments += [
        "--trainer.accumulate_grad_batches",
        "2",
        "--trainer.limit_val_batches",
        "4",
        "--trainer.callbacks",
        "[]",
    ]
    arguments += ["--trainer.callbacks+", "ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", "4"]
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    assert main(["fit", *arguments]) == 0
    seconds, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated() / 2**30
    with capsys.disabled():
        print(f"\nLlama-3-8B shape, LoRA, zero2: {seconds:.0f} s, peak GPU memory {peak:.2f} GiB")
    capsys.readouterr()
    checkpoint = next(Path("runs").rglob("*.ckpt"))
    assert is_sharded(checkpoint)
    assert main(["test", *arguments, "--ckpt_path", str(checkpoint)]) == 0
    assert main(["fit", *arguments, "--trainer.max_steps", "6", "--ckpt_path", str(checkpoint)]) == 0
    assert main(["export", "--ckpt_path", str(checkpoint), "--out", "exported", "--merge", "false"]) == 0
    assert "largest difference" in capsys.readouterr().out
