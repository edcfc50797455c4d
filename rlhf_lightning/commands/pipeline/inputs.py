"""What a stage is made from, by content: when nothing of it has changed, the stage is not run again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from rlhf_lightning import __version__
from rlhf_lightning.commands.pipeline.description import Stage
from rlhf_lightning.commands.pipeline.settings import Resolved, paths_in

_LOGS = "events.out.tfevents.*"
"""All that an evaluation reads of the directories under its key `runs`, whose checkpoints may be large."""

_VERSIONED = ("torch", "lightning", "transformers", "tokenizers", "peft", "deepspeed")


def inputs_of(stage: Stage, resolved: Resolved, contents: Contents, code: str) -> dict[str, str]:
    """All that the outcome of a stage depends on, as far as it is known here: names and values, or hashes."""
    inputs = {"command": stage.command, "the code of rlhf_lightning": code, "python": platform.python_version()}
    for package in _VERSIONED:
        with suppress(importlib.metadata.PackageNotFoundError):
            inputs[package] = importlib.metadata.version(package)
    inputs |= {key: json.dumps(value, sort_keys=True, default=str) for key, value in resolved.settings.items()}
    for key, path in paths_in(stage.command, resolved.settings):
        pattern = _LOGS if (stage.command, key) == ("evaluate", "runs") else "*"
        inputs[f"content of {path}"] = contents.of(path, pattern)
    return inputs


def own_code() -> str:
    """This package, by content: version and hash."""
    home, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(home.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(str(file.relative_to(home)).encode() + b"\0" + file.read_bytes() + b"\0")
    return f"{__version__} {digest.hexdigest()[:16]}"


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What has changed, in words; empty when nothing has."""
    words = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name.startswith(("content of ", "the code of ")):
            words.append(name if None not in (old, new) else f"{name}, which is {'new' if old is None else 'gone'}")
        else:
            words.append(f"{name} {old or 'not set'} -> {new or 'not set'}")
    more = f" and {len(words) - 3} more" if len(words) > 3 else ""
    return ", ".join(word[:100] for word in words[:3]) + more


class Contents:
    """SHA-256 of what files and directories hold.

    A file is read again only when its size, its times or its place on the disk have changed.

    Args:
        known: What was read before: each file's size, times, inode and hash.
        above: Of a directory in which this lies, the files are taken and not its directories.
    """

    def __init__(self, known: Mapping[str, list], above: Path) -> None:
        self.known = dict(known)
        self.above = above.resolve()

    def of(self, path: Path, pattern: str = "*") -> str:
        """The hash of a file, or of the names and contents of all files in a directory that are named so."""
        path = path.expanduser().resolve()
        if path.is_file():
            return self._file(path)
        digest = hashlib.sha256()
        files = path.glob(pattern) if self.above.is_relative_to(path) else path.rglob(pattern)
        for file in sorted(files):
            if file.is_file():
                digest.update(f"{file.relative_to(path)}\0{self._file(file)}\0".encode())
        return digest.hexdigest()

    def _file(self, path: Path) -> str:
        status = path.stat()
        mark = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        known = self.known.get(str(path))
        if known is not None and known[:4] == mark:
            return known[4]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time() - max(status.st_mtime, status.st_ctime) > 2:  # else another change could bear the same times
            self.known[str(path)] = [*mark, digest]
        return digest
