"""A validation after the last optimizer step, so that the weights with which a run ends are judged as well."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class LastValidation(Callback):
    """Validates when a run ends after optimizer steps that no validation has seen.

    Lightning validates every so many batches or epochs alone: of a run with `max_steps`, or with a `val_check_interval`
    that does not divide its epoch, it never judges the last weights.
    """

    def __init__(self) -> None:
        self._seen_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Before the epoch ends, where checkpoints are saved and training is stopped by what was validated."""
        loop = trainer.fit_loop
        last = trainer.should_stop and loop._can_stop_early
        if trainer.max_steps != -1:
            last |= trainer.global_step >= trainer.max_steps
        if trainer.max_epochs not in (None, -1):
            last |= loop.epoch_loop.batch_progress.is_last_batch and trainer.current_epoch + 1 >= trainer.max_epochs
        if last and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._validate(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where something else has ended the run."""
        self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        if trainer.enable_validation and trainer.global_step > self._seen_step:
            validate(trainer)


def validate(trainer: Trainer) -> None:
    """A validation as the training loop makes it between batches."""
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    first_batch = connector._first_loop_iter
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
    connector._first_loop_iter = first_batch
