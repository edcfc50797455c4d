"""The policy loss of a configuration: found by its name, given its settings, and put together for an optimizer step.

B responses, S tokens of the longest response.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.errors import ConfigurationError, reason_of
from rlhf_lightning.functional.advantages import AdvantageEstimator, groups_that_differ
from rlhf_lightning.functional.policy_losses import (
    POLICY_LOSSES,
    Aggregation,
    PolicyLoss,
    response_ratio,
    step_size,
    token_ratio,
    token_weights,
)
from rlhf_lightning.user_code import named_entry

if TYPE_CHECKING:
    PolicyLossType = str
else:
    PolicyLossType = Literal[tuple(POLICY_LOSSES)] | str
"""A name of the table, or `module:function`; `StepLoss` refuses other texts, with the nearest names."""

log = logging.getLogger(__name__)

_WIDE = 0.01
"""A clip range above it hardly ever clips the ratio of a whole response."""


class Targets(NamedTuple):
    """What is learned from a rollout, fixed for all passes over it; 0 outside the mask of its tokens. [B, S] each."""

    advantages: Tensor
    """float32, whitened where the method has it so."""
    returns: Tensor
    """float32, what the value model is trained to; before whitening."""
    learned: Tensor
    """bool, True on the tokens that are learned from: those of the responses that are not left out."""


def left_out(settings: Any, scores: Tensor, ended: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Which of B responses are not learned from, [B] bool, and what is logged of that, [B] each.

    `scores` [B] are those that are learned from; `ended` [B] says which responses have their EOS.
    """
    numbers: dict[str, Tensor] = {}
    out = torch.zeros_like(ended)
    if settings.num_generations > 1:
        equal = ~groups_that_differ(scores, group_size=settings.num_generations)
        numbers["frac_reward_zero_std"] = equal.float()
        out |= equal & settings.skip_equal_groups
    out |= ~ended & settings.mask_truncated_responses
    if settings.skip_equal_groups or settings.mask_truncated_responses:
        numbers["left_out"] = out.float()
    return out, numbers


class StepLoss:
    """A policy loss by its name, or a user's own by `module:function`, with its settings and its aggregation.

    `clip_range_high` is `clip_range` where it is None. Raises `ConfigurationError` for an unknown name, for a setting
    that the loss does not take, and for a function that does not give a loss for each token.
    """

    def __init__(
        self,
        name: str,
        *,
        aggregation: Aggregation,
        max_new_tokens: int,
        clip_range: float | None,
        clip_range_high: float | None = None,
        dual_clip: float | None = None,
    ) -> None:
        self.name, self.aggregation, self.max_new_tokens = name, aggregation, max_new_tokens
        found = named_entry(name, POLICY_LOSSES, "model.policy_loss_type")
        self.loss: PolicyLoss = found if isinstance(found, PolicyLoss) else PolicyLoss(found)
        high = clip_range if clip_range_high is None else clip_range_high
        given = {"clip_range": clip_range, "clip_range_high": high, "dual_clip": dual_clip}
        for key, value in (("clip_range_high", clip_range_high), ("dual_clip", dual_clip)):
            if value is not None and key not in self.loss.parameters:
                raise ConfigurationError(f"model.{key}: the loss {name} takes none; leave it out")
        self.settings = {key: value for key, value in given.items() if key in self.loss.parameters}
        self._try()
        self._warn()

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Loss of each token, [B, S] float32."""
        return self.loss(logprobs, old_logprobs, advantages, mask, **self.settings)

    def ratio(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """The ratio to the policy that sampled, of each token or of its response, [B, S]."""
        if self.loss.whole_response:
            return response_ratio(logprobs, old_logprobs, mask)
        return token_ratio(logprobs, old_logprobs)

    def outside(self, ratio: Tensor) -> Tensor:
        """Where a ratio is outside of the clip range, [B, S] bool."""
        low, high = (self.settings.get(key) for key in ("clip_range", "clip_range_high"))
        moved, nowhere = ratio - 1, torch.zeros_like(ratio, dtype=torch.bool)
        return (nowhere if low is None else -moved > low) | (nowhere if high is None else moved > high)

    @property
    def clips_rounding(self) -> bool:
        """Whether the range is so narrow that rounding in half precision may leave it."""
        return any(value is not None and value < _WIDE for value in self.settings.values())

    def weights(self, learned: Tensor) -> Tensor:
        """What each token's loss is multiplied by in the sum of a step, [B, S] (see `token_weights`)."""
        return token_weights(learned, aggregation=self.aggregation, max_new_tokens=self.max_new_tokens)

    def size(self, learned: Tensor) -> Tensor:
        """What that sum is divided by, [] int64."""
        return step_size(learned, aggregation=self.aggregation)

    def _try(self) -> None:
        """Call the loss once, so that what it refuses is refused before any work."""
        shape = (2, 3)
        old, mask = torch.full(shape, -1.0), torch.ones(shape, dtype=torch.bool)
        try:
            made: Any = self(old.clone().requires_grad_(), old, torch.tensor([[1.0], [-1.0]]).expand(shape), mask)
        except Exception as error:  # a user's function may raise anything
            raise ConfigurationError(
                f"model.policy_loss_type: {self.name} refuses its settings: {reason_of(error)}"
            ) from error
        if not isinstance(made, Tensor) or made.shape != shape:
            what = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ConfigurationError(
                f"model.policy_loss_type: {self.name} gives {what}, not the loss of each token, [B, T]"
            )
        if not made.requires_grad:
            raise ConfigurationError(
                f"model.policy_loss_type: {self.name} gives a loss without a gradient; compute it from logprobs"
            )

    def _warn(self) -> None:
        """Say which settings make a loss of whole responses another than its paper's."""
        ranges = [self.settings.get(key) for key in ("clip_range", "clip_range_high")]
        if self.loss.whole_response and any(each is not None and each > _WIDE for each in ranges):
            log.warning(
                "model.clip_range: %s clips the ratio of a whole response, which hardly ever moves by %s; the paper "
                "has clip_range 3e-4 and clip_range_high 4e-4",
                *(self.name, max(each for each in ranges if each is not None)),
            )
        if self.loss.whole_response and self.aggregation == "token":
            log.warning(
                "model.loss_aggregation: %s with token weighs a response by its length; response is the paper's mean",
                self.name,
            )


def check_policy_settings(settings: Any, estimator: AdvantageEstimator) -> None:
    """Refuse settings of what is learned from a rollout that the estimator has no use for. `ConfigurationError`."""
    name = settings.advantage_estimator
    if settings.scale_rewards != "group" and not estimator.scales:
        raise ConfigurationError(
            f"model.scale_rewards: {name} does not scale by groups; leave the key out, or use grpo"
        )
    if settings.kl_loss_coef > 0 and estimator.kl_in_loss:
        raise ConfigurationError(f"model.kl_loss_coef: the KL of {name} is in the loss already; set model.kl_coef")
    if settings.skip_equal_groups and settings.num_generations < 2:
        raise ConfigurationError("model.skip_equal_groups: there are no groups; set model.num_generations to 2 or more")
    if settings.overlong_buffer > settings.max_new_tokens:
        raise ConfigurationError(
            f"model.overlong_buffer is {settings.overlong_buffer}, but max_new_tokens is {settings.max_new_tokens}; "
            "give a part of them"
        )
    if settings.overlong_buffer > 0 and settings.missing_eos_penalty == 0:
        raise ConfigurationError(
            "model.overlong_buffer: what grows over these tokens is model.missing_eos_penalty, which is 0; set it to 1"
        )
