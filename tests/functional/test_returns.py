"""Shaped rewards and advantages against definitions in plain Python loops; in float64 unless said."""

import math

import pytest
import torch

from rlhf_lightning.functional import generalized_advantages, shaped_rewards
from rlhf_lightning.functional.advantages import (
    explained_variance,
    group_normalized_advantages,
    groups_that_differ,
    leave_one_out_advantages,
    overlong_share,
    returns_to_go,
)

EXACT = {"rtol": 0, "atol": 1e-12}
IDENTICAL = {"rtol": 0, "atol": 0}
# right padding, left padding, both, a gap, a full row, one token
MASK = torch.tensor(
    [
        [1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 1],
        [0, 1, 1, 1, 0, 0],
        [1, 0, 1, 0, 0, 1],
        [1, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 0, 0],
    ],
    dtype=torch.bool,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inside(row: int) -> list[int]:
    return [t for t in range(MASK.shape[1]) if MASK[row, t]]


# ---- shaped_rewards ----------------------------------------------------------------------------------------


def test_the_score_stands_on_the_last_response_token_and_the_penalty_on_every_one():
    rewards = shaped_rewards(
        torch.tensor([10.0, 20.0]),
        torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]),
        torch.tensor([[True, True, False, False], [False, True, True, True]]),
        kl_coef=0.5,
    )
    assert rewards.tolist() == [[-0.5, 9.0, 0.0, 0.0], [0.0, -1.0, -1.5, 18.0]]


def test_shaped_rewards_equal_their_definition_for_padding_on_any_side_and_gaps():
    scores, kl = random(6), random(6, 6, seed=1)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for row in range(6):
        for t in inside(row):
            expected[row, t] = -0.3 * kl[row, t]
        expected[row, inside(row)[-1]] += scores[row]
    torch.testing.assert_close(shaped_rewards(scores, kl, MASK, kl_coef=0.3), expected, **EXACT)


def test_the_score_is_paid_exactly_once():
    scores = random(6)
    paid = shaped_rewards(scores, random(6, 6, seed=1), MASK, kl_coef=0.0)
    torch.testing.assert_close(paid.sum(dim=1), scores, **IDENTICAL)
    assert (paid != 0).sum(dim=1).tolist() == [1] * 6


def test_the_gradient_of_the_rewards_reaches_the_score_once_and_the_kl_inside_the_mask():
    scores, kl = random(6).requires_grad_(), random(6, 6, seed=1).requires_grad_()
    shaped_rewards(scores, kl, MASK, kl_coef=0.3).sum().backward()
    torch.testing.assert_close(scores.grad, torch.ones_like(scores), **IDENTICAL)
    torch.testing.assert_close(kl.grad, MASK.double() * -0.3, **EXACT)


def test_shaped_rewards_pass_gradcheck():
    leaves = [random(6).requires_grad_(), random(6, 6, seed=1).requires_grad_()]
    assert torch.autograd.gradcheck(lambda s, k: shaped_rewards(s, k, MASK, kl_coef=0.3), leaves)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_garbage_in_the_padding_of_the_kl_reaches_neither_reward_nor_gradient(garbage):
    scores, clean = random(6), random(6, 6, seed=1)
    dirty = torch.where(MASK, clean, garbage).requires_grad_()
    rewards = shaped_rewards(scores, dirty, MASK, kl_coef=0.3)
    rewards.sum().backward()
    torch.testing.assert_close(rewards.detach(), shaped_rewards(scores, clean, MASK, kl_coef=0.3), **IDENTICAL)
    assert dirty.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rewards_are_computed_in_float32(dtype):
    scores, kl = random(6).to(dtype), random(6, 6, seed=1).to(dtype)
    rewards = shaped_rewards(scores, kl, MASK, kl_coef=0.3)
    torch.testing.assert_close(rewards, shaped_rewards(scores.float(), kl.float(), MASK, kl_coef=0.3), **IDENTICAL)


def test_a_score_of_float64_is_not_rounded_to_the_float32_of_the_kl():
    scores = random(6)
    rewards = shaped_rewards(scores, torch.zeros(6, 6), MASK, kl_coef=0.3)
    torch.testing.assert_close(rewards.sum(dim=1), scores, **IDENTICAL)


def test_a_row_without_response_tokens_has_no_place_for_its_score():
    mask = MASK.clone()
    mask[2] = False
    with pytest.raises(ValueError, match=r"no True in row\(s\) \[2\]"):
        shaped_rewards(random(6), random(6, 6), mask, kl_coef=0.3)


