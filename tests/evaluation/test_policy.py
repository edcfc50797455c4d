"""Policy statistics: known answers, invariance under what a reward model leaves free, twins from the definitions."""

import itertools
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from rlhf_lightning.errors import ConfigurationError, UserError
from rlhf_lightning.evaluation import policy
from rlhf_lightning.evaluation.estimates import Estimate
from rlhf_lightning.evaluation.policy import (
    AnchoredGain,
    Anchors,
    best_of_n,
    claim_25,
    compare_policies,
    expected_best,
    fit_gao,
    length_controlled_win_rate,
    summarise_kl,
)


def drawn_rewards(prompts=40, replies=3, gain=0.5, seed=0):
    """Rewards on a grid of quarters (ties happen, sums are exact): before, after [P, K]; chosen, rejected [P]."""
    generator = np.random.default_rng(seed)
    prompt = generator.normal(size=(prompts, 1))
    before = prompt + generator.normal(size=(prompts, replies))
    after = prompt + gain + generator.normal(size=(prompts, replies))
    chosen = prompt[:, 0] + 1 + generator.normal(size=prompts)
    rejected = prompt[:, 0] - 0.5 + generator.normal(size=prompts)
    return tuple(np.round(4 * rewards) / 4 for rewards in (before, after, chosen, rejected))


def compare(before, after, chosen=None, rejected=None, **given):
    anchors = None if chosen is None else Anchors(chosen, rejected)
    return compare_policies(before, after, anchors=anchors, **{"resamples": 200, **given})


def resampled(statistic, n, *, resamples, seed):
    """Ends of the percentile interval, drawn here again."""
    generator = np.random.default_rng(seed)
    draws = [statistic(generator.integers(n, size=n)) for _ in range(resamples)]
    return np.quantile(draws, [0.025, 0.975])


def estimate(value, low, high):
    return Estimate(value, low, high, 40, "bootstrap")


# The anchored scale and the claim.


def test_a_policy_that_writes_the_rejected_responses_scores_0_and_one_that_writes_the_chosen_ones_100():
    _, _, chosen, rejected = drawn_rewards()
    found = compare(np.stack([rejected] * 3, 1), np.stack([chosen] * 3, 1), chosen, rejected).anchored
    for score, value in ((found.score_before, 0), (found.score_after, 100), (found.gain, 100)):
        assert (score.value, score.low, score.high) == pytest.approx((value, value, value), abs=1e-12)
    halfway = (chosen + rejected)[:, None] / 2
    assert compare(halfway, halfway, chosen, rejected).anchored.score_after.value == pytest.approx(50, abs=1e-12)


def test_the_anchored_numbers_are_ratios_of_means_taken_anew_in_each_resample():
    before, after, chosen, rejected = drawn_rewards(gain=1.0, seed=3)
    before = before + 0.75
    found = compare(before, after, chosen, rejected, seed=11).anchored
    gap = chosen - rejected

    def score(rewards, drawn):
        return 100 * np.mean(rewards.mean(1)[drawn] - rejected[drawn]) / np.mean(gap[drawn])

    statistics = {
        "gap": lambda drawn: gap[drawn].mean(),
        "score_before": lambda drawn: score(before, drawn),
        "score_after": lambda drawn: score(after, drawn),
        "gain": lambda drawn: score(after, drawn) - score(before, drawn),
        "relative_gain": lambda drawn: score(after, drawn) / score(before, drawn) - 1,
    }
    for name, statistic in statistics.items():
        low, high = resampled(statistic, 40, resamples=200, seed=11)
        measured = getattr(found, name)
        assert measured.value == pytest.approx(statistic(np.arange(40)), abs=1e-9), name
        assert (measured.low, measured.high) == pytest.approx((low, high), abs=1e-9), name
        assert measured.n == 40
    assert (found.refused, found.relative_refused) == ("", "")


