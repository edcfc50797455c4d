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

from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.models.backbones import check_attention, chosen_layout, load_backbone
from rlhf_lightning.models.causal_lm import CausalLM, Lora
from rlhf_lightning.models.layouts import plan_rows
from rlhf_lightning.models.packed_attention import layout_of, packed_attention
from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.models.slot_engine import greedy_responses
from rlhf_lightning.models.states import hidden_states, layer_states
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


ENCODERS = ("encoder", "positions after padding")


def batch_of_rows():
    """Rows padded on the left, on both sides and on the right, some of which begin alike.

    The second begins like the first for four tokens, the third like both for one, the fourth is the third, the fifth
    is the first less its last three, and the last has nothing in common with any.
    """
    drawn = torch.randint(5, 50, (6, 9), generator=torch.Generator().manual_seed(0))
    drawn[1, :4], drawn[2, 0], drawn[4], drawn[5, 0] = drawn[0, :4], drawn[0, 0], drawn[0], 4
    drawn[3] = drawn[2]
    ids, mask = torch.zeros_like(drawn), torch.zeros(6, 9, dtype=torch.bool)
    for row, (begin, length) in enumerate([(1, 8), (2, 6), (0, 5), (4, 5), (3, 5), (0, 9)]):
        ids[row, begin : begin + length] = drawn[row, :length]
        mask[row, begin : begin + length] = True
    return ids, mask


@pytest.mark.parametrize("every_layer", [False, True])
@pytest.mark.parametrize("attention", [None, "flex_attention"])
@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_states_and_gradients_are_those_of_padded_rows(tmp_path, kind, layout, attention, every_layer):
    directory = saved(KINDS[kind], tmp_path)
    if layout == "shared" and kind in ENCODERS:
        with pytest.raises(ModelError, match="other numbers shared than alone"):
            load_backbone(directory, layout=layout, attn_implementation=attention)
        return
    ids, mask = batch_of_rows()
    states, gradients = [], []
    for settings in ({}, {"layout": layout, "attn_implementation": attention}):
        backbone = load_backbone(directory, **settings).double()
        with torch.no_grad():  # FlexAttention has no backward pass on a CPU
            plain = hidden_states(backbone, ids, mask)
        states.append(plain[mask])
        hidden = torch.cat(layer_states(backbone, ids, mask), -1) if every_layer else hidden_states(backbone, ids, mask)
        hidden[mask].pow(3).sum().backward()  # the squares of a normalised row have the same sum whatever it is
        states.append(hidden[mask])
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None]))
    assert not hidden[~mask].any()
    for packed, other in ((states[2], states[0]), (states[3], states[1]), (gradients[1], gradients[0])):
        # Some kinds of layer norm compute in float32 whatever they are given.
        torch.testing.assert_close(packed, other, rtol=1e-6, atol=1e-6 * other.abs().max().item())


@pytest.mark.parametrize("reason", REFUSED)
def test_models_whose_rows_would_see_each_other_are_refused(tmp_path, reason):
    config, message = REFUSED[reason]
    with pytest.raises(ModelError, match=message):
        load_backbone(saved(config, tmp_path), layout="packed")


@pytest.mark.parametrize(
    ("config", "layout"),
    [(KINDS["grouped queries"], "shared"), (KINDS["encoder"], "packed"), (REFUSED["recurrence"][0], "padded")],
    ids=["decoder", "encoder", "recurrence"],
)
def test_auto_is_the_last_layout_in_which_rows_have_their_own_numbers(tmp_path, config, layout):
    backbone = load_backbone(saved(config, tmp_path), layout="auto")
    assert layout_of(backbone) == layout
    again = load_backbone(str(tmp_path), layout="auto")  # without measuring
    assert layout_of(again) == layout


