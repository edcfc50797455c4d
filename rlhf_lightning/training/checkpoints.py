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
