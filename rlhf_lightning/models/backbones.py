"""Loading of pretrained backbones, and the attention that they compute with."""

from __future__ import annotations

import copy
import functools
from collections.abc import Set
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf_lightning.batches import Layout
from rlhf_lightning.errors import ConfigurationError, ModelError, reason_of
from rlhf_lightning.files.adapters import adapter_base, adapters_alone, adapters_beside_weights
from rlhf_lightning.files.seals import check_seal
from rlhf_lightning.models.adapters import auto_class_of, merged, names_of_whole_layers
from rlhf_lightning.models.configuration import (
    load_config,
    no_pooler,
    published_settings,
)
from rlhf_lightning.models.packed_attention import FLEX, layout_of
from rlhf_lightning.models.precision import is_flash
from rlhf_lightning.models.row_check import check_rows
from rlhf_lightning.terminal import silenced
from rlhf_lightning.tiny import resolve_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

AttentionImplementation = str
"""A name that transformers knows: `eager`, `sdpa`, `flex_attention`, `flash_attention_2` and later ones."""


def load_backbone(
    name_or_path: str | PreTrainedModel,
    *,
    attn_implementation: AttentionImplementation | None = None,
    layout: Layout = "padded",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A pretrained transformer without head, float32, in train mode, dropout off; or that of a prepared model object.

    Adapters are put on the model with the head that they were made on, and then that head is left out.

    float32 because these are the master weights: mixed precision is the Trainer's business. Raises `ModelError`.
    """
    flex = attn_implementation == FLEX
    if not isinstance(name_or_path, str):
        return _without_head(name_or_path, type(name_or_path).__name__, layout, flex)
    from transformers import AutoModel

    config = load_config(name_or_path, trust_remote_code=trust_remote_code)
    loading: dict[str, Any] = {"attn_implementation": probed_attention(attn_implementation, layout)}
    loading["trust_remote_code"] = trust_remote_code
    if (adapters := adapters_alone(name_or_path)) is not None:
        model = load_weights(auto_class_of(adapters), name_or_path, config, **loading)
        return _without_head(model, name_or_path, layout, flex)
    backbone = load_weights(AutoModel, name_or_path, config, **loading | no_pooler(config))
    check_rows(backbone, name_or_path, layout, flex=flex)
    return backbone


def _without_head(model: PreTrainedModel, name: str, layout: Layout, flex: bool) -> PreTrainedModel:
    backbone = model.base_model
    vars(backbone).setdefault("published_settings", getattr(model, "published_settings", {}))
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # see `no_pooler`
    check_rows(backbone, name, layout, flex=flex)
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
    if attn_implementation is None or attn_implementation == "eager":
        return
    from transformers import utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ["eager", *sorted(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if name.isidentifier())]
    if attn_implementation in ("packed", "shared"):
        raise ModelError(f"attn_implementation: {attn_implementation} is a layout; give it as model.layout")
    if attn_implementation not in known:
        raise ModelError(f"attn_implementation: {attn_implementation} is none that transformers knows: {known}")
    number = attn_implementation.removeprefix("flash_attention_")
    if number != attn_implementation and not getattr(utils, f"is_flash_attn_{number}_available", bool)():
        raise ModelError(
            f"attn_implementation: {attn_implementation} needs the package flash_attn, of its version {number}, and a "
            "GPU that it knows, not found here; use sdpa, or leave it out and let model.layout choose"
        )


def chosen_layout(layout: Layout, attn_implementation: AttentionImplementation | None) -> Layout:
    """`auto` is `padded` where attention was chosen. Raises `ConfigurationError` for two that do not go together."""
    if attn_implementation in (None, FLEX):
        return layout
    if layout in ("packed", "shared"):
        raise ConfigurationError(
            f"model.attn_implementation: {attn_implementation} is for padded rows, and model.layout is {layout}; leave "
            "one of them out"
        )
    return "padded"


def probed_attention(
    attn_implementation: AttentionImplementation | None, layout: Layout
) -> AttentionImplementation | None:
    """The attention with which a model is loaded and measured, in float32 and on a CPU, before it gets its own.

    Raises `ModelError` for one that this machine does not have.
    """
    check_attention(attn_implementation)
    at_end = is_flash(attn_implementation) or (attn_implementation == FLEX and layout != "padded")
    return None if at_end else attn_implementation


def use_attention(backbone: PreTrainedModel, attn_implementation: AttentionImplementation | None) -> None:
    """Give a backbone whose rows are padded the attention that it was not measured with."""
    if is_flash(attn_implementation) or (attn_implementation == FLEX and layout_of(backbone) == "padded"):
        backbone.set_attn_implementation(attn_implementation)


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
