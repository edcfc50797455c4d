"""Where the reward of a response comes from: a reward model, a sequence classifier, or a function of the user's.

B responses.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlhf_lightning.data.examples import Message
from rlhf_lightning.errors import TrainingError
from rlhf_lightning.rewards.functions import RewardFunction, reward_scorer
from rlhf_lightning.rewards.scorers import RewardScorer

log = logging.getLogger(__name__)


class RewardSource:
    """Scores responses; higher is better. Says so once when conversations are too long for a reward model.

    Args:
        given: A function, `module:function`, or a directory or hub name of a model that scores (see `reward_scorer`).
        chat_template: Of the text that a model reads (see `RewardScorer`).
        batch_size: Rows of a model at a time.
        trust_remote_code: Run code that comes with a model.

    Raises `ConfigurationError` or `ModelError` when `given` names nothing of the kind.
    """

    def __init__(
        self,
        given: str | RewardFunction,
        *,
        batch_size: int,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.scorer = reward_scorer(
            given, chat_template=chat_template, batch_size=batch_size, trust_remote_code=trust_remote_code
        )
        self.name = self.scorer.name
        self._said = False

    @property
    def model(self) -> nn.Module | None:
        """What computes the scores; None for a function."""
        return self.scorer.model if isinstance(self.scorer, RewardScorer) else None

    def to(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Move a model there, its weights in `dtype` where one is given."""
        if isinstance(self.scorer, RewardScorer):
            self.scorer.to(device, dtype)

    def __call__(
        self,
        prompts: Sequence[Sequence[Message]],
        responses: Sequence[str],
        ended: Sequence[bool] | None = None,
    ) -> Tensor:
        """Scores [B], float32, on the CPU; those that have not `ended` as they stand (see `Scorer`).

        Raises `ModelError` when a function raises, or gives too few.
        """
        scored = self.scorer(prompts, responses, ended)
        cut = sum(each.truncated for each in scored)
        if cut and not self._said:
            self._said = True
            log.warning(
                "reward: %d of %d conversations are longer than what %s reads; it scores them without the beginning of "
                "their prompts",
                *(cut, len(scored), self.name),
            )
        return torch.tensor([each.score for each in scored], dtype=torch.float32)


def check_scores(scores: Tensor, example_ids: Sequence[str], name: str) -> None:
    """Stop before a NaN or infinite score, [B], becomes a gradient. Raises `TrainingError` naming the prompts."""
    wrong = [
        (example, score)
        for example, score in zip(example_ids, scores.tolist(), strict=True)
        if not math.isfinite(score)
    ]
    if wrong:
        named = first_few([f"{example} ({score})" for example, score in wrong])
        raise TrainingError(
            f"model.reward_model: {name} gave scores that are not finite for the prompts {named}; the weights were not "
            "changed by them"
        )


def first_few(names: Sequence[str]) -> str:
    """Up to five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
