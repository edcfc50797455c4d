"""What killed processes left on the disk, told from what living ones are writing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Inside, a file or directory is not abandoned. That ends with the process, however it ends."""
    descriptor = _hold(path)
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held_directory(beside: Path) -> Iterator[Path]:
    """A new directory `.NAME.8 characters.part` beside a path of that name, held; it is not removed here."""
    while True:
        made = Path(tempfile.mkdtemp(dir=beside.parent, prefix=f".{beside.name}.", suffix=".part"))
        descriptor = _hold(made)
        # Another process may have taken it for abandoned before it was held.
        if made.is_dir() and os.path.samestat(os.fstat(descriptor), made.stat()):
            break
        os.close(descriptor)
    try:
        yield made
    finally:
        os.close(descriptor)


def is_abandoned(path: Path) -> bool:
    """Whether no living process holds a file or directory; False where the file system cannot tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _hold(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):  # without locks nothing is ever taken for abandoned
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return descriptor
