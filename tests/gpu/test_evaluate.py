"""Evaluation on one CUDA device: python -m pytest -m gpu tests/gpu/test_evaluate.py -s"""

from __future__ import annotations

import json
import time

import pytest
import torch

from rlhf_lightning.commands.main import main
from tests.evaluation.conftest import here, workshop  # noqa: F401 (fixtures)
from tests.test_evaluate import ALL, REFUSAL, check_same, run_command, write


def numbers(out) -> dict:
    return json.loads((out / "metrics.json").read_text())["metrics"]


def test_a_reward_model_has_the_numbers_that_it_has_on_a_cpu(here, tmp_path):  # noqa: F811
    """Replies are drawn with the device's own random numbers, so those of the policies may differ."""
    write(here / "refusal.jsonl", REFUSAL)
    found = {}
    for device in ("cpu", "cuda"):
        assert main(["evaluate", *ALL, "--device", device, "--out", str(tmp_path / device)]) == 0
        found[device] = numbers(tmp_path / device)
    assert set(found["cpu"]) == set(found["cuda"])
    for name, value in found["cpu"].items():
        if name.startswith("rm") and isinstance(value, dict):
            assert found["cuda"][name]["value"] == pytest.approx(value["value"], abs=0.03), name
    assert found["cuda"]["rm/auroc"]["value"] == pytest.approx(found["cpu"]["rm/auroc"]["value"], abs=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_have_the_numbers_of_one(here, tmp_path):  # noqa: F811
    write(here / "refusal.jsonl", REFUSAL)
    for devices in ("1", "2"):
        done = run_command(*ALL, "--device", "cuda", "--devices", devices, "--out", str(tmp_path / devices))
        assert done.returncode == 0, done.stderr[-3000:]
    check_same(tmp_path / "1", tmp_path / "2", "2 x cuda")


def test_the_true_shape_is_judged_in_bfloat16(capsys, tmp_path, qwen2_half_billion):
    policy = str(qwen2_half_billion)
    arguments = ["--policy", policy, "--reference", policy, "--implicit_reward", "true", "--pairs", "builtin:courtesy"]
    arguments += ["--prompts", "builtin:courtesy", "--samples", "4", "--max_new_tokens", "128", "--dtype", "bfloat16"]
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    assert main(["evaluate", *arguments, "--batch_size", "64", "--out", str(tmp_path)]) == 0
    seconds, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated() / 2**30
    found = numbers(tmp_path)
    assert found["policy/kl_nats"]["value"] == 0, "a policy is no distance from itself"
    assert found["implicit/accuracy"]["value"] == 0.5, "all pairs tie"
    with capsys.disabled():
        print(f"\n200 pairs, 36 x 4 replies and 48 refusals, twice: {seconds:.0f} s, peak {peak:.2f} GiB")
