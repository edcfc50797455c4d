"""A real vLLM server of the program that the environment variable RLHF_LIGHTNING_VLLM names, and models for it."""

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
import torch

VARIABLE = "RLHF_LIGHTNING_VLLM"
needs_vllm = pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} does not name the program vllm")
ON_A_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
EOS_ID, PAD_ID = 2, 0
"""Of `builtin:tiny`."""


class Served(NamedTuple):
    url: str
    process: subprocess.Popen

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def write_model(directory: Path, name: str, **sizes: int) -> None:
    """A tiny `llama` or `qwen2` of loud weights with a tokenizer.

    Attention on a CPU needs heads of 32 numbers; these are of 64, and 2 of them as wide as a state: vLLM reads no
    `head_dim` of a Qwen2, and gives other numbers, without an error, where it is not that.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from rlhf_lightning.tiny import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("builtin:tiny"))
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2} | sizes
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    config = AutoConfig.for_model(name, **sizes, **tokens, initializer_range=0.2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


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