@pytest.mark.parametrize("change", ["scale", "shift per prompt"])
def test_scale_and_shift_of_the_rewards_change_nothing_but_the_mean_rewards(change):
    before, after, chosen, rejected = drawn_rewards(gain=1.0)
    tokens = np.random.default_rng(1).integers(5, 80, (2, *before.shape))
    shift = np.random.default_rng(2).integers(-400, 600, len(before)) / 4

    def changed(rewards):
        if change == "scale":
            return 3.5 * rewards + 40
        return rewards + (shift if rewards.ndim == 1 else shift[:, None])

    lengths = {"tokens": (tokens[0], tokens[1])}
    first = compare(before, after, chosen, rejected, **lengths)
    second = compare(*(changed(rewards) for rewards in (before, after, chosen, rejected)), **lengths)
    for name in ("win_rate", "length_controlled", "claim_25", "tokens_after"):
        assert getattr(second, name) == getattr(first, name), name
    pairs = [(first.gain_sd, second.gain_sd), (first.percentile, second.percentile)]
    pairs += [(getattr(first.anchored, name), getattr(second.anchored, name)) for name in ("score_before", "gain")]
    for one, other in pairs:
        assert (other.value, other.low, other.high) == pytest.approx((one.value, one.low, one.high), abs=1e-9)
    assert abs(second.reward_before.value - first.reward_before.value) > 1


def test_the_interval_of_the_gain_is_paired_so_hard_prompts_do_not_widen_it():
    before, after, chosen, rejected = drawn_rewards(prompts=100, gain=1.0)
    hard = np.random.default_rng(4).integers(-200, 200, 100).astype(float)
    found = compare(before + hard[:, None], after + hard[:, None], chosen + hard, rejected + hard)
    assert found.reward_after.high - found.reward_after.low > 20
    assert found.reward_gain.high - found.reward_gain.low < 1
    assert found.reward_gain.value == pytest.approx(after.mean() - before.mean(), abs=1e-9)


def test_the_interval_of_the_anchored_gain_covers_the_truth_in_about_95_percent_of_simulations():
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(150):
        prompt = generator.normal(size=(60, 1))
        before = prompt + generator.normal(size=(60, 4))
        after = prompt + 0.6 + generator.normal(size=(60, 4))
        chosen, rejected = prompt[:, 0] + 2 + generator.normal(size=60), prompt[:, 0] + generator.normal(size=60)
        gain = compare(before, after, chosen, rejected, seed=trial, resamples=150).anchored.gain
        covered += gain.low <= 30 <= gain.high
    assert 0.87 < covered / 150 < 0.99


@pytest.mark.parametrize("swap", [False, True])
def test_without_a_gap_between_the_anchors_there_is_no_score_but_a_reason(swap):
    before, after, chosen, rejected = drawn_rewards()
    other = rejected + np.random.default_rng(0).permutation([-1.0] * 18 + [1.0] * 22)
    found = compare(before, after, *((rejected, chosen) if swap else (other, rejected)))
    assert found.anchored.score_before is found.anchored.score_after is found.anchored.gain is None
    assert "does not tell chosen from rejected" in found.anchored.refused
    assert found.anchored.gap.low <= 0
    assert (found.anchored.gap.value > 0) is (not swap)
    assert (found.claim_25.outcome, found.claim_25.reason) == ("not measured", found.anchored.refused)


def test_a_share_of_a_score_that_may_be_0_is_refused():
    before, after, _, _ = drawn_rewards()
    rejected = np.round(4 * before.mean(1)) / 4
    found = compare(before, after, rejected + 1, rejected).anchored
    assert found.score_before.low <= 0 <= found.score_before.high
    assert found.relative_gain is None
    assert "not clearly above 0" in found.relative_refused
    below = compare(before - 5, after, rejected + 1, rejected).anchored
    assert below.score_before.high < 0
    assert below.relative_gain is None


@pytest.mark.parametrize(
    ("gain", "outcome", "reason"),
    [
        (estimate(25, 0.1, 50), "met", "+25.0 points [+0.1, +50.0]"),
        (estimate(24.9, 20, 30), "not met", "below 25"),
        (estimate(40, 0, 80), "not met", "not clearly above 0"),
        (estimate(-40, -80, -1), "not met", "below 25"),
    ],
)
def test_the_claim_of_25_percent_asks_for_25_points_and_a_lower_bound_above_0(gain, outcome, reason):
    anchored = AnchoredGain(estimate(1, 0.5, 2), gain, gain, gain, None, "", "no share")
    found = claim_25(anchored)
    assert found.outcome == outcome
    assert reason in found.reason


def test_the_claim_is_not_measured_without_anchors():
    before, after, _, _ = drawn_rewards()
    found = compare(before, after)
    assert found.anchored is found.length_controlled is found.tokens_before
    assert found.claim_25.outcome == "not measured"
    assert "no chosen and rejected" in found.claim_25.reason


