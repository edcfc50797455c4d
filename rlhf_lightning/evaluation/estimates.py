"""Numbers with their 95 % intervals: rates by Wilson's formula, everything else by the bootstrap over units.

A unit is what was sampled independently: a prompt, a pair, a response. What belongs to one unit (both policies'
responses to a prompt, both responses of a pair) is resampled together, which makes a difference a paired one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np

from rlhf_lightning.errors import ConfigurationError, UserError

RESAMPLES = 5000
NORMAL_QUANTILE = 1.959963984540054
"""Of 0.975."""
MOST_UNDEFINED = 0.01
"""Share of the resamples on which a statistic may be undefined (a ratio over 0, a class without a member)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval. What was not measured is None instead of an Estimate."""

    value: float
    low: float
    high: float
    n: int
    """The units that it is over: the name under which it is stored says which."""
    method: str
    """Of the interval: "wilson" or "bootstrap", and how many resamples were left out, if any were."""


def wilson(successes: float, n: int) -> Estimate:
    """A rate with its score interval; a tie may count one half. ConfigurationError: n = 0, or more successes than n.

    Wilson 1927 (doi 10.1080/01621459.1927.10502953). Unlike the bootstrap's, it has a width at 0 and at 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ConfigurationError(
            f"wilson: {successes} successes of {n}, which is no rate; report 'not measured' (None) where n is 0"
        )
    rate = successes / n
    spread = NORMAL_QUANTILE**2 / n
    centre = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (rate * (1 - rate) + spread / 4)) / (1 + spread)
    return Estimate(
        rate, min(max(centre - half, 0.0), rate), max(min(centre + half, 1.0), rate), int(n), method="wilson"
    )


def mean_rate(shares: np.ndarray) -> Estimate:
    """Mean of one share in [0, 1] per unit, [n], with the interval of a rate of n (too wide where shares vary less)."""
    return wilson(min(math.fsum(shares), len(shares)), len(shares))


class Resampling(TypedDict, total=False):
    """How a bootstrap draws; see `bootstrap`."""

    resamples: int
    seed: int


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    units: np.ndarray | Sequence,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A statistic of n units with its percentile interval over resamples of whole units.

    `statistic` takes positions in `units`, int64 [n], with repetitions, and gives one number; on a resample it
    may be NaN, where it is undefined: such resamples are left out and counted in `method`. The same seed and n
    draw the same resamples, whatever the statistic. UserError: fewer than two units (no interval), a statistic
    that is not finite on the units themselves or on more than 1 % of the resamples. Efron 1979
    (doi 10.1214/aos/1176344552).
    """
    n = len(units)
    if n < 2:
        raise UserError(f"bootstrap: {n} units have no interval; at least 2 are needed")
    value = float(statistic(np.arange(n)))
    if not math.isfinite(value):
        raise UserError(f"bootstrap: the statistic is {value} on all {n} units, so there is nothing to estimate")
    generator = np.random.default_rng(seed)
    draws = np.array([statistic(generator.integers(n, size=n)) for _ in range(resamples)], dtype=np.float64)
    defined = draws[np.isfinite(draws)]
    undefined = resamples - len(defined)
    if undefined > MOST_UNDEFINED * resamples:
        raise UserError(
            f"bootstrap: the statistic is undefined on {undefined} of {resamples} resamples of {n} units, more than "
            "1 %: there are too few units for an interval"
        )
    low, high = np.quantile(defined, [0.025, 0.975])
    method = f"bootstrap, {undefined} of {resamples} resamples undefined" if undefined else "bootstrap"
    return Estimate(value, float(low), float(high), n, method)


def mean_estimate(values: np.ndarray, **how: Unpack[Resampling]) -> Estimate:
    """Mean of one value per unit, [n]."""
    values = np.asarray(values, dtype=np.float64)
    return bootstrap(lambda drawn: values[drawn].mean(), values, **how)


def difference_estimate(after: np.ndarray, before: np.ndarray, **how: Unpack[Resampling]) -> Estimate:
    """Mean of after - before of the same units, [n] each: paired, so what a unit adds to both cancels."""
    after, before = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if after.shape != before.shape:
        raise ConfigurationError(
            f"difference_estimate: {after.shape} values after and {before.shape} before are not those of the same units"
        )
    return mean_estimate(after - before, **how)


def finite(where: str, name: str, values: np.ndarray | Sequence) -> np.ndarray:
    """The values as a float64 array. UserError: one of them is NaN or infinite."""
    array = np.asarray(values, dtype=np.float64)
    wrong = int((~np.isfinite(array)).sum())
    if wrong:
        raise UserError(
            f"{where}: {wrong} of {array.size} {name} are NaN or infinite, and leaving them out would change the "
            "question; score in float32 (float16 ends at 65504), or look for divergence"
        )
    return array


def ratio(top: float, bottom: float) -> float:
    """top / bottom, NaN where bottom is 0: undefined for `bootstrap`."""
    return float(top / bottom) if bottom else math.nan


Quantity = Estimate | float | int | None
"""A number with its interval, without one, or not measured."""


def value_of(quantity: Quantity) -> float | None:
    """The number itself; None where it was not measured or is not finite."""
    value = quantity.value if isinstance(quantity, Estimate) else quantity
    return None if value is None or not math.isfinite(value) else float(value)


def interval_of(quantity: Quantity) -> tuple[float, float] | None:
    """The 95 % interval, if there is one and it is finite."""
    if not isinstance(quantity, Estimate) or value_of(quantity) is None:
        return None
    ends = (float(quantity.low), float(quantity.high))
    return ends if all(map(math.isfinite, ends)) else None
