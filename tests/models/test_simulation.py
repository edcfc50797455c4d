"""Memory of passes, counted without contents, against tensors that have some."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from rlhf_lightning.functional.logprobs import linear_logprobs
from rlhf_lightning.models.backbones import load_backbone
from rlhf_lightning.models.causal_lm import CausalLM, Lora, load_causal_config
from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.models.states import hidden_states
from rlhf_lightning.planning.simulation import (
    Live,
    NotSimulated,
    Shape,
    cache_bytes,
    count_weights,
    head_bytes,
    simulate,
)

ROWS, TOKENS = 3, 32


def shape(**settings) -> Shape:
    return Shape(**{"policy": True, "rows": ROWS, "tokens": TOKENS} | settings)


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["whole", "LoRA"])
def test_weights_are_counted_as_the_loaded_model_has_them(tiny_qwen2, lora):
    config = load_causal_config(str(tiny_qwen2))
    model = CausalLM.from_pretrained(str(tiny_qwen2), lora=lora).model
    counted = count_weights(config, shape(lora=lora))
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted.quantizable == (0 if lora is None else sum(_frozen_linear(model)))


def _frozen_linear(model):
    return [
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and not name.endswith("lm_head")
    ]


@pytest.mark.parametrize(
    "head", [{}, {"hidden_size": 9, "dropout": 0.1}, {"pooling": "layers"}, {"head": "linear"}], ids=str
)
def test_a_reward_network_s_weights_include_its_head(tiny_llama, head):
    network = RewardNetwork.from_backbone(str(tiny_llama), **head)
    config = AutoConfig.from_pretrained(tiny_llama)
    counted = count_weights(config, shape(policy=False, head=head))
    assert counted.total == counted.trained == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("model", ["tiny_qwen2", "tiny_llama"])
def test_kept_activations_are_those_that_autograd_saves(request, model):
    """Of a real model, by torch's hooks on saved tensors: an account of its own."""
    directory = request.getfixturevalue(model)
    backbone = load_backbone(str(directory))
    own = {tensor.untyped_storage()._cdata for tensor in [*backbone.parameters(), *backbone.buffers()]}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    ids, mask = torch.zeros(ROWS, TOKENS, dtype=torch.long), torch.ones(ROWS, TOKENS, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = hidden_states(backbone, ids, mask)
    kept = sum(storage.nbytes() for key, storage in saved.items() if key not in own)
    counted = simulate(load_causal_config(str(directory)), shape(), "training").kept
    # The simulation counts what is alive: the output, positions and masks too, which nobody saves.
    assert kept <= counted <= kept + 8 * hidden.nbytes


def test_activations_grow_with_the_rows_and_shrink_with_checkpointing_and_half_precision(tiny_llama):
    config = load_causal_config(str(tiny_llama))
    one = simulate(config, shape(rows=2, packed=True), "training")
    two = simulate(config, shape(rows=4, packed=True), "training")
    assert two.kept == pytest.approx(2 * one.kept, rel=0.06)  # positions do not double
    padded = simulate(config, shape(rows=8, tokens=64), "training")
    assert simulate(config, shape(rows=8, tokens=64, gradient_checkpointing=True), "training").kept < padded.kept / 3
    assert simulate(config, shape(rows=8, tokens=64, half_weights=True), "training").kept < 0.7 * padded.kept
    assert simulate(config, shape(policy=False, rows=8, tokens=64), "inference").peak < padded.kept / 2


def test_gradients_that_stay_are_counted_where_they_come_into_being(tiny_llama):
    config = load_causal_config(str(tiny_llama))
    small = shape(policy=False, rows=1, tokens=4)
    without, growing = (simulate(config, small, kind).peak for kind in ("training", "growing"))
    assert growing - without > 0.5 * 4 * count_weights(config, small).trained


@pytest.mark.parametrize("positions", [300, 2500])
@pytest.mark.parametrize("trained", [True, False])
def test_the_output_layer_s_bytes_are_those_of_its_operations(positions, trained):
    hidden = torch.randn(positions, 8, requires_grad=True)
    weight = torch.randn(700, 8, requires_grad=trained)
    targets = torch.zeros(positions, dtype=torch.long)
    with Live([hidden, weight, targets]) as live:
        linear_logprobs(hidden, weight, targets).sum().backward()
    counted = head_bytes(positions, 8, 700, operand=4, cast=False, trained=trained)
    assert live.peak == pytest.approx(counted, rel=0.12)


def test_the_generation_cache_is_that_of_the_model(tiny_qwen2):
    model = CausalLM.from_pretrained(str(tiny_qwen2)).model
    cache = model(input_ids=torch.zeros(1, 9, dtype=torch.long), use_cache=True).past_key_values
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(model.config, 9, size_of_number=4) == stored


def test_a_model_that_looks_at_its_tensors_is_not_simulated(tiny_qwen2, monkeypatch):
    from transformers import Qwen2Model

    monkeypatch.setattr(Qwen2Model, "forward", lambda self, input_ids, **kwargs: input_ids[input_ids > 0].item())
    with pytest.raises(NotSimulated):
        simulate(load_causal_config(str(tiny_qwen2)), shape(), "training")
