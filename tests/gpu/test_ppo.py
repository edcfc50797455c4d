"""PPO on one CUDA device: python -m pytest -m gpu tests/gpu/test_ppo.py -s"""

from __future__ import annotations

import time

import pytest
import torch

from rlhf_lightning.commands.main import main
from tests.test_configs import ROOT


@pytest.mark.parametrize("strategy", ["auto", "zero2"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("value_model", ["shared", "null"])
def test_the_true_shape_draws_learns_and_goes_on(
    capsys, tmp_path, monkeypatch, qwen2_half_billion, strategy, precision, value_model
):
    """The first minibatch must find the policy that drew the replies: `_check_start` stops the run otherwise."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", str(ROOT / "configs" / "ppo.yaml"), "--model.backbone", str(qwen2_half_billion)]
    arguments += ["--model.reward_model", "tests.training.test_ppo:length", "--model.lora", "null"]
    arguments += ["--model.value_model", value_model, "--model.max_new_tokens", "64", "--data.batch_size", "32"]
    arguments += ["--data.train", "builtin:courtesy", "--data.limit", "64", "--trainer.devices", "1"]
    arguments += ["--trainer.accelerator", "gpu", "--trainer.strategy", strategy, "--trainer.precision", precision]
    arguments += ["--trainer.val_check_interval", "1.0"]
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    assert main(["fit", *arguments]) == 0
    assert main(["fit", *arguments, "--trainer.max_epochs", "2", "--ckpt_path", "last"]) == 0
    peak = torch.cuda.max_memory_allocated() / 2**30
    with capsys.disabled():
        seconds = time.perf_counter() - began
        print(f"\n{strategy}, {precision}, value {value_model}: {seconds:.0f} s for both runs, peak {peak:.2f} GiB")
