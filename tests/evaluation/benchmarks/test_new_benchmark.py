"""A benchmark is one file: this one, added to the list, comes out in every place of an evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from rlhf_lightning.evaluation.benchmarks import BENCHMARKS
from rlhf_lightning.evaluation.benchmarks.base import (
    Benchmark,
    ScoredResult,
    is_right,
    pair_row,
    rates,
    read_columns,
    score_rows,
)
from rlhf_lightning.evaluation.blocks import Column, Table
from rlhf_lightning.evaluation.estimates import Estimate
from tests.evaluation.conftest import write
from tests.test_evaluate import evaluated  # noqa: F401 (a fixture)


@dataclass(frozen=True, kw_only=True)
class PunsResult(ScoredResult):
    title = "puns"
    official_kind = "puns"
    whole = True

    subsets: dict[str, Estimate]

    def subset_scores(self):
        return self.subsets

    def metrics(self):
        return {f"puns/{name}": value for name, value in self.subsets.items()}

    def blocks(self):
        yield Table(["puns", Column("accuracy")], [list(each) for each in self.subsets.items()], "Which pun is better")

    def summary(self):
        return f"puns {len(self.rows)}"


class Puns(Benchmark):
    name = "puns"
    title = "puns"

    def load(self, settings):
        source = self.source(settings)
        return [pair_row(row, row.values["kind"]) for row in read_columns(source, ("prompt", "chosen", "rejected"))]

    def notes(self, rows):
        return [f"{len(rows)} puns were read."]

    def run(self, by, rows, settings, *, file=None, ranks=None):
        scored = score_rows(by, rows, file)
        subsets = rates((row.subset, is_right(row.scores)) for row in scored)
        return PunsResult(**ScoredResult.about(by, rows, scored), subsets=subsets)


@pytest.fixture
def puns(here):
    """The benchmark in the list, and its rows in a file."""
    rows = [
        {"kind": kind, "prompt": f"{kind} {i}?", "chosen": f"a fine answer {i}", "rejected": "no", "id": f"{kind}{i}"}
        for kind in ("short", "long")
        for i in range(3)
    ]
    BENCHMARKS.append(Puns())
    yield write(here / "puns.jsonl", rows)
    BENCHMARKS.pop()


def test_its_metrics_rows_section_note_line_and_files_come_out(evaluated, puns, capsys):  # noqa: F811
    arguments = ["--reward_model", "models/reward", "--benchmarks", json.dumps({"puns": puns.name})]
    out, metrics = evaluated(*arguments)
    assert set(metrics) == {"rm/puns/short", "rm/puns/long"}
    assert metrics["rm/puns/long"]["n"] == 3
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [(row["data"], row["source"], row["id"]) for row in rows[::3]] == [
        ("puns", "short", "short0"),
        ("puns", "long", "long0"),
    ]
    right = [row["scores"][0] > row["scores"][1] for row in rows if row["source"] == "short"]
    assert metrics["rm/puns/short"]["value"] == pytest.approx(sum(right) / 3)
    whole = json.loads((out / "metrics.json").read_text())
    assert whole["notes"] == ["6 puns were read."]
    details = whole["details"]["scorers"][0]
    assert details["puns"]["subsets"] == {name: metrics[f"rm/puns/{name}"] for name in ("short", "long")}
    assert details["rewardbench"] is None
    assert "rows" not in details["puns"]
    page = (out / "report.md").read_text()
    assert "## Reward model on puns" in page
    assert "Which pun is better" in page
    assert "reward model: puns 6" in capsys.readouterr().out
    official = json.loads((out / "puns" / "models" / "reward.json").read_text())
    assert official["short"] == metrics["rm/puns/short"]["value"]


def test_a_benchmark_that_is_not_there_is_refused(here, capsys):
    from rlhf_lightning.cli import main

    assert main(["evaluate", "--reward_model", "models/reward", "--benchmarks", '{"puns": "puns.jsonl"}']) == 2
    assert "benchmarks: puns" in capsys.readouterr().err
