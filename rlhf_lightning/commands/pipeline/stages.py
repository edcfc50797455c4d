"""The stages of a file, their settings, and all that they are made from, by content."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.files.packages import PACKAGE, package_path
from rlhf_lightning.files.seals import MARK

_PACKAGE = Path(__file__).parents[2]

_NO_INPUTS = {
    "fit": (
        *("trainer.logger", "trainer.callbacks", "trainer.default_root_dir"),
        *("model.engine_directory", "model.reference_cache", "data.cache_dir"),
    ),
    "evaluate": ("out",),
    "generate": ("out",),
    "contrast": ("out",),
    "judge": ("out",),
}
"""Beginnings of keys that name what a stage writes, or keeps for later runs."""

_LOGS = "events.out.tfevents.*"
"""All that an evaluation reads of the directories under its key `runs`, whose checkpoints may be large."""

_LIBRARIES = ("torch", "lightning", "transformers", "tokenizers")
_OPTIONAL = ("peft", "deepspeed", "bitsandbytes")
"""A stage that was done without one of them does not need it."""


@dataclass(frozen=True)
class Stage:
    """A stage as it is run."""

    name: str
    command: str
    arguments: list[str]
    settings: dict[str, Any]
    """All of them, defaults too, flat, under the names of their keys on the command line."""
    outputs: list[str]
    """The directories and files that it writes for others to use."""
    base: str = ""
    """Its name in the pipeline's file, where it is repeated."""
    iteration: int | None = None
    """From 1, where it is repeated."""


def check_order(stages: Sequence[Stage]) -> None:
    """Refuse two stages that write the same, and one that reads what a later one writes. `ConfigurationError`."""
    later: dict[Path, str] = {}
    for stage in reversed(stages):
        written = [Path(output).expanduser().resolve() for output in stage.outputs]
        for path in [*written, *(path.resolve() for _, path in paths_in(stage))]:
            if path in later:
                raise ConfigurationError(
                    f"pipeline: stage {stage.name} {'also writes' if path in written else 'reads'} {path}, which the "
                    f"later stage {later[path]} writes; change their order or their settings"
                )
        later |= dict.fromkeys(written, stage.name)


def paths_in(stage: Stage) -> Iterator[tuple[str, Path]]:
    """What may be files and directories that its settings name, each with its key; they need not exist."""
    for key, value in stage.settings.items():
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str) or not text or len(text) > 1000 or "\n" in text:
                continue
            text = text.removeprefix("judge://")
            if not key.startswith(_NO_INPUTS[stage.command]):
                with suppress(RuntimeError, ModelError):  # ~nobody; a package that is not there, which the stage says
                    yield key, package_path(text) if text.startswith(PACKAGE) else Path(text).expanduser()
            if re.fullmatch(r"[A-Za-z_][\w.]*(:\w+)?", text):  # module:function and the classes of the user
                parts = text.partition(":")[0].split(".")
                for count in range(1, len(parts) + 1):
                    yield key, Path(*parts[:count]).with_suffix(".py")


def program_inputs() -> dict[str, str]:
    """The versions of Python and of the libraries, and the content of this program."""
    inputs = {"python": platform.python_version()}
    for package in (*_LIBRARIES, *_OPTIONAL):
        with suppress(importlib.metadata.PackageNotFoundError):
            inputs[package] = importlib.metadata.version(package)
    return inputs | {"content of rlhf_lightning": content_hash(_PACKAGE)}


def inputs_of(stage: Stage, home: Path) -> dict[str, str]:
    """All that the outcome of a stage depends on, as far as it is known here: names and values, or hashes.

    `home` is the pipeline's directory.
    """
    inputs = {"command": stage.command, **program_inputs()}
    inputs |= {key: json.dumps(value, sort_keys=True, default=str) for key, value in stage.settings.items()}
    for key, path in paths_in(stage):
        if os.path.exists(path):
            logs_alone = (stage.command, key) == ("evaluate", "runs")
            inputs[f"content of {path}"] = content_hash(path, home, _LOGS if logs_alone else "*")
    return inputs


def content_hash(path: Path, home: Path | None = None, pattern: str = "*") -> str:
    """The hash of a file, or of the names and contents of all files in a directory that match a pattern.

    Of a directory that the pipeline's own one, `home`, lies in, the files are taken and not its directories. Where a
    model came from is no part of what it is.
    """
    path = path.expanduser().resolve()
    if path.is_file():
        return _file_hash(path)
    digest = xxhash.xxh3_128()
    shallow = home is not None and home.resolve().is_relative_to(path)
    for file in sorted(path.glob(pattern) if shallow else path.rglob(pattern)):
        if file.is_file() and "__pycache__" not in file.parts and file.name != MARK:
            digest.update(f"{file.relative_to(path)}\0{_file_hash(file)}\0".encode())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    status = path.stat()
    return _hash_in_state(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@functools.cache
def _hash_in_state(path: Path, *_: int) -> str:
    """Read once for each size, time and place on the disk: a model is an input of several stages."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What has changed, in words; empty when nothing has."""
    words = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name, "not set"), now.get(name, "not set")
        if old != new and not (name in _OPTIONAL and name not in before):
            words.append((name if name.startswith("content of ") else f"{name} {old} -> {new}")[:100])
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")