# Gain in SD, win rate, percentile.


def test_the_gain_in_sd_divides_by_the_spread_of_the_responses_before_to_one_prompt():
    before, after, _, _ = drawn_rewards()

    def gain(drawn):
        variance = np.mean([np.sum((row - row.mean()) ** 2) / (len(row) - 1) for row in before[drawn]])
        return np.mean(after[drawn] - before[drawn]) / math.sqrt(variance)

    found = compare(before, after, seed=2).gain_sd
    assert found.value == pytest.approx(gain(np.arange(40)), abs=1e-12)
    assert (found.low, found.high) == pytest.approx(resampled(gain, 40, resamples=200, seed=2), abs=1e-12)


@pytest.mark.parametrize(
    ("rewards", "reason"), [(np.arange(9.0)[:, None], "one response"), (np.ones((9, 4)), "decoding greedily")]
)
def test_without_a_spread_there_is_no_gain_in_sd_but_a_reason(rewards, reason):
    found = compare(rewards, rewards + 1)
    assert found.gain_sd is None
    assert reason in found.gain_sd_refused


def test_a_spread_in_too_few_prompts_is_refused_with_the_reason_of_the_bootstrap():
    before = np.ones((9, 2))
    before[0, 0] = 0
    found = compare(before, before + 1)
    assert found.gain_sd is None
    assert "too few units" in found.gain_sd_refused


def test_the_win_rate_is_over_all_couples_of_replies_to_one_prompt_ties_one_half():
    before, after, _, _ = drawn_rewards()
    points = [
        np.mean([(a > b) + 0.5 * (a == b) for a in row_after for b in row_before])
        for row_before, row_after in zip(before, after, strict=True)
    ]
    found = compare(before, after, seed=6).win_rate
    assert found.value == pytest.approx(np.mean(points), abs=1e-12)
    ends = resampled(lambda drawn: np.array(points)[drawn].mean(), 40, resamples=200, seed=6)
    assert (found.low, found.high) == pytest.approx(ends, abs=1e-12)
    assert (before[:, :, None] == after[:, None, :]).any()
    assert compare(after, before).win_rate.value == pytest.approx(1 - found.value, abs=1e-12)


def test_a_normal_gain_of_d_sd_has_the_win_rate_and_the_percentile_of_the_formula():
    generator = np.random.default_rng(7)
    before, after = generator.normal(size=(1500, 16)), generator.normal(loc=0.8, size=(1500, 16))
    found = compare(before, after, resamples=2)
    phi = [0.5 * (1 + math.erf(x / 2)) for x in (0.8, 0.8 * math.sqrt(2 / (1 + 1 / 16)))]
    assert found.win_rate.value == pytest.approx(phi[0], abs=0.01)
    # The mean of 16 replies is normal too, of variance 1/16.
    assert found.percentile.value == pytest.approx(100 * phi[1], abs=1)
    assert found.gain_sd.value == pytest.approx(0.8, abs=0.03)


def test_a_policy_that_did_not_change_has_percentile_50_and_win_rate_one_half():
    before, _, _, _ = drawn_rewards(replies=1)
    found = compare(before, before)
    assert found.percentile.value == 50
    assert found.win_rate.value == 0.5
    assert found.reward_gain.value == 0


# Length-controlled win rate.


def biased(effect, *, prompts=200, longer=20, seed=0):
    """Wins decided by the length difference (times `effect`) and chance; replies after are longer by `longer`."""
    generator = np.random.default_rng(seed)
    tokens_before = generator.integers(10, 110, (prompts, 2))
    tokens_after = generator.integers(10 + longer, 110 + longer, (prompts, 2))
    noise = generator.logistic(size=(2, prompts, 2))
    return noise[0] + effect * tokens_before, noise[1] + effect * tokens_after, tokens_before, tokens_after


