"""The engine against a real vLLM server on a GPU:

RLHF_LIGHTNING_VLLM=vllm/bin/vllm python -m pytest -m gpu tests/gpu/test_vllm.py -s

vLLM lives in a virtual environment of its own: `python -m venv vllm && vllm/bin/pip install vllm`. What does not need a
GPU is in tests/benchmarks/test_vllm.py.
"""

from __future__ import annotations

import time

import pytest
import torch

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.generation import seed_of
from rlhf_lightning.models.vllm_engine import MISMATCH_IN_HALF, VLLMEngine
from rlhf_lightning.models.vllm_server import FLAGS
from tests.vllm_program import needs_vllm, served

pytestmark = needs_vllm


@pytest.fixture
def server(qwen2_half_billion):
    options = ["--gpu-memory-utilization", "0.4", "--max-model-len", "2048", "--dtype", "bfloat16"]
    with served(qwen2_half_billion, *options, *FLAGS.split()) as server:
        yield server.url


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
        assert mismatch < MISMATCH_IN_HALF
