"""Attention over rows end to end, in one kernel: python -m pytest -m gpu tests/gpu/test_packed_attention.py -s"""

from __future__ import annotations

import pytest
import torch

from rlhf_lightning.models.packed_attention import (
    _in_flex_attention,
    _in_one_kernel,
    _last_meets_last,
    _row_by_row,
    _Rows,
    _varlen,
)

OWN, SEEN = (1, 130, 64, 333), (40, 130, 97, 333)
"""Tokens of each row that are its own, and that it sees: the others are the first ones of the row before."""


def key_places(shared: bool) -> torch.Tensor | None:
    if not shared:
        return None
    places, begin = [], 0
    for own, seen in zip(OWN, SEEN, strict=True):
        places += [*range(seen - own), *range(begin, begin + own)]
        begin += own
    return torch.tensor(places, device="cuda")


@pytest.mark.parametrize("way", ["kernel", "flex"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("causal", "shared"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("key_heads", [2, 8])
def test_kernels_and_their_gradients_are_those_of_the_rows_one_by_one(way, dtype, window, causal, shared, key_heads):
    """Both against float32: a kernel may be off by no more than twice what the plain way in halves is."""
    assert _varlen(), "this torch has no varlen_attn with windows; packed would go row by row"
    assert _last_meets_last(torch.device("cuda", 0), dtype), "varlen_attn aligns its rows at the first key"
    torch.manual_seed(0)
    ends, key_ends = (
        torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
        for lengths in (OWN, SEEN if shared else OWN)
    )
    rows = _Rows(ends, key_ends, max(OWN), max(SEEN), causal, window, 0.1)
    tensors = [torch.randn(1, heads, sum(OWN), 64, device="cuda") for heads in (8, key_heads, key_heads)]
    output_gradient = torch.randn(1, sum(OWN), 8, 64, device="cuda")
    places = key_places(shared)

    def made(attention, dtype):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
        query, key, value = leaves
        if attention is _in_flex_attention:
            output = attention(query, key, value, rows, places)
        else:
            gathered = [x if places is None else x.index_select(2, places) for x in (key, value)]
            output = attention(query, *gathered, rows)
        return [output, *torch.autograd.grad(output, leaves, output_gradient.to(dtype))]

    exact = made(_row_by_row, torch.float32)
    plain = made(_row_by_row, dtype)
    kernel = made(_in_one_kernel if way == "kernel" else _in_flex_attention, dtype)
    for right, usual, ours in zip(exact, plain, kernel, strict=True):
        assert (ours.float() - right).abs().max() <= 2 * (usual.float() - right).abs().max() + 1e-3
