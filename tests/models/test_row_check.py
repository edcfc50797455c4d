"""The numbers of a row are its own, whatever pads it or stands beside it; a model that breaks this is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models import generation, row_check
from rlhf_lightning.models.backbones import load_backbone
from rlhf_lightning.models.causal_lm import CausalLM, Lora
from rlhf_lightning.models.configuration import load_config, max_positions
from rlhf_lightning.models.generation import TransformersEngine
from rlhf_lightning.models.precision import halve_frozen
from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.models.states import hidden_states, layer_states

VOCABULARY = 60
SIZE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"intermediate_size": 48, "max_position_embeddings": 66, "initializer_range": 0.3}
ENCODER = SIZE | {"pad_token_id": 1}
DECODER = SIZE | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
ENCODERS = {
    "bert": SIZE,
    "roberta": ENCODER,
    "longformer": ENCODER | {"attention_window": [4, 4]},
    "data2vec-text": ENCODER,
    "ibert": ENCODER,
    "xmod": ENCODER | {"languages": ["en_XX"], "default_language": "en_XX"},
    "luke": ENCODER | {"entity_vocab_size": 10, "entity_emb_size": 16},
    "esm": ENCODER | {"mask_token_id": 3, "position_embedding_type": "absolute"},
    "mpnet": ENCODER,
    "mra": SIZE,
    "xlnet": {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "modernbert": SIZE | {"global_attn_every_n_layers": 2, "local_attention": 4, "pad_token_id": 0},
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
SCALED = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8}),
    "dynamic": (
        "llama",
        {"max_position_embeddings": 8, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
}


@pytest.fixture(autouse=True)
def nothing_checked_before(monkeypatch):
    monkeypatch.setattr(row_check, "_checked", {})
    monkeypatch.setattr(generation, "_checked", set())


def saved(directory, kind, settings, auto=AutoModel, change=None):
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **settings))
    model.config.architectures = [type(model).__name__]
    if change:
        change(model)
    model.save_pretrained(directory)
    return str(directory)


def rows(*lengths):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCABULARY, (length,), generator=draw) for length in lengths]


def batch(given, *, width, left=False, fill=0):
    ids = torch.full((len(given), width), fill)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for place, row in enumerate(given):
        begin = width - len(row) if left else 0
        ids[place, begin : begin + len(row)] = row
        mask[place, begin : begin + len(row)] = True
    return ids, mask


@torch.no_grad()
def states_alone(directory, given):
    """As transformers computes them, each row by itself and with nothing but its ids."""
    found = []
    for row in given:
        model = AutoModel.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
        found.append(model(input_ids=row[None]).last_hidden_state[0])
    return found


@pytest.mark.parametrize("kind", ENCODERS)
def test_positions_are_counted_as_the_model_counts_them(tmp_path, kind):
    directory = saved(tmp_path, kind, ENCODERS[kind])
    given = rows(7, 12)
    backbone = load_backbone(directory).eval()
    for left in (False, True):
        ids, mask = batch(given, width=14, left=left, fill=backbone.config.pad_token_id or 0)
        with torch.no_grad():
            states = hidden_states(backbone, ids, mask)
        for place, alone in enumerate(states_alone(directory, given)):
            torch.testing.assert_close(states[place][mask[place]], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "longest"), [("bert", 66), ("longformer", 64), ("xmod", 64), ("mra", 66), ("xlnet", None)]
)
def test_the_longest_row_is_what_the_embeddings_have_room_for(tmp_path, kind, longest):
    directory = saved(tmp_path, kind, ENCODERS[kind])
    assert max_positions(load_config(directory)) == longest
    if longest:
        backbone = load_backbone(directory)
        hidden_states(backbone, *batch(rows(longest), width=longest))
        with pytest.raises((IndexError, RuntimeError)):
            hidden_states(backbone, *batch(rows(longest + 1), width=longest + 1))


def with_biases(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


REFUSED = {
    "values of padding in a convolution": ("nystromformer", SIZE, "change with padding"),
    "recurrence over padding": (
        "recurrent_gemma",
        DECODER | {"num_hidden_layers": 3, "head_dim": 8, "lru_width": 32, "attention_window_size": 8},
        "change with padding",
    ),
    "no mask": (
        "rwkv",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
        "change with padding",
    ),
    "only rows of certain lengths": (
        "reformer",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "attn_layers": ["local", "local"],
            "num_attention_heads": 2,
            "attention_head_size": 16,
            "feed_forward_size": 48,
            "axial_pos_embds": False,
            "local_attn_chunk_length": 8,
            "lsh_attn_chunk_length": 8,
        },
        "does not run on rows of tokens",
    ),
    "sparse attention in long batches alone": ("big_bird", SIZE | {"attention_type": "block_sparse"}, "longest row"),
    "buckets for the first long batch": (
        "reformer",
        {"vocab_size": VOCABULARY, "axial_pos_embds": False},
        "longest row",
    ),
    "another input": ("lilt", ENCODER, "does not run on rows of tokens"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_models_whose_numbers_change_with_padding_are_refused(tmp_path, reason):
    kind, settings, message = REFUSED[reason]
    directory = saved(tmp_path, kind, settings, change=with_biases)
    with pytest.raises(ModelError, match=rf"{tmp_path}: .*{kind} model .*{message}"):
        RewardNetwork.from_backbone(directory)


def test_policies_are_asked_too_and_one_configuration_once(tmp_path, monkeypatch):
    settings = REFUSED["recurrence over padding"][1]
    with pytest.raises(ModelError, match=r"recurrent_gemma model .*change with padding"):
        CausalLM.from_pretrained(saved(tmp_path / "a", "recurrent_gemma", settings, AutoModelForCausalLM, with_biases))
    directory = saved(tmp_path / "b", "llama", DECODER, AutoModelForCausalLM)
    CausalLM.from_pretrained(directory)
    monkeypatch.setattr(row_check, "probe_of", None)
    CausalLM.from_pretrained(directory)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("kind", SCALED)
def test_rotary_frequencies_go_by_the_row_alone(tmp_path, kind, layout):
    architecture, settings = SCALED[kind]
    directory = saved(tmp_path, architecture, DECODER | settings)
    given = rows(6, 20, 8, 9)
    backbone = load_backbone(directory, layout=layout).eval()
    expected = states_alone(directory, given)
    for left in (False, True):
        ids, mask = batch(given, width=21, left=left)
        with torch.no_grad():
            states, layers = hidden_states(backbone, ids, mask), layer_states(backbone, ids, mask)
            last = hidden_states(backbone, *batch(given[2:3], width=8))[0]  # after a longer one
        for place, alone in enumerate(expected):
            torch.testing.assert_close(states[place][mask[place]], alone, rtol=1e-4, atol=1e-4)
            normed = torch.nn.functional.layer_norm(alone, alone.shape[-1:])
            torch.testing.assert_close(layers[-1][place][mask[place]], normed, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last, expected[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SCALED)
def test_replies_that_outgrow_the_rotary_frequencies_do_not_change_with_their_company(tmp_path, kind):
    architecture, settings = SCALED[kind]
    policy = CausalLM.from_pretrained(saved(tmp_path, architecture, DECODER | settings, AutoModelForCausalLM))
    options = {"max_new_tokens": 6, "temperature": 0.0, "eos_id": 1, "pad_id": 0}
    given = rows(2, 20, 5, 9)
    together = TransformersEngine(8).draw(policy, given, [0] * 4, **options)
    for prompt, reply in zip(given, together, strict=True):
        (alone,) = TransformersEngine(8).draw(policy, [prompt], [0], **options)
        assert reply.ids.tolist() == alone.ids.tolist()


def test_a_policy_whose_replies_change_with_their_company_is_refused(tmp_path):
    settings = (
        DECODER | EXPERTS | {"head_dim": 8, "block_size": 8, "layer_types": ["linear_attention", "full_attention"]}
    )
    policy = CausalLM.from_pretrained(saved(tmp_path, "minimax", settings, AutoModelForCausalLM))
    options = {"max_new_tokens": 2, "temperature": 0.0, "eos_id": 1, "pad_id": 0}
    with pytest.raises(ModelError, match="responses of a minimax model change with the other prompts"):
        TransformersEngine(8).draw(policy, rows(3, 5), [0, 0], **options)
    assert len(TransformersEngine(1).draw(policy, rows(3, 5), [0, 0], **options)) == 2


def test_the_responses_of_a_policy_whose_frozen_weights_are_halves_are_compared_in_float32(tmp_path):
    directory = saved(tmp_path, "llama", DECODER, AutoModelForCausalLM, change=lambda model: model.bfloat16())
    policy = CausalLM.from_pretrained(directory, lora=Lora(r=2))
    halve_frozen(policy, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        options = {"max_new_tokens": 2, "temperature": 0.0, "eos_id": 1, "pad_id": 0}
        assert len(TransformersEngine(8).draw(policy, rows(3, 5), [0, 0], **options)) == 2


CHUNKS = {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2}
CHUNKS |= {"no_rope_layers": [1, 1], "layer_types": ["chunked_attention", "full_attention"]}
WINDOWS = {
    "phimoe": lambda size: DECODER | EXPERTS | {"sliding_window": size},
    "llama4_text": lambda size: DECODER | CHUNKS | {"attention_chunk_size": size},
}


@pytest.mark.parametrize("size", [8, 4096])
@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_that_come_through_the_mask_alone_are_refused_when_packed(tmp_path, kind, size):
    """Also those that are longer than any row that could be tried at load."""
    directory = saved(tmp_path, kind, WINDOWS[kind](size), AutoModelForCausalLM)
    CausalLM.from_pretrained(directory)
    with pytest.raises(ModelError, match=f"{kind} model has .* through its mask alone"):
        CausalLM.from_pretrained(directory, layout="packed")


def test_what_transformers_itself_refuses_to_pack_is_refused_in_a_line(tmp_path):
    pair = {f"linear_{what}": size for what, size in zip(("num_value_heads", "num_key_heads"), (4, 2), strict=True)}
    settings = DECODER | EXPERTS | pair | {"head_dim": 8, "num_experts": 2, "moe_intermediate_size": 16}
    settings |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16}
    settings |= {"layer_types": ["linear_attention", "full_attention"]}
    directory = saved(tmp_path, "qwen3_next", settings, AutoModelForCausalLM)
    CausalLM.from_pretrained(directory)
    with pytest.raises(ModelError, match=r"rows of a qwen3_next model (cannot be packed|have other numbers packed)"):
        CausalLM.from_pretrained(directory, layout="packed")


def test_adapters_on_a_router_are_refused_in_a_line(tmp_path):
    directory = saved(tmp_path, "llama4_text", WINDOWS["llama4_text"](8), AutoModelForCausalLM)
    CausalLM.from_pretrained(directory, lora=Lora(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"adapters on all-linear do not run in a llama4_text model"):
        CausalLM.from_pretrained(directory, lora=Lora(r=2))


@pytest.mark.parametrize("kind", ["mistral", "olmo3", "qwen2_moe"])
def test_windows_that_attention_is_told_of_are_packed(tmp_path, kind):
    settings = DECODER | {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 0}
    settings |= {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    load_backbone(saved(tmp_path, kind, settings), layout="packed")


def test_a_packed_model_keeps_its_window_in_a_plain_call_without_a_mask(tmp_path):
    directory = saved(tmp_path, "mistral", DECODER | {"sliding_window": 3})
    ids = rows(12)[0][None]
    states = []
    for settings in ({"attn_implementation": "eager"}, {"layout": "packed"}):
        with torch.no_grad():
            states.append(load_backbone(directory, **settings)(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-4)


def sharp(model):
    """Attention in which rounding grows, as it does in the residual streams of real models."""
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.q_proj.weight *= 6
            layer.self_attn.k_proj.weight *= 6


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_rounding_is_told_from_company_by_how_it_grows_in_the_model(tmp_path, layout):
    """Padding changes these states by 4e-5 of their size in float32, and by nothing in float64."""
    directory = saved(tmp_path, "llama", DECODER | {"num_hidden_layers": 6}, change=sharp)
    load_backbone(directory, layout=layout)


def test_routers_draw_no_random_numbers_in_training(tmp_path):
    """Phi-MoE's pick one of the best experts at random where these are close."""
    settings = DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 10.0}
    backbone = load_backbone(saved(tmp_path, "phimoe", settings | {"input_jitter_noise": 0.1})).eval().train()
    ids, mask = batch(rows(9, 12), width=12)
    first = hidden_states(backbone, ids, mask)
    torch.testing.assert_close(hidden_states(backbone, ids, mask), first, rtol=0, atol=0)
    torch.testing.assert_close(hidden_states(backbone.eval(), ids, mask), first, rtol=0, atol=0)
    assert all(layer.training for layer in backbone.train().layers)
