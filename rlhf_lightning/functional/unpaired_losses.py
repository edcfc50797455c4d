"""The losses of responses that are judged one at a time, desirable or not, as in the papers.

B responses. Every result is per response, float32 (float64 for float64): the caller takes the mean. In the formulas s
is the sigmoid, h the log-ratio policy - reference of one response, beta h its reward, and w its class's weight.

All losses refuse with ValueError: inputs of different shapes, beta <= 0, a weight below 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.functional.reductions import SumOver, within_process
from rlhf_lightning.functional.shapes import (
    as_mask,
    at_least_float32,
    check_not_negative,
    check_positive,
    check_same_shape,
)


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    *,
    beta: float,
    shift: Tensor,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: w (1 - s(beta h - z)) of desirable responses, w (1 - s(z - beta h)) of others, [B].

    Summed log-probs, [B]; `desirable` [B] bool; `shift` [] is z, the reference point (see `kto_shift`).
    Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 8.
    """
    advantage = _rewards(policy, reference, desirable, beta=beta) - shift
    # 1 - s(x) is written s(-x) here and below: the same number without cancellation.
    losses = torch.where(as_mask(desirable), torch.sigmoid(-advantage), torch.sigmoid(advantage))
    return _weighted(losses, desirable, desirable_weight, undesirable_weight)


def bco_loss(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    *,
    beta: float,
    shift: Tensor,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """BCO: -w log s(beta h - d) of desirable responses, -w log s(d - beta h) of others, nats, [B].

    Summed log-probs, [B]; `desirable` [B] bool; `shift` [] is d, the reward shift (see `RewardShift`).
    Jung et al. 2024 (arXiv 2404.04656); all importance weights 1, that is without its matching of prompts.
    """
    advantage = _rewards(policy, reference, desirable, beta=beta) - shift
    losses = -F.logsigmoid(torch.where(as_mask(desirable), advantage, -advantage))
    return _weighted(losses, desirable, desirable_weight, undesirable_weight)


def apo_zero_unpaired_loss(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """APO-zero without pairs: w (1 - s(beta h)) of desirable responses, w s(beta h) of others, [B].

    Summed log-probs, [B]; `desirable` [B] bool. For responses that beat the policy's own.
    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7, its two terms apart.
    """
    rewards = _rewards(policy, reference, desirable, beta=beta)
    losses = torch.where(as_mask(desirable), torch.sigmoid(-rewards), torch.sigmoid(rewards))
    return _weighted(losses, desirable, desirable_weight, undesirable_weight)


def _rewards(policy: Tensor, reference: Tensor, desirable: Tensor, *, beta: float) -> Tensor:
    check_same_shape(policy=policy, reference=reference, desirable=desirable)
    check_positive(beta=beta)
    return beta * (at_least_float32(policy) - at_least_float32(reference))


def _weighted(losses: Tensor, desirable: Tensor, desirable_weight: float, undesirable_weight: float) -> Tensor:
    check_not_negative(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    return torch.where(as_mask(desirable), desirable_weight * losses, undesirable_weight * losses)


# ---- what is subtracted from rewards -----------------------------------------------------------------------


@torch.no_grad()
def kto_shift(policy: Tensor, reference: Tensor, *, beta: float, sum_over: SumOver = within_process) -> Tensor:
    """KTO's reference point z = beta max(0, mean of policy - reference), [], without a gradient.

    Summed log-probs of K responses to prompts that they do not belong to, [K]: their mean estimates the KL of the
    policy from the reference. It is taken over all processes, and then clamped; 0 where no process has any.
    ValueError: shapes differ, beta <= 0. Ethayarajh et al. 2024 (arXiv 2402.01306), section 4.1.
    """
    check_same_shape(policy=policy, reference=reference)
    check_positive(beta=beta)
    ratios = at_least_float32(policy) - at_least_float32(reference)
    total, count = sum_over(torch.stack([ratios.sum(), ratios.new_tensor(float(len(ratios)))]))
    return beta * (total / count.clamp(min=1)).clamp(min=0)


class RewardShift:
    """BCO's shift: half of the sum of the mean rewards of desirable and of other responses, over all seen so far.

    Of a class that was not seen yet the mean counts as 0, which all rewards are at the start.
    Jung et al. 2024 (arXiv 2404.04656), section 4.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)
        self.counts = torch.zeros(2, dtype=torch.float64)

    @property
    def value(self) -> Tensor:
        """[] float64, on the CPU."""
        return (self.sums / self.counts.clamp(min=1)).mean()

    @torch.no_grad()
    def update(self, rewards: Tensor, desirable: Tensor, *, sum_over: SumOver = within_process) -> None:
        """Add rewards [B] of all processes. ValueError: another shape of `desirable`."""
        check_same_shape(rewards=rewards, desirable=desirable)
        rewards = at_least_float32(rewards)
        masks = torch.stack([as_mask(desirable), ~as_mask(desirable)]).to(rewards.dtype)
        sums, counts = sum_over(torch.stack([masks @ rewards, masks.sum(dim=1)])).cpu().double()
        self.sums, self.counts = self.sums + sums, self.counts + counts

    def state_dict(self) -> dict[str, list[float]]:
        return {"sums": self.sums.tolist(), "counts": self.counts.tolist()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.sums = torch.tensor(state["sums"], dtype=torch.float64)
        self.counts = torch.tensor(state["counts"], dtype=torch.float64)


# ---- the table ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnpairedLoss:
    """A loss of single responses, and what its `shift` is, where it takes one."""

    function: Callable[..., Tensor]
    """Takes policy, reference and desirable, [B] each; and keywords, `beta` and the weights among them."""
    shift: Literal["kl", "rewards"] | None
    """What the shift is made of: the log-ratios of mismatched responses, or the rewards seen so far."""

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters


#: The name in a YAML file -> the loss.
UNPAIRED_LOSSES: dict[str, UnpairedLoss] = {
    "kto": UnpairedLoss(kto_loss, "kl"),
    "bco": UnpairedLoss(bco_loss, "rewards"),
    "apo_zero_unpaired": UnpairedLoss(apo_zero_unpaired_loss, None),
}
