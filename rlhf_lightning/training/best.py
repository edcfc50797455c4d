"""Which checkpoint of a run is its best: each is judged by the validation of its own weights."""

from __future__ import annotations

import itertools
import logging
import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.terminal import short_path

log = logging.getLogger(__name__)

_VALIDATION = "val/"


class BestCheckpoint(NamedTuple):
    """The checkpoint of a run that is exported, and whose numbers are shown."""

    path: Path
    monitor: str | None
    """The metric by which it is the best; None for the newest of a run that judges none."""


class SavingOrder(Callback):
    """Lets a checkpoint that a validation metric judges be saved right after a validation, and at no other time.

    Lightning would judge one that is saved after training steps, or at the end of an epoch, by the validation before
    it, which measured other weights. `every_n_train_steps` and `train_time_interval` still say how often: such a
    checkpoint is saved by the first validation after each multiple of the steps, or after each interval. Where a run
    begins with a validation, the start is saved too: it may be the best.

    Among checkpoints with equal values of the metric the latest is the best, which has learned from more data.

    At the end of a run that has saved no checkpoint, the final weights are saved.
    """

    def __init__(self) -> None:
        self.final: Path | None = None
        """The checkpoint of the final weights, where it was saved here."""
        self._validated_at = self._step = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give an average of the weights those that are not trained as they are; averaged with themselves they are
        rounded, and from a checkpoint of adapters alone others would be loaded than were validated."""
        for callback in trainer.callbacks:
            average = callback._average_model if isinstance(callback, WeightAveraging) else None
            if average is not None:
                for averaged, current in zip(average.module.parameters(), pl_module.parameters(), strict=True):
                    if not current.requires_grad:
                        averaged.data.copy_(current.data)

    def state_dict(self) -> dict[str, Any]:
        return {"validated_at": self._validated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validated_at = state_dict["validated_at"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises `ConfigurationError` for a file name with a number that is not known when the file is written."""
        for callback in trainer.callbacks:
            if isinstance(callback, EarlyStopping) and callback.monitor.startswith(_VALIDATION):
                callback._check_on_train_epoch_end = False
        for callback in _model_checkpoints(trainer):
            _keep_latest_of_equals(callback)
            if _judged_by_validation(callback):
                callback._save_on_train_epoch_end = False
            elif "{" + _VALIDATION in (callback.filename or "") and not callback._every_n_epochs:
                raise ConfigurationError(
                    f"ModelCheckpoint.filename: {callback.filename} names a validation metric, but the checkpoint is "
                    "saved between validations; leave the metric out, or give it as monitor"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """After a step, what the last validation measured is of other weights; Lightning then waits for the next."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        for name in [name for name in trainer.callback_metrics if name.startswith(_VALIDATION)]:
            del trainer.callback_metrics[name]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the same hook of each ModelCheckpoint, since Lightning keeps those at the end of its list."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        before, self._validated_at = self._validated_at, trainer.global_step
        for callback in filter(_judged_by_validation, _model_checkpoints(trainer)):
            every = callback._every_n_train_steps
            if trainer.global_step == 0:  # the start, of which Lightning thinks that it has been saved
                callback._last_global_step_saved = -1
                callback._defer_save_until_validation = True
            elif every:
                callback._defer_save_until_validation = self._validated_at // every > before // every

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks = list(_model_checkpoints(trainer))
        wanted = [callback for callback in callbacks if callback.save_top_k != 0]
        will_be = any(callback.save_last for callback in callbacks)  # by Lightning, later in this hook
        if (
            trainer.fast_dev_run
            or not wanted
            or will_be
            or trainer.strategy.broadcast(best_checkpoint(trainer) is not None)
        ):
            return
        path = trainer.strategy.broadcast(_free(Path(wanted[0].dirpath) / f"final-{trainer.global_step}.ckpt"))
        trainer.save_checkpoint(path, weights_only=wanted[0].save_weights_only)
        self.final = path
        missing = sorted({c.monitor for c in wanted if c.monitor and c.monitor not in trainer.callback_metrics})
        why = f"{', '.join(missing)} was not measured" if missing else "no ModelCheckpoint was due"
        log.warning("%s: the final weights, step %d; no other checkpoint, since %s", path, trainer.global_step, why)


def best_checkpoint(trainer: Trainer) -> BestCheckpoint | None:
    """The best checkpoint of the first monitored `ModelCheckpoint`, the newest one when none is monitored, or None.

    One whose monitored metric was no finite number is not the best of anything.
    """
    judged, others, last_choice = [], [], []
    for callback in _model_checkpoints(trainer):
        if callback.monitor is None:
            others.append(callback.best_model_path)
        elif callback.best_model_score is None or math.isfinite(callback.best_model_score):
            judged.append(BestCheckpoint(Path(_latest_best(callback)), callback.monitor))
        else:
            last_choice.append(callback.best_model_path)
        others.append(callback.last_model_path)
    others += _finals(trainer)
    for best in judged:
        if best.path.name and best.path.exists():
            return best
    for paths in (others, last_choice):
        existing = [Path(path) for path in paths if path and os.path.exists(path)]
        if existing:
            return BestCheckpoint(max(existing, key=lambda path: path.stat().st_mtime), None)
    return None


def newest_checkpoint(trainer: Trainer) -> Path | None:
    """The last checkpoint of a run that it can resume from; one of weights alone is none."""
    writers = [callback for callback in _model_checkpoints(trainer) if not callback.save_weights_only]
    saved = {path for c in writers for path in (c.best_model_path, c.last_model_path, *c.best_k_models)}
    existing = [Path(path) for path in saved if path and os.path.exists(path)]
    return max(existing, key=lambda path: path.stat().st_mtime_ns, default=None)


def how_to_resume(checkpoint: str | Path) -> str:
    """What to add to the command of a run, in a form that can be copied into a shell."""
    return f"resume with --ckpt_path {shlex.quote(short_path(checkpoint))}"


def _model_checkpoints(trainer: Trainer) -> Iterator[ModelCheckpoint]:
    return (callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint))


def _finals(trainer: Trainer) -> Iterator[Path]:
    return (c.final for c in trainer.callbacks if isinstance(c, SavingOrder) and c.final is not None)


def _judged_by_validation(callback: ModelCheckpoint) -> bool:
    return (callback.monitor or "").startswith(_VALIDATION)


def _keep_latest_of_equals(callback: ModelCheckpoint) -> None:
    """Let a value that equals the worst of those kept replace it, where Lightning keeps the earlier checkpoint."""
    is_better = type(callback).check_monitor_top_k

    def check(trainer: Trainer, current: Tensor | None = None) -> bool:
        if current is None or is_better(callback, trainer, current):
            return current is not None
        equal = callback.best_k_models[callback.kth_best_model_path] == current
        return trainer.strategy.reduce_boolean_decision(bool(equal))

    callback.check_monitor_top_k = check


def _latest_best(callback: ModelCheckpoint) -> str:
    """The latest checkpoint whose value is the best."""
    best = [path for path, score in callback.best_k_models.items() if score == callback.best_model_score]
    return best[-1] if best else callback.best_model_path


def _free(path: Path) -> Path:
    """The path, or one beside it where there is a file already."""
    beside = (path.with_name(f"{path.stem}-v{number}{path.suffix}") for number in itertools.count(1))
    return next(each for each in itertools.chain([path], beside) if not each.exists())
