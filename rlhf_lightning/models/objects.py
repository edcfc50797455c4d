"""Models that a script made itself and gives in the place of a name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.models.backbones import AttentionImplementation, check_attention, keep_routers_still
from rlhf_lightning.models.configuration import changed_settings, load_config, switch_dropout_off
from rlhf_lightning.models.precision import is_flash

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    ModelSource = str | PreTrainedModel
else:
    ModelSource = str  # what a configuration can name

_OBJECT = "object:"
"""Begins what stands for a model in a checkpoint that no name leads back to."""

_OF_THE_LOADING = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
"""Keys of a configuration that say how a model was loaded, not what it is."""


def prepared(model: Any, *, attn_implementation: AttentionImplementation | None = None) -> PreTrainedModel:
    """A model of a script, made what `load_weights` gives: float32, in train mode, with dropout off; changed in place.

    Raises `ModelError` for anything but a model of transformers that is not quantized and holds float32.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"model.backbone: a {type(model).__name__} is no model of transformers; give a PreTrainedModel without "
            "adapters (model.lora makes them), or a directory or hub name"
        )
    name = type(model).__name__
    if halves := {str(each.dtype) for each in model.parameters()} - {"torch.float32"}:
        raise ModelError(
            f"model.backbone: the {name} holds {min(halves)}, and the trained weights are float32, whatever "
            "trainer.precision is; load it with dtype=torch.float32"
        )
    if model.config.is_encoder_decoder:
        raise ModelError(f"model.backbone: the {name} is an encoder-decoder model; use a decoder or an encoder")
    vars(model).setdefault("published_settings", changed_settings(model.config))
    switch_dropout_off(model.config)
    model.config.use_cache = False
    for layer in model.modules():
        for key, value in vars(layer).items():
            if isinstance(value, float) and ("drop" in key or (isinstance(layer, torch.nn.Dropout) and key == "p")):
                setattr(layer, key, 0.0)
    if attn_implementation is not None:
        check_attention(attn_implementation)
        if not is_flash(attn_implementation):  # it gets those once it is measured
            model.set_attn_implementation(attn_implementation)
    keep_routers_still(model)
    return model.train()


def name_for_checkpoints(model: PreTrainedModel, *, trust_remote_code: bool = False) -> str:
    """The name or directory from which a model of the same configuration is loaded, or a text that says there is none.

    The weights may be others by now: those of a checkpoint are put into it, and adapters know their base by a hash.
    """
    try:
        config = load_config(model.name_or_path, trust_remote_code=trust_remote_code) if model.name_or_path else None
    except ModelError:
        config = None
    if config is not None and _settings(config) == _settings(model.config):
        return model.name_or_path
    return f"{_OBJECT}{type(model).__name__}"


def is_nameless(backbone: str) -> bool:
    """Whether what a checkpoint has in the place of a name stands for an object."""
    return backbone.startswith(_OBJECT)


def check_has_name(backbone: str, kind: str) -> None:
    """Raise `ConfigurationError` for what stands for an object; `kind` is the class of the module."""
    if is_nameless(backbone):
        raise ConfigurationError(
            f"model.backbone: the run had a {backbone.removeprefix(_OBJECT)} as an object, which no file holds; pass "
            f"it again: {kind}.load_from_checkpoint(path, backbone=model)"
        )


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in _OF_THE_LOADING}
