"""Seals of model directories: a hash of each file that was written, so that a damaged one is told before it is used."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import xxhash

from rlhf_lightning.errors import ModelError
from rlhf_lightning.files.locks import current_umask

MARK = "rlhf_lightning.json"
"""Stands in a directory that this package wrote, and so may replace; with the hashes."""
_HASHES = "files_xxh3_128"
_CHECKPOINT = "checkpoint"
_WEIGHTS = ".safetensors"
_MEND = f"export its checkpoint again, or, if you changed the files on purpose, remove {MARK} from the directory"


def seal(directory: Path, *, checkpoint: str | None = None) -> None:
    """Put all files of a new model on the disk, readable as the user's others are, and the mark with them.

    The mark names the checkpoint that the model was exported from. The model card may be edited, and so is not hashed.
    """
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != MARK]
    hashes = {str(file.relative_to(directory)): _hash(file) for file in files if file.name != "README.md"}
    mark = directory / MARK
    content = {"written_by": "rlhf_lightning", _CHECKPOINT: checkpoint, _HASHES: hashes}
    mark.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    for file in [*files, mark]:
        file.chmod(0o666 & ~current_umask())  # safetensors are written for the user alone
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def check_seal(directory: str | Path, *, weights: bool = True) -> None:
    """Compare the files of a model that this package wrote with their hashes. Raises `ModelError`.

    Without `weights`, all but those: 540 MB take 0.1 s. Files that have not changed since are not read again. Any
    other directory or name passes.
    """
    directory = Path(directory).expanduser()
    mark = directory / MARK
    if not mark.is_file():
        return
    try:
        stored = json.loads(mark.read_text(encoding="utf-8"))
        hashes = dict(stored.get(_HASHES, {}))
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{mark}: cannot be read, so nobody knows whether the model is whole; {_MEND}") from error
    for name, written in hashes.items():
        if _WEIGHTS in name and not weights:
            continue
        try:
            found = file_hash(directory / name)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ModelError(f"{directory / name}: {reason}, and it is a part of the model; {_MEND}") from error
        if found != written:
            raise ModelError(f"{directory / name}: damaged, since its bytes are not those that were written; {_MEND}")


def exported_from(directory: str | Path) -> str | None:
    """The checkpoint that the model in a directory was exported from, in words; None where this package wrote none."""
    mark = Path(directory).expanduser() / MARK
    if not mark.is_file():
        return None
    try:
        return json.loads(mark.read_text(encoding="utf-8"))[_CHECKPOINT] or "no checkpoint"
    except (ValueError, KeyError, TypeError):
        return "an unknown checkpoint"


def file_hash(file: Path) -> str:
    """128 bits of a file's bytes, in hexadecimal; one that has not changed since is not read again."""
    stat = file.stat()
    return _hash_of(file, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _hash_of(file: Path, *_in_this_state: int) -> str:
    return _hash(file)


def _hash(file: Path) -> str:
    digest, part = xxhash.xxh3_128(), bytearray(1 << 20)
    with open(file, "rb", buffering=0) as opened:
        while count := opened.readinto(part):
            digest.update(memoryview(part)[:count])
    return digest.hexdigest()
