"""Rows end to end without padding: the same states, gradients and texts as padded rows, or a refusal."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    RobertaConfig,
)

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.backbones import hidden_states, layer_states, load_backbone
from rlhf_lightning.models.causal_lm import CausalLM, Lora
from rlhf_lightning.models.generation import greedy_responses
from rlhf_lightning.models.packed_attention import packed_attention
from rlhf_lightning.models.reward_network import RewardNetwork
from tests.models.test_causal_lm import padded, rows

SIZE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"intermediate_size": 64, "initializer_range": 0.3}
GROUPED = SIZE | {"num_key_value_heads": 2, "head_dim": 8}
KINDS = {
    "grouped queries": Qwen2Config(**GROUPED),
    "window in every layer": MistralConfig(**GROUPED, sliding_window=3),
    "window in some layers": Gemma3TextConfig(
        **GROUPED, sliding_window=3, layer_types=["sliding_attention", "full_attention"]
    ),
    "learned positions": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
    "encoder": BertConfig(**SIZE),
    "positions after padding": RobertaConfig(**SIZE),
}
REFUSED = {
    "position bias": (BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3), "bloom"),
    "attention sinks": (GptOssConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1), "cannot do s_aux"),
    "recurrence": (MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, initializer_range=0.3), "mamba"),
}


def saved(config, directory):
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(directory)
    return str(directory)


def batch_of_rows():
    """Three rows padded on the left, on both sides and on the right."""
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 1:] = mask[1, 2:6] = mask[2, :7] = True
    return torch.randint(5, 50, mask.shape, generator=torch.Generator().manual_seed(0)), mask


@pytest.mark.parametrize("every_layer", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_states_and_gradients_are_those_of_padded_rows(tmp_path, kind, every_layer):
    directory = saved(KINDS[kind], tmp_path)
    ids, mask = batch_of_rows()
    states, gradients = [], []
    for attention in ("sdpa", "packed"):
        backbone = load_backbone(directory, attn_implementation=attention).double()
        hidden = torch.cat(layer_states(backbone, ids, mask), -1) if every_layer else hidden_states(backbone, ids, mask)
        hidden[mask].pow(3).sum().backward()  # the squares of a normalised row have the same sum whatever it is
        states.append(hidden[mask])
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None]))
        assert attention == "sdpa" or not hidden[~mask].any()
    for packed, other in ((states[1], states[0]), (gradients[1], gradients[0])):
        # Some kinds of layer norm compute in float32 whatever they are given.
        torch.testing.assert_close(packed, other, rtol=1e-6, atol=1e-6 * other.abs().max().item())


@pytest.mark.parametrize("reason", REFUSED)
def test_models_whose_rows_would_see_each_other_are_refused(tmp_path, reason):
    config, message = REFUSED[reason]
    with pytest.raises(ModelError, match=message):
        load_backbone(saved(config, tmp_path), attn_implementation="packed")


@pytest.mark.parametrize("others", [{"softcap": 30.0}, {"dropout": 0.1}])
def test_what_the_packed_attention_does_not_know_is_refused(others):
    tensor = torch.zeros(1, 1, 3, 8)
    with pytest.raises(ModelError, match="packed cannot do"):
        packed_attention(torch.nn.ReLU(), tensor, tensor, tensor, None, cu_seq_lens_q=torch.tensor([0, 3]), **others)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, Lora(r=2)])
def test_packed_pairs_have_the_log_probs_of_each_response_alone(tiny_qwen2, checkpointing, lora):
    """No cross-talk between the rows of a pair, nor between pairs."""
    settings = {"lora": lora, "gradient_checkpointing": checkpointing}
    torch.manual_seed(0)
    policy = CausalLM.from_pretrained(str(tiny_qwen2), attn_implementation="packed", **settings).double()
    together = policy(*padded(rows(), left=1, right=2))
    for row, one in enumerate(rows()):
        alone = policy(*padded([one]))
        torch.testing.assert_close(together.sums[row], alone.sums[0], rtol=0, atol=1e-12)
    gradients = []
    for attention in ("packed", "sdpa"):
        torch.manual_seed(0)
        policy = CausalLM.from_pretrained(str(tiny_qwen2), attn_implementation=attention, **settings).double()
        policy(*padded(rows())).sums.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_a_packed_reward_network_gives_the_same_scores(tiny_qwen2, tmp_path):
    torch.manual_seed(0)
    RewardNetwork.from_backbone(str(tiny_qwen2)).save_pretrained(tmp_path / "model")
    ids, mask, _ = padded(rows(), left=2)
    scores = [
        RewardNetwork.from_pretrained(tmp_path / "model", attn_implementation=attention)(ids, mask)
        for attention in ("sdpa", "packed")
    ]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-6)


def test_a_packed_model_generates_what_a_padded_one_does(tiny_qwen2):
    prompts = [prompt for prompt, _ in rows()]
    texts = []
    for attention in ("sdpa", "packed"):
        policy = CausalLM.from_pretrained(str(tiny_qwen2), attn_implementation=attention).eval()
        replies = greedy_responses(policy, prompts, max_new_tokens=8, eos_id=1, pad_id=0)
        texts.append([reply.tolist() for reply in replies])
    assert texts[0] == texts[1] != [[]]


def test_a_packed_model_sees_no_padding_in_a_plain_call_with_a_mask(tiny_qwen2):
    """As in the generation of a padded batch, which hands a mask instead of the places of the rows."""
    ids, mask, _ = padded(rows(), left=2)
    logits = []
    for attention in ("sdpa", "packed"):
        policy = CausalLM.from_pretrained(str(tiny_qwen2), attn_implementation=attention).eval()
        with torch.no_grad():
            logits.append(policy.model(input_ids=ids, attention_mask=mask.long()).logits[mask])
    torch.testing.assert_close(*logits)
