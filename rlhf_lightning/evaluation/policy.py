"""What training did to a policy: reward before and after, win rates, KL, and the curves of over-optimisation.

Legend: P prompts, K responses to each, S steps of a run; rewards are raw scores of one reward model, tokens the
lengths of the responses. Rewards of the Bradley-Terry model are defined up to a shift per prompt, and their scale is
free; but for the mean rewards themselves, no number of `compare_policies` changes with either. The unit of every
interval is the prompt. A second reward model (the training one and a held-out one) means a second call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Unpack

import numpy as np

from rlhf_lightning.errors import ConfigurationError, UserError
from rlhf_lightning.evaluation.estimates import (
    Estimate,
    Resampling,
    bootstrap,
    difference_estimate,
    finite,
    mean_estimate,
    ratio,
)

CLAIMED_POINTS = 25.0
LEAST_OVERLAP = 0.25
"""Below it, the length-controlled win rate extrapolates: 7.3 points off on 51 models of AlpacaEval, 0.25 on the 5
above it."""
LENGTH_RIDGE = 0.025
"""Per comparison; 20 of the 805 of AlpacaEval, where it brought the mean error from 6.6 to 1.5 points."""
_CERTAIN = 12.0
"""Logit at which a fit stops: where one side wins everything, the likelihood has no maximum."""


class Anchors(NamedTuple):
    """Mean reward of the chosen and of the rejected responses of each prompt, [P] each."""

    chosen: np.ndarray
    rejected: np.ndarray


@dataclass(frozen=True, slots=True)
class AnchoredGain:
    """Rewards on the scale of the prompts' own pairs: 0 is the rejected response, 100 the chosen one.

    `refused` says why there are no scores, `relative_refused` why there is no relative gain; else they are empty.
    """

    gap: Estimate
    """chosen - rejected, in the reward model's own unit."""
    score_before: Estimate | None
    score_after: Estimate | None
    gain: Estimate | None
    """score_after - score_before, in points."""
    relative_gain: Estimate | None
    """score_after / score_before - 1."""
    refused: str
    relative_refused: str


@dataclass(frozen=True, slots=True)
class LengthControlledWinRate:
    """Win rate if both policies' responses were equally long."""

    win_rate: Estimate
    length_coefficient: float
    """Log-odds per tanh(length difference / SD): above 0 where longer responses win."""
    length_overlap: float
    """min(share of comparisons with the longer response after, share with the shorter); equal lengths are half of
    both."""
    warning: str


@dataclass(frozen=True, slots=True)
class Claim:
    outcome: Literal["met", "not met", "not measured"]
    reason: str


@dataclass(frozen=True, slots=True)
class PolicyComparison:
    """Two policies under one reward model; n of every estimate is the number of prompts."""

    prompts: int
    replies: int
    reward_before: Estimate
    reward_after: Estimate
    reward_gain: Estimate
    anchored: AnchoredGain | None
    gain_sd: Estimate | None
    """Gain in standard deviations of the policy before, within its responses to one prompt."""
    gain_sd_refused: str
    win_rate: Estimate
    percentile: Estimate
    """Of the mean reward after, among the responses before to the same prompt: 50 where nothing changed."""
    length_controlled: LengthControlledWinRate | None
    tokens_before: Estimate | None
    tokens_after: Estimate | None
    claim_25: Claim


