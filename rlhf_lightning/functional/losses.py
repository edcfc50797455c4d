"""The losses of the reward model, of preference tuning (DPO and relatives) and of values, as in the papers.

B pairs or sequences, T padded tokens. Every result is per pair or per token, float32 (float64 for float64):
the caller takes the mean. "Summed" and "average" say which log-probability of a response a loss takes: the
sum over its tokens in nats, or that sum divided by the number of its tokens. In the formulas s is the
sigmoid, h the log-ratio policy - reference of one response (chosen or rejected), and D = h_chosen -
h_rejected.

All preference losses refuse with ValueError: inputs of different shapes, beta <= 0, and what their docstring
adds.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.functional.shapes import (
    at_least_float32,
    check_label_smoothing,
    check_log_probabilities,
    check_not_negative,
    check_positive,
    check_same_shape,
)

# ---- what several losses share -----------------------------------------------------------------------------


def _log_ratios(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor
) -> tuple[Tensor, Tensor]:
    """h_chosen and h_rejected. Policy minus reference first: the two are close, so little is rounded off."""
    check_same_shape(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )
    chosen = at_least_float32(policy_chosen) - at_least_float32(reference_chosen)
    rejected = at_least_float32(policy_rejected) - at_least_float32(reference_rejected)
    return chosen, rejected


def _smoothed_logistic(x: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of s(x) against a label that is right with probability 1 - label_smoothing."""
    check_label_smoothing(label_smoothing)
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


# ---- reward model ------------------------------------------------------------------------------------------


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> Tensor:
    """-log s(chosen - rejected - margin), smoothed, + centering * (chosen + rejected)^2, nats, [B].

    Scores of the two responses, and the margin by which the first should lead, [B]. The centering term (0.01
    is usual) pulls the mean score to 0, which the likelihood leaves free.
    ValueError: shapes differ, label_smoothing outside [0, 0.5), centering < 0.
    Ouyang et al. 2022 (arXiv 2203.02155), eq. 1; margin: Touvron et al. 2023 (arXiv 2307.09288), eq. 2;
    centering: Eisenstein et al. 2023 (arXiv 2312.09244), eq. 2.
    """
    margins = {} if margin is None else {"margin": margin}
    check_same_shape(chosen=chosen, rejected=rejected, **margins)
    check_not_negative(centering=centering)
    chosen, rejected = at_least_float32(chosen), at_least_float32(rejected)
    lead = chosen - rejected
    if margin is not None:
        lead = lead - at_least_float32(margin)
    return _smoothed_logistic(lead, label_smoothing) + centering * (chosen + rejected).square()


# ---- preference losses with a reference --------------------------------------------------------------------


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO, and with label smoothing cDPO: -(1 - e) log s(beta D) - e log s(-beta D), nats, [B].

    Summed log-probs, [B]; of average ones it is `sigmoid_norm`, length-normalized DPO, whose beta is about 5 (Lambert
    et al. 2024, arXiv 2411.15124). ValueError: label_smoothing outside [0, 0.5).
    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; Mitchell 2023 (ericmitchell.ai/cdpo.pdf), eq. 3.
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    check_positive(beta=beta)
    return _smoothed_logistic(beta * (chosen - rejected), label_smoothing)


