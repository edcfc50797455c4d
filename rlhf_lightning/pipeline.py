"""The command `pipeline`: training runs and an evaluation after each other, from one file; what is done stays done."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import re
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from rich.live import Live
from rich.text import Text

from rlhf_lightning import __version__
from rlhf_lightning.errors import ConfigurationError, UserError

STAGE_COMMANDS = ("fit", "evaluate")
"""What a stage can be."""

_USAGE = """rlhf-lightning pipeline --config FILE.yaml [--STAGE.KEY VALUE ...] [--again STAGE] [--only STAGE]

Runs the stages of a file after each other, each in a process of its own. A stage is a `fit` or an `evaluate` with its
configuration. A stage that was done is not run again while nothing that it was made from has changed: its settings,
the files and directories that they name (by content), this program, and while what it wrote is as it left it. A `fit`
that was broken off goes on from its last checkpoint.

--config        the file: `directory`, where state and logs are kept, and `stages`, in their order, each with its
                `command`, its `config` (a path relative to the file, or a list of them) and perhaps `set`, its keys
--STAGE.KEY     a key of one stage, as on its own command line: --ppo.model.kl_coef 0.1
--directory     another place for state and logs
--again STAGE   run it from its beginning, though nothing has changed; may be given several times
--only STAGE    run no other stage

Exit code 0: all stages are done, 2: the file or a setting cannot be used, 130 or 143: interrupted; the same command
goes on. Else that of the stage which failed.
"""

_FORMAT = 1
"""Of state.json. State of another format is refused."""

_PRELOADED = ("rlhf_lightning.training.program", "rlhf_lightning.evaluate")
"""Imported once, by the server from which all stages are forked."""

_NO_INPUTS = {
    "fit": (
        *("trainer.logger", "trainer.callbacks", "trainer.default_root_dir"),
        *("model.engine_directory", "model.reference_cache", "data.cache_dir"),
    ),
    "evaluate": ("out",),
}
"""Keys that name what a stage writes, or keeps for later runs; whatever lies there is none of its inputs."""

_LOGS = "events.out.tfevents.*"
"""All that an evaluation reads of the directories under its key `runs`, whose checkpoints may be large."""

_VERSIONED = ("torch", "lightning", "transformers", "tokenizers", "peft", "deepspeed")

_TELLS = re.compile(r"(validation at |rollout \d+ \()?step \d+|.*: \d+\.\d s$")
"""Lines of a log that tell how far a run, or an evaluation, is."""

_HEADER = re.compile(r"\d{4}-\d\d-\d\d ")
"""The line of a log that says when the command was given."""

_PATIENCE = 60.0
"""Seconds that an interrupted stage is given to save what it has."""


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


@dataclass(frozen=True)
class Resolved:
    """A stage's settings with all defaults, flat, under the names of their keys on the command line."""

    settings: dict[str, Any]
    outputs: tuple[str, ...]
    """The directories that it writes for others to use."""


@dataclass
class Record:
    """What is remembered of a stage's latest run."""

    state: Literal["running", "broken", "done"]
    inputs: dict[str, str]
    """What it is made from: name and value, or hash of the content."""
    began: float
    """When the first of the runs with these inputs began, in seconds since 1970. Older checkpoints are of others."""
    outputs: dict[str, str] = field(default_factory=dict)
    """Each directory that it wrote, and the hash of its content."""
    seconds: float = 0.0
    progress: str = ""
    """The last line of its log that tells how far it is."""
    results: str = ""
    """What it printed in the end."""


class _Terminated(BaseException):
    """SIGTERM."""


