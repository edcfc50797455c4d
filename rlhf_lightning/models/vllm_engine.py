"""Responses sampled by a vLLM server, which is a program of its own with its own copy of the weights.

A server and not a library, because vLLM pins versions of torch and transformers that this package does not run with; it
lives in a virtual environment of its own, and may have GPUs of its own. Its routes are those of vLLM 0.33.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.generation import Sampled

START = "VLLM_SERVER_DEV_MODE=1 vllm serve {} --generation-config vllm --logprobs-mode processed_logprobs"
"""How a server is started: development mode opens the routes that take new weights, the model's own settings stay out
of the drawing, and log-probs are those at the temperature."""


class VLLMEngine:
    """Samples responses with a vLLM server; see `RolloutEngine`.

    Every request carries its own seed; vLLM promises the same response to the same seed only as far as its kernels do
    not depend on the batch.

    Args:
        url: Of the server, `http://127.0.0.1:8000`.
        directory: Where the policy's weights are written for it, on a disk or memory that both see; a sixteen-bit copy.
        requests: Requests that are under way at a time.
        timeout: Seconds that a request, or taking the weights, may last.
    """

    def __init__(self, url: str, directory: str | Path, *, requests: int = 256, timeout: float = 3600.0) -> None:
        self.url = url.rstrip("/")
        self.directory = Path(directory).expanduser().resolve()
        self.requests = requests
        self.timeout = timeout
        self._model: str | None = None
        """The name under which the server has its model."""

    def synchronize(self, policy: CausalLM) -> None:
        """Give the server the policy's weights as they are now. Raises `ModelError` when it does not take them."""
        if self._model is None:  # before gigabytes are written for nobody
            models = self._ask(urllib.request.Request(f"{self.url}/v1/models"))
            self._model = models["data"][0]["id"]
        policy.save_copy(self.directory, dtype=torch.bfloat16)
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.directory)}})
        if not self._post("/reset_prefix_cache", {}).get("success", True):
            raise ModelError(f"{self.url}: keeps states of the old weights; is it answering somebody else as well?")

    def draw(
        self,
        policy: CausalLM,
        prompts: Sequence[Tensor],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        eos_id: int,
        pad_id: int,
    ) -> list[Sampled]:
        """As `RolloutEngine.draw`, with the server's log-probs. Needs `synchronize` before it."""
        settings = {
            "model": self._model,
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": 1.0,
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
            answer = self._post("/v1/completions", settings | {"prompt": prompt, "seed": seed})
            return self._response(answer["choices"][0], eos_id)

        with ThreadPoolExecutor(max_workers=max(min(self.requests, len(prompts)), 1)) as pool:
            responses = list(pool.map(response, [prompt.tolist() for prompt in prompts], seeds))
        return [
            Sampled(each.ids.to(prompt.device), each.logprobs) for each, prompt in zip(responses, prompts, strict=True)
        ]

    def _response(self, choice: dict[str, Any], eos_id: int) -> Sampled:
        ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not ids or logprobs is None or len(logprobs) != len(ids):
            raise ModelError(
                f"{self.url}: its responses come without token ids and log-probs; it needs vLLM 0.11 or newer"
            )
        if choice.get("finish_reason") == "stop" and ids[-1] != eos_id:
            raise ModelError(
                f"{self.url}: a response stopped at token {ids[-1]} and not at the EOS token {eos_id}; "
                "start the server with --generation-config vllm"
            )
        return Sampled(torch.tensor(ids), torch.tensor(logprobs, dtype=torch.float32))

    def _post(self, route: str, content: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(content).encode()
        return self._ask(urllib.request.Request(self.url + route, body, {"Content-Type": "application/json"}))

    def _ask(self, request: urllib.request.Request) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read().decode(errors="replace").split())[:200]
            hint = " (start it in development mode)" if error.code == 404 else ""
            raise ModelError(f"model.engine: {request.full_url} answered {error.code}{hint}: {reason}") from error
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model.engine: no vLLM server answers at {request.full_url} ({error}); start one with "
                + START.format("MODEL")
            ) from error
