"""Scores by a Python function of the user's, given or named `module:function`: a rule, another program, a service.

R rows (a prompt and one response each).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf_lightning.data.examples import Message
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.rewards.judged import JUDGE, JudgeScorer
from rlhf_lightning.rewards.scorers import RewardScorer, Scored, Scorer, ScorerKind
from rlhf_lightning.rewards.texts import check_reward_template
from rlhf_lightning.user_code import call, code_fingerprint, load_function, name_of, names_function

RewardFunction = Callable[[Sequence[Sequence[Message]], Sequence[str]], Sequence[float]]
"""Takes R conversations, each a sequence of {role, content}, and the R responses as text; gives R floats."""


def is_judge(given: object) -> bool:
    """Whether it names a language model that is asked for rewards."""
    return isinstance(given, str) and given.startswith(JUDGE)


def is_function(given: str | RewardFunction) -> bool:
    """Whether it is a function or names one, and so reads messages and responses as they are."""
    return not isinstance(given, str) or names_function(given)


def reward_scorer(
    given: str | RewardFunction,
    *,
    chat_template: str | None = None,
    reference: str | None = None,
    trust_remote_code: bool = False,
    batch_size: int = 8,
    **loading: Any,
) -> Scorer:
    """What a `reward_model` is: a function, or the name of one (`module:function`), of a directory, or of a hub model.

    Or of a judge (`judge://MODEL`), which alone takes a `reference` (see `JudgeScorer`). `chat_template`, `batch_size`
    and `loading`: of a `RewardScorer`. Raises `ConfigurationError` or `ModelError` when it names
    nothing of the kind.
    """
    check_text_of(given, chat_template)
    shared: dict[str, Any] = {"chat_template": chat_template, "batch_size": batch_size}
    if is_judge(given):
        scorer = JudgeScorer(str(given), reference=reference, trust_remote_code=trust_remote_code, **shared)
        if "device" in loading:
            scorer.to(torch.device(loading["device"]), loading.get("dtype"))
        return scorer
    if reference is not None:
        name = name_of(given)
        raise ConfigurationError(f"reference: {name} compares with nothing; leave the key out, or name a judge")
    if not isinstance(given, str) or is_function(given):
        return FunctionScorer(given)
    return RewardScorer(given, trust_remote_code=trust_remote_code, **shared, **loading)


def check_text_of(
    given: str | RewardFunction | None, chat_template: str | None, key: str = "reward_chat_template"
) -> None:
    """Raise `ConfigurationError` for a template that is none, or that nothing would read."""
    if is_judge(given):
        return  # it has a question of its own, which its class reads
    check_reward_template(chat_template, key)
    if chat_template is not None and (given is None or is_function(given)):
        reader = "no reward model is given" if given is None else f"{given} gets messages and responses as they are"
        raise ConfigurationError(f"{key}: {reader}, so nothing reads it; leave the key out")


class FunctionScorer:
    """A `Scorer` that asks a function. It has no tokens: the length of a response is that of its text, in characters.

    The fingerprint is that of the module's file; what the module itself imports is not looked at.

    Raises `ConfigurationError` when there is no such function.
    """

    kind: ScorerKind = "Custom Classifier"

    def __init__(self, given: str | RewardFunction) -> None:
        self.name = name_of(given)
        self.function = load_function(given, "the directory of a reward model") if isinstance(given, str) else given
        self.fingerprint = code_fingerprint(self.name)

    def __call__(
        self,
        prompts: Sequence[Sequence[Message]],
        responses: Sequence[str],
        ended: Sequence[bool] | None = None,
    ) -> list[Scored]:
        """As `Scorer`; the text of a response is the same, ended or not.

        Raises `ModelError` when the function raises, or gives another number of scores.
        """
        scores = call(self.function, self.name, prompts, responses, gives=float)
        return [Scored(score, len(text), False) for score, text in zip(scores, responses, strict=True)]
