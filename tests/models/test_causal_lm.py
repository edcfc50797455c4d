"""Policies: response log-probs against full logits in float64, any padding, adapters on and off, what is refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models import backbones, precision
from rlhf_lightning.models.causal_lm import CausalLM, Lora, ResponseLogprobs
from rlhf_lightning.models.precision import float32_arithmetic
from rlhf_lightning.models.reward_network import RewardNetwork
from tests.models.test_reward_network import VOCAB

LORA = Lora(r=4, lora_alpha=8)


@pytest.fixture(params=["tiny_qwen2", "tiny_llama"])
def policy(request):
    return CausalLM.from_pretrained(str(request.getfixturevalue(request.param))).double()


@pytest.fixture
def adapted(tiny_qwen2):
    torch.manual_seed(0)
    return loud(CausalLM.from_pretrained(str(tiny_qwen2), lora=LORA)).double()


def loud(policy: CausalLM) -> CausalLM:
    """Adapters that change something: B is 0 at the start."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return policy


def rows(lengths=((3, 4), (5, 1), (1, 6), (4, 3))):
    """Pairs of prompt ids and response ids."""
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(5, VOCAB, (n,), generator=generator) for n in pair) for pair in lengths]


def padded(sequences, *, left=0, right=0, pad_id=0):
    """ids, attention mask and response mask of rows that begin after `left` columns, padded to a common width."""
    width = max(len(prompt) + len(response) for prompt, response in sequences) + left + right
    ids = torch.full((len(sequences), width), pad_id)
    attention, answer = torch.zeros(2, len(sequences), width, dtype=torch.bool)
    for row, (prompt, response) in enumerate(sequences):
        start, stop = left + len(prompt), left + len(prompt) + len(response)
        ids[row, left:stop] = torch.cat([prompt, response])
        attention[row, left:stop] = True
        answer[row, start:stop] = True
    return ids, attention, answer


def left_padded(sequences, *, pad_id=0):
    """The same rows with all padding on the left."""
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    parts = [padded([row], left=width - len(row[0]) - len(row[1]), pad_id=pad_id) for row in sequences]
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def twin(policy: CausalLM, prompt, response) -> torch.Tensor:
    """log p of each response token by the definition: whole logits of the one row, softmax by hand, [n]."""
    ids = torch.cat([prompt, response])
    logits = policy.model(input_ids=ids[None], use_cache=False).logits[0]
    result = []
    for position in range(len(prompt), len(ids)):
        exponentials = (logits[position - 1] - logits[position - 1].max()).exp()
        result.append((exponentials[ids[position]] / exponentials.sum()).log())
    return torch.stack(result)


