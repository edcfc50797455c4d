"""KL divergence of the policy from the reference, in nats: estimates, the exact value, the controller.

Estimates take log-probs of tokens that the *policy* sampled. V vocabulary.
http://joschu.net/blog/kl-approx.html
"""

import math
from typing import Literal

import torch
from torch import Tensor

from rlhf_lightning.functional.shapes import at_least_float32, check_positive, check_same_shape

_LARGEST_EXPONENT = 20.0


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, *, estimator: Literal["k1", "k2", "k3"] = "k1") -> Tensor:
    """Estimate of KL(policy, reference) at each sampled token, nats, float32, same shape as the log-probs.

    With d = logprobs - reference_logprobs: k1 = d, unbiased, the one for the reward; k2 = d^2 / 2, biased,
    small variance; k3 = exp(-d) - 1 + d, unbiased and never negative, the one for logs. Below d = -20, where
    exp(-d) is 5e8 and soon inf, k3 goes on along its tangent. ValueError: shapes differ, unknown estimator.
    """
    check_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    difference = at_least_float32(logprobs) - at_least_float32(reference_logprobs)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return _expm1_with_tangent(-difference) + difference
    raise ValueError(f"estimator is {estimator!r}, but it must be 'k1', 'k2' or 'k3'")


def _expm1_with_tangent(x: Tensor) -> Tensor:
    """exp(x) - 1 up to x = 20, its tangent beyond: finite, and its gradient still points the right way."""
    steepest = math.exp(_LARGEST_EXPONENT)
    tangent = steepest * (x - _LARGEST_EXPONENT) + (steepest - 1)
    return torch.where(x > _LARGEST_EXPONENT, tangent, torch.expm1(x.clamp(max=_LARGEST_EXPONENT)))


def exact_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(policy, reference) over the whole vocabulary, nats, float32, [...] for two logits [..., V].

    A token the policy cannot produce (logit -inf) adds 0. ValueError: shapes differ.
    """
    check_same_shape(logits=logits, reference_logits=reference_logits)
    logprobs = torch.log_softmax(at_least_float32(logits), dim=-1)
    reference_logprobs = torch.log_softmax(at_least_float32(reference_logits), dim=-1)
    difference = torch.where(logprobs == -torch.inf, 0, logprobs - reference_logprobs)
    return (logprobs.exp() * difference).sum(dim=-1)


class AdaptiveKLController:
    """The coefficient of the KL penalty, steered so that the KL of an episode comes to rest at `target` nats.

    `target` and the `kl` of `update` are nats per *episode*: the sum of k1 over its tokens, averaged over
    episodes. (Per-token means, which some libraries feed in here, need another target.) OpenAI's settings:
    initial 0.15 to 0.2, target 6, horizon 10000. ValueError: one of the three is not positive.
    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.
    """

    def __init__(self, initial: float, target: float, horizon: float) -> None:
        check_positive(initial=initial, target=target, horizon=horizon)
        self.value = float(initial)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, episodes: int) -> None:
        """Multiply the coefficient by 1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon.

        ValueError: kl not finite; episodes not positive, or so many that the coefficient could reach 0.
        """
        kl = float(kl)
        if not math.isfinite(kl):
            raise ValueError(f"kl is {kl}, but it must be finite: look for NaN in the log-probs of the rollout")
        check_positive(episodes=episodes)
        if episodes >= 5 * self.horizon:
            raise ValueError(
                f"episodes is {episodes} with a horizon of {self.horizon}: one update could bring the "
                "coefficient to 0 or below; give a horizon above a fifth of the episodes of one update"
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * episodes / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        check_positive(value=state["value"])
        self.value = float(state["value"])
