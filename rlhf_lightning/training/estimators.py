"""The advantage estimator of a configuration, found by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rlhf_lightning.errors import ConfigurationError, reason_of
from rlhf_lightning.functional.advantages import ADVANTAGES, AdvantageEstimator
from rlhf_lightning.user_code import named_entry

if TYPE_CHECKING:
    AdvantageName = str
else:
    AdvantageName = Literal[tuple(ADVANTAGES)] | str
"""A name of the table, or `module:function`; `find_estimator` refuses other texts, with the nearest names."""

_GROUP = 2


def find_estimator(name: str) -> AdvantageEstimator:
    """The estimator of the table by its name, or a user's own by `module:function`.

    What is named is a function as the table has them, or an `AdvantageEstimator`, which says what the function needs.
    Raises `ConfigurationError` for an unknown name, and for a function that does not give advantages and returns.
    """
    found = named_entry(name, ADVANTAGES, "model.advantage_estimator")
    estimator = found if isinstance(found, AdvantageEstimator) else AdvantageEstimator(found)
    if name not in ADVANTAGES:
        _try(name, estimator)
    return estimator


def _try(name: str, estimator: AdvantageEstimator) -> None:
    """Call it once on two responses to each of two prompts, so that a mistake is told before any work."""
    shape = (2 * _GROUP, 3)
    rewards, values, mask = torch.ones(shape), torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
    try:
        made = estimator(rewards, values, mask, group_size=_GROUP, gamma=1.0, gae_lambda=0.95)
    except Exception as error:  # a user's function may raise anything
        raise ConfigurationError(
            f"model.advantage_estimator: {name} fails on a small rollout: {reason_of(error)}"
        ) from error
    pair = isinstance(made, tuple) and len(made) == 2
    if not pair or any(not isinstance(each, Tensor) or each.shape != shape for each in made):
        raise ConfigurationError(
            f"model.advantage_estimator: {name} does not give (advantages, returns), each of the shape of the rewards, "
            "[B, T]"
        )
