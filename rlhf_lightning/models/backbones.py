"""Loading of pretrained backbones, and the arguments of their forward pass.

R rows, T tokens.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Iterable, Set
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lightning.errors import ModelError, reason_of
from rlhf_lightning.files.adapters import adapter_base, adapters_alone, adapters_beside_weights
from rlhf_lightning.files.seals import check_seal
from rlhf_lightning.functional.shapes import at_least_float32
from rlhf_lightning.models.adapters import auto_class_of, merged, names_of_whole_layers
from rlhf_lightning.models.configuration import (
    declared_first_position,
    load_config,
    max_positions,
    no_pooler,
    published_settings,
    rope_limits,
)
from rlhf_lightning.models.packed_attention import PACKED, check_windows, packed_hidden_states, register
from rlhf_lightning.models.row_check import Probe, exact_arithmetic, probe_of, rounding
from rlhf_lightning.terminal import silenced
from rlhf_lightning.tiny import resolve_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

AttentionImplementation = Literal["eager", "sdpa", "flash_attention_2", "flex_attention", "packed"]
"""`packed` lays the rows of a batch end to end, so that nothing is computed on padding; the others are those of
transformers."""

_first_positions: weakref.WeakKeyDictionary[nn.Module, int | None] = weakref.WeakKeyDictionary()
"""The position of a row's first token, by backbone; None where the backbone is given no positions."""
_checked: dict[tuple[str, str], int | None] = {}
"""The same by configuration and attention, of the models that this process has checked."""


