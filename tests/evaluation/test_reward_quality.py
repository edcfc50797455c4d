"""Quality of a reward model: analytic anchors on normal scores, twins written from the definitions, refusals."""

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from rlhf_lightning.errors import ConfigurationError, UserError
from rlhf_lightning.evaluation.estimates import Estimate, wilson
from rlhf_lightning.evaluation.reward_quality import (
    accuracy_by_margin,
    auroc_estimate,
    calibration,
    calibration_bins,
    length_bias,
    reward_quality,
    target_outcome,
)
from rlhf_lightning.metrics import MarginAUROC, PairwiseAccuracy, PairwiseCalibrationError, PooledAUROC


def phi(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def on_a_grid(n, seed=0):
    """Scores on a grid of quarters: ties within pairs, across pairs, and of margins."""
    generator = np.random.default_rng(seed)
    return generator.integers(-6, 10, n) / 4, generator.integers(-9, 7, n) / 4


def win_share(first, second):
    """Mean over all couples of [a > b] + [a = b] / 2."""
    return sum((a > b) + 0.5 * (a == b) for a in first for b in second) / (len(first) * len(second))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def quick(chosen, rejected, **given):
    return reward_quality(chosen, rejected, resamples=60, **given)


# Order.


def test_the_aurocs_and_the_accuracy_are_the_counts_over_all_couples_ties_one_half():
    chosen, rejected = on_a_grid(70)
    margin = chosen - rejected
    quality = quick(chosen, rejected)
    assert quality.auroc.value == pytest.approx(win_share(chosen, rejected), abs=1e-12)
    assert quality.auroc_margin.value == pytest.approx(win_share(margin, -margin), abs=1e-12)
    assert quality.accuracy.value == pytest.approx(np.mean((margin > 0) + 0.5 * (margin == 0)), abs=1e-12)
    assert quality.ties == sum(c == r for c, r in zip(chosen, rejected, strict=True)) > 0


@pytest.mark.parametrize("seed", range(3))
def test_every_number_that_metrics_has_too_is_the_same_there(seed):
    chosen, rejected = on_a_grid(200, seed) if seed else np.random.default_rng(9).normal(size=(2, 200)) * 3 + 200
    quality = quick(chosen, rejected)
    found = (quality.auroc.value, quality.auroc_margin.value, quality.accuracy.value, quality.calibration.ece)
    metrics = (PooledAUROC(), MarginAUROC(), PairwiseAccuracy(), PairwiseCalibrationError())
    for value, metric in zip(found, metrics, strict=True):
        metric.update(torch.from_numpy(chosen), torch.from_numpy(rejected))
        assert value == pytest.approx(metric.compute().item(), abs=1e-9)


def test_normal_margins_have_the_accuracy_and_the_margin_auroc_of_the_formula():
    margin = np.random.default_rng(0).normal(loc=0.5, size=100_000)
    quality = reward_quality(margin, np.zeros_like(margin), resamples=2)
    assert quality.accuracy.value == pytest.approx(phi(0.5), abs=0.005)
    assert quality.auroc_margin.value == pytest.approx(phi(0.5 * math.sqrt(2)), abs=0.005)


def test_an_offset_per_prompt_lowers_the_pooled_auroc_and_nothing_else():
    chosen, rejected = on_a_grid(150)
    offset = np.random.default_rng(1).integers(-40, 40, 150).astype(float)
    before, after = quick(chosen, rejected), quick(chosen + offset, rejected + offset)
    assert after.auroc.value < before.auroc.value - 0.05
    assert replace(after, auroc=before.auroc, target=before.target) == before


def test_each_resample_draws_whole_pairs():
    chosen, rejected = on_a_grid(25)
    estimate = auroc_estimate(chosen, rejected, resamples=80, seed=5)
    generator = np.random.default_rng(5)
    draws = [
        win_share(chosen[drawn], rejected[drawn]) for drawn in (generator.integers(25, size=25) for _ in range(80))
    ]
    assert estimate.low == pytest.approx(np.quantile(draws, 0.025), abs=1e-12)
    assert estimate.high == pytest.approx(np.quantile(draws, 0.975), abs=1e-12)


def test_the_interval_of_the_pooled_auroc_covers_the_truth_in_about_95_percent_of_simulations():
    generator = np.random.default_rng(6)
    distance, covered = 0.7416143, 0  # pooled normals of unit variance at this distance: AUROC 0.70
    assert phi(distance / math.sqrt(2)) == pytest.approx(0.70, abs=1e-6)
    for trial in range(200):
        prompt, own = generator.normal(size=100), generator.normal(size=(2, 100))
        chosen, rejected = (prompt + own) / math.sqrt(2) + np.array([[distance], [0.0]])
        estimate = auroc_estimate(chosen, rejected, resamples=200, seed=trial)
        covered += estimate.low <= 0.70 <= estimate.high
    assert 0.88 < covered / 200 < 0.985


@pytest.mark.parametrize(
    ("value", "low", "n", "outcome"),
    [
        (0.75, 0.70, 300, "met with confidence"),
        (0.75, 0.699, 300, "met"),
        (0.70, 0.65, 300, "met"),
        (0.699, 0.65, 300, "not met"),
        (1.0, 1.0, 29, "met"),
        (1.0, 1.0, 30, "met with confidence"),
    ],
)
def test_the_target_is_met_by_the_point_and_with_confidence_by_the_lower_bound(value, low, n, outcome):
    assert target_outcome(Estimate(value, low, 1.0, n, "bootstrap")) == outcome


def test_the_verdict_is_that_of_the_pooled_auroc_not_of_the_flattering_ones():
    generator = np.random.default_rng(2)
    prompt = generator.normal(scale=5, size=200)
    quality = quick(prompt + 1 + generator.normal(size=200), prompt + generator.normal(size=200))
    assert quality.accuracy.value > 0.70
    assert quality.auroc_margin.low > 0.70
    assert quality.target == "not met"


# Calibration.


def test_brier_score_and_nll_are_those_of_the_probability_of_the_chosen_response():
    chosen, rejected = on_a_grid(40)
    probabilities = [sigmoid(c - r) for c, r in zip(chosen, rejected, strict=True)]
    found = quick(chosen, rejected).calibration
    assert found.brier.value == pytest.approx(sum((1 - p) ** 2 for p in probabilities) / 40, abs=1e-12)
    assert found.nll.value == pytest.approx(sum(-math.log(p) for p in probabilities) / 40, abs=1e-12)


def test_margins_of_zero_have_the_nll_ln_2_and_no_calibration_error():
    found = quick(np.ones(30), np.ones(30)).calibration
    assert found.nll.value == pytest.approx(math.log(2), abs=1e-12)
    assert found.ece == 0
    assert [(each.probability, each.share, each.entries) for each in found.bins] == [(0.5, 0.5, 60)]


def test_a_calibration_bin_holds_both_orders_of_the_pairs_whose_probability_falls_into_it():
    margin = np.array([1.0, 1.02, -1.01, 3.0])  # probabilities .731, .735, .267 and .953
    bins = calibration_bins(margin)
    assert [each.entries for each in bins] == [1, 3, 3, 1]
    assert bins[2].share == pytest.approx(2 / 3, abs=1e-12)
    assert bins[2].probability == pytest.approx((sigmoid(1) + sigmoid(1.02) + sigmoid(1.01)) / 3, abs=1e-12)
    assert [each.entries for each in calibration_bins(np.array([0.0, 0.1]))] == [1, 3]  # 0.5 begins a bin
    for low, high in zip(bins, bins[::-1], strict=True):
        assert low.probability == pytest.approx(1 - high.probability, abs=1e-12)
        assert low.share == pytest.approx(1 - high.share, abs=1e-12)


def test_the_fitted_temperature_minimises_the_nll_and_undoes_a_scale():
    chosen, rejected = on_a_grid(300)
    found = calibration(chosen - rejected, resamples=20)

    def nll(temperature):
        return np.logaddexp(0, -(chosen - rejected) / temperature).mean()

    best = nll(found.temperature)
    assert all(best < nll(found.temperature * factor) for factor in (0.5, 0.99, 1.01, 2))
    scaled = calibration(7 * (chosen - rejected), resamples=20)
    assert scaled.temperature == pytest.approx(7 * found.temperature, rel=1e-9)
    assert scaled.ece_fitted == pytest.approx(found.ece_fitted, abs=1e-9)
    assert scaled.ece > 3 * scaled.ece_fitted


def test_margins_whose_probabilities_are_true_have_temperature_1():
    generator = np.random.default_rng(3)
    size = np.abs(generator.normal(scale=1.5, size=40_000))
    margin = np.where(generator.random(40_000) < 1 / (1 + np.exp(-size)), size, -size)
    found = calibration(margin, resamples=2)
    assert found.temperature == pytest.approx(1, abs=0.04)
    assert found.ece < 0.012


@pytest.mark.parametrize(
    ("margin", "reason"),
    [([1.0, 2.0, 0.0], "no pair is in the wrong order"), ([-2.0, 1.0], "not above 0"), ([0.0, 0.0], "not above 0")],
)
def test_where_no_temperature_is_best_none_is_given_with_the_reason(margin, reason):
    found = calibration(np.array(margin), resamples=20)
    assert found.temperature is None
    assert found.ece_fitted is None
    assert reason in found.temperature_refused


def test_margins_beyond_the_range_of_exp_do_not_overflow():
    found = calibration(np.array([1e5, -1e5, 2e5]), resamples=20)
    assert found.nll.value == pytest.approx(1e5 / 3)
    assert found.ece == pytest.approx(1 / 3, abs=1e-12)


def test_the_quintiles_hold_a_fifth_of_the_pairs_each_from_doubtful_to_certain():
    margin = np.random.default_rng(4).normal(loc=0.8, size=500)
    bins = accuracy_by_margin(margin)
    order = np.argsort(np.abs(margin))
    for position, found in enumerate(bins):
        fifth = margin[order[100 * position : 100 * (position + 1)]]
        assert (found.low, found.high) == (np.abs(fifth).min(), np.abs(fifth).max())
        assert found.accuracy == wilson((fifth > 0).sum(), 100)
    assert bins[-1].accuracy.value > bins[0].accuracy.value


def test_equal_margins_are_never_divided_between_quintiles():
    bins = accuracy_by_margin(np.array([1.0, -1.0] * 5 + [0.0] * 4 + [9.0]))
    assert sum(each.accuracy.n for each in bins) == 15
    assert all(first.high < second.low for first, second in pairwise(bins))
    assert len(accuracy_by_margin(np.ones(10))) == 1
    # The edges are 2, 4, 6 and 8: an edge belongs to the quintile that it ends.
    assert [each.high for each in accuracy_by_margin(np.arange(11.0))] == [2, 4, 6, 8, 10]


# Length, sources, scores.


def test_the_length_figures_are_counts_of_pairs():
    #                  longer   longer   longer  shorter  shorter  equal
    margin = np.array([1.0, 0.5, -1.0, 2.0, 0.0, 1.0])
    longer = np.array([10.0, 3.0, 4.0, -5.0, -6.0, 0.0])
    found = length_bias(margin, longer, resamples=50)
    assert found.accuracy_chosen_longer == wilson(2, 3)
    assert found.accuracy_chosen_shorter == wilson(1.5, 2)
    assert found.prefers_longer == wilson(2.5, 5)
    assert found.longer_wins == wilson(3.5, 6)


def test_the_correlation_with_length_is_spearmans_with_average_ranks():
    generator = np.random.default_rng(5)
    margin, longer = generator.integers(-5, 9, 60) / 2.0, generator.integers(-20, 20, 60).astype(float)

    def rank(values):
        return [sum(other < value for other in values) + (sum(values == value) + 1) / 2 for value in values]

    def correlation(drawn):
        return np.corrcoef(rank(margin[drawn]), rank(longer[drawn]))[0, 1]

    found = length_bias(margin, longer, resamples=40, seed=8).spearman
    generator = np.random.default_rng(8)
    draws = [correlation(generator.integers(60, size=60)) for _ in range(40)]
    assert found.value == pytest.approx(correlation(np.arange(60)), abs=1e-12)
    assert found.low == pytest.approx(np.quantile(draws, 0.025), abs=1e-12)
    assert found.high == pytest.approx(np.quantile(draws, 0.975), abs=1e-12)


def test_a_reward_that_is_the_length_is_told_by_every_length_figure():
    generator = np.random.default_rng(6)
    tokens = generator.permutation(400).reshape(2, 200)
    quality = quick(tokens[0] * 0.25, tokens[1] * 0.25, tokens=tuple(tokens))
    found = quality.length
    assert found.spearman.value == pytest.approx(1, abs=1e-12)
    assert (found.accuracy_chosen_longer.value, found.accuracy_chosen_shorter.value) == (1, 0)
    assert found.prefers_longer.value == 1
    assert found.longer_wins.value == pytest.approx(quality.accuracy.value, abs=1e-12)


def test_lengths_that_do_not_differ_leave_their_figures_unmeasured():
    found = length_bias(np.array([1.0, -1.0, 2.0]), np.zeros(3), resamples=50)
    assert found.spearman is found.accuracy_chosen_longer is found.accuracy_chosen_shorter is found.prefers_longer
    assert found.spearman is None
    assert found.longer_wins.value == 0.5
    assert length_bias(np.arange(10.0), np.eye(10)[0], resamples=200).spearman is None


def test_each_source_has_the_accuracy_of_its_own_pairs():
    chosen, rejected = np.array([1.0, 2.0, 0.0, 5.0, 1.0]), np.array([0.0, 3.0, 0.0, 1.0, 0.0])
    quality = quick(chosen, rejected, sources=["b", "a", "b", "b", "a"])
    assert quality.accuracy_by_source == {"a": wilson(1, 2), "b": wilson(2.5, 3)}
    assert list(quality.accuracy_by_source) == ["a", "b"]


def test_what_was_not_given_is_not_measured():
    chosen, rejected = on_a_grid(10)
    quality = quick(chosen, rejected)
    assert quality.length is None
    assert quality.truncated is None
    assert quality.accuracy_by_source == {}
    assert quick(chosen, rejected, truncated=np.arange(10) < 3).truncated == 3


def test_the_result_is_json_without_nan():
    chosen, rejected = on_a_grid(12)
    for scores in ((chosen, rejected), (np.ones(12), np.ones(12)), (np.ones(12), np.zeros(12))):
        quality = quick(*scores, tokens=(np.ones(12), np.ones(12)), sources=["s"] * 12)
        assert json.loads(json.dumps(asdict(quality), allow_nan=False))["pairs"] == 12


# Refusals.


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_score_that_is_not_finite_is_refused_in_one_line(side, bad):
    scores = {"chosen": np.arange(4.0), "rejected": np.ones(4)}
    scores[side][2] = bad
    with pytest.raises(UserError, match=rf"^reward model: 1 of 4 {side} are NaN or infinite") as error:
        reward_quality(**scores)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("chosen", "rejected"), [((4,), (4, 1)), ((4,), (3,)), ((4, 1), (4, 1))])