def test_at_equal_lengths_the_length_controlled_win_rate_is_the_win_rate():
    before, after, _, _ = drawn_rewards()
    tokens = np.full(before.shape, 30)
    found = compare(before, after, tokens=(tokens, tokens), seed=5)
    controlled = found.length_controlled
    for name in ("value", "low", "high"):
        assert getattr(controlled.win_rate, name) == pytest.approx(getattr(found.win_rate, name), abs=1e-9)
    assert (controlled.length_coefficient, controlled.length_overlap, controlled.warning) == (0, 0.5, "")


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_where_the_slope_of_the_penalised_likelihood_is_0(seed):
    before, after, tokens_before, tokens_after = biased(0.02, prompts=30, seed=seed)
    found = length_controlled_win_rate(before, after, tokens_before, tokens_after, resamples=50)
    difference = [
        (int(a) - int(b), float(x > y) if x != y else 0.5)
        for p in range(30)
        for a, x in zip(tokens_after[p], after[p], strict=True)
        for b, y in zip(tokens_before[p], before[p], strict=True)
    ]
    spread = np.std([each for each, _ in difference])

    def loss(constant, coefficient):
        total = 0.5 * 0.025 * len(difference) * coefficient**2
        for tokens, win in difference:
            logit = constant + coefficient * math.tanh(tokens / spread)
            total -= win * -math.log1p(math.exp(-logit)) + (1 - win) * -math.log1p(math.exp(logit))
        return total

    constant = math.log(found.win_rate.value / (1 - found.win_rate.value))
    best = loss(constant, found.length_coefficient)
    for step in (1e-3, -1e-3):
        # A quadratic: moving by the same step to both sides of the minimum costs the same.
        for there, back in (((step, 0), (-step, 0)), ((0, step), (0, -step))):
            cost = loss(constant + there[0], found.length_coefficient + there[1])
            assert cost > best
            other = loss(constant + back[0], found.length_coefficient + back[1])
            assert cost - other == pytest.approx(0, abs=1e-7)


def test_the_fit_arrives_from_far_away():
    generator = np.random.default_rng(0)
    length, wins = np.tanh(generator.normal(size=50)), generator.integers(0, 2, 50).astype(float)
    near, far = (policy._fit_wins(wins, length, np.ones(50), start) for start in ((0.0, 0.0), (6.0, -4.0)))
    assert far == pytest.approx(near, abs=1e-9)
    assert abs(near[0]) < 1


def test_the_interval_refits_on_each_resample_of_prompts():
    before, after, tokens_before, tokens_after = biased(0.02, prompts=25)

    def refit(drawn):
        """The resampled prompts as a data set of their own, at the spread of the whole."""
        wins = (after[drawn][:, :, None] > before[drawn][:, None, :]).ravel().astype(float)
        length = np.tanh((tokens_after[:, :, None] - tokens_before[:, None, :]) / spread)[drawn].ravel()
        weights = np.zeros(2)
        for _ in range(3000):
            error = wins - 1 / (1 + np.exp(-(weights[0] + weights[1] * length)))
            weights = weights + 2 * np.array([error.mean(), (error * length).mean() - 0.025 * weights[1]])
        return 1 / (1 + math.exp(-weights[0]))

    spread = (tokens_after[:, :, None] - tokens_before[:, None, :]).std()
    found = length_controlled_win_rate(before, after, tokens_before, tokens_after, resamples=20, seed=3).win_rate
    assert found.value == pytest.approx(refit(np.arange(25)), abs=1e-6)
    assert (found.low, found.high) == pytest.approx(resampled(refit, 25, resamples=20, seed=3), abs=1e-6)


def test_a_win_rate_that_is_all_length_is_one_half_at_equal_length_but_for_what_the_ridge_leaves(monkeypatch):
    rewards_and_tokens = biased(0.05, prompts=600)
    raw = compare(*rewards_and_tokens[:2]).win_rate
    held = length_controlled_win_rate(*rewards_and_tokens, resamples=200)
    assert raw.low > 0.6
    assert 0.5 < held.win_rate.value < 0.5 + (raw.value - 0.5) / 2
    assert held.length_coefficient > 1
    monkeypatch.setattr(policy, "LENGTH_RIDGE", 0.0)
    free = length_controlled_win_rate(*rewards_and_tokens, resamples=200)
    assert free.win_rate.low < 0.5 < free.win_rate.high
    assert free.length_coefficient > held.length_coefficient


def test_lengths_that_decide_nothing_leave_the_win_rate_as_it_is():
    before, after, tokens_before, tokens_after = biased(0.0, prompts=600)
    found = compare(before, after + 1, tokens=(tokens_before, tokens_after))
    assert found.length_controlled.win_rate.value == pytest.approx(found.win_rate.value, abs=0.02)


