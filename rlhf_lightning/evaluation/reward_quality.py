"""How good a reward model is on held-out pairs: order, calibration, length bias.

Legend: N pairs, c and r the scores of the chosen and the rejected response, m = c - r the margin. The unit of every
interval is the pair: its two responses are resampled together. A tie counts one half, as in `metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Unpack

import numpy as np

from rlhf_lightning.errors import ConfigurationError, UserError
from rlhf_lightning.evaluation.estimates import Estimate, Resampling, bootstrap, finite, mean_estimate, mean_rate

AUROC_TARGET = 0.70
CALIBRATION_BINS = 20
"""Of equal width on [0, 1], both orders of each pair: 10 bins on [0.5, 1] of the preferred side."""
MARGIN_BINS = 5
LEAST_FOR_CONFIDENCE = 30
"""Pairs. Of 300 simulated reward models of AUROC 0.70, the lower bound was above 0.70 in 8 % at 10 pairs, in 4 % at
30 and in 3 % at 400, where 2.5 % is meant; a few pairs in perfect order have an interval without any width."""


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """A point of the reliability curve, over both orders of the pairs."""

    probability: float
    """Mean predicted probability."""
    share: float
    """Of entries that hold: the first response is the chosen one."""
    entries: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """Of sigmoid(m) as the probability that the chosen response is preferred; nats and shares over pairs."""

    ece: float
    brier: Estimate
    nll: Estimate
    temperature: float | None
    """The T that minimises the NLL of sigmoid(m / T) on these pairs; None where no T is best."""
    temperature_refused: str
    ece_fitted: float | None
    """ECE of sigmoid(m / T), measured on the pairs that T was fitted on, which favours it."""
    bins: list[CalibrationBin]
    """Those that hold an entry, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class MarginBin:
    """Pairs of one quintile of |m|, between these two values."""

    low: float
    high: float
    accuracy: Estimate


@dataclass(frozen=True, slots=True)
class LengthBias:
    """How far the order is the order of lengths; None where no pair, or no spread, is there to measure."""

    spearman: Estimate | None
    """Rank correlation of m with tokens of chosen - tokens of rejected (characters where a function scores)."""
    accuracy_chosen_longer: Estimate | None
    accuracy_chosen_shorter: Estimate | None
    prefers_longer: Estimate | None
    """Share of the pairs of unequal length whose longer response has the higher score."""
    longer_wins: Estimate
    """Accuracy of the rule "the longer one is better" on these pairs."""


@dataclass(frozen=True, slots=True)
class HeadAgreement:
    """How far K heads of one reward model agree: standard deviations over them, with divisor K."""

    heads: int
    spread: Estimate
    """Mean over the 2N responses of the standard deviation of a score."""
    spread_right: Estimate | None
    """Mean over the pairs in the right order of the standard deviation of the margin; None without such a pair."""
    spread_wrong: Estimate | None
    """The same over pairs in the wrong order, ties included."""
    wrong_auroc: float | None
    """P(a pair in the wrong order has a larger deviation of its margin than one in the right order), ties one half."""


@dataclass(frozen=True, slots=True)
class RewardQuality:
    """A reward model on N pairs; n of an estimate is a number of pairs."""

    pairs: int
    prompts: int | None
    """Different prompts that the pairs are on, where that was said; then the intervals of the next three resample
    prompts with all their pairs, and the others pairs."""
    auroc: Estimate
    """Pooled: P(a chosen response outscores a rejected one of any prompt)."""
    accuracy: Estimate
    auroc_margin: Estimate
    """P(m_i + m_j > 0): flattering, never for the claim."""
    target: Literal["met with confidence", "met", "not met"]
    """Pooled AUROC of at least 0.70; with confidence where its lower bound is, on 30 pairs or more."""
    calibration: Calibration
    accuracy_by_margin: list[MarginBin]
    length: LengthBias | None
    ties: int
    truncated: int | None
    """Pairs of which a response was cut."""
    accuracy_by_source: dict[str, Estimate]
    heads: HeadAgreement | None = None
    """None where the scores do not come of several heads."""