def test_attention_that_is_chosen_is_for_padded_rows():
    assert [chosen_layout("auto", name) for name in (None, "sdpa", "flex_attention")] == ["auto", "padded", "auto"]
    with pytest.raises(ConfigurationError, match=r"model.layout is shared"):
        chosen_layout("shared", "eager")
    for name, words in (("packed", "give it as model.layout"), ("sdpq", "transformers knows: .*'eager'")):
        with pytest.raises(ModelError, match=words):
            check_attention(name)


@pytest.mark.parametrize("share", [False, True])
def test_a_plan_computes_each_beginning_once(share):
    ids, mask = batch_of_rows()
    plan = plan_rows(ids, mask, share=share)
    seen = ids.flatten()[plan.tokens]
    assert torch.equal(seen[plan.place[mask]], ids[mask])
    if not share:
        assert (len(plan.tokens), plan.keys) == (int(mask.sum()), None)
        return
    # The fifth row's 5 tokens begin the first, which adds 3; 2 of the second after 4, 4 of the third after 1, none of
    # the fourth, which is the third, and all 9 of the last.
    assert len(plan.tokens) == 8 + 2 + 4 + 9
    assert plan.ends.diff().sum() == len(plan.tokens)
    assert plan.longest == plan.longest_keys == 9
    rows = plan.keys.split(plan.key_ends.diff().tolist())
    assert sorted(len(row) for row in rows) == [5, 5, 6, 8, 9]


def test_a_beginning_that_is_a_small_part_of_a_row_is_computed_again():
    ids, mask = torch.arange(20).repeat(2, 1), torch.ones(2, 20, dtype=torch.bool)
    ids[1, 2:] += 20
    assert len(plan_rows(ids, mask, share=True).tokens) == 40
    ids[1, 2] = 2
    assert len(plan_rows(ids, mask, share=True).tokens) == 37


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
    policy = CausalLM.from_pretrained(str(tiny_qwen2), layout="packed", **settings).double()
    together = policy(*padded(rows(), left=1, right=2))
    for row, one in enumerate(rows()):
        alone = policy(*padded([one]))
        torch.testing.assert_close(together.sums[row], alone.sums[0], rtol=0, atol=1e-12)
    gradients = []
    for layout in ("shared", "packed", "padded"):
        torch.manual_seed(0)
        policy = CausalLM.from_pretrained(str(tiny_qwen2), layout=layout, **settings).double()
        policy(*padded(rows())).sums.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, rtol=1e-10, atol=1e-10)


def test_a_packed_reward_network_gives_the_same_scores(tiny_qwen2, tmp_path):
    torch.manual_seed(0)
    RewardNetwork.from_backbone(str(tiny_qwen2)).save_pretrained(tmp_path / "model")
    ids, mask, _ = padded(rows(), left=2)
    scores = [
        RewardNetwork.from_pretrained(tmp_path / "model", layout=layout)(ids, mask)
        for layout in ("padded", "packed", "shared")
    ]
    for other in scores[1:]:
        torch.testing.assert_close(scores[0], other, rtol=1e-5, atol=1e-6)


def test_a_packed_model_generates_what_a_padded_one_does(tiny_qwen2):
    prompts = [prompt for prompt, _ in rows()]
    texts = []
    for layout in ("padded", "packed", "shared"):
        policy = CausalLM.from_pretrained(str(tiny_qwen2), layout=layout).eval()
        replies = greedy_responses(policy, prompts, max_new_tokens=8, eos_id=1, pad_id=0)
        texts.append([reply.tolist() for reply in replies])
    assert texts[0] == texts[1] == texts[2] != [[]]


def test_a_packed_model_sees_no_padding_in_a_plain_call_with_a_mask(tiny_qwen2):
    """As in the generation of a padded batch, which hands a mask instead of the places of the rows."""
    ids, mask, _ = padded(rows(), left=2)
    logits = []
    for layout in ("padded", "packed", "shared"):
        policy = CausalLM.from_pretrained(str(tiny_qwen2), layout=layout).eval()
        with torch.no_grad():
            logits.append(policy.model(input_ids=ids, attention_mask=mask.long()).logits[mask])
    for other in logits[1:]:
        torch.testing.assert_close(logits[0], other)
