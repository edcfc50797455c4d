"""A pipeline's file, read and checked."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.files.yaml_text import check_yaml

STAGE_COMMANDS = ("fit", "evaluate")
"""What a stage can be."""


@dataclass(frozen=True)
class Stage:
    """One command of the program, with its arguments."""

    name: str
    command: Literal["fit", "evaluate"]
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Pipeline:
    """A file, read and checked."""

    file: Path
    directory: Path
    stages: tuple[Stage, ...]


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would keep the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = [key.value for key, _ in node.value]
    for key, where in ((key.value, key.start_mark.line + 1) for key, _ in node.value):
        if keys.count(key) > 1:
            raise ConfigurationError(f"line {where}: {key} stands twice; rename one")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_pipeline(file: str | Path, *, directory: str | None = None, overrides: Sequence[str] = ()) -> Pipeline:
    """Read and check the file of a pipeline. Raises `ConfigurationError`.

    Args:
        file: YAML with `directory` and `stages`.
        directory: In place of the file's.
        overrides: Further arguments, `--STAGE.KEY VALUE`.
    """
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8")
        check_yaml(text)
        content = yaml.load(text, _Loader)
    except OSError as error:
        raise ConfigurationError(f"pipeline: {file}: {error.strerror}; give the file of a pipeline") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"pipeline: {file}: is no YAML ({error})") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"pipeline: {file}: {error}") from error
    _check_keys(content, ("directory", "stages"), f"pipeline: {file}")
    stages = content.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise ConfigurationError(
            f"pipeline: {file}: has no stages; write stages: {{NAME: {{command: fit, config: FILE}}}}"
        )
    directory = directory or content.get("directory")
    if not isinstance(directory, str):
        raise ConfigurationError(f"pipeline: {file}: directory must say where state and logs are kept")
    added = _overrides(overrides, [str(name) for name in stages])
    made = [_stage(file, str(name), values, added[str(name)]) for name, values in stages.items()]
    return Pipeline(file, Path(directory).expanduser(), tuple(made))


def _check_keys(values: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(values, dict):
        raise ConfigurationError(f"{where}: must be a mapping with the keys {', '.join(known)}")
    for key in values:
        if key not in known:
            raise ConfigurationError(f"{where}: unknown key {key!r}; use {', '.join(known)}")


def _stage(file: Path, name: str, values: Any, added: list[str]) -> Stage:
    where = f"pipeline: {file}: stage {name}"
    if not re.fullmatch(r"[A-Za-z][\w-]*", name):
        raise ConfigurationError(f"{where}: a name is made of letters, digits, _ and -, for it names the log")
    _check_keys(values, ("command", "config", "set"), where)
    command = values.get("command")
    if command not in STAGE_COMMANDS:
        raise ConfigurationError(f"{where}: unknown command {command!r}; use one of {', '.join(STAGE_COMMANDS)}")
    configs = values.get("config", [])
    configs = configs if isinstance(configs, list) else [configs]
    arguments: list[str] = []
    for config in configs:
        path = file.parent / str(config)
        if not path.is_file():
            raise ConfigurationError(f"{where}: config: {path} is no file; paths are relative to {file.parent}")
        inside = path.resolve().is_relative_to(Path.cwd())
        arguments += ["--config", os.path.relpath(path) if inside else str(path)]
    settings = values.get("set") or {}
    if not isinstance(settings, dict):
        raise ConfigurationError(f"{where}: set: must be a mapping of keys, such as model.beta: 0.2")
    for key, value in settings.items():
        if command == "fit" and isinstance(value, dict) and "." not in str(key):
            raise ConfigurationError(f"{where}: set: write whole keys, such as {key}.{next(iter(value), 'name')}: ...")
        arguments += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return Stage(name, command, (*arguments, *added))


def _overrides(arguments: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """The arguments of each stage out of `--STAGE.KEY VALUE`."""
    added: dict[str, list[str]] = {name: [] for name in names}
    name = None
    for argument in arguments:
        if argument.startswith("--"):
            name, dot, key = argument.removeprefix("--").partition(".")
            if name not in added or not dot:
                raise ConfigurationError(
                    f"pipeline: {argument}: no such argument; a key of a stage is --STAGE.KEY, and the stages are "
                    f"{', '.join(names)}"
                )
            argument = f"--{key}"
        elif name is None:
            raise ConfigurationError(f"pipeline: {argument}: no such argument; see rlhf-lightning pipeline --help")
        added[name].append(argument)
    return added
