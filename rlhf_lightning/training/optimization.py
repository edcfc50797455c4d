"""Optimizer and learning-rate schedule, shared by every LightningModule of the package."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jsonargparse.typing import restricted_number_type
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable

from rlhf_lightning.errors import ConfigurationError

Fraction = restricted_number_type("Fraction", float, [(">=", 0), ("<", 1)])
Smoothing = restricted_number_type("Smoothing", float, [(">=", 0), ("<", 0.5)])
Schedule = Literal["constant", "linear", "cosine"]
"""Learning rate after the warm-up: held, or down to 0 in a line or along half a cosine."""

_TRANSFORMERS_NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def check_optimizer(optimizer: OptimizerCallable) -> None:
    """Build the optimizer once of nothing much, to refuse impossible arguments before any work is done.

    Raises `ConfigurationError`.
    """
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"model.optimizer: {error}") from error


def optimizer_and_schedule(
    module: LightningModule,
    optimizer: OptimizerCallable,
    *,
    schedule: Schedule,
    warmup_ratio: float,
    groups: list[dict[str, Any]] | None = None,
    steps_per_batch: int = 1,
) -> dict[str, Any]:
    """What `configure_optimizers` returns: an optimizer of the trainable parameters, and its schedule per step.

    `groups` are torch's parameter groups, where there is more than one; `steps_per_batch` optimizer steps are made of
    each batch. The learning rate rises linearly over `warmup_ratio` of all optimizer steps. Raises `ConfigurationError`
    when the number of steps is not known beforehand.
    """
    from transformers import get_scheduler

    total_steps = module.trainer.estimated_stepping_batches
    if math.isinf(total_steps):
        raise ConfigurationError("trainer: set max_epochs or max_steps; the schedule needs an end")
    total_steps *= steps_per_batch
    if module.trainer.max_steps != -1:
        total_steps = min(total_steps, module.trainer.max_steps)
    built = optimizer(groups or [parameter for parameter in module.parameters() if parameter.requires_grad])
    scheduler = get_scheduler(
        _TRANSFORMERS_NAMES[schedule],
        built,
        num_warmup_steps=math.ceil(warmup_ratio * total_steps),
        num_training_steps=int(total_steps),
    )
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
