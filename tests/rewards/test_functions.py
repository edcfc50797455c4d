"""Functions of the user's that judge: in their own right, in `evaluate`, and when they cannot."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from rlhf_lightning.commands.main import main
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.evaluation.run import evaluate
from rlhf_lightning.evaluation.settings import EvaluationSettings
from rlhf_lightning.report.sections import report
from rlhf_lightning.rewards.functions import FunctionScorer
from rlhf_lightning.rewards.scorers import Scored
from rlhf_lightning.rewards.source import RewardSource
from rlhf_lightning.user_code import names_function
from tests.evaluation.conftest import PAIRS, PROMPTS, here, workshop  # noqa: F401 (fixtures)

CODE = """
limit = 3

def brief(prompts, responses):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [-len(text) for text in responses]

def raising(prompts, responses):
    return [{}["no key"] for _ in responses]

def one(prompts, responses):
    return [1.0]

def nothing(prompts, responses):
    return [float("nan") for _ in responses]
"""


@pytest.fixture
def rules(here, monkeypatch):  # noqa: F811
    """A module of the user's in the working directory."""
    (here / "rules.py").write_text(CODE)
    monkeypatch.delitem(sys.modules, "rules", raising=False)
    yield here / "rules.py"
    sys.modules.pop("rules", None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rules:brief", True),
        ("package.rules:brief", True),
        ("builtin:tiny", False),
        ("models/rules:brief", False),
        ("org/model", False),
        ("model", False),
        ("rules:", False),
        (":brief", False),
        ("C:\\models\\reward", False),
    ],
)
def test_what_is_the_name_of_a_function(name, expected):
    assert names_function(name) is expected


def test_scores_are_those_of_the_function_and_lengths_are_characters(rules):
    prompts = [[{"role": "user", "content": "Why?"}]] * 2
    assert FunctionScorer("rules:brief")(prompts, ["So.", "Because."]) == [Scored(-3, 3, False), Scored(-8, 8, False)]


def test_another_code_is_another_scorer(rules):
    before = FunctionScorer("rules:brief").fingerprint
    assert FunctionScorer("rules:brief").fingerprint == before
    assert FunctionScorer("rules:one").fingerprint != before
    rules.write_text(CODE.replace("limit = 3", "limit = 4"))
    assert FunctionScorer("rules:brief").fingerprint != before


