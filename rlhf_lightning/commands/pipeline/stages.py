"""The stages of a file, their settings, and all that they are made from, by content."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import xxhash
import yaml
from jsonargparse.typing import Path_fr

from rlhf_lightning.errors import ConfigurationError, UserError

_PACKAGE = Path(__file__).parents[2]

_NO_INPUTS = {
    "fit": (
        *("trainer.logger", "trainer.callbacks", "trainer.default_root_dir"),
        *("model.engine_directory", "model.reference_cache", "data.cache_dir"),
    ),
    "evaluate": ("out",),
}
"""Beginnings of keys that name what a stage writes, or keeps for later runs."""

_LOGS = "events.out.tfevents.*"
"""All that an evaluation reads of the directories under its key `runs`, whose checkpoints may be large."""

_VERSIONED = ("torch", "lightning", "transformers", "tokenizers", "peft", "deepspeed")


@dataclass
class StageSettings:
    """One command of the program.

    Args:
        command: `fit` or `evaluate`.
        config: Its configuration, a path relative to the pipeline's file, or several that are layered.
        set: Keys as on its command line, and their values.
    """

    command: Literal["fit", "evaluate"]
    config: Path_fr | list[Path_fr] = field(default_factory=list)
    set: dict[str, Any] | None = None


@dataclass
class Settings:
    """A pipeline.

    Args:
        directory: Where state and logs are kept.
        stages: The stages in their order, by name.
        again: A stage, or several, to run from the beginning though nothing has changed.
        only: The only stage to run.
    """

    directory: str
    stages: dict[str, StageSettings]
    again: str | list[str] = field(default_factory=list)
    only: str | None = None


@dataclass(frozen=True)
class Stage:
    """A stage as it is run."""

    name: str
    command: str
    arguments: list[str]
    settings: dict[str, Any]
    """All of them, defaults too, flat, under the names of their keys on the command line."""
    outputs: list[str]
    """The directories that it writes for others to use."""


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The pipeline's own arguments, and those of each stage out of `--STAGE.KEY VALUE`."""
    own: list[str] = []
    of_stages: dict[str, list[str]] = {}
    current = own
    for argument in arguments:
        if key := re.match(r"--(?!stages\.)([\w-]+)\.", argument):
            current, argument = of_stages.setdefault(key[1], []), f"--{argument[key.end() :]}"
        elif argument.startswith("-"):
            current = own
        current.append(argument)
    return own, of_stages


def refuse_duplicates(arguments: Sequence[str]) -> None:
    """Raise `ConfigurationError` for a `--config` with two stages of one name, of which YAML keeps the last."""
    for option, file in itertools.pairwise(arguments):
        root = yaml.compose(Path(file).read_text(encoding="utf-8")) if option == "--config" else None
        for key, node in root.value if isinstance(root, yaml.MappingNode) else ():
            names = [name.value for name, _ in node.value] if key.value == "stages" else []
            if repeated := [name for name in names if names.count(name) > 1]:
                raise ConfigurationError(f"pipeline: {file}: duplicate stage {repeated[0]}; rename one")


def read_stages(given: Settings, of_stages: Mapping[str, Sequence[str]]) -> list[Stage]:
    """The stages with all their settings, as their own commands take them. Raises `ConfigurationError`."""
    if not given.stages:
        raise ConfigurationError("pipeline: no stages; write stages: {NAME: {command: fit, config: FILE}}")
    for name in of_stages:
        if name not in given.stages:
            raise ConfigurationError(f"pipeline: --{name}.KEY: no such stage; the stages are {', '.join(given.stages)}")
    stages = []
    for name, stage in given.stages.items():
        if not re.fullmatch(r"[A-Za-z][\w-]*", name):
            raise ConfigurationError(
                f"pipeline: stage {name}: a name consists of letters, digits, _ and -, since it names the log"
            )
        arguments: list[str] = []
        for config in stage.config if isinstance(stage.config, list) else [stage.config]:
            inside = Path(config.absolute).is_relative_to(Path.cwd())
            arguments += ["--config", os.path.relpath(config.absolute) if inside else config.absolute]
        for key, value in (stage.set or {}).items():
            arguments += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        arguments += of_stages.get(name, [])
        try:
            with redirect_stdout(io.StringIO()):
                settings, outputs = (_fit if stage.command == "fit" else _evaluate)(arguments)
        except (UserError, OSError) as error:
            raise ConfigurationError(f"pipeline: stage {name}: {error}") from error
        except SystemExit as error:
            raise ConfigurationError(f"pipeline: stage {name}: {' '.join(arguments)} runs nothing") from error
        stages.append(Stage(name, stage.command, arguments, dict(_flat(settings)), outputs))
    return stages


