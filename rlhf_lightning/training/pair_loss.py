"""The preference loss of a configuration: found by its name, given its settings, applied to the log-probs of pairs.

B pairs.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.errors import ConfigurationError, reason_of
from rlhf_lightning.functional.losses import PREFERENCE_LOSSES, PreferenceLoss
from rlhf_lightning.models.causal_lm import ResponseLogprobs
from rlhf_lightning.user_code import name_of, named_entry

if TYPE_CHECKING:
    from collections.abc import Callable

    LossType = str | Callable[..., Tensor]
else:
    LossType = Literal[tuple(PREFERENCE_LOSSES)] | str
"""A name of the table, or `module:function`; `PairLoss` refuses other texts, with the nearest names."""


class PairLogprobs(NamedTuple):
    """Log-probabilities of the responses of B pairs, in nats, float32, and their tokens."""

    chosen: Tensor
    """[B], summed over the tokens."""
    rejected: Tensor
    """[B]"""
    chosen_lengths: Tensor
    """[B] int64, EOS token included."""
    rejected_lengths: Tensor
    """[B] int64"""

    @classmethod
    def of(cls, responses: ResponseLogprobs) -> PairLogprobs:
        """Of 2B responses, the B chosen ones first."""
        return cls(*responses.sums.chunk(2), *responses.lengths.chunk(2))

    def averages(self) -> tuple[Tensor, Tensor]:
        """The log-probabilities per token, [B] each."""
        return self.chosen / self.chosen_lengths, self.rejected / self.rejected_lengths


class PairLoss:
    """A loss by its name, or a user's own by `module:function`, with its settings; those that are None are not given.

    Raises `ConfigurationError` for an unknown name, for a setting that the loss does not take or misses, and for a
    function that does not give a loss for each pair.
    """

    def __init__(self, given: LossType, *, beta: float, **settings: float | None) -> None:
        self.name = name = name_of(given)
        found = named_entry(given, PREFERENCE_LOSSES, "model.loss_type")
        self.loss: PreferenceLoss = found if isinstance(found, PreferenceLoss) else PreferenceLoss(found)
        self.settings = {"beta": beta} | _settings(name, self.loss, settings)
        self._try()

    @property
    def uses_reference(self) -> bool:
        return self.loss.uses_reference

    def taken(self, pairs: PairLogprobs) -> tuple[Tensor, Tensor]:
        """The log-probs that the loss takes, of chosen and rejected responses: whole, or per token."""
        return pairs.averages() if self.loss.average else (pairs.chosen, pairs.rejected)

    def __call__(self, policy: PairLogprobs, reference: PairLogprobs | None) -> Tensor:
        """Loss of each pair, [B] float32. The reference is None for a loss without one."""
        sides = [*self.taken(policy), *(() if reference is None else self.taken(reference))]
        lengths = {}
        if self.loss.uses_lengths:
            lengths = {"chosen_lengths": policy.chosen_lengths, "rejected_lengths": policy.rejected_lengths}
        return self.loss.function(*sides, **self.settings, **lengths)

    @torch.no_grad()
    def rewards(self, policy: PairLogprobs, reference: PairLogprobs | None) -> tuple[Tensor, Tensor]:
        """Implicit rewards beta (policy - reference) of both responses, [B] each, of what the loss takes.

        For losses without a reference beta times the policy's average log-probs.
        """
        chosen, rejected = self.taken(policy)
        if reference is not None:
            reference_chosen, reference_rejected = self.taken(reference)
            chosen, rejected = chosen - reference_chosen, rejected - reference_rejected
        return self.settings["beta"] * chosen, self.settings["beta"] * rejected

    def _try(self) -> None:
        """Call the loss once, so that what it refuses is refused before any work."""
        logprobs = PairLogprobs(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0]), *torch.full((2, 2), 2))
        try:
            made = self(logprobs, logprobs if self.uses_reference else None)
        except Exception as error:  # a user's function may raise anything
            raise ConfigurationError(
                f"model.loss_type: {self.name} refuses its settings: {reason_of(error)}"
            ) from error
        if not isinstance(made, Tensor) or made.shape != (2,):
            what = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ConfigurationError(f"model.loss_type: {self.name} gives {what}, not the loss of each pair, [B]")


def _settings(name: str, loss: PreferenceLoss, given: dict[str, float | None]) -> dict[str, float]:
    """The given settings that belong to a loss."""
    settings = {}
    for key, value in given.items():
        if value is not None and key not in loss.parameters:
            takers = [other for other, its in PREFERENCE_LOSSES.items() if key in its.parameters]
            raise ConfigurationError(
                f"model.{key}: the loss {name} takes none; leave it out, or use loss_type {' or '.join(takers)}"
            )
        if value is not None:
            settings[key] = value
        elif key in loss.parameters and loss.parameters[key].default is inspect.Parameter.empty:
            raise ConfigurationError(f"model.{key}: the loss {name} needs it; give a number")
    return settings
