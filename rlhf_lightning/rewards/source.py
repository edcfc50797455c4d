"""Where the reward of a response comes from: reward models, sequence classifiers, functions of the user's, or several.

B responses, K rewards.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Required, TypedDict

import torch
from torch import Tensor, nn

from rlhf_lightning.data.examples import Message
from rlhf_lightning.errors import ConfigurationError, TrainingError
from rlhf_lightning.functional.ensembles import careful_score, ensemble_spread
from rlhf_lightning.rewards.functions import RewardFunction, check_text_of, reward_scorer
from rlhf_lightning.rewards.judged import JudgeScorer
from rlhf_lightning.rewards.scorers import RewardScorer, Scorer
from rlhf_lightning.user_code import name_of

log = logging.getLogger(__name__)


class RewardKeys(TypedDict, total=False):
    """One of several rewards: its model or function, its weight in the sum, the text it reads, its name in the log."""

    source: Required[str]
    weight: float
    chat_template: str
    name: str
    reference: str


if TYPE_CHECKING:
    Reward = str | RewardFunction | Sequence[str | RewardFunction | RewardKeys | Mapping[str, Any]]
else:
    Reward = list[str | RewardKeys] | str  # what a configuration can name
"""A model or a function (see `reward_scorer`), or a list of them, some with a weight."""


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """One of several rewards. Raises `ConfigurationError` for a weight that is no number, or is 0."""

    source: str | RewardFunction
    weight: float = 1.0
    chat_template: str | None = None
    """Of the text that a model reads (see `RewardScorer`)."""
    name: str = ""
    """In logs; the end of the source's own name when not given."""
    reference: str | None = None
    """Rows of responses that a judge compares with (see `JudgeScorer`)."""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", re.split("[/:]", name_of(self.source).rstrip("/"))[-1])
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight == 0:
            raise ConfigurationError(f"the weight of {self.name} is {weight!r}; give a number that is not 0")

    def scorer(self, **loading: Any) -> Scorer:
        """What computes it; `loading` is that of `reward_scorer`, which says what it raises."""
        return reward_scorer(self.source, chat_template=self.chat_template, reference=self.reference, **loading)


def reward_list(
    given: Reward, chat_template: str | None = None, *, key: str = "model.reward_model"
) -> list[WeightedReward]:
    """The rewards that are added up; of a single one its weight is 1.

    `chat_template` is that of a single model, `key` what a refusal calls the list. Raises `ConfigurationError` for what
    is no reward, for two of one name, and for a template that nothing reads.
    """
    template_key = key.replace("reward_model", "reward_chat_template")
    if isinstance(given, str) or callable(given):
        given = [{"source": given, "chat_template": chat_template}]
    elif chat_template is not None:
        raise ConfigurationError(
            f"{template_key}: goes with one reward model; give chat_template with each of the list"
        )
    try:
        rewards = [_weighted(each) for each in given]
    except ConfigurationError as error:
        raise ConfigurationError(f"{key}: {error}") from error
    names = [reward.name for reward in rewards]
    if not rewards:
        raise ConfigurationError(f"{key}: an empty list; name at least one model or function")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigurationError(f"{key}: two rewards are named {repeated[0]}; give each its own name")
    for reward in rewards:
        check_text_of(reward.source, reward.chat_template, template_key)
    return rewards


def _weighted(given: Any) -> WeightedReward:
    if isinstance(given, str) or callable(given):
        return WeightedReward(given)
    if not isinstance(given, Mapping) or not {"source"} <= given.keys() <= set(WeightedReward.__dataclass_fields__):
        raise ConfigurationError(
            f"{given!r} is no reward; give a model or a function, or "
            "{source: ONE OF THEM, weight: 1, name: NAME, chat_template: TEMPLATE, reference: ROWS}"
        )
    return WeightedReward(**{key: value for key, value in given.items() if value is not None})


def plain_reward(given: Reward) -> str | list[dict[str, Any]]:
    """The same without objects and without what is not given, as a checkpoint holds it and a configuration may."""
    if isinstance(given, str) or callable(given):
        return name_of(given)
    plain = [asdict(reward) | {"source": name_of(reward.source)} for reward in reward_list(given)]
    return [{key: value for key, value in reward.items() if value is not None} for reward in plain]


class Rewards(NamedTuple):
    """What B responses get."""

    scores: Tensor
    """[B, K] float32, every reward by itself."""
    spreads: dict[str, Tensor]
    """Of each reward that comes of an ensemble, by its name: the standard deviation over its heads, [B] float32."""


