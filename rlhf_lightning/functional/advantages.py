"""From scores and KL to per-token rewards, and from those to advantages and returns.

B sequences, T padded tokens; True in a mask marks the response tokens, EOS included. Padding may stand on any
side and the mask may have gaps. Results are 0 outside the mask, and nothing outside the mask has any
influence.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.functional.reductions import SumOver, centered, last_token_index, within_process
from rlhf_lightning.functional.shapes import (
    as_mask,
    at_least_float32,
    check_fraction,
    check_layout,
    check_not_negative,
    check_positive,
    check_same_shape,
)

ScaleRewards = Literal["group", "batch", "none"]


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Reward of each token, [B, T], float32: -kl_coef * kl, and the score once, on the last response token.

    scores [B], kl [B, T] in nats (k1: k3 in the reward biases the gradient), mask [B, T].
    ValueError: shapes, float mask, a row without response tokens, kl_coef < 0.
    Stiennon et al. 2020 (arXiv 2009.01325), section 3.4.
    """
    check_layout(scores=(scores, "B"), kl=(kl, "B T"), mask=(mask, "B T"))
    check_not_negative(kl_coef=kl_coef)
    scores, kl = at_least_float32(scores), at_least_float32(kl)
    rewards = torch.where(as_mask(mask), -kl_coef * kl, 0).to(torch.promote_types(kl.dtype, scores.dtype))
    return rewards.scatter_add(1, last_token_index(mask).unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantages, and returns (advantage + value, before whitening), both [B, T], float32.

    A_t = delta_t + gamma * gae_lambda * A_next, with delta_t = r_t + gamma * V_next - V_t. "Next" is the next
    True position of the row: masked ones are stepped over, and after the last one A and V are 0. The value at
    t is that of the state *before* response token t.
    ValueError: shapes, float mask, gamma or gae_lambda outside [0, 1].
    Schulman et al. 2016 (arXiv 1506.02438), eq. 16.
    """
    check_layout(rewards=(rewards, "B T"), values=(values, "B T"), mask=(mask, "B T"))
    check_fraction(gamma=gamma, gae_lambda=gae_lambda)
    mask = as_mask(mask)
    rewards, values = at_least_float32(rewards), at_least_float32(values)
    advantages = torch.zeros_like(rewards + values)
    next_advantage = next_value = advantages.new_zeros(advantages.shape[0])
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        advantages[:, t] = torch.where(mask[:, t], advantage, 0)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return advantages, torch.where(mask, advantages + values, 0)


def returns_to_go(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Discounted sum of each token's reward and those after it in its row, [B, T], float32.

    The advantages of REINFORCE++ before they are whitened over the whole rollout. Its KL is a penalty in the reward of
    each token, as in PPO (Hu 2025, arXiv 2501.03262): `rewards` are those of `shaped_rewards`.
    ValueError: as `generalized_advantages`.
    """
    return generalized_advantages(rewards, torch.zeros_like(rewards), mask, gamma=gamma, gae_lambda=1.0)[0]


def leave_one_out_advantages(rewards: Tensor, mask: Tensor, *, group_size: int) -> Tensor:
    """RLOO: a response's summed reward minus the mean of the others to its prompt, on each of its tokens, [B, T].

    Rows i * group_size up to (i + 1) * group_size - 1 answer prompt i; a group of equal rewards gets exactly 0.
    Its KL is part of the reward, summed over the response: `rewards` are those of `shaped_rewards`. float32.
    ValueError: shapes, float mask, group_size below 2 or no divisor of B.
    Ahmadian et al. 2024 (arXiv 2402.14740), sections 2 (the reward) and 3.3; Kool et al. 2019.
    """
    totals = _group_totals(rewards, mask, group_size)
    others = (totals.sum(dim=1, keepdim=True) - totals) / (group_size - 1)
    return torch.where(as_mask(mask), (totals - others).view(-1, 1), 0)


def group_normalized_advantages(
    rewards: Tensor,
    mask: Tensor,
    *,
    group_size: int,
    epsilon: float = 1e-4,
    scale_rewards: ScaleRewards = "group",
    sum_over: SumOver = within_process,
) -> Tensor:
    """GRPO: a response's summed reward less the mean of its prompt's group, scaled, on each of its tokens, [B, T].

    (R - mean) / (std + epsilon) with the sample standard deviation of the `group`, or of the whole `batch`, of all
    processes through `sum_over` (Liu et al. 2025, arXiv 2508.08221); R - mean for `none` (Dr. GRPO, Z. Liu et al. 2025,
    arXiv 2503.20783: a division by the group's weighs prompts that are almost solved or unsolved more). A group of
    equal rewards gets exactly 0. Rows as in `leave_one_out_advantages`. float32. ValueError: the same, another scale.
    The rewards are those of the responses alone (`shaped_rewards` with `kl_coef=0`): GRPO's KL, estimated by k3, is a
    term of the loss with a weight of its own, and not divided by the standard deviation.
    Shao et al. 2024 (arXiv 2402.03300), section 4.1.2 (outcome supervision); eq. 3 and 4 for the KL.
    """
    totals = _group_totals(rewards, mask, group_size)
    scaled = totals - totals.mean(dim=1, keepdim=True)
    if scale_rewards == "group":
        scaled = scaled / (totals.std(dim=1, keepdim=True) + epsilon)
    elif scale_rewards == "batch":
        whole = torch.where(as_mask(mask), at_least_float32(rewards), 0).sum(dim=1)
        differences, count = centered(whole, torch.ones_like(whole, dtype=torch.bool), sum_over=sum_over)
        scaled = scaled / ((sum_over(differences.square().sum()) / (count - 1)).sqrt() + epsilon).to(scaled.dtype)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards is {scale_rewards!r}, but it must be 'group', 'batch' or 'none'")
    return torch.where(as_mask(mask), scaled.view(-1, 1), 0)


def normalized_within_groups(rewards: Tensor, *, group_size: int) -> Tensor:
    """Each of K rewards less its mean over the responses to a prompt, in their standard deviations, [B, K] float32.

    rewards [B, K]; rows, epsilon and ValueErrors as in `group_normalized_advantages`, equal ones get exactly 0. The sum
    of what comes out is GDPO's (Liu et al. 2026, arXiv 2601.05242): each reward tells responses apart at its own scale.
    """
    check_layout(rewards=(rewards, "B K"))
    whole = torch.ones(rewards.shape[0], 1, dtype=torch.bool, device=rewards.device)
    columns = [group_normalized_advantages(each[:, None], whole, group_size=group_size) for each in rewards.unbind(1)]
    return torch.cat(columns, dim=1)


def groups_that_differ(scores: Tensor, *, group_size: int) -> Tensor:
    """True for the responses of the groups whose scores are not all equal, [B] bool; equal ones teach nothing.

    scores [B]; rows as in `leave_one_out_advantages`. ValueError: group_size is no divisor of B.
    """
    check_layout(scores=(scores, "B"))
    if group_size < 1 or scores.shape[0] % group_size:
        raise ValueError(f"group_size is {group_size} for {scores.shape[0]} responses; it must divide their number")
    groups = scores.view(-1, group_size)
    return (groups != groups[:, :1]).any(dim=1).repeat_interleave(group_size)


def best_and_worst(scores: Tensor, *, group_size: int, min_gap: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The positions of the best and the worst response of each group, [G] int64 both, and whether they are a pair.

    They are one, [G] bool, where their scores differ by more than `min_gap`: a tie states no preference. Of equal
    scores the first is taken. scores [B]; rows as in `leave_one_out_advantages`. ValueError: group_size is below 2 or
    no divisor of B, min_gap < 0.
    """
    check_layout(scores=(scores, "B"))
    check_not_negative(min_gap=min_gap)
    if group_size < 2 or scores.shape[0] % group_size:
        raise ValueError(
            f"group_size is {group_size} for {scores.shape[0]} responses; it must be 2 or more and divide their number"
        )
    groups = scores.view(-1, group_size)
    starts = torch.arange(0, scores.shape[0], group_size, device=scores.device)
    best, worst = starts + groups.argmax(dim=1), starts + groups.argmin(dim=1)
    return best, worst, scores[best] - scores[worst] > min_gap


def overlong_share(lengths: Tensor, *, max_new_tokens: int, buffer: int) -> Tensor:
    """How far a response of so many tokens is into the last `buffer` of `max_new_tokens`, from 0 to 1, [B] float32.

    lengths [B]. The soft overlong punishment of DAPO is minus this (Yu et al. 2025, arXiv 2503.14476, eq. 13).
    ValueError: lengths not [B], buffer < 1.
    """
    check_layout(lengths=(lengths, "B"))
    check_positive(buffer=buffer)
    return ((lengths.float() - (max_new_tokens - buffer)) / buffer).clamp(0, 1)


def _group_totals(rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """Summed rewards of the responses less that of the first of their group, [prompts, group_size].

    Only differences count. Without the shift, rounding of the mean leaves some between equal rewards: three times
    1000.1 in float32 have one of 6e-5 to their mean, and so a standard deviation of 7e-5 to be divided by.
    """
    check_layout(rewards=(rewards, "B T"), mask=(mask, "B T"))
    if group_size < 2 or rewards.shape[0] % group_size:
        raise ValueError(
            f"group_size is {group_size} for {rewards.shape[0]} responses; it must be 2 or more and divide their number"
        )
    totals = torch.where(as_mask(mask), at_least_float32(rewards), 0).sum(dim=1).view(-1, group_size)
    return totals - totals[:, :1]


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, *, sum_over: SumOver = within_process) -> Tensor:
    """1 - E[(returns - values)^2] / Var[returns] over the mask, [] float64: 1 is perfect, 0 as good as their mean.

    `sum_over` adds up a tensor over all processes. NaN where the returns do not vary.
    ValueError: shapes, float mask, an empty mask.
    """
    check_same_shape(values=values, returns=returns)
    differences, _ = centered(returns, mask, sum_over=sum_over)
    variance = sum_over(differences.square().sum())
    error = sum_over(torch.where(as_mask(mask), (returns - values).square(), 0).double().sum())
    return torch.where(variance > 0, 1 - error / variance, torch.nan)


# ---- the table ---------------------------------------------------------------------------------------------


class AdvantageEstimator(NamedTuple):
    """How rewards become advantages, and what that needs."""

    function: Callable[..., tuple[Tensor, Tensor]]
    """(rewards [B, T], values [B, T], mask [B, T], *, group_size, gamma, gae_lambda) -> (advantages, returns), both
    [B, T]; `returns` is what a value model learns."""
    uses_values: bool = False
    """Whether there is a value model; else `values` and `returns` are 0."""
    uses_groups: bool = False
    """Whether a response is compared with the others to its prompt, rows i * group_size to (i + 1) * group_size - 1."""
    whitened: bool = False
    """Whether the advantages are whitened over the whole rollout afterwards."""
    kl_in_loss: bool = False
    """Whether the KL is a term of the loss (k3), with a weight of its own; else it is part of the reward (k1)."""

    scales: bool = False
    """Whether the function takes `scale_rewards` and `sum_over` too, as `group_normalized_advantages` has them."""

    def __call__(
        self,
        rewards: Tensor,
        values: Tensor,
        mask: Tensor,
        *,
        scale_rewards: ScaleRewards = "group",
        sum_over: SumOver = within_process,
        **settings: float,
    ) -> tuple[Tensor, Tensor]:
        """Advantages and returns, both [B, T]; `settings` are `group_size`, `gamma` and `gae_lambda`."""
        scaling: dict[str, Any] = {"scale_rewards": scale_rewards, "sum_over": sum_over} if self.scales else {}
        return self.function(rewards, values, mask, **settings, **scaling)


def _without_values(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """An estimator of advantages alone in the signature of the table."""
    taken = inspect.signature(function).parameters

    def estimate(rewards: Tensor, values: Tensor, mask: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        own = {name: value for name, value in settings.items() if name in taken}
        return function(rewards, mask, **own), torch.zeros_like(values)

    return estimate


def _generalized(rewards: Tensor, values: Tensor, mask: Tensor, *, group_size: int, gamma: float, gae_lambda: float):
    return generalized_advantages(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)


#: The name in a YAML file -> the estimator.
ADVANTAGES: dict[str, AdvantageEstimator] = {
    "gae": AdvantageEstimator(_generalized, uses_values=True, whitened=True),
    "grpo": AdvantageEstimator(
        _without_values(group_normalized_advantages), uses_groups=True, kl_in_loss=True, scales=True
    ),
    "rloo": AdvantageEstimator(_without_values(leave_one_out_advantages), uses_groups=True),
    "reinforce++": AdvantageEstimator(_without_values(returns_to_go), whitened=True),
}