def test_response_logprobs_are_those_of_the_full_softmax(policy):
    out = policy(*padded(rows()))
    expected = [twin(policy, *row) for row in rows()]
    torch.testing.assert_close(out.tokens[out.mask], torch.cat(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(out.sums, torch.stack([e.sum() for e in expected]), rtol=0, atol=1e-12)
    torch.testing.assert_close(out.averages, torch.stack([e.mean() for e in expected]), rtol=0, atol=1e-12)
    assert out.lengths.tolist() == [4, 1, 6, 3]
    assert out.tokens[~out.mask].abs().max() == 0


def test_float32_logprobs_are_within_1e_4_of_float64(policy):
    exact = policy(*padded(rows())).sums
    out = policy.float()(*padded(rows()))
    assert out.sums.dtype == torch.float32
    torch.testing.assert_close(out.sums.double(), exact, rtol=0, atol=1e-4)


def test_gradients_are_those_of_the_full_logits(policy):
    policy(*padded(rows())).sums.square().sum().backward()
    chunked = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    torch.stack([twin(policy, *row).sum() for row in rows()]).square().sum().backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(chunked[name], parameter.grad, rtol=1e-12, atol=1e-9, msg=name)  # they reach 1e3


@torch.no_grad()
@pytest.mark.parametrize("pad_id", [0, 2, 7])
def test_padding_on_any_side_and_of_any_id_changes_nothing(policy, pad_id):
    """Id 2 is the EOS token, 7 an ordinary one: the masks alone say what is padding."""
    plain = policy(*padded(rows())).sums
    for batch in (
        padded(rows(), right=5, pad_id=pad_id),
        padded(rows(), left=4, right=1, pad_id=pad_id),
        left_padded(rows(), pad_id=pad_id),
    ):
        torch.testing.assert_close(policy(*batch).sums, plain, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_pair_in_one_forward_is_two_forwards(policy):
    apart = torch.cat([policy(*padded([row])).sums for row in rows()])
    torch.testing.assert_close(policy(*padded(rows())).sums, apart, rtol=0, atol=1e-12)


@torch.no_grad()
def test_most_likely_tokens_are_the_argmax_of_the_logits(policy):
    batch = padded(rows())
    states = policy.states(*batch)
    logits = policy.model(input_ids=batch[0], attention_mask=batch[1].long(), use_cache=False).logits
    assert torch.equal(policy.most_likely(states), logits[:, :-1][batch[2][:, 1:]].argmax(-1))


def test_the_logits_of_all_tokens_never_exist(tiny_qwen2):
    """No tensor of a forward and backward has as many numbers as [tokens, V] would have."""
    from torch.utils._python_dispatch import TorchDispatchMode

    policy = CausalLM.from_pretrained(str(tiny_qwen2))
    batch = padded(rows([(40, 700)] * 4))
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and policy.config.vocab_size in out.shape:
                largest.append(out.numel())
            return out

    with Sizes():
        policy(*batch).sums.sum().backward()
    assert 0 < max(largest) <= 1024 * policy.config.vocab_size < 2800 * policy.config.vocab_size


def test_a_row_without_a_response_is_refused(policy):
    ids, attention, answer = padded(rows())
    answer[1] = False
    with pytest.raises(ValueError, match="row"):
        policy(ids, attention, answer)


def test_a_response_token_with_nothing_before_it_is_not_counted(policy):
    ids, attention, _ = padded(rows())
    out = policy(ids, attention, attention)
    assert out.lengths.tolist() == (attention.sum(1) - 1).tolist()


def test_shapes_that_differ_are_refused(policy):
    ids, attention, answer = padded(rows())
    with pytest.raises(ValueError, match="response_mask"):
        policy(ids, attention, answer[:, 1:])


def test_two_forwards_in_train_mode_are_equal_because_dropout_is_off(tmp_path, tiny_qwen2):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path / "model")
    policy = CausalLM.from_pretrained(str(tmp_path / "model"))
    assert policy.training
    batch = padded(rows())
    assert torch.equal(policy(*batch).tokens, policy(*batch).tokens)


@pytest.mark.parametrize(
    ("config", "scale"), [(CohereConfig(logit_scale=0.25), 0.25), (GraniteConfig(logits_scaling=3.0), 1 / 3)]
)
def test_a_scale_of_the_logits_is_found_and_used(tmp_path, config, scale):
    small = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config.update(small | {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2})
    config.update({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "scaled")
    policy = CausalLM.from_pretrained(str(tmp_path / "scaled"))
    assert policy.temperature == pytest.approx(1 / scale, rel=1e-6)
    policy.double()
    expected = torch.cat([twin(policy, *row) for row in rows()])
    out = policy(*padded(rows()))
    torch.testing.assert_close(out.tokens[out.mask], expected, rtol=0, atol=1e-5)  # the scale is known to float32


def test_soft_capped_logits_are_refused(tmp_path):
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "capped")
    with pytest.raises(ModelError, match=r"gemma2 model are no multiple.*final_logit_softcapping"):
        CausalLM.from_pretrained(str(tmp_path / "capped"))


def test_logits_that_are_no_multiple_of_the_product_are_refused(tiny_qwen2, monkeypatch):
    from transformers import Qwen2ForCausalLM

    forward = Qwen2ForCausalLM.forward

    def capped(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits.tanh()
        return out

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", capped)
    with pytest.raises(ModelError, match="they differ by"):
        CausalLM.from_pretrained(str(tiny_qwen2))


def test_an_encoder_is_refused(tmp_path, recwarn):
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match=r"an encoder \(bert\)"):
        CausalLM.from_pretrained(str(tmp_path / "bert"))


def test_a_reward_network_is_refused(tmp_path, tiny_qwen2):
    RewardNetwork.from_backbone(str(tiny_qwen2)).save_pretrained(tmp_path / "rewards")
    with pytest.raises(ModelError, match="a reward network, which gives scores"):
        CausalLM.from_pretrained(str(tmp_path / "rewards"))


def test_flash_attention_never_sees_float32(tiny_qwen2, monkeypatch):
    """Kernels in halves alone: the model is measured with sdpa at load, and judged by it in float32."""
    seen = []

    def halves_alone(module, query, key, value, mask, **options):
        seen.append(query.dtype)
        assert query.dtype == torch.bfloat16
        return AttentionInterface._global_mapping["sdpa"](module, query, key, value, None, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "halves_alone", halves_alone)
    for module in (backbones, precision):
        monkeypatch.setattr(module, "is_flash", lambda name: name == "halves_alone")
    policy = CausalLM.from_pretrained(str(tiny_qwen2), attn_implementation="halves_alone")
    given = padded(rows())
    with torch.no_grad(), float32_arithmetic(policy):
        exact = policy(*given).sums
    assert seen == []
    policy.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = policy(*given).sums
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.5)
    network = RewardNetwork.from_backbone(str(tiny_qwen2), attn_implementation="halves_alone")
    assert network.backbone.config._attn_implementation == "halves_alone"


def test_a_missing_attention_implementation_is_refused_with_advice(tiny_qwen2):
    with pytest.raises(ModelError, match=r"flash_attention_2 needs the package flash_attn.*use sdpa"):
        CausalLM.from_pretrained(str(tiny_qwen2), attn_implementation="flash_attention_2")


# ---- adapters ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_the_model_with_adapters_off_is_the_base_bit_for_bit(tmp_path, tiny_qwen2, modules_to_save):
    path = str(untied(tiny_qwen2, tmp_path) if modules_to_save else tiny_qwen2)
    base = CausalLM.from_pretrained(path)
    policy = loud(CausalLM.from_pretrained(path, lora=Lora(r=4, modules_to_save=modules_to_save)))
    for name, parameter in policy.named_parameters():
        if "modules_to_save" in name:
            parameter.mul_(1.1)
    batch = padded(rows())
    on = policy(*batch)
    with policy.adapters_off():
        assert torch.equal(policy(*batch).tokens, base(*batch).tokens)
    assert torch.equal(policy(*batch).tokens, on.tokens)
    assert (on.sums - base(*batch).sums).abs().max() > 0.1


@torch.no_grad()
def test_adapters_are_off_inside_alone_also_nested_and_after_an_error_and_no_flag_of_a_gradient_changes(
    tmp_path, tiny_qwen2
):
    policy = loud(CausalLM.from_pretrained(str(untied(tiny_qwen2, tmp_path)), lora=Lora(modules_to_save=["lm_head"])))
    batch, trained = padded(rows()), [parameter.requires_grad for parameter in policy.parameters()]
    on = policy(*batch).tokens
    with policy.adapters_off():
        off = policy(*batch).tokens
        with policy.adapters_off():
            pass
        assert torch.equal(policy(*batch).tokens, off)
        assert [parameter.requires_grad for parameter in policy.parameters()] == trained
    with pytest.raises(KeyError), policy.adapters_off():
        raise KeyError
    assert torch.equal(policy(*batch).tokens, on)
    assert not torch.equal(off, on)
    assert [parameter.requires_grad for parameter in policy.parameters()] == trained
    with policy.model.disable_adapter():
        assert torch.equal(policy(*batch).tokens, off), "peft's own, which is slower"


def untied(directory, tmp_path):
    """The model with an output layer of its own."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.5)
    model.save_pretrained(tmp_path / "untied")
    return tmp_path / "untied"


def test_adapters_alone_are_trained_and_the_response_logprobs_are_the_full_softmax(adapted):
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    out = adapted(*padded(rows()))
    torch.testing.assert_close(
        out.tokens[out.mask], torch.cat([twin(adapted, *row) for row in rows()]), rtol=0, atol=1e-12
    )
    out.sums.sum().backward()
    assert all(parameter.grad is not None for _, parameter in adapted.named_parameters() if parameter.requires_grad)


def test_the_policys_gradient_survives_a_forward_with_adapters_off(adapted):
    """The order of a training step: policy, reference, backward."""
    batch = padded(rows())
    adapted(*batch).sums.sum().backward()
    alone = {name: parameter.grad.clone() for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    adapted.zero_grad()
    out = adapted(*batch)
    with torch.no_grad(), adapted.adapters_off():
        adapted(*batch)
    out.sums.sum().backward()
    for name, gradient in alone.items():
        assert torch.equal(dict(adapted.named_parameters())[name].grad, gradient)


def test_gradient_checkpointing_changes_no_gradient(tiny_qwen2):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = CausalLM.from_pretrained(str(tiny_qwen2), lora=LORA, gradient_checkpointing=checkpointing)
        assert policy.model.get_base_model().is_activation_checkpointing is checkpointing
        loud(policy).double()(*padded(rows())).sums.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad]))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("targets", ["nothing_of_this_name", ["nothing", "neither"], ["q_proj", "nothing"]])
def test_targets_that_match_nothing_are_refused(tiny_qwen2, targets):
    with pytest.raises(ModelError, match=r"model\.lora\.target_modules: .*noth.* matches no layer.*q_proj") as error:
        CausalLM.from_pretrained(str(tiny_qwen2), lora=Lora(target_modules=targets))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["absent"]}, "modules_to_save: absent matches no layer"),
        ({"modules_to_save": ["lm_head"]}, "share their weights"),
        ({"modules_to_save": ["embed_tokens"]}, "share their weights"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "matches the embeddings"),
        ({"target_modules": ["q_proj", "lm_head"]}, "matches the output layer"),
    ],
)
def test_adapters_at_the_ends_of_a_tied_model_are_refused(tiny_qwen2, settings, message):
    with pytest.raises(ModelError, match=message):
        CausalLM.from_pretrained(str(tiny_qwen2), lora=Lora(**settings))


@pytest.mark.parametrize("settings", [{"r": 0}, {"lora_alpha": 0}, {"lora_dropout": 1.0}])
def test_impossible_adapters_are_refused(settings):
    with pytest.raises(ModelError, match="r must be 1 or more"):
        Lora(**settings)


def test_without_adapters_none_can_be_switched_off(policy):
    with pytest.raises(ModelError, match="no adapters"), policy.adapters_off():
        pass


def test_a_missing_peft_is_named_with_its_remedy(tiny_qwen2, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'rlhf-lightning\[lora\]'"):
        CausalLM.from_pretrained(str(tiny_qwen2), lora=LORA)


def test_four_bits_need_adapters_and_bitsandbytes(tiny_qwen2, monkeypatch):
    with pytest.raises(ModelError, match=r"give model\.lora"):
        CausalLM.from_pretrained(str(tiny_qwen2), load_in_4bit=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        CausalLM.from_pretrained(str(tiny_qwen2), lora=LORA, load_in_4bit=True)


# ---- saving ------------------------------------------------------------------------------------------------


def of_transformers(directory, batch) -> ResponseLogprobs:
    """What plain transformers makes of a directory, float64."""
    return CausalLM(AutoModelForCausalLM.from_pretrained(directory).double())(*batch)


@torch.no_grad()
@pytest.mark.parametrize("merge", [True, False])
def test_a_saved_policy_is_loaded_by_transformers_with_the_same_logprobs(adapted, tmp_path, merge):
    batch = padded(rows())
    before = adapted.float().double()(*batch)
    adapted.float().save_pretrained(tmp_path / "saved", merge=merge)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert ("adapter_config.json" in names) is not merge
    after = of_transformers(tmp_path / "saved", batch)
    # Merging rounds W + (alpha / r) B A to float32; adapters alone are stored exactly.
    torch.testing.assert_close(after.sums, before.sums, rtol=0, atol=1e-4 if merge else 1e-12)


@torch.no_grad()
def test_tied_weights_stay_tied_when_saved(policy, tmp_path):
    from safetensors import safe_open

    policy.float().save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as stored:
        assert "lm_head.weight" not in set(stored.keys())
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is True
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    batch = padded(rows())
    assert torch.equal(CausalLM(loaded)(*batch).tokens, policy(*batch).tokens)


@torch.no_grad()
def test_a_whole_model_saved_over_adapters_is_not_hidden_by_them(adapted, tmp_path):
    adapted.float().save_pretrained(tmp_path / "saved", merge=False)
    adapted.save_pretrained(tmp_path / "saved", merge=True)
    assert not list((tmp_path / "saved").glob("adapter*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"], "nothing half-written is left beside it"
