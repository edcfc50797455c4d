"""The built-in preference set is what its script makes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from rlhf_lightning.data import load_preferences
from rlhf_lightning.data.courtesy import make

DIRECTORY = Path(make.__file__).parent


def rows(split):
    return [json.loads(line) for line in (DIRECTORY / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("split", list(make.PAIRS))
def test_the_shipped_file_is_what_the_script_makes(split):
    assert (DIRECTORY / f"{split}.jsonl").read_bytes() == make.as_jsonl(make.make_rows(split)).encode()


@pytest.mark.parametrize(("split", "pairs"), [("train", 600), ("val", 200)])
def test_every_row_loads(split, pairs):
    examples, report = load_preferences("builtin:courtesy", split=split)
    assert (len(examples), report.rows_dropped) == (pairs, 0)
    assert [e.example_id for e in examples] == [f"courtesy-{split}-{row}" for row in range(pairs)]


def tasks(split):
    pattern = re.compile("|".join(re.escape(task) for task in make.TASKS))
    return {pattern.search(row["prompt"]).group() for row in rows(split)}


def test_train_and_validation_share_no_task():
    assert tasks("train").isdisjoint(tasks("val"))
    assert len(tasks("train") | tasks("val")) == len(make.TASKS)


def test_the_pairs_of_a_second_judge_ask_about_tasks_that_no_other_set_has():
    named = [{task for task in make.ALL_TASKS for row in rows(split) if task in row["prompt"]} for split in make.PAIRS]
    found = dict(zip(make.PAIRS, named, strict=True))
    assert found["others_train"] | found["others_val"] == set(make.OTHER_TASKS)
    assert found["others_train"].isdisjoint(found["others_val"])
    for split in ("train", "val", "answers_train", "answers_val"):
        assert found[split].isdisjoint(make.OTHER_TASKS)


def test_no_step_of_a_validation_task_is_in_a_training_answer():
    steps = [step for task in tasks("val") for step in make.TASKS[task].split(" | ")]
    answers = " ".join(row["chosen"] + row["rejected"] for row in rows("train"))
    assert not [step for step in steps if step in answers]


@pytest.mark.parametrize(("split", "right"), [("train", 530), ("val", 177), ("others_train", 271.5)])
def test_the_ceiling_of_a_reward_model_is_known_and_is_that_of_bradley_terry(split, right):
    pairs = rows(split)
    assert make.oracle_accuracy(pairs) == right / len(pairs)
    # Labels were drawn with probability sigmoid(difference): 1.3 and 2.3 percent are one standard deviation.
    differences = [abs(row["chosen_utility"] - row["rejected_utility"]) for row in pairs]
    expected = sum(1 / (1 + math.exp(-difference)) for difference in differences) / len(pairs)
    assert make.oracle_accuracy(pairs) == pytest.approx(expected, abs=0.03)


def test_ties_count_one_half_for_who_knows_the_utilities():
    differences = [(1, 0), (0, 1), (2, 2), (3, 2)]
    assert make.oracle_accuracy([{"chosen_utility": c, "rejected_utility": r} for c, r in differences]) == 0.625
