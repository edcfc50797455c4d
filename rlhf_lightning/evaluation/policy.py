"""What training did to a policy: reward before and after, win rates, KL, and the curves of over-optimisation.

Legend: P prompts, K replies to each, S steps of a run; rewards are raw scores of one reward model, tokens the
lengths of the replies. Rewards of the Bradley-Terry model are defined up to a shift per prompt, and their scale is
free; but for the mean rewards themselves, no number of `compare_policies` changes with either. The unit of every
interval is the prompt. A second reward model (the training one beside a held-out one) means a second call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_lightning.errors import ConfigurationError, UserError
from rlhf_lightning.evaluation.estimates import (
    RESAMPLES,
    Estimate,
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
    """Win rate if both policies' replies were equally long."""

    win_rate: Estimate
    length_coefficient: float
    """Log-odds per tanh(length difference / SD): above 0 where longer replies win."""
    length_overlap: float
    """min(share of comparisons with the longer reply after, share with the shorter); equal lengths are half of both."""
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
    """Gain in standard deviations of the policy before, within its replies to one prompt."""
    gain_sd_refused: str
    win_rate: Estimate
    percentile: Estimate
    """Of the mean reward after, among the replies before to the same prompt: 50 where nothing changed."""
    length_controlled: LengthControlledWinRate | None
    tokens_before: Estimate | None
    tokens_after: Estimate | None
    claim_25: Claim


