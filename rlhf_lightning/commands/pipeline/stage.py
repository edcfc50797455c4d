"""One stage: whether it has something to do, its run in a process of its own, and what became of it."""

from __future__ import annotations

import fcntl
import io
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NoReturn

from rlhf_lightning.commands.pipeline.board import Board, Progress
from rlhf_lightning.commands.pipeline.description import Stage
from rlhf_lightning.commands.pipeline.inputs import Contents, difference
from rlhf_lightning.commands.pipeline.processes import Terminated, begin_process, running_process, signal_group
from rlhf_lightning.commands.pipeline.settings import Resolved, parsed_fit
from rlhf_lightning.commands.pipeline.state import Record, State
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.files.disks import named_full_disk
from rlhf_lightning.terminal import say

_PATIENCE = 120.0
"""Seconds that an interrupted stage is given to save what it has."""


def run_stage(
    stage: Stage,
    resolved: Resolved,
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
        stage = _without_bar(stage, resolved)
        code, results, said = _watched(stage, log, record.began if goes_on else None, progress, board, context)
    except (KeyboardInterrupt, Terminated):
        board.show(stage.name, "interrupted")
        raise
    finally:
        record = replace(record, state="broken", seconds=time.time() - began, progress=progress.line)
        if code == 0:
            missing = [output for output in resolved.outputs if not _written(output, since=began)]
            written = {output: state.contents.of(Path(output)) for output in resolved.outputs if output not in missing}
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
    say(
        f"rlhf-lightning: error: stage {stage.name} {what}: {_complaint(log, said, missing)}; its log is {log}, and "
        "what is done will not be run again",
        file=sys.stderr,
    )
    return 128 - code if code < 0 else code or 1


def _without_bar(stage: Stage, resolved: Resolved) -> Stage:
    """A run whose log has lines instead of a progress bar, unless it has a bar of the user's."""
    callbacks = [value for key, value in resolved.settings.items() if key.startswith("trainer.callbacks")]
    if stage.command != "fit" or any("ProgressBar" in str(value) for value in callbacks):
        return stage
    return replace(stage, arguments=(*stage.arguments, "--trainer.enable_progress_bar", "false"))


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


def _complaint(log: Path, said: str, missing: Sequence[str]) -> str:
    """The line of a log that says what went wrong, or why one of the directories was not written.

    `said` holds what the log may have had no room for.
    """
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    beginnings = tuple(f"{directory}: " for directory in missing) or ("rlhf-lightning: error: ",)
    ours = [line for line in [*lines, *said.splitlines()] if line.startswith(beginnings)]
    return ([*lines, *ours] or ["it said nothing"])[-1].removeprefix("rlhf-lightning: error: ")[:500]


def _watched(
    stage: Stage, log: Path, newer_than: float | None, progress: Progress, board: Board, context: ForkServerContext
) -> tuple[int, str, str]:
    """Run a stage and show how far it is.

    Returns its exit code (negative: a signal), what it printed, and its complaints, unless it was killed.
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, stage.command, stage.arguments, str(log), newer_than))
    with running_process(process):
        sender.close()
        try:
            while not wait([process.sentinel], timeout=0.2):
                board.show(stage.name, "running", progress.read())
        except (KeyboardInterrupt, Terminated) as interruption:
            board.show(stage.name, "stopping", progress.read())
            asked = interruption.number if isinstance(interruption, Terminated) else signal.SIGINT
            signal_group(process, asked)
            wait([process.sentinel], timeout=_PATIENCE)
            raise
        process.join()
        board.show(stage.name, "running", progress.read())
        results, said = "", ""
        with suppress(EOFError):
            results, said = receiver.recv() if receiver.poll() else ("", "")
    return process.exitcode, results, said


def _work(answer: Connection, command: str, arguments: Sequence[str], log: str, newer_than: float | None) -> NoReturn:
    """In a process of its own: the program, as `python -m rlhf_lightning.cli COMMAND ...`, its output in a file.

    With `newer_than` it goes on from its last checkpoint, if that is not older.
    """
    begin_process()
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    fcntl.flock(opened, fcntl.LOCK_EX)  # should a process of a killed pipeline still be writing, wait for its end
    if newer_than is None:
        os.ftruncate(opened, 0)
    for number in (1, 2):
        os.dup2(opened, number)
    sys.stdout, sys.stderr = kept = _Kept(sys.stdout), _Kept(sys.stderr)
    arguments = [command, *arguments]
    try:
        if newer_than is not None and _has_checkpoint(arguments[1:], newer_than):
            arguments += ["--ckpt_path", "last"]
        say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rlhf-lightning {' '.join(arguments)}", file=sys.stderr)
        sys.argv[1:] = arguments
        # It is run, not imported; with DDP, further processes are run alike.
        sys.modules.pop("rlhf_lightning.cli", None)
        runpy.run_module("rlhf_lightning.cli", run_name="__main__", alter_sys=True)
    except Exception as error:
        if full := named_full_disk(error, [log]):
            kept[1].text.write(f"rlhf-lightning: error: {full}\n")
        raise
    finally:
        with suppress(OSError):
            answer.send([stream.text.getvalue()[-20_000:] for stream in kept])
        sys.stdout.flush()
    raise AssertionError("the program ends with an exit code")


def _has_checkpoint(arguments: Sequence[str], newer_than: float) -> bool:
    """Whether the checkpoint from which a run would go on was written since then, and so by a run of these inputs."""
    from rlhf_lightning.terminal import silenced
    from rlhf_lightning.training.resume import resolve_last

    settings = parsed_fit(arguments).settings
    try:
        with silenced("rlhf_lightning"):  # the run itself will say it
            resolve_last(settings)
    except ConfigurationError:  # nothing says where its checkpoints are
        return False
    return settings.ckpt_path is not None and Path(settings.ckpt_path).stat().st_mtime >= newer_than


class _Kept(io.TextIOBase):
    """Standard output or error that is written on, and kept as well, also where the disk of the log is full."""

    encoding = "utf-8"

    def __init__(self, stream: io.TextIOBase) -> None:
        self.stream, self.text = stream, io.StringIO()

    def write(self, text: str) -> int:
        self.text.write(text)
        try:
            return self.stream.write(text)
        except OSError:
            self.text.write("\n")  # which `print` has not come to
            raise

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()
