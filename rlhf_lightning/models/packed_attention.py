"""Attention over rows that lie end to end, without padding, as a `RowPlan` has them: `model.layout` packed and shared.

R rows, T padded tokens, U tokens that are computed, H hidden size, D size of a head.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention as _flex
from torch.utils.weak import WeakTensorKeyDictionary

from rlhf_lightning.batches import Layout
from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.layouts import RowPlan
from rlhf_lightning.models.precision import HALVES, in_float32
from rlhf_lightning.terminal import silenced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLEX = "flex_attention"

_NAMES: dict[tuple[Layout, bool], str] = {
    ("packed", False): "packed_rows",
    ("shared", False): "shared_rows",
    ("packed", True): "packed_rows_flex",
    ("shared", True): "shared_rows_flex",
}
"""What transformers knows the layouts by, with torch's kernels and with FlexAttention."""

_packing: ContextVar[bool] = ContextVar("packing", default=False)
"""Whether the backbone now sees rows that lie end to end."""
_looking: ContextVar[bool] = ContextVar("looking", default=False)
"""Whether masks tell of their windows, and attention compares (see `check_windows`)."""


def use_layout(backbone: PreTrainedModel, layout: Layout, *, flex: bool = False) -> None:
    """Let a backbone compute its rows in a layout, by torch's kernels or by FlexAttention.

    Raises `ModelError` for a model of its own attention.
    """
    if layout == "padded":
        return
    _register()
    name = _NAMES[layout, flex]
    with silenced("transformers.modeling_utils"):
        backbone.set_attn_implementation(name)
    if backbone.config._attn_implementation != name:
        raise ModelError(
            f"{backbone.name_or_path}: a {backbone.config.model_type} model has an attention of its own, which knows "
            "no packed rows; use model.layout: padded"
        )


def layout_of(network: nn.Module) -> Layout:
    """The layout in which a backbone, or that in a network, computes its rows."""
    names = {name: layout for (layout, _), name in _NAMES.items()}
    configs = (getattr(part, "config", None) for part in network.modules())
    found = (names.get(str(getattr(config, "_attn_implementation", None))) for config in configs)
    return next(filter(None, found), "padded")


def runs_packed(backbone: PreTrainedModel, device: torch.device) -> bool:
    """Whether rows that are not padded have a kernel there: on an accelerator it computes in halves alone."""
    if device.type == "cpu" or "flex" in str(backbone.config._attn_implementation):
        return True
    halves = torch.is_autocast_enabled(device.type) or next(backbone.parameters()).dtype in HALVES
    return halves and not in_float32() and _varlen()


@functools.cache
def _register() -> None:
    """Make the layouts known to transformers as attention implementations."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        # Rows end to end have none; a plain call, as in generation, has sdpa's.
        if attention_mask is None and _packing.get():
            return _told_window(**kwargs) if _looking.get() else None
        return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)

    for (_, flex), name in _NAMES.items():
        AttentionInterface.register(name, functools.partial(packed_attention, flex=flex))
        AttentionMaskInterface.register(name, mask)


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
            "packed; use model.layout: padded"
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


def packed_states(
    backbone: nn.Module, input_ids: Tensor, position_ids: Tensor | None, plan: RowPlan, *, every_layer: bool = False
) -> tuple[Tensor, ...]:
    """Last states of the U tokens of a plan, or those of every layer, each [U, H]; the backbone sees one row.

    `input_ids`, `position_ids` [R, T] int64.
    """
    arguments: dict[str, Any] = {}
    if position_ids is not None:
        arguments["position_ids"] = position_ids.flatten()[plan.tokens][None]
    if every_layer:
        arguments["output_hidden_states"] = True
    if plan.keys is not None:
        arguments["key_places"] = plan.keys
    packing = _packing.set(True)
    try:
        output = backbone(
            input_ids=input_ids.flatten()[plan.tokens][None],
            use_cache=False,
            cu_seq_lens_q=plan.ends,
            cu_seq_lens_k=plan.key_ends,
            max_length_q=plan.longest,
            max_length_k=plan.longest_keys,
            **arguments,
        )
    finally:
        _packing.reset(packing)
    return tuple(state[0] for state in (output.hidden_states if every_layer else (output.last_hidden_state,)))


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
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int = 0,
    max_length_k: int = 0,
    key_places: Tensor | None = None,
    is_causal: bool | None = None,
    flex: bool = False,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: each of the rows attends to itself and to what it begins with.

    `query` [1, heads, U, D]; `key` and `value` the same with as many heads or a divisor of it; the others are those of
    a `RowPlan`: `ends`, `key_ends`, `longest`, `longest_keys` and `keys`. Returns [1, U, heads, D]. Without
    `cu_seq_lens_q`, as when text is generated, it is `sdpa`. Raises `ModelError` for kinds of attention that are not
    known here.
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
        raise ModelError(f"model.layout: packed cannot do {what} in {type(module).__name__}; use padded")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    key_ends = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
    rows = _Rows(cu_seq_lens_q, key_ends, max_length_q, max_length_k, causal, sliding_window, scaling)
    # Rotary embeddings under autocast give float32, where the kernels and the layers around want its half.
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    if flex and (query.is_cuda or not torch.is_grad_enabled()):  # it has no backward pass on a CPU
        return _in_flex_attention(query, key, value, rows, key_places), None
    if key_places is not None:
        key, value = key.index_select(2, key_places), value.index_select(2, key_places)
    fits = query.is_cuda and query.dtype in HALVES and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    if fits and _varlen() and (key_places is None or _last_meets_last(query.device, query.dtype)):
        return _in_one_kernel(query, key, value, rows), None
    return _row_by_row(query, key, value, rows), None


class _Rows(NamedTuple):
    """Where the packed rows lie, and what their tokens see: as a `RowPlan` has it, the keys gathered row by row."""

    ends: Tensor
    key_ends: Tensor
    longest: int
    longest_keys: int
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


@functools.cache
def _last_meets_last(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel lets the last query of a row see its last key where the row has more keys than queries."""
    query, key = (
        torch.zeros(1, 1, 1, 8, device=device, dtype=dtype),
        torch.zeros(1, 1, 2, 8, device=device, dtype=dtype),
    )
    ends, key_ends = (torch.tensor([0, n], device=device, dtype=torch.int32) for n in (1, 2))
    value = torch.ones_like(key)
    value[:, :, 0] = 0
    seen = _in_one_kernel(query, key, value, _Rows(ends, key_ends, 1, 2, causal=True, window=None, scale=1.0))
    return bool((seen - 0.5).abs().max() < 0.1)


