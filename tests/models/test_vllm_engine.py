"""The engine that has its replies drawn by a server, with a stand-in for the server."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.causal_lm import CausalLM, Lora
from rlhf_lightning.models.generation import TransformersEngine, seed_of
from rlhf_lightning.models.vllm_engine import VLLMEngine
from tests.models.test_generation import END, PAD, PROMPTS
from tests.models.vllm_stand_in import StandIn

OPTIONS = {"max_new_tokens": 7, "temperature": 0.8, "eos_id": END, "pad_id": PAD}


@pytest.fixture
def server():
    stand_in = StandIn()
    yield stand_in
    stand_in.shutdown()
    stand_in.server_close()


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
    with pytest.raises(ModelError, match=r"no vLLM server answers at .*VLLM_SERVER_DEV_MODE=1 vllm serve MODEL"):
        engine.synchronize(policy)
    assert not (tmp_path / "weights").exists(), "no gigabytes are written for nobody"


def test_a_server_that_takes_no_weights_is_named(server, policy, tmp_path):
    server.development = False
    with pytest.raises(ModelError, match=r"/collective_rpc answered 404 \(start it in development mode\)"):
        VLLMEngine(server.url, tmp_path / "weights").synchronize(policy)


def test_a_reply_that_stops_elsewhere_is_refused(server, policy, tmp_path):
    engine = VLLMEngine(server.url, tmp_path / "weights")
    engine.synchronize(policy)
    server.extra_stop = engine.draw(policy, PROMPTS[:1], [5], **OPTIONS)[0].ids[1].item()
    with pytest.raises(ModelError, match="and not at the EOS token 2; start the server with --generation-config vllm"):
        engine.draw(policy, PROMPTS[:1], [5], **OPTIONS)
