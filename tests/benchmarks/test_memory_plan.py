"""The planned memory against the measured: python -m pytest -m benchmark tests/benchmarks/test_memory_plan.py -s"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from transformers import LlamaConfig

from rlhf_lightning.models.causal_lm import load_causal_config
from rlhf_lightning.planning.simulation import Shape, count_weights, simulate

pytestmark = pytest.mark.benchmark

_SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
_MEASURE = """
import resource, sys, torch
from transformers import AutoConfig, AutoModel
from rlhf_lightning.models.states import hidden_states
config = AutoConfig.from_pretrained(sys.argv[1])
model = AutoModel.from_config(config).train()
if sys.argv[4] == "True":
    model.activation_checkpointing_enable()
rows, tokens = int(sys.argv[2]), int(sys.argv[3])
def step(rows, tokens):
    ids, mask = torch.zeros(rows, tokens, dtype=torch.long), torch.ones(rows, tokens, dtype=torch.bool)
    mask[0, -1] = False  # without any padding no mask is made
    hidden_states(model, ids, mask).sum().backward()
step(1, 8)
for parameter in model.parameters():
    parameter.grad = None
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
step(rows, tokens)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_batch_takes_the_memory_that_was_planned(tmp_path, checkpointing):
    """Growth of the process over forward and backward of a model of 85M weights, in float32 on a CPU."""
    LlamaConfig(**_SHAPE).save_pretrained(tmp_path)
    rows, tokens = 16, 512
    command = [sys.executable, "-c", _MEASURE, str(tmp_path), str(rows), str(tokens), str(checkpointing)]
    # What the allocator keeps back of freed tensors is no part of a plan.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    measured = int(done.stdout)
    config = load_causal_config(str(tmp_path))
    shape = Shape(policy=False, rows=rows, tokens=tokens, gradient_checkpointing=checkpointing)
    planned = simulate(config, shape, "growing").peak
    print(
        f"checkpointing {checkpointing}: planned {planned / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB, "
        f"ratio {planned / measured:.3f}; {count_weights(config, shape).total:,} weights"
    )
    assert planned == pytest.approx(measured, rel=0.10)