def reward_quality(
    chosen: np.ndarray,
    rejected: np.ndarray,
    *,
    tokens: tuple[np.ndarray, np.ndarray] | None = None,
    sources: Sequence[str] = (),
    truncated: np.ndarray | None = None,
    prompts: Sequence[Hashable] | None = None,
    heads: tuple[np.ndarray, np.ndarray] | None = None,
    **how: Unpack[Resampling],
) -> RewardQuality:
    """Scores of both responses [N]; their lengths [N], the source of each pair [N], and True where one was cut [N].

    `heads` are the scores of both by the K heads of an ensemble, [N, K].

    UserError: a score that is not finite, fewer than two pairs. ConfigurationError: shapes differ.
    """
    chosen, rejected = finite("reward model", "chosen", chosen), finite("reward model", "rejected", rejected)
    if chosen.ndim != 1 or chosen.shape != rejected.shape:
        raise ConfigurationError(
            f"reward model: chosen {list(chosen.shape)}, rejected {list(rejected.shape)}, but both must be [N]"
        )
    margin = chosen - rejected
    points = _points(margin)
    together = None if prompts is None else groups_of(prompts)
    auroc = auroc_estimate(chosen, rejected, together=together, **how)
    names = np.asarray(sources, dtype=object)
    return RewardQuality(
        pairs=len(margin),
        prompts=None if together is None else len(together),
        auroc=auroc,
        accuracy=_estimate(lambda drawn: points[drawn].mean(), points, together, **how),
        auroc_margin=auroc_estimate(margin, -margin, together=together, **how),
        target=target_outcome(auroc),
        calibration=calibration(margin, **how),
        accuracy_by_margin=accuracy_by_margin(margin),
        length=None if tokens is None else length_bias(margin, np.subtract(*tokens, dtype=np.float64), **how),
        ties=int((margin == 0).sum()),
        truncated=None if truncated is None else int(truncated.sum()),
        accuracy_by_source={str(name): mean_rate(points[names == name]) for name in sorted(set(names))},
        heads=None if heads is None else head_agreement(*heads, **how),
    )


def head_agreement(chosen: np.ndarray, rejected: np.ndarray, **how: Unpack[Resampling]) -> HeadAgreement:
    """Scores of both responses of N pairs by K heads, [N, K]."""
    spread, wrong = (chosen - rejected).std(axis=1), chosen.mean(axis=1) <= rejected.mean(axis=1)
    larger = np.sign(spread[wrong][:, None] - spread[~wrong][None, :])
    return HeadAgreement(
        heads=chosen.shape[1],
        spread=mean_estimate((chosen.std(axis=1) + rejected.std(axis=1)) / 2, **how),
        spread_right=_mean(spread[~wrong], **how),
        spread_wrong=_mean(spread[wrong], **how),
        wrong_auroc=float(larger.mean() / 2 + 0.5) if larger.size else None,
    )


def _mean(values: np.ndarray, **how: Unpack[Resampling]) -> Estimate | None:
    return mean_estimate(values, **how) if len(values) > 1 else None


def target_outcome(auroc: Estimate) -> Literal["met with confidence", "met", "not met"]:
    if auroc.low >= AUROC_TARGET and auroc.n >= LEAST_FOR_CONFIDENCE:
        return "met with confidence"
    return "met" if auroc.value >= AUROC_TARGET else "not met"


def groups_of(names: Sequence[Hashable]) -> list[np.ndarray]:
    """The positions of each name, in the order in which the names come first."""
    found: dict[Hashable, list[int]] = {}
    for place, name in enumerate(names):
        found.setdefault(name, []).append(place)
    return [np.array(places) for places in found.values()]


def _estimate(
    statistic: Callable[[np.ndarray], float],
    units: np.ndarray,
    together: Sequence[np.ndarray] | None,
    **how: Unpack[Resampling],
) -> Estimate:
    """A statistic over units, resampled one by one, or in groups that are resampled together (two or more of them)."""
    if together is None or not 2 <= len(together) < len(units):
        return bootstrap(statistic, units, **how)
    of_groups = bootstrap(
        lambda drawn: statistic(np.concatenate([together[group] for group in drawn])), together, **how
    )
    return replace(of_groups, n=len(units), method=f"{of_groups.method} over {len(together)} prompts")


def auroc_estimate(
    positive: np.ndarray,
    negative: np.ndarray,
    *,
    together: Sequence[np.ndarray] | None = None,
    **how: Unpack[Resampling],
) -> Estimate:
    """P(a positive score is above a negative one), ties one half; scores [N] and [N] of N units.

    `together` are groups of units, as `groups_of` makes them, that are resampled as a whole: pairs on one prompt.

    Counts per distinct score replace the N^2 comparisons, and no resample is sorted.
    """
    values, ranks = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    above, below = ranks[: len(positive)], ranks[len(positive) :]

    def auroc(drawn: np.ndarray) -> float:
        positives = np.bincount(above[drawn], minlength=len(values)).astype(np.float64)
        negatives = np.bincount(below[drawn], minlength=len(values)).astype(np.float64)
        return positives @ (np.cumsum(negatives) - negatives / 2) / len(drawn) ** 2

    return _estimate(auroc, positive, together, **how)