class RewardSource:
    """Scores responses; higher is better. Says so once when conversations are too long for a reward model.

    Args:
        given: A function, `module:function`, or a directory or hub name of a model that scores (see `reward_scorer`);
            or a list of them, whose weighted sum is the score.
        chat_template: Of the text that a single model reads (see `RewardScorer`).
        batch_size: Rows of a model at a time.
        trust_remote_code: Run code that comes with a model.
        ensemble_penalty: How many standard deviations over its heads are taken off the score of a reward model.

    Raises `ConfigurationError` or `ModelError` when `given` names nothing of the kind, and `ConfigurationError` for a
    penalty where a reward model has one head, or none is a model.
    """

    def __init__(
        self,
        given: Reward,
        *,
        batch_size: int,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
        ensemble_penalty: float = 0.0,
    ) -> None:
        rewards = reward_list(given, chat_template)
        loading: dict[str, Any] = {"batch_size": batch_size, "trust_remote_code": trust_remote_code}
        self.scorers = [reward.scorer(**loading) for reward in rewards]
        self.names = [reward.name for reward in rewards]
        self.weights = torch.tensor([reward.weight for reward in rewards], dtype=torch.float64)
        several = [f"{reward.weight:g} {scorer.name}" for reward, scorer in zip(rewards, self.scorers, strict=True)]
        self.name = " + ".join(several) if len(rewards) > 1 else self.scorers[0].name
        self._said: set[str] = set()
        self.ensemble_penalty = ensemble_penalty
        single = [scorer.name for scorer in self.models if scorer.num_heads == 1]
        if ensemble_penalty and (single or not self.models):
            raise ConfigurationError(
                f"model.ensemble_penalty: {single[0] if single else self.name} has no heads that could disagree; train "
                "a reward model with model.num_heads of 2 or more, or leave ensemble_penalty out"
            )

    @property
    def ensembles(self) -> list[str]:
        """Names of the rewards that come of several heads."""
        pairs = zip(self.names, self.scorers, strict=True)
        return [name for name, scorer in pairs if isinstance(scorer, RewardScorer) and scorer.num_heads > 1]

    @property
    def models(self) -> list[RewardScorer]:
        """Those of its scorers that are models."""
        return [scorer for scorer in self.scorers if isinstance(scorer, RewardScorer)]

    @property
    def networks(self) -> list[nn.Module]:
        """What computes their scores."""
        judges = [scorer for scorer in self.scorers if isinstance(scorer, JudgeScorer)]
        return [*(scorer.model for scorer in self.models), *(network for each in judges for network in each.networks)]

    def to(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Move the models there, their weights in `dtype` where one is given."""
        for scorer in self.scorers:
            if isinstance(scorer, RewardScorer | JudgeScorer):
                scorer.to(device, dtype)

    def __call__(
        self,
        prompts: Sequence[Sequence[Message]],
        responses: Sequence[str],
        ended: Sequence[bool] | None = None,
    ) -> Tensor:
        """The weighted sum of `each`, [B] float32."""
        return self.added(self.each(prompts, responses, ended).scores)

    def each(
        self,
        prompts: Sequence[Sequence[Message]],
        responses: Sequence[str],
        ended: Sequence[bool] | None = None,
    ) -> Rewards:
        """Every reward by itself, on the CPU; responses that have not `ended` as they stand (see `Scorer`).

        Raises `ModelError` when a function raises, or gives too few.
        """
        columns, spreads = [], {}
        for name, scorer in zip(self.names, self.scorers, strict=True):
            scored = scorer(prompts, responses, ended)
            cut = sum(each.truncated for each in scored)
            if cut and scorer.name not in self._said:
                self._said.add(scorer.name)
                log.warning(
                    "reward: %d of %d conversations are longer than what %s reads; it scores them without the "
                    "beginning of their prompts",
                    *(cut, len(scored), scorer.name),
                )
            column = torch.tensor([each.score for each in scored], dtype=torch.float32)
            if name in self.ensembles:
                heads = torch.tensor([each.heads for each in scored], dtype=torch.float32)
                spreads[name] = ensemble_spread(heads)
                if self.ensemble_penalty:
                    column = careful_score(heads, penalty=self.ensemble_penalty)
            columns.append(column)
        return Rewards(torch.stack(columns, dim=1), spreads)

    def added(self, rewards: Tensor) -> Tensor:
        """The weighted sum of K rewards, [B, K], of each response, [B] float32."""
        return (rewards.double() @ self.weights.to(rewards.device)).float()


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
