"""Judges: the verdict is read or not, never guessed; order, unread replies and resuming are counted exactly."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from transformers import AutoTokenizer

from rlhf_lightning.errors import ConfigurationError, DataError
from rlhf_lightning.evaluation.benchmarks.base import BenchmarkRow
from rlhf_lightning.evaluation.benchmarks.judged import judge_rewardbench, judge_rewardbench2, right_place
from rlhf_lightning.evaluation.benchmarks.rewardbench import SUBSETS
from rlhf_lightning.evaluation.benchmarks.rewardbench2 import SUBSETS_2, ties_score
from rlhf_lightning.evaluation.judge import TOO_LONG, PolicyJudge, ask
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.slot_engine import greedy_responses
from rlhf_lightning.rewards.questions import comparison_question, parse_rating, parse_verdict, rating_question
from rlhf_lightning.rewards.writers import Sampling
from tests.evaluation.kept import kept_entries

QUESTION = [{"role": "user", "content": "Which is longer?"}]


def pairs(per_subset=1):
    """Pairs of every subset whose chosen response is the longer one."""
    return [
        BenchmarkRow(f"{name}:{i}", name, QUESTION, (f"{name} {i} xxx", f"{name} {i} y"), 1, "here")
        for name in SUBSETS
        for i in range(per_subset)
    ]


def shown(question):
    """The answers of a question by their letters."""
    return dict(re.findall(r"<answer ([A-Z])>\n(.*?)\n</answer>", question, re.DOTALL))


class Scripted:
    """A judge out of a function of one question; counts what it is asked, and stops after so many calls."""

    def __init__(self, reply, calls=None, name="longest"):
        self.reply, self.calls = reply, calls
        self.name = self.fingerprint = name
        self.asked: list[str] = []

    def __call__(self, questions):
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls = None if self.calls is None else self.calls - 1
        self.asked += questions
        return [self.reply(question) for question in questions]


def longest(question):
    answers = shown(question)
    return f"All are fine.\n[[{max(answers, key=lambda letter: len(answers[letter]))}]]"


# ---- verdicts


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("[[A]]", "A"),
        ("Good reasons.\n\n[[B]]\n", "B"),
        ("[[ B ]]", "B"),
        ("[[A]] it is: [[A]]", "A"),
        ("<think>[[A]]? No.</think>[[B]]", "B"),
        ("[[A]] or [[B]]? I say [[B]]", None),
        ("[[A]] would be better than [[C]]", None),
        ("[[C]]", None),
        ("[[a]]", None),
        ("[A]", None),
        ("A", None),
        ("The better answer is A.", None),
        ("[[AB]]", None),
        ("[[A]]</think>", None),
        ("", None),
    ],
)
def test_a_verdict_is_one_letter_in_double_brackets_or_none(reply, verdict):
    assert parse_verdict(reply) == verdict


def test_letters_are_those_that_were_offered():
    assert parse_verdict("[[D]]", "ABCD") == "D"
    assert parse_verdict("[[D]]", "ABC") is None


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("[[8]]", 8),
        ("[[10]] because ... [[10]]", 10),
        ("[[ 1 ]]", 1),
        ("<think>[[3]]</think> [[4]]", 4),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[-3]]", None),
        ("[[8/10]]", None),
        ("[[8.5]]", None),
        ("[[7]] or [[8]]", None),
        ("**8**", None),
        ("8/10", None),
        ("I give it 9.", None),
        ("", None),
    ],
)
def test_a_rating_is_one_whole_number_in_double_brackets_or_none(reply, rating):
    assert parse_rating(reply) == rating


def test_a_question_holds_every_text_and_each_choice_once():
    turns = [*QUESTION, {"role": "assistant", "content": "Of what?"}, {"role": "user", "content": "Of {these}"}]
    question = comparison_question(turns, ["one {0}", "two", "three", "four"])
    assert shown(question) == {"A": "one {0}", "B": "two", "C": "three", "D": "four"}
    assert "user: Which is longer?\n\nassistant: Of what?\n\nuser: Of {these}" in question
    assert re.findall(r"\[\[(.)\]\]", question) == list("ABCD")
    assert "four answers" in question
    assert "[[C]]" not in comparison_question(turns, ["one", "two"])
    assert "<answer>\none\n</answer>" in rating_question(turns, "one")


# ---- pairs


def test_a_judge_that_sees_the_better_one_is_right_in_both_orders():
    judge = Scripted(longest)
    result = judge_rewardbench(judge, pairs(2))
    assert (result.table.total.value, result.strict_accuracy.value, result.consistency.value) == (1, 1, 1)
    assert (result.parsed.value, result.first_place.value, result.n_unparsed) == (1, 0.5, 0)
    assert result.n_pairs == 46
    assert len(judge.asked) == len(set(judge.asked)) == 92
    orders = [shown(question)["A"] for question in judge.asked[:2]]
    assert orders == ["alpacaeval-easy 0 xxx", "alpacaeval-easy 0 y"]
    json.dumps(asdict(result), allow_nan=False)


def test_a_judge_of_places_gets_one_half_and_no_consistency():
    result = judge_rewardbench(Scripted(lambda question: "[[A]]"), pairs())
    assert (result.table.total.value, result.strict_accuracy.value, result.consistency.value) == (0.5, 0, 0)
    assert result.first_place.value == 1
    assert {verdict.score for verdict in result.rows} == {0.5}


def test_nonsense_is_counted_and_worth_one_half():
    result = judge_rewardbench(Scripted(lambda question: "[[A]] or [[B]]"), pairs())
    assert {estimate.value for estimate in result.table.subsets.values()} == {0.5}
    assert (result.parsed.value, result.n_unparsed, result.strict_accuracy.value) == (0, 46, 0)
    assert result.consistency is None
    assert result.first_place is None
    json.dumps(asdict(result), allow_nan=False)


def test_every_mixture_of_right_wrong_and_unread_has_its_points():
    rows = pairs()[:9]
    replies = ["right", "wrong", "unread"]
    script = {}
    for number, row in enumerate(rows):
        for order, want in enumerate((replies[number // 3], replies[number % 3])):
            letter = {"right": "AB"[order], "wrong": "BA"[order], "unread": "?"}[want]
            responses = row.responses[::-1] if order else row.responses
            script[comparison_question(row.prompt, responses)] = f"[[{letter}]]"
    result = judge_rewardbench(Scripted(script.__getitem__), rows)
    assert [verdict.score for verdict in result.rows] == [1, 0.5, 0.75, 0.5, 0, 0.25, 0.75, 0.25, 0.5]
    assert result.n_unparsed == 6
    assert (result.consistency.value, result.consistency.n) == (0.5, 4)
    assert (result.first_place.value, result.first_place.n) == (0.5, 12)
    assert result.strict_accuracy.value == pytest.approx(1 / 9)


def test_replies_are_kept_and_no_question_is_asked_twice(tmp_path):
    rows, file = pairs(4), tmp_path / "made" / "replies.jsonl"
    whole = judge_rewardbench(Scripted(longest), rows)
    first = Scripted(longest, calls=2)
    with pytest.raises(KeyboardInterrupt):
        judge_rewardbench(first, rows, file)
    assert len(first.asked) == 128
    with file.open("a") as torn:
        torn.write('{"crc32": "89abcdef", "maker": "lon')
    second = Scripted(longest)
    assert judge_rewardbench(second, rows, file) == whole
    assert sorted(first.asked + second.asked) == sorted(set(first.asked + second.asked))
    assert len(kept_entries(file)) == 184
    other = Scripted(lambda question: "[[A]]", name="first")
    judge_rewardbench(other, rows, file)
    assert len(other.asked) == 184


def test_a_judge_that_loses_a_reply_is_refused():
    class Loser(Scripted):
        def __call__(self, questions):
            return super().__call__(questions)[1:]

    with pytest.raises(DataError, match="gave 1 replies to 2 questions"):
        ask(Loser(str), ["a", "b"])


# ---- version 2


def prompts_2(per_subset=40):
    rows = [
        BenchmarkRow(
            f"{name}{i}", name, QUESTION, (f"{name} {i} xxxxx", *(f"{name} {i} " + y for y in "abc")), 1, "here"
        )
        for name in SUBSETS_2
        if name != "Ties"
        for i in range(per_subset)
    ]
    for i in range(3):
        rows.append(BenchmarkRow(f"ref:{i}", "Ties", QUESTION, ("x" * (i + 4), "y" * i, "y"), 1, "here"))
        rows.append(BenchmarkRow(f"tied:{i}", "Ties", QUESTION, ("x" * 8, "x" * (8 - i), "y" * 2), 2, "here"))
    return rows


def test_the_correct_response_stands_in_each_place_alike_and_always_in_the_same():
    rows = prompts_2()[:200]
    places = Counter(right_place(row) for row in rows)
    assert set(places) == {0, 1, 2, 3}
    assert min(places.values()) > 30  # 50 expected, standard deviation 6
    judge = Scripted(longest)
    judge_rewardbench2(judge, rows)
    for row, question in zip(rows, judge.asked, strict=True):
        answers = shown(question)
        assert answers[string.ascii_uppercase[right_place(row)]] == row.responses[0]
        assert sorted(answers.values()) == sorted(row.responses)


def length_rating(question):
    (answer,) = re.findall(r"<answer>\n(.*?)\n</answer>", question, re.DOTALL)
    return f"[[{max(1, len(answer))}]]"


def test_four_ways_and_ratings_make_up_version_2():
    rows = prompts_2()
    judge = Scripted(lambda question: longest(question) if "<answer A>" in question else length_rating(question))
    result = judge_rewardbench2(judge, rows)
    items = [
        {
            "id": row.id,
            "subset": "Ties",
            "scores": [max(1, len(r)) for r in row.responses],
            "num_correct": row.num_correct,
        }
        for row in rows[-6:]
    ]
    ties = ties_score(items)
    values = {name: estimate.value for name, estimate in result.subsets.items()}
    assert values == dict.fromkeys(list(SUBSETS_2)[:5], 1.0) | {"Ties": pytest.approx(ties, abs=1e-12)}
    assert result.total.value == pytest.approx((5 + ties) / 6, abs=1e-12)
    assert result.parsed.value == 1
    assert sum(result.chosen_places.values()) == 200
    json.dumps(asdict(result), allow_nan=False)


def test_a_choice_of_four_that_cannot_be_read_is_worth_a_quarter_and_such_a_rating_is_below_all():
    rows = prompts_2()
    result = judge_rewardbench2(Scripted(lambda question: "I cannot say."), rows)
    assert {result.subsets[name].value for name in list(SUBSETS_2)[:5]} == {0.25}
    assert result.subsets["Ties"].value == pytest.approx(0.0, abs=1e-12)
    assert (result.n_unparsed_choices, result.n_unparsed_ratings, result.parsed.value) == (200, 18, 0)
    assert result.chosen_places == {}
    # one wrong response that was not rated stands below the others
    tie = [BenchmarkRow(f"{form}:1", "Ties", QUESTION, ("xx", "y"), 1, "here") for form in ("ref", "tied")]
    judge = Scripted(lambda question: "[[1]]" if "\nxx\n" in question else "?")
    assert judge_rewardbench2(judge, tie).subsets["Ties"].value == pytest.approx(1.01, abs=1e-12)


def test_a_judge_of_one_place_gets_a_quarter():
    result = judge_rewardbench2(Scripted(lambda question: "[[C]]"), prompts_2()[:200])
    right = Counter(right_place(row) for row in prompts_2()[:200])[2]
    assert sum(result.subsets[name].value for name in list(SUBSETS_2)[:5]) / 5 == pytest.approx(right / 200)
    assert result.chosen_places == {"C": 200}
    assert result.total is None


# ---- a model as a judge


def test_a_model_answers_as_it_would_alone_and_a_random_one_is_never_read(tiny_qwen2):
    judge = PolicyJudge(str(tiny_qwen2), max_new_tokens=6, batch_size=4)
    questions = ["Hello?", "Where is the station, please?", "Help", "Good evening to all of you", "Yes"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    policy = CausalLM.from_pretrained(str(tiny_qwen2))
    for question, reply in zip(questions, judge(questions), strict=True):
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt = torch.tensor(tokenizer(text)["input_ids"])
        options = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
        (alone,) = greedy_responses(policy, [prompt], max_new_tokens=6, **options)
        assert reply == tokenizer.decode(alone, skip_special_tokens=True)
    result = judge_rewardbench(judge, pairs()[:3])
    assert result.parsed.value == 0
    assert {verdict.score for verdict in result.rows} == {0.5}


def test_a_question_that_does_not_fit_is_not_asked_and_counted(tiny_qwen2):
    judge = PolicyJudge(str(tiny_qwen2), max_new_tokens=2000)
    assert judge.writer.room == 48
    judge.writer.how = Sampling(2)
    long, short = judge(["a question without an end " * 40, "Hello?"])
    assert long == TOO_LONG != short
    assert (parse_verdict(TOO_LONG, "ABCD"), parse_rating(TOO_LONG)) == (None, None)
    with pytest.raises(ConfigurationError, match="leaves no room"):
        PolicyJudge(str(tiny_qwen2), max_new_tokens=2048)


def test_questions_that_were_not_asked_are_counted_again_when_an_evaluation_goes_on(tmp_path):
    rows = pairs()[:3]
    too_long = comparison_question(rows[1].prompt, rows[1].responses)

    judge = Scripted(lambda question: TOO_LONG if question == too_long else "[[A]]", calls=1)
    for _ in range(2):  # the second time, all of it is in the file
        result = judge_rewardbench(judge, rows, tmp_path / "replies.jsonl")
        assert (result.n_too_long, result.n_unparsed) == (1, 1)


def test_replies_of_a_model_are_kept_under_its_weights(tiny_qwen2, tmp_path):
    judge = PolicyJudge(str(tiny_qwen2), max_new_tokens=3)
    file = tmp_path / "replies.jsonl"
    ask(judge, ["Hello?"], file)
    assert json.loads(file.read_text())["maker"] == judge.fingerprint
    assert PolicyJudge(str(tiny_qwen2), max_new_tokens=4).fingerprint != judge.fingerprint
