"""A benchmark is one file: that of docs/python.md, added to the list, comes out in every place of an evaluation."""

from __future__ import annotations

import importlib
import json
import re
import sys

import pytest

from rlhf_lightning.evaluation.benchmarks import BENCHMARKS
from tests.evaluation.conftest import write
from tests.test_configs import ROOT
from tests.test_evaluate import evaluated  # noqa: F401 (a fixture)


@pytest.fixture
def puns(here, monkeypatch):
    """The benchmark in the list, and its rows in a file."""
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (here / "puns.py").write_text(re.search(r"```py\n(# puns.py\n.*?)```", text, re.DOTALL)[1])
    monkeypatch.syspath_prepend(str(here))
    benchmark = importlib.import_module("puns").Puns()
    rows = [
        {"kind": kind, "prompt": f"{kind} {i}?", "chosen": f"a fine answer {i}", "rejected": "no", "id": f"{kind}{i}"}
        for kind in ("short", "long")
        for i in range(3)
    ]
    BENCHMARKS.append(benchmark)
    yield write(here / "puns.jsonl", rows)
    BENCHMARKS.pop()
    sys.modules.pop("puns")


def test_its_metrics_rows_section_note_line_and_files_come_out(evaluated, puns, capsys):  # noqa: F811
    arguments = ["--reward_model", "models/reward", "--benchmarks", json.dumps({"puns": puns.name})]
    out, metrics = evaluated(*arguments, own="rm/puns/")
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
