"""The processes of a pipeline: forked from one server, each the leader of a group, none left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import NoReturn

PRELOADED = (
    *("rlhf_lightning.commands.fit", "rlhf_lightning.commands.evaluate"),
    *("transformers.optimization", "torch.utils.tensorboard", "pyarrow.compute", "pandas"),
)
"""Imported once, by the server from which all stages are forked: the commands, and what they import when they run."""


class Terminated(BaseException):
    """A signal, other than Ctrl-C, that asks the pipeline to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def terminated() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`, and so do SIGHUP and SIGUSR1, which nohup and others may have taken."""

    def stop(number: int, _: object) -> NoReturn:
        raise Terminated(number)

    free = [n for n in (signal.SIGHUP, signal.SIGUSR1) if signal.getsignal(n) is signal.SIG_DFL]
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, *free)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def server() -> ForkServerContext:
    """Processes forked from a server that has imported what is heavy, and done nothing else."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to look for GPUs must not spoil them for the forked
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
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
def running_process(process: BaseProcess) -> Iterator[None]:
    """Start a process that leads a group of its own; at the end nothing of it is left."""
    process.start()
    try:
        yield
    finally:
        if process.exitcode != 0:
            signal_group(process, signal.SIGKILL)
            process.join()


def signal_group(process: BaseProcess, number: int) -> None:
    """To all processes of its group, or to itself when it has not made one yet."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        if process.exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)


def begin_process() -> None:
    """A process group of its own, which ends with the pipeline, however that ends; signals as a program has them."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # inherited blocked from the server
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os.killpg(0, signal.SIGKILL)
