"""What one process writes, and no other at the same time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from rlhf_lightning.errors import ConfigurationError


@contextlib.contextmanager
def alone(lock: Path, busy: str) -> Iterator[None]:
    """Inside, no other process that asks for the same lock, a file that is made here, gets it.

    It ends with the process, however that ends, so a killed one stands in nobody's way. Directories that were made for
    the file alone are removed again. Where the file system knows no locks, nothing is locked. Raises
    `ConfigurationError` with `busy`, what to say when another process has it.
    """
    held = FileLock(lock, timeout=0)
    made = [directory for directory in lock.parents if not directory.exists()]
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        held.acquire()
    except Timeout as error:
        raise ConfigurationError(busy) from error
    except NotImplementedError:
        pass
    try:
        yield
    finally:
        if made and list(lock.parent.iterdir()) == [lock]:
            lock.unlink()
            with contextlib.suppress(OSError):  # another process has put something there
                for directory in made:
                    directory.rmdir()
        held.release()


def current_umask() -> int:
    """What the user takes from the permissions of new files."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
