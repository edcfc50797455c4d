"""The results table, the export of the best network, and the file of predicted scores."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from rlhf_lightning.data.datamodules import chat_format_of
from rlhf_lightning.errors import ConfigurationError, UserError
from rlhf_lightning.files.adapters import check_base_of_others
from rlhf_lightning.files.disks import check_room, write_whole
from rlhf_lightning.files.seals import exported_from
from rlhf_lightning.models.objects import is_nameless
from rlhf_lightning.models.storage import check_free, check_other, replaced_model
from rlhf_lightning.terminal import Terminal, say, short_path
from rlhf_lightning.training.best import BestCheckpoint, best_checkpoint
from rlhf_lightning.training.checkpoints import metrics_of, read_checkpoint, save_format
from rlhf_lightning.training.checks import trained_module
from rlhf_lightning.training.model_card import write_card
from rlhf_lightning.training.module import Exportable, TrainedModule
from rlhf_lightning.training.processes import gathered
from rlhf_lightning.training.results import Results, table_rows

log = logging.getLogger(__name__)


class PairScores(NamedTuple):
    """Scores of B pairs, as `predict` returns them."""

    index: Tensor  # type: ignore[assignment]  # tuples have a method of this name
    """[B] int64, position of the pair in the evaluated data."""
    chosen: Tensor
    """[B] float32."""
    rejected: Tensor
    """[B] float32."""


class EnsembleScores(NamedTuple):
    """Scores of B pairs by several heads, as `predict` returns them: means, and standard deviations over the heads."""

    index: Tensor  # type: ignore[assignment]  # tuples have a method of this name
    """[B] int64, position of the pair in the evaluated data."""
    chosen: Tensor
    """[B] float32."""
    rejected: Tensor
    """[B] float32."""
    chosen_spread: Tensor
    """[B] float32."""
    rejected_spread: Tensor
    """[B] float32."""
    margin_spread: Tensor
    """[B] float32, of the difference of the two."""


class ResponseScores(NamedTuple):
    """What a policy says of B conversations, as `predict` returns it."""

    index: Tensor  # type: ignore[assignment]  # tuples have a method of this name
    """[B] int64, position of the conversation in the evaluated data."""
    logprob: Tensor
    """[B] float32, of all learned tokens of each, in nats."""


class ResponseRewards(NamedTuple):
    """Implicit rewards of B responses, as `predict` returns them."""

    index: Tensor  # type: ignore[assignment]  # tuples have a method of this name
    """[B] int64, position of the response in the evaluated data."""
    reward: Tensor
    """[B] float32, beta times the log-ratio of policy and reference."""


def print_results(trainer: Trainer) -> None:
    """Print the table of what a run measured, and where its files lie.

    After `fit` these are the numbers of the best checkpoint (of the newest where none is judged).
    """
    results = next((callback for callback in trainer.callbacks if isinstance(callback, Results)), None)
    if results is None or not trainer.is_global_zero:
        return
    if trainer.state.fn == TrainerFn.FITTING:
        _print_fit(results, best_checkpoint(trainer))
    elif results.metrics:
        _print_table({TrainerFn.TESTING: "test"}.get(trainer.state.fn, "validation"), results.metrics)
    for callback in trainer.callbacks:
        if isinstance(callback, ExportBest) and callback.exported:
            say(f"model:       {short_path(callback.directory)}" + callback.remark)
        elif isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            say(f"stopped early: {callback.stopping_reason_message}")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            say(f"TensorBoard: {short_path(logger.log_dir)}")


def _print_fit(results: Results, best: BestCheckpoint | None) -> None:
    """The numbers of a run's best checkpoint; of the last validation where that one was not validated."""
    if best is None:
        if results.metrics:
            _print_table("last validation", results.metrics)
        say("checkpoint:  none was saved")
        return
    stored = read_checkpoint(best.path, weights=False, verified=False)  # written a moment ago, and for a table alone
    step, which = stored["global_step"], "last" if best.monitor is None else "best"
    # A validation at the step of a checkpoint may have come after it.
    metrics = metrics_of(stored) or results.by_step.get(step, {})
    if metrics:
        _print_table(f"validation, {which} checkpoint (step {step}{'' if step else ', the start'})", metrics)
    elif results.by_step:
        validated, numbers = max(results.by_step.items())
        _print_table(f"validation at step {validated} (the checkpoint is of step {step})", numbers)
    say(f"checkpoint:  {short_path(best.path)}" + ("" if metrics else " (not validated)"))