def run(arguments: Sequence[str]) -> int:
    """Run the stages that have something to do, and return the exit code. Raises `UserError`."""
    parser = _Arguments(prog="rlhf-lightning pipeline", usage=_USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config")
    parser.add_argument("--directory")
    parser.add_argument("--again", action="append", default=[])
    parser.add_argument("--only")
    parser.add_argument("-h", "--help", action="store_true")
    own, rest = parser.parse_known_args(list(arguments))
    if own.help:
        print(_USAGE, end="")
        return 0
    if own.config is None:
        raise ConfigurationError("pipeline: give the --config of a pipeline, such as configs/quickstart.yaml")
    pipeline = read_pipeline(own.config, directory=own.directory, overrides=rest)
    names = [stage.name for stage in pipeline.stages]
    for flag, name in [("--again", name) for name in own.again] + [("--only", own.only)]:
        if name is not None and name not in names:
            raise ConfigurationError(f"pipeline: {flag} {name}: no such stage; the stages are {', '.join(names)}")
    with _terminated():
        try:
            return _run(pipeline, again=own.again, only=own.only)
        except KeyboardInterrupt:
            code = 130
        except _Terminated:
            code = 143
    print("rlhf-lightning: interrupted; the same command goes on from here", file=sys.stderr)
    return code


def _run(pipeline: Pipeline, *, again: Sequence[str], only: str | None) -> int:
    code = _code()  # as it is when the server imports it
    context = _server()
    resolved = resolve(pipeline.stages, context)
    _check_order(pipeline.stages, resolved)
    pipeline.directory.mkdir(parents=True, exist_ok=True)
    with _locked(pipeline.directory):
        state = State(pipeline.directory / "state.json")
        stages = [stage for stage in pipeline.stages if only in (None, stage.name)]
        with Board(f"{pipeline.file}: {', '.join(stage.name for stage in stages)}", stages) as board:
            for stage in stages:
                board.show(stage.name, "looking")
                inputs = inputs_of(stage, resolved[stage.name], state.contents, code)
                ended = _run_stage(
                    _without_bar(stage, resolved[stage.name]),
                    resolved[stage.name].outputs,
                    inputs,
                    state,
                    board,
                    context,
                    again=again,
                )
                if ended != 0:
                    return ended
        _print_results(stages, state, pipeline.directory)
    return 0


def _without_bar(stage: Stage, resolved: Resolved) -> Stage:
    """A run whose log has lines instead of a progress bar, unless it has a bar of the user's."""
    callbacks = [value for key, value in resolved.settings.items() if key.startswith("trainer.callbacks")]
    if stage.command != "fit" or any("ProgressBar" in str(value) for value in callbacks):
        return stage
    return replace(stage, arguments=(*stage.arguments, "--trainer.enable_progress_bar", "false"))


class _Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"pipeline: {message}; see rlhf-lightning pipeline --help")


# The file


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
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
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


# What a stage is made from


def resolve(stages: Sequence[Stage], context: ForkServerContext) -> dict[str, Resolved]:
    """The settings of each stage as its own command would take them. Raises `ConfigurationError`; nothing is run."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_resolve, args=(sender, [(s.name, s.command, s.arguments) for s in stages]))
    with _running(process):
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
    _begin()
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
        from rlhf_lightning.evaluate import parse

        settings = parse(arguments)
        if settings is None:
            raise SystemExit(0)
        return dict(_flat(asdict(settings))), [settings.out]
    parsed = _parsed_fit(arguments)
    settings = yaml.safe_load(parsed.parser.dump(parsed.config, skip_validation=True))["fit"]
    callbacks = settings["trainer"].get("callbacks") or []
    exports = [each for each in callbacks if each["class_path"].rpartition(".")[2] == "ExportBest"]
    return dict(_flat(settings)), [each["init_args"]["directory"] for each in exports]


def _parsed_fit(arguments: Sequence[str]) -> Any:
    from rlhf_lightning.training.program import ParsedRun
    from rlhf_lightning.training.program import run as parse

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


def _check_order(stages: Sequence[Stage], resolved: Mapping[str, Resolved]) -> None:
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
        for _, path in _named(stage.command, resolved[stage.name].settings, existing=False):
            writer = writers.get(path.resolve())
            if writer is not None and order.index(writer) > order.index(stage.name):
                raise ConfigurationError(
                    f"pipeline: stage {stage.name} reads {path}, which the later stage {writer} writes; change their "
                    "order"
                )


def _named(command: str, settings: Mapping[str, Any], *, existing: bool = True) -> Iterator[tuple[str, Path]]:
    """The files and directories that settings name, each with its key; with `existing`, those that are there."""
    for key, value in settings.items():
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str) or not text or len(text) > 1000 or "\n" in text:
                continue
            if not key.startswith(_NO_INPUTS[command]):
                for name in (text, text.partition(":")[2]):  # precomputed:NAME
                    with suppress(OSError, RuntimeError, ValueError):
                        path = Path(name).expanduser()
                        if name and (not existing or path.exists()):
                            yield key, path
            if re.fullmatch(r"[A-Za-z_][\w.]*(:\w+)?", text):  # module:function and the classes of the user
                parts = text.partition(":")[0].split(".")
                for count in range(1, len(parts) + 1):
                    path = Path(*parts[:count]).with_suffix(".py")
                    if path.is_file():
                        yield key, path


def inputs_of(stage: Stage, resolved: Resolved, contents: Contents, code: str) -> dict[str, str]:
    """All that the outcome of a stage depends on, as far as it is known here: names and values, or hashes."""
    inputs = {"command": stage.command, "the code of rlhf_lightning": code, "python": platform.python_version()}
    for package in _VERSIONED:
        with suppress(importlib.metadata.PackageNotFoundError):
            inputs[package] = importlib.metadata.version(package)
    inputs |= {key: json.dumps(value, sort_keys=True, default=str) for key, value in resolved.settings.items()}
    for key, path in _named(stage.command, resolved.settings):
        pattern = _LOGS if (stage.command, key) == ("evaluate", "runs") else "*"
        inputs[f"content of {path}"] = contents.of(path, pattern)
    return inputs


def _code() -> str:
    """This package, by content: version and hash."""
    home, digest = Path(__file__).parent, hashlib.sha256()
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


class State:
    """`state.json`: the records of the stages, and hashes of files. Raises `ConfigurationError` for any other file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.records: dict[str, Record] = {}
        stored: dict[str, Any] = {"files": {}}
        if file.exists():
            try:
                stored = json.loads(file.read_text(encoding="utf-8"))
                if stored["format"] != _FORMAT:
                    raise ValueError(f"format {stored['format']}")
                self.records = {name: Record(**values) for name, values in stored["stages"].items()}
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigurationError(
                    f"{file}: is no state of a pipeline of this version ({error}); remove it to begin anew"
                ) from error
        self.contents = Contents(stored["files"], above=file.parent)

    def put(self, name: str, record: Record) -> None:
        """Remember a record, at once and whole."""
        self.records[name] = record
        stages = {name: asdict(record) for name, record in self.records.items()}
        stored = {"format": _FORMAT, "stages": stages, "files": self.contents.known}
        part = self.file.with_name(f".{self.file.name}.part")
        with part.open("w", encoding="utf-8") as opened:
            json.dump(stored, opened, indent=1)
            opened.flush()
            os.fsync(opened.fileno())
        part.replace(self.file)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """The directory of a pipeline, for this process alone. A process that was killed holds no lock."""
    try:
        with FileLock(directory / "lock", timeout=0):
            yield
    except Timeout as error:
        raise ConfigurationError(
            f"{directory}: another pipeline is running there; wait for its end, or give another --directory"
        ) from error


