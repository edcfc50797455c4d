"""Judged responses: what is read as a label, whose response is put behind which prompt, what the doctor says."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from rlhf_lightning import UnpairedDataModule
from rlhf_lightning.cli import main
from rlhf_lightning.data import load_unpaired
from rlhf_lightning.data.doctor import diagnose
from rlhf_lightning.data.unpaired import partners
from rlhf_lightning.errors import DataError


def rows(*labels, same_prompt=()):
    """Rows of different responses with the given labels; those at some places ask the first question again."""
    return [
        {"prompt": f"Question {0 if i in same_prompt else i}?", "completion": f"Answer number {i}.", "label": label}
        for i, label in enumerate(labels)
    ]


def module(source, **settings):
    data = UnpairedDataModule(source, val=source, tokenizer="builtin:tiny", shuffle=False, **settings)
    data.setup("fit")
    return data


# ---- labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        (True, False, True),
        (1, 0, 1),
        (1, -1, 1),
        ("good", "bad", "Good"),
        ("true", "False", "TRUE"),
        ("1", "-1", "1.0"),
        ("desirable", "undesirable", True),
    ],
)
def test_labels_of_every_form_say_which_responses_are_good(labels):
    assert module(rows(*labels)).desirable("train").tolist() == [True, False, True]


def test_a_threshold_divides_ratings_and_leaves_what_says_it_itself():
    source = [*rows(4.5, 1, 3), {"prompt": "Which?", "chosen": "This.", "rejected": "That."}]
    assert module(source, rating_threshold=3).desirable("train").tolist() == [True, False, True, True, False]


def test_each_source_of_a_mixture_has_labels_of_its_own(tmp_path):
    for name, labels in (("a", (1, 0)), ("b", (-1, 1))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(*labels)))
    data = module([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert data.desirable("train").tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((1, 4, 5), r"rating_threshold: the labels are 1, 4, 5, neither"),
        ((1, 0, -1), r"rating_threshold: the labels are -1, 0, 1, neither"),
        ((True, None), r"row 1: label absent or null"),
        ((True, "maybe"), r"row 1: label is 'maybe'"),
        ((True, math.nan), r"row 1: label is nan"),
        ((True, True), r"all of its 2 responses are good.*SFT"),
        ((0, 0), r"none of its 2 responses are good"),
    ],
)
def test_labels_that_say_nothing_are_refused_in_one_line(labels, message):
    with pytest.raises(DataError, match=message) as error:
        module(rows(*labels))
    assert "\n" not in str(error.value)


def test_a_pair_is_two_rows_and_a_conversation_is_judged_by_its_last_turn():
    pair = {"id": "p", "prompt": "Is 7 prime?", "chosen": "Yes.", "rejected": "No."}
    turns = [("user", "Hi."), ("assistant", "Hello."), ("user", "Is 8 prime?"), ("assistant", "No.")]
    talk = {"messages": [{"role": role, "content": text} for role, text in turns], "verdict": "good"}
    examples, report = load_unpaired([pair, talk], columns={"label": "verdict"})
    assert [(e.response, e.label, e.example_id) for e in examples[:2]] == [
        ("Yes.", math.inf, "p:chosen"),
        ("No.", -math.inf, "p:rejected"),
    ]
    assert (examples[2].response, len(examples[2].prompt), examples[2].label) == ("No.", 3, math.inf)
    assert (report.rows_read, report.rows_kept, report.columns_unused) == (3, 3, [])


# ---- mismatched responses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[1] * 7, [2, 2, 2], [3, 1, 2], [4, 1, 1], [1, 5, 2], [6], [1], []])
def test_no_prompt_gets_a_response_of_its_own(counts):
    prompts = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts), dtype=np.uint64), counts))
    found = partners(prompts)
    kept = found >= 0
    assert (prompts[kept] != prompts[found[kept]]).all()
    assert len(set(found[kept].tolist())) == kept.sum(), "each response once"
    most, total = max(counts, default=0), sum(counts)
    assert kept.sum() == min(total, 2 * (total - most)), "all that can be"


def test_a_step_has_its_mismatched_responses_in_its_first_batch_however_it_is_divided():
    source = rows(*[True, False] * 5, True, same_prompt=(3, 4))
    found = []
    for accumulate, processes, batch_size in ((4, 1, 1), (1, 1, 4), (1, 2, 2)):
        data = module(source, batch_size=batch_size)
        steps: list[set] = []
        for rank in range(processes):
            plan = data.training_plan(accumulate=accumulate, rank=rank, world_size=processes)
            batches = list(plan.epoch(0))
            firsts = [batch for batch in batches if batch.mismatched is not None]
            assert batches[0].mismatched is not None
            assert len(firsts) == -(-len(batches) // accumulate)
            for number, batch in enumerate(firsts):
                steps += [set()] * (number >= len(steps))
                steps[number] = steps[number] | {tuple(couple) for couple in batch.mismatched.tolist()}
        found.append(steps)
    assert found[0] == found[1] == found[2]
    assert [len(step) for step in found[0]] == [4, 4, 3]


def test_mismatched_rows_hold_the_prompt_of_one_row_and_the_response_of_another():
    data = module(rows(True, False, True), batch_size=3)
    (batch,) = data.train_dataloader()
    texts = data.chat_format.tokenizer.batch_decode(
        [ids[mask] for ids, mask in zip(batch.mismatched.input_ids, batch.mismatched.attention_mask, strict=True)]
    )
    for text in texts:
        question, answer = (text.partition(word)[2][0] for word in ("Question ", "number "))
        assert question != answer
    learned = batch.mismatched.response_mask.sum(1).tolist()
    assert sorted(learned) == sorted(batch.response_mask.sum(1).tolist())


def test_a_long_prompt_is_truncated_for_the_longer_response_of_another_row():
    source = rows(True, False)
    source[0]["prompt"] += " And why is that so?" * 8
    source[1]["completion"] += " So it is, and so it stays." * 4
    whole = module(source, batch_size=2)
    limit = int(whole.rows["train"].lengths.max())
    data = module(source, batch_size=2, max_length=limit)
    (batch,) = data.train_dataloader()
    assert batch.mismatched.attention_mask.sum(1).max() == limit
    assert batch.mismatched.response_mask.sum(1).max() == batch.response_mask.sum(1).max(), "responses are whole"
    rest = data.rows["train"]
    rest.max_length = len(rest.segments(1)[1]) + 1
    assert rest.mismatched(0, 1) is None


def test_one_row_has_nothing_to_mismatch():
    data = module(rows(True, False, same_prompt=(1,)), batch_size=2)
    (batch,) = data.train_dataloader()
    assert batch.mismatched.input_ids.shape == (0, 1)
    assert torch.equal(batch.desirable, torch.tensor([True, False])[batch.index])


# ---- the doctor --------------------------------------------------------------------------------------------


def test_the_doctor_counts_good_responses_and_finds_those_with_both_labels(tmp_path, capsys):
    source = rows(*[True] * 5, *[False] * 20)
    source += [{**source[0], "label": False}, source[7]]
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in source))
    (role,) = diagnose(UnpairedDataModule(str(path), val=str(path), tokenizer="builtin:tiny"), roles=("train",)).roles
    assert (role.kind, role.pairs, role.desirable) == ("responses", 27, 5)
    assert [origin.rpartition(" ")[2] for origin in role.contradictions] == ["0", "25"]
    assert [origin.rpartition(" ")[2] for origin in role.duplicates] == ["26"]
    assert main(["doctor", str(path), "--data.tokenizer", "builtin:tiny"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "model.desirable_weight to 4.4 to 5.87" in printed
    assert "5 (18.5 %)" in printed