def parsed_fit(arguments: Sequence[str]) -> Any:
    """The `ParsedRun` of a fit. (Its type is not imported for the checker alone: jsonargparse would import it, too.)"""
    from rlhf_lightning.commands.fit import ParsedRun, run

    return run(["fit", *arguments], program=ParsedRun)


def _fit(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    parsed = parsed_fit(arguments)
    settings = yaml.safe_load(parsed.parser.dump(parsed.config, skip_validation=True))["fit"]
    callbacks = settings["trainer"].get("callbacks") or []
    exports = [each for each in callbacks if each["class_path"].rpartition(".")[2] == "ExportBest"]
    return settings, [each["init_args"]["directory"] for each in exports]


def _evaluate(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    from rlhf_lightning.commands.evaluate import parse

    settings = parse(arguments)
    return asdict(settings), [settings.out]


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Values under their keys as on the command line."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _flat(value, name if key == "init_args" else f"{name}.{key}".lstrip("."))
    elif isinstance(values, list) and any(isinstance(value, dict) for value in values):
        for number, value in enumerate(values):
            yield from _flat(value, f"{name}[{number}]")
    else:
        yield name, values


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
            if not key.startswith(_NO_INPUTS[stage.command]):
                with suppress(RuntimeError):  # ~nobody
                    yield key, Path(text).expanduser()
            if re.fullmatch(r"[A-Za-z_][\w.]*(:\w+)?", text):  # module:function and the classes of the user
                parts = text.partition(":")[0].split(".")
                for count in range(1, len(parts) + 1):
                    yield key, Path(*parts[:count]).with_suffix(".py")


def inputs_of(stage: Stage, home: Path) -> dict[str, str]:
    """All that the outcome of a stage depends on, as far as it is known here: names and values, or hashes.

    `home` is the pipeline's directory.
    """
    inputs = {"command": stage.command, "python": platform.python_version()}
    for package in _VERSIONED:
        with suppress(importlib.metadata.PackageNotFoundError):
            inputs[package] = importlib.metadata.version(package)
    inputs["content of rlhf_lightning"] = content_hash(_PACKAGE, home)
    inputs |= {key: json.dumps(value, sort_keys=True, default=str) for key, value in stage.settings.items()}
    for key, path in paths_in(stage):
        if os.path.exists(path):
            logs_alone = (stage.command, key) == ("evaluate", "runs")
            inputs[f"content of {path}"] = content_hash(path, home, _LOGS if logs_alone else "*")
    return inputs


def content_hash(path: Path, home: Path, pattern: str = "*") -> str:
    """The hash of a file, or of the names and contents of all files in a directory that match a pattern.

    Of a directory that the pipeline's own one, `home`, lies in, the files are taken and not its directories.
    """
    path = path.expanduser().resolve()
    if path.is_file():
        return _file_hash(path)
    digest = xxhash.xxh3_128()
    for file in sorted(path.glob(pattern) if home.resolve().is_relative_to(path) else path.rglob(pattern)):
        if file.is_file() and "__pycache__" not in file.parts:
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
        if old != new:
            words.append((name if name.startswith("content of ") else f"{name} {old} -> {new}")[:100])
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")
