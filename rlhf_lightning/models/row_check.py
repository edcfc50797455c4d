"""Measured when a model is loaded: the numbers of a row are its own, whatever pads it or stands beside it.

Many a model breaks this: it counts positions in its own way, has no mask, draws random numbers, or mixes neighbours. A
list of families would never be whole, so each model is asked, on a few tokens. R rows, T padded tokens, H hidden size.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_lightning.batches import Layout
from rlhf_lightning.errors import ModelError, reason_of
from rlhf_lightning.models.configuration import declared_first_position, max_positions
from rlhf_lightning.models.packed_attention import check_windows, use_layout
from rlhf_lightning.models.precision import exact_products
from rlhf_lightning.models.states import first_positions, forget_longest_row, row_states

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

_checked: dict[tuple[str, str, Layout], tuple[int | None, Layout]] = {}
"""The position of a row's first token and the layout that were found, by configuration, attention and wanted layout."""
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

    def error(self, states: Tensor, alone: Sequence[Tensor]) -> float:
        """Largest difference of a token's state in the batch [4, T, H] to that in the row alone, as a share."""
        found = [states[place][self.mask[place]] for place in range(4)]
        return max(difference(state, alone[place // 2]) for place, state in enumerate(found))

    def with_common_beginnings(self) -> Probe:
        """The same rows, of which the second begins like the first for half of its tokens."""
        first, second = self.rows
        begin = len(second) // 2
        second = torch.cat([first[:begin], second[begin:]])
        ids = self.ids.clone()
        for place in (2, 3):
            ids[place][self.mask[place]] = second
        return Probe((first, second), ids, self.mask)


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
    if computes_in_half(model):
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


def computes_in_half(model: PreTrainedModel) -> bool:
    """Whether the weights are quantized ones that are multiplied in 16 bits, as QLoRA's are on a GPU."""
    settings = getattr(model.config, "quantization_config", None)
    return getattr(settings, "bnb_4bit_compute_dtype", torch.float32) in (torch.bfloat16, torch.float16)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Inside, float32 products are float32's, without gradients."""
    with exact_products(), torch.no_grad():
        yield


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


def check_rows(backbone: PreTrainedModel, name: str, layout: Layout = "padded", *, flex: bool = False) -> None:
    """Find out how a backbone counts positions, and refuse one whose numbers for a row are not the row's own.

    A row alone, as transformers itself computes it, is compared with the row padded on either side beside another one
    (in train mode, as it will be trained). In the same way the `layout` is tried: one that is named must give a row's
    own numbers, `auto` becomes the first of shared and packed that does, else padded. With `flex` FlexAttention
    computes rows that are not padded. Once for each configuration in a process. Raises `ModelError`.
    """
    config = backbone.config
    key = (config.to_json_string(use_diff=False), f"{config._attn_implementation} {flex}", layout)
    if key not in _checked:
        training = backbone.training
        check_attention_type(config, name)
        try:
            _checked[key] = _measured_rows(backbone, name, layout, flex)
        except ModelError:
            raise
        except Exception as error:  # an architecture that wants other input or lengths may raise anything
            kind = config.model_type
            raise ModelError(
                f"{name}: a {kind} model that does not run on rows of tokens ({reason_of(error)})"
            ) from error
        finally:
            backbone.train(training)
    first_positions[backbone], found = _checked[key]
    use_layout(backbone, found, flex=flex)
    if layout == "auto":
        log.debug("%s: rows are %s", name, found)


def _measured_rows(backbone: PreTrainedModel, name: str, layout: Layout, flex: bool) -> tuple[int | None, Layout]:
    """The position of a row's first token, and the layout in which rows have their own numbers. Raises `ModelError`."""
    config = backbone.config
    probe = probe_of(config, positions=max_positions(config.get_text_config()), device=backbone.device)
    with exact_arithmetic():
        backbone.eval()
        alone = [_alone(backbone, row) for row in probe.rows]
        noise = rounding(backbone, lambda: _alone(backbone, probe.rows[0]), alone[0])
        error = _find_first_position(backbone.train(), probe, alone, noise)
        if not error <= noise:
            raise ModelError(
                f"{name}: the numbers of a {config.model_type} model for a row of tokens change with padding and the "
                f"rows beside it, or from pass to pass (by {error:.2g} of their size); use another model"
            )
        first = first_positions[backbone]
        before = config._attn_implementation
        tried: tuple[Layout, ...] = ("shared", "packed") if layout == "auto" else (layout,)
        for way in tried:
            if way == "padded":
                continue
            try:
                use_layout(backbone, way, flex=flex)
                _check_packing(backbone, name, probe, way, noise)
                return first, way
            except ModelError:
                if layout != "auto":
                    raise
            finally:
                backbone.set_attn_implementation(before)
    return first, "padded"


def _check_packing(backbone: PreTrainedModel, name: str, probe: Probe, layout: Layout, noise: float) -> None:
    """Refuse a backbone whose rows are not the same in this layout as alone. Raises `ModelError`."""
    kind = backbone.config.model_type
    try:
        check_windows(backbone, name, lambda: row_states(backbone, probe.ids[:1], probe.mask[:1], layout=layout))
        probe = probe.with_common_beginnings() if layout == "shared" else probe
        alone = [_alone(backbone.eval(), row) for row in probe.rows]
        backbone.train()
        states = row_states(backbone, probe.ids, probe.mask, layout=layout).padded(probe.mask)[0]
        mixture = probe.error(states, alone)
    except ModelError:
        raise
    except Exception as error:  # transformers refuses some, each in its own way
        raise ModelError(
            f"{name}: the rows of a {kind} model cannot be {layout} ({reason_of(error)}); use model.layout: padded"
        ) from error
    if not mixture <= noise:
        raise ModelError(
            f"{name}: the rows of a {kind} model have other numbers {layout} than alone (by {mixture:.2g} of their "
            f"size); use model.layout: {'packed' if layout == 'shared' else 'padded'}"
        )


def check_attention_type(config: PretrainedConfig, name: str) -> None:
    """Refuse attention that is another one from some length on, longer than a row that could be tried at load.

    BigBird's blocks stay full attention once a short batch has come; Reformer's buckets are as many as the first long
    batch wants. Raises `ModelError`.
    """
    sparse = getattr(config, "attention_type", None) == "block_sparse"
    if sparse or "lsh" in getattr(config, "attn_layers", ()):
        way = "write attention_type original_full into its config.json, or use another model"
        raise ModelError(
            f"{name}: the numbers of a {config.model_type} model with {'block-sparse' if sparse else 'LSH'} attention "
            "change with the longest row of a batch and with the batches before it; "
            f"{way if sparse else 'use another model'}"
        )


def _alone(backbone: PreTrainedModel, row: Tensor) -> Tensor:
    """States [T, H] of a row of ids [T], with neither mask nor positions."""
    forget_longest_row(backbone)
    return backbone(input_ids=row[None]).last_hidden_state[0]


def _find_first_position(backbone: PreTrainedModel, probe: Probe, alone: Sequence[Tensor], noise: float) -> float:
    """Set the position of a row's first token so that padding changes nothing. Returns the error that is left."""
    ways: list[int | None] = [None]
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        ways = [*dict.fromkeys((declared_first_position(backbone), 0, 2)), None]  # 2: YOSO, MRA, Nystromformer
    errors: dict[int | None, float] = {}
    for way in ways:
        first_positions[backbone] = way
        (states,) = row_states(backbone, probe.ids, probe.mask, layout="padded").layers
        errors[way] = probe.error(states, alone)
        if errors[way] <= noise:
            return errors[way]
    first_positions[backbone] = min(errors, key=errors.__getitem__)
    return min(errors.values())
