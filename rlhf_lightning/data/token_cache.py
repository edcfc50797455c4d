"""A cache on disk whose entries are named by all that they were made of, so that a stale one is never found."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from rlhf_lightning.files.disks import writing_to
from rlhf_lightning.files.leftovers import (
    held_directory,
    remove_abandoned,
    remove_temporary_leftovers,
    temporary_directory,
)
from rlhf_lightning.files.locks import current_umask

log = logging.getLogger(__name__)
_UNUSED_DAYS = 30
"""Entries that nobody has read for so long are removed when a new one is made."""
_CONTENTS = "contents.json"
"""In every entry: size and CRC-32 of its files, to recognize what a full or failing disk has damaged."""


def content_key(*parts: object) -> str:
    """A name for what is made of `parts` (things with a telling `repr`) by this version of the code."""
    return hashlib.sha256(repr((*parts, _code())).encode()).hexdigest()[:32]


def cached_directory(key: str, make: Callable[[Path], None], *, cache_dir: str | Path | None = None) -> Path:
    """The directory of an entry; `make(directory)` fills it when there is none.

    Other processes that want the same entry wait. The entry appears whole or not at all: it is made beside its place
    and renamed; one that is damaged later is made anew. `cache_dir` defaults to
    `$XDG_CACHE_HOME/rlhf_lightning/tokens`. Several users may share one: what is in it is read by all whom the umask of
    its maker lets, and where an entry cannot be made there, it lives in a temporary directory, for this process alone.
    """
    entry = _default_cache(cache_dir) / key
    remove_temporary_leftovers()
    remove_abandoned(entry.parent)
    if _is_whole(entry):  # of another user too, who may share it without letting us write
        _mark_as_read(entry)
        return entry
    cache = writable_cache(cache_dir)
    try:
        return _made(cache, key, make)
    except _OfAnother as error:
        log.warning("%s: belongs to another user, so token ids are kept for this process alone", error)
        return _made(temporary_directory(), key, make)


class _OfAnother(Exception):
    """Of what is in the way and cannot be written or removed."""


def _made(cache: Path, key: str, make: Callable[[Path], None]) -> Path:
    """An entry of a cache that can be written. Raises `_OfAnother`."""
    entry = cache / key
    lock = FileLock(cache / f"{key}.lock")
    try:
        proxy = lock.acquire()
    except PermissionError as error:
        raise _OfAnother(lock.lock_file) from error
    with proxy:
        _mark_as_read(lock.lock_file)  # or it would be removed, and two processes could hold two locks of one name
        if not _is_whole(entry):
            if entry.exists():
                log.warning("%s: this cache entry is damaged, so it is made again", entry)
            shutil.rmtree(entry, ignore_errors=True)
            if entry.exists():
                raise _OfAnother(entry)
            _prune(cache)
            with writing_to(cache), held_directory(entry) as made:
                make(made)
                (made / _CONTENTS).write_text(json.dumps(_checksums(made)), encoding="utf-8")
                made.chmod(0o777 & ~current_umask())  # it was made for its user alone
                made.rename(entry)
        _mark_as_read(entry)
    return entry


def _mark_as_read(path: str | Path) -> None:
    """Keep it from being removed as unused, where that is ours to say."""
    with suppress(PermissionError):
        os.utime(path)


def writable_cache(cache_dir: str | Path | None = None) -> Path:
    """The cache's directory, made if need be."""
    cache = _default_cache(cache_dir)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            return cache
    except OSError:
        pass
    log.warning("%s: cannot be written to, so token ids are kept for this process alone", cache)
    return temporary_directory()


def _default_cache(cache_dir: str | Path | None) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(cache_dir or home / "rlhf_lightning" / "tokens").expanduser()


def _is_whole(entry: Path) -> bool:
    """Whether an entry is there and holds what was written. Reads it once, at some 4 GB/s."""
    try:
        return json.loads((entry / _CONTENTS).read_text(encoding="utf-8")) == _checksums(entry)
    except (OSError, ValueError):
        return False


def _checksums(entry: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of each file of an entry."""
    files = {}
    for file in sorted(entry.iterdir()):
        if file.name != _CONTENTS:
            size = checksum = 0
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    size, checksum = size + len(block), zlib.crc32(block, checksum)
            files[file.name] = [size, checksum]
    return files


def _prune(cache: Path) -> None:
    oldest = time.time() - _UNUSED_DAYS * 24 * 3600
    for entry in cache.iterdir():
        try:
            if entry.stat().st_mtime < oldest:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        except OSError:  # another process was faster
            continue


@functools.cache
def _code() -> str:
    """Hash of the data room's sources, and of the versions of the libraries that make token ids."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    for name in ("tokenizers", "transformers", "jinja2", "pyarrow"):
        digest.update(importlib.metadata.version(name).encode())
    return digest.hexdigest()
