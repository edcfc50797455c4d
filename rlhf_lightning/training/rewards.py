"""Where the reward of a response comes from: a reward model, a sequence classifier, or a function of the user's.

B responses.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.data.examples import Message
from rlhf_lightning.errors import ConfigurationError, TrainingError
from rlhf_lightning.evaluation.scoring import RewardScorer
from rlhf_lightning.models.backbones import reason_of
from rlhf_lightning.tiny import TINY

RewardFunction = Callable[[Sequence[list[Message]], Sequence[str]], Sequence[float]]
"""Takes B conversations, each a list of {role, content}, and the B responses as text; gives B floats."""


def reward_source(given: str, *, batch_size: int, trust_remote_code: bool = False) -> RewardSource:
    """What a `reward_model` key names: `module:function`, or a directory or hub name of a model that scores.

    Raises `ConfigurationError` or `ModelError` when it names nothing of the kind.
    """
    module, colon, function = given.partition(":")
    names = colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))
    if names and given != TINY:
        return FunctionReward(_imported(module, function, given), given)
    return ModelReward(given, batch_size=batch_size, trust_remote_code=trust_remote_code)


class RewardSource:
    """Scores responses; higher is better."""

    name: str

    def __call__(self, prompts: Sequence[list[Message]], responses: Sequence[str]) -> Tensor:
        """Scores [B], float32, on the CPU."""
        raise NotImplementedError

    def to(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Move a model there, its weights in `dtype` where one is given."""


class FunctionReward(RewardSource):
    """A Python function. Raises `TrainingError` when it raises, or gives another number of scores than of responses."""

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function = function
        self.name = name

    def __call__(self, prompts: Sequence[list[Message]], responses: Sequence[str]) -> Tensor:
        try:
            scores = [float(score) for score in self.function(prompts, responses)]
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise TrainingError(
                f"model.reward_model: {self.name} raised {type(error).__name__} ({reason_of(error)}) at "
                f"{place.filename}, line {place.lineno}"
            ) from error
        if len(scores) != len(responses):
            raise TrainingError(
                f"model.reward_model: {self.name} gave {len(scores)} scores for {len(responses)} responses"
            )
        return torch.tensor(scores, dtype=torch.float32)


class ModelReward(RewardSource):
    """A reward model of any tokenizer (see `RewardScorer`). `cut` counts the rows that were too long for it."""

    def __init__(self, name: str, *, batch_size: int, trust_remote_code: bool = False) -> None:
        self.scorer = RewardScorer(name, batch_size=batch_size, trust_remote_code=trust_remote_code)
        self.name = name
        self.model = self.scorer.model
        self.chat_format = self.scorer.chat_format
        self.cut = 0

    def to(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.scorer.to(device, dtype)

    def __call__(self, prompts: Sequence[list[Message]], responses: Sequence[str]) -> Tensor:
        scored = self.scorer(prompts, responses)
        self.cut += sum(each.truncated for each in scored)
        return torch.tensor([each.score for each in scored], dtype=torch.float32)


def check_scores(scores: Tensor, example_ids: Sequence[str], name: str) -> None:
    """Stop before a NaN or infinite score, [B], becomes a gradient. Raises `TrainingError` naming the prompts."""
    wrong = [
        (example, score)
        for example, score in zip(example_ids, scores.tolist(), strict=True)
        if not math.isfinite(score)
    ]
    if wrong:
        named = ", ".join(f"{example} ({score})" for example, score in wrong[:5])
        raise TrainingError(
            f"model.reward_model: {name} gave scores that are not finite for the prompts {named}"
            + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            + "; the weights were not changed by them"
        )


def _imported(module: str, function: str, given: str) -> RewardFunction:
    sys.path.insert(0, os.getcwd())  # a file beside the user's configuration
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"model.reward_model: {given} cannot be imported ({reason_of(error)}); give module:function of a module in "
            "this directory or of an installed package, or the directory of a reward model"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ConfigurationError(f"model.reward_model: {given} is a {type(found).__name__}, not a function")
    return found
