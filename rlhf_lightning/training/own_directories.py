"""The directories that a run writes, which no other run may write at the same time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from rlhf_lightning.training.callbacks import ExportBest

log = logging.getLogger(__name__)

VERSIONED = (TensorBoardLogger, CSVLogger)
"""Loggers that give each run a directory `version_N` of its own."""


def take_version(trainer: Trainer) -> None:
    """Make the directory of the next version, where none was asked for.

    Lightning looks for the highest number and makes the directory much later: two runs that begin together would share
    one, and each other's checkpoints.
    """
    loggers = [each for each in trainer.loggers if isinstance(each, VERSIONED) and each._version is None]
    number = max((each.version for each in loggers), default=0)
    while True:
        for each in loggers:
            each._version = number
        try:
            for directory in {each.log_dir for each in loggers}:
                Path(directory).mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return


def locks_of(trainer: Trainer) -> Iterator[tuple[Path, str]]:
    """The file that is locked for each directory that a training writes, and what to say where another run has it.

    The versions of the loggers come last, and are taken only then: a run that is refused leaves no empty one.
    """
    given = [each.dirpath for each in trainer.callbacks if isinstance(each, ModelCheckpoint)]
    if None in given and not trainer.loggers:
        directory = Path(trainer.default_root_dir) / "checkpoints"
        yield directory / ".lock", _busy(directory, "trainer.default_root_dir")
    for directory in filter(None, given):
        yield Path(directory) / ".lock", _busy(directory, "ModelCheckpoint.dirpath")
    for each in trainer.callbacks:
        if isinstance(each, ExportBest):
            path = Path(each.directory).expanduser()
            yield path.parent / f".{path.name}.lock", _busy(path, "ExportBest.directory")
    take_version(trainer)
    for each in trainer.loggers:
        if isinstance(each, VERSIONED):
            yield Path(each.log_dir) / ".lock", _busy(each.log_dir, "trainer.logger.init_args.name")


def _busy(directory: str | Path, key: str) -> str:
    return f"{directory}: another run is writing there; wait for its end, or give another {key}"
