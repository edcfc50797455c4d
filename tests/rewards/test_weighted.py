"""Several rewards in the place of one: their weighted sum in `evaluate` and `generate`, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from rlhf_lightning.commands.main import main
from rlhf_lightning.data.courtesy.make import make_rows
from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.rewards.functions import FunctionScorer
from rlhf_lightning.rewards.scorers import RewardScorer
from rlhf_lightning.rewards.weighted import WeightedScorer, scorer_of
from tests.rewards.test_functions import count_words

WORDS = "tests.rewards.test_functions:count_words"
PROMPTS = [[{"role": "user", "content": text}] for text in ("Hello?", "Where is the station, please?", "Help")]
RESPONSES = ["Good day.", "I do not know.", "No"]


@pytest.fixture(scope="module")
def model(tiny_qwen2, tmp_path_factory):
    torch.manual_seed(0)
    network = RewardNetwork.from_backbone(str(tiny_qwen2)).eval()
    saved = network.save_pretrained(tmp_path_factory.mktemp("reward") / "network")
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(saved)
    return str(saved)


def listed(model, weight=-0.5):
    return [{"source": WORDS, "weight": 2.0}, {"source": model, "weight": weight, "name": "model"}]


def values(scored):
    return np.array([each.score for each in scored])


def test_the_score_is_the_weighted_sum_and_the_length_the_model_s(model):
    scorer = scorer_of(listed(model), batch_size=2)
    found = scorer(PROMPTS, RESPONSES)
    alone = RewardScorer(model, batch_size=3)(PROMPTS, RESPONSES)
    expected = 2.0 * np.array(count_words(PROMPTS, RESPONSES)) - 0.5 * values(alone)
    assert values(found) == pytest.approx(expected, abs=1e-6)
    assert [each.tokens for each in found] == [each.tokens for each in alone]
    assert scorer.name == f"2 {WORDS} + -0.5 {model}"


def test_another_weight_is_another_scorer_and_one_reward_is_itself(model):
    marks = {scorer_of(listed(model, weight)).fingerprint for weight in (-0.5, -0.4)}
    assert len(marks) == 2
    assert isinstance(scorer_of([WORDS]), FunctionScorer)
    assert isinstance(scorer_of([{"source": WORDS, "weight": 2}]), WeightedScorer)


def asked(row):
    given = row["prompt"]
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def test_evaluate_and_generate_take_a_list(model, tiny_qwen2, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in make_rows("val")[:5]))
    given = json.dumps(listed(model))
    out = tmp_path / "report"
    assert main(["evaluate", "--reward_model", given, "--pairs", str(pairs), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    scorer = scorer_of(listed(model), batch_size=3)
    for row, kept in zip(map(json.loads, pairs.read_text().splitlines()), rows, strict=True):
        sides = [row["chosen"], row["rejected"]]
        assert kept["scores"] == pytest.approx(values(scorer([asked(row)] * 2, sides)), abs=1e-5)
    best = tmp_path / "best.jsonl"
    arguments = ["--policy", str(tiny_qwen2), "--prompts", str(pairs), "--out", str(best), "--max_new_tokens", "4"]
    assert main(["generate", *arguments, "--num_generations", "2", "--reward_model", given]) == 0
    for row in map(json.loads, best.read_text().splitlines()):
        ended = row.get("ended", True)
        assert row["score"] == pytest.approx(scorer([asked(row)], [row["response"]], [ended])[0].score, abs=1e-4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "an empty list"),
        ([{"source": WORDS, "weight": 0}], "weight of count_words is 0"),
        ([WORDS, WORDS], "two rewards are named count_words"),
        ([{"source": WORDS, "chat_template": "plain"}], "gets messages and responses"),
        ([WORDS, "run/best.ckpt"], "a checkpoint within a list"),
        ([WORDS, "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_what_is_no_list_is_one_line_before_anything_is_read(capsys, tmp_path, given, words):
    arguments = ["--reward_model", json.dumps(given), "--pairs", "nowhere.jsonl", "--out", str(tmp_path / "out")]
    assert main(["evaluate", *arguments]) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