def test_a_rule_is_judged_on_pairs_and_judges_the_policies(rules, tmp_path):
    """Against the same by hand."""
    settings = EvaluationSettings(
        out=str(tmp_path),
        reward_model="rules:brief",
        held_out_reward_model="models/other",
        pairs="pairs.jsonl",
        policy="models/after",
        reference="models/before",
        prompts="prompts.jsonl",
        samples=2,
        max_new_tokens=6,
        refusal_prompts=None,
    )
    results = evaluate(settings)
    pairs = [json.loads(line) for line in (rules.parent / "pairs.jsonl").read_text().splitlines()]
    shorter = [np.sign(len(pair["rejected"]) - len(pair["chosen"])) / 2 + 0.5 for pair in pairs]
    quality = results.scorers[0].quality
    assert (quality.accuracy.n, quality.accuracy.value) == (PAIRS, pytest.approx(np.mean(shorter)))
    assert quality.length.longer_wins.value == pytest.approx(1 - np.mean(shorter))
    assert quality.length.spearman.value == pytest.approx(-1)
    for row in results.policies.prompts:
        assert row.rewards == {side: [-len(text) for text in texts] for side, texts in row.replies.items()}
    lengths = [np.mean([*map(len, row.replies["after"])]) for row in results.policies.prompts]
    rule, model = results.policies.judged
    assert (rule.name, rule.held_out, model.held_out) == ("rules:brief", False, True)
    assert rule.reward_after.value == pytest.approx(-np.mean(lengths))
    assert rule.comparison.win_rate.n == PROMPTS
    assert "of a function, in characters" in str(report(results)), "beside the model's, in tokens"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rules:raising", r"rules:raising: raised KeyError ('no key') at "),
        ("rules:one", "rules:one: gave 1 results for "),
        ("rules:nothing", "rules:nothing: its scores of "),
        ("rules:absent", "rules:absent: cannot be imported ("),
        ("no_rules:brief", "no_rules:brief: cannot be imported (ModuleNotFoundError: No module named 'no_rules')"),
        ("rules:limit", "rules:limit: names an object of type int, not a function"),
    ],
)
def test_a_function_that_does_not_score_is_one_line(rules, tmp_path, capsys, name, words):
    assert main(["evaluate", "--reward_model", name, "--pairs", "pairs.jsonl", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert words in said
    assert said.startswith("rlhf-lightning: error: ")


@pytest.mark.parametrize(
    ("code", "words"), [("def brief(:", "SyntaxError: "), ("1 / 0", "ZeroDivisionError: division by zero")]
)
def test_a_module_that_fails_when_it_is_imported_is_one_line(rules, capsys, code, words):
    rules.write_text(code)
    assert main(["evaluate", "--reward_model", "rules:brief", "--pairs", "pairs.jsonl"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"rules:brief: cannot be imported ({words}" in said[0]


def test_a_name_that_is_no_function_is_refused_before_anything_is_read(rules, tmp_path, capsys):
    assert main(["evaluate", "--reward_model", "rules:absent", "--pairs", "nowhere.jsonl"]) == 2
    assert "rules:absent" in capsys.readouterr().err


class Longest:
    """A reward that has a setting: an object that can be called."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, prompts, responses):
        return [self.weight * len(response) for response in responses]


def count_words(prompts, responses):
    return [len(response.split()) for response in responses]


@pytest.mark.parametrize(
    ("given", "name", "expected"),
    [
        (Longest(2.0), "tests.rewards.test_functions:Longest", [10.0, 4.0]),
        (count_words, "tests.rewards.test_functions:count_words", [2.0, 1.0]),
    ],
)
def test_a_function_itself_will_do(given, name, expected):
    source = RewardSource(given, batch_size=4)
    assert source([[{"role": "user", "content": "?"}]] * 2, ["a bcd", "ab"]).tolist() == expected
    assert source.name == name
    with pytest.raises(ConfigurationError, match="gets messages and responses as they are"):
        RewardSource(given, batch_size=4, chat_template="plain")


def test_several_rewards_are_a_weighted_sum_with_names():
    source = RewardSource([Longest(2.0), {"source": count_words, "weight": -0.5, "name": "words"}], batch_size=4)
    prompts, responses = [[{"role": "user", "content": "?"}]] * 2, ["a bcd", "ab"]
    assert source.names == ["Longest", "words"]
    assert source.each(prompts, responses).scores.tolist() == [[10.0, 2.0], [4.0, 1.0]]
    assert source(prompts, responses).tolist() == [9.0, 3.5]
    assert "-0.5 tests.rewards.test_functions:count_words" in source.name


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "an empty list"),
        ([count_words, {"source": count_words, "weight": 2}], "two rewards are named count_words"),
        ([{"source": count_words, "weight": 0}], "weight of count_words is 0"),
        ([{"source": count_words, "weight": float("nan")}], "weight of count_words is nan"),
        ([{"source": count_words, "wait": 2}], "'wait': 2} is no reward"),
        ([{"weight": 2}], "'weight': 2} is no reward"),
        ([3], "3 is no reward"),
        ([{"source": count_words, "chat_template": "plain"}], "gets messages and responses as they are"),
    ],
)
def test_what_is_no_list_of_rewards_is_refused(given, words):
    with pytest.raises(ConfigurationError, match=words):
        RewardSource(given, batch_size=4)


def test_a_text_for_all_of_several_rewards_is_refused():
    with pytest.raises(ConfigurationError, match="with each of the list"):
        RewardSource([count_words], batch_size=4, chat_template="plain")
