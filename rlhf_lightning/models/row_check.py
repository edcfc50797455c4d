"""Measured when a model is loaded: the numbers of a row are its own, whatever pads it or stands beside it.

Many a model breaks this: it counts positions in its own way, has no mask, draws random numbers, or mixes neighbours. A
list of families would never be whole, so each model is asked, on a few tokens. R rows, T padded tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LENGTHS = (11, 7)
"""Tokens of the rows of a probe, unless a window of the model is longer and yet short."""
_SHORT_WINDOW = 48
"""Longest window that a probe reaches beyond; longer ones cost seconds, and are built alike."""
_SMALLEST, _LARGEST = 1e-5, 1e-2
"""Between these lies what passes for rounding, as a share of a row's states."""
_SUSPICIOUS = 5e-5
"""Change by a nudge from which on it is looked whether the same comes out without one."""
_HALF = 5e-2
"""The same where quantized weights are multiplied in 16 bits."""
_NUDGE = 2.0**-20
"""Relative change of the embeddings, 8 units in the last place of float32, by which rounding is judged."""
_ROUNDINGS = 10


class Probe(NamedTuple):
    """Two rows of tokens: each alone, and in one batch with padding on either side."""

    rows: tuple[Tensor, Tensor]
    """[T_i] int64, ordinary tokens: none that a configuration names."""
    ids: Tensor
    """[4, T] int64: the first row padded on the right and on the left, then the second."""
    mask: Tensor
    """[4, T] bool, True on tokens."""

    def error(self, states: Tensor, alone: tuple[Tensor, Tensor]) -> float:
        """Largest difference of a token's state in the batch [4, T, H] to that in the row alone, as a share."""
        found = [states[place][self.mask[place]] for place in range(4)]
        return max(difference(state, alone[place // 2]) for place, state in enumerate(found))


def probe_of(config: PretrainedConfig, *, positions: int | None, device: torch.device) -> Probe:
    """Rows longer than a short window of the model, and within its positions."""
    config = config.get_text_config()
    windows = [size for size in _windows(config) if size <= _SHORT_WINDOW]
    longest = min(max(_LENGTHS[0], 2 * max(windows, default=0) + 3), positions or 10**6)
    lengths = (longest, max(longest * _LENGTHS[1] // _LENGTHS[0], 1))
    named = {value for key, value in _numbers(config) if key.endswith("token_id")}
    known = min(getattr(config, "vocab_size", None) or 1000, 1000)  # CANINE reads characters, any number of them
    ordinary = torch.tensor([token for token in range(known) if token not in named], device="cpu")
    draw = torch.Generator("cpu").manual_seed(0)  # said, since a model is loaded with its device as the default
    rows = [ordinary[torch.randint(len(ordinary), (n,), generator=draw, device="cpu")].to(device) for n in lengths]
    width = min(longest + 2, positions or 10**6)
    padding = getattr(config, "pad_token_id", None)
    ids = torch.full((4, width), int(ordinary[0]) if padding is None else padding, device=device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for place in range(4):
        row = rows[place // 2]
        begin = place % 2 * (width - len(row))
        ids[place, begin : begin + len(row)] = row
        mask[place, begin : begin + len(row)] = True
    return Probe((rows[0], rows[1]), ids, mask)


def difference(found: Tensor, alone: Tensor) -> float:
    """Largest distance of two states of a token, both [T, H], as a share of the states' root-mean-square size."""
    found, alone = found.double(), alone.double()
    size = alone.square().sum(dim=-1).mean().sqrt()
    return ((found - alone).square().sum(dim=-1).max().sqrt() / size).item()


def rounding(model: PreTrainedModel, states: Callable[[], Tensor], alone: Tensor) -> float:
    """The share of a row's states that rounding may account for.

    Rounding grows on its way through a model, in some a hundredfold: where one number of the residual stream is 20,000
    and the others are 1. How much is measured by what a change of the embeddings in their last places does to the
    `states` [T, H] of the row, which are `alone` without it: a few times that is rounding, and no position, window or
    neighbour does so little.
    """
    draw = torch.Generator("cpu").manual_seed(0)
    if _computes_in_half(model):
        return _HALF

    def nudge(_: nn.Module, __: object, embedded: object) -> Tensor | None:
        if not isinstance(embedded, Tensor):  # I-BERT's come with a scale
            return None
        signs = torch.randn(embedded.shape, generator=draw, device="cpu").sign().to(embedded)
        return embedded * (1 + _NUDGE * signs)

    hook = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        change = difference(states(), alone)
    finally:
        hook.remove()
    if change > _SUSPICIOUS and difference(states(), alone) > _SMALLEST:  # it differs from pass to pass in any case
        return _SMALLEST
    return min(max(_SMALLEST, _ROUNDINGS * change), _LARGEST)


def _computes_in_half(model: PreTrainedModel) -> bool:
    """Whether the weights are quantized ones that are multiplied in 16 bits, as QLoRA's are on a GPU."""
    settings = getattr(model.config, "quantization_config", None)
    return getattr(settings, "bnb_4bit_compute_dtype", torch.float32) in (torch.bfloat16, torch.float16)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Inside, float32 products are float32's, without gradients."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _windows(config: PretrainedConfig) -> list[int]:
    """Sizes of windows and chunks, and lengths at which a model changes, as its configuration has them."""
    parts = ("window", "chunk", "local_attention", "block_size", "original_max_position")
    return [value for key, value in _numbers(config) if value > 0 and any(part in key for part in parts)]


def _numbers(config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    """Integers of a configuration by their keys, those in lists and dictionaries too."""
    left = list(vars(config).items())
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += [(str(inner), part) for inner, part in value.items()]
        elif isinstance(value, list | tuple):
            left += [(key, part) for part in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value