def test_the_overlap_is_the_smaller_side_equal_lengths_half_of_both_and_warns_below_a_quarter():
    rewards = np.random.default_rng(0).normal(size=(2, 10, 1))
    tokens = np.full((10, 1), 50)
    longer = tokens + np.array([[1] * 7 + [-1] * 1 + [0] * 2]).T
    found = length_controlled_win_rate(*rewards, tokens, longer, resamples=100)
    assert found.length_overlap == pytest.approx(0.2, abs=1e-12)
    assert found.warning.startswith("only 20%")
    assert length_controlled_win_rate(*rewards, longer, tokens, resamples=100).length_overlap == found.length_overlap
    longer[:2] = 49
    assert length_controlled_win_rate(*rewards, tokens, longer, resamples=100).warning == ""


@pytest.mark.parametrize("sign", [1, -1])
def test_a_policy_that_always_wins_or_loses_gives_a_number(sign):
    before, _, tokens_before, tokens_after = biased(0.0, prompts=20)
    found = length_controlled_win_rate(before, before + 100 * sign, tokens_before, tokens_after, resamples=100)
    assert abs(found.win_rate.value - (sign > 0)) < 1e-4
    assert found.win_rate.method == "bootstrap"


def test_repeating_every_reply_changes_no_win_rate():
    before, after, tokens_before, tokens_after = biased(0.03, prompts=40)
    once = compare(before, after, tokens=(tokens_before, tokens_after))
    twice = compare(
        *(np.repeat(each, 2, axis=1) for each in (before, after)),
        tokens=(np.repeat(tokens_before, 2, axis=1), np.repeat(tokens_after, 2, axis=1)),
    )
    assert twice.win_rate.low == pytest.approx(once.win_rate.low, abs=1e-12)
    for name in ("value", "low", "high"):
        first, second = (getattr(each.length_controlled.win_rate, name) for each in (once, twice))
        assert second == pytest.approx(first, abs=1e-8)


# KL.


def test_the_kl_per_reply_is_a_mean_of_sums_and_per_token_a_ratio_of_sums():
    exact = np.array([[4.0, 2.0], [1.0, 3.0], [0.0, 2.0]])
    k1 = np.array([[5.0, 1.0], [-1.0, 3.0], [0.0, 2.0]])
    tokens = np.array([[10, 1], [5, 5], [2, 7]])
    found = summarise_kl(exact, k1, tokens, resamples=100, seed=4)
    assert (found.prompts, found.replies) == (3, 2)
    assert found.per_reply.value == pytest.approx(2, abs=1e-12)
    assert found.per_token.value == pytest.approx(12 / 30, abs=1e-12)
    assert found.k1_per_reply.value == pytest.approx(10 / 6, abs=1e-12)
    assert found.k1_per_token.value == pytest.approx(10 / 30, abs=1e-12)
    ends = resampled(lambda drawn: exact[drawn].sum() / tokens[drawn].sum(), 3, resamples=100, seed=4)
    assert (found.per_token.low, found.per_token.high) == pytest.approx(ends, abs=1e-12)
    assert found.per_reply.n == 3


@pytest.mark.parametrize("name", ["exact", "k1"])
def test_a_kl_that_is_not_finite_is_refused(name):
    given = {"exact": np.ones((3, 2)), "k1": np.ones((3, 2)), "tokens": np.ones((3, 2))}
    given[name][1, 0] = math.nan
    with pytest.raises(UserError, match=r"1 of 6 .* NaN or infinite"):
        summarise_kl(**given)


# Best of n.


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_the_best_of_n_is_the_mean_over_all_subsets_of_n_responses(n):
    rewards = np.random.default_rng(0).normal(size=(4, 6)).round(0)  # with ties
    subsets = list(itertools.combinations(range(6), n))
    brute = [np.mean([max(row[i] for i in subset) for subset in subsets]) for row in rewards]
    assert expected_best(rewards, n) == pytest.approx(brute, abs=1e-12)


