"""The program in processes of their own, forked from one that has imported what is heavy, as `pipeline` does it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from lightning.fabric.plugins.environments.lightning import find_free_network_port

from rlhf_lightning.commands.pipeline import processes as pipeline_processes
from tests.patience import PATIENCE
from tests.test_configs import ROOT

PRELOADED = [
    *pipeline_processes.PRELOADED,
    *("transformers.models.qwen2.modeling_qwen2", "peft", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"),
    *("attrs", "tensorboard.plugins.hparams", "tests.training.killer", "tests.test_pipeline"),
    *("tests.frozen", "tests.reliability.kills"),
]
"""One process forks those of all tests; modules that are not installed are passed over."""


class Ended(NamedTuple):
    """Exit code (negative: the signal), standard output and standard error of all processes."""

    code: int
    out: str
    error: str


def run(
    directory: Path,
    *arguments: str,
    processes: int = 1,
    prepare: Callable[[], None] | None = None,
    meanwhile: Callable[[BaseProcess], None] | None = None,
) -> Ended:
    """Run the program in a directory, in one process or in several that were started as `torchrun` starts them.

    Each of them does first what `prepare` does; `meanwhile` is told of the first one when it has begun.
    """
    directory.mkdir(exist_ok=True)
    environment = dict(os.environ)
    if processes > 1:
        environment |= {"LOCAL_RANK": "0", "NODE_RANK": "0", "MASTER_PORT": str(find_free_network_port())}
    code = forked(_child, directory, arguments, environment, processes, prepare, meanwhile=meanwhile)
    return Ended(code, *((directory / f"{name}.txt").read_text() for name in ("out", "error")))


def forked(
    function: Callable[..., None], *arguments: object, meanwhile: Callable[[BaseProcess], None] | None = None
) -> int:
    """Call a function in a process of its own, and return its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=function, args=arguments)
    process.start()
    if meanwhile is not None:
        meanwhile(process)
    process.join(timeout=PATIENCE)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def start(directory: Path, *arguments: str) -> Ended:
    """Run the program as a user does; where it is to be of several processes, it starts the others itself."""
    directory.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "rlhf_lightning.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    return Ended(done.returncode, done.stdout, done.stderr)


def share_server() -> None:
    """Let what a forked process forks come from the server that it came from itself."""
    forkserver._forkserver.ensure_running = forkserver.ensure_running = lambda: None


def _child(
    directory: Path,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    processes: int,
    prepare: Callable[[], None] | None,
) -> None:
    """The program, or the first of several, its output in files."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # as the pipeline's server has it, that tests share
    share_server()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    for name, stream in (("out", sys.stdout), ("error", sys.stderr)):
        os.dup2(os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream.fileno())
    for rank in range(1, processes):
        if os.fork() == 0:
            os.environ["LOCAL_RANK"] = str(rank)
            break
    if prepare is not None:
        prepare()
    from rlhf_lightning.commands.main import main

    code = main(list(arguments))
    sys.stdout.flush()
    os._exit(code)
