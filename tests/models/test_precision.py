"""Float32 arithmetic of models that are held or computed in halves."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import DebertaV2Config, DebertaV2Model

from rlhf_lightning.models.causal_lm import CausalLM, Lora
from rlhf_lightning.models.precision import allow_tf32, float32_arithmetic
from rlhf_lightning.models.reward_network import RewardNetwork


def rows(seed: int = 0):
    ids = torch.randint(0, 300, (3, 24), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.bool)
    return ids, mask, torch.arange(24).expand(3, 24) > 8


def disturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def rounded(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def test_products_are_exact_also_where_a_user_has_switched_to_tf32(tiny_llama):
    torch.set_float32_matmul_precision("high")
    try:
        with float32_arithmetic(CausalLM.from_pretrained(str(tiny_llama))):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


ADAPTERS = Lora(r=4, lora_alpha=8.0)


@pytest.mark.parametrize(
    ("device", "precision", "override", "before", "after"),
    [
        ("cuda", "32-true", None, "highest", "high"),
        ("cuda", "32-true", "0", "highest", "highest"),
        ("cuda", "32-true", None, "medium", "medium"),
        ("cuda", "bf16-mixed", None, "highest", "highest"),
        ("cpu", "32-true", None, "highest", "highest"),
    ],
)
def test_tf32_is_for_float32_runs_on_cuda(monkeypatch, device, precision, override, before, after):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if override:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    torch.set_float32_matmul_precision(before)
    try:
        assert allow_tf32(torch.device(device), precision) == (after == "high")
        assert torch.get_float32_matmul_precision() == after
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("directory", "lora"),
    [("tiny_llama", None), ("tiny_llama", ADAPTERS), ("tiny_qwen2", ADAPTERS), ("tiny_bert", None)],
)
def test_halves_are_multiplied_in_float32(request, directory, lora, dtype):
    """Weights rounded to halves give what the same rounded weights give as float32 numbers."""
    torch.manual_seed(0)  # of the new head
    name = str(request.getfixturevalue(directory))
    ids, mask, response_mask = rows()
    if directory == "tiny_bert":
        model = disturbed(RewardNetwork.from_backbone(name, pooling="mean"))
        scores = functools.partial(model, ids, mask)
    else:
        model = disturbed(CausalLM.from_pretrained(name, lora=lora))
        scores = lambda: model(ids, mask, response_mask).tokens  # noqa: E731
    rounded(model, dtype)
    with float32_arithmetic(model):
        found = scores()
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}, "wide only while in use"
    half = scores()
    rounded(model, torch.float32)
    expected = scores()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
    assert (half - expected).abs().max() > 5e-5


def test_a_module_of_a_list_that_reads_the_weights_of_another_finds_them_wide():
    """DeBERTa's encoder reads the weight of an embedding that it never calls."""
    config = DebertaV2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        initializer_range=0.2,
    )
    model = disturbed(DebertaV2Model(config))
    ids, mask, _ = rows()
    rounded(model, torch.bfloat16)
    with float32_arithmetic(model):
        found = model(ids, mask).last_hidden_state
    rounded(model, torch.float32)
    torch.testing.assert_close(found, model(ids, mask).last_hidden_state, rtol=1e-6, atol=1e-5)


def test_weights_are_halves_again_after_a_pass_that_failed(tiny_llama):
    model = disturbed(CausalLM.from_pretrained(str(tiny_llama)))
    rounded(model, torch.bfloat16)
    ids, mask, response_mask = rows()
    with pytest.raises(IndexError), float32_arithmetic(model):
        model(ids + 10**6, mask, response_mask)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_under_autocast_float32_weights_give_what_they_give_without(tiny_llama):
    model = disturbed(CausalLM.from_pretrained(str(tiny_llama), lora=ADAPTERS))
    expected = model(*rows()).tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(*rows()).tokens
        with float32_arithmetic(model):
            assert torch.equal(model(*rows()).tokens, expected)
    assert (half - expected).abs().max() > 1e-3


def test_layers_that_dequantize_do_so_to_float32(tiny_llama):
    """bitsandbytes' Linear4bit computes in its `compute_dtype`."""
    model = CausalLM.from_pretrained(str(tiny_llama))
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    for layer in layers:
        layer.compute_dtype = torch.bfloat16
    with float32_arithmetic(model, None):
        assert {layer.compute_dtype for layer in layers} == {torch.float32}
    assert {layer.compute_dtype for layer in layers} == {torch.bfloat16}