# Running


def _run_stage(
    stage: Stage,
    outputs: Sequence[str],
    inputs: dict[str, str],
    state: State,
    board: Board,
    context: ForkServerContext,
    *,
    again: Sequence[str],
) -> int:
    """Run a stage that has something to do; its exit code."""
    known = state.records.get(stage.name)
    reason = "asked for again" if stage.name in again else _reason(known, inputs, state.contents)
    if reason is None:
        state.put(stage.name, known)  # with the hashes of files that were read
        board.show(stage.name, "unchanged", known.progress)
        return 0
    broken = known is not None and known.state != "done" and known.inputs == inputs
    goes_on = broken and stage.command == "fit" and stage.name not in again
    began = time.time()
    record = Record("running", inputs, known.began if goes_on else began)
    state.put(stage.name, record)
    board.show(stage.name, "running", reason)
    log = state.file.parent / f"{stage.name}.log"
    progress, code, missing = Progress(log), 1, []
    try:
        code, results = _watched(stage, log, record.began if goes_on else None, progress, board, context)
    except (KeyboardInterrupt, _Terminated):
        board.show(stage.name, "interrupted")
        raise
    finally:
        record = replace(record, state="broken", seconds=time.time() - began, progress=progress.line)
        if code == 0:
            missing = [output for output in outputs if not _written(output, since=began)]
            written = {output: state.contents.of(Path(output)) for output in outputs if output not in missing}
            last = _last_line(stage, results) or progress.line
            record = replace(
                record, state="broken" if missing else "done", outputs=written, results=results, progress=last
            )
        state.put(stage.name, record)
    board.show(stage.name, "done" if record.state == "done" else "failed", record.progress)
    if record.state == "done":
        return 0
    board.close()
    what = f"ended without writing {missing[0]}" if missing else f"failed ({_code_in_words(code)})"
    print(
        f"rlhf-lightning: error: stage {stage.name} {what}: {_complaint(log, missing)}; its log is {log}, and what is "
        "done will not be run again",
        file=sys.stderr,
    )
    return 128 - code if code < 0 else code or 1