def test_the_curve_starts_at_the_mean_without_kl_and_rises():
    rewards = np.random.default_rng(2).normal(size=(800, 8))
    curve = best_of_n(rewards, resamples=50)
    assert [point.n for point in curve] == [1, 2, 4, 8]
    assert [point.kl for point in curve[:2]] == pytest.approx([0, math.log(2) - 0.5], abs=1e-12)
    assert curve[0].reward.value == pytest.approx(rewards.mean(), abs=1e-12)
    assert curve[1].reward.value == pytest.approx(1 / math.sqrt(math.pi), abs=0.04)
    assert curve[3].reward.value == pytest.approx(rewards.max(axis=1).mean(), abs=1e-12)
    assert sorted(point.reward.value for point in curve) == [point.reward.value for point in curve]
    assert curve[2].reward.n == 800


# Gao's curves.


def test_the_fit_finds_the_curve_that_made_the_points_and_its_peak():
    alpha, beta = 1.2, 0.35
    distance = np.array([0.0, 0.3, 0.9, 1.4, 2.2, 3.0])

    def curve(d):
        return d * (alpha - beta * np.log(d))

    fit = fit_gao(distance**2, np.concatenate([[0.0], curve(distance[1:])]))
    assert (fit.alpha, fit.beta) == pytest.approx((alpha, beta), abs=1e-9)
    grid = np.linspace(0.001, 30, 300_000)
    assert fit.peak_distance == pytest.approx(grid[np.argmax(curve(grid))], abs=2e-4)


def test_a_curve_that_only_bends_upwards_has_no_peak():
    distance = np.array([0.5, 1.5, 2.5, 4.0])
    fit = fit_gao(distance**2, distance * (0.2 + 0.1 * distance))
    assert fit.beta < 0
    assert fit.peak_distance is None


def test_the_fit_is_the_least_squares_one():
    generator = np.random.default_rng(4)
    distance = np.linspace(0.2, 3, 12)
    gain = distance * (1 - 0.2 * np.log(distance)) + generator.normal(scale=0.1, size=12)
    fit = fit_gao(distance**2, gain)

    def rms(alpha, beta):
        return math.sqrt(np.mean((distance * (alpha - beta * np.log(distance)) - gain) ** 2))

    for a, b in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        assert rms(fit.alpha + a, fit.beta + b) > rms(fit.alpha, fit.beta)


@pytest.mark.parametrize(
    ("kl", "gain", "message"),
    [
        ([0.0, 1.0, 4.0], [0.0, 1.0, 1.0], "fewer than 3 distances"),
        ([1.0, -0.1, 2.0, 3.0], [1.0] * 4, "not k1"),
        ([1.0, 2.0, 3.0], [1.0, math.inf, 1.0], "NaN or infinite"),
    ],
)
def test_points_that_make_no_curve_are_refused(kl, gain, message):
    with pytest.raises(UserError, match=message):
        fit_gao(kl, gain)


# Refusals, and the result as a whole.


@pytest.mark.parametrize("place", range(4))
def test_a_reward_that_is_not_finite_is_refused_in_one_line(place):
    given = [rewards.copy() for rewards in drawn_rewards()]
    given[place].flat[3] = math.inf
    with pytest.raises(UserError, match=r"^policy: 1 of \d+ .* are NaN or infinite") as error:
        compare(*given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("before", "after"), [((40, 3), (40, 2)), ((40,), (40,))])
def test_arrays_that_do_not_belong_together_are_refused(before, after):
    with pytest.raises(ConfigurationError, match=r"must be \[P, K\]"):
        compare(np.ones(before), np.ones(after))


def test_a_single_prompt_is_refused():
    with pytest.raises(UserError, match="1 units have no interval"):
        compare(np.ones((1, 4)), np.ones((1, 4)))


def test_the_result_is_json_without_nan_and_the_same_again():
    before, after, chosen, rejected = drawn_rewards()
    tokens = {"tokens": (np.full(before.shape, 9), np.full(before.shape, 12))}
    found = compare(before, after, chosen, rejected, **tokens)
    assert found == compare(before, after, chosen, rejected, **tokens)
    read = json.loads(json.dumps(asdict(found), allow_nan=False))
    assert (read["prompts"], read["replies"], read["win_rate"]["n"]) == (40, 3, 40)
    assert (found.tokens_before.value, found.tokens_after.value) == (9, 12)
    assert replace(found, anchored=None) != found
    for other in (
        best_of_n(before, resamples=20)[0],
        summarise_kl(np.ones((3, 1)), np.ones((3, 1)), np.ones((3, 1)), resamples=20),
    ):
        json.dumps(asdict(other), allow_nan=False)
