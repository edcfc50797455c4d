"""The engine that has its replies drawn by a server, with a stand-in for the server."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.causal_lm import CausalLM, Lora
from rlhf_lightning.models.generation import TransformersEngine, seed_of
from rlhf_lightning.models.vllm_engine import MISMATCH, MISMATCH_IN_HALF, VLLMEngine
from tests.models.test_generation import END, PAD, PROMPTS
from tests.models.vllm_stand_in import StandIn

OPTIONS = {"max_new_tokens": 7, "temperature": 0.8, "eos_id": END, "pad_id": PAD}


@pytest.fixture
def server(tiny_qwen2):
    stand_in = StandIn(tiny_qwen2)
    yield stand_in
    stand_in.stop()


@pytest.fixture
def policy(tiny_qwen2):
    return CausalLM.from_pretrained(str(tiny_qwen2))


def test_replies_and_their_logprobs_are_those_of_the_weights_that_were_given(server, policy, tmp_path):
    engine = VLLMEngine(server.url, tmp_path / "weights")
    seeds = [seed_of("seed", i) for i in range(len(PROMPTS))]
    engine.synchronize(policy)
    first = engine.draw(policy, PROMPTS, seeds, **OPTIONS)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.3)
    assert [r.ids.tolist() for r in engine.draw(policy, PROMPTS, seeds, **OPTIONS)] == [r.ids.tolist() for r in first]
    engine.synchronize(policy)
    second = engine.draw(policy, PROMPTS, seeds, **OPTIONS)
    assert [r.ids.tolist() for r in second] != [r.ids.tolist() for r in first]
    rounded = CausalLM.from_pretrained(str(tmp_path / "weights"))
    same = TransformersEngine().draw(rounded, PROMPTS, seeds, **OPTIONS)
    assert [r.ids.tolist() for r in second] == [r.ids.tolist() for r in same]
    for prompt, reply in zip(PROMPTS, second, strict=True):
        ids = torch.cat([prompt, reply.ids])[None]
        with torch.no_grad():
            logprobs = torch.log_softmax(rounded.model(input_ids=ids).logits[0, :-1] / 0.8, dim=-1)
        own = logprobs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        torch.testing.assert_close(reply.logprobs, own, rtol=0, atol=1e-5)
    routes = [route for route, _ in server.asked if route != "/v1/completions"]
    assert routes == ["/collective_rpc", "/reset_prefix_cache"] * 2


def test_nothing_but_the_temperature_shapes_the_drawing(server, policy, tmp_path):
    engine = VLLMEngine(server.url, tmp_path / "weights")
    engine.synchronize(policy)
    engine.draw(policy, PROMPTS[:1], [5], **OPTIONS)
    _, asked = server.asked[-1]
    assert (asked["prompt"], asked["seed"], asked["max_tokens"]) == (PROMPTS[0].tolist(), 5, 7)
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "temperature": 0.8}
    assert neutral.items() <= asked.items()
    assert asked["stop_token_ids"] == [END]
    assert asked["ignore_eos"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_weights_are_given_in_the_dtype_of_the_server(server, policy, tmp_path, dtype):
    server.settings["dtype"] = str(dtype)
    VLLMEngine(server.url, tmp_path / "weights").synchronize(policy)
    stored = load_file(tmp_path / "weights" / "model.safetensors")
    state = policy.model.state_dict()
    assert all(torch.equal(weight, state[name].to(dtype)) for name, weight in stored.items())
    assert {weight.dtype for weight in stored.values()} == {dtype}


@pytest.mark.parametrize("saved", [None, ["norm"]])
def test_the_copy_has_the_adapters_merged_and_the_policy_keeps_them(tiny_llama, tmp_path, saved):
    policy = CausalLM.from_pretrained(str(tiny_llama), lora=Lora(r=4, lora_alpha=8.0, modules_to_save=saved))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ids = torch.tensor([[5, 9, 11, 3]])
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    policy.eval()
    with torch.no_grad():
        expected = policy.model(input_ids=ids).logits
        with policy.adapters_off():
            base = policy.model(input_ids=ids).logits
    policy.save_copy(tmp_path / "copy", dtype=torch.float32)
    copy = CausalLM.from_pretrained(str(tmp_path / "copy")).eval()
    with torch.no_grad():
        torch.testing.assert_close(copy.model(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    assert (expected - base).abs().max() > 0.05
    with safe_open(tmp_path / "copy" / "model.safetensors", framework="pt") as stored:
        names = set(stored.keys())
    assert names <= set(CausalLM.from_pretrained(str(tiny_llama)).model.state_dict()), "a server refuses other names"
    assert policy.has_adapters
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())


def test_without_a_server_the_line_says_how_to_start_one(policy, tmp_path):
    engine = VLLMEngine("http://127.0.0.1:9", tmp_path / "weights")
    with pytest.raises(ModelError, match=r"no server answers at .*VLLM_SERVER_DEV_MODE=1 vllm serve MODEL"):
        engine.synchronize(policy)
    assert not (tmp_path / "weights").exists(), "no gigabytes are written for nobody"


def test_a_server_that_takes_no_weights_is_named(server, policy, tmp_path):
    server.development = False
    with pytest.raises(ModelError, match=r"/server_info\S* answered 404 \(start it with VLLM_SERVER_DEV_MODE=1\)"):
        VLLMEngine(server.url, tmp_path / "weights").synchronize(policy)


def test_a_reply_that_stops_elsewhere_is_refused(server, policy, tmp_path):
    engine = VLLMEngine(server.url, tmp_path / "weights")
    engine.synchronize(policy)
    server.extra_stop = engine.draw(policy, PROMPTS[:1], [5], **OPTIONS)[0].ids[1].item()
    with pytest.raises(ModelError, match=r"after 2 of 7 tokens, .* EOS token 2; .*--generation-config vllm"):
        engine.draw(policy, PROMPTS[:1], [5], **OPTIONS)


def test_a_server_of_another_architecture_is_refused_before_it_gets_weights(server, policy, tiny_llama, tmp_path):
    server.settings["model"] = str(tiny_llama)
    refused(server, policy, tmp_path, f"serves {tiny_llama}, whose model_type is llama; the policy's is qwen2")


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"],
)
def test_a_server_of_other_sizes_is_refused_before_it_gets_weights(server, policy, tiny_qwen2, tmp_path, key):
    config = json.loads((tiny_qwen2 / "config.json").read_text())
    del config["layer_types"]  # one for each layer
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {key: config[key] * 2}))
    server.settings["model"] = str(other)
    refused(server, policy, tmp_path, f"whose {key} is {config[key] * 2}; the policy's is {config[key]}")


def test_a_model_that_is_not_seen_here_is_told_and_not_compared(server, policy, tmp_path, caplog):
    server.settings["model"] = str(tmp_path / "elsewhere")
    VLLMEngine(server.url, tmp_path / "weights").synchronize(policy)
    assert "not compared" in caplog.text


@pytest.mark.parametrize("wrong", [{"generation_config": "auto"}, {"logprobs_mode": "raw_logprobs"}])
def test_a_server_without_the_flags_is_refused_with_their_names(server, policy, tmp_path, wrong):
    server.settings |= wrong
    refused(server, policy, tmp_path, "--generation-config vllm --logprobs-mode processed_logprobs")


def refused(server, policy, tmp_path, words: str) -> None:
    with pytest.raises(ModelError) as refusal:
        VLLMEngine(server.url, tmp_path / "weights").synchronize(policy)
    assert server.url in str(refusal.value)
    assert words in str(refusal.value)
    assert len(str(refusal.value)) < 400
    assert not (tmp_path / "weights").exists()
    assert server.asked == []


@pytest.mark.parametrize("when", ["weights", "responses"])
def test_a_server_that_dies_is_named_with_how_to_restart_it(server, policy, tmp_path, when):
    engine = VLLMEngine(server.url, tmp_path / "weights")
    engine.synchronize(policy)
    server.stop()
    with pytest.raises(ModelError, match=f"{server.url} .*; restart it with "):
        engine.synchronize(policy) if when == "weights" else engine.draw(policy, PROMPTS, [1, 2, 3, 4], **OPTIONS)


@pytest.mark.parametrize(
    ("dtype", "half_precision", "bound"),
    [("float32", False, MISMATCH), ("float32", True, MISMATCH_IN_HALF), ("bfloat16", False, MISMATCH_IN_HALF)],
)
def test_logprobs_further_from_the_policys_than_rounding_explains_are_refused(
    server, policy, tmp_path, dtype, half_precision, bound
):
    server.settings["dtype"] = f"torch.{dtype}"
    engine = VLLMEngine(server.url, tmp_path / "weights")
    engine.synchronize(policy)
    engine.check_mismatch(bound, half_precision=half_precision)
    for mismatch in (1.01 * bound, float("nan")):
        with pytest.raises(ModelError, match="--generation-config vllm --logprobs-mode processed_logprobs"):
            engine.check_mismatch(mismatch, half_precision=half_precision)
