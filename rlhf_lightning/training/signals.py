"""A run that is told to end, by Ctrl-C, SIGTERM or a cluster's scheduler, saves what it has done first.

Before its first batch and after its last one there is nothing to save, and it ends at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from rlhf_lightning.errors import with_causes
from rlhf_lightning.training.best import how_to_resume, newest_checkpoint
from rlhf_lightning.training.processes import over_processes
from rlhf_lightning.training.resume import INTERRUPTED, ProcessStates

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds that the batch under way may take after a signal; then the run ends as it is."""

_SAME = 0.5
"""Seconds in which signals are one request: `timeout` and torchrun send each of theirs twice."""

_WAKE, _CLOSE = 254, 255
"""What this process writes besides the numbers of signals."""


class Interrupted(SystemExit):
    """A run was ended by a signal; its exit code is 128 and the signal's number.

    0 in a process that another process of the run has started, and that would else be taken for one that failed, after
    a checkpoint was saved.
    """

    def __init__(self, number: int, saved: Path | None, *, started_by_another: bool = False) -> None:
        super().__init__(0 if started_by_another else 128 + number)
        self.number, self.saved = number, saved


class Watch:
    """Hears signals as they come, also while the main thread computes or waits for other processes.

    While there are `batches` to save, the first is for the main thread to ask for (`received`); else it raises
    `Interrupted` there. The process is ended at once by a second one, and when it has not come to the end of its batch,
    or of itself, within `PATIENCE`.
    """

    def __init__(self, trainer: Trainer, numbers: set[signal.Signals]) -> None:
        self.received = 0
        self.batches = False
        self._trainer, self._numbers = trainer, numbers
        self._first, self._deadline = 0.0, float("inf")
        self._noted = self._saved = False
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers = {number: signal.signal(number, self._note) for number in numbers}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        _watching.add(self)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def note_saving(self) -> None:
        """However long it takes to write a checkpoint, it is waited for."""
        self._deadline = float("inf")

    def note_saved(self) -> None:
        """All that is left is to end, with nothing to lose."""
        self._saved, self._deadline = True, time.monotonic() + PATIENCE
        os.write(self._write, bytes([_WAKE]))

    def close(self) -> None:
        """Give signals back the meaning that they had before."""
        _watching.discard(self)
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.write(self._write, bytes([_CLOSE]))
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _note(self, number: int, _: Any) -> None:
        first = not self._noted
        self._noted, self.received = True, self.received or number
        if first and not self.batches:
            raise Interrupted(number, None)

    def _listen(self) -> None:
        while True:
            left = self._deadline - time.monotonic()
            ready = select.select([self._read], [], [], None if left == float("inf") else max(left, 0.0))[0]
            if not ready and time.monotonic() >= self._deadline:
                self._end(self.received, f"the batch under way was not done after {PATIENCE:.0f} s")
            for number in os.read(self._read, 256) if ready else b"":
                if number == _CLOSE:
                    return
                if number in self._numbers:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if not self._first:
            self._first, self.received = now, self.received or number
            self._deadline = now + PATIENCE
            name = signal.Signals(number).name
            if self.batches:
                self._say(f"{name}: saved when the batch under way is done; a second signal ends the run at once")
        elif now - self._first > _SAME and not self._saved:
            self._end(number, "ended at once; what was done since the last checkpoint is lost")

    def _end(self, number: int, why: str) -> None:
        if not self._saved:
            newest = newest_checkpoint(self._trainer)
            self._say(f"{why}; {how_to_resume(newest)}" if newest else why)
        _end_others(self._trainer)
        os._exit(128 + number)

    def _say(self, words: str) -> None:
        if self._trainer.is_global_zero:
            with contextlib.suppress(OSError):  # a terminal that is gone
                print(f"rlhf-lightning: {words}", file=sys.stderr, flush=True)


_watching: set[Watch] = set()


def _forget_in_child() -> None:
    """What a forked process hears is not for its parent."""
    if _watching:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)


