"""The policy losses of PPO and its relatives, and how the losses of tokens become that of an optimizer step.

B responses, T padded tokens; True in a mask marks response tokens, and padding must hold finite numbers. A is the
advantage of a token, q its ratio: the exponential of logprobs - old_logprobs, of the sampled tokens at the sampling
temperature. The exponent is clamped to +-20, beyond which the gradient is 0. Every loss is per token, [B, T], float32
(float64 for float64): `token_weights` and `step_size` make the number of the step.

All losses refuse with ValueError: inputs of different shapes, and a setting that is neither None nor positive.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.functional.shapes import as_mask, at_least_float32, check_layout, check_positive, check_same_shape

Aggregation = Literal["token", "response", "constant"]


def token_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """q of each token, [B, T]."""
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    return (at_least_float32(logprobs) - at_least_float32(old_logprobs)).clamp(-20, 20).exp()


def response_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The geometric mean of the ratios of a response, on each of its tokens, [B, T]; 1 for a row without tokens.

    Zheng et al. 2025 (arXiv 2507.18071), eq. 7: exp(mean over the tokens of logprobs - old_logprobs).
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    mask = as_mask(mask)
    differences = torch.where(mask, at_least_float32(logprobs) - at_least_float32(old_logprobs), 0)
    means = differences.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return means.clamp(-20, 20).exp().expand_as(differences)


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float | None = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """Clipped surrogate of PPO, max(-A q, -A clip(q, 1 - clip_range, 1 + clip_range_high)), per token, [B, T].

    `clip_range_high` is `clip_range` where it is None; larger, it is DAPO's clip-higher. Both None: -A q, the
    importance-weighted policy gradient without clipping. `dual_clip`, above 1: the loss where A < 0 is at most
    -dual_clip * A, and has no gradient there (Ye et al. 2020, arXiv 1912.09729; TRL's `delta`).
    Schulman et al. 2017 (arXiv 1707.06347), eq. 7; Yu et al. 2025 (DAPO, arXiv 2503.14476), eq. 10.
    """
    return _surrogate(token_ratio(logprobs, old_logprobs), advantages, clip_range, clip_range_high, dual_clip)


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float | None = 3e-4,
    clip_range_high: float | None = 4e-4,
    dual_clip: float | None = None,
) -> Tensor:
    """GSPO: the surrogate of `ppo_policy_loss` with one ratio for a response, `response_ratio`, on its tokens, [B, T].

    Its advantages are those of whole responses (`grpo`, `rloo`), and its mean is `response`: then it is the paper's
    eq. 5. The ratio of a response moves far less than that of a token, hence clip ranges of 3e-4 and 4e-4.
    Zheng et al. 2025 (arXiv 2507.18071), section 5.1 for the ranges.
    """
    ratio = response_ratio(logprobs, old_logprobs, mask)
    return _surrogate(ratio, advantages, clip_range, clip_range_high, dual_clip)


def cispo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_range_high: float | None = 0.2
) -> Tensor:
    """CISPO: -sg(min(q, 1 + clip_range_high)) A logprob, per token, [B, T]; sg stops the gradient.

    A token beyond the range keeps a gradient, with a capped weight. There are two readings of the cap: the paper's,
    1 + epsilon_high, as here; and that of TRL 1.16, whose `epsilon_high` caps the ratio itself: its 5.0 is 4.0 here.
    No lower bound, as in the paper's runs. None: no cap, the gradient of -A q.
    MiniMax 2025 (M1, arXiv 2506.13585), eq. 4 and 5.
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ratio = token_ratio(logprobs, old_logprobs).detach()
    if clip_range_high is not None:
        check_positive(clip_range_high=clip_range_high)
        ratio = ratio.clamp(max=1 + clip_range_high)
    return -ratio * at_least_float32(advantages) * at_least_float32(logprobs)


def _surrogate(
    ratio: Tensor,
    advantages: Tensor,
    clip_range: float | None,
    clip_range_high: float | None,
    dual_clip: float | None,
) -> Tensor:
    """The pessimistic one of the losses with a ratio as it is and clipped, [B, T]."""
    check_same_shape(logprobs=ratio, advantages=advantages)
    ranges = {"clip_range": clip_range, "clip_range_high": clip_range_high}
    check_positive(**{name: value for name, value in ranges.items() if value is not None})
    clip_range_high = clip_range if clip_range_high is None else clip_range_high
    advantages = at_least_float32(advantages)
    clipped_ratio = ratio
    if clip_range is not None:
        clipped_ratio = clipped_ratio.clamp(min=1 - clip_range)
    if clip_range_high is not None:
        clipped_ratio = clipped_ratio.clamp(max=1 + clip_range_high)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    if dual_clip is None:
        return losses
    if not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}, but it must be above 1: it is the largest ratio where A < 0")
    return torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)


# ---- from tokens to a step ---------------------------------------------------------------------------------


def token_weights(mask: Tensor, *, aggregation: Aggregation, max_new_tokens: int) -> Tensor:
    """What the loss of each token is multiplied by before the sum, [B, T] float32; 0 outside of the mask.

    The loss of a step is the sum over all its responses, of every micro-batch and process, divided once by
    `step_size`: so that how they are divided changes nothing.
    `token`: 1, the mean over tokens (DAPO, arXiv 2503.14476, eq. 12). `response`: 1 / tokens of its response, the mean
    over responses of their means (GRPO, arXiv 2402.03300, eq. 3). `constant`: 1 / max_new_tokens, the mean over
    responses of sums over a constant length (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783).
    ValueError: shapes, float mask, another aggregation.
    """
    check_layout(mask=(mask, "B T"))
    weights = as_mask(mask).float()
    if aggregation == "token":
        return weights
    if aggregation == "response":
        return weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    if aggregation == "constant":
        return weights / max_new_tokens
    raise ValueError(f"aggregation is {aggregation!r}, but it must be 'token', 'response' or 'constant'")


def step_size(mask: Tensor, *, aggregation: Aggregation) -> Tensor:
    """What the weighted sum over these responses is divided by, [] int64: tokens, or responses that have any."""
    mask = as_mask(mask)
    return mask.sum() if aggregation == "token" else mask.any(dim=1).sum()


# ---- the table ---------------------------------------------------------------------------------------------


class PolicyLoss(NamedTuple):
    """A policy loss, and what it is to be given; the names of its function's parameters say the rest."""

    function: Callable[..., Tensor]
    """Takes logprobs, old_logprobs and advantages, [B, T] each; `mask` if it has a parameter of that name; and those of
    the keywords `clip_range`, `clip_range_high` and `dual_clip` that it has. Gives the loss of each token, [B, T]."""
    whole_response: bool = False
    """Its ratio is that of a response, and so what is logged as ratio and as clipped."""

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, **settings: float | None
    ) -> Tensor:
        """The loss of each token, [B, T]; `settings` are those of the keywords that the function has."""
        rows = {"mask": mask} if "mask" in self.parameters else {}
        return self.function(logprobs, old_logprobs, advantages, **rows, **settings)


#: The name in a YAML file -> the loss.
POLICY_LOSSES: dict[str, PolicyLoss] = {
    "ppo": PolicyLoss(ppo_policy_loss),
    "gspo": PolicyLoss(gspo_loss, whole_response=True),
    "cispo": PolicyLoss(cispo_loss),
}