def _last_line(stage: Stage, results: str) -> str | None:
    """Where the report of an evaluation is."""
    found = re.findall(r"^report: .*", results, re.MULTILINE) if stage.command == "evaluate" else []
    return re.sub(r"\s+", " ", found[-1]) if found else None


def _reason(known: Record | None, inputs: Mapping[str, str], contents: Contents) -> str | None:
    """Why a stage is to be run, in words; None when it is done and all is as it was."""
    if known is None:
        return "not run before"
    if changed := difference(known.inputs, inputs):
        return f"changed: {changed}"
    if known.state != "done":
        return "was broken off"
    for output, digest in known.outputs.items():
        if not _written(output, since=0.0):
            return f"{output} is gone"
        if contents.of(Path(output)) != digest:
            return f"{output} was altered"
    return None


def _written(directory: str, *, since: float) -> bool:
    """Whether a directory holds files, one of them written since then, in seconds since 1970."""
    times = [file.stat().st_mtime for file in Path(directory).expanduser().rglob("*") if file.is_file()]
    return bool(times) and max(times) >= since - 1  # file systems round


def _code_in_words(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _complaint(log: Path, missing: Sequence[str]) -> str:
    """The line of a log that says what went wrong, or why one of the directories was not written."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    beginnings = tuple(f"{directory}: " for directory in missing) or ("rlhf-lightning: error: ",)
    ours = [line for line in lines if line.startswith(beginnings)]
    return ([*lines, *ours] or ["it said nothing"])[-1].removeprefix("rlhf-lightning: error: ")[:500]


def _server() -> ForkServerContext:
    """Processes forked from a server that has imported what is heavy, and done nothing else."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to look for GPUs must not spoil them for the forked
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    resource_tracker.ensure_running()  # it would unblock the signal below
    # The server inherits that Ctrl-C is blocked, which is this process's to handle. One that comes meanwhile waits;
    # a thread of this process that does not block it may be given it, so that it is written down.
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)
    return context


@contextmanager
def _running(process: BaseProcess) -> Iterator[None]:
    """Start a process that leads a group of its own; at the end nothing of it is left."""
    process.start()
    try:
        yield
    finally:
        if process.exitcode != 0:
            _signal(process, signal.SIGKILL)
            process.join()


def _signal(process: BaseProcess, number: int) -> None:
    """To all processes of its group, or to itself when it has not made one yet."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        if process.exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _watched(
    stage: Stage, log: Path, newer_than: float | None, progress: Progress, board: Board, context: ForkServerContext
) -> tuple[int, str]:
    """Run a stage and show how far it is. Returns its exit code (negative: a signal) and what it printed."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, stage.command, stage.arguments, str(log), newer_than))
    with _running(process):
        sender.close()
        try:
            while not wait([process.sentinel], timeout=0.2):
                board.show(stage.name, "running", progress.read())
        except (KeyboardInterrupt, _Terminated) as interruption:
            board.show(stage.name, "stopping", progress.read())
            asked = signal.SIGINT if isinstance(interruption, KeyboardInterrupt) else signal.SIGTERM
            _signal(process, asked)
            wait([process.sentinel], timeout=_PATIENCE)
            raise
        process.join()
        board.show(stage.name, "running", progress.read())
        results = ""
        with suppress(EOFError):
            results = receiver.recv() if receiver.poll() else ""
    return process.exitcode, results


