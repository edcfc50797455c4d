"""A real vLLM server, of the program that the environment variable RLHF_LIGHTNING_VLLM names."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

VARIABLE = "RLHF_LIGHTNING_VLLM"
needs_vllm = pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} does not name the program vllm")
ON_A_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}


class Served(NamedTuple):
    url: str
    process: subprocess.Popen

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@contextmanager
def served(directory: Path, *options: str, log: Path | None = None, patience: float = 600.0) -> Iterator[Served]:
    """A server of the model in `directory`, in development mode, which has answered; it ends with the block.

    `options` are those of `vllm serve`, `log` a file for what it says, `patience` the seconds until it has to answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [os.environ[VARIABLE], "serve", str(directory), "--port", port, *options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(log or os.devnull, "wb") as output:
        process = subprocess.Popen(command, env=ON_A_CPU | environment, stdout=output, stderr=subprocess.STDOUT)
        server = Served(f"http://127.0.0.1:{port}", process)
        try:
            _wait(server, time.monotonic() + patience, log)
            yield server
        finally:
            server.stop()


def _wait(server: Served, end: float, log: Path | None) -> None:
    while True:
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            return
        except OSError:
            said = log.read_text(errors="replace")[-3000:] if log else ""
            assert server.process.poll() is None, f"the server ended: {said}"
            assert time.monotonic() < end, f"the server does not answer: {said}"
            time.sleep(1)