def load_backbone(
    name_or_path: str | PreTrainedModel,
    *,
    attn_implementation: AttentionImplementation | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A pretrained transformer without head, float32, in train mode, dropout off; or that of a prepared model object.

    Adapters are put on the model with the head that they were made on, and then that head is left out.

    float32 because these are the master weights: mixed precision is the Trainer's business. Raises `ModelError`.
    """
    if not isinstance(name_or_path, str):
        return _without_head(name_or_path, type(name_or_path).__name__)
    from transformers import AutoModel

    config = load_config(name_or_path, trust_remote_code=trust_remote_code)
    loading: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    if (adapters := adapters_alone(name_or_path)) is not None:
        return _without_head(load_weights(auto_class_of(adapters), name_or_path, config, **loading), name_or_path)
    backbone = load_weights(AutoModel, name_or_path, config, **loading | no_pooler(config))
    check_rows(backbone, name_or_path)
    return backbone


def _without_head(model: PreTrainedModel, name: str) -> PreTrainedModel:
    backbone = model.base_model
    vars(backbone).setdefault("published_settings", getattr(model, "published_settings", {}))
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # see `no_pooler`
    check_rows(backbone, name)
    return backbone


def load_weights(
    auto_class: Any,
    name_or_path: str,
    config: PretrainedConfig,
    *,
    attn_implementation: AttentionImplementation | None = None,
    trust_remote_code: bool = False,
    brought: Set[str] = frozenset(),
    **arguments: Any,
) -> PreTrainedModel:
    """The model that `auto_class` makes of a directory or hub name, float32, in train mode; adapters merged into it.

    The weights `brought`, by adapters that are put on it, may be missing. Raises `ModelError` when the weights cannot
    be loaded, or some are missing or damaged.
    """
    check_attention(attn_implementation)
    check_seal(resolve_model(name_or_path))
    if (adapters := adapters_alone(name_or_path)) is not None:
        arguments |= {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
        arguments["brought"] = brought | names_of_whole_layers(adapters)
        base, below = adapter_base(adapters), copy.deepcopy(config)
        vocabulary = config.get_text_config().vocab_size
        its = load_config(base, trust_remote_code=trust_remote_code).get_text_config()
        below.get_text_config().vocab_size = its.vocab_size
        model = load_weights(auto_class, base, below, **arguments)
        return merged(model, adapters, name_or_path, vocabulary=vocabulary)
    if attn_implementation == PACKED:
        register()
    # Its report calls a head's weights unexpected and tells of missing ones; the former are meant, the latter refused.
    try:
        with silenced("transformers.modeling_utils"):
            model, info = auto_class.from_pretrained(
                resolve_model(name_or_path),
                config=config,
                dtype=torch.float32,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **arguments,
            )
    except Exception as error:
        raise ModelError(f"{name_or_path}: its weights could not be loaded ({reason_of(error)})") from error
    if getattr(model, "_hf_peft_config_loaded", False):  # a hub model: its files cannot be looked at
        raise ModelError(adapters_beside_weights(name_or_path))
    if missing := sorted(info["missing_keys"] - brought):
        raise ModelError(
            f"{name_or_path}: {len(missing)} weights of a {config.model_type} model are not in its files, the first "
            f"{missing[0]}; they would stay random. Give the directory or name of a whole model"
        )
    keep_routers_still(model)
    model.published_settings = published_settings(name_or_path, trust_remote_code=trust_remote_code)
    return model.train()


def check_attention(attn_implementation: AttentionImplementation | None) -> None:
    """Refuse an attention implementation that this machine does not have. Raises `ModelError`."""
    from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

    available = {"flash_attention_2": is_flash_attn_2_available, "flex_attention": is_torch_flex_attn_available}
    needed = {"flash_attention_2": "the package flash_attn and an NVIDIA or AMD GPU", "flex_attention": "torch 2.5"}
    if attn_implementation in available and not available[attn_implementation]():
        raise ModelError(
            f"attn_implementation: {attn_implementation} needs {needed[attn_implementation]}, not found here; use sdpa"
        )


def hidden_states(backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden state of each token, [R, T, H].

    `input_ids` [R, T] int64; `attention_mask` [R, T] bool, True on tokens. Positions are counted over the mask, so that
    padding on either side changes nothing.
    """
    (last,) = _states(backbone, input_ids, attention_mask)
    return last


def layer_states(backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """Hidden states of each token after the embeddings and after every layer, each [R, T, H], at least float32.

    Arguments as for `hidden_states`. The states of a token have mean 0 and variance 1 over their H entries
    (`layer_norm`): those of a decoder's layers differ a hundredfold in size.
    """
    return normalised(_states(backbone, input_ids, attention_mask, every_layer=True))


def normalised(states: Iterable[Tensor]) -> list[Tensor]:
    """Each of the states [..., H] with mean 0 and variance 1 over its H entries, at least float32."""
    return [F.layer_norm(at_least_float32(state), state.shape[-1:]) for state in states]


def _states(
    backbone: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    every_layer: bool = False,
    packed: bool | None = None,
) -> tuple[Tensor, ...]:
    if packed is None:
        packed = backbone.config._attn_implementation == PACKED
    groups = _rows_of_one_scale(backbone.config, attention_mask)
    if len(groups) > 1:
        rows = [(input_ids[group], attention_mask[group]) for group in groups]
        parts = [_states(backbone, *part, every_layer=every_layer, packed=packed) for part in rows]
        place = torch.cat(groups).argsort()
        return tuple(torch.cat(states)[place] for states in zip(*parts, strict=True))
    if rope_limits(backbone.config):
        forget_longest_row(backbone)
    position_ids = _position_ids(backbone, attention_mask)
    if packed:
        return packed_hidden_states(backbone, input_ids, attention_mask, position_ids, every_layer=every_layer)
    arguments: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
    if every_layer:
        arguments["output_hidden_states"] = True
    output = backbone(input_ids=input_ids, attention_mask=attention_mask.long(), **arguments)
    return output.hidden_states if every_layer else (output.last_hidden_state,)


def _position_ids(backbone: PreTrainedModel, attention_mask: Tensor) -> Tensor | None:
    """Positions [R, T] counted over the mask, as the backbone counts; None where it is given none."""
    first = first_position(backbone)
    return None if first is None else (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0) + first


def first_position(backbone: PreTrainedModel) -> int | None:
    """The position of a row's first token; None where the backbone is given no positions."""
    if backbone not in _first_positions:
        takes_them = "position_ids" in inspect.signature(backbone.forward).parameters
        _first_positions[backbone] = declared_first_position(backbone) if takes_them else None
    return _first_positions[backbone]


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


def keep_routers_still(model: nn.Module) -> None:
    """Let routers of experts that draw random numbers in training (jitter) stay in eval mode, as dropout is off."""
    for layer in model.modules():
        if any("jitter" in name for name in vars(layer)):
            layer.train = functools.partial(_train_children_alone, layer)  # type: ignore[method-assign]


def _train_children_alone(layer: nn.Module, mode: bool = True) -> nn.Module:
    layer.training = False
    for child in layer.children():
        child.train(mode)
    return layer


def check_rows(backbone: PreTrainedModel, name: str) -> None:
    """Find out how a backbone counts positions, and refuse one whose numbers for a row are not the row's own.

    A row alone, as transformers itself computes it, is compared with the row padded on either side beside another one
    (in train mode, as it will be trained) and, where rows are to be packed, packed. Once for each configuration in a
    process. Raises `ModelError`.
    """
    config = backbone.config
    key = (config.to_json_string(use_diff=False), str(config._attn_implementation))
    if key in _checked:
        _first_positions[backbone] = _checked[key]
        return
    training, kind = backbone.training, config.model_type
    check_attention_type(config, name)
    try:
        probe = probe_of(config, positions=max_positions(config.get_text_config()), device=backbone.device)
        with exact_arithmetic():
            backbone.eval()
            alone = _alone(backbone, probe.rows[0]), _alone(backbone, probe.rows[1])
            noise = rounding(backbone, lambda: _alone(backbone, probe.rows[0]), alone[0])
            error = _find_first_position(backbone.train(), probe, alone, noise)
            if not error <= noise:
                raise ModelError(
                    f"{name}: the numbers of a {kind} model for a row of tokens change with padding and the rows "
                    f"beside it, or from pass to pass (by {error:.2g} of their size); use another model"
                )
            if config._attn_implementation == PACKED:
                _check_packing(backbone, name, probe, alone, noise)
    except ModelError:
        raise
    except Exception as error:  # an architecture that wants other input, or rows of certain lengths, may raise anything
        raise ModelError(f"{name}: a {kind} model that does not run on rows of tokens ({reason_of(error)})") from error
    finally:
        backbone.train(training)
    _checked[key] = _first_positions[backbone]


def _check_packing(
    backbone: PreTrainedModel, name: str, probe: Probe, alone: tuple[Tensor, Tensor], noise: float
) -> None:
    """Refuse a backbone whose rows are not the same packed as alone. Raises `ModelError`."""
    kind = backbone.config.model_type
    try:
        check_windows(backbone, name, lambda: _states(backbone, probe.ids[:1], probe.mask[:1]))
        mixture = probe.error(hidden_states(backbone, probe.ids, probe.mask), alone)
    except ModelError:
        raise
    except Exception as error:  # transformers refuses some, each in its own way
        raise ModelError(
            f"{name}: the rows of a {kind} model cannot be packed ({reason_of(error)}); use attn_implementation: sdpa"
        ) from error
    if not mixture <= noise:
        raise ModelError(
            f"{name}: the rows of a {kind} model see each other when they are packed (by {mixture:.2g} of their size); "
            "use attn_implementation: sdpa"
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


def _find_first_position(backbone: PreTrainedModel, probe: Probe, alone: tuple[Tensor, Tensor], noise: float) -> float:
    """Set the position of a row's first token so that padding changes nothing. Returns the error that is left."""
    ways: list[int | None] = [None]
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        ways = [*dict.fromkeys((declared_first_position(backbone), 0, 2)), None]  # 2: YOSO, MRA, Nystromformer
    errors: dict[int | None, float] = {}
    for way in ways:
        _first_positions[backbone] = way
        (states,) = _states(backbone, probe.ids, probe.mask, packed=False)
        errors[way] = probe.error(states, alone)
        if errors[way] <= noise:
            return errors[way]
    _first_positions[backbone] = min(errors, key=errors.__getitem__)
    return min(errors.values())