def _work(answer: Connection, command: str, arguments: Sequence[str], log: str, newer_than: float | None) -> NoReturn:
    """In a process of its own: the program, as `python -m rlhf_lightning.cli COMMAND ...`, its output in a file.

    With `newer_than` it goes on from its last checkpoint, if that is not older.
    """
    _begin()
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    fcntl.flock(opened, fcntl.LOCK_EX)  # should a process of a killed pipeline still be writing, wait for its end
    if newer_than is None:
        os.ftruncate(opened, 0)
    for number in (1, 2):
        os.dup2(opened, number)
    sys.stdout = kept = _Kept(sys.stdout)
    arguments = [command, *arguments]
    if newer_than is not None and _has_checkpoint(arguments[1:], newer_than):
        arguments += ["--ckpt_path", "last"]
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rlhf-lightning {' '.join(arguments)}", file=sys.stderr, flush=True)
    sys.argv[1:] = arguments
    sys.modules.pop("rlhf_lightning.cli", None)  # it is run, not imported; with DDP, further processes are run alike
    try:
        runpy.run_module("rlhf_lightning.cli", run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        with suppress(OSError):
            answer.send(kept.text.getvalue()[-20_000:])
    raise AssertionError("the program ends with an exit code")


def _begin() -> None:
    """A process group of its own, which ends with the pipeline, however that ends; signals as a program has them."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # inherited blocked from the server
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os.killpg(0, signal.SIGKILL)


def _has_checkpoint(arguments: Sequence[str], newer_than: float) -> bool:
    """Whether the checkpoint from which a run would go on was written since then, and so by a run of these inputs."""
    import logging

    from rlhf_lightning.training.resume import resolve_last

    settings = _parsed_fit(arguments).settings
    log = logging.getLogger("rlhf_lightning")
    log.setLevel(logging.ERROR)  # the run itself will say it
    try:
        resolve_last(settings)
    except ConfigurationError:  # nothing says where its checkpoints are
        return False
    finally:
        log.setLevel(logging.INFO)
    return settings.ckpt_path is not None and Path(settings.ckpt_path).stat().st_mtime >= newer_than


class _Kept(io.TextIOBase):
    """Standard output that is written on, and kept as well."""

    encoding = "utf-8"

    def __init__(self, stream: io.TextIOBase) -> None:
        self.stream, self.text = stream, io.StringIO()

    def write(self, text: str) -> int:
        self.text.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()


@contextmanager
def _terminated() -> Iterator[None]:
    """Inside, SIGTERM raises `_Terminated`."""

    def stop(*_) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# What is shown


class Progress:
    """The newest line of a log that tells how far a stage is; until there is one, the newest line at all."""

    def __init__(self, log: Path) -> None:
        self.log, self.position = log, log.stat().st_size if log.exists() else 0
        self.rest, self.line, self.told = b"", "", False

    def read(self) -> str:
        with suppress(FileNotFoundError), self.log.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self.position:  # it was begun anew
                self.position, self.rest = 0, b""
            file.seek(self.position)
            new = file.read()
            self.position += len(new)
            *lines, self.rest = (self.rest + new).split(b"\n")
            for line in (line.decode("utf-8", errors="replace").strip() for line in lines):
                tells = _TELLS.match(line) is not None
                if tells or (line and not self.told and not _HEADER.match(line)):
                    self.line, self.told = line, tells
        return self.line


_STYLES = {"done": "green", "unchanged": "green", "running": "bold", "waiting": "dim"}
_STYLES |= {"failed": "red", "interrupted": "red"}


class Board:
    """One line for each stage: live on a terminal, else printed when a stage begins and when it ends."""

    def __init__(self, title: str, stages: Sequence[Stage]) -> None:
        self.console = Console()
        self.names = [stage.name for stage in stages]
        self.states = dict.fromkeys(self.names, ("waiting", ""))
        self.began: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.title = title
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> Board:
        self.console.print(self.title, soft_wrap=True, highlight=False, markup=False)
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the lines as they are."""
        if self.live:
            self.live.update(self._lines(), refresh=True)
            self.live.stop()

    def show(self, name: str, state: str, text: str = "") -> None:
        """Show a stage in a state; without a text, that which stands there stays."""
        before, known = self.states[name]
        text = text or known
        self.states[name] = (state, text)
        if state == "running" and before != "running":
            self.began[name] = time.monotonic()
        if name in self.began:
            self.seconds[name] = time.monotonic() - self.began[name]
        if self.live:
            self.live.update(self._lines(), refresh=True)
        elif state != before and state not in ("looking", "stopping"):
            print(self._line(name), flush=True)

    def _line(self, name: str) -> str:
        state, text = self.states[name]
        seconds = f" {self.seconds[name]:.0f} s" if name in self.seconds and state != "running" else ""
        return f"{name}: {state}{seconds}{'; ' if text else ''}{text}"

    def _lines(self) -> Text:
        """A line for each stage, as long as the terminal is wide: only the text is cut."""
        width = max(map(len, self.names))
        lines = []
        for name, (state, text) in self.states.items():
            seconds = f"{self.seconds[name]:.0f} s" if name in self.seconds else ""
            line = Text.assemble(
                f"{name:{width}}  ", (f"{state:11}", _STYLES.get(state, "")), f"  {seconds:>6}  {text}"
            )
            line.truncate(self.console.width - 1, overflow="ellipsis")
            lines.append(line)
        return Text("\n", no_wrap=True).join(lines)


def _print_results(stages: Iterable[Stage], state: State, directory: Path) -> None:
    """What each stage printed in the end, and where state and logs lie."""
    for stage in stages:
        print(f"\n== {stage.name}\n{state.records[stage.name].results.strip()}")
    print(f"\nlogs and state: {directory}")