def compare_policies(
    before: np.ndarray,
    after: np.ndarray,
    *,
    chosen: np.ndarray | None = None,
    rejected: np.ndarray | None = None,
    tokens_before: np.ndarray | None = None,
    tokens_after: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PolicyComparison:
    """Rewards of K replies to each prompt before and after training, [P, K]; rewards of the anchors, [P].

    Both policies answered the same prompts, with the same decoding. UserError: a reward that is not finite, fewer
    than two prompts. ConfigurationError: shapes differ, or one of two belonging arrays is missing.
    """
    before, after = finite("policy", "rewards before", before), finite("policy", "rewards after", after)
    if before.ndim != 2 or before.shape != after.shape or not before.shape[1]:
        raise ConfigurationError(
            f"policy: the rewards before are {list(before.shape)} and those after {list(after.shape)}, but both "
            "must be [P, K] with K of at least 1: the same number of replies to the same prompts"
        )
    if len(before) < 2:
        raise UserError(f"policy: {len(before)} prompts give no interval; at least 2 are needed")
    settings = {"resamples": resamples, "seed": seed}
    anchors = _together("anchors", before.shape[:1], chosen=chosen, rejected=rejected)
    tokens = _together("tokens", before.shape, tokens_before=tokens_before, tokens_after=tokens_after)
    mean_before, mean_after = before.mean(axis=1), after.mean(axis=1)
    anchored = anchored_gain(mean_before, mean_after, *anchors, **settings) if anchors else None
    gain_sd, gain_sd_refused = _gain_in_sd(before, after, **settings)
    beaten = (mean_after[:, None] > before) + 0.5 * (mean_after[:, None] == before)
    return PolicyComparison(
        prompts=len(before),
        replies=before.shape[1],
        reward_before=mean_estimate(mean_before, **settings),
        reward_after=mean_estimate(mean_after, **settings),
        reward_gain=difference_estimate(mean_after, mean_before, **settings),
        anchored=anchored,
        gain_sd=gain_sd,
        gain_sd_refused=gain_sd_refused,
        win_rate=mean_estimate(_wins(before, after).mean(axis=(1, 2)), **settings),
        percentile=mean_estimate(100 * beaten.mean(axis=1), **settings),
        length_controlled=length_controlled_win_rate(before, after, *tokens, **settings) if tokens else None,
        tokens_before=mean_estimate(tokens[0].mean(axis=1), **settings) if tokens else None,
        tokens_after=mean_estimate(tokens[1].mean(axis=1), **settings) if tokens else None,
        claim_25=claim_25(anchored),
    )


def anchored_gain(
    before: np.ndarray,
    after: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> AnchoredGain:
    """S = 100 mean(r - rejected) / mean(chosen - rejected) of both policies, mean rewards of each prompt, all [P].

    The ratio is taken anew in each resample. It is refused where the interval of mean(chosen - rejected) is not
    above 0; the relative gain, where that of S before is not.
    """
    settings = {"resamples": resamples, "seed": seed}
    gap = mean_estimate(chosen - rejected, **settings)
    if gap.low <= 0:
        refused = (
            f"the reward model does not tell chosen from rejected on these prompts: their gap is {gap.value:.3g} "
            f"[{gap.low:.3g}, {gap.high:.3g}]"
        )
        return AnchoredGain(gap, None, None, None, None, refused, refused)
    lift_before, lift_after, width = before - rejected, after - rejected, chosen - rejected

    def score(lift: np.ndarray) -> Estimate:
        return bootstrap(lambda drawn: 100 * ratio(lift[drawn].sum(), width[drawn].sum()), width, **settings)

    score_before = score(lift_before)
    relative, relative_refused = None, ""
    if score_before.low > 0:
        relative = bootstrap(
            lambda drawn: ratio(lift_after[drawn].sum(), lift_before[drawn].sum()) - 1, width, **settings
        )
    else:
        relative_refused = (
            f"the score before, {score_before.value:.1f} [{score_before.low:.1f}, {score_before.high:.1f}], is not "
            "clearly above 0, so a share of it means nothing"
        )
    return AnchoredGain(
        gap, score_before, score(lift_after), score(lift_after - lift_before), relative, "", relative_refused
    )


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
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
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
    win_rate = bootstrap(at_equal_length, before, resamples=resamples, seed=seed)
    return LengthControlledWinRate(win_rate, float(coefficient), overlap, warning)


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


def _gain_in_sd(before: np.ndarray, after: np.ndarray, *, resamples: int, seed: int) -> tuple[Estimate | None, str]:
    if before.shape[1] < 2:
        return None, "one reply to each prompt shows no spread; sample at least 2"
    variance = before.var(axis=1, ddof=1)
    if not variance.any():
        return None, "all replies before to one prompt have the same reward; sample, instead of decoding greedily"
    gain = after.mean(axis=1) - before.mean(axis=1)

    def in_sd(drawn: np.ndarray) -> float:
        return ratio(gain[drawn].mean(), math.sqrt(variance[drawn].mean()))

    try:
        return bootstrap(in_sd, gain, resamples=resamples, seed=seed), ""
    except UserError as error:  # so few prompts have a spread that some resamples have none
        return None, str(error)


def _together(what: str, shape: tuple[int, ...], **arrays: np.ndarray | None) -> list[np.ndarray]:
    """Both arrays, float64 and of this shape, or none where neither was given."""
    if all(array is None for array in arrays.values()):
        return []
    if missing := [name for name, array in arrays.items() if array is None]:
        raise ConfigurationError(
            f"policy: {what} without {missing[0]}; give both of {' and '.join(arrays)}, or neither"
        )
    both = [finite("policy", name, array) for name, array in arrays.items()]
    for name, array in zip(arrays, both, strict=True):
        if array.shape != shape:
            raise ConfigurationError(f"policy: {name} is {list(array.shape)}, but the rewards ask for {list(shape)}")
    return both


@dataclass(frozen=True, slots=True)
class KLSummary:
    """KL of the policy from the reference, nats, with intervals over prompts; k1 is the sampled estimate beside it."""

    prompts: int
    replies: int
    per_reply: Estimate
    per_token: Estimate
    k1_per_reply: Estimate
    k1_per_token: Estimate


def summarise_kl(
    exact: np.ndarray, k1: np.ndarray, tokens: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> KLSummary:
    """Sums over each reply of the exact KL and of k1 (`functional.kl`), and its tokens, all [P, K].

    Per token is the sum of all nats over the sum of all tokens, so long replies weigh more. The replies must have
    been sampled at temperature 1 without top-p or top-k; otherwise it is not this KL. UserError: a value that is
    not finite, a reply without tokens, an exact KL below 0.
    """
    exact, k1, tokens = (
        finite("kl", name, array) for name, array in (("exact KL", exact), ("k1", k1), ("tokens", tokens))
    )
    if exact.ndim != 2 or not exact.shape == k1.shape == tokens.shape:
        raise ConfigurationError(
            f"kl: exact is {list(exact.shape)}, k1 {list(k1.shape)} and tokens {list(tokens.shape)}, not all [P, K]"
        )
    if (tokens < 1).any():
        raise UserError(f"kl: {int((tokens < 1).sum())} replies have no token; a reply holds at least its EOS")
    if (exact < -1e-3).any():
        raise UserError(f"kl: an exact KL of {exact.min():.3g} nats, but it is never below 0; is this k1?")

    def per_token(nats: np.ndarray) -> Estimate:
        sums, counts = nats.sum(axis=1), tokens.sum(axis=1)
        return bootstrap(lambda drawn: sums[drawn].sum() / counts[drawn].sum(), sums, resamples=resamples, seed=seed)

    def per_reply(nats: np.ndarray) -> Estimate:
        return mean_estimate(nats.mean(axis=1), resamples=resamples, seed=seed)

    return KLSummary(len(exact), exact.shape[1], per_reply(exact), per_token(exact), per_reply(k1), per_token(k1))


@dataclass(frozen=True, slots=True)
class BestOfN:
    n: int
    kl: float
    """Nats per reply."""
    reward: Estimate


def best_of_n(
    rewards: np.ndarray,
    sizes: Sequence[int] | None = None,
    *,
    judge: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[BestOfN]:
    """What choosing the best of n replies would bring, from K replies of one policy: rewards [P, K].

    `sizes` are the n, powers of two up to K if not given. `judge` [P, K] are rewards of another model for the same
    replies: then `rewards` choose, and `judge` says what the choice is worth. KL = log n - (n - 1) / n is
    exact where no reply comes twice nor ties, and else an upper bound (Beirami et al. 2024, arXiv 2401.01879).
    """
    rewards = finite("best of n", "rewards", rewards)
    judged = rewards if judge is None else finite("best of n", "rewards of the judge", judge)
    if rewards.ndim != 2 or rewards.shape != judged.shape:
        raise ConfigurationError(
            f"best of n: rewards are {list(rewards.shape)} and those of the judge {list(judged.shape)}, not both [P, K]"
        )
    replies = rewards.shape[1]
    sizes = [2**power for power in range(replies.bit_length())] if sizes is None else list(sizes)
    curve = []
    for n in sizes:
        if not 1 <= n <= replies:
            raise ConfigurationError(f"best of n: the best of {n} cannot be estimated from {replies} replies")
        reward = mean_estimate(expected_best(rewards, judged, n), resamples=resamples, seed=seed)
        curve.append(BestOfN(n, math.log(n) - (n - 1) / n, reward))
    return curve


def expected_best(rewards: np.ndarray, judged: np.ndarray, n: int) -> np.ndarray:
    """Mean over all subsets of n of the K replies of what the best by `rewards` gets in `judged`, [P].

    The i-th smallest of K is the best of C(i - 1, n - 1) subsets of C(K, n). Replies that tie take turns.
    """
    replies = rewards.shape[1]
    share = np.array([math.comb(i, n - 1) / math.comb(replies, n) for i in range(replies)])
    order = np.argsort(rewards, axis=1, kind="stable")
    ordered, worth = np.take_along_axis(rewards, order, 1), np.take_along_axis(judged, order, 1)
    for row in np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1)):
        group = np.unique(ordered[row], return_inverse=True)[1]
        worth[row] = (np.bincount(group, worth[row]) / np.bincount(group))[group]
    return worth @ share


@dataclass(frozen=True, slots=True)
class GaoFit:
    """R(d) of Gao et al. 2022 (arXiv 2210.10760), d = sqrt(KL): best of n d (a - b d), RL d (a - b log d)."""

    form: Literal["best of n", "rl"]
    alpha: float
    beta: float
    peak_distance: float | None
    """sqrt(nats) at which the reward is highest; None where the fit has no peak."""
    peak_reward: float | None

    def reward(self, distance: float) -> float:
        if distance == 0:
            return 0.0
        return distance * (self.alpha - self.beta * (distance if self.form == "best of n" else math.log(distance)))


def fit_gao(kl: Sequence[float], gain: Sequence[float], form: Literal["best of n", "rl"]) -> GaoFit:
    """Least squares of the gain in reward over the start, [S], on the KL in nats per reply, [S].

    UserError: fewer than three distances above 0 (two always fit), a KL below 0 or a number that is not finite.
    """
    kl, gain = finite("gao fit", "KL", kl), finite("gao fit", "gains", gain)
    if kl.ndim != 1 or kl.shape != gain.shape:
        raise ConfigurationError(f"gao fit: KL is {list(kl.shape)} and gain {list(gain.shape)}, but both must be [S]")
    if (kl < 0).any():
        raise UserError(f"gao fit: a KL of {kl.min():.3g} nats has no root; take the exact KL, not k1")
    distance = np.sqrt(kl)
    if len(np.unique(distance[distance > 0])) < 3:
        raise UserError("gao fit: fewer than 3 distances above 0, and two always fit; log more steps")
    bend = distance if form == "best of n" else np.log(np.where(distance > 0, distance, 1.0))
    design = np.stack([distance, -distance * bend], axis=1)
    alpha, beta = (float(number) for number in np.linalg.lstsq(design, gain, rcond=None)[0])
    peak = None
    if form == "best of n" and alpha > 0 and beta > 0:
        peak = alpha / (2 * beta)
    elif form == "rl" and beta > 0 and alpha / beta < 700:
        peak = math.exp(alpha / beta - 1)
    fit = GaoFit(form, alpha, beta, peak, None)
    return fit if peak is None else GaoFit(form, alpha, beta, peak, fit.reward(peak))
