"""A run that is told to end, by Ctrl-C, SIGTERM or a cluster's scheduler, saves what it has done first."""

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
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from lightning.pytorch.trainer.states import TrainerFn

from rlhf_lightning.training.resume import INTERRUPTED, ProcessStates

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds that the batch under way may take after a signal; then the run ends as it is."""

_SAME = 0.5
"""Seconds in which signals are one request: `timeout` and torchrun send each of theirs twice."""

_WAKE, _CLOSE = 254, 255
"""What this process writes beside the numbers of signals."""


class Interrupted(SystemExit):
    """A run was ended by a signal, after it was saved; its exit code is 128 and the signal's number.

    0 in a process that another process of the run has started, and that would else be taken for one that failed.
    """

    def __init__(self, number: int, saved: Path | None, *, started_by_another: bool = False) -> None:
        super().__init__(0 if started_by_another else 128 + number)
        self.saved = saved


class Watch:
    """Hears signals as they come, also while the main thread computes or waits for other processes.

    The first is for the main thread to ask for (`received`). The process is ended at once by a second one, and when it
    has not come to the end of its batch within `PATIENCE`.
    """

    def __init__(self, trainer: Trainer, numbers: set[signal.Signals]) -> None:
        self.received = 0
        self._trainer, self._numbers = trainer, numbers
        self._first, self._deadline = 0.0, float("inf")
        self._saved = False
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
        self.received = self.received or number

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
            self._say(f"{name}: saved when the batch under way is done; a second signal ends the run at once")
        elif now - self._first > _SAME and not self._saved:
            self._end(number, "ended at once; what was done since the last checkpoint is lost")

    def _end(self, number: int, why: str) -> None:
        if not self._saved:
            self._say(why)
        launcher = self._trainer.strategy.launcher
        for process in getattr(launcher, "procs", ()):  # they may wait for this one
            with contextlib.suppress(OSError):
                process.kill()
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

    Under SLURM it takes the place of Lightning's handlers, which save in the middle of a batch. With automatic
    requeueing (Lightning's default there) the job is put back into the queue at the scheduler's signal.
    """

    def __init__(self, states: ProcessStates) -> None:
        self._states = states
        self._watch: Watch | None = None
        self._common_batches = 0
        """Batches of a validation that every process makes."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Not before: until then there is nothing to save, and Lightning's handlers end the run at once."""
        if self._watch is None and threading.current_thread() is threading.main_thread() and not trainer.fast_dev_run:
            self._watch = Watch(trainer, _signals(trainer))
            if trainer.received_sigterm:
                os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if number := self._asked(trainer):
            self._save_and_end(trainer, number)
        loop = trainer.fit_loop
        if self._watch is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._states.remember(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is not None:
            counts = trainer.num_val_batches
            own = counts[0] if isinstance(counts, list) else counts
            own = torch.tensor(-int(min(own, 2**31)), device=trainer.strategy.root_device)
            self._common_batches = -_largest(trainer, own)

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

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Interrupted):
            self._close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def _close(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _asked(self, trainer: Trainer) -> int:
        """The signal that any process has received, or 0."""
        if self._watch is None:
            return 0
        return _largest(trainer, torch.tensor(self._watch.received, device=trainer.strategy.root_device))

    def _save_and_end(self, trainer: Trainer, number: int) -> None:
        self._watch.note_saving()
        saved = _save(trainer)
        self._watch.note_saved()
        environment = trainer._accelerator_connector.cluster_environment
        if (
            isinstance(environment, SLURMEnvironment)
            and environment.auto_requeue
            and number == environment.requeue_signal
        ):
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                _requeue()
        started = not environment.creates_processes_externally and environment.local_rank() > 0
        raise Interrupted(number, saved, started_by_another=started)


def _largest(trainer: Trainer, number: torch.Tensor) -> int:
    """The largest of an integer, [] int64, over all processes."""
    if trainer.world_size > 1:
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
    return int(number)


def _signals(trainer: Trainer) -> set[signal.Signals]:
    """Those that ask a run to end, and that nobody else in this process has taken."""
    environment = trainer._accelerator_connector.cluster_environment
    taken = {signal.SIGINT, signal.SIGTERM}
    for number in (signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) is signal.SIG_DFL:
            taken.add(number)
    if isinstance(environment, SLURMEnvironment) and environment.requeue_signal is not None:
        number = environment.requeue_signal
        if signal.getsignal(number) is signal.SIG_DFL or isinstance(signal.getsignal(number), _HandlersCompose):
            taken.add(signal.Signals(number))
    return taken


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
