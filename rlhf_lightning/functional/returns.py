"""From scores and KL to per-token rewards, and from those to advantages and returns.

B sequences, T padded tokens; True in a mask marks the response tokens, EOS included. Padding may stand on any
side and the mask may have gaps. Results are 0 outside the mask, and nothing outside the mask has any
influence.
"""

import torch
from torch import Tensor

from rlhf_lightning.functional.reductions import last_token_index
from rlhf_lightning.functional.shapes import as_mask, at_least_float32, check_fraction, check_layout, check_not_negative


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
