"""What is remembered of the stages, which of them have something to do, and their runs."""

from __future__ import annotations

import json
import signal
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.status import Status
from rich.text import Text

from rlhf_lightning.commands.pipeline.iterations import numbers_of
from rlhf_lightning.commands.pipeline.parsing import parsed_fit
from rlhf_lightning.commands.pipeline.processes import Terminated, run_program
from rlhf_lightning.commands.pipeline.stages import Stage, content_hash, difference, inputs_of
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.files.disks import write_whole
from rlhf_lightning.terminal import SECONDS_BETWEEN_LINES, say, silenced

_FORMAT = 3
"""Of state.json. State of another format is refused."""

_INTERRUPTED = "was interrupted"


@dataclass(frozen=True)
class Record:
    """What is remembered of a stage's latest run."""

    inputs: dict[str, str]
    """What it is made from: name and value, or hash of the content."""
    began: float
    """When the first of the runs with these inputs began, in seconds since 1970. Older checkpoints are of others."""
    done: bool = False
    outputs: dict[str, str] = field(default_factory=dict)
    """Each directory or file that it wrote, and the hash of its content."""
    results: str = ""
    """What it printed."""
    numbers: dict[str, float] = field(default_factory=dict)
    """What it measured, where it is repeated."""


class State:
    """`state.json`: the records of the stages. Raises `ConfigurationError` for any other file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.records: dict[str, Record] = {}
        if not file.exists():
            return
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            if stored["format"] != _FORMAT:
                raise ValueError(f"format {stored['format']}")
            if stored["crc32"] != _checksum(stored["stages"]):
                raise ValueError("damaged: its checksum is wrong")
            self.records = {name: Record(**values) for name, values in stored["stages"].items()}
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigurationError(
                f"{file}: not a pipeline state file of this version ({error}); delete it to start over"
            ) from error

    def put(self, name: str, record: Record) -> None:
        """Remember a record, at once and whole."""
        self.records[name] = record
        stages = {name: asdict(record) for name, record in self.records.items()}
        write_whole(self.file, json.dumps({"format": _FORMAT, "crc32": _checksum(stages), "stages": stages}, indent=1))


def _checksum(stages: dict[str, Any]) -> int:
    """Of what is remembered: a changed digit in it would be a wrong result, or another decision, without a word."""
    return zlib.crc32(json.dumps(stages, sort_keys=True).encode())


class StageFailed(Exception):
    """Why a stage ended without its result, and its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run_stage(stage: Stage, state: State, status: Status, *, again: bool) -> None:
    """Run a stage if it has something to do; `status` shows how far it is. Raises `StageFailed`."""
    home, known = state.file.parent, state.records.get(stage.name)
    inputs = inputs_of(stage, home)
    reason = "asked for again" if again else _reason(known, inputs, home)
    if reason is None:
        say(f"{stage.name}: unchanged")
        return
    began, log = time.monotonic(), home / f"{stage.name}.log"
    say(f"{stage.name}: running; {reason}; its log is {log}")
    interrupted = known if reason == _INTERRUPTED and stage.command == "fit" else None
    record = Record(inputs, interrupted.began if interrupted else time.time())
    state.put(stage.name, record)
    resume = ["--ckpt_path", "last"] if interrupted and _has_checkpoint(stage, newer_than=interrupted.began) else []

    said = began

    def tell(line: str) -> None:
        nonlocal said
        now = time.monotonic()
        text = f"{stage.name}  {now - began:.0f} s  {line}"
        status.update(Text(text, no_wrap=True, overflow="ellipsis"))
        if now - said > SECONDS_BETWEEN_LINES and not status.console.is_terminal:
            said = now
            say(text, file=sys.stderr)

    try:
        ended = run_program([*_arguments(stage), *resume], log, append=interrupted is not None, tell=tell)
    except Terminated:
        say(f"{stage.name}: interrupted")
        raise
    missing = [f"did not write {output}" for output in stage.outputs if not Path(output).expanduser().exists()]
    if ended.code or missing:
        say(f"{stage.name}: failed")
        how = f"exit code {ended.code}" if ended.code >= 0 else f"killed by {signal.Signals(-ended.code).name}"
        raise StageFailed(
            f"stage {stage.name} failed ({how if ended.code else missing[0]}): {ended.complaint}; its log is {log}",
            128 - ended.code if ended.code < 0 else ended.code or 1,
        )
    outputs = {output: content_hash(Path(output), home) for output in stage.outputs}
    numbers = {} if stage.iteration is None else numbers_of(stage, ended.results)
    state.put(stage.name, replace(record, done=True, outputs=outputs, results=ended.results, numbers=numbers))
    say(f"{stage.name}: done in {time.monotonic() - began:.0f} s")


def _reason(known: Record | None, inputs: Mapping[str, str], home: Path) -> str | None:
    """Why a stage is to be run, in words; None when it is done and all is as it was."""
    if known is None:
        return "not run before"
    if changed := difference(known.inputs, inputs):
        return f"changed: {changed}"
    if not known.done:
        return _INTERRUPTED
    altered = [output for output, digest in known.outputs.items() if content_hash(Path(output), home) != digest]
    return f"{altered[0]} is gone or was altered" if altered else None


def _arguments(stage: Stage) -> list[str]:
    """Those of the program; the log gets lines instead of a progress bar, unless the user has a bar of their own."""
    callbacks = [str(value) for key, value in stage.settings.items() if key.startswith("trainer.callbacks")]
    no_bar = ["--trainer.enable_progress_bar", "false"] if stage.command == "fit" else []
    return [stage.command, *stage.arguments, *([] if "ProgressBar" in "".join(callbacks) else no_bar)]


def _has_checkpoint(stage: Stage, newer_than: float) -> bool:
    """Whether the checkpoint that a run would resume from was written since then, and so by a run of these inputs."""
    from rlhf_lightning.training.resume import resolve_last

    settings = parsed_fit(stage.arguments).settings
    try:
        with silenced("rlhf_lightning"):  # the run itself will say it
            resolve_last(settings)
    except ConfigurationError:  # nothing says where its checkpoints are
        return False
    return settings.ckpt_path is not None and Path(settings.ckpt_path).stat().st_mtime >= newer_than
