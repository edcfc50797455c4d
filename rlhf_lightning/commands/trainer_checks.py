"""What a Trainer is refused before any work, since it would fail later, or run otherwise than asked."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.training.checks import check_precision
from rlhf_lightning.training.module import TrainedModule
from rlhf_lightning.training.zero import ZeroStrategy


def check_monitors(trainer: Trainer, model: TrainedModule) -> None:
    """Refuse a misspelt metric before the first validation would. Raises `ConfigurationError`."""
    known = [f"val/{name}" for name in model.val_metrics]
    learned = [f"train/{name}" for name in model.train_metrics]
    known += learned
    for callback in trainer.callbacks:
        monitor = getattr(callback, "monitor", None)
        logged = monitor in known or (not learned and str(monitor).startswith("train/"))
        counted = isinstance(callback, ModelCheckpoint) and monitor in ("step", "epoch")
        if monitor is not None and not logged and not counted:
            name = type(callback).__name__
            raise ConfigurationError(f"{name}.monitor is {monitor!r}; use one of {', '.join(known)}")


_REFUSED_CALLBACKS = {
    LearningRateFinder: "its rate would stand in no config.yaml; find one with `lr_find` of Lightning's Tuner, from "
    "Python, and set model.optimizer.lr",
    BatchSizeFinder: "the schedule is computed before it runs; ask `rlhf-lightning plan`, or `scale_batch_size` of "
    "Lightning's Tuner, from Python, and set data.batch_size",
    StochasticWeightAveraging: "its average is neither validated nor in any checkpoint; use EMAWeightAveraging or "
    "WeightAveraging, whose average is both",
    BackboneFinetuning: "it wants the module to have its layers before they are loaded; set model.freeze_backbone of a "
    "RewardModel, or model.lora",
    ModelPruning: "it prunes before the weights are loaded, and its masks are in no exported model; prune an exported "
    "one",
}
"""Lightning's callbacks that do not go with the modules of this package: why, and what to do instead."""


def refuse_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks that would fail, or change the weights beside checkpoints. Raises `ConfigurationError`."""
    for callback in trainer.callbacks:
        name = type(callback).__name__
        for kind, reason in _REFUSED_CALLBACKS.items():
            if isinstance(callback, kind):
                raise ConfigurationError(f"trainer.callbacks: {name} is not supported: {reason}")
        if isinstance(callback, WeightAveraging) and isinstance(trainer.strategy, ZeroStrategy):
            raise ConfigurationError(
                f"trainer.callbacks: {name} is not supported under DeepSpeed, which saves the weights without the "
                "average; use trainer.strategy ddp"
            )


def refuse_wrong_numbers(trainer: Trainer) -> None:
    """Refuse settings of the Trainer that run, but not as asked. Raises `ConfigurationError`."""
    if isinstance(trainer.strategy, DeepSpeedStrategy) and not isinstance(trainer.strategy, ZeroStrategy):
        raise ConfigurationError(
            "trainer.strategy: Lightning's stock DeepSpeed strategy divides the gradients by accumulate_grad_batches "
            "twice and rounds the margins of a batch to half precision; use zero2"
        )
    check_precision(trainer)
