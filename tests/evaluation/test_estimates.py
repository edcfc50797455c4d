"""Intervals: Wilson's formula against its defining equation, the bootstrap against replayed draws and simulation."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from rlhf_lightning.errors import ConfigurationError, UserError
from rlhf_lightning.evaluation.estimates import Estimate, bootstrap, difference_estimate, finite, mean_estimate, wilson

Z = 1.959963984540054


@pytest.mark.parametrize(("successes", "n"), [(5, 10), (1, 7), (399, 400), (62.5, 100)])
def test_the_ends_of_wilsons_interval_are_the_rates_that_lie_one_quantile_away(successes, n):
    estimate = wilson(successes, n)
    assert estimate.value == successes / n
    for end in (estimate.low, estimate.high):
        assert abs(estimate.value - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n), abs=1e-12)
    assert estimate.low < estimate.value < estimate.high


def test_wilsons_interval_has_a_width_at_0_and_at_1():
    none, all_ = wilson(0, 20), wilson(20, 20)
    assert (none.low, none.value) == (0, 0)
    assert none.high == pytest.approx(Z**2 / (20 + Z**2), abs=1e-12)
    assert (all_.value, all_.high) == (1, 1)
    assert all_.low == pytest.approx(1 - none.high, abs=1e-12)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.7, 0.93])
def test_wilsons_interval_covers_the_rate_in_about_95_percent_of_all_samples(rate):
    n = 60
    covered = sum(
        math.comb(n, k) * rate**k * (1 - rate) ** (n - k)
        for k in range(n + 1)
        if wilson(k, n).low <= rate <= wilson(k, n).high
    )
    assert 0.925 < covered < 0.975


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5), (math.nan, 5)])
def test_what_is_no_rate_is_refused(successes, n):
    with pytest.raises(ConfigurationError, match="which is no rate"):
        wilson(successes, n)


def test_the_bootstrap_interval_is_the_percentiles_of_the_statistic_over_resamples_of_units():
    values = np.random.default_rng(1).normal(size=30)
    seen = []

    def median(drawn):
        seen.append(drawn.copy())
        return float(np.median(values[drawn]))

    estimate = bootstrap(median, values, resamples=300, seed=7)
    assert estimate.value == np.median(values)
    assert (estimate.n, estimate.method) == (30, "bootstrap")
    assert seen[0].tolist() == list(range(30))
    resamples = np.array(seen[1:])
    assert resamples.shape == (300, 30)
    assert set(resamples.ravel()) == set(range(30))
    assert len(set(resamples[0])) < 30
    draws = sorted(float(np.median(values[drawn])) for drawn in resamples)
    # 2.5 % of the way from the first to the last of 300 draws: position 7.475.
    assert estimate.low == pytest.approx(draws[7] + 0.475 * (draws[8] - draws[7]), abs=1e-12)
    assert estimate.high == pytest.approx(draws[291] + 0.525 * (draws[292] - draws[291]), abs=1e-12)


def test_a_seed_gives_the_same_interval_again_and_another_seed_another():
    values = np.random.default_rng(2).normal(size=50)
    assert mean_estimate(values, seed=3) == mean_estimate(values, seed=3)
    assert mean_estimate(values, seed=3).low != mean_estimate(values, seed=4).low


def test_two_statistics_of_the_same_units_see_the_same_resamples():
    values = np.random.default_rng(2).normal(size=50)
    first, second = mean_estimate(values, resamples=200), mean_estimate(5 - 2 * values, resamples=200)
    assert second.low == pytest.approx(5 - 2 * first.high, abs=1e-12)
    assert second.high == pytest.approx(5 - 2 * first.low, abs=1e-12)


def test_the_interval_of_a_mean_has_the_normal_width():
    values = np.random.default_rng(3).normal(size=2000)
    estimate = mean_estimate(values)
    half = Z * values.std() / math.sqrt(2000)
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_the_bootstrap_interval_of_a_skewed_mean_covers_it_in_about_95_percent_of_simulations():
    generator = np.random.default_rng(4)
    covered = 0
    for trial in range(300):
        estimate = mean_estimate(generator.gamma(2.0, size=60), resamples=250, seed=trial)
        covered += estimate.low <= 2.0 <= estimate.high
    assert 0.89 < covered / 300 < 0.98


def test_a_difference_is_paired_so_what_both_share_does_not_widen_it():
    generator = np.random.default_rng(5)
    shared = generator.normal(scale=100, size=80)
    before, after = shared + generator.normal(size=80), shared + 1 + generator.normal(size=80)
    estimate = difference_estimate(after, before, resamples=500)
    assert estimate == mean_estimate(after - before, resamples=500)
    assert estimate.value == pytest.approx(1, abs=0.5)
    assert estimate.high - estimate.low < 1


def test_undefined_resamples_are_left_out_and_counted():
    values = np.arange(10.0)
    calls = iter(range(10_000))

    def statistic(drawn):
        return math.nan if next(calls) in (1, 2, 3) else values[drawn].mean()

    estimate = bootstrap(statistic, values, resamples=400)
    assert estimate.method == "bootstrap, 3 of 400 resamples undefined"
    assert math.isfinite(estimate.low)
    assert math.isfinite(estimate.high)


def test_more_than_1_percent_of_undefined_resamples_is_refused():
    rare = np.array([1.0] + [0.0] * 9)
    with pytest.raises(UserError, match=r"undefined on \d+ of 400 resamples of 10 units"):
        bootstrap(lambda drawn: 1.0 if rare[drawn].any() else math.nan, rare, resamples=400)


@pytest.mark.parametrize("units", [[], [1.0]])
def test_fewer_than_two_units_have_no_interval(units):
    with pytest.raises(UserError, match="at least 2 are needed"):
        mean_estimate(np.array(units))


def test_a_statistic_that_is_no_number_on_the_units_themselves_is_refused():
    with pytest.raises(UserError, match="nothing to estimate"):
        bootstrap(lambda drawn: math.nan, np.arange(5))


def test_a_difference_of_other_units_is_refused():
    with pytest.raises(ConfigurationError, match="same units"):
        difference_estimate(np.zeros(4), np.zeros((4, 1)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_in_one_line_that_counts_them(bad):
    with pytest.raises(UserError, match=r"^here: 1 of 3 scores are NaN or infinite") as error:
        finite("here", "scores", [1.0, bad, 2.0])
    assert "\n" not in str(error.value)


def test_an_estimate_is_json():
    estimate = mean_estimate(np.arange(5.0), resamples=50)
    assert Estimate(**json.loads(json.dumps(asdict(estimate), allow_nan=False))) == estimate
