"""From rows to results: what is refused, what goes on after a kill, and what the files hold."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rlhf_lightning.errors import DataError, ModelError
from rlhf_lightning.evaluation.benchmarks.base import score_rows, write_official_files
from rlhf_lightning.evaluation.benchmarks.prior_sets import load_prior_set, run_prior_sets
from rlhf_lightning.evaluation.benchmarks.rewardbench import (
    SECTIONS,
    SUBSETS,
    lite_allocation,
    load_rewardbench,
    run_rewardbench,
)
from rlhf_lightning.evaluation.benchmarks.rewardbench2 import (
    SUBSETS_2,
    best_of_score,
    load_rewardbench2,
    rewardbench2_items,
    run_rewardbench2,
    ties_score,
)
from rlhf_lightning.evaluation.results import as_plain
from rlhf_lightning.rewards.scorers import ImplicitScorer, Scored
from tests.conftest import SHARED_DATA
from tests.evaluation.kept import kept_entries

REWARDBENCH = SHARED_DATA / "rewardbench"
ROOT = Path(__file__).resolve().parents[3]


class LengthScorer:
    """Longer is better; counts what it scores, and stops after so many calls."""

    kind = "Custom Classifier"

    def __init__(self, name="length", *, sign=1, calls=None, truncated=()):
        self.name = self.fingerprint = name
        self.sign, self.calls, self.truncated = sign, calls, truncated
        self.scored: list[str] = []

    def __call__(self, prompts: Sequence, responses: Sequence[str]) -> list[Scored]:
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls = None if self.calls is None else self.calls - 1
        self.scored += responses
        return [Scored(float(self.sign * len(text)), len(text), text in self.truncated) for text in responses]


def make_rows(per_subset=2):
    """Every subset with a few pairs; the longer response is chosen in all but the first pair, a tie."""
    return [
        {
            "id": number * 100 + i,
            "subset": name,
            "prompt": f"Question {i} of {name}",
            "chosen": f"{name} {i} " + "x" * (5 + i),
            "chosen_model": "a",
            "rejected": f"{name} {i} " + "y" * 5,
            "rejected_model": "b",
        }
        for number, name in enumerate(SUBSETS)
        for i in range(per_subset)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path):
    """46 rows, two of each subset."""
    return write_jsonl(tmp_path / "rows.jsonl", make_rows())


# ---- rows


def test_the_same_rows_come_from_jsonl_csv_and_parquet(file, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = make_rows()
    with (tmp_path / "rows.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    loaded = [
        [(row.id, row.subset, row.prompt, row.responses, row.key) for row in load_rewardbench(path)]
        for path in (file, tmp_path / "rows.csv", tmp_path / "rows.parquet")
    ]
    assert loaded[0] == loaded[1] == loaded[2]
    assert len(loaded[0]) == len({key for *_, key in loaded[0]}) == 46


def test_a_prompt_may_be_a_list_of_messages(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = make_rows(1)[:2]
    (first, second) = load_rewardbench(
        write_jsonl(tmp_path / "rows.jsonl", [rows[0] | {"prompt": turns}, rows[1] | {"prompt": turns[:1]}])
    )
    assert first.prompt == turns
    same = load_rewardbench(write_jsonl(tmp_path / "text.jsonl", [rows[1] | {"prompt": "a"}]))[0]
    assert same.key == second.key


def test_a_text_that_looks_like_a_transcript_stays_one_turn(tmp_path):
    text = "\n\nHuman: a\n\nAssistant: b"
    (row,) = load_rewardbench(write_jsonl(tmp_path / "rows.jsonl", [make_rows(1)[0] | {"prompt": text}]))
    assert row.prompt == [{"role": "user", "content": text}]


def damaged(change):
    rows = make_rows()
    rows[5] = {key: value for key, value in (rows[5] | change).items() if value is not ...}
    return rows


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (damaged({"subset": "alpacaeval"}), "row 5: unknown subset 'alpacaeval'"),
        (damaged({"subset": 7}), "row 5: subset is 7"),
        (damaged({"rejected": ...}), "row 5: no column rejected"),
        (damaged({"chosen": None}), "row 5: chosen is null"),
        (damaged({"chosen": ["a"]}), "row 5: chosen is list"),
        (damaged({"prompt": 7}), "row 5: prompt is neither"),
        (damaged({"prompt": []}), "row 5: prompt is an empty conversation"),
        (damaged({"prompt": [{"role": "assistant", "content": "a"}]}), "row 5: the prompt has no text"),
        (damaged({"chosen": "\ud800"}), "row 5: chosen holds half"),
        (damaged({"id": 200}), "row 5: duplicate id '200' in alpacaeval-hard \\(first at .*row 4"),
        ([], "is empty"),
    ],
)
def test_rows_that_are_no_benchmark_are_refused_in_one_line(tmp_path, rows, words):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=words) as raised:
        load_rewardbench(path)
    assert "\n" not in str(raised.value)
    assert "rows.jsonl" in str(raised.value)


def test_the_same_id_in_two_subsets_is_two_rows_and_a_row_without_one_is_named_by_its_place(tmp_path):
    rows = [row | {"id": 1} for row in make_rows(1)]
    del rows[3]["id"]
    loaded = load_rewardbench(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert len(loaded) == 23
    assert loaded[3].id == "rows.jsonl:3"


# ---- scores on disk


def test_a_run_that_is_interrupted_goes_on_and_scores_nothing_twice(tmp_path):
    rows = load_rewardbench(write_jsonl(tmp_path / "rows.jsonl", make_rows(8)))
    whole = score_rows(LengthScorer(), rows)
    stored = tmp_path / "made" / "scores.jsonl"
    first = LengthScorer(calls=2)
    with pytest.raises(KeyboardInterrupt):
        score_rows(first, rows, stored)
    assert len(kept_entries(stored)) == 128 == len(first.scored) / 2
    second = LengthScorer()
    assert score_rows(second, rows, stored) == whole
    assert sorted(first.scored + second.scored) == sorted(text for row in rows for text in row.responses)
    assert len(kept_entries(stored)) == len(rows)
    third = LengthScorer(calls=0)
    assert score_rows(third, rows, stored) == whole


@pytest.mark.parametrize("torn", ['{"crc32": "12345678", "maker": "length", "ent', "{", '{"a": 1}'])
def test_a_line_that_was_not_written_to_its_end_is_dropped(tmp_path, file, torn):
    rows = load_rewardbench(file)
    stored = tmp_path / "scores.jsonl"
    score_rows(LengthScorer(), rows[:20], stored)
    before = stored.read_text()
    stored.write_text(before + torn)
    scorer = LengthScorer()
    assert score_rows(scorer, rows, stored) == score_rows(LengthScorer(), rows)
    assert len(scorer.scored) == 2 * 26
    assert stored.read_text().startswith(before)
    assert len(kept_entries(stored)) == 46


def test_a_run_that_is_killed_goes_on(tmp_path):
    """SIGKILL in the second call, after the beginning of a line."""
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(8))
    script = f"""
