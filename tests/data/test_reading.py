"""What is said while a source is read, and that reading leaves the interpreter as it was."""

from __future__ import annotations

import gc
import gzip
import io
import itertools
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_lightning.data import DataError, reading
from rlhf_lightning.data.doctor import Words
from rlhf_lightning.data.sources import WeightedSource, row_count
from rlhf_lightning.data.tokenized import tokenize_source

ROWS = [{"prompt": f"p {number}", "chosen": "yes", "rejected": "no"} for number in range(5)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def files(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    return tmp_path


def test_a_bar_is_drawn_on_a_terminal_and_lets_every_row_through(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    rows = list(range(1000))
    assert list(reading.watched(rows, "pairs\x1b[31m.jsonl", lambda: 1000)) == rows
    said = sys.stderr.getvalue()
    assert "100%" in said
    assert "━" in said
    assert "\x1b[31m.jsonl" not in said
    assert capsys.readouterr().out == ""


def test_elsewhere_nothing_is_drawn_or_counted_and_a_line_comes_now_and_then(monkeypatch, caplog):
    clock = itertools.count(0, 6)
    monkeypatch.setattr(reading.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level("INFO", logger=reading.__name__)
    assert len(list(reading.watched(range(1024), "pairs.jsonl", lambda: pytest.fail("counted")))) == 1024
    assert "━" not in sys.stderr.getvalue()
    assert [record.args[:2] for record in caplog.records] == [("pairs.jsonl", 256), ("pairs.jsonl", 768)]


@pytest.mark.parametrize(("name", "count"), [("a.jsonl", 5), ("a.parquet", 5), ("a.jsonl.gz", None), ("a.json", None)])
def test_rows_are_counted_where_they_need_not_be_read(files, name, count):
    assert row_count(str(files / name)) == count


def test_the_garbage_collector_is_as_it_was_also_after_a_fault(files, tmp_path):
    def make(file):
        return tokenize_source(WeightedSource(str(file)), Words(), cache_dir=tmp_path / "cache")

    make(files / "a.jsonl")
    assert gc.get_freeze_count() == 0
    (files / "b.jsonl").write_text("no row\n")
    with pytest.raises(DataError):
        make(files / "b.jsonl")
    assert gc.get_freeze_count() == 0
    assert gc.isenabled()
