"""The stages of a pipeline's file, read as their own commands read them, or remembered from the last time."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse.typing import Path_fr, PositiveInt

from rlhf_lightning.commands.pipeline.iterations import filled, planned, policy_of
from rlhf_lightning.commands.pipeline.stages import Stage, program_inputs
from rlhf_lightning.commands.settings import parse_settings
from rlhf_lightning.errors import ConfigurationError, UserError
from rlhf_lightning.files.disks import write_whole

_PARSED = "parsed.json"
"""In the pipeline's directory: the settings of its stages as they were last parsed."""

_KNOWN = re.compile(r"(rlhf_lightning|lightning|torch|transformers|deepspeed)\.")
"""Where classes come from whose defaults change with a version alone."""


@dataclass
class StageSettings:
    """One command of the program.

    Args:
        command: `fit`, `generate` or `evaluate`.
        config: Its configuration, a path relative to the pipeline's file, or several that are layered.
        set: Keys as on its command line, and their values; `{policy}`, `{start}`, `{iteration}` in them are replaced.
        iterated: Whether it is run in every iteration.
    """

    command: Literal["fit", "generate", "contrast", "judge", "evaluate"]
    config: Path_fr | list[Path_fr] = field(default_factory=list)
    set: dict[str, Any] | None = None
    iterated: bool = False


@dataclass
class Settings:
    """A pipeline.

    Args:
        directory: Where state and logs are kept.
        stages: The stages in their order, by name.
        iterations: How often the stages that are `iterated` are run.
        policy: What `{policy}` is before any iteration, and `{start}` in all of them.
        again: A stage, or several, to run from the beginning though nothing has changed.
        only: The only stage to run.
    """

    directory: str
    stages: dict[str, StageSettings]
    iterations: PositiveInt = 1
    policy: str | None = None
    again: str | list[str] = field(default_factory=list)
    only: str | None = None


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


def parse_layers(usage: str, arguments: Sequence[str]) -> Settings:
    """The pipeline's own settings. A later `--config` changes stages of an earlier one or adds some, and drops none.

    Raises `UserError`.
    """
    settings = parse_settings(Settings, "pipeline", usage, arguments)
    ends = [place for place, argument in enumerate(arguments) if argument.split("=")[0] == "--config"][1:]
    for end in reversed(ends):  # the parser itself keeps of several `stages` the last
        settings.stages = parse_settings(Settings, "pipeline", usage, arguments[:end]).stages | settings.stages
    return settings


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
    for name in given.stages:
        if not re.fullmatch(r"[A-Za-z][\w-]*", name):
            raise ConfigurationError(
                f"pipeline: stage {name}: a name consists of letters, digits, _ and -, since it names the log"
            )
    stages, remembered, policy = [], _remembered(Path(given.directory).expanduser()), given.policy
    iterated = {name: stage.iterated for name, stage in given.stages.items()}
    for base, iteration in planned(iterated, given.iterations):
        stage, name = given.stages[base], base if iteration is None else f"{base}_{iteration}"
        own = [*_set(stage), *of_stages.get(base, [])]
        own = [filled(each, name, iteration=iteration, start=given.policy, policy=policy) for each in own]
        arguments = [*_configurations(stage), *own]
        parsed = remembered.get(_digest(stage.command, arguments)) or _parsed(name, stage.command, arguments)
        stages.append(Stage(name, stage.command, arguments, **parsed, base=base, iteration=iteration))
        policy = policy if iteration is None else policy_of(stages[-1]) or policy
    if repeated := [name for name in iterated if [stage.name for stage in stages].count(name) > 1]:
        raise ConfigurationError(f"pipeline: two stages are named {repeated[0]}, one by its iteration; rename one")
    return stages


def _configurations(stage: StageSettings) -> Iterator[str]:
    for config in stage.config if isinstance(stage.config, list) else [stage.config]:
        inside = Path(config.absolute).is_relative_to(Path.cwd())
        yield from ("--config", os.path.relpath(config.absolute) if inside else config.absolute)


def _set(stage: StageSettings) -> Iterator[str]:
    for key, value in (stage.set or {}).items():
        yield from (f"--{key}", value if isinstance(value, str) else json.dumps(value))


def _parsed(name: str, command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """`settings` and `outputs` of a stage. The imports behind it take seconds."""
    try:
        with redirect_stdout(io.StringIO()):
            settings, outputs = _fit(arguments) if command == "fit" else _other(command, arguments)
    except (UserError, OSError) as error:
        raise ConfigurationError(f"pipeline: stage {name}: {error}") from error
    except SystemExit as error:
        raise ConfigurationError(f"pipeline: stage {name}: {' '.join(arguments)} runs nothing") from error
    return {"settings": dict(_flat(settings)), "outputs": outputs}


def remember(stages: Sequence[Stage], home: Path) -> None:
    """Keep what was parsed for the next time, but where it depends on a class of the user's own."""
    parsed = {
        _digest(stage.command, stage.arguments): {"settings": stage.settings, "outputs": stage.outputs}
        for stage in stages
        if not any(key.endswith("class_path") and not _KNOWN.match(str(at)) for key, at in stage.settings.items())
    }
    content = json.dumps(parsed, sort_keys=True)
    if json.loads(content) == parsed:
        write_whole(home / _PARSED, json.dumps({"crc32": zlib.crc32(content.encode()), "parsed": parsed}))


def _remembered(home: Path) -> dict[str, dict[str, Any]]:
    try:
        stored = json.loads((home / _PARSED).read_text(encoding="utf-8"))
        whole = stored["crc32"] == zlib.crc32(json.dumps(stored["parsed"], sort_keys=True).encode())
        return stored["parsed"] if whole else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}  # it is parsed again


def _digest(command: str, arguments: Sequence[str]) -> str:
    """Of all that a stage's settings follow from: its arguments, the YAML files they name, and the program."""
    parser = importlib.metadata.version("jsonargparse")
    texts = [json.dumps([command, parser, *arguments]), json.dumps(program_inputs(), sort_keys=True)]
    waiting, seen = [Path(argument) for argument in arguments], set()
    while waiting:
        path = waiting.pop()
        if path.suffix in (".yaml", ".yml") and path.is_file() and path.resolve() not in seen:
            seen.add(path.resolve())
            texts.append(path.read_text(encoding="utf-8"))
            named = re.findall(r"[^\s'\"\[\]{},:]+\.ya?ml", texts[-1])
            waiting += [place / name for name in named for place in (Path(), path.parent)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


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


def _other(command: str, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Of a command whose module has a `parse`, and whose settings have an `out`."""
    settings = importlib.import_module(f"rlhf_lightning.commands.{command}").parse(arguments)
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
