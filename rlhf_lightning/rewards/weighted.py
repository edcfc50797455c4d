"""Several rewards as one scorer: their weighted sum, where a list stands in the place of a reward model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from rlhf_lightning.data.examples import Message
from rlhf_lightning.rewards.scorers import RewardScorer, Scored, Scorer, ScorerKind
from rlhf_lightning.rewards.source import Reward, WeightedReward, reward_list


class WeightedScorer:
    """A `Scorer` that adds up others, each times its weight, in float64.

    The length of a response is that of the first of them that is a model, in its tokens, else of its text.

    Args:
        rewards: What is added up, and its weights.
        loading: Of each `RewardScorer`.

    Raises what loading one of them raises.
    """

    kind: ScorerKind = "Custom Classifier"

    def __init__(self, rewards: Sequence[WeightedReward], **loading: Any) -> None:
        self.weights = [reward.weight for reward in rewards]
        self.scorers = [reward.scorer(**loading) for reward in rewards]
        parts = [f"{weight:g} {of.name}" for weight, of in zip(self.weights, self.scorers, strict=True)]
        self.name = " + ".join(parts)
        marks = [(weight, of.fingerprint) for weight, of in zip(self.weights, self.scorers, strict=True)]
        self.fingerprint = hashlib.sha256(repr(marks).encode()).hexdigest()
        self._first = next((i for i, of in enumerate(self.scorers) if isinstance(of, RewardScorer)), 0)

    def __call__(
        self,
        prompts: Sequence[Sequence[Message]],
        responses: Sequence[str],
        ended: Sequence[bool] | None = None,
    ) -> list[Scored]:
        """As `Scorer`; a prompt that one of them cut is cut."""
        each = [scorer(prompts, responses, ended) for scorer in self.scorers]
        return [
            Scored(
                sum(weight * of.score for weight, of in zip(self.weights, own, strict=True)),
                own[self._first].tokens,
                any(of.truncated for of in own),
            )
            for own in zip(*each, strict=True)
        ]


def scorer_of(given: Reward, *, chat_template: str | None = None, **loading: Any) -> Scorer:
    """The scorer of one reward, or of a list of them. Raises `ConfigurationError` or `ModelError` as they do."""
    rewards = reward_list(given, chat_template)
    if len(rewards) == 1 and rewards[0].weight == 1:
        return rewards[0].scorer(**loading)
    return WeightedScorer(rewards, **loading)
