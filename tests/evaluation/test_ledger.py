"""What is kept while an evaluation runs: damage is named, and what it hit comes out as in an unbroken run."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

import pytest

from rlhf_lightning.evaluation.benchmarks import base
from rlhf_lightning.evaluation.benchmarks.base import BenchmarkRow, score_rows
from rlhf_lightning.evaluation.store import Ledger
from rlhf_lightning.rewards.scorers import Scored


@dataclass
class Entry:
    value: float | str


ROWS = [
    BenchmarkRow(
        str(i), "pairs", [{"role": "user", "content": f"q{i}"}], (f"a{i} " * (1 + i % 4), "b"), 1, f"f, row {i}"
    )
    for i in range(11)
]


class InCompany:
    """Scores that change with the rows beside them, as those of a batch in floating point do, in the last digits."""

    name = kind = fingerprint = "in company"

    def __init__(self):
        self.scored = 0

    def __call__(self, prompts, responses):
        self.scored += len(responses)
        company = sum(map(len, responses))
        return [Scored(len(text) / 7 + place * company * 1e-15, 1, False) for place, text in enumerate(responses)]


def damaged_digit(line):
    place = line.index(b".") + 3
    return line[:place] + (b"1" if line[place : place + 1] != b"1" else b"2") + line[place + 1 :]


DAMAGES = {
    "a digit of a score": (lambda lines: [lines[0], damaged_digit(lines[1]), *lines[2:]], [2]),
    "the first byte": (lambda lines: [b"[" + lines[0][1:], *lines[1:]], [1]),
    "the checksum": (lambda lines: [lines[0].replace(b'"crc32": "', b'"crc32": "x'), *lines[1:]], [1]),
    "a number as text": (lambda lines: [*lines[:2], lines[2].replace(b"[0.", b'["0.5", 0.', 1), lines[3]], [3]),
    "another key": (lambda lines: [lines[0].replace(b'"entries"', b'"entrIes"'), *lines[1:]], [1]),
    "two lines as one": (lambda lines: [lines[0][:-1] + lines[1], *lines[2:]], [1]),
    "zeros": (lambda lines: [lines[0], bytes(len(lines[1]) - 1) + b"\n", *lines[2:]], [2]),
    "a lost line": (lambda lines: [lines[0], *lines[2:]], []),
    "all lines": (lambda lines: [damaged_digit(line) for line in lines], [1, 2, 3, 4]),
    "cut within the second line": (lambda lines: [lines[0], lines[1][:100]], []),
    "cut within the first line": (lambda lines: [lines[0][:100]], []),
    "cut before its line end": (lambda lines: [*lines[:3], lines[3][:-1]], []),
    "all of it zeros": (lambda lines: [bytes(sum(map(len, lines)))], []),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_made_again_as_in_an_unbroken_run(damage, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(base, "_ROWS_AT_A_TIME", 3)
    file = tmp_path / "scores.jsonl"
    unbroken = score_rows(InCompany(), ROWS, file)
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    change, named = DAMAGES[damage]
    file.write_bytes(b"".join(change(lines)))
    scorer = InCompany()
    with caplog.at_level(logging.WARNING, "rlhf_lightning"):
        found = score_rows(scorer, ROWS, file)
    assert [(row.id, row.scores) for row in found] == [(row.id, row.scores) for row in unbroken]
    assert sorted(file.read_bytes().splitlines(keepends=True)) == sorted(lines)
    assert [f"{file}, line {number}: " in caplog.text for number in (1, 2, 3, 4)] == [n in named for n in (1, 2, 3, 4)]
    assert 0 < scorer.scored <= 2 * len(ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]
    again = InCompany()
    assert score_rows(again, ROWS, file) == found
    assert again.scored == 0


def test_any_single_changed_byte_is_noticed(tmp_path):
    file = tmp_path / "kept.jsonl"
    known = {"a": Entry(0.25), "b": Entry("déjà vu")}
    Ledger(file, "maker", Entry).add(known)
    whole = file.read_bytes()
    assert Ledger(file, "maker", Entry).known == known
    for place in range(len(whole)):
        for changed in (whole[place] ^ 1, 0, ord("\n")):
            if changed != whole[place]:
                file.write_bytes(whole[:place] + bytes([changed]) + whole[place + 1 :])
                assert Ledger(file, "maker", Entry).known == {}, (place, changed)
    assert json.loads(whole)["maker"] == "maker"
