"""Attention over rows end to end, in one kernel: python -m pytest -m gpu tests/gpu/test_packed_attention.py -s"""

from __future__ import annotations

import pytest
import torch

from rlhf_lightning.models.packed_attention import _in_one_kernel, _row_by_row, _varlen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = (1, 130, 64, 333)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_heads", [2, 8])
def test_the_kernel_and_its_gradients_are_those_of_the_rows_one_by_one(dtype, window, causal, key_heads):
    """Both against float32: the kernel may be off by no more than twice what the plain way in halves is."""
    assert _varlen(), "this torch has no varlen_attn with windows; packed would go row by row"
    torch.manual_seed(0)
    ends = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).to(torch.int32)
    settings = {"causal": causal, "window": window, "scale": 0.1}
    tensors = [torch.randn(1, heads, sum(LENGTHS), 64, device="cuda") for heads in (8, key_heads, key_heads)]
    output_gradient = torch.randn(1, sum(LENGTHS), 8, 64, device="cuda")

    def made(attention, dtype, *arguments):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
        output = attention(*leaves, ends, *arguments, **settings)
        return [output, *torch.autograd.grad(output, leaves, output_gradient.to(dtype))]

    exact = made(_row_by_row, torch.float32)
    plain = made(_row_by_row, dtype)
    kernel = made(_in_one_kernel, dtype, max(LENGTHS))
    for right, usual, ours in zip(exact, plain, kernel, strict=True):
        assert (ours.float() - right).abs().max() <= 2 * (usual.float() - right).abs().max() + 1e-3
