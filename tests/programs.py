"""The program in processes of their own, forked from one that has imported what is heavy."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple, NoReturn

from lightning.fabric.plugins.environments.lightning import find_free_network_port

from rlhf_lightning.commands.pipeline import processes as pipeline_processes
from tests.patience import PATIENCE
from tests.test_configs import ROOT

PRELOADED = [
    *("rlhf_lightning.commands.fit", "rlhf_lightning.commands.evaluate"),
    *("transformers.optimization", "torch.utils.tensorboard", "pyarrow.compute", "pandas"),
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


class ForkedProgram(subprocess.Popen):
    """In place of a stage's `Popen`: a fork of this process, which has imported what is heavy, not a new Python."""

    def _execute_child(self, args: list[str], *given) -> None:
        stdin, *_ = pipes = given[9:15]  # both ends of standard input, output and error
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for number, end in enumerate((stdin, pipes[3], pipes[5])):
                os.dup2(end, number)
            os.closerange(3, 1000)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.update(given[5])
            _exit_as_program(args[args.index("rlhf_lightning.cli") + 1 :])
        self._child_created = True
        self._close_pipe_fds(*pipes)


def fork_stages() -> None:
    """Let the stages of a pipeline be forks of this process."""
    pipeline_processes.Popen = ForkedProgram


def _exit_as_program(arguments: Sequence[str]) -> NoReturn:
    from rlhf_lightning.commands.main import main

    code = 1
    try:
        code = main(list(arguments))
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


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
    fork_stages()
    if prepare is not None:
        prepare()
    _exit_as_program(arguments)
