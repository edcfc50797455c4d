"""Resuming a run that was killed, as if it had not been: its position, and every number that it held in memory."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.fit_loop import _FitLoop
from torchmetrics import Metric

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.training.checkpoints import fault_of, has_states, read_checkpoint, remove
from rlhf_lightning.training.module import TrainedModule
from rlhf_lightning.training.optimization import warn_of_another_schedule
from rlhf_lightning.training.processes import gathered
from rlhf_lightning.training.validation import validate

log = logging.getLogger(__name__)

LAST = "last"
"""The `ckpt_path` that stands for the newest whole checkpoint of a run."""

INTERRUPTED = "interrupted-{step}.ckpt"
"""Name of a checkpoint that was saved at a signal where no `ModelCheckpoint` keeps the newest one."""

_KEY = "processes"
_JOB = "slurm_job"
_SAVED_AT = "saved_at_step"


class BeforeValidation(NamedTuple):
    """What a validation between two batches changes of what a checkpoint holds, as it is before."""

    batches: int
    """Batches made by then."""
    loops: dict[str, Any]
    states: dict[str, Any]


class ProcessStates(Callback):
    """Keeps in each checkpoint what each process holds besides weights and optimizer: the states of its random-number
    generators, and the numbers that have gone into the next line of the training log.

    A checkpoint inside an accumulation, as a validation there may write, has no gradients in it. It is written as of
    the beginning of the accumulation, so that the run which resumes from it makes those batches again.

    Args:
        replace: Remove the checkpoint that a run went on from once a newer or better one takes its place. Not for one
            that the user named.
    """

    def __init__(self, *, replace: bool = False) -> None:
        self.replace = replace
        self._loaded: dict[str, Any] | None = None
        self._gone_on_from: Path | None = None
        self._step_began: dict[str, Any] = {}
        self._batches_made, self._epoch = (0, 0), 0
        self._epoch_to_end: EpochEnd | None = None
        self._before_validation: BeforeValidation | None = None
        self._saves_as_remembered = False
        self._named: list[str] = []
        self._saved_at: defaultdict[str, int] = defaultdict(int)
        """The step at which each `ModelCheckpoint` had last saved, by its `state_key`."""

    def state_dict(self) -> dict[str, Any]:
        return {"named": self._named}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._named = state_dict.get("named", [])

    def remember(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what a validation after this batch will change, so that a checkpoint can be saved within it."""
        loops = copy.deepcopy(trainer._checkpoint_connector._get_loops_state_dict())
        ready = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self._before_validation = BeforeValidation(ready, loops, _states(pl_module))

    def remembers(self, trainer: Trainer) -> bool:
        """Whether a validation between two batches is under way, whose beginning is remembered."""
        batches = trainer.fit_loop.epoch_loop.batch_progress.total
        kept = self._before_validation
        return kept is not None and kept.batches == batches.ready == batches.completed

    @contextlib.contextmanager
    def as_remembered(self) -> Iterator[None]:
        """Inside, a checkpoint is that of the beginning of the validation."""
        self._saves_as_remembered = True
        try:
            yield
        finally:
            self._saves_as_remembered = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.accumulate_grad_batches > 1 and batch_idx % trainer.accumulate_grad_batches == 0:
            self._step_began = _states(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        open_batches = batches_of_open_step(trainer)
        states_now = _states(pl_module)
        if self._saves_as_remembered and (before := self._before_validation) is not None:
            checkpoint["loops"], states_now = copy.deepcopy(before.loops), before.states
        own = self._step_began if open_batches else states_now
        checkpoint[_KEY] = gathered(trainer, own)
        checkpoint[_JOB] = os.environ.get("SLURM_JOB_ID")
        checkpoint[_SAVED_AT] = {writer.state_key: writer._last_global_step_saved for writer in _writers(trainer)}
        if open_batches:
            _rewind(trainer, checkpoint, open_batches)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get(_KEY)
        if states is not None and len(states) == trainer.world_size:
            self._loaded = states[trainer.global_rank]
        self._saved_at = defaultdict(int, checkpoint.get(_SAVED_AT, {}))
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        self._batches_made, self._epoch = (
            (progress["total"]["ready"], progress["current"]["ready"]),
            checkpoint["epoch"],
        )
        self._epoch_to_end = EpochEnd.of(checkpoint["loops"]["fit_loop"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As late as can be, so that nothing is drawn in between."""
        self._replace_older(trainer)
        if trainer.ckpt_path is not None:
            warn_of_another_schedule(trainer)
        if self._loaded is None:
            return
        for name, states in self._loaded["metrics"].items():
            metric = pl_module.get_submodule(name)
            for state, value in states.items():
                setattr(metric, state, value.to(metric.device))
            metric._update_count = 1  # else compute() warns that nothing has been fed
        logged_step = self._loaded["logged_step"]
        _set_random_states(self._loaded["random"])
        self._loaded = None
        if isinstance(pl_module, TrainedModule):
            pl_module.logged_step = logged_step
            pl_module.log_numbers()  # the checkpoint was written before they were
        if self._epoch_to_end is not None:
            self._epoch_to_end.restore(trainer.fit_loop)
        if self._validation_is_due(trainer):
            validate(trainer)
        if self._epoch_to_end is not None:
            self._epoch_to_end.finish(trainer.fit_loop)
        for writer in _writers(trainer):  # in an accumulation, validations may follow that are of the same step
            wrote_it = trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve() in _kept(writer)
            writer._last_global_step_saved = trainer.global_step if wrote_it else self._saved_at[writer.state_key]

    def _validation_is_due(self, trainer: Trainer) -> bool:
        """Whether the checkpoint was written after a batch that a validation follows."""
        (total, current), every = self._batches_made, trainer.check_val_every_n_epoch
        made, epoch_counts = (total, True) if every is None else (current, (self._epoch + 1) % every == 0)
        return trainer.enable_validation and epoch_counts and made > 0 and made % trainer.val_check_batch == 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning keeps the checkpoint that a run went on from; where there is a newer or better, it is removed."""
        path = self._gone_on_from
        if path is None:
            return
        kept = set().union(*(_kept(writer) for writer in _writers(trainer)))
        if (_writer(trainer, path) is not None or _saved_at_signal(path)) and kept and path.resolve() not in kept:
            trainer.strategy.remove_checkpoint(path)

    def _replace_older(self, trainer: Trainer) -> None:
        """A checkpoint of the newest alone names, in its own record, the one before it."""
        self._gone_on_from = None
        if trainer.ckpt_path is None:
            return
        path = Path(trainer.ckpt_path)
        if not self.replace:
            self._named = [*self._named, str(path.resolve())]
            return
        self._gone_on_from, writer = path, _writer(trainer, path)
        if writer is not None and writer.monitor is None:
            writer.best_model_path = str(path)
        if trainer.is_global_zero:
            self._remove_stale(trainer, path)

    def _remove_stale(self, trainer: Trainer, gone_on_from: Path) -> None:
        """Remove what attempts at this run that were broken off have left, and say so."""
        step, spared = trainer.global_step, {gone_on_from.resolve(), *map(Path, self._named)}
        stale = [path for writer in _writers(trainer) for path in _stale(writer, step, spared)]
        for path in (stale := sorted({*stale})):
            remove(path)
        if stale:
            names = ", ".join(path.name for path in stale)
            log.info("%s: removed, left by attempts at this run that were broken off: %s", stale[0].parent, names)


class EpochEnd(NamedTuple):
    """The counts of a checkpoint that was written after an epoch's last batch.

    Lightning 2.6 counts the next epoch wrongly when it goes on from one: the checkpoints that it writes then say that
    their epoch is over, and a second run that goes on from them leaves batches and validations out, or makes them
    twice (`_FitLoop._restart_stage`). Here the epoch is ended as in an unbroken run, with its hooks, and the next one
    begins like any other.
    """

    epochs: int
    """Those before it."""
    hooks_ran: bool
    """Whether it was written within the hooks at the end of the epoch, which are not run again."""
    batches_that_stepped: int
    """What loggers count, after the last batch."""

    @classmethod
    def of(cls, progress: dict[str, Any]) -> EpochEnd | None:
        """From the state of the loops in a checkpoint; None where batches of the epoch are left."""
        epoch, batches = progress["epoch_progress"]["current"], progress["epoch_loop.batch_progress"]
        if not batches["is_last_batch"]:
            return None
        hooks_ran = epoch["processed"] == epoch["started"]
        stepped = progress["epoch_loop.state_dict"]["_batches_that_stepped"]
        return cls(epoch["started"] - 1, hooks_ran, stepped + (not hooks_ran))

    def restore(self, loop: _FitLoop) -> None:
        """Take back what Lightning has made of the counts."""
        for counts in (loop.epoch_progress.total, loop.epoch_progress.current):
            counts.ready = counts.started = self.epochs + 1
            counts.processed = counts.completed = self.epochs
        for counts in (loop.epoch_loop.batch_progress.total, loop.epoch_loop.batch_progress.current):
            counts.started = counts.processed = counts.completed = counts.ready
        loop.epoch_loop._batches_that_stepped = self.batches_that_stepped

    def finish(self, loop: _FitLoop) -> None:
        """End the epoch, and let the next one begin as in a run that was not broken."""
        if self.hooks_ran:
            loop.epoch_progress.increment_processed()
            loop.epoch_progress.increment_completed()
        else:
            loop.on_advance_end()
        for each in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
            each.on_iteration_done()


def _states(module: LightningModule) -> dict[str, Any]:
    """What a process holds in memory alone. Metrics of whole splits begin anew with each validation."""
    metrics = {
        name: {state: value.detach().cpu().clone() for state, value in metric.metric_state.items()}
        for name, metric in module.named_modules()
        if isinstance(metric, Metric) and not name.startswith(("val_", "test_")) and metric.update_called
    }
    logged_step = module.logged_step if isinstance(module, TrainedModule) else 0
    return {"random": _random_states(), "metrics": metrics, "logged_step": logged_step}


def batches_of_open_step(trainer: Trainer) -> int:
    """Batches since the last optimizer step, the current one included."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return 0 if progress.is_last_batch else progress.current.ready % trainer.accumulate_grad_batches


def _rewind(trainer: Trainer, checkpoint: dict[str, Any], batches: int) -> None:
    """Take batches back in all that a checkpoint counts."""
    loops = checkpoint["loops"]["fit_loop"]
    for counts in (loops["epoch_loop.batch_progress"][name] for name in ("total", "current")):
        counts.update(dict.fromkeys(counts, counts["ready"] - batches))
    for counts in loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["zero_grad"].values():
        counts.update({name: count - 1 for name, count in counts.items()})  # once, before the first of them
    data = trainer.datamodule
    if data is not None and "train_loader" in checkpoint.get(type(data).__qualname__, {}):
        checkpoint[type(data).__qualname__]["train_loader"]["batches"] -= batches
    for position in loops["state_dict"].get("combined_loader", ()):
        position["batches"] -= batches


def _writers(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _writer(trainer: Trainer, path: Path) -> ModelCheckpoint | None:
    """The callback that keeps one checkpoint, the best or the newest, and wrote this one."""
    for writer in _writers(trainer):
        made = writer.save_top_k == 1 and _name_pattern(writer).fullmatch(path.name)
        if made and path.parent.resolve() == Path(writer.dirpath or "").resolve():
            return writer
    return None


def _name_pattern(writer: ModelCheckpoint) -> re.Pattern[str]:
    """The names of the files that a callback writes."""
    number = r"(-?\d+(\.\d+)?(e[-+]?\d+)?|nan|inf|-inf)"
    parts = re.split(r"\{(.*?)(?::.*?)?\}", writer.filename or "{epoch}-{step}")
    for position, part in enumerate(parts):
        named = f"{re.escape(part)}=" if writer.auto_insert_metric_name else ""
        parts[position] = named + number if position % 2 else re.escape(part)
    return re.compile("".join(parts) + rf"(-v\d+)?{re.escape(writer.FILE_EXTENSION)}")


def _kept(writer: ModelCheckpoint) -> set[Path]:
    paths = (writer.best_model_path, writer.last_model_path, *writer.best_k_models)
    return {Path(path).resolve() for path in paths if path}


def _saved_at_signal(path: Path) -> bool:
    return re.fullmatch(INTERRUPTED.format(step=r"\d+").replace(".", r"\."), path.name) is not None


def _stale(writer: ModelCheckpoint, step: int, spared: set[Path]) -> Iterator[Path]:
    """Files of a callback that it would have removed by the given step if it had not been killed, and half files."""
    directory, kept = Path(writer.dirpath or ""), _kept(writer)
    yield from directory.glob(".*.ckpt.part")
    newest = writer.monitor is None and writer.save_top_k == 1
    best = writer.monitor is not None and writer.save_top_k > 0 and len(writer.best_k_models) > 0
    for path in directory.glob("*.ckpt"):
        ours = _saved_at_signal(path) or ((newest or best) and _name_pattern(writer).fullmatch(path.name))
        if not ours or path.resolve() in kept | spared:
            continue
        try:
            saved_at = read_checkpoint(path, weights=False, verified=False)["global_step"]
        except ConfigurationError:  # damaged, and named before
            continue
        if saved_at < step or (saved_at == step and not best):
            yield path


def _random_states() -> dict[str, Any]:
    state = np.random.get_state()
    assert isinstance(state, tuple)
    name, keys, *rest = state
    version, numbers, gauss = random.getstate()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if len(states["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def is_requeued() -> bool:
    """Whether SLURM has started this job again, of which an earlier attempt may have saved checkpoints."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and SLURMEnvironment.detect()


def resolve_last(config: Namespace, *, job: str | None = None) -> None:
    """Put the newest whole checkpoint of a run in the place of `ckpt_path: last`; the run resumes in its directory.

    `config` holds the settings of a subcommand. Without any checkpoint the run starts over. One that is not whole is
    named, and the one before it taken. With `job`, checkpoints of that job of SLURM alone count.
    """
    candidates = [path for directory in _directories(config) for path in directory.glob("*.ckpt")]
    found: list[tuple[int, float, Path]] = []
    for path in candidates:
        try:
            stored = read_checkpoint(path, weights=False, verified=False)
        except ConfigurationError:
            log.warning("%s: is not whole (cannot be read); looking for the one before it", path)
            continue
        if not has_states(stored):
            log.warning("%s: holds weights alone and cannot be resumed; looking for another one", path)
            continue
        if job is None or stored.get(_JOB) == job:
            found.append((stored["global_step"], path.stat().st_mtime, path))
    config.ckpt_path = None
    for step, _, path in sorted(found, reverse=True):
        if (fault := fault_of(path)) is not None:
            log.warning("%s: is not whole (%s); looking for the one before it", path, fault)
            continue
        log.info("resuming from %s (step %d)", path, step)
        config.ckpt_path = str(path)
        return
    if candidates and job is None:
        raise ConfigurationError(
            f"ckpt_path: last: none of the {len(candidates)} checkpoints in {candidates[0].parent} can be resumed "
            "(see above); leave ckpt_path out to start over at step 0"
        )
    log.warning("ckpt_path: last: no checkpoint of this run yet; beginning at step 0")


def _directories(config: Namespace) -> list[Path]:
    """Where the checkpoints of a run lie: where its callbacks say, or in the newest version of its log that has any."""
    callbacks = config.trainer.callbacks or []
    arguments = [c.get("init_args") or {} for c in callbacks if str(c.get("class_path")).endswith("ModelCheckpoint")]
    if given := {a["dirpath"] for a in arguments if a.get("dirpath")}:
        return [Path(path) for path in sorted(given)]
    if (parent := _log_directory(config)) is None:
        raise ConfigurationError(
            "ckpt_path: last needs to know where the checkpoints are; give trainer.logger a save_dir and a name, or "
            "ModelCheckpoint a dirpath"
        )
    numbers = [
        int(match[1]) for path in parent.glob("version_*") if (match := re.fullmatch(r"version_(\d+)", path.name))
    ]
    for number in sorted(numbers, reverse=True):
        directory = parent / f"version_{number}" / "checkpoints"
        if any(directory.glob("*.ckpt")):
            return [directory]
    return []


def _log_directory(config: Namespace) -> Path | None:
    logger = config.trainer.logger
    arguments = logger.get("init_args") if isinstance(logger, Namespace) else None
    versioned = str(getattr(logger, "class_path", "")).endswith(("TensorBoardLogger", "CSVLogger"))
    if not versioned or not arguments or arguments.get("save_dir") is None:
        return None
    return Path(arguments["save_dir"]) / (arguments.get("name") or "")


def go_on_beside(config: Namespace, checkpoint: Path) -> None:
    """Let the logger write on in the directory of a checkpoint, so that it is one curve, and one best checkpoint."""
    match = re.fullmatch(r"version_(\d+)", checkpoint.parent.parent.name)
    parent = _log_directory(config)
    if match and parent is not None and checkpoint.parent.parent.parent.resolve() == parent.resolve():
        config.trainer.logger.init_args["version"] = int(match[1])
