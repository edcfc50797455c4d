"""Callbacks: the results table, the export of the best network, and the file of predicted scores."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.models.directories import check_free, check_other, end_at
from rlhf_lightning.training.checkpoints import read_checkpoint, restored_module

log = logging.getLogger(__name__)

TABLE_ROWS = {
    "loss": "loss",
    "accuracy": "pairwise accuracy",
    "auroc": "pooled AUROC",
    "margin_auroc": "margin AUROC",
    "calibration_error": "calibration error",
    "reward": "reward",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "kl": "log-ratio (k1)",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "response_length": "tokens of a reply",
    "missing_eos": "replies not ended",
}
"""Rows of the results table: metric and its name in words. A run has those that its module measures."""


class PairScores(NamedTuple):
    """Scores of B pairs, as `predict` returns them."""

    index: Tensor
    """[B] int64, position of the pair in the evaluated data."""
    chosen: Tensor
    """[B] float32."""
    rejected: Tensor
    """[B] float32."""


class Results(Callback):
    """Keeps what the last validation or test measured, also inside each checkpoint, as the numbers of its weights."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.metrics = state_dict["metrics"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.metrics = _metrics(trainer, "val/")
        if trainer.state.fn == TrainerFn.FITTING:
            for logger in trainer.loggers:
                logger.log_metrics({f"val/{k}": v for k, v in self.metrics.items()}, step=trainer.global_step)
            numbers = ", ".join(f"{words} {self.metrics[name]:.4f}" for name, words in self._rows())
            log.info("validation at step %d: %s", trainer.global_step, numbers)

    def _rows(self) -> list[tuple[str, str]]:
        return table_rows(self.metrics)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metrics = _metrics(trainer, "test/")

    def of_checkpoint(self, path: Path) -> tuple[dict[str, float], int]:
        """The metrics that a checkpoint brings along, and its optimizer step."""
        stored = read_checkpoint(path, weights=False)
        return stored["callbacks"][self.state_key]["metrics"], stored["global_step"]


def print_results(trainer: Trainer) -> None:
    """Print the table of what a run measured, and where its files lie.

    After `fit` these are the numbers of the best checkpoint (of the last when none is monitored).
    """
    results = next((callback for callback in trainer.callbacks if isinstance(callback, Results)), None)
    if results is None or not trainer.is_global_zero:
        return
    metrics, best = results.metrics, best_checkpoint(trainer)
    title = {TrainerFn.VALIDATING: "validation", TrainerFn.TESTING: "test"}.get(trainer.state.fn, "last validation")
    if trainer.state.fn == TrainerFn.FITTING and best is not None:
        metrics, step = results.of_checkpoint(best)
        title = f"validation, best checkpoint (step {step})"
    if metrics:
        _print_table(title, metrics)
    if trainer.state.fn == TrainerFn.FITTING:
        print(
            f"checkpoint:  {_relative(best)}"
            if best
            else "checkpoint:  none, the run ended before its first validation"
        )
    for callback in trainer.callbacks:
        if isinstance(callback, ExportBest) and callback.exported:
            print(f"model:       {_relative(callback.directory)}")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            print(f"TensorBoard: {_relative(logger.log_dir)}")


def _print_table(title: str, metrics: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    noun = "pairs" if "pairs" in metrics else "replies"
    table.add_column(noun, justify="right")
    for name, words in table_rows(metrics):
        table.add_row(words, f"{metrics[name]:.4f}", f"{metrics[noun]:.0f}")
    Console(soft_wrap=True).print(table)


def table_rows(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """Metrics of a table and their names in words; a reward model's mean reward says nothing by itself."""
    hidden = () if "replies" in metrics else ("reward",)
    return [(name, words) for name, words in TABLE_ROWS.items() if name in metrics and name not in hidden]


class ExportBest(Callback):
    """After `fit`, writes the best checkpoint's model and tokenizer as a Hugging Face directory.

    Args:
        directory: Where to; an earlier export there is replaced, anything else is left alone and refused.
        merge: Merge LoRA adapters into the weights; false writes the adapters alone.
    """

    def __init__(self, directory: str, merge: bool = True) -> None:
        self.directory = Path(directory)
        self.merge = merge
        self.exported = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what could not be written in the end, before any training. Raises `ConfigurationError`."""
        if self.merge and pl_module.hparams.get("quantization") is not None:
            raise ConfigurationError(
                "ExportBest.merge: merging adapters into 4-bit weights would round them to 4 bits too; set merge: false"
            )
        if stage != "fit":
            return
        settings = pl_module.hparams
        check_other(self.directory, backbone=settings.get("backbone"), reference=settings.get("reference"))
        if check_free(self.directory):
            log.info("%s: the model there will be replaced when the run ends", self.directory)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        best = best_checkpoint(trainer)
        if best is None:
            log.warning("%s: nothing is exported, since no checkpoint was saved", self.directory)
        if not trainer.is_global_zero or best is None:
            return
        best_module = restored_module(type(pl_module), best)
        best_module.export(self.directory, merge=self.merge)
        chat_format = getattr(trainer.datamodule, "chat_format", None)
        if chat_format is not None:
            chat_format.save_pretrained(self.directory)
            end_at(self.directory, chat_format.terminator_id)
        self.exported = True


class PredictionWriter(BasePredictionWriter):
    """Writes the scores of `predict` as JSON lines, in the order of the data.

    Each line holds `example_id`, `chosen`, `rejected` (scores) and `margin` (their difference).

    Args:
        path: The file; `predictions.jsonl` in the run's log directory when not given.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="epoch")
        self.path = path

    def write_on_epoch_end(self, trainer: Trainer, pl_module: LightningModule, predictions, batch_indices) -> None:
        own = torch.stack(
            [torch.cat([column.double() for column in columns]).cpu() for columns in zip(*predictions, strict=True)]
        )
        parts = [own]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, own)
        directory = Path(trainer.log_dir or trainer.default_root_dir)  # asked on every process: it is a broadcast
        if not trainer.is_global_zero:
            return
        path = Path(self.path) if self.path else directory / "predictions.jsonl"
        index, chosen, rejected = torch.cat(parts, dim=1)
        example_ids = trainer.datamodule.pairs["test"].example_ids
        lines = [
            json.dumps(
                {
                    "example_id": example_ids[int(index[row])],
                    "chosen": chosen[row].item(),
                    "rejected": rejected[row].item(),
                    "margin": (chosen[row] - rejected[row]).item(),
                }
            )
            for row in index.argsort().tolist()
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        half_written = path.with_name(f".{path.name}.part")
        half_written.write_text("\n".join(lines) + "\n", encoding="utf-8")
        half_written.replace(path)
        print(f"predictions: {_relative(path)} ({len(lines)} pairs)")


def best_checkpoint(trainer: Trainer) -> Path | None:
    """The best checkpoint of a run, the last one when none is monitored, or None."""
    callback = next((c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)), None)
    path = (callback.best_model_path or callback.last_model_path) if callback else ""
    return Path(path) if path and os.path.exists(path) else None


def any_checkpoint(trainer: Trainer) -> bool:
    """Whether the run has saved one from which it could go on."""
    paths = [p for c in trainer.checkpoint_callbacks for p in (c.best_model_path, getattr(c, "last_model_path", ""))]
    return any(path and os.path.exists(path) for path in paths)


def _metrics(trainer: Trainer, prefix: str) -> dict[str, float]:
    return {
        name.removeprefix(prefix): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(prefix)
    }


def _relative(path: str | Path) -> str:
    """A path as short as it can be said from here."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)
