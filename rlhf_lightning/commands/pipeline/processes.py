"""The program as a process of its own: what it says, how it is told to end, and that nothing of it is left."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from typing import IO, NamedTuple, NoReturn

OF_A_PIPELINE = "RLHF_LIGHTNING_PIPELINE"
"""Set in the environment of a stage, whose standard input ends with the pipeline."""

_PATIENCE = 120.0
"""Seconds that an interrupted program is given to save what it has."""

_REFUSAL = "rlhf-lightning: error: "


class Terminated(BaseException):
    """A signal that asks the pipeline to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def terminated() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM, SIGHUP and SIGUSR1 raise `Terminated`, unless they are ignored, as under nohup."""

    def stop(number: int, _: object) -> NoReturn:
        raise Terminated(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.signal(number, stop) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Ended(NamedTuple):
    """How a program ended."""

    code: int
    """Its exit code; negative: the signal that killed it."""
    results: str
    """Its standard output."""
    complaint: str
    """Its own error message, or else the last line on standard error."""


def run_program(arguments: Sequence[str], log: Path, *, append: bool, tell: Callable[[str], None]) -> Ended:
    """Run `rlhf-lightning ARGUMENTS`, and `tell` its newest line meanwhile.

    All that it says goes into the log; on a full disk that is cut off, and the program goes on. When this process is
    told to end, the program gets the same signal and time to save what it has; however this process ends, none of the
    program's processes is left.
    """
    safe = [] if sys.path[0] in ("", os.getcwd()) else ["-P"]  # no module in this directory stands in for a library's
    with log.open("ab" if append else "wb", buffering=0) as file:
        _write(file, f"{time.strftime('%Y-%m-%d %H:%M:%S')} rlhf-lightning {' '.join(arguments)}\n")
        process = Popen(
            [sys.executable, *safe, "-m", "rlhf_lightning.cli", *arguments],
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, OF_A_PIPELINE: "1"},
            start_new_session=True,
        )
        results: deque[str] = deque(maxlen=1000)
        said: deque[str] = deque(maxlen=1000)
        streams = ((process.stdout, results, file), (process.stderr, said, file))
        copies = [threading.Thread(target=_copy, args=each, daemon=True) for each in streams]
        try:
            for copy in copies:
                copy.start()
            while process.poll() is None:
                tell(said[-1].strip() if said else "starting")
                with suppress(TimeoutExpired):
                    process.wait(0.2)
        except Terminated as termination:
            _signal_group(process.pid, termination.number)
            with suppress(TimeoutExpired):
                process.wait(_PATIENCE)
            raise
        finally:
            if process.poll() != 0:
                _signal_group(process.pid, signal.SIGKILL)
                process.wait()
            for copy in copies:
                copy.join(timeout=5)  # processes that outlive the program may hold its streams
    lines = [line.strip() for line in said if line.strip()]
    complaint = ([line for line in lines if line.startswith(_REFUSAL)] or lines or ["it said nothing"])[-1]
    return Ended(process.returncode, "".join(results).strip(), complaint.removeprefix(_REFUSAL)[:500])


def _copy(stream: IO[str], lines: deque[str], log: FileIO) -> None:
    for line in stream:
        _write(log, line)
        lines.append(line)


def _write(log: FileIO, text: str) -> None:
    with suppress(OSError):  # a full disk
        log.write(text.encode())


def _signal_group(leader: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # it has ended
        os.killpg(leader, number)


def end_with_pipeline() -> None:
    """In a stage: all its processes end when the pipeline does, however that ends."""

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written there
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
