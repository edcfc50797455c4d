"""What the public functions do at their door: refuse wrong shapes and values, and go to float32.

Every refusal is worded here and is a ValueError: which argument, what was found, what was expected, what to
do. Shapes and dtypes are read on the host and cost nothing. A check that must look at the *values* of a
tensor is made on the CPU only: on an accelerator it would make the host wait for the device in every call of
the hot path. What the function returns there instead of refusing (NaN, or an index out of range) stands in
its docstring.
"""

import math

import torch
from torch import Tensor


def check_same_shape(**tensors: Tensor) -> None:
    """Refuse tensors that would only fit by broadcasting: [4, 1] against [4] becomes [4, 4] in silence."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != reference.shape:
            raise ValueError(
                f"{name} has the shape {list(tensor.shape)} but {first} has {list(reference.shape)}: "
                "both must have the same shape, nothing is broadcast; squeeze, index or expand one of them"
            )


def check_layout(**tensors: tuple[Tensor, str]) -> None:
    """Refuse tensors that do not have the dimensions named by their layout, as in `mask=(mask, "B T")`.

    A letter stands for the same size in every tensor of the call.
    """
    sizes: dict[str, int] = {}
    for tensor, layout in tensors.values():
        letters = layout.split()
        pairs = zip(letters, tensor.shape, strict=False)
        if tensor.dim() != len(letters) or any(sizes.setdefault(letter, size) != size for letter, size in pairs):
            expected = ", ".join(f"{name} [{each.replace(' ', ', ')}]" for name, (_, each) in tensors.items())
            found = ", ".join(f"{name} {list(each.shape)}" for name, (each, _) in tensors.items())
            raise ValueError(
                f"expected the shapes {expected}, one size per letter, but found {found}: "
                "reshape or index the argument that differs"
            )


def as_mask(mask: Tensor) -> Tensor:
    """The mask as bool. Integers 0 and 1 are taken, floats refused: they may be weights or additive masks."""
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"mask has the dtype {mask.dtype}: pass a bool mask, True = counts (or integers 0 and 1)")
    return mask.bool()


def check_token_ids(targets: Tensor) -> None:
    if targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
        raise ValueError(f"targets has the dtype {targets.dtype}: pass token ids, int64, from 0 to V - 1")


def check_not_empty(count: Tensor) -> None:
    """Refuse a mask without any True where something is taken over its entries. CPU only, see above."""
    if count.device.type == "cpu" and bool((count == 0).any()):
        where = f" in row(s) {(count.flatten() == 0).nonzero().flatten().tolist()[:8]}" if count.dim() else ""
        raise ValueError(f"mask has no True{where}, so nothing is there to take: drop such rows before the call")


def check_log_probabilities(**tensors: Tensor) -> None:
    """Refuse logarithms of probabilities above 1. CPU only, see above."""
    for name, tensor in tensors.items():
        if tensor.device.type == "cpu" and bool((tensor > 0).any()):
            raise ValueError(
                f"{name} holds {float(tensor.max()):g}, but a log-probability is at most 0: "
                "pass the average log-prob of each response, not a score or a negative log-likelihood"
            )


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}, but it must be a finite number above 0")


def check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}, but it must be a finite number, 0 or above")


def check_fraction(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, but it must lie between 0 and 1")


def check_label_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, but it must be at least 0 and below 0.5: "
            "it is the share of labels believed to be flipped, and half of them flipped leaves no preference"
        )


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision and integers become float32, float64 stays. Half-precision sums cost 0.1 to 0.6 nats."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