def calibration(margin: np.ndarray, **how: Unpack[Resampling]) -> Calibration:
    """Calibration of margins [N]. The label is always 1, so each pair enters the bins in both orders.

    Expected calibration error as in `metrics.PairwiseCalibrationError` (Guo et al. 2017, arXiv 1706.04599). Brier
    score (1 - sigmoid(m))^2 and NLL -log sigmoid(m) are the same in both orders.
    """
    bins = calibration_bins(margin)
    temperature, refused = _temperature(margin)
    return Calibration(
        ece=_calibration_error(bins),
        brier=mean_estimate(_sigmoid(-margin) ** 2, **how),
        nll=mean_estimate(np.logaddexp(0, -margin), **how),
        temperature=temperature,
        temperature_refused=refused,
        ece_fitted=None if temperature is None else _calibration_error(calibration_bins(margin / temperature)),
        bins=bins,
    )


def calibration_bins(margin: np.ndarray) -> list[CalibrationBin]:
    """Bins [k / 20, (k + 1) / 20) of sigmoid(m) labelled 1 and sigmoid(-m) labelled 0; empty ones are left out."""
    probability = np.concatenate([_sigmoid(margin), _sigmoid(-margin)])
    label: np.ndarray = np.repeat([1.0, 0.0], len(margin))
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    place = np.clip(np.searchsorted(edges, probability, side="right") - 1, 0, CALIBRATION_BINS - 1)
    return [
        CalibrationBin(float(probability[inside].mean()), float(label[inside].mean()), int(inside.sum()))
        for inside in (place == k for k in range(CALIBRATION_BINS))
        if inside.any()
    ]


def accuracy_by_margin(margin: np.ndarray) -> list[MarginBin]:
    """Accuracy in quintiles of |m|, from the least to the most certain; equal |m| are never divided."""
    size, points = np.abs(margin), _points(margin)
    edges = np.quantile(size, np.linspace(0, 1, MARGIN_BINS + 1)[1:-1])
    place = np.searchsorted(edges, size, side="left")
    groups = [place == k for k in range(MARGIN_BINS)]
    return [
        MarginBin(float(size[group].min()), float(size[group].max()), mean_rate(points[group]))
        for group in groups
        if group.any()
    ]


def length_bias(margin: np.ndarray, longer: np.ndarray, **how: Unpack[Resampling]) -> LengthBias:
    """Margins [N] against tokens of chosen - tokens of rejected, [N]: within a pair, so no prompt's length enters."""
    points, unequal = _points(margin), longer != 0
    prefers_longer = np.where(longer > 0, points, 1 - points)
    return LengthBias(
        spearman=_spearman(margin, longer, **how),
        accuracy_chosen_longer=_rate(points[longer > 0]),
        accuracy_chosen_shorter=_rate(points[longer < 0]),
        prefers_longer=_rate(prefers_longer[unequal]),
        longer_wins=mean_rate(_points(longer)),
    )


def _spearman(first: np.ndarray, second: np.ndarray, **how: Unpack[Resampling]) -> Estimate | None:
    """Pearson correlation of the average ranks, which each resample ranks anew."""
    places = [np.unique(values, return_inverse=True)[1] for values in (first, second)]
    if any(place.max() == 0 for place in places):
        return None

    def correlation(drawn: np.ndarray) -> float:
        ranks = []
        for place in places:
            counts = np.bincount(place[drawn])
            ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place[drawn]] - (len(drawn) + 1) / 2)
        norm = math.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1]))
        return ranks[0] @ ranks[1] / norm if norm else math.nan

    try:
        return bootstrap(correlation, first, **how)
    except UserError:  # so few lengths differ that some resamples have none
        return None


def _temperature(margin: np.ndarray) -> tuple[float | None, str]:
    """The root of the NLL's slope in 1 / T, by bisection, and why there is none."""
    if margin.mean() <= 0:
        return None, "the mean margin is not above 0: the larger the temperature, the better"
    if margin.min() >= 0:
        return None, "no pair is in the wrong order: the smaller the temperature, the better"
    unit = np.abs(margin).mean()
    scaled = margin / unit
    low, high = 0.0, 1.0

    def slope(inverse: float) -> float:
        return float(-np.mean(scaled * _sigmoid(-inverse * scaled)))

    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(unit / high), ""


def _calibration_error(bins: list[CalibrationBin]) -> float:
    entries = sum(each.entries for each in bins)
    return sum(each.entries * abs(each.probability - each.share) for each in bins) / entries


def _points(margin: np.ndarray) -> np.ndarray:
    return (margin > 0) + 0.5 * (margin == 0)


def _rate(points: np.ndarray) -> Estimate | None:
    return mean_rate(points) if len(points) else None


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1 + small)