def _in_one_kernel(query: Tensor, key: Tensor, value: Tensor, rows: _Rows) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # A window of w tokens reaches w - 1 tokens back; -1 is all of them. The last query of a row meets its last key.
    back = -1 if rows.window is None else rows.window - 1
    query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    attended = varlen_attn(
        *(query, key, value, rows.ends, rows.key_ends, rows.longest, rows.longest_keys),
        scale=rows.scale,
        window_size=(back, 0 if rows.causal else back),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor)
    return attended[None]


def _in_flex_attention(query: Tensor, key: Tensor, value: Tensor, rows: _Rows, key_places: Tensor | None) -> Tensor:
    """The keys are those of the U tokens, none of them gathered."""
    flex_attention: Any = _compiled_flex_attention() if query.is_cuda else _flex.flex_attention
    mask = _block_mask(rows, key_places, query.device)
    grouped = query.shape[1] != key.shape[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")  # on a CPU
        attended = flex_attention(query, key, value, block_mask=mask, scale=rows.scale, enable_gqa=grouped)
    return attended.transpose(1, 2)


@functools.cache
def _compiled_flex_attention() -> Any:
    # With static shapes every new number of tokens would be compiled anew.
    return torch.compile(_flex.flex_attention, dynamic=True)


_block_masks = WeakTensorKeyDictionary()
"""Those of the passes that are under way, by the `ends` of their plans: by causality and window: layers of one kind
share theirs."""


def _block_mask(rows: _Rows, key_places: Tensor | None, device: torch.device) -> Any:
    """What each of the U tokens sees of them, as FlexAttention takes it."""
    made = _block_masks.setdefault(rows.ends, {})
    kind = (rows.causal, rows.window)
    if kind in made:
        return made[kind]
    own, seen = rows.ends.diff(), rows.key_ends.diff()
    tokens, count = int(rows.ends[-1]), len(own)
    row = torch.arange(count, device=device).repeat_interleave(own, output_size=tokens)
    position = torch.arange(tokens, device=device) - rows.ends[row] + seen[row] - own[row]
    places = torch.arange(tokens, device=device) if key_places is None else key_places
    key_row = torch.arange(count, device=device).repeat_interleave(seen, output_size=len(places))
    key_position = torch.arange(len(places), device=device) - rows.key_ends[key_row]
    table = torch.full((count, rows.longest_keys), -1, device=device)
    table[key_row, key_position] = places

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        back = position[query] - position[key]
        reach = rows.longest_keys if rows.window is None else rows.window
        own = table[row[query], position[key]] == key
        return own & (back < reach) & (back >= 0 if rows.causal else back > -reach)

    made[kind] = _flex.create_block_mask(sees, None, None, tokens, tokens, device=device)
    return made[kind]


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, rows: _Rows) -> Tensor:
    lengths, key_lengths = rows.ends.diff().tolist(), rows.key_ends.diff().tolist()
    parts = query.split(lengths, dim=2), key.split(key_lengths, dim=2), value.split(key_lengths, dim=2)
    made = []
    for q, k, v in zip(*parts, strict=True):
        own, seen = q.shape[2], k.shape[2]
        plain = own == seen and (rows.window is None or seen <= rows.window)
        mask = None if plain else _row_mask(own, seen, rows.window, rows.causal, q.device)
        attended = F.scaled_dot_product_attention(
            *(q, k, v, mask),
            is_causal=rows.causal and plain,
            scale=rows.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        made.append(attended.transpose(1, 2))
    return torch.cat(made, dim=1)


def _row_mask(own: int, seen: int, window: int | None, causal: bool, device: torch.device) -> Tensor:
    """[own, seen] bool, True where one of the last `own` tokens of a row of `seen` (row) sees a token (column)."""
    position = torch.arange(seen, device=device)
    back = position[seen - own :, None] - position
    reach = seen if window is None else window
    return (back < reach) & (back >= 0 if causal else back > -reach)
