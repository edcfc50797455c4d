"""Lightning's progress bar, short enough for a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import ProgressColumn, TimeRemainingColumn


class ShortProgressBar(RichProgressBar):
    """Description, a short bar, batches, the time that is left, and the metrics without the logger's version."""

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        description, bar, batches, *_ = super().configure_columns(trainer)
        bar.bar_width = 8
        return [description, bar, batches, TimeRemainingColumn(compact=True)]

    def _get_train_description(self, current_epoch: int) -> str:
        """Counted from 1, as steps are."""
        of = "" if self.trainer.max_epochs is None else f"/{self.trainer.max_epochs}"
        return f"{f'Epoch {current_epoch + 1}{of}':{len(self.validation_description)}}"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name.removeprefix("train/"): value for name, value in metrics.items() if name != "v_num"}


def shorten(trainer: Trainer) -> None:
    """Put it in the place of the bar that the Trainer chose by itself; one of the user's own stays."""
    for place, callback in enumerate(trainer.callbacks):
        if type(callback) is RichProgressBar:
            trainer.callbacks[place] = ShortProgressBar()
