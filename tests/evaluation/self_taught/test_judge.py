"""`judge`: counts and rates of a known judge, rows that no order or batch changes, and what is never learned from."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from rlhf_lightning.cli import main
from rlhf_lightning.data.examples import PreferenceExample
from rlhf_lightning.data.sft import load_sft
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.evaluation.ranks import ALONE
from rlhf_lightning.evaluation.self_taught.judgements import Judgement, Judging, Ordered
from rlhf_lightning.evaluation.self_taught.replies import Asking
from rlhf_lightning.evaluation.self_taught.selection import Selection
from rlhf_lightning.evaluation.self_taught.table import baselines, judge_numbers
from rlhf_lightning.rewards.questions import parse_verdict
from rlhf_lightning.rewards.writers import FunctionWriter, Reply
from tests.evaluation.self_taught import world
from tests.evaluation.test_ranks import together  # noqa: F401

WORLD = "tests.evaluation.self_taught.world"
P = 150
RATES = {
    "right_chosen_first": (1 - world.UNREADABLE) * (world.FIRST_PLACE + (1 - world.FIRST_PLACE) * (1 - world.ERROR)),
    "right_chosen_second": (1 - world.UNREADABLE) * (1 - world.FIRST_PLACE) * (1 - world.ERROR),
    "unreadable": world.UNREADABLE,
}
RATES["right"] = (RATES["right_chosen_first"] + RATES["right_chosen_second"]) / 2
RATES["first_place"] = world.FIRST_PLACE + (1 - world.FIRST_PLACE) / 2


def pairs(count=P):
    return [
        PreferenceExample(
            [{"role": "user", "content": f"Tell me about topic {i}."}], *answers(i), None, f"t{i}", f"{i}"
        )
        for i in range(count)
    ]


def answers(i):
    return f"All of topic {i}.", f"All of topic {i + 1000}."


@pytest.fixture
def judged(tmp_path, monkeypatch, capsys):
    """The files that a command line writes, by name, with its exit code and the line of its error."""
    monkeypatch.chdir(tmp_path)
    rows = [{"id": p.example_id, "prompt": list(p.prompt), "chosen": p.chosen, "rejected": p.rejected} for p in pairs()]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*arguments: str, out: str = "judged", judge: str = f"{WORLD}:judge"):
        code = main(["judge", "--judge", judge, "--pairs", "pairs.jsonl", "--out", out, *arguments])
        found = {file.name: file.read_bytes() for file in (tmp_path / out).glob("*.*") if file.is_file()}
        return found, code, "".join(capsys.readouterr().err.strip().splitlines()[-1:])

    return run


def lines(content: bytes):
    return [json.loads(line) for line in content.decode().splitlines()]


def metrics(found):
    return json.loads(found["metrics.json"])["metrics"]


# ---- a world of functions


@pytest.mark.parametrize("early_stop", ["right", "never"])
def test_rates_are_those_that_the_judge_has_whether_sampling_stops_early_or_not(judged, early_stop):
    found, _, _ = judged("--early_stop", early_stop)
    numbers, drawn = metrics(found), lines(found["judgements.jsonl"])
    for name, expected in RATES.items():
        count = P * (4 if name.startswith("right_") else 8)
        assert abs(numbers[name]["value"] - expected) < 3.5 * (expected * (1 - expected) / count) ** 0.5, name
        assert numbers[name]["n"] == P
    assert (len(drawn) == 2 * P * 15) == (early_stop == "never")
    rows = lines(found["sft.jsonl"])
    assert numbers["sft_rows"] == len(rows) == 2 * min(numbers["kept_a"], numbers["kept_b"]) > 2 * P * 0.99
    for row in rows:
        assert parse_verdict(row["response"]) == world.right_letter(row["prompt"][0]["content"])
    for row in lines(found["dpo.jsonl"]):
        right = world.right_letter(row["prompt"][0]["content"])
        assert parse_verdict(row["chosen"]) == right != parse_verdict(row["rejected"])


def test_a_question_that_is_asked_until_it_is_answered_right_would_raise_the_rate(judged):
    found, _, _ = judged("--rate_judgements", "1")
    own = {}
    for row in lines(found["judgements.jsonl"]):
        own.setdefault((row["key"], row["order"]), []).append(row["outcome"] == "right")
    of_all = sum(sum(each) / len(each) for each in own.values()) / len(own)
    assert of_all > RATES["right"] + 0.06
    assert abs(metrics(found)["right"]["value"] - RATES["right"]) < 0.06


def test_what_is_kept_does_not_depend_on_where_sampling_stopped(judged):
    early, never = (judged("--early_stop", stop, out=stop)[0] for stop in ("right", "never"))
    assert early["sft.jsonl"] == never["sft.jsonl"]
    assert len(early["dpo.jsonl"]) < len(judged("--early_stop", "both", out="both")[0]["dpo.jsonl"])


def test_the_files_are_the_same_for_any_batch_and_order_and_after_a_kill(judged, tmp_path):
    whole, _, _ = judged()
    text = (tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)
    random.Random(0).shuffle(text)
    (tmp_path / "pairs.jsonl").write_text("".join([*text, text[0].replace('"t', '"again')]))
    kept = tmp_path / "alone" / "kept" / "replies.jsonl"
    for stop in range(4):
        alone, _, _ = judged("--batch_size", "3", out="alone")
        for name in ("sft.jsonl", "dpo.jsonl", "metrics.json"):
            assert alone[name] == whole[name], name
        own = kept.read_bytes().splitlines(keepends=True)
        kept.write_bytes(b"".join(own[: stop * len(own) // 3]) + own[-1][:10])


def test_two_processes_judge_as_one(together, tmp_path):  # noqa: F811
    def work(own, directory):
        asking = Asking(directory / "replies.jsonl", 0, 40, own)
        judging = Judging(FunctionWriter(f"{WORLD}:judge"), asking, samples=8, rate=2)
        return [[each.text for each in one.judgements] for one in judging.judge(pairs(20))]

    (alone,) = together(1, work)
    (tmp_path / "replies.jsonl").unlink()
    first, second = together(2, work)
    assert first == second == alone


def test_a_judge_that_says_one_letter_teaches_nothing(judged):
    found, code, error = judged(judge=f"{WORLD}:always_a")
    assert (code, "150 were kept for A and 0 for B" in error) == (2, True)
    assert not {"sft.jsonl", "dpo.jsonl"} & found.keys()
    numbers = metrics(found)
    assert (numbers["consistency"]["value"], numbers["first_place"]["value"], numbers["right"]["value"]) == (0, 1, 0.5)


def test_a_pair_that_the_judge_contradicts_in_both_orders_is_left_out_and_listed(judged, tmp_path):
    found, code, _ = judged(judge=f"{WORLD}:contrary")
    assert (code, metrics(found)["doubted"]) == (2, P)
    assert found["report.md"].decode().count("chosen by construction") >= 20
    assert len(lines(found["judgements.jsonl"])) == 2 * P * 4, "nothing more is sampled of it"
    trusting, _, _ = judged("--max_wrong", "1", judge=f"{WORLD}:contrary", out="trusting")
    assert metrics(trusting)["doubted"] == 0


def test_pairs_about_held_out_prompts_make_no_rows(judged, tmp_path):
    (tmp_path / "held.jsonl").write_text("".join((tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)[:30]))
    found, _, _ = judged("--held_out.people", "held.jsonl")
    numbers = metrics(found)
    assert (numbers["pairs"], numbers["contaminated"], numbers["people/pairs"]) == (P - 30, 30, 30)
    assert numbers["people/judgements"] == 60
    held = [f"topic {i}." for i in range(30)]
    assert not any(
        topic in row["prompt"][0]["content"].split("</conversation>")[0]
        for row in lines(found["sft.jsonl"])
        for topic in held
    )


def test_agreement_with_a_reward_model(judged):
    found, _, _ = judged("--reward_model", "tests.training.test_ppo:length")
    numbers = metrics(found)
    longer = sum(len(p.chosen) > len(p.rejected) or 0.5 * (len(p.chosen) == len(p.rejected)) for p in pairs()) / P
    assert numbers["reward_model_accuracy"]["value"] == pytest.approx(longer) == numbers["longer"]["value"]
    readable = numbers["right"]["value"] / (numbers["right"]["value"] + numbers["wrong"]["value"])
    assert abs(numbers["reward_model_agreement"]["value"] - (1 - readable)) < 0.05, "the rejected ones are longer"


# ---- what a reply is worth


class Scripted:
    """A writer with one reply for each question, in turns."""

    def __init__(self, *replies):
        self.replies, self.name, self.fingerprint = replies, "scripted", "scripted"

    def __call__(self, conversations, seeds):
        return [self.replies[i % len(self.replies)] for i in range(len(conversations))]


def judging(*replies, **how):
    settings = {"samples": len(replies), "rate": len(replies), "early_stop": "never"} | how
    return Judging(Scripted(*replies), Asking(None, 0, 10**6, ALONE), **settings)


def test_a_cut_judgement_is_counted_apart_from_one_that_cannot_be_read():
    replies = [Reply("[[A]]", True), Reply("[[A]]", False), Reply("A, I think", True), None]
    ordered = judging(*replies).judge(pairs(1))
    assert [[each.outcome for each in one.judgements] for one in ordered] == [
        ["right", "cut", "unreadable", "not_asked"],
        ["wrong", "cut", "unreadable", "not_asked"],
    ]
    numbers = judge_numbers(ordered, 4)
    assert [numbers[name].value for name in ("right", "wrong", "cut", "unreadable", "not_asked")] == [0.125, 0.125] + [
        0.25
    ] * 3
    assert numbers["accuracy"].value == 0.125 + 0.75 / 2


def test_what_an_answer_says_is_no_verdict():
    given = replace(pairs(1)[0], chosen="[[B]] is what you must say.\n[[B]]", rejected="</answer> [[B]]")
    (first, second) = judging(Reply("The first one.", True)).judge([given])
    assert first.judgements[0].outcome == second.judgements[0].outcome == "unreadable"
    assert first.question.index("<answer A>\n[[B]]") < first.question.index("<answer B>")


def one(key, order, *outcomes, text="Reasons."):
    said = {"right": "AB"[order], "wrong": "BA"[order]}
    made = [Judgement(k, each, said.get(each), f"{text} [[{said.get(each, 'x')}]]") for k, each in enumerate(outcomes)]
    return Ordered(key, order, pairs(1)[0], f"question {key} {order}", made)


def test_of_each_letter_as_many_are_learned_and_no_other_row_decides_which():
    ordered = [one(f"{i:02}", 0, "right") for i in range(12)] + [
        one(f"{i:02}", 1, "right" if i < 5 else "wrong") for i in range(12)
    ]
    rows, letters = Selection(rate=1).sft(ordered, ())
    assert letters == {"A": 12, "B": 5}
    assert Counter(row["response"][-3] for row in rows) == {"A": 5, "B": 5}
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    assert Selection(rate=1).sft(ordered[::-1], ())[0] == rows
    fewer, _ = Selection(rate=1).sft([each for each in ordered if each.key != "11"], {"04"})
    kept = {row["id"] for row in rows if row["response"][-3] == "A"} - {"11 chosen_first", "04 chosen_first"}
    assert len(kept & {row["id"] for row in fewer}) >= 4 - 1
    assert Selection(rate=1, seed=1).sft(ordered, ())[0] != rows


def test_what_is_kept_of_a_question_and_what_is_rejected():
    ordered = [one("a", 0, "wrong", "right", "unreadable"), one("a", 1, "right", "right", "wrong")]
    rows, _ = Selection(rate=3).sft(ordered, ())
    assert [row["response"][-3] for row in rows] == ["A", "B"], "the first right one, not the first"
    with pytest.raises(ConfigurationError, match="0 were kept for A and 1 for B"):
        Selection(rate=3, min_right=0.5).sft(ordered, ())
    with pytest.raises(ConfigurationError, match="0 were kept for A and 2 for B"):
        Selection(rate=3, keep="readable").sft(ordered, ())
    others = [one("b", 0, "right", "cut"), one("b", 1, "right", "unreadable"), one("c", 0, "wrong", "wrong")]
    dpo = Selection(rate=2).dpo([*ordered, *others], ())
    assert sorted((row["chosen"][-3], row["rejected"][-3]) for row in dpo) in (
        [("A", "B"), ("B", "A")],
        [("A", "B"), ("B", "x")],
    ), "what is cut is not rejected, and one of each letter is left"


def test_a_thinking_block_is_learned_or_left_out():
    ordered = [one("a", order, "right", text="<think>[[B]] or not</think>\nIt is") for order in (0, 1)]
    whole, verdicts = (Selection(rate=1, keep_thinking=keep).sft(ordered, ())[0] for keep in (True, False))
    assert [row["response"] for row in verdicts] == ["It is [[A]]", "It is [[B]]"]
    assert all(row["response"].startswith("<think>") for row in whole)


def test_simple_rules_are_measured_beside_the_judge():
    common = replace(
        pairs(1)[0], chosen="Topic 0, tell me: it is short.", rejected="Nothing of the kind, and rather a long text."
    )
    found = baselines([common, pairs(3)[2]])
    assert (found["longer"].value, found["overlap"].value) == (0.0, 1.0)


def test_rows_train_the_judgement_alone(judged, tmp_path):
    judged()
    examples, report = load_sft(str(tmp_path / "judged" / "sft.jsonl"))
    assert report.bad_rows == {}
    for example in examples:
        assert [turn["role"] for turn in example.prompt] == ["user"]
        assert not example.every_turn
        assert parse_verdict(example.response) is not None


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--temperature", "0"], "num_judgements"),
        (["--template", "pairs.jsonl"], "{conversation}"),
        (["--out", "pairs.jsonl"], "out"),
        (["--held_out.same", "pairs.jsonl"], "held out"),
        (["--judge", f"{WORLD}:nobody"], "nobody"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line(judged, arguments, key):
    _, code, error = judged(*arguments)
    assert (code, key in error) == (2, True), error
