"""A server with the routes of vLLM that the engine uses, which draws by transformers: no GPU, and no vLLM, is needed.

It says nothing of vLLM itself; tests/benchmarks/test_vllm.py does, where there is one.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.generation import TransformersEngine


class StandIn(ThreadingHTTPServer):
    """Serves at `url`; `asked` are all requests in order, `stop_at` a token at which replies stop besides the one asked
    for, `development` whether weights can be given, `settings` what it says of itself, `raw` whether its log-probs are
    those before the temperature."""

    def __init__(self, model: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[tuple[str, dict]] = []
        self.development, self.raw = True, False
        self.extra_stop: int | None = None
        self.settings = {
            "model": str(model),
            "dtype": "torch.bfloat16",
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
        }
        self.policy: CausalLM | None = None
        self.lock = threading.Lock()  # transformers' generate is not for several threads at once
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Answers nobody any more."""
        self.shutdown()
        self.server_close()

    @torch.no_grad()
    def complete(self, content: dict) -> dict:
        prompt = torch.tensor(content["prompt"])
        (end,) = content["stop_token_ids"]
        with self.lock:
            (reply,) = TransformersEngine().draw(
                self.policy,
                [prompt],
                [content["seed"]],
                max_new_tokens=content["max_tokens"],
                temperature=content["temperature"],
                top_p=content["top_p"],
                eos_id=self.extra_stop or end,
                pad_id=0,
            )
        ids = reply.ids
        logits = self.policy.model(input_ids=torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits.float() / (1 if self.raw else content["temperature"]), dim=-1)
        taken = logprobs.gather(1, ids[:, None])[:, 0].tolist()
        stopped = int(ids[-1]) in (end, self.extra_stop)
        choice = {"index": 0, "text": "", "finish_reason": "stop" if stopped else "length", "token_ids": ids.tolist()}
        return {"choices": [choice | {"logprobs": {"token_logprobs": taken}}]}


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            return self._answer(200, {"data": [{"id": "the-model"}]})
        if self.path == "/server_info?config_format=json" and self.server.development:
            return self._answer(200, {"vllm_config": {"model_config": self.server.settings}})
        return self._answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, content))
        if self.path == "/v1/completions" and self.server.policy is not None:
            return self._answer(200, self.server.complete(content))
        if self.path == "/collective_rpc" and self.server.development:
            assert content["method"] == "reload_weights"
            self.server.policy = CausalLM.from_pretrained(content["kwargs"]["weights_path"])
            return self._answer(200, {"results": [None]})
        if self.path == "/reset_prefix_cache" and self.server.development:
            return self._answer(200, {"success": True})
        return self._answer(404, {"detail": "Not Found"})

    def _answer(self, code: int, content: dict) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_) -> None:
        pass