def compare_policies(
    before: np.ndarray,
    after: np.ndarray,
    *,
    anchors: Anchors | None = None,
    tokens: tuple[np.ndarray, np.ndarray] | None = None,
    **how: Unpack[Resampling],
) -> PolicyComparison:
    """Rewards of K responses to each prompt before and after training, and their tokens before and after, [P, K] each.

    Both policies answered the same prompts, with the same decoding. UserError: a reward that is not finite, fewer
    than two prompts. ConfigurationError: shapes differ.
    """
    before, after = finite("policy", "rewards before", before), finite("policy", "rewards after", after)
    if before.ndim != 2 or before.shape != after.shape:
        raise ConfigurationError(
            f"policy: the rewards before are {list(before.shape)} and those after {list(after.shape)}, but both "
            "must be [P, K]: the same number of responses to the same prompts"
        )
    mean_before, mean_after = before.mean(axis=1), after.mean(axis=1)
    anchored = None if anchors is None else anchored_gain(mean_before, mean_after, anchors, **how)
    gain_sd, gain_sd_refused = _gain_in_sd(before, after, **how)
    beaten = (mean_after[:, None] > before) + 0.5 * (mean_after[:, None] == before)
    return PolicyComparison(
        prompts=len(before),
        replies=before.shape[1],
        reward_before=mean_estimate(mean_before, **how),
        reward_after=mean_estimate(mean_after, **how),
        reward_gain=difference_estimate(mean_after, mean_before, **how),
        anchored=anchored,
        gain_sd=gain_sd,
        gain_sd_refused=gain_sd_refused,
        win_rate=mean_estimate(_wins(before, after).mean(axis=(1, 2)), **how),
        percentile=mean_estimate(100 * beaten.mean(axis=1), **how),
        length_controlled=None if tokens is None else length_controlled_win_rate(before, after, *tokens, **how),
        tokens_before=None if tokens is None else mean_estimate(tokens[0].mean(axis=1), **how),
        tokens_after=None if tokens is None else mean_estimate(tokens[1].mean(axis=1), **how),
        claim_25=claim_25(anchored),
    )


def anchored_gain(before: np.ndarray, after: np.ndarray, anchors: Anchors, **how: Unpack[Resampling]) -> AnchoredGain:
    """S = 100 mean(r - rejected) / mean(chosen - rejected) of both policies, mean rewards of each prompt, all [P].

    The ratio is taken anew in each resample. It is refused where the interval of mean(chosen - rejected) is not
    above 0; the relative gain, where that of S before is not.
    """
    chosen, rejected = finite("policy", "chosen", anchors.chosen), finite("policy", "rejected", anchors.rejected)
    width = chosen - rejected
    gap = mean_estimate(width, **how)
    if gap.low <= 0:
        refused = (
            f"the reward model does not tell chosen from rejected on these prompts: their gap is {gap.value:.3g} "
            f"[{gap.low:.3g}, {gap.high:.3g}]"
        )
        return AnchoredGain(gap, None, None, None, None, refused, refused)
    lift_before, lift_after = before - rejected, after - rejected

    def score(lift: np.ndarray) -> Estimate:
        return bootstrap(lambda drawn: 100 * ratio(lift[drawn].sum(), width[drawn].sum()), width, **how)

    score_before = score(lift_before)
    relative, relative_refused = None, ""
    if score_before.low > 0:
        relative = bootstrap(lambda drawn: ratio(lift_after[drawn].sum(), lift_before[drawn].sum()) - 1, width, **how)
    else:
        relative_refused = (
            f"the score before, {score_before.value:.1f} [{score_before.low:.1f}, {score_before.high:.1f}], is not "
            "clearly above 0, so a share of it means nothing"
        )
    gain = score(lift_after - lift_before)
    return AnchoredGain(gap, score_before, score(lift_after), gain, relative, "", relative_refused)


def claim_25(anchored: AnchoredGain | None) -> Claim:
    """ "+25 % reward": an anchored gain of at least 25 points whose lower 95 % bound is above 0."""
    if anchored is None:
        return Claim("not measured", "the prompts carry no chosen and rejected responses to measure against")
    gain = anchored.gain
    if gain is None:
        return Claim("not measured", anchored.refused)
    found = f"{gain.value:+.1f} points [{gain.low:+.1f}, {gain.high:+.1f}] on the scale 0 = rejected, 100 = chosen"
    if gain.value < CLAIMED_POINTS:
        return Claim("not met", f"{found}, below {CLAIMED_POINTS:g}")
    if gain.low <= 0:
        return Claim("not met", f"{found}, not clearly above 0")
    return Claim("met", found)


