"""vLLM gives our score of an exported reward model, or does not start; needs a program `vllm`, as test_vllm.py does.

RLHF_LIGHTNING_VLLM=path/to/bin/vllm python -m pytest -m benchmark tests/benchmarks/test_reward_vllm.py -s
"""

from __future__ import annotations

import json
import urllib.request

import pytest
import torch

from tests.benchmarks.reward_exports import PROMPTS, RESPONSES, export_reward_model, our_scores
from tests.vllm_program import needs_vllm, served, write_model

pytestmark = [pytest.mark.benchmark, pytest.mark.filterwarnings("default"), needs_vllm]

CONVERSATIONS = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
]
SERVE = ("--runner", "pooling", "--enforce-eager", "--max-model-len", "256")


def exported(root, name, **head):
    write_model(root / "start", name)
    return export_reward_model(root / "start", root / "reward", **head)


def answered(url, route, content):
    """What a server answers to each of the rows that it was asked for."""
    request = urllib.request.Request(url + route, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())["data"]


def scores_of(url, head, row):
    """Scores of the rows of a request, by the route that a model card names."""
    if head == "linear":
        return [each["probs"][0] for each in answered(url, "/classify", row)]
    return [each["data"][-1][0] for each in answered(url, "/pooling", row | {"task": "token_classify"})]


@pytest.mark.parametrize(
    ("name", "head", "dtype"),
    [
        ("llama", "linear", "float32"),
        ("qwen2", "linear", "float32"),
        ("qwen2", "mlp", "float32"),
        ("llama", "linear", "bfloat16"),
    ],
)
def test_its_score_is_ours(tmp_path, name, head, dtype):
    directory = exported(tmp_path, name, head=head)
    ours = our_scores(directory, RESPONSES)
    with served(directory, *SERVE, "--dtype", dtype, log=tmp_path / "log") as server:
        found = torch.tensor([scores_of(server.url, head, {"messages": each})[0] for each in CONVERSATIONS])
    print("vLLM", name, head, dtype, ours.tolist(), (found - ours).abs().max().item())
    bound = (1e-5 if dtype == "float32" else 0.03) * ours.abs().max().item()
    torch.testing.assert_close(found, ours, rtol=0, atol=bound)
    assert ours.abs().max() > 1, "no sigmoid gives that"


@pytest.mark.parametrize(
    ("head", "options", "reason"),
    [
        ({}, (), "Model architectures ['LlamaForRewardModel'] are not supported"),
        ({}, ("--trust-remote-code",), "no module or parameter named 'score'"),
        ({"activation": "tanh"}, ("--trust-remote-code",), "no module or parameter named 'score'"),
    ],
    ids=["unknown", "trusted", "other_head_trusted"],
)
def test_an_mlp_that_it_cannot_read_does_not_start(tmp_path, head, options, reason):
    directory = exported(tmp_path, "llama", head="mlp", **head)
    log = tmp_path / "log"
    with pytest.raises(AssertionError, match="the server ended"), served(directory, *SERVE, *options, log=log):
        pass
    assert reason in log.read_text(errors="replace")