import os, signal
from tests.evaluation.benchmarks.test_runs import LengthScorer
from rlhf_lightning.evaluation.benchmarks.base import score_rows
from rlhf_lightning.evaluation.benchmarks.rewardbench import load_rewardbench
class Killed(LengthScorer):
    def __call__(self, prompts, responses):
        if self.scored:
            open({str(tmp_path / "scores.jsonl")!r}, "a").write('{{"crc32": "00')
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(prompts, responses)
score_rows(Killed(), load_rewardbench({str(path)!r}), {str(tmp_path / "scores.jsonl")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    rows = load_rewardbench(path)
    scorer = LengthScorer()
    result = run_rewardbench(scorer, rows, file=tmp_path / "scores.jsonl")
    assert len(scorer.scored) == 2 * (len(rows) - 64)
    assert result == run_rewardbench(LengthScorer(), rows)
    assert result.n_pairs == len(rows)


def test_two_scorers_share_a_file_and_never_a_score(tmp_path, file):
    rows, stored = load_rewardbench(file), tmp_path / "scores.jsonl"
    first = score_rows(LengthScorer("a"), rows, stored)
    second = score_rows(LengthScorer("b", sign=-1), rows, stored)
    assert first == score_rows(LengthScorer("a", calls=0), rows, stored)
    assert second == score_rows(LengthScorer("b", calls=0), rows, stored)
    assert [row.scores for row in first] == [[-score for score in row.scores] for row in second]


def test_a_row_whose_text_changed_is_scored_anew(tmp_path, file):
    stored = tmp_path / "scores.jsonl"
    score_rows(LengthScorer(), load_rewardbench(file), stored)
    rows = make_rows()
    rows[7]["chosen"] += " and more"
    rows[8]["id"] = 12345
    scorer = LengthScorer()
    score_rows(scorer, load_rewardbench(write_jsonl(file, rows)), stored)
    assert scorer.scored == [rows[7]["chosen"], rows[7]["rejected"]]


def test_scores_files_of_another_kind_are_refused_and_left_as_they_are(tmp_path, file):
    stored = tmp_path / "notes.jsonl"
    stored.write_text('{"name": "length"}\nan unfinished')
    with pytest.raises(DataError, match=r"notes.jsonl: not written by"):
        score_rows(LengthScorer(), load_rewardbench(file), stored)
    assert stored.read_text() == '{"name": "length"}\nan unfinished'


def test_a_score_that_is_not_finite_is_refused_with_its_row(file):
    class Damaged(LengthScorer):
        def __call__(self, prompts, responses):
            return [each._replace(score=float("nan")) for each in super().__call__(prompts, responses)]

    with pytest.raises(ModelError, match=r"rows.jsonl, row \d+ are nan, nan, not finite"):
        score_rows(Damaged(), load_rewardbench(file))


# ---- results


def test_a_result_tells_scores_ties_truncations_and_what_is_missing(tmp_path):
    rows = [row for row in make_rows(3) if row["subset"] not in ("mt-bench-easy", *SECTIONS["Safety"])]
    loaded = load_rewardbench(write_jsonl(tmp_path / "rows.jsonl", rows))
    cut = [loaded[0].responses[0], loaded[0].responses[1], loaded[4].responses[1]]
    result = run_rewardbench(LengthScorer(truncated=cut), loaded)
    assert {estimate.value for estimate in result.table.subsets.values()} == {2 / 3}
    assert result.n_pairs == len(rows) == 51
    assert result.n_ties == 17
    assert result.n_truncated == 2
    assert result.accuracy.value == pytest.approx(2 / 3, abs=1e-12)
    assert set(result.table.sections) == {"Chat", "Chat Hard", "Reasoning"}
    assert result.table.total is None
    assert result.official_sections["Safety"] == 0.0
    assert result.official_total == pytest.approx(0.5, abs=1e-12)
    assert result.absent_subsets == ["mt-bench-easy", *SECTIONS["Safety"]]
    assert result.short_subsets["alpacaeval-easy"] == "3 of 100"
    assert result.partial_sections == list(SECTIONS)
    assert [row.scores[0] - row.scores[1] for row in result.rows[:3]] == [0.0, 1.0, 2.0]
    json.dumps(as_plain(result), allow_nan=False)


def test_the_whole_benchmark_is_complete(tmp_path):
    rows = [row for row in make_rows(447) if int(row["prompt"].split()[1]) < SUBSETS[row["subset"]].pairs]
    for number, row in enumerate(rows):
        row["id"] = number
    loaded = load_rewardbench(write_jsonl(tmp_path / "rows.jsonl", rows))
    result = run_rewardbench(LengthScorer(), loaded)
    assert (result.whole, result.partial_sections, result.absent_subsets) == (True, [], [])
    lite = run_rewardbench(scorer := LengthScorer(), loaded, size=400)
    assert (lite.benchmark, lite.n_pairs, len(scorer.scored)) == ("rewardbench-lite-v1", 400, 800)
    counts = {name: estimate.n for name, estimate in lite.table.subsets.items()}
    assert counts == lite_allocation({name: subset.pairs for name, subset in SUBSETS.items()})
    assert not lite.partial_sections
    assert 0 < lite.lite_standard_error < 0.02
    assert result.lite_standard_error is None


def test_length_and_a_coin_stand_beside_every_result(file):
    rows = load_rewardbench(file)
    result = run_rewardbench(LengthScorer(sign=-1), rows)
    longer, shorter, coin = (result.baselines[name] for name in ("longer wins", "shorter wins", "coin flip"))
    assert longer == run_rewardbench(LengthScorer(), rows).table
    assert shorter == result.table
    assert (longer.total.value, shorter.total.value, coin.total.value) == (0.5, 0.0, 0.5)
    assert coin.total.n == 46


@pytest.mark.skipif(not REWARDBENCH.is_dir(), reason="no directory ../shared/data beside the repository")
def test_the_length_baseline_of_the_real_rows_is_the_known_one():
    expected = json.loads((REWARDBENCH / "expected.json").read_text(encoding="utf-8"))["known_answers"]
    rows = load_rewardbench(REWARDBENCH / "filtered.parquet")
    result = run_rewardbench(LengthScorer(), rows)
    known = expected["length (reward = len(response) in characters)"]
    for table in (result.table, result.baselines["longer wins"]):
        sections = {name: estimate.value for name, estimate in table.sections.items()}
        assert sections == pytest.approx(known["section_official_counts"], abs=1e-6)
        assert table.total.value == pytest.approx(known["score_official_counts"], abs=1e-6)
    shorter = result.baselines["shorter wins"].total.value
    assert shorter == pytest.approx(expected["negative length"]["score_official_counts"], abs=1e-6)
    assert result.accuracy.value == pytest.approx(known["micro_accuracy"], abs=1e-6)
    assert result.short_subsets["xstest-should-respond"] == "76 of 250"


def test_a_result_of_a_policy_is_the_same_for_any_batch_size(tiny_qwen2, file):
    rows = load_rewardbench(file)
    results = [run_rewardbench(ImplicitScorer(str(tiny_qwen2), batch_size=size), rows) for size in (1, 16)]
    np.testing.assert_allclose(*([row.scores for row in result.rows] for result in results), rtol=0, atol=1e-4)
    assert results[0].table == results[1].table
    assert results[0].kind == "DPO Ref. Free"


# ---- prior sets and version 2


def test_the_prior_sets_are_scored_by_name(tmp_path):
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in make_rows(4)[:4]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    loaded = [row for name in ("shp", "mtbench_human") for row in load_prior_set(name, path)]
    result = run_prior_sets(LengthScorer(), loaded)
    assert {name: estimate.value for name, estimate in result.sets.items()} == {"shp": 0.75, "mtbench_human": 0.75}
    assert (result.score, result.n_ties) == (0.75, 2)
    assert "summarize" in result.absent_sets
    with pytest.raises(DataError, match="unknown subset 'pku_safer'"):
        load_prior_set("pku_safer", path)


def rows_2():
    """Two prompts of each of five subsets, and three pairs of ties."""
    rows = []
    for name in SUBSETS_2:
        for i in range(0 if name == "Ties" else 2):
            chosen = f"{name} {i} " + "x" * (6 if i else 4)
            rejected = [f"{name} {i} " + "y" * count for count in (4, 2, 0)]
            rows.append({"id": f"{name}{i}", "subset": name, "chosen": [chosen], "rejected": rejected})
    for i in range(3):
        rows.append({"id": f"ref:{i}", "subset": "Ties", "chosen": ["x" * 9], "rejected": ["y", "yy"]})
        rows.append({"id": f"tied:{i}", "subset": "Ties", "chosen": ["x" * 9, "x" * (8 + i)], "rejected": ["y"]})
    return [row | {"prompt": f"Question {row['id']}", "num_correct": len(row["chosen"])} for row in rows]


def test_version_2_scores_the_best_of_four_and_the_ties(tmp_path):
    rows = load_rewardbench2(write_jsonl(tmp_path / "rows.jsonl", rows_2()))
    result = run_rewardbench2(LengthScorer(), rows, file=tmp_path / "scores.jsonl")
    items = rewardbench2_items(rows, [row.scores for row in result.rows])
    parts = {name: [item for item in items if item["subset"] == name] for name in SUBSETS_2}
    scores = {name: np.mean([best_of_score(item["scores"]) for item in own]) for name, own in parts.items()}
    scores["Ties"] = ties_score(parts["Ties"])
    scores["total"] = np.mean(list(scores.values()))
    assert {name: estimate.value for name, estimate in result.subsets.items()} | {
        "total": result.total.value
    } == pytest.approx(scores, abs=1e-12)
    assert scores["Math"] == 0.75
    assert 1.0 <= scores["Ties"] <= 1.01
    assert (result.n_prompts, result.n_shared_best) == (16, 5)
    assert result.subsets["Ties"].n == 3
    assert result.short_subsets["Ties"] == "6 of 102"
    again = run_rewardbench2(LengthScorer(calls=0), rows, file=tmp_path / "scores.jsonl")
    assert again.total.value == result.total.value
    json.dumps(as_plain(result), allow_nan=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_correct": 2}, "row 0: 1 chosen and 3 rejected responses, num_correct 2"),
        ({"chosen": ["a", "b"], "num_correct": 2}, "row 0: 2 chosen"),
        ({"rejected": []}, "row 0: 1 chosen and 0 rejected"),
        ({"rejected": "abc"}, "row 0: rejected is no list of texts"),
        ({"subset": "ties"}, "row 0: unknown subset 'ties'"),
    ],
)
def test_rows_of_version_2_that_contradict_themselves_are_refused(tmp_path, change, words):
    rows = rows_2()
    with pytest.raises(DataError, match=words):
        load_rewardbench2(write_jsonl(tmp_path / "rows.jsonl", [rows[0] | change, *rows[1:]]))


# ---- official files


def test_the_two_files_have_the_official_shapes(tmp_path, file):
    rows = load_rewardbench(file)
    result = run_rewardbench(LengthScorer(), rows)
    paths = write_official_files(tmp_path, result, model="us/length-1.5")
    assert [str(path.relative_to(tmp_path)) for path in paths] == [
        "results/eval-set/us/length-1.5.json",
        "results/eval-set-scores/us/length-1.5.json",
    ]
    text = paths[0].read_text()
    flat, columns = json.loads(text), json.loads(paths[1].read_text())
    assert list(flat) == sorted(flat)
    assert text == json.dumps(flat, indent=4, sort_keys=True)
    about = {"model": "us/length-1.5", "model_type": "Custom Classifier", "chat_template": "tokenizer"}
    assert flat == dict.fromkeys(SUBSETS, 0.5) | about
    names = {"text_chosen", "text_rejected", "results", "subset", "id", "scores_chosen", "scores_rejected"}
    assert columns.keys() == names | about.keys()
    assert {len(columns[name]) for name in names} == {46}
    assert columns["results"] == [0, 1] * 23
    assert columns["id"] == [row["id"] for row in make_rows()]
    assert columns["text_rejected"][1] == [
        {"role": "user", "content": "Question 1 of alpacaeval-easy"},
        {"role": "assistant", "content": "alpacaeval-easy 1 yyyyy"},
    ]
    assert columns["scores_chosen"][1] - columns["scores_rejected"][1] == 1


def test_files_of_policies_say_their_reference_or_that_there_is_none(tmp_path, tiny_qwen2, file):
    rows = load_rewardbench(file)[:4]
    policy = str(tiny_qwen2)
    with_it = run_rewardbench(ImplicitScorer(policy, policy), rows)
    assert with_it.n_ties == 4
    path, _ = write_official_files(tmp_path, with_it, model="us/policy")
    assert json.loads(path.read_text())["ref_model"] == policy
    path, _ = write_official_files(tmp_path, run_rewardbench(ImplicitScorer(policy), rows), model="us/policy")
    assert path.name == "policy_ref_free.json"
    assert "ref_model" not in json.loads(path.read_text())


def test_files_of_prior_sets_and_of_version_2(tmp_path, file):
    rows = [row for name in ("shp", "summarize") for row in load_prior_set(name, file)]
    path, scores = write_official_files(tmp_path, run_prior_sets(LengthScorer(), rows), model="us/length")
    assert (path.parts[-3], scores.parts[-3]) == ("pref-sets", "pref-sets-scores")
    assert json.loads(path.read_text())["shp"] == 0.5
    rows = load_rewardbench2(write_jsonl(tmp_path / "two.jsonl", rows_2()))
    result = run_rewardbench2(LengthScorer(), rows)
    path, scores = write_official_files(tmp_path, result, model="us/length")
    assert json.loads(path.read_text())["Math"] == 0.75
    columns = json.loads(scores.read_text())
    assert columns["results"] == [0.5, 1.0] * 5 + [None] * 6
    assert columns["num_correct"][-2:] == [1, 2]
    assert [len(each) for each in columns["scores"]] == [len(each) for each in columns["text"]] == [4] * 10 + [3] * 6


def test_only_whole_benchmarks_have_official_results(tmp_path, file):
    rows = [row for row in make_rows(447) if int(row["prompt"].split()[1]) < SUBSETS[row["subset"]].pairs]
    all_rows = load_rewardbench(write_jsonl(tmp_path / "whole.jsonl", [row | {"id": i} for i, row in enumerate(rows)]))
    assert run_rewardbench(LengthScorer(), all_rows).whole
    assert not run_rewardbench(LengthScorer(), all_rows, size=400).whole
    assert not run_rewardbench(LengthScorer(), load_rewardbench(file)).whole
    assert not run_rewardbench2(LengthScorer(), load_rewardbench2(write_jsonl(tmp_path / "2.jsonl", rows_2()))).whole


def test_a_row_that_stands_twice_under_two_ids_is_scored_once_and_counts_twice(tmp_path):
    rows = [make_rows(2)[1] | {"id": number} for number in range(3)]
    scorer = LengthScorer()
    result = run_rewardbench(scorer, load_rewardbench(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert (result.n_pairs, len(scorer.scored)) == (3, 2)


def test_rows_come_from_the_split_of_a_hub_data_set(monkeypatch):
    import datasets

    rows = make_rows()
    asked = []

    def load_dataset(name, *, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_rewardbench("allenai/reward-bench:filtered")
    assert asked == [("allenai/reward-bench", "filtered")]
    assert [(row.id, *row.responses) for row in loaded] == [
        (str(row["id"]), row["chosen"], row["rejected"]) for row in rows
    ]
    load_prior_set("anthropic_hhh")
    assert asked[1] == ("allenai/pref-test-sets", "anthropic_hhh")