def length_controlled_win_rate(
    before: np.ndarray,
    after: np.ndarray,
    tokens_before: np.ndarray,
    tokens_after: np.ndarray,
    **how: Unpack[Resampling],
) -> LengthControlledWinRate:
    """Win rate of after over before at equal length, from rewards [P, K] and lengths [P, K].

    Logistic regression of the hard win (a tie one half: it knows no scale) of all P K^2 comparisons on
    tanh((tokens after - tokens before) / SD) and a constant, which alone is left at equal length. A ridge of
    0.025 per comparison holds the length coefficient; it also leaves a part of the effect in: simulated wins that
    length alone decided, raw 0.57 to 0.66 at an overlap of 0.32, came to 0.52 to 0.56 instead of 0.50. After Dubois
    et al. 2024 (arXiv 2404.04475), without their term for the difficulty of the prompt.
    """
    wins = _wins(before, after)
    difference = (tokens_after[:, :, None] - tokens_before[:, None, :]).astype(np.float64)
    spread = difference.std()
    length = np.tanh(difference / spread) if spread else np.zeros_like(difference)
    wins, length, comparisons = wins.ravel(), length.ravel(), wins[0].size
    constant, coefficient = _fit_wins(wins, length, np.ones_like(wins), (0.0, 0.0))

    def at_equal_length(drawn: np.ndarray) -> float:
        times = np.bincount(drawn, minlength=len(before)).astype(np.float64)
        fit = _fit_wins(wins, length, np.repeat(times, comparisons), (constant, coefficient))
        return 1 / (1 + math.exp(-fit[0]))

    equal = (difference == 0).mean()
    overlap = float(min((difference > 0).mean(), (difference < 0).mean()) + equal / 2)
    warning = ""
    if overlap < LEAST_OVERLAP:
        warning = (
            f"only {overlap:.0%} of the comparisons have their lengths the other way round, so the win rate at equal "
            "length is extrapolated; compare the lengths themselves"
        )
    return LengthControlledWinRate(bootstrap(at_equal_length, before, **how), float(coefficient), overlap, warning)


def _fit_wins(
    wins: np.ndarray, length: np.ndarray, weights: np.ndarray, start: tuple[float, float]
) -> tuple[float, float]:
    """Constant and length coefficient of the logistic regression, NaN where Newton's method does not arrive.

    The damping log(1 + d) / d, d the largest change of a logit, keeps every step downhill: Sun & Tran-Dinh 2019
    (arXiv 1703.04599).
    """
    constant, coefficient = start
    total = weights.sum()
    weighted_length = weights * length
    weighted_square = weighted_length * length
    for _ in range(100):
        probability = 1 / (1 + np.exp(-(constant + coefficient * length)))
        error, curvature = wins - probability, probability * (1 - probability)
        slope = error @ weights / total, error @ weighted_length / total - LENGTH_RIDGE * coefficient
        a = curvature @ weights / total
        b = curvature @ weighted_length / total
        c = curvature @ weighted_square / total + LENGTH_RIDGE
        determinant = a * c - b * b
        step = (c * slope[0] - b * slope[1]) / determinant, (a * slope[1] - b * slope[0]) / determinant
        size = abs(step[0]) + abs(step[1])
        if size < 1e-10:
            return constant, coefficient
        damping = math.log1p(size) / size
        constant, coefficient = constant + damping * step[0], coefficient + damping * step[1]
        if abs(constant) > _CERTAIN:
            return math.copysign(_CERTAIN, constant), coefficient
    return math.nan, math.nan


