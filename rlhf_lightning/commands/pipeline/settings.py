"""The settings of the stages, as their own commands take them, and the files and directories they name."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import yaml

from rlhf_lightning.commands.pipeline.description import Stage
from rlhf_lightning.commands.pipeline.processes import begin_process, running_process
from rlhf_lightning.errors import ConfigurationError, UserError

_NO_INPUTS = {
    "fit": (
        *("trainer.logger", "trainer.callbacks", "trainer.default_root_dir"),
        *("model.engine_directory", "model.reference_cache", "data.cache_dir"),
    ),
    "evaluate": ("out",),
}
"""Keys that name what a stage writes, or keeps for later runs; whatever lies there is none of its inputs."""


@dataclass(frozen=True)
class Resolved:
    """A stage's settings with all defaults, flat, under the names of their keys on the command line."""

    settings: dict[str, Any]
    outputs: tuple[str, ...]
    """The directories that it writes for others to use."""


def resolve(stages: Sequence[Stage], context: ForkServerContext) -> dict[str, Resolved]:
    """The settings of each stage as its own command would take them. Raises `ConfigurationError`; nothing is run."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_resolve, args=(sender, [(s.name, s.command, s.arguments) for s in stages]))
    with running_process(process):
        sender.close()
        try:
            answer = receiver.recv()
        except EOFError:
            process.join()
            raise RuntimeError("the settings of the stages could not be parsed; see above") from None
        process.join()
    if isinstance(answer, str):
        raise ConfigurationError(f"pipeline: {answer}")
    return {name: Resolved(settings, tuple(outputs)) for name, settings, outputs in answer}


def _resolve(answer: Connection, stages: list[tuple[str, str, tuple[str, ...]]]) -> None:
    """In a process of its own: settings and outputs of each stage, or what is wrong in one line."""
    begin_process()
    found = []
    for name, command, arguments in stages:
        try:
            with redirect_stdout(io.StringIO()):
                found.append((name, *_settings(command, arguments)))
        except (UserError, OSError) as error:
            return answer.send(f"stage {name}: {error}")
        except SystemExit:
            return answer.send(f"stage {name}: {' '.join(arguments)} asks for help and runs nothing; leave that out")
    return answer.send(found)


def _settings(command: str, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Settings, flat, and the directories that the stage writes for others."""
    if command == "evaluate":
        from rlhf_lightning.commands.evaluate import parse

        settings = parse(arguments)
        if settings is None:
            raise SystemExit(0)
        return dict(_flat(asdict(settings))), [settings.out]
    parsed = parsed_fit(arguments)
    settings = yaml.safe_load(parsed.parser.dump(parsed.config, skip_validation=True))["fit"]
    callbacks = settings["trainer"].get("callbacks") or []
    exports = [each for each in callbacks if each["class_path"].rpartition(".")[2] == "ExportBest"]
    return dict(_flat(settings)), [each["init_args"]["directory"] for each in exports]


def parsed_fit(arguments: Sequence[str]) -> Any:
    from rlhf_lightning.commands.fit import ParsedRun
    from rlhf_lightning.commands.fit import run as parse

    return parse(["fit", *arguments], program=ParsedRun)


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


def check_order(stages: Sequence[Stage], resolved: Mapping[str, Resolved]) -> None:
    """Refuse two stages that write the same, and one that reads what a later one writes."""
    writers: dict[Path, str] = {}
    for stage in stages:
        for output in resolved[stage.name].outputs:
            path = Path(output).expanduser().resolve()
            if path in writers:
                raise ConfigurationError(
                    f"pipeline: the stages {writers[path]} and {stage.name} both write {output}; give one another "
                    "directory"
                )
            writers[path] = stage.name
    order = [stage.name for stage in stages]
    for stage in stages:
        for _, path in paths_in(stage.command, resolved[stage.name].settings, existing=False):
            writer = writers.get(path.resolve())
            if writer is not None and order.index(writer) > order.index(stage.name):
                raise ConfigurationError(
                    f"pipeline: stage {stage.name} reads {path}, which the later stage {writer} writes; change their "
                    "order"
                )


def paths_in(command: str, settings: Mapping[str, Any], *, existing: bool = True) -> Iterator[tuple[str, Path]]:
    """The files and directories that settings name, each with its key; with `existing`, those that are there."""
    for key, value in settings.items():
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str) or not text or len(text) > 1000 or "\n" in text:
                continue
            if not key.startswith(_NO_INPUTS[command]):
                with suppress(OSError, RuntimeError, ValueError):
                    path = Path(text).expanduser()
                    if not existing or path.exists():
                        yield key, path
            if re.fullmatch(r"[A-Za-z_][\w.]*(:\w+)?", text):  # module:function and the classes of the user
                parts = text.partition(":")[0].split(".")
                for count in range(1, len(parts) + 1):
                    path = Path(*parts[:count]).with_suffix(".py")
                    if path.is_file():
                        yield key, path
