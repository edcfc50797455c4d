"""A tiny evaluation: a reward model, a policy before and after, pairs, and RewardBench's subsets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from rlhf_lightning.data.courtesy.make import make_rows
from rlhf_lightning.evaluation.benchmarks.rewardbench import SUBSETS
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.reward_network import RewardNetwork

PAIRS, PROMPTS = 23, 7


@pytest.fixture(scope="session")
def workshop(tmp_path_factory, tiny_qwen2) -> Path:
    """A directory with models/{reward,other,before,after} and pairs.jsonl, prompts.jsonl, rewardbench.jsonl."""
    directory = tmp_path_factory.mktemp("workshop")
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    for seed, name in enumerate(("reward", "other")):
        torch.manual_seed(seed)
        saved = RewardNetwork.from_backbone(str(tiny_qwen2)).save_pretrained(directory / "models" / name)
        tokenizer.save_pretrained(saved)
    for name, noise in (("before", 0.0), ("after", 0.02)):
        policy = CausalLM.from_pretrained(str(tiny_qwen2))
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        policy.save_pretrained(directory / "models" / name)
        tokenizer.save_pretrained(directory / "models" / name)
    rows = make_rows("val")
    write(directory / "pairs.jsonl", rows[:PAIRS])
    first = {row["prompt"]: row for row in rows}
    write(directory / "prompts.jsonl", list(first.values())[:PROMPTS])
    benchmark = [
        {name: row[name] for name in ("prompt", "chosen", "rejected")} | {"subset": subset, "id": f"{subset}-{number}"}
        for place, subset in enumerate(SUBSETS)
        for number, row in enumerate(rows[2 * place : 2 * place + 2])
    ]
    write(directory / "rewardbench.jsonl", benchmark)
    return directory


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def here(workshop, monkeypatch) -> Path:
    """The workshop as the current directory."""
    monkeypatch.chdir(workshop)
    return workshop