@pytest.mark.parametrize(
    ("scores", "kl", "mask"),
    [
        (torch.zeros(4, 1), torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.bool)),
        (torch.zeros(3), torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.bool)),
        (torch.zeros(4), torch.zeros(4, 1), torch.ones(4, 3, dtype=torch.bool)),
        (torch.zeros(4), torch.zeros(4, 3), torch.ones(4, dtype=torch.bool)),
    ],
)
def test_shaped_rewards_refuse_other_shapes(scores, kl, mask):
    with pytest.raises(ValueError, match=r"expected the shapes scores \[B\], kl \[B, T\], mask \[B, T\]"):
        shaped_rewards(scores, kl, mask, kl_coef=0.3)


@pytest.mark.parametrize("kl_coef", [-0.1, math.nan, math.inf])
def test_a_negative_kl_coefficient_is_refused(kl_coef):
    with pytest.raises(ValueError, match=f"kl_coef is {kl_coef}"):
        shaped_rewards(random(6), random(6, 6), MASK, kl_coef=kl_coef)


# ---- generalized_advantages --------------------------------------------------------------------------------


def advantages_by_definition(rewards, values, gamma, gae_lambda):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, over the tokens inside the mask alone: O(T^2)."""
    advantages = torch.zeros(MASK.shape, dtype=torch.float64)
    for row in range(MASK.shape[0]):
        tokens = inside(row)
        r = [rewards[row, t].item() for t in tokens]
        v = [values[row, t].item() for t in tokens] + [0.0]
        for start, t in enumerate(tokens):
            advantages[row, t] = sum(
                (gamma * gae_lambda) ** (step - start) * (r[step] + gamma * v[step + 1] - v[step])
                for step in range(start, len(tokens))
            )
    return advantages


def test_advantages_and_returns_of_three_tokens_by_hand():
    # deltas: 0 + 2/2 - 4 = -3, 1 + 6/2 - 2 = 2, 8 + 0 - 6 = 2; gamma lambda = 1/4
    advantages, returns = generalized_advantages(
        torch.tensor([[0.0, 1.0, 8.0, 99.0]]),
        torch.tensor([[4.0, 2.0, 6.0, 99.0]]),
        torch.tensor([[True, True, True, False]]),
        gamma=0.5,
        gae_lambda=0.5,
    )
    assert advantages.tolist() == [[-3 + 2.5 / 4, 2.5, 2.0, 0.0]]
    assert returns.tolist() == [[4 - 3 + 2.5 / 4, 4.5, 8.0, 0.0]]


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_advantages_equal_the_quadratic_definition(gamma, gae_lambda):
    rewards, values = random(6, 6), random(6, 6, seed=1)
    advantages, returns = generalized_advantages(rewards, values, MASK, gamma=gamma, gae_lambda=gae_lambda)
    expected = advantages_by_definition(rewards, values, gamma, gae_lambda)
    torch.testing.assert_close(advantages, expected, **EXACT)
    torch.testing.assert_close(returns, torch.where(MASK, expected + values, 0), **EXACT)


def test_the_defaults_are_gamma_1_and_lambda_095():
    rewards, values = random(6, 6), random(6, 6, seed=1)
    expected = generalized_advantages(rewards, values, MASK, gamma=1.0, gae_lambda=0.95)
    for found, wanted in zip(generalized_advantages(rewards, values, MASK), expected, strict=True):
        torch.testing.assert_close(found, wanted, **IDENTICAL)


def test_with_lambda_1_the_return_is_the_sum_of_the_rewards_to_come():
    rewards, values = random(6, 6), random(6, 6, seed=1)
    _, returns = generalized_advantages(rewards, values, MASK, gae_lambda=1.0)
    masked = torch.where(MASK, rewards, 0)
    to_come = masked.flip(1).cumsum(dim=1).flip(1)
    torch.testing.assert_close(returns, torch.where(MASK, to_come, 0), **EXACT)


@pytest.mark.parametrize("garbage", [1e6, math.nan, math.inf])
def test_nothing_outside_the_mask_has_any_influence(garbage):
    def run(rewards, values):
        leaves = [rewards.requires_grad_(), values.requires_grad_()]
        results = generalized_advantages(*leaves, MASK)
        (results[0].square() + results[1]).sum().backward()
        return [*(result.detach() for result in results), *(leaf.grad for leaf in leaves)]

    clean = run(random(6, 6), random(6, 6, seed=1))
    dirty = run(*(torch.where(MASK, random(6, 6, seed=seed), garbage) for seed in (0, 1)))
    for without, with_garbage in zip(clean, dirty, strict=True):
        torch.testing.assert_close(with_garbage, without, **IDENTICAL)
        assert (with_garbage[~MASK] == 0).all()


def test_padding_on_the_left_gives_the_tokens_the_same_advantages_as_padding_on_the_right():
    rewards, values = random(1, 3), random(1, 3, seed=1)
    pad, tokens = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    left = generalized_advantages(
        torch.cat([pad, rewards], 1), torch.cat([pad, values], 1), torch.cat([pad.bool(), tokens], 1)
    )
    right = generalized_advantages(
        torch.cat([rewards, pad], 1), torch.cat([values, pad], 1), torch.cat([tokens, pad.bool()], 1)
    )
    for on_left, on_right in zip(left, right, strict=True):
        torch.testing.assert_close(on_left[:, 2:], on_right[:, :3], **IDENTICAL)


def test_a_row_without_tokens_has_only_zeros():
    advantages, returns = generalized_advantages(random(2, 3), random(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert (advantages == 0).all()
    assert (returns == 0).all()


@pytest.mark.parametrize("which", [0, 1])
def test_advantages_and_returns_pass_gradcheck(which):
    leaves = [random(6, 6).requires_grad_(), random(6, 6, seed=1).requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda rewards, values: generalized_advantages(rewards, values, MASK, gamma=0.9)[which], leaves
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_advantages_are_computed_in_float32(dtype):
    rewards, values = random(6, 6).to(dtype), random(6, 6, seed=1).to(dtype)
    wide = generalized_advantages(rewards.float(), values.float(), MASK)
    for found, expected in zip(generalized_advantages(rewards, values, MASK), wide, strict=True):
        torch.testing.assert_close(found, expected, **IDENTICAL)


def test_the_inputs_of_both_functions_are_left_alone():
    scores, rewards, values, mask = random(6), random(6, 6), random(6, 6, seed=1), MASK.clone()
    shaped_rewards(scores, values, mask, kl_coef=0.3)
    generalized_advantages(rewards, values, mask)
    before = (random(6), random(6, 6), random(6, 6, seed=1), MASK)
    for old, new in zip(before, (scores, rewards, values, mask), strict=True):
        torch.testing.assert_close(new, old, **IDENTICAL)


@pytest.mark.parametrize("wrong", ["rewards", "values", "mask"])
def test_advantages_refuse_other_shapes(wrong):
    arguments = {
        "rewards": torch.zeros(4, 3),
        "values": torch.zeros(4, 3),
        "mask": torch.ones(4, 3, dtype=torch.bool),
    }
    arguments[wrong] = arguments[wrong][:, :1]
    with pytest.raises(ValueError, match=rf"but found .*{wrong} \[4, 1\]"):
        generalized_advantages(**arguments)


def test_a_float_mask_is_refused():
    with pytest.raises(ValueError, match="mask has the dtype"):
        shaped_rewards(random(6), random(6, 6), MASK.float(), kl_coef=0.3)
    with pytest.raises(ValueError, match="mask has the dtype"):
        generalized_advantages(random(6, 6), random(6, 6), MASK.float())


@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_discount_outside_zero_and_one_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, but it must lie between 0 and 1"):
        generalized_advantages(random(6, 6), random(6, 6), MASK, **{name: value})


def _two_groups():
    rewards = torch.tensor(
        [[0.0, 1.0, 9.0], [3.0, 9.0, 9.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=False
    )
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]], dtype=torch.bool)
    return rewards, mask


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others():
    """Totals 1 and 3, then 1 and 1."""
    advantages = leave_one_out_advantages(*_two_groups(), group_size=2)
    expected = [[-2, -2, 0], [2, 0, 0], [0, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64))


def test_group_normalized_advantages_are_standard_deviations_of_the_group():
    advantages = group_normalized_advantages(*_two_groups(), group_size=2, epsilon=0.0)[:2]
    half = 0.5**0.5
    torch.testing.assert_close(advantages, torch.tensor([[-half, -half, 0], [half, 0, 0]], dtype=torch.float64))
    equal = group_normalized_advantages(*_two_groups(), group_size=2)[2:]
    assert equal.abs().max() == 0


@pytest.mark.parametrize("function", [leave_one_out_advantages, group_normalized_advantages])
def test_advantages_of_a_group_do_not_change_with_what_all_get_and_sum_to_0(function):
    rewards, mask = torch.randn(6, 4, dtype=torch.float64), torch.ones(6, 4, dtype=torch.bool)
    advantages = function(rewards, mask, group_size=3)
    torch.testing.assert_close(advantages, function(rewards + 5, mask, group_size=3))
    assert advantages[:, 0].view(2, 3).sum(dim=1).abs().max() < 1e-12


@pytest.mark.parametrize("function", [leave_one_out_advantages, group_normalized_advantages])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 5, 6, 7])
def test_equal_rewards_have_no_advantage_at_any_size(function, dtype, size):
    """Three times 1000.1 in float32 less their own mean, over their own standard deviation, was 0.349."""
    for value in (0.1, -7.3, 1000.1, 33333.3, 1e-30, 3e30):
        rewards = torch.full((2 * size, 1), value, dtype=dtype)
        rewards[size:] *= -1  # a second group
        advantages = function(rewards, torch.ones_like(rewards, dtype=torch.bool), group_size=size)
        assert advantages.abs().max() == 0, value


@pytest.mark.parametrize("function", [leave_one_out_advantages, group_normalized_advantages])
@pytest.mark.parametrize("size", [1, 3])
def test_a_group_that_does_not_come_out_even_is_refused(function, size):
    with pytest.raises(ValueError, match="group_size"):
        function(*_two_groups(), group_size=size)


def test_returns_to_go_are_sums_from_a_token_on():
    rewards, mask = _two_groups()
    expected = torch.tensor([[1.0, 1.0, 0], [3.0, 0, 0], [1.0, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(returns_to_go(rewards, mask), expected)


def test_explained_variance_is_1_for_the_returns_0_for_their_mean_and_below_for_worse():
    returns, mask = torch.tensor([[1.0, 2.0, 99.0], [4.0, 5.0, 99.0]]), torch.tensor([[True, True, False]] * 2)
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full_like(returns, 3.0), returns, mask) == 0
    assert explained_variance(-returns, returns, mask) < -1


def test_the_variance_of_equal_returns_is_not_explained():
    for value in (0.1, 1000.1, 33333.3):
        returns = torch.full((3, 5), value)
        mask = torch.ones(3, 5, dtype=torch.bool)
        for values in (returns, returns - 1):
            assert explained_variance(values, returns, mask).isnan()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_normalized_advantages_equal_their_definition_under_every_scale(scale):
    rewards, mask = random(6, 6), MASK
    totals = [[sum(rewards[3 * g + i, t].item() for t in inside(3 * g + i)) for i in range(3)] for g in range(2)]
    advantages = group_normalized_advantages(rewards, mask, group_size=3, epsilon=0.1, scale_rewards=scale)

    def deviation(numbers):
        mean = sum(numbers) / len(numbers)
        return (sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1)) ** 0.5

    for g in range(2):
        for i in range(3):
            by = {"group": deviation(totals[g]) + 0.1, "batch": deviation(totals[0] + totals[1]) + 0.1, "none": 1.0}
            expected = (totals[g][i] - sum(totals[g]) / 3) / by[scale]
            for t in range(6):
                found = advantages[3 * g + i, t].item()
                assert found == pytest.approx(expected if mask[3 * g + i, t] else 0, abs=1e-12)


def test_the_batch_is_that_of_all_processes_and_another_scale_is_refused():
    rewards, mask = random(6, 6), MASK

    def two(x):  # another process with the same rewards
        return 2 * x

    one, both = (
        group_normalized_advantages(rewards, mask, group_size=3, epsilon=0.0, scale_rewards="batch", sum_over=each)
        for each in (lambda x: x, two)
    )
    torch.testing.assert_close((both / one)[mask], torch.full_like(one[mask], (11 / 10) ** 0.5), **EXACT)
    with pytest.raises(ValueError, match="scale_rewards is 'std'"):
        group_normalized_advantages(rewards, mask, group_size=3, scale_rewards="std")


def test_groups_that_differ_and_the_share_of_overlong_responses():
    scores = torch.tensor([1.0, 1.0, 2.0, 2.5, 0.1, 0.1])
    assert groups_that_differ(scores, group_size=2).tolist() == [False, False, True, True, False, False]
    with pytest.raises(ValueError, match="group_size is 4"):
        groups_that_differ(scores, group_size=4)
    shares = overlong_share(torch.tensor([1, 6, 7, 8, 10]), max_new_tokens=10, buffer=4)
    assert shares.tolist() == [0.0, 0.0, 0.25, 0.5, 1.0]
    with pytest.raises(ValueError, match="buffer is 0"):
        overlong_share(torch.tensor([1]), max_new_tokens=10, buffer=0)