class SaveAtSignal(Callback):
    """At SIGINT, SIGTERM, SIGHUP or SIGUSR1, saves at the end of the batch and ends the run.

    Stands behind all other callbacks, so that the batch is done for each of them. The checkpoint is that of the
    `ModelCheckpoint` which keeps the newest one, or `interrupted-STEP.ckpt`. A validation is not waited for: the
    checkpoint is as of its beginning. Of several processes any may have got the signal; they agree after each batch.
    Before the first batch, and after the last, it ends the run at once.

    It takes the place of Lightning's handlers, which under SLURM save in the middle of a batch. With automatic
    requeueing (Lightning's default there) the job is put back into the queue at the scheduler's signal.
    """

    def __init__(self, states: ProcessStates) -> None:
        self._states = states
        self._watch: Watch | None = None
        self._common_batches = 0
        """Batches of a validation that every process makes."""

    @contextlib.contextmanager
    def listening(self, trainer: Trainer) -> Iterator[None]:
        """Inside, signals are heard, also while nothing is trained; and still after `Interrupted`, as the process ends.

        Not in another thread than the main one, whose signals they are.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        trainer._signal_connector.register_signal_handlers = lambda: None
        self._watch = Watch(trainer, _signals(trainer))
        try:
            yield
        except BaseException as error:
            # Raised between two lines of a library, it may come back as the cause of another error of that library.
            interrupted = next((each for each in with_causes(error) if isinstance(each, Interrupted)), None)
            if interrupted is None:
                self.close()
                raise
            if interrupted.saved is None:
                _end_others(trainer)
            if trainer.is_global_zero and _requeues(trainer, interrupted.number):
                _requeue()
            raise interrupted from None
        self.close()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self._watch is not None and not trainer.fast_dev_run:
            self._watch.batches = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if number := self._asked(trainer):
            self._save_and_end(trainer, number)
        loop = trainer.fit_loop
        if self._saving is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._states.remember(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saving is not None:
            counts = trainer.num_val_batches
            own = counts[0] if isinstance(counts, list) else counts
            own = torch.tensor(int(min(own, 2**31)), device=trainer.strategy.root_device)
            self._common_batches = int(over_processes(trainer, own, "min"))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING or not self._states.remembers(trainer):
            return  # within a hook of another callback, the batch is not done
        averaged = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # which swaps weights
        if averaged or dataloader_idx > 0 or batch_idx >= self._common_batches:
            return
        if number := self._asked(trainer):
            with self._states.as_remembered():
                self._save_and_end(trainer, number)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is left can be done again from the last checkpoint."""
        number = self._asked(trainer)
        if self._watch is not None:
            self._watch.batches = False
        if number:
            raise Interrupted(number, None)

    def close(self) -> None:
        """Hear no more signals."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    @property
    def _saving(self) -> Watch | None:
        """The watch, while there is something to save."""
        return self._watch if self._watch is not None and self._watch.batches else None

    def _asked(self, trainer: Trainer) -> int:
        """The signal that any process has received, or 0."""
        if (watch := self._saving) is None:
            return 0
        received = torch.tensor(watch.received, device=trainer.strategy.root_device)
        return int(over_processes(trainer, received, "max"))

    def _save_and_end(self, trainer: Trainer, number: int) -> None:
        assert self._watch is not None
        self._watch.note_saving()
        saved = _save(trainer)
        self._watch.note_saved()
        environment = trainer._accelerator_connector.cluster_environment
        trainer.strategy.barrier()
        started = not environment.creates_processes_externally and environment.local_rank() > 0
        raise Interrupted(number, saved, started_by_another=started)


def _end_others(trainer: Trainer) -> None:
    """Kill the processes that this one has started for the run: they may wait for it."""
    for process in getattr(trainer.strategy.launcher, "procs", ()):
        with contextlib.suppress(OSError):
            process.kill()


def _requeues(trainer: Trainer, number: int) -> bool:
    """Whether SLURM is to be asked to start this job again."""
    environment = trainer._accelerator_connector.cluster_environment
    return (
        isinstance(environment, SLURMEnvironment) and environment.auto_requeue and number == environment.requeue_signal
    )


def _signals(trainer: Trainer) -> set[signal.Signals]:
    """Those that ask a run to end, and that nobody else in this process has taken."""
    environment = trainer._accelerator_connector.cluster_environment
    taken = {signal.SIGINT, signal.SIGTERM}
    others = [signal.SIGHUP, signal.SIGUSR1]
    if isinstance(environment, SLURMEnvironment) and environment.requeue_signal is not None:
        others.append(signal.Signals(environment.requeue_signal))
    return taken | {number for number in others if signal.getsignal(number) is signal.SIG_DFL}


def _save(trainer: Trainer) -> Path | None:
    """Save the run; the path of a checkpoint that has all that was done, or None where nothing was or can be saved."""
    writers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    if trainer.global_step == 0 or not writers:
        return None
    for writer in writers:
        if writer.monitor is None and writer.save_top_k == 1 and not writer.save_weights_only:
            if writer._last_global_step_saved != trainer.global_step:
                writer._save_topk_checkpoint(trainer, writer._monitor_candidates(trainer))
            return Path(writer.best_model_path)
    path = Path(writers[0].dirpath) / INTERRUPTED.format(step=trainer.global_step)
    trainer.save_checkpoint(path)
    return path


def _requeue() -> None:
    """Put this job back into SLURM's queue."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        fault = done.stderr.strip() if done.returncode else None
    except OSError as error:
        fault = str(error)
    if fault is None:
        log.info("SLURM job %s: put back into the queue", job)
    else:
        log.warning("SLURM job %s: could not be put back into the queue (%s); start it again by hand", job, fault)