def _print_table(title: str, metrics: dict[str, float]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    noun = next(noun for noun in ("pairs", "conversations", "responses") if noun in metrics)
    table.add_column(noun, justify="right")
    for name, words in table_rows(metrics):
        table.add_row(words, f"{metrics[name]:.4f}", f"{metrics[noun]:.0f}")
    Terminal(soft_wrap=True).print(table)


class ExportBest(Callback):
    """After `fit`, writes the best checkpoint's model and tokenizer as a Hugging Face directory.

    Where a run begins with a validation and none after it is better, that is its start, and a warning says so.

    Args:
        directory: Where to; an earlier export there is replaced, anything else is left alone and refused.
        merge: Merge LoRA adapters into the weights; false writes the adapters alone.
    """

    def __init__(self, directory: str, merge: bool = True) -> None:
        self.directory = Path(directory)
        self.merge = merge
        self.exported = False
        self.fault: str | None = None
        """Why nothing was exported, where it was not."""
        self._replaced: str | None = None
        self.remark = ""
        """What has to be said of the model that was exported."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what could not be written in the end, before any training. Raises `ConfigurationError`."""
        if not isinstance(pl_module, Exportable):
            raise ConfigurationError(
                f"ExportBest: a {type(pl_module).__name__} has no export; derive it from "
                "rlhf_lightning.training.module.TrainedModule, or leave the callback out"
            )
        if stage != "fit":
            return
        settings = pl_module.hparams
        if is_nameless(settings.get("backbone") or ""):
            raise ConfigurationError(
                "ExportBest: loads the best checkpoint again, which needs model.backbone by name, and the model object "
                "has none; call `export` of the module after `fit`, or save_pretrained the model and load it from there"
            )
        if not self.merge and settings.get("lora"):
            check_base_of_others(settings.backbone)
        check_other(self.directory, backbone=settings.get("backbone"), reference=settings.get("reference"))
        if check_free(self.directory):
            self._replaced = exported_from(self.directory)
            log.info("%s: the model there (from %s) will be replaced when the run ends", self.directory, self._replaced)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        best = best_checkpoint(trainer)
        if not trainer.is_global_zero:
            return
        self.fault = "no checkpoint was saved" if best is None else self._export(trainer, pl_module, best.path)
        self.exported = self.fault is None
        again = best is not None and self._replaced == short_path(best.path)  # as where it was killed since
        if self._replaced and not again:
            self.remark += f" (replaced the one from {self._replaced})"
        if self.fault:
            log.warning("%s: nothing is exported: %s", self.directory, self.fault)

    def _export(self, trainer: Trainer, pl_module: LightningModule, best: Path) -> str | None:
        """Write the directory, or return why not."""
        try:
            module, stored = trained_module(type(pl_module), best)
            if stored["global_step"] == 0:
                self.remark = " (UNTRAINED: the weights that the run began with, since no later validation was better)"
        except UserError as error:  # nothing was learned, or it was damaged in the meantime
            return str(error)
        try:
            check_room(self.directory, exported_bytes(module, merge=self.merge), "the model")
            with replaced_model(self.directory, checkpoint=short_path(best)) as made:
                if isinstance(pl_module, TrainedModule):  # which writes its tokenizer itself
                    module.chat_format = pl_module.format_to_export()
                module.export(made, merge=self.merge)
                if isinstance(pl_module, TrainedModule):
                    write_card(made, self.directory.name, stored, merged=self.merge)
                chat_format = chat_format_of(trainer.datamodule)
                if chat_format is not None and not isinstance(pl_module, TrainedModule):
                    save_format(chat_format, made)
        except ConfigurationError as error:  # a full disk; the checkpoint is there
            return f"{error}. Then export {short_path(best)}"
        return None


def exported_bytes(module: LightningModule, *, merge: bool) -> int:
    """What an export takes on the disk, but for the tokenizer: float32 weights, or adapters alone."""
    adapters = not merge and bool(module.hparams.get("lora"))
    return sum(4 * each.numel() for each in module.parameters() if each.requires_grad or not adapters)


class PredictionWriter(BasePredictionWriter):
    """Writes the scores of `predict` as JSON lines, in the order of the data.

    Each line holds `example_id`, `chosen`, `rejected` (scores) and `margin` (their difference), by several heads also
    the standard deviations over them, `chosen_spread`, `rejected_spread` and `margin_spread`; of a conversation
    `example_id` and `logprob`; of a judged response `example_id` and `reward`.

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
        parts = gathered(trainer, own)
        directory = Path(trainer.log_dir or trainer.default_root_dir)  # asked on every process: it is a broadcast
        if not trainer.is_global_zero:
            return
        path = Path(self.path) if self.path else directory / "predictions.jsonl"
        index, *scores = torch.cat(parts, dim=1)
        rows, names = trainer.datamodule.rows["test"], list(predictions[0]._fields[1:])
        if isinstance(predictions[0], PairScores | EnsembleScores):
            names, scores = [*names, "margin"], [*scores, scores[0] - scores[1]]
        lines = [
            json.dumps(
                {"example_id": rows.example_ids[int(index[row])]}
                | {name: score[row].item() for name, score in zip(names, scores, strict=True)}
            )
            for row in index.argsort().tolist()
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "\n".join(lines) + "\n")
        say(f"predictions: {short_path(path)} ({len(lines)} {rows.kind})")
