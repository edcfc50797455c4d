"""Training steps on rows end to end, and with prompts shared, against padded rows, shuffled and sorted by length.

python -m pytest -m benchmark tests/benchmarks/test_packing_speed.py -s
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
import torch

from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.tiny import builtin_texts, make_tiny_model

PAIRS, BATCH_SIZE, ROUNDS = 32, 8, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def hh_like_batches(*, sort: bool) -> list[PreferenceBatch]:
    """Lengths as in hh-rlhf harmless-base: prompts of 85 tokens in the median and 112 in the mean, responses of 31
    and 44 (lognormal)."""
    draw = np.random.default_rng(0)
    prompts = np.exp(draw.normal(np.log(85), 0.75, PAIRS)).clip(8, 800).astype(int)
    responses = np.exp(draw.normal(np.log(31), 0.84, (PAIRS, 2))).clip(2, 500).astype(int)
    order = np.argsort(-(prompts + responses.max(axis=1))) if sort else np.arange(PAIRS)
    batches = []
    for start in range(0, PAIRS, BATCH_SIZE):
        part = order[start : start + BATCH_SIZE]
        begin = np.tile(prompts[part], 2)[:, None]
        end = begin + responses[part].T.reshape(-1, 1)
        position = np.arange(end.max())
        mask = torch.from_numpy(position < end)
        row = np.where(position < begin, np.tile(part, 2)[:, None], np.concatenate([part, part + PAIRS])[:, None])
        ids = torch.from_numpy((position * 7 + row * 31) % 195 + 5)
        response = mask & torch.from_numpy(position >= begin)
        batches.append(
            PreferenceBatch(ids, mask, response, torch.zeros(len(part)), torch.from_numpy(part), torch.ones(()))
        )
    return batches


def step(network, batches: list[PreferenceBatch]) -> float:
    """Forward and backward of all batches, summed over them."""
    total = 0.0
    for batch in batches:
        rows = [tensor.to(DEVICE) for tensor in batch[:3]]
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            value = network(*rows).sums if isinstance(network, CausalLM) else network(*rows[:2])
        chosen, rejected = value.chunk(2)
        loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).sum()
        loss.backward()
        total += loss.item()
    network.zero_grad()
    return total


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """8 layers of width 512: large enough that the matrix products count."""
    path = tmp_path_factory.mktemp("model")
    return make_tiny_model(path, builtin_texts(), architecture="llama", hidden_size=512, layers=8)


@pytest.mark.benchmark
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [CausalLM.from_pretrained, RewardNetwork.from_backbone], ids=["DPO", "reward model"])
def test_layouts_with_fewer_tokens_are_faster_and_have_the_same_loss(directory, kind):
    ways = {"padded": ("padded", False), "padded, sorted": ("padded", True)}
    ways |= {"packed": ("packed", True), "shared": ("shared", True)}
    torch.manual_seed(0)
    networks = {layout: kind(str(directory), layout=layout) for layout in ("padded", "packed", "shared")}
    for network in networks.values():
        network.load_state_dict(networks["padded"].state_dict())
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses = {}
    for _ in range(ROUNDS):
        for way, (layout, sort) in ways.items():
            network, batches = networks[layout].to(DEVICE), hh_like_batches(sort=sort)
            began = time.perf_counter()
            losses[way] = step(network, batches)
            seconds[way].append(time.perf_counter() - began)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    for way, median in medians.items():
        print(f"{way}: {PAIRS / median:.2f} pairs/s, {medians['padded'] / median:.2f}x, on {DEVICE}")
    assert list(losses.values()) == pytest.approx([losses["padded"]] * len(ways), rel=0.02)
    assert medians["shared"] < medians["packed"] < medians["padded, sorted"] < medians["padded"]
