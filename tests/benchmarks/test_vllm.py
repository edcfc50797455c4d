"""PPO with a real vLLM server, on a CPU or a GPU; needs a program `vllm`, which lives in an environment of its own.

RLHF_LIGHTNING_VLLM=path/to/bin/vllm python -m pytest -m benchmark tests/benchmarks/test_vllm.py -s

docs/ppo.md says how one is installed for a CPU. Attention on a CPU needs heads of 32 numbers or more.
"""

from __future__ import annotations

import functools
import time

import pytest
import torch

from rlhf_lightning import PPO, PromptDataModule
from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.generation import TransformersEngine, seed_of
from rlhf_lightning.models.vllm_engine import MISMATCH, VLLMEngine
from rlhf_lightning.models.vllm_server import FLAGS
from tests.training.conftest import trainer  # noqa: F401
from tests.training.test_ppo import HERE, fitted
from tests.vllm_program import EOS_ID, PAD_ID, needs_vllm, served, write_model

pytestmark = [pytest.mark.benchmark, pytest.mark.filterwarnings("default"), needs_vllm]

SERVE = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "256")
OPTIONS = {"max_new_tokens": 24, "eos_id": EOS_ID, "pad_id": PAD_ID}
PROMPTS = [torch.arange(5 + i, 15 + 3 * i) for i in range(16)]
SEEDS = [seed_of("vllm", i) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of tiny models with heads of 64 numbers and loud weights: `llama`, `qwen2` of its sizes, `wide`."""
    root = tmp_path_factory.mktemp("models")
    write_model(root / "llama", "llama")
    write_model(root / "qwen2", "qwen2")
    write_model(root / "wide", "llama", intermediate_size=128)
    return root


@pytest.fixture(scope="module")
def server(models):
    with served(models / "llama", *SERVE, *FLAGS.split(), log=models / "server.log") as server:
        yield server


@torch.no_grad()
def mismatch_of(policy, sampled, temperature) -> float:
    """Mean distance of the log-probs that a server gave from those of a policy, in nats a token."""
    distances = []
    for prompt, each in zip(PROMPTS, sampled, strict=True):
        logits = policy.model(input_ids=torch.cat([prompt, each.ids])[None]).logits[0, len(prompt) - 1 : -1]
        own = torch.log_softmax(logits / temperature, dim=-1).gather(1, each.ids[:, None])[:, 0]
        distances.append((own - each.logprobs).abs())
    return torch.cat(distances).mean().item()


def test_its_responses_and_logprobs_are_those_of_the_weights_that_it_was_given(server, models, tmp_path):
    policy, engine = CausalLM.from_pretrained(str(models / "llama")), VLLMEngine(server.url, tmp_path / "weights")
    seen = []
    for scale in (1.0, 1.3):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(scale)
        began = time.perf_counter()
        engine.synchronize(policy)
        given = time.perf_counter()
        sampled = engine.draw(policy, PROMPTS, SEEDS, temperature=0.8, **OPTIONS)
        drawn = time.perf_counter()
        tokens, mismatch = sum(len(each.ids) for each in sampled), mismatch_of(policy, sampled, 0.8)
        print(f"\nmismatch {mismatch:.7f} nats a token; weights in {given - began:.2f} s; {tokens} tokens, ", end="")
        print(f"{tokens / (drawn - given):.0f} a second")
        assert mismatch < MISMATCH
        again = engine.draw(policy, PROMPTS, SEEDS, temperature=0.8, **OPTIONS)
        assert [each.ids.tolist() for each in again] == [each.ids.tolist() for each in sampled]
        greedy, own = (
            which.draw(policy, PROMPTS, SEEDS, temperature=0.0, **OPTIONS) for which in (engine, TransformersEngine())
        )
        assert [each.ids.tolist() for each in greedy] == [each.ids.tolist() for each in own]
        seen.append(sampled)
    assert mismatch_of(policy, seen[0], 0.8) > MISMATCH, "the old weights would be noticed"


def test_ppo(server, models, trainer, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    module = PPO(
        backbone=str(models / "llama"),
        reward_model=f"{HERE}:length",
        engine=server.url,
        engine_directory=str(tmp_path / "weights"),
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3, eps=1e-5),
        max_new_tokens=16,
        temperature=0.8,
    )
    data = PromptDataModule(train="builtin:courtesy", tokenizer=str(models / "llama"), batch_size=8, seed=3, limit=40)
    _, recorder, _ = fitted(trainer, (module, data))
    for row in recorder.rows:
        print({name: round(row[name], 7) for name in ("engine_mismatch", "kl", "reward", "seconds/rollout")})
    assert len(recorder.rows) == 5
    assert all(row["engine_mismatch"] < MISMATCH for row in recorder.rows)
    assert recorder.rows[-1]["kl"] > 1, "the policy moved, and the server with it"


@pytest.mark.parametrize(("name", "words"), [("qwen2", "model_type is llama"), ("wide", "intermediate_size is 96")])
def test_another_model_is_refused_before_it_gets_weights(server, models, tmp_path, name, words):
    policy = CausalLM.from_pretrained(str(models / name))
    with pytest.raises(ModelError, match=words):
        VLLMEngine(server.url, tmp_path / "weights").synchronize(policy)
    assert not (tmp_path / "weights").exists()


def test_a_server_that_dies_is_told_with_how_to_go_on(server, models, tmp_path):
    """The last to use this server."""
    policy, engine = CausalLM.from_pretrained(str(models / "llama")), VLLMEngine(server.url, tmp_path / "weights")
    engine.synchronize(policy)
    server.stop()
    with pytest.raises(ModelError, match=f"{server.url} .*restart it with "):
        engine.draw(policy, PROMPTS, SEEDS, temperature=0.8, **OPTIONS)


def test_a_server_without_the_flags_is_refused(models, tmp_path):
    policy = CausalLM.from_pretrained(str(models / "llama"))
    with served(models / "llama", *SERVE, log=models / "plain.log") as plain:
        engine = VLLMEngine(plain.url, tmp_path / "weights")
        with pytest.raises(ModelError, match=FLAGS):
            engine.synchronize(policy)
        engine.server.model, engine.server.dtype = str(models / "llama"), "float32"  # as if it had been taken
        engine.synchronize(policy)
        sampled = engine.draw(policy, PROMPTS, SEEDS, temperature=0.8, **OPTIONS)
    mismatch = mismatch_of(policy, sampled, 0.8)
    print(f"\nwithout the flags: mismatch {mismatch:.3f} nats a token")
    with pytest.raises(ModelError, match=FLAGS):
        engine.check_mismatch(mismatch, half_precision=False)
