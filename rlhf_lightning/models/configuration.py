"""Configurations of models: where they come from, what training changes in them, what they say of positions."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf_lightning.errors import ModelError, reason_of
from rlhf_lightning.files.adapters import BASE, adapter_base, adapters_alone, is_local, without_adapters
from rlhf_lightning.files.seals import check_seal
from rlhf_lightning.hub import use_cache_without_network
from rlhf_lightning.models.adapters import describe_classifier, describe_vocabulary
from rlhf_lightning.models.storage import edited_settings
from rlhf_lightning.tiny import resolve_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HEAD_KEY = "reward_head"
"""Entry of config.json with the shape of a reward network's head; its presence marks a directory as one."""


def load_config(name_or_path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model by hub name or directory, with dropout off; for adapters that of their base.

    Raises `ModelError` when there is no model, or it is damaged or of a kind that has no one hidden state per token.
    """
    from transformers import AutoConfig

    path = resolve_model(name_or_path)
    check_seal(path, weights=False)
    if (adapters := adapters_alone(name_or_path)) is not None:
        base = adapter_base(adapters)
        try:
            config = load_config(base, trust_remote_code=trust_remote_code)
        except ModelError as error:
            raise ModelError(f"{name_or_path}: its {BASE} cannot be loaded, {reason_of(error)}") from error
        describe_classifier(config, adapters)
        describe_vocabulary(config, adapters)
        return config
    if is_local(path) and not (Path(path) / "config.json").is_file():
        what = "a directory without a config.json, so no model" if Path(path).is_dir() else "no directory here"
        raise ModelError(f"{name_or_path}: {what}; give a Hugging Face model directory or the name of a hub model")
    if not Path(path).exists():
        use_cache_without_network()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for the same mistake
        found = Path(path).exists()
        what = "no model can be loaded from it" if found else "no such directory here, and no such model on the hub"
        raise ModelError(f"{name_or_path}: {what} ({reason_of(error)})") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name_or_path}: an encoder-decoder model ({config.model_type}); use a decoder or an encoder")
    if hasattr(config, HEAD_KEY):
        config.transformers_weights = None  # the sentence that stops a class that would make up a head
    switch_dropout_off(config)
    config.use_cache = False
    return config


def rope_limits(config: PretrainedConfig) -> list[tuple[str, int]]:
    """Kinds of rotary frequencies that change with the length of a row, each with the length from which on."""
    config = config.get_text_config()
    given = getattr(config, "rope_parameters", None) or {}
    found = []
    for settings in (given, *(value for value in given.values() if isinstance(value, dict))):
        kind = settings.get("rope_type") or ""
        if kind == "longrope":
            found.append((kind, settings["original_max_position_embeddings"]))
        elif "dynamic" in kind:
            found.append(("dynamic", config.max_position_embeddings))
    return found


def max_positions(config: PretrainedConfig) -> int | None:
    """Longest row that the backbone has positions for, or None when it says nothing of a limit."""
    from transformers import AutoModel

    limit = getattr(config, "max_position_embeddings", None)
    limit = limit if limit and limit > 0 else None  # XLNet: -1
    if limit is None or type(config) not in AutoModel._model_mapping:
        return limit
    try:
        with torch.device("meta"):
            backbone = AutoModel.from_config(config, trust_remote_code=False)
    except Exception:  # what cannot be made has no embeddings either; loading it will say why
        return limit
    return limit - declared_first_position(backbone)


def declared_first_position(backbone: nn.Module) -> int:
    """Position embeddings with a padding index begin after it, as RoBERTa's; others at 0."""
    for name, layer in backbone.named_modules():
        if name.endswith("position_embeddings") and getattr(layer, "padding_idx", None) is not None:
            return layer.padding_idx + 1
    return 0


def switch_dropout_off(config: PretrainedConfig) -> None:
    """Set every dropout rate of a configuration to 0, those of the configurations inside of it too.

    Dropout makes the score of a response a random number in training, and two passes over one pair differ.
    """
    for path in _dropouts(config):
        holder = config
        for key in path[:-1]:
            holder = getattr(holder, key)
        setattr(holder, path[-1], 0.0)


def _dropouts(config: PretrainedConfig) -> dict[tuple[str, ...], float]:
    """Dropout rates by their keys, each with the keys of the configurations that it stands in."""
    from transformers import PretrainedConfig

    found: dict[tuple[str, ...], float] = {}
    for key, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            found |= {(key, *path): rate for path, rate in _dropouts(value).items()}
        elif isinstance(value, float) and ("drop" in key or key.endswith("pdrop")):
            found[(key,)] = value
    return found


def published_settings(name_or_path: str, *, trust_remote_code: bool) -> dict[tuple[str, ...], Any]:
    """What `load_config` changes, as it stands in the model's own configuration."""
    from transformers import AutoConfig

    path = resolve_model(without_adapters(name_or_path))
    return changed_settings(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code))


def changed_settings(config: PretrainedConfig) -> dict[tuple[str, ...], Any]:
    """What is changed of a configuration for training, as it stands there: dropout rates and `use_cache`."""
    changed: dict[tuple[str, ...], Any] = dict(_dropouts(config))
    if hasattr(config, "use_cache"):
        changed["use_cache",] = config.use_cache
    return changed


def write_published_settings(model: nn.Module, directory: str | Path) -> None:
    """Put back into a saved configuration what `load_config` changed for training: dropout rates and `use_cache`."""
    with edited_settings(Path(directory) / "config.json") as settings:
        for path, value in getattr(model, "published_settings", {}).items():
            holder = settings
            for key in path[:-1]:
                holder = holder.setdefault(key, {})
            holder[path[-1]] = value


def no_pooler(config: PretrainedConfig) -> dict[str, bool]:
    """BERT's pooler reads the first token and would be left without a gradient, which DDP refuses."""
    from transformers import AutoModel

    model_class = AutoModel._model_mapping.get(type(config), None)
    model_class = model_class[0] if isinstance(model_class, tuple | list) else model_class
    takes_it = model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if takes_it else {}