def robust_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO, unbiased under labels flipped at rate e: [-(1-e) log s(beta D) + e log s(-beta D)] / (1 - 2e).

    Nats, [B]. Summed log-probs, [B]. Falls without bound as D grows.
    ValueError: label_smoothing outside [0, 0.5). Chowdhury et al. 2024 (arXiv 2403.00409).
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    check_positive(beta=beta)
    check_label_smoothing(label_smoothing)
    logits = beta * (chosen - rejected)
    right, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> Tensor:
    """IPO: (D - 1 / (2 beta))^2, squared nats per token, [B].

    *Average* log-probs, [B], as its authors advise (huggingface/trl PR #1265) and TRL does; with sums, as the
    paper prints it, the target 1 / (2 beta) would be a margin of the whole response.
    Azar et al. 2023 (arXiv 2310.12036), eq. 17, where beta is called tau.
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    check_positive(beta=beta)
    return (chosen - rejected - 1 / (2 * beta)).square()


def hinge_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Hinge on the DPO margin: max(0, 1 - beta D), [B].

    Summed log-probs, [B].
    Liu et al. 2023 (RSO, arXiv 2309.06657), after SLiC (Zhao et al. 2023, arXiv 2305.10425).
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    check_positive(beta=beta)
    return torch.relu(1 - beta * (chosen - rejected))


def apo_zero_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> Tensor:
    """APO-zero, where chosen responses beat the policy's: 1 - s(beta h_chosen) + s(beta h_rejected), [B].

    Summed log-probs, [B]. D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7.
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    check_positive(beta=beta)
    # 1 - s(x) is written s(-x) here and below: the same number without cancellation.
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> Tensor:
    """APO-down, where the policy beats the chosen responses: s(beta h_chosen) + 1 - s(beta D), [B].

    Summed log-probs, [B]. D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8.
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    check_positive(beta=beta)
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def exo_pair_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 1e-3,
) -> Tensor:
    """EXO on pairs, the reverse KL of (s(beta D), s(-beta D)) from (1 - e, e), nats, [B].

    Summed log-probs, [B]. ValueError: label_smoothing outside (0, 0.5): its logarithm is taken.
    Ji et al. 2024 (arXiv 2402.00856), eq. 16.
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    check_positive(beta=beta, label_smoothing=label_smoothing)
    check_label_smoothing(label_smoothing)
    logits = beta * (chosen - rejected)
    right = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log(1 - label_smoothing))
    flipped = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return right + flipped


def nca_pair_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> Tensor:
    """NCA on pairs: -log s(beta h_chosen) - 0.5 log s(-beta h_chosen) - 0.5 log s(-beta h_rejected), [B].

    Nats. Summed log-probs, [B]. Chen et al. 2024 (arXiv 2402.05369), the preference form of NCA.
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    check_positive(beta=beta)
    restraint = -0.5 * F.logsigmoid(-beta * chosen) - 0.5 * F.logsigmoid(-beta * rejected)
    return restraint - F.logsigmoid(beta * chosen)


def bco_pair_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> Tensor:
    """BCO on pairs: -log s(beta h_chosen) - log s(-beta h_rejected), nats, [B].

    Summed log-probs, [B]. The paper's reward shift, a running mean over batches, is state: here it is 0.
    Jung et al. 2024 (arXiv 2404.04656).
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    check_positive(beta=beta)
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)


def sppo_hard_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> Tensor:
    """SPPO with hard labels: (h_chosen - 1 / (2 beta))^2 + (h_rejected + 1 / (2 beta))^2, squared nats, [B].

    Summed log-probs, [B]. Wu et al. 2024 (arXiv 2405.00675), win probabilities 1 and 0, eta = 1 / beta.
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    check_positive(beta=beta)
    return (chosen - 1 / (2 * beta)).square() + (rejected + 1 / (2 * beta)).square()


def dpop_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    dpop_lambda: float = 50.0,
) -> Tensor:
    """DPO-positive: -log s(beta (D - lambda max(0, -h_chosen))), nats, [B]. Keeps the chosen response likely.

    Summed log-probs, [B]. The paper uses beta 0.3 and lambda 50. ValueError: dpop_lambda < 0.
    Pal et al. 2024 (Smaug, arXiv 2402.13228), section 3.
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    check_positive(beta=beta)
    check_not_negative(dpop_lambda=dpop_lambda)
    return -F.logsigmoid(beta * (chosen - rejected - dpop_lambda * torch.relu(-chosen)))


