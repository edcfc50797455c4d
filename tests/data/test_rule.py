"""The true utility of an answer, read off its text."""

from __future__ import annotations

import json
import statistics

import pytest

from rlhf_lightning.data.courtesy import make
from rlhf_lightning.data.courtesy.rule import brevity, true_utility
from tests.data.test_courtesy import DIRECTORY


def asked(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


@pytest.mark.parametrize("split", list(make.PAIRS))
def test_every_shipped_answer_has_the_utility_that_it_was_made_with(split):
    rows = [json.loads(line) for line in (DIRECTORY / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    for side in ("chosen", "rejected"):
        found = true_utility([asked(row["prompt"]) for row in rows], [row[side] for row in rows])
        assert found == [row[f"{side}_utility"] for row in rows]


def test_brevity_is_how_far_a_length_is_from_that_of_the_middle_answer_in_hundreds_of_characters():
    rows = [json.loads(line) for line in (DIRECTORY / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    lengths = [len(row[side]) for row in rows for side in ("chosen", "rejected")]
    assert (statistics.median(lengths), max(lengths)) == (108, 201)  # as its docstring says
    assert brevity([asked("x")] * 3, ["a" * 108, "a" * 208, ""]) == [0.0, -1.0, -1.08]


@pytest.mark.parametrize(
    ("answer", "utility"),
    [
        ("", 0),
        ("Happy to help!", 2),
        ("Happy to help! Enjoy!", 4),
        ("Enjoy! Happy to help!", -1),  # each in the other's place
        ("Take off the stem.", 1),
        ("Take off the stem. Take off the stem. Take off the stem.", -1),
        ("Take off the stem. Bake it slowly. Catch the stone in a bowl.", 1),
        ("Bla bla. Take off the stem. Bla.", -1),
        ("Soak the whetstone in water.", -2),
        ("Take off the stem. Soak the whetstone in water. Enjoy!", 1),
        ("Seriously? Catch the stone in a bowl. Whatever.", -5),
    ],
)
def test_other_texts_are_taken_apart(answer, utility):
    assert true_utility([asked("How do I pit a cherry?")], [answer]) == [utility]


def test_a_question_about_something_else_is_refused():
    with pytest.raises(ValueError, match="none of the built-in tasks"):
        true_utility([asked("What is love?")], ["Baby."])
