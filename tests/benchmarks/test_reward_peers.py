"""Libraries that stand on transformers give our score of an exported reward model, or stop with an error.

`pip install trl==1.16.0 sentence-transformers==6.2.0` in an environment of their own, then `pytest -m benchmark` there.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoTokenizer

from tests.benchmarks.reward_exports import PROMPTS, RESPONSES, export_reward_model, our_scores

pytestmark = [pytest.mark.benchmark, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_qwen2"])
def start(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["mlp", "linear"])
def exported(request, start, tmp_path_factory):
    """The directory of an exported reward model of loud weights, and which head it has."""
    return export_reward_model(
        start, tmp_path_factory.mktemp("exported") / request.param, head=request.param
    ), request.param


def test_cross_encoder(exported):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    directory, head = exported
    if head == "mlp":
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            sentence_transformers.CrossEncoder(directory)
    model = sentence_transformers.CrossEncoder(directory, trust_remote_code=head == "mlp")
    found = torch.tensor(model.predict(list(zip(PROMPTS, RESPONSES, strict=True)), batch_size=3))
    ours = our_scores(directory, RESPONSES)
    print("CrossEncoder", head, (found - ours).abs().max().item())
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)


def test_grpo(exported, start, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    directory, head = exported
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    options = {"output_dir": str(tmp_path), "max_steps": 1, "per_device_train_batch_size": 6, "num_generations": 2}
    options |= {"max_completion_length": 8, "report_to": "none", "use_cpu": True, "bf16": False}

    def trainer(**more):
        args = trl.GRPOConfig(**options, **more)
        return trl.GRPOTrainer(str(start), reward_funcs=directory, args=args, train_dataset=Dataset.from_list(rows))

    if head == "mlp":
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            trainer()
    run = trainer(trust_remote_code=head == "mlp")
    prompts = [row["prompt"] for row in rows]
    replies = [[{"role": "assistant", "content": response}] for response in RESPONSES]
    found = run._calculate_rewards([{}] * len(rows), prompts, replies, [[1]] * len(rows))[:, 0].cpu()
    ours = our_scores(directory, RESPONSES)
    print("GRPOTrainer", head, (found - ours).abs().max().item())
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)
    run.train()
    assert math.isfinite(run.state.log_history[-1]["reward"])


def test_reward_trainer_goes_on_from_it(exported, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    directory, head = exported
    pairs = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": response}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    options = {"output_dir": str(tmp_path), "max_steps": 1, "per_device_train_batch_size": 3, "report_to": "none"}
    options |= {"use_cpu": True, "bf16": False, "learning_rate": 0.0, "logging_steps": 1}

    def trainer(**more):
        args = trl.RewardConfig(**options, **more)
        return trl.RewardTrainer(directory, args=args, train_dataset=Dataset.from_list(pairs))

    if head == "mlp":
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            trainer()
    run = trainer(trust_remote_code=head == "mlp")
    run.train()
    difference = our_scores(directory, RESPONSES) - our_scores(directory, ["No."] * 3)
    loss = -torch.nn.functional.logsigmoid(difference).mean().item()
    print("RewardTrainer", head, run.state.log_history[0]["loss"], loss)
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-4)  # TRL rounds what it logs
    assert AutoTokenizer.from_pretrained(directory).pad_token_id == run.model.config.pad_token_id
