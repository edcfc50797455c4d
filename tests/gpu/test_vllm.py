"""The engine against a real vLLM server: VLLM=vllm/bin/vllm python -m pytest -m gpu tests/gpu/test_vllm.py -s

vLLM lives in a virtual environment of its own: `python -m venv vllm && vllm/bin/pip install vllm`.
"""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request

import pytest
import torch

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.generation import seed_of
from rlhf_lightning.models.vllm_engine import START, VLLMEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif("VLLM" not in os.environ, reason="VLLM does not name the program vllm"),
]
PORT = 8765


@pytest.fixture
def server(qwen2_half_billion):
    _, _, _, _, *options = START.format("X").split()
    command = [os.environ["VLLM"], "serve", str(qwen2_half_billion), *options]
    command += [
        "--port",
        str(PORT),
        "--gpu-memory-utilization",
        "0.4",
        "--max-model-len",
        "2048",
        "--dtype",
        "bfloat16",
    ]
    process = subprocess.Popen(command, env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"})
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=1)
            break
        except OSError:
            assert process.poll() is None, "the server ended"
            time.sleep(1)
    yield f"http://127.0.0.1:{PORT}"
    process.terminate()
    process.wait(60)


@torch.no_grad()
def test_the_server_draws_with_the_weights_that_it_was_given(capsys, server, qwen2_half_billion, tmp_path):
    policy = CausalLM.from_pretrained(str(qwen2_half_billion)).cuda().to(torch.bfloat16).eval()
    engine = VLLMEngine(server, tmp_path / "weights")
    prompts = [torch.randint(5, 900, (length,), device="cuda") for length in range(8, 72)]
    options = {"max_new_tokens": 128, "temperature": 0.8, "eos_id": 2, "pad_id": 0}
    seeds = [seed_of("gpu", i) for i in range(len(prompts))]
    for scale in (1.0, 1.5):
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
        began = time.perf_counter()
        engine.synchronize(policy)
        synchronized = time.perf_counter()
        replies = engine.draw(policy, prompts, seeds, **options)
        drawn = time.perf_counter()
        differences = []
        for prompt, reply in zip(prompts, replies, strict=True):
            ids = torch.cat([prompt, reply.ids])[None]
            logprobs = torch.log_softmax(policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / 0.8, -1)
            own = logprobs.gather(1, reply.ids[:, None])[:, 0].cpu()
            differences.append((own - reply.logprobs).abs().mean())
        mismatch = torch.stack(differences).mean().item()
        tokens = sum(len(reply.ids) for reply in replies)
        with capsys.disabled():
            print(
                f"\nscale {scale}: mismatch {mismatch:.4f} nats a token, weights in {synchronized - began:.1f} s, "
                f"{tokens / (drawn - synchronized):.0f} tokens/s"
            )
        assert mismatch < 0.1
