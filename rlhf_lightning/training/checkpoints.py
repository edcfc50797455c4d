"""Checkpoints: what one is, and what it says of its origin, so that it can be exported without its configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from rlhf_lightning.errors import ConfigurationError

ORIGIN = "rlhf_lightning"
"""Key of a checkpoint under which `store_origin` writes."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of a run, its tensors mapped into memory. Raises `ConfigurationError` for anything else."""
    if not os.path.exists(path):
        raise ConfigurationError(f"ckpt_path: no checkpoint at {path}; give the file that fit named")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a directory, a text file, a file cut short: torch raises a type for each
        raise ConfigurationError(
            f"ckpt_path: {path} cannot be read as a checkpoint; give the file that fit named"
        ) from error
    if not (isinstance(stored, dict) and "pytorch-lightning_version" in stored and "state_dict" in stored):
        raise ConfigurationError(f"ckpt_path: {path} is no checkpoint of a run; give the file that fit named")
    return stored


def store_origin(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Write into a checkpoint which class made it, and the tokenizer and chat template of its data."""
    data = module.trainer.datamodule
    chat_format = getattr(data, "chat_format", None)
    checkpoint[ORIGIN] = {
        "class": type(module).__name__,
        "tokenizer": getattr(data, "tokenizer_source", None),
        "chat_template": getattr(chat_format, "template", None),
    }


def store_adapters_alone(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Leave the weights below adapters out of a checkpoint; a hash of them stays. Call after `store_origin`."""
    if module.policy.has_adapters:
        trained = _trained(module)
        checkpoint["state_dict"] = {name: w for name, w in checkpoint["state_dict"].items() if name in trained}
        checkpoint[ORIGIN]["base"] = module.policy.frozen_fingerprint()


def complete_adapters(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Put the module's own weights below the adapters of a checkpoint. Raises `ConfigurationError` for others."""
    if not module.policy.has_adapters:
        return
    if set(checkpoint["state_dict"]) != _trained(module):
        raise ConfigurationError(
            "ckpt_path: the checkpoint holds other weights than the adapters of model.lora; give the model.lora of its "
            "run"
        )
    if checkpoint[ORIGIN]["base"] != module.policy.frozen_fingerprint():
        raise ConfigurationError(
            "ckpt_path: the checkpoint's adapters belong to other weights than those of "
            f"{module.hparams.backbone}; give the model.backbone of its run, as it was then"
        )
    # Not the whole state_dict: 4-bit layers write entries that they cannot read.
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names = parameters.keys() | dict(module.named_buffers(remove_duplicate=False)).keys()
    own = {name: weights for name, weights in module.state_dict().items() if name in names}
    checkpoint["state_dict"] = own | checkpoint["state_dict"]


def _trained(module: LightningModule) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}
