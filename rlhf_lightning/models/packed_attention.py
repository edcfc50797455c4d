"""Attention over rows that lie end to end, without padding between them: `attn_implementation: packed`.

A padded batch of preference pairs is more than half padding, since the two responses of a pair, and pairs among each
other, differ in length. Packed, every layer sees real tokens alone. R rows, T padded tokens, N tokens of all rows
together, H hidden size, D size of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.precision import HALVES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED = "packed"

_packing: ContextVar[bool] = ContextVar("packing", default=False)
"""Whether the backbone now sees rows that lie end to end."""
_looking: ContextVar[bool] = ContextVar("looking", default=False)
"""Whether masks tell of their windows, and attention compares (see `check_windows`)."""


def register() -> None:
    """Make `packed` known to transformers as an attention implementation."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        # Rows end to end have none; a plain call, as in generation, has sdpa's.
        if attention_mask is None and _packing.get():
            return _told_window(**kwargs) if _looking.get() else None
        return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, mask)


def check_windows(backbone: PreTrainedModel, name: str, run: Callable[[], object]) -> None:
    """Refuse a backbone whose windows or chunks come through the mask, which packed attention has none of.

    `run` lets it see one packed row, of any length: each mask tells how far back a token of a long row would see, and
    the attention whether it was told the same. Raises `ModelError`.
    """
    token = _looking.set(True)
    try:
        run()
    except _Unseen as error:
        raise ModelError(
            f"{name}: a {backbone.config.model_type} model has {error}, which its rows would not have when they are "
            "packed; use attn_implementation: sdpa"
        ) from error
    finally:
        _looking.reset(token)


class _Unseen(Exception):
    """A window that attention is not told of."""


def _told_window(
    *, mask_function: Callable[..., Tensor], local_size: int | None = None, device: torch.device | None = None, **_: Any
) -> Tensor | None:
    """What a mask says of tokens behind a token of a long row: None for all of them, else [1, 1, 1, 1] int64.

    `mask_function` (row, head, token, other) says what is seen, `local_size` is its window or chunk. The number is that
    of the tokens that are seen, the token itself included; 0 where it is another one for another token.
    """
    first, length = torch.tensor(0, device=device), 2 * (local_size or 32)
    reaches = []
    for last in (length - 1, length):
        others = torch.arange(last + 1, device=device)
        seen = mask_function(first, first, others[-1], others).expand(last + 1)
        reach = int(seen.flip(0).int().cumprod(0).sum())
        reaches.append(reach if reach == int(seen.sum()) else 0)
    if local_size is None and reaches == [length, length + 1]:
        return None
    return torch.full((1, 1, 1, 1), reaches[0] if reaches[0] == reaches[1] else 0)


def packed_hidden_states(
    backbone: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None,
    *,
    every_layer: bool = False,
) -> tuple[Tensor, ...]:
    """Last states of the tokens, or those of every layer, each [R, T, H], 0 at padding; the backbone sees one row.

    `input_ids`, `position_ids` [R, T] int64; `attention_mask` [R, T] bool, True on tokens.
    """
    lengths = attention_mask.sum(dim=1)
    ends = F.pad(lengths.cumsum(dim=0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    arguments: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids[attention_mask][None]}
    if every_layer:
        arguments["output_hidden_states"] = True
    packing = _packing.set(True)
    try:
        output = backbone(
            input_ids=input_ids[attention_mask][None],
            use_cache=False,
            cu_seq_lens_q=ends,
            cu_seq_lens_k=ends,
            max_length_q=longest,
            max_length_k=longest,
            **arguments,
        )
    finally:
        _packing.reset(packing)
    states = output.hidden_states if every_layer else (output.last_hidden_state,)
    rows, mask = (*attention_mask.shape, states[0].shape[-1]), attention_mask[..., None]
    return tuple(state.new_zeros(rows).masked_scatter(mask, state[0]) for state in states)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: each of the rows attends to itself alone.

    `query` [1, heads, N, D]; `key` and `value` the same with as many heads or a divisor of it; `cu_seq_lens_q` [R + 1]
    int32, where the rows begin, and N. Returns [1, N, heads, D]. Without `cu_seq_lens_q`, as when text is generated, it
    is `sdpa`. Raises `ModelError` for kinds of attention that are not known here.
    """
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        others |= {"scaling": scaling, "dropout": dropout, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    if _looking.get() and (attention_mask is None or attention_mask.shape == (1, 1, 1, 1)):
        told, attention_mask = (None if attention_mask is None else int(attention_mask)), None
        if told != sliding_window:
            size = {None: "no windows", 0: "chunks or the like"}.get(told, f"windows of {told} tokens")
            raise _Unseen(f"{size} through its mask alone")
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if unknown or attention_mask is not None or dropout:
        what = (unknown or ["a mask" if attention_mask is not None else "dropout"])[0]
        raise ModelError(f"attn_implementation: packed cannot do {what} in {type(module).__name__}; use sdpa")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    rows = _Rows(cu_seq_lens_q, max_length_q, causal, sliding_window, scaling)
    if query.is_cuda and query.dtype in HALVES and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 and _varlen():
        return _in_one_kernel(query, key, value, rows), None
    return _row_by_row(query, key, value, rows), None


class _Rows(NamedTuple):
    """Where the packed rows lie, and what their tokens see."""

    ends: Tensor
    """[R + 1] int32: 0, and where each row ends."""
    longest: int
    causal: bool
    window: int | None
    scale: float | None


def _varlen() -> bool:
    """Whether this torch has attention over rows of different lengths, with windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


def _in_one_kernel(query: Tensor, key: Tensor, value: Tensor, rows: _Rows) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # A window of w tokens reaches w - 1 tokens back; -1 is all of them.
    back = -1 if rows.window is None else rows.window - 1
    query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    attended = varlen_attn(
        *(query, key, value, rows.ends, rows.ends, rows.longest, rows.longest),
        scale=rows.scale,
        window_size=(back, 0 if rows.causal else back),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor)
    return attended[None]


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, rows: _Rows) -> Tensor:
    lengths, window, causal = rows.ends.diff().tolist(), rows.window, rows.causal
    made = []
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        mask = _window_mask(q.shape[2], window, causal, q.device) if window and q.shape[2] > window else None
        attended = F.scaled_dot_product_attention(
            *(q, k, v, mask),
            is_causal=causal and mask is None,
            scale=rows.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        made.append(attended.transpose(1, 2))
    return torch.cat(made, dim=1)


def _window_mask(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """[length, length] bool, True where a token (row) sees another (column)."""
    position = torch.arange(length, device=device)
    back = position[:, None] - position
    return (back < window) & (back >= 0 if causal else back > -window)
