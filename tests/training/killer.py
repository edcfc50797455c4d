"""A callback that kills its run without a warning, as a machine does that loses power."""

from __future__ import annotations

import io
import os
import signal
from typing import Literal

import torch
from lightning.pytorch import Callback

Moment = Literal["batch", "validation", "checkpoint", "SIGTERM", "SIGINT"]


def kill() -> None:
    """SIGKILL to all processes of the run, this one included."""
    os.killpg(os.getpgid(0), signal.SIGKILL)


class Killer(Callback):
    """Kills at the `count`th training batch, validation batch, or file of a checkpoint, half of which is written.

    `SIGTERM` and `SIGINT` are sent at a training batch.
    """

    def __init__(self, moment: Moment, count: int) -> None:
        self.moment, self.left = moment, count
        if moment == "checkpoint":
            self.save, torch.save = torch.save, self._save_half

    def on_train_batch_start(self, *_) -> None:
        self._at("batch")
        for name in ("SIGTERM", "SIGINT"):
            if self.moment == name and self._at(name):
                os.kill(os.getpid(), getattr(signal, name))

    def on_validation_batch_start(self, *_) -> None:
        self._at("validation")

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