def _wins(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[P, K after, K before]: 1 where after has the higher reward, one half in a tie."""
    first, second = after[:, :, None], before[:, None, :]
    return (first > second) + 0.5 * (first == second)


def _gain_in_sd(before: np.ndarray, after: np.ndarray, **how: Unpack[Resampling]) -> tuple[Estimate | None, str]:
    if before.shape[1] < 2:
        return None, "one response to each prompt shows no spread; sample at least 2"
    variance = before.var(axis=1, ddof=1)
    if not variance.any():
        return None, "all responses before to one prompt have the same reward; sample, instead of decoding greedily"
    gain = after.mean(axis=1) - before.mean(axis=1)

    def in_sd(drawn: np.ndarray) -> float:
        return ratio(gain[drawn].mean(), math.sqrt(variance[drawn].mean()))

    try:
        return bootstrap(in_sd, gain, **how), ""
    except UserError as error:  # so few prompts have a spread that some resamples have none
        return None, str(error)


@dataclass(frozen=True, slots=True)
class KLSummary:
    """KL of the policy from the reference, nats, with intervals over prompts; k1 is the sampled estimate beside it."""

    prompts: int
    replies: int
    per_reply: Estimate
    per_token: Estimate
    k1_per_reply: Estimate
    k1_per_token: Estimate


def summarise_kl(exact: np.ndarray, k1: np.ndarray, tokens: np.ndarray, **how: Unpack[Resampling]) -> KLSummary:
    """Sums over each response of the exact KL and of k1 (`functional.kl`), and its tokens, all [P, K].

    Per token is the sum of all nats over the sum of all tokens, so long responses weigh more. The responses must have
    been sampled at temperature 1 without top-p or top-k; otherwise it is not this KL. UserError: a value that is
    not finite.
    """
    exact, k1 = finite("kl", "exact KL", exact), finite("kl", "k1", k1)
    counts = tokens.sum(axis=1)

    def per_token(nats: np.ndarray) -> Estimate:
        sums = nats.sum(axis=1)
        return bootstrap(lambda drawn: sums[drawn].sum() / counts[drawn].sum(), sums, **how)

    def per_response(nats: np.ndarray) -> Estimate:
        return mean_estimate(nats.mean(axis=1), **how)

    of = (per_response(exact), per_token(exact), per_response(k1), per_token(k1))
    return KLSummary(len(exact), exact.shape[1], *of)


@dataclass(frozen=True, slots=True)
class BestOfN:
    n: int
    kl: float
    """Nats per response."""
    reward: Estimate


def best_of_n(rewards: np.ndarray, **how: Unpack[Resampling]) -> list[BestOfN]:
    """What choosing the best of n responses would bring, n in powers of two up to K, from rewards [P, K].

    KL = log n - (n - 1) / n is exact where no response comes twice nor ties, and else an upper bound (Beirami et al.
    2024, arXiv 2401.01879).
    """
    rewards = finite("best of n", "rewards", rewards)
    sizes = [2**power for power in range(rewards.shape[1].bit_length())]
    return [BestOfN(n, math.log(n) - (n - 1) / n, mean_estimate(expected_best(rewards, n), **how)) for n in sizes]


def expected_best(rewards: np.ndarray, n: int) -> np.ndarray:
    """Mean over all subsets of n of the K responses of the largest reward, [P].

    The i-th smallest of K is the best of C(i - 1, n - 1) subsets of C(K, n).
    """
    total = rewards.shape[1]
    share = np.array([math.comb(i, n - 1) / math.comb(total, n) for i in range(total)])
    return np.sort(rewards, axis=1) @ share


class GaoFit(NamedTuple):
    """R(d) = d (alpha - beta log d), d = sqrt(KL): Gao et al. 2022 (arXiv 2210.10760), for reinforcement learning."""

    alpha: float
    beta: float
    peak_distance: float | None
    """sqrt(nats) at which the reward is highest; None where the fit has no peak."""


def fit_gao(kl: Sequence[float], gain: Sequence[float]) -> GaoFit:
    """Least squares of the gain in reward over the start, [S], on the KL in nats per response, [S].

    UserError: fewer than three distances above 0 (two always fit), a KL below 0 or a number that is not finite.
    """
    nats, gains = finite("gao fit", "KL", kl), finite("gao fit", "gains", gain)
    if (nats < 0).any():
        raise UserError(f"gao fit: a KL of {nats.min():.3g} nats has no root; take the exact KL, not k1")
    distance = np.sqrt(nats)
    if len(np.unique(distance[distance > 0])) < 3:
        raise UserError("gao fit: fewer than 3 distances above 0, and two always fit; log more steps")
    bend = np.log(np.where(distance > 0, distance, 1.0))
    design = np.stack([distance, -distance * bend], axis=1)
    alpha, beta = (float(number) for number in np.linalg.lstsq(design, gains, rcond=None)[0])
    return GaoFit(alpha, beta, math.exp(alpha / beta - 1) if beta > 0 and alpha / beta < 700 else None)
