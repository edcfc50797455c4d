"""Exported reward models of loud weights, and our own scores of a few conversations, to compare other programs with."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_lightning.data.chat_format import load_chat_format
from rlhf_lightning.rewards.scorers import RewardScorer
from rlhf_lightning.training.reward_model import RewardModel

PROMPTS = ["How long do I boil an egg?", "Who was that?", "Write a word, and then another one, please."]
RESPONSES = ["Seven minutes.", "Nobody that I know, I am sorry to say.", "Word. Another."]


def export_reward_model(start: str | Path, directory: Path, **head: str) -> str:
    """Export a reward model that begins at `start`, with a head of keys of `RewardModel`; where it lies."""
    torch.manual_seed(0)
    module = RewardModel(str(start), **head)
    module.configure_model()
    for weight in module.network.score.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    module.chat_format = load_chat_format(str(start))
    module.export(directory)
    return str(directory)


def our_scores(directory: str, responses: list[str]) -> torch.Tensor:
    """Scores [3] of a response to each of `PROMPTS`."""
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return torch.tensor([each.score for each in RewardScorer(directory)(prompts, responses)])
