"""DPO on one CUDA device: python -m pytest -m gpu tests/gpu/test_dpo.py -s"""

from __future__ import annotations

import re

import pytest
import torch

from rlhf_lightning.commands.main import main
from rlhf_lightning.models.causal_lm import CausalLM
from tests.models.test_reward_network import padded, rows
from tests.test_configs import ROOT


@torch.no_grad()
def test_log_probs_on_the_gpu_are_those_of_the_cpu(tiny_qwen2):
    policy = CausalLM.from_pretrained(str(tiny_qwen2)).eval()
    ids, mask = padded(rows(), left=0, right=3)
    response = mask & (torch.arange(mask.shape[1]) >= 2)
    on_cpu = policy(ids, mask, response)
    on_gpu = policy.cuda()(ids.cuda(), mask.cuda(), response.cuda())
    assert on_gpu.tokens.dtype == torch.float32
    torch.testing.assert_close(on_gpu.tokens.cpu(), on_cpu.tokens, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize(
    "reference",
    [
        ["frozen", "--model.lora", "null"],
        ["frozen", "--model.precompute_reference", "true", "--model.lora", "null"],
        ["adapter"],
    ],
    ids=lambda given: given[0],
)
def test_the_true_shape_begins_at_ln_2_trains_and_repeats_its_numbers(
    capsys, tmp_path, monkeypatch, qwen2_half_billion, precision, reference
):
    """A wrong first loss stops the run by itself (see `check_start`)."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", str(ROOT / "configs" / "dpo.yaml")]
    arguments += ["--config", str(ROOT / "configs" / "hardware" / "gpu_16_mixed.yaml")]
    arguments += ["--trainer.precision", precision, "--trainer.limit_train_batches", "64", "--data.train"]
    arguments += ["builtin:courtesy", "--data.max_length", "256", "--model.backbone", str(qwen2_half_billion)]
    arguments += ["--model.reference_cache", str(tmp_path / "references"), "--model.reference", *reference]
    torch.cuda.reset_peak_memory_stats()
    assert main(["fit", *arguments]) == 0
    fitted = capsys.readouterr().out
    print(f"peak GPU memory, {reference[0]}, {precision}: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    checkpoint = next(line.split()[-1] for line in fitted.splitlines() if line.startswith("checkpoint:"))
    assert main(["test", *arguments, "--ckpt_path", checkpoint]) == 0
    numbers = [re.findall(r"│ +(-?[\d.]+) │", text) for text in (fitted, capsys.readouterr().out)]
    assert numbers[0] == numbers[1] != []
