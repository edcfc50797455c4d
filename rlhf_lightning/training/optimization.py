"""Optimizer and learning-rate schedule, shared by every LightningModule of the package."""

from __future__ import annotations

import functools
import logging
import math
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from jsonargparse.typing import restricted_number_type
from lightning.pytorch import Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch.optim.lr_scheduler import LambdaLR

from rlhf_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from rlhf_lightning.training.module import TrainedModule

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    Fraction = float
    Smoothing = float
else:
    Fraction = restricted_number_type("Fraction", float, [(">=", 0), ("<", 1)])
    Smoothing = restricted_number_type("Smoothing", float, [(">=", 0), ("<", 0.5)])
Schedule = Literal["constant", "linear", "cosine"]
"""Learning rate after the warm-up: held, or down to 0 in a line or along half a cosine."""

_FEW_STEPS = 10
"""Optimizer steps of a whole run below which a model has hardly left its start."""


def learning_rate_factor(step: int, *, schedule: Schedule, warmup_steps: int, total_steps: int) -> float:
    """What the learning rate of an optimizer step, counted from 0, is multiplied by.

    It rises from 1 / warmup_steps to 1, so that no step is made at 0, and is then held, or falls to 0 at `total_steps`,
    which no step reaches.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    share = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[schedule]


class OptimizerFactory:
    """Makes an optimizer of parameters, as it was given; a copy of its module has the same one.

    What the command line gives holds its parser, whose locks cannot be copied, as an average of the weights would.
    """

    def __init__(self, given: OptimizerCallable) -> None:
        self.given = given

    def __call__(self, parameters: Any) -> torch.optim.Optimizer:
        return self.given(parameters)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def check_optimizer(optimizer: OptimizerCallable) -> None:
    """Build the optimizer once of nothing much, to refuse impossible arguments before any work is done.

    Raises `ConfigurationError`.
    """
    if not callable(optimizer):
        raise ConfigurationError(
            f"model.optimizer: a {type(optimizer).__name__}; give a function of the parameters, such as lambda params: "
            "torch.optim.AdamW(params, lr=1e-5)"
        )
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"model.optimizer: {error}") from error


def optimizer_and_schedule(
    module: TrainedModule, *, groups: list[dict[str, Any]] | None = None, steps_per_batch: int = 1
) -> dict[str, Any]:
    """What `configure_optimizers` returns: an optimizer of the trainable parameters, and its schedule per step.

    `groups` are torch's parameter groups, where there is more than one; `steps_per_batch` optimizer steps are made of
    each batch. Raises `ConfigurationError` when the number of steps is not known beforehand, or an epoch is too short
    for `val_check_interval`.
    """
    try:
        total_steps = module.trainer.estimated_stepping_batches
    except ValueError as error:
        if "val_check_interval" not in str(error):
            raise
        raise ConfigurationError(f"trainer: {str(error).strip()}") from error
    if math.isinf(total_steps):
        raise ConfigurationError("trainer: set max_epochs or max_steps; the schedule needs an end")
    total_steps *= steps_per_batch
    if module.trainer.max_steps != -1:
        total_steps = min(total_steps, module.trainer.max_steps)
    warmup_steps, total_steps = math.ceil(module.hparams.warmup_ratio * total_steps), int(total_steps)
    module.total_steps = total_steps
    _warn_of_few_steps(module.trainer, total_steps)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    built = module.optimizer_factory(groups or trained)
    _take_found_rate(module, built)
    shape = {"schedule": module.hparams.lr_scheduler_type, "warmup_steps": warmup_steps, "total_steps": total_steps}
    factor = functools.partial(learning_rate_factor, **shape)
    return {"optimizer": built, "lr_scheduler": {"scheduler": LambdaLR(built, factor), "interval": "step"}}


def begin_with_found_rate(module: TrainedModule) -> None:
    """Let a learning rate that Lightning's `LearningRateFinder` found as a callback reach the schedule too.

    It comes after `configure_optimizers`; call on the start of a fit.
    """
    for optimizer, config in zip(module.trainer.optimizers, module.trainer.lr_scheduler_configs, strict=True):
        if _take_found_rate(module, optimizer):
            scheduler = config.scheduler
            scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
            for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)


def _take_found_rate(module: TrainedModule, optimizer: torch.optim.Optimizer) -> bool:
    """Give an optimizer the `lr` of its module, where there is one. Returns whether there was."""
    if module.lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = module.lr
    return module.lr is not None


def _warn_of_few_steps(trainer: Trainer, steps: int) -> None:
    """Say that a run is too short to change much, and what would make it longer."""
    if trainer.fast_dev_run or not 0 < steps < _FEW_STEPS:
        return
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    # With max_steps and no max_epochs the batches of an epoch are not counted before the first.
    counted = "" if math.isinf(batches) else f"{batches:.0f} batch{'es'[: 2 * (batches != 1)]} an epoch, "
    counted, lower = f" ({counted}{accumulate} to a step)", "trainer.accumulate_grad_batches or data.batch_size"
    if not trainer.lightning_module.automatic_optimization:  # PPO makes several steps of a batch
        counted, lower = "", "data.batch_size"
    log.warning(
        "warning: this run makes %d optimizer step%s in all%s, few to learn in; for more, lower %s, or raise "
        "trainer.max_epochs or trainer.max_steps",
        *(steps, "s"[: steps != 1], counted, lower),
    )


def warn_of_another_schedule(trainer: Trainer) -> None:
    """Say what a resumed run changes, or cannot change, of its learning rate.

    The optimizer continues with the settings of its checkpoint, whatever the configuration says; the schedule spans
    all steps of the run as it is now. Call once the states of the checkpoint have been restored. Of a module with
    optimizers and schedules of its own nothing is said.
    """
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    if len(trainer.optimizers) != 1 or len(schedulers) != 1 or not isinstance(schedulers[0], LambdaLR):
        return
    (optimizer,), (scheduler,) = trainer.optimizers, schedulers
    group = optimizer.param_groups[0]
    defaults = getattr(optimizer, "optimizer", optimizer).defaults  # DeepSpeed's own is around the one that was given
    plain = {name: given for name, given in defaults.items() if isinstance(given, (int, float))}
    kept = {name: group.get("initial_lr" if name == "lr" else name, given) for name, given in plain.items()}
    if other := [f"{name} {kept[name]:g}, not {plain[name]:g}" for name in plain if kept[name] != plain[name]]:
        log.warning("ckpt_path: the optimizer continues with the settings of its run: %s", ", ".join(other))
    now, then = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](scheduler.last_epoch), group["lr"]
    if not math.isclose(now, then, rel_tol=1e-6, abs_tol=1e-12):
        log.warning(
            "ckpt_path: this run is not as long as that of its checkpoint, and its schedule spans all of its steps: at "
            "step %d the learning rate goes from %.3g to %.3g; to have none of that, export the checkpoint and begin a "
            "new run with that as model.backbone",
            *(trainer.global_step, then, now),
        )


def clip_scaled(
    trainer: Trainer,
    optimizer: torch.optim.Optimizer,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str | None = None,
) -> bool:
    """Clip gradients for an optimizer that takes the loss scale off them in its own step, as torch's `fused` ones do.

    The value and the algorithm (`norm` or `value`) are the Trainer's where they are None. Returns False, and does
    nothing, for any other optimizer and without mixed precision, where Lightning clips. Here it would refuse to.
    """
    plugin = trainer.precision_plugin
    if not isinstance(plugin, MixedPrecision) or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    limit = trainer.gradient_clip_val or 0.0 if gradient_clip_val is None else gradient_clip_val
    scale = 1.0 if plugin.scaler is None else plugin.scaler.get_scale()
    kind = GradClipAlgorithmType(gradient_clip_algorithm or trainer.gradient_clip_algorithm or "norm")
    Precision.clip_gradients(plugin, optimizer, scale * limit, kind)
    return True
