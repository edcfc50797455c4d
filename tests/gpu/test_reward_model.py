"""The reward model on one CUDA device: python -m pytest -m gpu tests/gpu"""

from __future__ import annotations

import json

import pytest
import torch

from rlhf_lightning import RewardNetwork
from rlhf_lightning.commands.main import main
from rlhf_lightning.data.courtesy.make import make_rows
from tests.models.test_reward_network import padded, rows
from tests.test_configs import ROOT


@torch.no_grad()
def test_scores_on_the_gpu_are_those_of_the_cpu(tiny_qwen2):
    torch.manual_seed(0)
    network = RewardNetwork.from_backbone(str(tiny_qwen2)).eval()
    ids, mask = padded(rows(), left=2, right=3)
    on_cpu = network(ids, mask)
    on_gpu = network.cuda()(ids.cuda(), mask.cuda())
    assert on_gpu.dtype == torch.float32
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_the_mission_s_run_fits_and_test_repeats_its_numbers(
    capsys, tmp_path, monkeypatch, qwen2_half_billion, precision
):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        lines = "".join(json.dumps(row) + "\n" for row in make_rows(split)[:128])
        (tmp_path / f"{split}.jsonl").write_text(lines)
    arguments = ["--config", str(ROOT / "configs" / "reward_model.yaml")]
    arguments += ["--config", str(ROOT / "configs" / "hardware" / "gpu_16_mixed.yaml")]
    arguments += ["--trainer.precision", precision, "--trainer.max_epochs", "1", "--trainer.val_check_interval", "1.0"]
    arguments += ["--model.backbone", str(qwen2_half_billion), "--data.train", "train.jsonl", "--data.val", "val.jsonl"]
    torch.cuda.reset_peak_memory_stats()
    assert main(["fit", *arguments]) == 0
    fitted = capsys.readouterr().out
    print(f"peak GPU memory, {precision}: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    checkpoint = next(line.split()[-1] for line in fitted.splitlines() if line.startswith("checkpoint:"))
    assert main(["test", *arguments, "--ckpt_path", checkpoint]) == 0
    tested = capsys.readouterr().out

    def table(text):
        return [line for line in text.splitlines() if line.startswith("│")]

    assert table(tested) == table(fitted)