def r_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    alpha: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> Tensor:
    """Length-regularized DPO: -log s(beta D + alpha (chosen_lengths - rejected_lengths)), nats, [B].

    Summed log-probs and lengths in tokens, [B]. The sign is plus: what is maximized is r - alpha * length,
    so r = beta h + alpha * length up to a constant, and a longer chosen response needs less of h to be
    preferred. Pairs with a shorter chosen response weigh more.
    ValueError: lengths of another shape, alpha < 0. Park et al. 2024 (arXiv 2403.19159), section 4.
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    check_same_shape(policy_chosen=policy_chosen, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    check_positive(beta=beta)
    check_not_negative(alpha=alpha)
    longer = at_least_float32(chosen_lengths) - at_least_float32(rejected_lengths)
    return -F.logsigmoid(beta * (chosen - rejected) + alpha * longer)


# ---- preference losses without a reference -----------------------------------------------------------------


def simpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """SimPO: -log s(beta (chosen - rejected) - gamma), smoothed as cDPO, nats, [B].

    Average log-probs of the policy alone, [B]. gamma is the margin itself; papers often give gamma / beta.
    ValueError: gamma < 0, label_smoothing outside [0, 0.5). Meng et al. 2024 (arXiv 2405.14734), eq. 6.
    """
    check_same_shape(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    check_positive(beta=beta)
    check_not_negative(gamma=gamma)
    lead = at_least_float32(policy_chosen) - at_least_float32(policy_rejected)
    return _smoothed_logistic(beta * lead - gamma, label_smoothing)


def orpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, *, beta: float) -> Tensor:
    """ORPO: -chosen - beta log s(log odds(chosen) - log odds(rejected)), nats, [B].

    Average log-probs of the policy alone, [B]; odds(x) = e^x / (1 - e^x). The first term is the SFT loss,
    here over the response's tokens; beta is the paper's lambda.
    ValueError: a log-prob above 0 (on an accelerator: NaN). Hong et al. 2024 (arXiv 2403.07691), eq. 6, 7.
    """
    check_same_shape(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    check_log_probabilities(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    check_positive(beta=beta)
    chosen, rejected = at_least_float32(policy_chosen), at_least_float32(policy_rejected)
    return -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p.

    Probability 1 has infinite odds, and float32 rounds to it from 1 - 6e-8 on. There the odds and their slope
    are taken one rounding error below 1, so that a rejected response of probability 1 is still pushed down.
    """
    rounding = torch.finfo(logprob.dtype).eps
    is_one = (logprob > -rounding) & (logprob <= 0)
    moved = logprob - logprob.detach() - rounding  # the value is -rounding, the gradient passes
    return logprob - _log1mexp(torch.where(is_one, moved, logprob))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, by the form of two that does not cancel (Maechler 2012, R package Rmpfr)."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


# ---- values ------------------------------------------------------------------------------------------------


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float = 0.2) -> Tensor:
    """0.5 max((V - R)^2, (clip(V, old - clip_range, old + clip_range) - R)^2), per token, [B, T].

    Values and returns in units of reward. Padding must hold finite numbers; `masked_mean` drops it.
    ValueError: shapes differ, clip_range <= 0. Not in the PPO paper, but in its code: openai/baselines, ppo2.
    """
    check_same_shape(values=values, old_values=old_values, returns=returns)
    check_positive(clip_range=clip_range)
    values, old_values, returns = map(at_least_float32, (values, old_values, returns))
    clipped_values = values.clamp(old_values - clip_range, old_values + clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (clipped_values - returns).square())


# ---- the table ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference loss, and what it is to be given; the names of its function's parameters say the rest."""

    function: Callable[..., Tensor]
    """Takes policy_chosen and policy_rejected, then reference_chosen and reference_rejected unless it does without a
    reference, [B] each; and keywords, `beta` among them. Gives the loss of each pair, [B]."""
    average: bool = False
    """It takes average log-probs (`sequence_logprobs(..., average=True)`), not sums."""

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @property
    def uses_reference(self) -> bool:
        return "reference_chosen" in self.parameters

    @property
    def uses_lengths(self) -> bool:
        """It takes `chosen_lengths` and `rejected_lengths` too, the response tokens of each pair, [B]."""
        return "chosen_lengths" in self.parameters


#: The name in a YAML file -> the loss.
PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(dpo_loss),
    "robust": PreferenceLoss(robust_dpo_loss),
    "ipo": PreferenceLoss(ipo_loss, average=True),
    "hinge": PreferenceLoss(hinge_loss),
    "sigmoid_norm": PreferenceLoss(dpo_loss, average=True),
    "simpo": PreferenceLoss(simpo_loss, average=True),
    "orpo": PreferenceLoss(orpo_loss, average=True),
    "apo_zero": PreferenceLoss(apo_zero_loss),
    "apo_down": PreferenceLoss(apo_down_loss),
    "exo_pair": PreferenceLoss(exo_pair_loss),
    "nca_pair": PreferenceLoss(nca_pair_loss),
    "bco_pair": PreferenceLoss(bco_pair_loss),
    "sppo_hard": PreferenceLoss(sppo_hard_loss),
    "dpop": PreferenceLoss(dpop_loss),
    "r_dpo": PreferenceLoss(r_dpo_loss),
}
