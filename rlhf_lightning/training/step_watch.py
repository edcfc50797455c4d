"""What each optimizer step did: the norm of its gradient, and in 16-mixed whether it was made at all."""

from __future__ import annotations

import logging

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR

from rlhf_lightning.errors import TrainingError
from rlhf_lightning.training.module import TrainedModule
from rlhf_lightning.training.zero import ZeroStrategy

log = logging.getLogger(__name__)

_PATIENCE = 15
"""Steps in a row that may be skipped. The loss scale begins at 2^16 and is halved at each, so it is then 2 or 4."""


class StepWatch(Callback):
    """Logs `train/grad_norm`, and in 16-mixed `train/loss_scale` and `train/skipped_steps`.

    Raises `TrainingError` after many skipped steps in a row, since the weights stand still while steps are counted; and
    where the learning-rate schedule of a module of this package has not gone on once with each optimizer step.
    """

    def __init__(self) -> None:
        self._norm: float | None = None
        self._skipped = self._in_a_row = 0
        self._scale = 0.0
        self._step = self._schedule_lead = 0

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self._skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scale, self._step = _loss_scale(trainer), trainer.global_step
        self._schedule_lead = _schedule_lead(trainer)  # 0, but while Lightning's Tuner tries things out

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer) -> None:
        """Before clipping. DeepSpeed has taken the gradients by then, and measures itself."""
        if _is_due(trainer, trainer.global_step + 1) and not isinstance(trainer.strategy, ZeroStrategy):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if (gone := _schedule_lead(trainer) - self._schedule_lead) != 0 and isinstance(pl_module, TrainedModule):
            raise TrainingError(
                f"step {self._step}: the learning-rate schedule has gone {self._step + gone} steps, not {self._step}; "
                "an optimizer step or a step of the schedule was left out, by a callback or the strategy"
            )
        values = {}
        if trainer.precision == "16-mixed":
            values = self._after_half_precision_step(trainer)
        if not _is_due(trainer, self._step):
            return
        if isinstance(trainer.strategy, ZeroStrategy):
            self._norm = float(trainer.strategy.deepspeed_engine.get_global_grad_norm() or 0.0)
        for logger in trainer.loggers:
            logger.log_metrics({"train/grad_norm": self._norm} | values, step=self._step)

    def _after_half_precision_step(self, trainer: Trainer) -> dict[str, float]:
        scale = _loss_scale(trainer)
        if isinstance(trainer.strategy, ZeroStrategy):
            skipped = trainer.strategy.deepspeed_engine.skipped_steps - self._skipped
        else:
            skipped = int(scale < self._scale)
        self._scale, self._skipped = scale, self._skipped + skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row >= _PATIENCE:
            raise TrainingError(
                f"step {self._step}: float16 gradients were not finite in the last {self._in_a_row} steps, so none was "
                f"made (loss scale now {scale:g}); use bf16-mixed or 32-true, or lower the learning rate"
            )
        return {"train/loss_scale": scale, "train/skipped_steps": float(self._skipped)}


def _schedule_lead(trainer: Trainer) -> int:
    """Steps by which the schedule is ahead of the optimizer; 0 where it is none of ours, made for each step."""
    configs = trainer.lr_scheduler_configs
    ours = len(configs) == 1 and configs[0].interval == "step" and isinstance(configs[0].scheduler, LambdaLR)
    return configs[0].scheduler.last_epoch - trainer.global_step if ours else 0


def _is_due(trainer: Trainer, step: int) -> bool:
    return bool(trainer.loggers) and trainer.log_every_n_steps > 0 and step % trainer.log_every_n_steps == 0


def _loss_scale(trainer: Trainer) -> float:
    """What losses are multiplied by before the backward pass; 1 without scaling."""
    if isinstance(trainer.strategy, ZeroStrategy):
        return float(trainer.strategy.deepspeed_engine.optimizer.loss_scale)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
