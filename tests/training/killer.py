"""A callback that kills its run without a warning, as a machine does that loses power."""

from __future__ import annotations

import io
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from typing import Literal

import torch
from lightning.pytorch import Callback

Moment = Literal["batch", "validation", "checkpoint", "SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"]


def kill() -> None:
    """SIGKILL to all processes of the run, this one included."""
    os.killpg(os.getpgid(0), signal.SIGKILL)


def at_lines(files: Collection[str], act: Callable[[int], None]) -> None:
    """Call a function before each line of source files that this process runs from now on, with its number from 1."""
    lines = itertools.count(1)

    def trace(frame, event, _):
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            act(next(lines))
        return trace

    sys.settrace(trace)


def signal_at_line(files: Collection[str], line: int, number: int = signal.SIGKILL) -> None:
    """Let this process send itself a signal before the given one of the lines of source files that it will run."""
    at_lines(files, lambda now: os.kill(os.getpid(), number) if now == line else None)


def count_lines(files: Collection[str], into: str) -> None:
    """Keep the number of lines of source files that this process has run in a file."""
    written = os.open(into, os.O_WRONLY | os.O_CREAT)
    at_lines(files, lambda now: os.pwrite(written, str(now).encode(), 0))


class Killer(Callback):
    """Kills at the `count`th training batch, validation batch, or file of a checkpoint, half of which is written.

    Signals are sent at a training batch, or with `validating` at a validation batch. With `hangs` that batch does not
    end before a second signal. With `rank` that process alone gets them.
    """

    def __init__(
        self, moment: Moment, count: int, validating: bool = False, hangs: bool = False, rank: int | None = None
    ) -> None:
        self.moment, self.left, self.validating, self.hangs, self.rank = moment, count, validating, hangs, rank
        if moment == "checkpoint":
            self.save, torch.save = torch.save, self._save_half

    def on_train_batch_start(self, *_) -> None:
        self._at("batch")
        if not self.validating:
            self._send()

    def on_validation_batch_start(self, *_) -> None:
        self._at("validation")
        if self.validating:
            self._send()

    def _send(self) -> None:
        if not self.moment.startswith("SIG") or not self._at(self.moment):
            return
        if self.rank not in (None, int(os.environ.get("LOCAL_RANK", "0"))):
            return
        os.kill(os.getpid(), getattr(signal, self.moment))
        if self.hangs:
            time.sleep(0.6)
            os.kill(os.getpid(), getattr(signal, self.moment))
            time.sleep(1000)

    def _at(self, moment: Moment) -> bool:
        self.left -= moment == self.moment
        if moment == self.moment in ("batch", "validation") and self.left == 0:
            kill()
        return self.left == 0

    def _save_half(self, stored, file, *arguments, **named) -> None:
        written = ".ckpt" in str(getattr(file, "name", file))  # processes send each other objects by this way too
        if not written or not self._at("checkpoint"):
            return self.save(stored, file, *arguments, **named)
        content = io.BytesIO()
        self.save(stored, content, *arguments, **named)
        half = content.getvalue()[: content.tell() // 2]
        if isinstance(file, str | os.PathLike):
            with open(file, "wb") as opened:
                opened.write(half)
        else:
            file.write(half)
            file.flush()
        return kill()
