"""Responses sampled by a vLLM server, which is a program of its own with its own copy of the weights.

A server and not a library, because vLLM pins versions of torch and transformers that this package does not run with; it
lives in a virtual environment of its own, and may have GPUs of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.generation import Sampled
from rlhf_lightning.models.vllm_server import FLAGS, VLLMServer

MISMATCH, MISMATCH_IN_HALF = 0.01, 0.2
"""Nats a token that rounding may account for, the second where server or policy compute in half precision: there five
times the 0.04 of SmolLM2-135M, and in float32 thousands of times what was seen (docs/measured.md)."""


class VLLMEngine:
    """Samples responses with a vLLM server; see `RolloutEngine`.

    Every request carries its own seed; vLLM promises the same response to the same seed only as far as its kernels do
    not depend on the batch.

    Args:
        url: Of the server, `http://127.0.0.1:8000`.
        directory: Where the policy's weights are written for it, on a disk or memory that both see, in its dtype.
        requests: Requests that are under way at a time.
        timeout: Seconds that a request, or taking the weights, may last.
    """

    def __init__(self, url: str, directory: str | Path, *, requests: int = 256, timeout: float = 3600.0) -> None:
        self.server = VLLMServer(url, timeout)
        self.directory = Path(directory).expanduser().resolve()
        self.requests = requests

    def synchronize(self, policy: CausalLM) -> None:
        """Give the server the policy's weights as they are now.

        Raises `ModelError` when it does not take them, or is not the policy's (see `VLLMServer.connect`).
        """
        server = self._connected(policy)  # before gigabytes are written for nobody
        policy.save_copy(self.directory, dtype=getattr(torch, server.dtype))
        server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.directory)}})
        if not server.post("/reset_prefix_cache", {}).get("success", True):
            raise ModelError(f"{server.url}: keeps states of the old weights; is it answering somebody else as well?")

    def check_mismatch(self, mismatch: float, *, half_precision: bool) -> None:
        """Refuse a server whose log-probs are further from the policy's, in nats a token, than rounding explains.

        `half_precision` says how the policy's own were computed. Raises `ModelError`.
        """
        bound = MISMATCH_IN_HALF if half_precision or self.server.dtype != "float32" else MISMATCH
        if not mismatch <= bound:
            raise ModelError(
                f"model.engine: the log-probs of {self.server.url} are {mismatch:.3f} nats a token from the policy's, "
                f"where rounding explains {bound}; it has other weights or settings. Restart it with {FLAGS}, "
                "without quantization, on model.backbone"
            )

    def _connected(self, policy: CausalLM) -> VLLMServer:
        if self.server.model is None:
            self.server.connect(policy.config)
        return self.server

    def draw(
        self,
        policy: CausalLM,
        prompts: Sequence[Tensor],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        eos_id: int,
        pad_id: int,
    ) -> list[Sampled]:
        """As `RolloutEngine.draw`, with the server's log-probs. One process calls `synchronize` before it."""
        server = self._connected(policy)
        settings = {
            "model": server.model,
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "ignore_eos": True,  # a response ends with our EOS token and with nothing else
            "stop_token_ids": [eos_id],
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }

        def response(prompt: list[int], seed: int) -> Sampled:
            answer = server.post("/v1/completions", settings | {"prompt": prompt, "seed": seed})
            return _response(answer["choices"][0], server.url, eos_id=eos_id, max_new_tokens=max_new_tokens)

        with ThreadPoolExecutor(max_workers=max(min(self.requests, len(prompts)), 1)) as pool:
            responses = list(pool.map(response, [prompt.tolist() for prompt in prompts], seeds))
        return [
            Sampled(each.ids.to(prompt.device), each.logprobs) for each, prompt in zip(responses, prompts, strict=True)
        ]


def _response(choice: dict[str, Any], url: str, *, eos_id: int, max_new_tokens: int) -> Sampled:
    """What a server at `url` gave as one response. Raises `ModelError` where it is none that was asked for."""
    ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    if not ids or logprobs is None or len(logprobs) != len(ids):
        raise ModelError(f"{url}: its responses come without token ids and log-probs; it needs vLLM 0.11 or newer")
    if ids[-1] != eos_id and len(ids) != max_new_tokens:
        raise ModelError(
            f"{url}: a response ended ({choice.get('finish_reason')}) after {len(ids)} of {max_new_tokens} tokens, at "
            f"token {ids[-1]} and not at the EOS token {eos_id}; start the server with --generation-config vllm"
        )
    return Sampled(torch.tensor(ids), torch.tensor(logprobs, dtype=torch.float32))
