"""The HTTP routes of a vLLM server, and whether it is one that a policy's weights can be given to.

Routes and fields are those of vLLM 0.32; development mode (`VLLM_SERVER_DEV_MODE=1`) opens those that tell its settings
and take new weights.
"""

from __future__ import annotations

import http.client
import json
import logging
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from rlhf_lightning.errors import ModelError, reason_of
from rlhf_lightning.models.configuration import load_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

FLAGS = "--generation-config vllm --logprobs-mode processed_logprobs"
"""The model's own settings stay out of the drawing, and log-probs are those at the temperature."""
START = f"VLLM_SERVER_DEV_MODE=1 vllm serve {{}} {FLAGS}"
"""How a server is started on a directory or hub name."""

_SETTINGS = {"generation_config": "vllm", "logprobs_mode": "processed_logprobs"}
"""What `FLAGS` make of the server's model settings."""
_SAME = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings", "hidden_act", "rope_parameters"),
    *("attention_bias", "mlp_bias", "rms_norm_eps", "sliding_window", "num_local_experts", "num_experts"),
)
"""Keys of a config.json that decide which weights there are and what is computed with them."""


class Server:
    """A program that answers JSON with JSON.

    Args:
        url: `http://127.0.0.1:8000`.
        timeout: Seconds that an answer may take.
    """

    key = ""
    """Begins a refusal."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout

    def get(self, route: str) -> dict[str, Any]:
        """What a route answers. Raises `ModelError` when nothing does, or with an error."""
        return self._ask(urllib.request.Request(self.url + route))

    def post(self, route: str, content: dict[str, Any]) -> dict[str, Any]:
        """What a route answers to some content, as `get`."""
        body = json.dumps(content).encode()
        return self._ask(urllib.request.Request(self.url + route, body, {"Content-Type": "application/json"}))

    def hint(self, code: int) -> str:
        """What to do about an error, or about no answer, which is 0."""
        return "start it, or correct the address" if not code else ""

    def _ask(self, request: urllib.request.Request) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read().decode(errors="replace").split())[:120]
            hint = f" ({self.hint(error.code)})" if self.hint(error.code) else ""
            raise ModelError(f"{self.key}{request.full_url} answered {error.code}{hint}: {reason}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ModelError(
                f"{self.key}no server answers at {self.url} ({reason_of(error)[:80]}); {self.hint(0)}"
            ) from error


class VLLMServer(Server):
    """A vLLM server at an address."""

    key = "model.engine: "

    def __init__(self, url: str, timeout: float) -> None:
        super().__init__(url, timeout)
        self.model: str | None = None
        """The name under which it has its model; None until `connect`."""
        self.dtype = ""
        """Of its arithmetic, such as `bfloat16`."""

    def connect(self, policy: PretrainedConfig) -> None:
        """Find its model. Raises `ModelError` when it is not the policy's model, or served with other settings."""
        name = self.get("/v1/models")["data"][0]["id"]
        served = self.get("/server_info?config_format=json")["vllm_config"]["model_config"]
        self._check_model(served["model"], policy)
        if any(served[key] != value for key, value in _SETTINGS.items()):
            found = ", ".join(f"{key} {served[key]}" for key in _SETTINGS)
            raise ModelError(
                f"model.engine: {self.url} runs with {found}; its log-probs would not be those of the policy. Start it "
                f"with {FLAGS}"
            )
        self.model, self.dtype = name, served["dtype"].removeprefix("torch.")

    def _check_model(self, name: str, policy: PretrainedConfig) -> None:
        """Weights of other shapes would leave the server half-loaded, and equal ones of another architecture pass."""
        try:
            served = load_config(name).get_text_config()
        except ModelError as error:
            log.warning("%s serves a model that was not compared with the policy (%s)", self.url, error)
            return
        for key in _SAME:
            theirs, ours = (getattr(config, key, None) for config in (served, policy.get_text_config()))
            if theirs != ours:
                raise ModelError(
                    f"model.engine: {self.url} serves {name}, whose {key} is {theirs}; the policy's is {ours}. Start "
                    "it on the policy's own model (model.backbone)"
                )

    def hint(self, code: int) -> str:
        if code == 404:
            return "start it with VLLM_SERVER_DEV_MODE=1"
        if 0 < code < 500:
            return ""
        return f"{'start one' if self.model is None else 'restart it'} with {START.format('MODEL')}"
