"""What killed processes left on the disk, told from what living ones are writing."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize
from pathlib import Path

log = logging.getLogger(__name__)

_TEMPORARY = "rlhf_lightning"


@contextlib.contextmanager
def held_directory(beside: Path) -> Iterator[Path]:
    """A new directory `.NAME.8 characters.part` beside a path of that name, removed in the end.

    No other process takes it for abandoned; that ends with this process, however it ends.
    """
    made, descriptor = _make_held(beside)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(descriptor)


@functools.cache
def temporary_directory() -> Path:
    """A directory of this process, for what can be kept nowhere else; removed when the process ends."""
    made, _ = _make_held(Path(tempfile.gettempdir()) / _TEMPORARY)
    # Unlike atexit's, it runs at the end of multiprocessing's processes too, and not in forked copies of this one.
    Finalize(None, shutil.rmtree, (made, True), exitpriority=0)
    return made


def remove_temporary_leftovers() -> None:
    """Remove the temporary directories of processes that were killed, and say so."""
    remove_abandoned(Path(tempfile.gettempdir()), _TEMPORARY)


def remove_abandoned(directory: Path, name: str | None = None, undo: Callable[[Path], object] = lambda _: None) -> None:
    """Remove what `held_directory` made in a directory, of processes that were killed, and say so.

    With `name`, only what lies beside a path of that name. `undo` is called with each of them first. Where the file
    system knows no locks, nothing is removed.
    """
    ours = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[a-z0-9_]{{8}}\.part")
    for path in sorted(directory.glob(".*.part")):
        if not ours.fullmatch(path.name) or path.is_symlink():
            continue
        with contextlib.suppress(OSError):  # held by a living process, or another user's, or gone in the meantime
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                undo(path)
                shutil.rmtree(path)
                log.info("%s: removed, left by a process that was killed", path)
            finally:
                os.close(descriptor)


def _make_held(beside: Path) -> tuple[Path, int]:
    """A new directory, and the descriptor that holds it until it is closed."""
    while True:
        made = Path(tempfile.mkdtemp(dir=beside.parent, prefix=f".{beside.name}.", suffix=".part"))
        descriptor = os.open(made, os.O_RDONLY)
        with contextlib.suppress(OSError):  # without locks nothing is ever taken for abandoned
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if made.is_dir():  # else another process took it for abandoned before it was held
            return made, descriptor
        os.close(descriptor)