def test_arrays_of_other_pairs_are_refused(chosen, rejected):
    with pytest.raises(ConfigurationError, match=r"both must be \[N\]"):
        reward_quality(np.ones(chosen), np.zeros(rejected))


def test_a_single_pair_is_refused():
    with pytest.raises(UserError, match="1 units have no interval"):
        reward_quality(np.ones(1), np.zeros(1))


def test_pairs_on_one_prompt_are_drawn_together():
    """The standard error of an accuracy over prompts of which each is all right or all wrong is that of its prompts."""
    generator = np.random.default_rng(1)
    right = generator.random(60) < 0.7
    margin = np.repeat(np.where(right, 1.0, -1.0), 10) + generator.normal(0, 0.01, 600)
    prompts = np.repeat(np.arange(60), 10)
    chosen, rejected = margin, np.zeros(600)
    alone = reward_quality(chosen, rejected, resamples=2000)
    together = reward_quality(chosen, rejected, prompts=prompts.tolist(), resamples=2000)
    rate = right.mean()
    for quality, units in ((alone, 600), (together, 60)):
        width = 2 * 1.96 * (rate * (1 - rate) / units) ** 0.5
        assert quality.accuracy.high - quality.accuracy.low == pytest.approx(width, rel=0.1)
        assert quality.accuracy.value == pytest.approx(rate)
        assert quality.auroc.n == 600
    assert together.auroc.value == alone.auroc.value
    assert together.auroc.high - together.auroc.low > 2 * (alone.auroc.high - alone.auroc.low)
    assert together.prompts == 60
    assert "over 60 prompts" in together.auroc.method


def test_a_prompt_of_its_own_for_each_pair_changes_nothing():
    generator = np.random.default_rng(2)
    chosen, rejected = generator.normal(0.5, 1, 40), generator.normal(0, 1, 40)
    alone, named = (reward_quality(chosen, rejected, prompts=names, resamples=100) for names in (None, list(range(40))))
    assert (alone.auroc, alone.accuracy, alone.auroc_margin) == (named.auroc, named.accuracy, named.auroc_margin)
