"""Refilled slots: the responses of `generate` token by token, nothing computed twice, the weights left as they were."""

from __future__ import annotations

import re

import pytest
import torch
from torch.profiler import profile
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from rlhf_lightning.models import slot_engine
from rlhf_lightning.models.causal_lm import CausalLM, Lora
from rlhf_lightning.models.generation import TransformersEngine, seed_of
from rlhf_lightning.models.precision import float32_arithmetic, halve_frozen
from rlhf_lightning.models.rollout_weights import sampling_weights
from rlhf_lightning.models.slot_engine import SlotEngine, greedy_responses

EOS, PAD, NEW = 7, 0, 12
SIZE = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZE |= {"max_position_embeddings": 66, "initializer_range": 0.2, "bos_token_id": 2, "eos_token_id": 1}
DECODER = SIZE | {"num_key_value_heads": 2, "pad_token_id": 0}
WINDOW = DECODER | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
FAMILIES = {
    "llama": DECODER,
    "qwen2": DECODER,
    "gemma3_text": WINDOW | {"query_pre_attn_scalar": 8},
    "gpt2": {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 66, "initializer_range": 0.2},
    "bloom": {"vocab_size": 60, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
}
OTHERS = {
    "mamba": {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "llama": DECODER | {"max_position_embeddings": 16, "rope_parameters": ROPE},
}


@pytest.fixture(autouse=True)
def nothing_measured_before(monkeypatch):
    monkeypatch.setattr(slot_engine, "_fits", {})


@pytest.fixture
def no_generate(monkeypatch):
    """Where the slots are right, nothing else samples."""
    monkeypatch.setattr(slot_engine.TransformersEngine, "draw", lambda *_, **__: pytest.fail("not in slots"))


def policy_of(directory, kind, settings, lora=None) -> CausalLM:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(directory)
    policy = CausalLM.from_pretrained(str(directory), lora=lora)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return policy


def prompts_of(*lengths: int, samples: int = 1) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    made = [torch.randint(8, 60, (length,), generator=draw) for length in lengths]
    return [prompt for prompt in made for _ in range(samples)]


PROMPTS = prompts_of(3, 9, 1, 14, 20, samples=3)
SEEDS = [seed_of(place) for place in range(len(PROMPTS))]


def drawn(engine, policy, prompts=PROMPTS, seeds=SEEDS, *, temperature=1.5, top_p=1.0, new=NEW, eos=EOS):
    options = {"max_new_tokens": new, "top_p": top_p, "temperature": temperature, "eos_id": eos, "pad_id": PAD}
    return [response.ids.tolist() for response in engine.draw(policy, prompts, seeds, **options)]


@pytest.mark.parametrize("said", [False, True])
def test_a_log_says_how_far_the_responses_are_where_it_is_asked_to(tmp_path, monkeypatch, caplog, said):
    policy = policy_of(tmp_path, "llama", FAMILIES["llama"], None)
    monkeypatch.setattr("rlhf_lightning.terminal.SECONDS_BETWEEN_LINES", 0.0)
    caplog.set_level("INFO")
    found = drawn(SlotEngine(4, say_progress=said), policy)
    lines = [re.search(r"^tokens of these responses: (\d+) of (\d+)", message) for message in caplog.messages]
    counts = [(int(line[1]), int(line[2])) for line in lines if line]
    assert bool(counts) == said
    if said:
        assert {total for _, total in counts} == {NEW * len(PROMPTS)}
        done = [count for count, _ in counts]
        assert done == sorted(done)
        assert sum(map(len, found)) < done[-1] < NEW * len(PROMPTS), "what an ended response leaves is counted as done"


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft sets it for GPT-2 by itself
@pytest.mark.parametrize("temperature", [1.5, 0.0])
@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["whole", "adapters"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_responses_are_those_of_generate_whatever_the_slots_and_the_order(
    tmp_path, monkeypatch, kind, lora, temperature
):
    policy = policy_of(tmp_path, kind, FAMILIES[kind], lora)
    expected = drawn(TransformersEngine(), policy, temperature=temperature)
    lengths = [len(response) for response in expected]
    assert max(lengths) == NEW
    if temperature:
        assert min(lengths) < 10
    monkeypatch.setattr(slot_engine.TransformersEngine, "draw", lambda *_, **__: pytest.fail("not in slots"))
    monkeypatch.setattr("rlhf_lightning.models.slots._MORE_COLUMNS", 3)  # so that they move often
    for slots in (4, 64):
        assert drawn(SlotEngine(slots), policy, temperature=temperature) == expected
    some = slice(-4, None, -1)  # in another order
    responses = drawn(SlotEngine(1), policy, PROMPTS[some][:5], SEEDS[some][:5], temperature=temperature)
    assert responses == expected[some][:5]


def test_top_p_is_that_of_generate_whatever_the_slots(tmp_path, monkeypatch):
    policy = policy_of(tmp_path, "llama", DECODER)
    expected = drawn(TransformersEngine(), policy, top_p=0.7)
    assert expected != drawn(TransformersEngine(), policy)
    monkeypatch.setattr(slot_engine.TransformersEngine, "draw", lambda *_, **__: pytest.fail("not in slots"))
    for slots in (1, 4, 64):
        assert drawn(SlotEngine(slots), policy, top_p=0.7) == expected


@pytest.fixture
def passes(monkeypatch):
    """The tokens of each forward pass of a policy's decoder, rows x tokens."""

    def watched(policy):
        shapes: list[tuple[int, int]] = []

        def note(_, args, arguments):
            shapes.append(tuple(arguments["input_ids"].shape))

        policy.model.register_forward_pre_hook(note, with_kwargs=True)
        return shapes

    return watched


@pytest.mark.parametrize("slots", [1, 4, 64])
def test_a_prompt_is_computed_once_and_nothing_for_a_response_that_has_ended(tmp_path, no_generate, passes, slots):
    policy = policy_of(tmp_path, "llama", DECODER)
    drawn(SlotEngine(), policy, PROMPTS[:1], SEEDS[:1])
    shapes = passes(policy)
    lengths = [len(response) for response in drawn(SlotEngine(slots), policy)]
    prompts = sum(rows for rows, tokens in shapes if tokens > 1) + (1 if slots else 0)  # one of a single token
    assert prompts == len(PROMPTS) // 3
    steps = [rows for rows, tokens in shapes if tokens == 1]
    assert sum(steps) == sum(length - 1 for length in lengths) + 1
    assert max(steps) <= slots
    if slots == 4:
        assert sum(rows == 4 for rows in steps) > len(steps) / 2, "slots are refilled"


def test_prompts_of_like_length_alone_are_padded_to_each_other(tmp_path, no_generate, passes):
    policy = policy_of(tmp_path, "llama", DECODER)
    drawn(SlotEngine(), policy, PROMPTS[:1], SEEDS[:1])
    shapes = passes(policy)
    drawn(SlotEngine(), policy, prompts_of(4, 20, 17, 18, 5), SEEDS[:5], new=1)
    assert shapes == [(3, 20), (2, 5)]


@pytest.mark.parametrize("new", [1, 2])
def test_the_shortest_responses(tmp_path, no_generate, new):
    policy = policy_of(tmp_path, "llama", DECODER)
    assert [len(response) for response in drawn(SlotEngine(3), policy, new=new, eos=-1)] == [new] * len(PROMPTS)
    assert drawn(SlotEngine(3), policy, [], []) == []


def test_eos_tokens_that_are_looked_for_now_and_then_end_responses_where_they_stand(tmp_path, monkeypatch, no_generate):
    policy = policy_of(tmp_path, "llama", DECODER)
    expected = drawn(SlotEngine(3), policy)
    monkeypatch.setattr(slot_engine, "_LOOK_EVERY", {"cpu": 8})
    assert drawn(SlotEngine(3), policy) == expected


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_have_the_responses_of_generate(tmp_path, monkeypatch, kind):
    policy = policy_of(tmp_path, kind, OTHERS[kind])
    expected = drawn(TransformersEngine(4), policy)
    monkeypatch.setattr(slot_engine, "Slots", lambda *_: pytest.fail("in slots"))
    if kind == "llama":  # measured, but rows may outgrow the frequencies
        monkeypatch.setattr(slot_engine, "_measured", lambda _: 0.0)
    assert drawn(SlotEngine(4), policy) == expected


class OneColumnLate(slot_engine.Slots):
    """Forgets the first token of every row."""

    def fill(self, prompts, rows):
        super().fill(prompts, rows)
        self.lengths = [length - 1 for length in self.lengths]


def test_slots_that_give_other_scores_are_not_used(tmp_path, monkeypatch):
    policy = policy_of(tmp_path, "llama", DECODER)
    expected = drawn(TransformersEngine(), policy)
    monkeypatch.setattr(slot_engine, "Slots", OneColumnLate)
    assert drawn(SlotEngine(), policy) == expected
    assert list(slot_engine._fits.values()) == [False]


def bits(policy):
    return {
        name: (weight.data_ptr(), weight.requires_grad, weight.clone()) for name, weight in policy.named_parameters()
    }


@pytest.mark.parametrize("precision", ["float32", "autocast", "autocast, frozen halves"])
def test_adapters_are_merged_while_sampling_and_every_weight_is_put_back(tmp_path, no_generate, precision):
    policy, half = policy_of(tmp_path, "llama", DECODER, Lora(r=4)), precision != "float32"
    if "frozen" in precision:
        for weight in policy.parameters():
            weight.data = weight.data.bfloat16().float()
        halve_frozen(policy, torch.bfloat16)
    before, ids = bits(policy), PROMPTS[4][None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
        apart = policy.model(input_ids=ids).logits
        drawn(SlotEngine(3), policy)
        with sampling_weights(policy.model):
            layer = policy.model.get_base_model().model.layers[0].self_attn.q_proj
            assert layer.merged
            assert not torch.equal(layer.get_base_layer().weight, layer_weight(before))
            together = policy.model(input_ids=ids).logits
        assert torch.equal(policy.model(input_ids=ids).logits, apart)
    torch.testing.assert_close(together, apart, rtol=0, atol=0.3 if half else 1e-4)
    assert not any(layer.merged for layer in policy.modules() if hasattr(layer, "merged"))
    for name, (place, trained, weight) in bits(policy).items():
        assert (place, trained) == before[name][:2], name
        assert torch.equal(weight, before[name][2]), name


def layer_weight(before):
    return next(value for name, (*_, value) in before.items() if "layers.0.self_attn.q_proj.base_layer" in name)


def test_weights_are_put_back_when_sampling_fails(tmp_path):
    policy = policy_of(tmp_path, "llama", DECODER, Lora(r=4))
    before = bits(policy)
    with pytest.raises(RuntimeError, match="power cut"), sampling_weights(policy.model):
        raise RuntimeError("power cut")
    assert all(torch.equal(weight, before[name][2]) for name, (*_, weight) in bits(policy).items())


def test_adapters_that_are_off_stay_off(tmp_path, no_generate):
    policy = policy_of(tmp_path, "llama", DECODER, Lora(r=4))
    with policy.adapters_off():
        off = drawn(SlotEngine(3), policy)
        with sampling_weights(policy.model):
            assert not any(layer.merged for layer in policy.modules() if hasattr(layer, "merged"))
    assert off != drawn(SlotEngine(3), policy)


def test_adapters_are_not_merged_into_halves_that_are_computed_with_in_float32(tmp_path):
    policy = policy_of(tmp_path, "llama", DECODER, Lora(r=4)).bfloat16()
    with float32_arithmetic(policy), sampling_weights(policy.model):
        assert not any(layer.merged for layer in policy.modules() if hasattr(layer, "merged"))


def test_adapters_stay_apart_where_memory_is_short(tmp_path, monkeypatch):
    policy = policy_of(tmp_path, "llama", DECODER, Lora(r=4))
    monkeypatch.setattr("rlhf_lightning.models.rollout_weights._SHARE_OF_FREE_MEMORY", 0.0)
    with sampling_weights(policy.model):
        assert not any(layer.merged for layer in policy.modules() if hasattr(layer, "merged"))


def test_autocast_casts_a_weight_once_for_all_steps(tmp_path, no_generate):
    policy = policy_of(tmp_path, "llama", DECODER)
    policy.requires_grad_(False)
    drawn(SlotEngine(), policy, PROMPTS[:1], SEEDS[:1])
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), profile(record_shapes=True) as steps:
        drawn(SlotEngine(), policy, eos=-1)
    casts = [event for event in steps.events() if event.name == "aten::_to_copy"]
    assert sum(event.input_shapes[0] == [60, 32] for event in casts) == 1, "the output layer's"


@torch.no_grad()
def test_weights_that_change_within_one_autocast_are_cast_again(tmp_path, no_generate):
    policy = policy_of(tmp_path, "llama", DECODER)
    weight, ids = policy.model.lm_head.weight, PROMPTS[0][None]
    drawn(SlotEngine(), policy, PROMPTS[:1], SEEDS[:1])
    with torch.autocast("cpu", torch.bfloat16):
        before = policy.model(input_ids=ids).logits
        weight.mul_(2)
        within = drawn(SlotEngine(), policy)
        weight.mul_(2)
        after = policy.model(input_ids=ids).logits
    assert (after / before).median() == 4
    weight.div_(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert drawn(SlotEngine(), policy) == within


def test_keys_are_kept_in_half_under_autocast(tmp_path, monkeypatch, no_generate):
    policy = policy_of(tmp_path, "llama", DECODER)
    dtypes = set()
    step = slot_engine.Slots.step

    def watched(slots):
        dtypes.update(part.dtype for layer in slots.layers for part in (layer.keys, layer.values))
        return step(slots)

    drawn(SlotEngine(), policy, PROMPTS[:1], SEEDS[:1])
    monkeypatch.setattr(slot_engine.Slots, "step", watched)
    with torch.autocast("cpu", torch.bfloat16):
        drawn(SlotEngine(), policy)
    assert dtypes == {torch.bfloat16}


def test_greedy_responses_are_in_slots(tmp_path, no_generate):
    policy = policy_of(tmp_path, "llama", DECODER)
    replies = greedy_responses(policy, PROMPTS, max_new_tokens=NEW, eos_id=EOS, pad_id=PAD)
    assert [reply.tolist() for reply in replies] == drawn(SlotEngine(), policy, temperature=0.0)


def test_no_cache_of_transformers_is_concatenated_at_each_step(tmp_path, monkeypatch, no_generate):
    policy = policy_of(tmp_path, "llama", DECODER)
    updates = []
    update = DynamicCache.update
    monkeypatch.setattr(DynamicCache, "update", lambda *a, **k: updates.append(1) or update(*a, **k))
    drawn(SlotEngine(), policy, prompts_of(9, 9, 8), SEEDS[:3])
    drawn(SlotEngine(), policy, prompts_of(9, 9, 8), SEEDS[:3])
    assert len(updates) == 2 * 3, "of two layers: when measured, and when the prompts of each call are computed"
