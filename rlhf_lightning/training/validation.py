"""When a run validates: the weights of each optimizer step at most once, and those of the last step always."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class ValidateOnce(Callback):
    """Skips a validation of weights that were validated before, and validates the last weights of a run.

    Lightning counts batches or epochs. Within an accumulation it would validate the same weights again, which
    `EarlyStopping` takes for no improvement; and of a run with `max_steps`, or with a `val_check_interval` that does
    not divide its epoch, it never judges the last weights.
    """

    def __init__(self) -> None:
        self.validated_step = -1
        """The optimizer step that was validated last."""
        self._first_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.validated_step = -1  # of another run of the same callback

    def state_dict(self) -> dict[str, Any]:
        return {"validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validated_step = state_dict["validated_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.validated_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Before the epoch ends, where checkpoints are saved and training is stopped by what was validated."""
        loop = trainer.fit_loop
        if loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            loop.epoch_loop._skip_next_val = self.validated_step == trainer.global_step
            return
        last = trainer.should_stop and loop._can_stop_early
        if trainer.max_steps != -1:
            last |= trainer.global_step >= trainer.max_steps
        if trainer.max_epochs not in (None, -1):
            last |= loop.epoch_loop.batch_progress.is_last_batch and trainer.current_epoch + 1 >= trainer.max_epochs
        if last:
            self._validate_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where something else has ended the run."""
        self._validate_last(trainer)

    def _validate_last(self, trainer: Trainer) -> None:
        if trainer.enable_validation and trainer.global_step > self._first_step:
            validate(trainer)


def validate(trainer: Trainer) -> None:
    """A validation as the training loop makes it between batches, unless the current weights have been validated."""
    if any(c.validated_step == trainer.global_step for c in trainer.callbacks if isinstance(c, ValidateOnce)):
        return
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    first_batch = connector._first_loop_iter
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
    connector._first_loop_iter = first_batch
