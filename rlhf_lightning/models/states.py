"""Hidden states of rows of tokens, in whatever layout a backbone computes them, at the positions of the rows alone.

R rows, T tokens, U tokens that are computed, H hidden size.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lightning.batches import Layout
from rlhf_lightning.functional.reductions import last_token_index
from rlhf_lightning.functional.shapes import at_least_float32
from rlhf_lightning.models.configuration import declared_first_position, rope_limits
from rlhf_lightning.models.layouts import plan_rows
from rlhf_lightning.models.packed_attention import layout_of, packed_states, runs_packed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

first_positions: weakref.WeakKeyDictionary[nn.Module, int | None] = weakref.WeakKeyDictionary()
"""The position of a row's first token, by backbone; None where the backbone is given no positions."""


class RowStates(NamedTuple):
    """Hidden states of the tokens of R rows, of one layer or of several."""

    layers: tuple[Tensor, ...]
    """[R, T, H] each, or of the U tokens that were computed, [U, H]."""
    place: Tensor | None = None
    """[R, T] int64: which of the U tokens is meant; None where the states are those of all rows and tokens."""

    def at(self, wanted: Tensor) -> Tensor:
        """Last states of N tokens, [N, H]: those at the places `wanted` [N] int64 in [R * T]."""
        states = self.layers[-1].flatten(0, -2)
        return states.index_select(0, wanted if self.place is None else self.place.flatten()[wanted])

    def padded(self, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Of each layer [R, T, H], 0 at padding where there is none to be computed."""
        if self.place is None:
            return self.layers
        size, mask = (*self.place.shape, self.layers[0].shape[-1]), attention_mask[..., None]
        states = (layer.index_select(0, self.place.flatten()).view(size) for layer in self.layers)
        return tuple(torch.where(mask, state, 0) for state in states)


def hidden_states(backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden state of each token, [R, T, H].

    `input_ids` [R, T] int64; `attention_mask` [R, T] bool, True on tokens. Positions are counted over the mask, so that
    padding on either side changes nothing.
    """
    (last,) = row_states(backbone, input_ids, attention_mask).padded(attention_mask)
    return last


def token_states(backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor) -> Tensor:
    """Last hidden state of N tokens, [N, H]: those at the places `wanted` [N] int64 in [R * T].

    The other arguments are those of `hidden_states`, whose [R, T, H] is not made where rows are packed.
    """
    return row_states(backbone, input_ids, attention_mask).at(wanted)


def last_states(backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden state of the last token of each row, [R, H]. Raises `ValueError` for a row without a token."""
    (rows, width), last = attention_mask.shape, last_token_index(attention_mask)
    wanted = torch.arange(0, rows * width, width, device=last.device) + last
    wanted = torch.where(last < width, wanted, rows * width)  # of an empty row: no place of another one
    return token_states(backbone, input_ids, attention_mask, wanted)


def layer_states(backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """Hidden states of each token after the embeddings and after every layer, each [R, T, H], at least float32.

    Arguments as for `hidden_states`. The states of a token have mean 0 and variance 1 over their H entries
    (`layer_norm`): those of a decoder's layers differ a hundredfold in size.
    """
    states = row_states(backbone, input_ids, attention_mask, every_layer=True)
    return normalised(states.padded(attention_mask))


def normalised(states: Iterable[Tensor]) -> list[Tensor]:
    """Each of the states [..., H] with mean 0 and variance 1 over its H entries, at least float32."""
    return [F.layer_norm(at_least_float32(state), state.shape[-1:]) for state in states]


def row_states(
    backbone: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    every_layer: bool = False,
    layout: Layout | None = None,
) -> RowStates:
    """`layout` is that of the backbone when not given; when given, it is taken even where it saves nothing."""
    groups = _rows_of_one_scale(backbone.config, attention_mask)
    if len(groups) > 1:
        rows = [(input_ids[group], attention_mask[group]) for group in groups]
        parts = [row_states(backbone, *part, every_layer=every_layer, layout=layout).padded(part[1]) for part in rows]
        order = torch.cat(groups).argsort()
        return RowStates(tuple(torch.cat(states)[order] for states in zip(*parts, strict=True)))
    if rope_limits(backbone.config):
        forget_longest_row(backbone)
    position_ids = position_ids_of(backbone, attention_mask)
    kind = layout or layout_of(backbone)
    if kind != "padded" and (layout is not None or runs_packed(backbone, input_ids.device)):
        plan = plan_rows(input_ids, attention_mask, share=kind == "shared")
        if layout is not None or len(plan.tokens) < attention_mask.numel():
            made = packed_states(backbone, input_ids, position_ids, plan, every_layer=every_layer)
            return RowStates(made, plan.place)
    arguments: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
    if every_layer:
        arguments["output_hidden_states"] = True
    output = backbone(input_ids=input_ids, attention_mask=attention_mask.long(), **arguments)
    return RowStates(output.hidden_states if every_layer else (output.last_hidden_state,))


def position_ids_of(backbone: PreTrainedModel, attention_mask: Tensor) -> Tensor | None:
    """Positions [R, T] counted over the mask, as the backbone counts; None where it is given none."""
    first = first_position(backbone)
    return None if first is None else (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0) + first


def first_position(backbone: PreTrainedModel) -> int | None:
    """The position of a row's first token; None where the backbone is given no positions."""
    if backbone not in first_positions:
        takes_them = "position_ids" in inspect.signature(backbone.forward).parameters
        first_positions[backbone] = declared_first_position(backbone) if takes_them else None
    return first_positions[backbone]


def counts_from_padding(backbone: nn.Module) -> bool:
    """Whether its positions begin after the padding index, so that another one would give other numbers."""
    return declared_first_position(backbone) > 0


def _rows_of_one_scale(config: PretrainedConfig, attention_mask: Tensor) -> list[Tensor]:
    """The rows of a mask [R, T] in groups that one pass may hold, as int64 positions; nearly always one group.

    Some rotary frequencies go by the longest row of a pass: LongRoPE (arXiv 2402.13753) has one set up to a length and
    another beyond it, dynamic NTK scaling one for every length beyond. Each row gets those that it has alone.
    """
    rows = torch.arange(len(attention_mask), device=attention_mask.device)
    limits = [(kind, limit) for kind, limit in rope_limits(config) if attention_mask.shape[1] > limit]
    if not limits:
        return [rows]
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, length in enumerate(attention_mask.sum(dim=1).tolist()):
        beyond = (0 if length <= limit else length if kind == "dynamic" else 1 for kind, limit in limits)
        groups.setdefault(tuple(beyond), []).append(row)
    return [rows[group] for group in groups.values()]


def forget_longest_row(backbone: nn.Module) -> None:
    """Give rotary frequencies of dynamic NTK scaling back their first value: they keep that of the longest row."""
    for layer in backbone.modules():
        if not hasattr(layer, "original_max_seq_len"):
            continue
        for name in [name for name in (*layer._buffers, *vars(layer)) if name.endswith("original_inv_freq")]:
            prefix = name.removesuffix("original_inv_freq")
            getattr(layer, f"{prefix}inv_freq").copy_(getattr(layer, name))
            setattr(layer, f"{prefix}max_seq_len_cached", layer.original_max_seq_len)
