"""What a run measured, and from what it began: numbers that belong to the weights of one optimizer step."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from rlhf_lightning.terminal import Pace

log = logging.getLogger(__name__)

TABLE_ROWS = {
    "loss": "loss",
    "accuracy": "pairwise accuracy",
    "auroc": "pooled AUROC",
    "margin_auroc": "margin AUROC",
    "calibration_error": "calibration error",
    "spread": "spread of the heads",
    "spread_auroc": "spread AUROC of wrong pairs",
    "reward": "reward",
    "reward_spread": "spread of the reward's heads",
    "reward_with_kl": "less penalty and KL",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "kl": "log-ratio (k1)",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "response_length": "response length",
    "missing_eos": "truncated",
}
"""Rows of the results table: metric and its name in words. A run has those that its module measures."""

_CHUNK = 2**24
"""Weights that are summed at once, so that little memory is taken."""


class Results(Callback):
    """Keeps what each validation of a run measured, and at which optimizer step, and what the run began with.

    `record` is what of it belongs to the current weights; each checkpoint holds it.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        """Of the last validation or test."""
        self.by_step: dict[int, dict[str, float]] = {}
        """Of each validation of this process, by its optimizer step."""
        self.start: int | None = None
        """`weights_sum` of the network before the first step."""
        self.first_loss: float | None = None
        """Of the first training batch."""

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "start": self.start, "first_loss": self.first_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.metrics = state_dict["metrics"]
        self.start, self.first_loss = state_dict.get("start"), state_dict.get("first_loss")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.start is None:
            self.start = weights_sum(network_of(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if self.first_loss is None and isinstance(outputs, dict) and "loss" in outputs:
            self.first_loss = float(outputs["loss"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pace = Pace()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if not sys.stderr.isatty():  # where there is no bar
            self.pace.say("batches of the validation", batch_idx + 1, sum(trainer.num_val_batches))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.metrics = _metrics(trainer, "val/")
        if trainer.state.fn == TrainerFn.FITTING:
            self.by_step[trainer.global_step] = self.metrics
            for logger in trainer.loggers:
                logger.log_metrics({f"val/{k}": v for k, v in self.metrics.items()}, step=trainer.global_step)
            numbers = ", ".join(f"{words} {self.metrics[name]:.4f}" for name, words in table_rows(self.metrics))
            log.info("validation at step %d: %s", trainer.global_step, numbers)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let TensorBoard's page of hyperparameters compare runs by what their best checkpoint was chosen for."""
        kept = trainer.checkpoint_callback
        if not trainer.is_global_zero or not isinstance(kept, ModelCheckpoint) or kept.best_model_score is None:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                best = {f"best/{kept.monitor}": kept.best_model_score.item()}
                logger.log_hyperparams(logger.hparams, best, trainer.global_step)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metrics = _metrics(trainer, "test/")

    def record(self, step: int) -> dict[str, Any]:
        """What a checkpoint of an optimizer step says of itself; no metrics where its weights were not validated."""
        return {"metrics": self.by_step.get(step, {}), "start": self.start, "first_loss": self.first_loss}


def table_rows(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """Metrics of a table and their names in words; a reward model's mean reward says nothing by itself."""
    hidden = () if "responses" in metrics else ("reward",)
    return [(name, words) for name, words in TABLE_ROWS.items() if name in metrics and name not in hidden]


@torch.no_grad()
def weights_sum(network: nn.Module) -> int:
    """Sum of the bit patterns of all trained weights, as float32: another one as soon as any weight is another.

    Weights in half precision and their float32 copies have the same sum.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    parts = (part.float().contiguous() for weights in trained for part in weights.detach().flatten().split(_CHUNK))
    return sum(part.view(torch.int32).sum(dtype=torch.int64).item() for part in parts)


def _metrics(trainer: Trainer, prefix: str) -> dict[str, float]:
    return {
        name.removeprefix(prefix): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(prefix)
    }


def network_of(module: LightningModule) -> nn.Module:
    """What a module trains and exports: its `trained_network`, or all of a module that is not of this package."""
    from rlhf_lightning.training.module import TrainedModule  # which logs with this module's help

    return module.trained_network if isinstance(module, TrainedModule) else module
