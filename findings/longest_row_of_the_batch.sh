#!/usr/bin/env bash
# transformers 5.23.0: with LongRoPE or dynamic NTK scaling, the numbers of a row change with the longest row beside it,
# and with dynamic NTK also with batches before it.
#
# The rotary frequencies are chosen once for a whole batch, by its largest position: LongRoPE's long factors apply to
# every row as soon as one row is longer than `original_max_position_embeddings`, and dynamic NTK's growth to every row
# as soon as one is longer than `max_position_embeddings`. A score or log-prob then depends on the company of a row. The
# dynamic frequencies stay in the module: a row of exactly `max_position_embeddings` tokens, which alone is not scaled,
# gets those of the longest row seen before (the reset asks for fewer tokens than that, not for as many).
#
# Seen with transformers 5.23.0, torch 2.13.0 (Python 3.11, CPU), share by which the states of a row differ:
#   longrope: 8 tokens alone, and beside 20 tokens: 0.891
#   dynamic:  8 tokens alone, and beside 20 tokens: 0.071
#   dynamic:  8 tokens alone, before and after a batch with 20 tokens: 0.071
# Exits 0 while this is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaModel, Phi3Config, Phi3Model

size = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
size |= {"num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(ids)
mask[0, 8:] = 0


def longrope():
    torch.manual_seed(0)
    config = Phi3Config(**size, max_position_embeddings=64, original_max_position_embeddings=8, rope_parameters=long)
    return Phi3Model(config).eval()


def ntk():
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**size, max_position_embeddings=8, rope_parameters=dynamic)).eval()


@torch.no_grad()
def states(model, rows):
    return model(input_ids=ids[:rows] if rows > 1 else ids[:1, :8], attention_mask=mask[:rows, : 20 if rows > 1 else 8])[0]


def share(first, second):
    return round(((first - second).norm() / first.norm()).item(), 3)


found = []
for name, make in (("longrope", longrope), ("dynamic", ntk)):
    model = make()
    alone, beside = states(model, 1)[0], states(model, 2)[0, :8]
    found.append(share(alone, beside))
    print(f"{name}: 8 tokens alone, and beside 20 tokens: {found[-1]}")
found.append(share(alone, states(model, 1)[0]))
print("dynamic: 8 tokens alone, before and after a batch with 20 tokens:", found[-1])
sys.exit(not all(value > 0.01 for value in found))
PYTHON
