"""Full disks: how they are told from other errors, by their place, and before anything is written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from rlhf_lightning.errors import ConfigurationError, UserError, with_causes
from rlhf_lightning.files.leftovers import held_directory

_REASONS = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than is allowed here",
}
_SAID = {
    errno.ENOSPC: r"No space left on device|os error 28\b|unexpected pos \d+ vs \d+|PytorchStreamWriter failed writing",
    errno.EDQUOT: r"Disk quota exceeded|os error 122\b",
    errno.EFBIG: r"File too large|os error 27\b",
}
"""What libraries make of it: safetensors and tokenizers (Rust), torch's writer of checkpoints, pyarrow."""


def full_disk(error: BaseException) -> str | None:
    """The reason, in words, where an error or one of its causes is a full disk; else None."""
    for cause in with_causes(error):
        if isinstance(cause, OSError) and cause.errno in _REASONS:
            return _REASONS[cause.errno]
        for number, said in _SAID.items():
            if not isinstance(cause, UserError) and re.search(said, str(cause)):
                return _REASONS[number]
    return None


def named_full_disk(error: BaseException, places: Iterable[str | Path]) -> ConfigurationError | None:
    """What to raise for a full disk: it names the file, or, where the error does not, the fullest of some places.

    Temporary files and caches lie in two more of them.
    """
    if (reason := full_disk(error)) is None:
        return None
    file = getattr(error, "filename", None)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    place = file or min([*places, tempfile.gettempdir(), caches], key=free_bytes)
    return ConfigurationError(
        f"{place}: {reason} ({size(free_bytes(place))} are free); make room, or give another path"
    )


@contextlib.contextmanager
def writing_to(path: str | Path) -> Iterator[None]:
    """Inside, a file or directory is written. Raises `ConfigurationError`, with its path, where the disk is full."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (reason := full_disk(error)) is None:
            raise
        raise ConfigurationError(
            f"{path}: could not be written, since {reason} ({size(free_bytes(path))} are free); make room, or give "
            "another path"
        ) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all, also after a power cut; text as UTF-8.

    Raises `ConfigurationError` where the disk is full.
    """
    content = content.encode() if isinstance(content, str) else content
    with writing_to(path), held_directory(path) as made:
        with (made / path.name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        (made / path.name).replace(path)


def check_room(path: str | Path, needed: float, what: str) -> None:
    """Raise `ConfigurationError` where less is free than something will take."""
    if (free := free_bytes(path)) < needed:
        raise ConfigurationError(
            f"{path}: {what} takes {size(needed)}, and {size(free)} are free there; make room, or give another path"
        )


def free_bytes(path: str | Path) -> float:
    """Free bytes where a file or directory is, or will be."""
    path = Path(path).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return float(shutil.disk_usage(path).free)


def size(count: float) -> str:
    """Bytes in words: `1.6 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("GB is the last unit")
