"""Masked means, whitening and the last token, against plain Python loops; in float64 unless said."""

import itertools
import math

import pytest
import torch

from rlhf_lightning.functional import last_token_index, masked_mean, masked_whiten

EXACT = {"rtol": 0, "atol": 1e-12}
GARBAGE = [math.nan, math.inf, -math.inf]
MASK = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 0], [0, 0, 0, 1, 0]], dtype=torch.bool)


def example() -> torch.Tensor:
    return torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def with_garbage(x: torch.Tensor, value: float) -> torch.Tensor:
    return torch.where(MASK, x, value)


# ---- masked_mean -------------------------------------------------------------------------------------------


def test_the_mean_counts_the_entries_inside_the_mask_alone():
    x = torch.tensor([[1.0, 2.0, 30.0], [4.0, 50.0, 60.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(x, mask).item() == pytest.approx(7 / 3, abs=1e-6)
    torch.testing.assert_close(masked_mean(x, mask, dim=1), torch.tensor([1.5, 4.0]))
    torch.testing.assert_close(masked_mean(x[:, :1], mask[:, :1], dim=0), torch.tensor([2.5]))


def test_the_mean_equals_a_loop():
    x = example()
    entries = [x[row, column].item() for row in range(3) for column in range(5) if MASK[row, column]]
    torch.testing.assert_close(masked_mean(x, MASK).item(), sum(entries) / len(entries), **EXACT)
    for row in range(3):
        entries = [x[row, column].item() for column in range(5) if MASK[row, column]]
        mean = masked_mean(x, MASK, dim=-1)[row].item()
        assert mean == pytest.approx(sum(entries) / len(entries), abs=1e-12)


def test_the_gradient_of_the_mean_is_one_over_the_count_inside_the_mask():
    x = example().requires_grad_()
    masked_mean(x, MASK).backward()
    torch.testing.assert_close(x.grad, MASK / 8.0, check_dtype=False, **EXACT)


@pytest.mark.parametrize("function", [masked_mean, masked_whiten])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_stands_outside_the_mask_reaches_neither_value_nor_gradient(function, garbage):
    clean, dirty = example().requires_grad_(), with_garbage(example(), garbage).requires_grad_()
    results = [function(x, MASK) for x in (clean, dirty)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    for result in results:
        result.square().sum().backward()
    torch.testing.assert_close(clean.grad, dirty.grad, rtol=0, atol=0)
    assert (dirty.grad[~MASK] == 0).all()


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_a_mean_over_nothing_is_refused(dim):
    mask = torch.zeros(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="no True"):
        masked_mean(torch.ones(2, 2), mask, dim=dim)


def test_the_refusal_names_the_empty_row():
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match=r"row\(s\) \[1\]"):
        masked_mean(torch.ones(2, 2), mask, dim=1)
    assert masked_mean(torch.ones(2, 2), mask).item() == 1


# ---- masked_whiten -----------------------------------------------------------------------------------------


def test_whitening_divides_by_the_population_deviation():
    x = torch.tensor([[1.0, 3.0, 5.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    deviation = math.sqrt((4 + 0 + 4) / 3 + 1e-8)
    expected = torch.tensor([[-2 / deviation, 0, 2 / deviation, 0]], dtype=torch.float64)
    torch.testing.assert_close(masked_whiten(x, mask), expected, **EXACT)


def test_whitening_without_a_shift_keeps_the_mean_inside_and_zero_outside_the_mask():
    x = torch.tensor([[1.0, 3.0, 5.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    deviation = math.sqrt(8 / 3 + 1e-8)
    expected = torch.tensor([[3 - 2 / deviation, 3, 3 + 2 / deviation, 0]], dtype=torch.float64)
    torch.testing.assert_close(masked_whiten(x, mask, shift_mean=False), expected, **EXACT)


def test_whitened_values_have_mean_zero_and_variance_one_over_the_whole_mask():
    whitened = masked_whiten(1000 * example() + 7, MASK)[MASK]
    assert whitened.mean().item() == pytest.approx(0, abs=1e-12)
    assert whitened.var(correction=0).item() == pytest.approx(1, abs=1e-12)


def test_the_epsilon_under_the_root_is_1e_8():
    x = torch.tensor([[-1e-4, 1e-4]], dtype=torch.float64)  # variance 1e-8, as large as the epsilon
    expected = torch.tensor([[-math.sqrt(0.5), math.sqrt(0.5)]], dtype=torch.float64)
    torch.testing.assert_close(masked_whiten(x, torch.ones(1, 2, dtype=torch.bool)), expected, **EXACT)


def test_equal_values_whiten_to_zero():
    assert (masked_whiten(torch.full((2, 3), 5.0), torch.ones(2, 3, dtype=torch.bool)) == 0).all()


def test_float32_whitening_survives_a_large_common_offset():
    whitened = masked_whiten((example() + 1e4).float(), MASK)
    # float32 holds 1e4 + x to 5e-4; E[x^2] - E[x]^2 would be off by 8 in the variance.
    torch.testing.assert_close(whitened, masked_whiten(example(), MASK).float(), rtol=0, atol=2e-3)


# ---- both --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [masked_mean, masked_whiten])
class TestMaskedReductions:
    def test_gradcheck(self, function):
        assert torch.autograd.gradcheck(lambda x: function(x, MASK), example().requires_grad_())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, function, dtype):
        x = example().to(dtype)
        torch.testing.assert_close(function(x, MASK), function(x.float(), MASK), rtol=0, atol=0)

    def test_float64_stays_float64(self, function):
        assert function(example(), MASK).dtype == torch.float64

    def test_a_mask_of_zeros_and_ones_is_taken(self, function):
        torch.testing.assert_close(function(example(), MASK.long()), function(example(), MASK))

    def test_a_float_mask_is_refused(self, function):
        with pytest.raises(ValueError, match=r"mask has the dtype torch\.float32"):
            function(example(), MASK.float())

    def test_a_mask_of_another_shape_is_refused(self, function):
        with pytest.raises(ValueError, match=r"mask has the shape \[3, 1\] but x has \[3, 5\]"):
            function(example(), MASK[:, :1])

    def test_the_input_is_left_alone(self, function):
        x = example()
        function(x, MASK)
        torch.testing.assert_close(x, example(), rtol=0, atol=0)


def test_whitening_over_an_empty_mask_is_refused():
    with pytest.raises(ValueError, match="no True"):
        masked_whiten(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool))


# ---- last_token_index --------------------------------------------------------------------------------------


def test_the_last_token_is_the_last_true_of_every_mask_of_six():
    rows = [row for row in itertools.product([False, True], repeat=6) if any(row)]
    expected = [max(position for position, inside in enumerate(row) if inside) for row in rows]
    for mask in (torch.tensor(rows), torch.tensor(rows).long()):
        index = last_token_index(mask)
        assert index.dtype == torch.int64
        assert index.tolist() == expected


def test_a_row_without_a_token_has_no_last_one():
    with pytest.raises(ValueError, match=r"no True in row\(s\) \[1\]"):
        last_token_index(torch.tensor([[True, False], [False, False]]))


@pytest.mark.parametrize(
    ("mask", "message"),
    [(torch.ones(4, dtype=torch.bool), r"mask \[B, T\].*found mask \[4\]"), (torch.ones(2, 2), "dtype")],
)
def test_a_mask_that_is_not_two_dimensional_or_not_boolean_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        last_token_index(mask)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_empty_row_on_a_gpu_gives_nan_or_an_index_out_of_range():
    mask = torch.tensor([[True, False], [False, False]], device="cuda")
    assert masked_mean(torch.ones(2, 2, device="cuda"), mask, dim=1).isnan().tolist() == [False, True]
    assert last_token_index(mask).tolist() == [0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 3, 7, 36, 1000])
def test_equal_values_are_whitened_to_exactly_0(dtype, count):
    for value in (0.1, -7.3, 1000.1, 33333.3):
        x = torch.full((count, 2), value, dtype=dtype)
        x[0, 1] = math.nan
        mask = ~x.isnan()
        assert masked_whiten(x, mask).abs().max() == 0
        torch.testing.assert_close(masked_whiten(x, mask, shift_mean=False)[mask], x[mask])
