"""Means over a mask, and the position of the last token.

B sequences, T padded tokens. A mask is bool (or 0 and 1), True = counts. What stands outside the mask, NaN
and inf included, reaches neither the values nor the gradients: it is cut out by `torch.where`, since 0 * NaN
is NaN.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lightning.functional.shapes import as_mask, at_least_float32, check_layout, check_not_empty, check_same_shape

SumOver = Callable[[Tensor], Tensor]
"""Adds up a tensor over all processes."""


def within_process(x: Tensor) -> Tensor:
    """The sum over one process."""
    return x


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` over the True positions of `mask`, over all dimensions or over `dim`; float32.

    ValueError: shapes differ, float mask, no True in a place that is averaged (on an accelerator: NaN there).
    """
    check_same_shape(x=x, mask=mask)
    mask = as_mask(mask)
    count = mask.sum(dim)
    check_not_empty(count)
    return torch.where(mask, at_least_float32(x), 0).sum(dim) / count


def centered(x: Tensor, mask: Tensor, *, sum_over: SumOver = within_process) -> tuple[Tensor, Tensor]:
    """`x` less its mean over the mask, float64 and 0 outside of it; and how many values that is, [] float64.

    `sum_over` adds up a tensor over all processes. Equal values become exactly 0.
    ValueError: as `masked_mean`.
    """
    check_same_shape(x=x, mask=mask)
    mask = as_mask(mask)
    count = sum_over(mask.sum().double())
    check_not_empty(count)
    # Less a value that is among them, since the mean of equal differences has no rounding, that of values may.
    first, any_here = x.flatten()[mask.flatten().int().argmax()].double(), mask.any()
    shift = sum_over(torch.where(any_here, first, 0)) / sum_over(any_here.double())
    differences = torch.where(mask, x.double() - shift, 0)
    return torch.where(mask, differences - sum_over(differences.sum()) / count, 0), count


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, sum_over: SumOver = within_process) -> Tensor:
    """`x` with variance 1 over the mask, and mean 0 unless `shift_mean` is off; 0 outside the mask.

    (x - mean) * rsqrt(variance + 1e-8) with the population variance, at least float32, same shape as `x`. Equal values
    become exactly 0 (their mean, where it is kept). With `sum_over`, which adds up a tensor over all processes,
    mean and variance are those of all processes.
    ValueError: as `masked_mean`. Ziegler et al. 2019 (github.com/openai/lm-human-preferences, `whiten`).
    """
    differences, count = centered(x, mask, sum_over=sum_over)
    whitened = differences * torch.rsqrt(sum_over(differences.square().sum()) / count + 1e-8)
    if not shift_mean:
        mask = as_mask(mask)
        mean = sum_over(torch.where(mask, x, 0).double().sum()) / count
        whitened = torch.where(mask, whitened + mean, 0)
    return whitened.to(at_least_float32(x).dtype)


def scatter_to_mask(flat: Tensor, mask: Tensor) -> Tensor:
    """Numbers of N tokens, [N], row by row at the N True positions of `mask` [R, S]; 0 elsewhere.

    Neither it nor its backward pass asks an accelerator for a number, as that of `masked_scatter` does.
    """
    within = mask.flatten()
    numbers = torch.cat([flat, flat.new_zeros(1)])  # the last one stands outside of the mask
    places = torch.where(within, within.cumsum(0) - 1, len(flat))
    return numbers.index_select(0, places).view(mask.shape)


class RunningMoments:
    """Mean and standard deviation of all values so far, as batches of them come.

    Chan et al. 1979: parallel update of mean and sum of squares.
    """

    def __init__(self) -> None:
        self.count = self.mean = self.squares = 0.0

    def update(self, count: float, mean: float, squares: float) -> None:
        """Add `count` values with their mean and their sum of squared differences from it."""
        total = self.count + count
        difference = mean - self.mean
        self.squares += squares + difference**2 * self.count * count / total
        self.mean += difference * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation; 1 while it is 0."""
        return (self.squares / self.count) ** 0.5 if self.count and self.squares > 0 else 1.0

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


def last_token_index(mask: Tensor) -> Tensor:
    """Index of the last True of each row, [B] int64, for padding on any side and gaps.

    ValueError: mask not [B, T], float mask, a row without any True (on an accelerator: T, out of range, so
    that the gather that follows refuses it).
    """
    check_layout(mask=(mask, "B T"))
    mask = as_mask(mask)
    check_not_empty(mask.sum(dim=1))
    length = mask.shape[1]
    last = length - 1 - mask.flip(1).int().argmax(dim=1)
    return torch.where(mask.any(dim=1), last, length)
