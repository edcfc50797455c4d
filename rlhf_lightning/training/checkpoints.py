"""What a checkpoint says of its origin, so that it can be exported without the configuration of its run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule

ORIGIN = "rlhf_lightning"


def store_origin(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Write into a checkpoint which class made it, and the tokenizer and chat template of its data."""
    data = module.trainer.datamodule
    chat_format = getattr(data, "chat_format", None)
    checkpoint[ORIGIN] = {
        "class": type(module).__name__,
        "tokenizer": getattr(data, "tokenizer_source", None),
        "chat_template": getattr(chat_format, "template", None),
    }
