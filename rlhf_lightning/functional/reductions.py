"""Means over a mask, and the position of the last token.

B sequences, T padded tokens. A mask is bool (or 0 and 1), True = counts. What stands outside the mask, NaN
and inf included, reaches neither the values nor the gradients: it is cut out by `torch.where`, since 0 * NaN
is NaN.
"""

import torch
from torch import Tensor

from rlhf_lightning.functional.shapes import as_mask, at_least_float32, check_layout, check_not_empty, check_same_shape


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` over the True positions of `mask`, over all dimensions or over `dim`; float32.

    ValueError: shapes differ, float mask, no True in a place that is averaged (on an accelerator: NaN there).
    """
    check_same_shape(x=x, mask=mask)
    mask = as_mask(mask)
    count = mask.sum(dim)
    check_not_empty(count)
    return torch.where(mask, at_least_float32(x), 0).sum(dim) / count


def centered(x: Tensor, mask: Tensor) -> Tensor:
    """`x` less its mean over the mask; 0 outside of it, and exactly 0 inside where all values are equal. float32.

    ValueError: as `masked_mean`.
    """
    check_same_shape(x=x, mask=mask)
    mask = as_mask(mask)
    differences = _from_first(at_least_float32(x), mask)
    return torch.where(mask, differences - masked_mean(differences, mask), 0)


def _from_first(x: Tensor, mask: Tensor) -> Tensor:
    """`x` less its first value inside the mask: the mean of equal differences has no rounding, that of values may."""
    first = x.flatten()[mask.flatten().int().argmax()]
    return torch.where(mask, x - first, 0)


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """`x` with variance 1 over the mask, and mean 0 unless `shift_mean` is off; 0 outside the mask.

    (x - mean) * rsqrt(variance + 1e-8) with the population variance, float32, same shape as `x`. Equal values become
    exactly 0 (their mean, where it is kept).
    ValueError: as `masked_mean`. Ziegler et al. 2019 (github.com/openai/lm-human-preferences, `whiten`).
    """
    differences = centered(x, mask)
    whitened = differences * torch.rsqrt(masked_mean(differences.square(), mask) + 1e-8)
    return whitened if shift_mean else torch.where(as_mask(mask), whitened + masked_mean(x, mask), 0)


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
