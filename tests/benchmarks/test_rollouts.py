"""Processor seconds of a rollout in slots that are refilled, against transformers' `generate`, of the same responses.

SPEED_MODEL=DIRECTORY python -m pytest -m benchmark tests/benchmarks/test_rollouts.py -s
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lightning.models import generation, slot_engine
from rlhf_lightning.models.causal_lm import CausalLM, Lora
from rlhf_lightning.models.generation import TransformersEngine, seed_of
from rlhf_lightning.models.slot_engine import SlotEngine

PROMPTS, SHORTEST, LONGEST, ROUNDS, EOS = 32, 16, 128, 3, 2


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    """A Llama of 8 layers and 512 states with random weights, or the model that the environment names."""
    if given := os.environ.get("SPEED_MODEL"):
        return given
    target = tmp_path_factory.mktemp("speed")
    sizes = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8)).save_pretrained(target)
    return str(target)


@pytest.fixture
def forced_lengths(monkeypatch):
    """The response of each seed has a length of its own, from 16 to 128 tokens, whatever the model would say."""
    lengths: dict[int, int] = {}
    said: Counter[int] = Counter()
    sampled = generation.with_noise

    def forced(scores, generators, *how):
        scores = sampled(scores, generators, *how)
        for row, generator in zip(scores, generators, strict=True):
            seed = generator.initial_seed()
            said[seed] += 1
            row[EOS] = torch.inf if said[seed] >= lengths[seed] else -torch.inf
        return scores

    for module in (generation, slot_engine):
        monkeypatch.setattr(module, "with_noise", forced)
    return lengths, said


@pytest.mark.benchmark
@pytest.mark.parametrize("precision", ["float32", "bf16, adapters"])
@pytest.mark.parametrize("samples", [1, 8])
def test_refilled_slots_take_less_time_than_generate(directory, forced_lengths, samples, precision):
    lengths, said = forced_lengths
    policy = CausalLM.from_pretrained(directory, lora=Lora(r=16) if "adapters" in precision else None)
    draw = np.random.default_rng(0)
    sizes = np.exp(draw.normal(np.log(85), 0.75, PROMPTS)).clip(8, 256).astype(int)
    prompts = [torch.from_numpy(draw.integers(5, 200, size)) for size in sizes for _ in range(samples)]
    seeds = [seed_of(i) for i in range(len(prompts))]
    wanted = np.linspace(SHORTEST, LONGEST, len(prompts)).astype(int)
    lengths.update(zip(seeds, draw.permutation(wanted).tolist(), strict=True))
    options = {"max_new_tokens": LONGEST, "temperature": 1.0, "eos_id": EOS, "pad_id": 0}
    half = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)  # as Lightning's
    seconds: dict[str, list[float]] = {"generate": [], "slots": []}
    SlotEngine().draw(policy, prompts[:1], seeds[:1], **options)  # what is measured once
    for _ in range(ROUNDS):
        for name, engine in (("generate", TransformersEngine()), ("slots", SlotEngine())):
            said.clear()
            with half if precision != "float32" else contextlib.nullcontext():
                start = time.process_time()
                responses = engine.draw(policy, prompts, seeds, **options)
                seconds[name].append(time.process_time() - start)
            assert [len(response.ids) for response in responses] == [lengths[seed] for seed in seeds]
    before, after = (statistics.median(seconds[name]) for name in ("generate", "slots"))
    print(f"\n{precision}, G={samples}: generate {before:.1f} s, slots {after:.1f} s: {before / after:.2f} x")
    assert before > after
