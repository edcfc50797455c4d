"""A trial of each line that is marked for it, in the suite; the whole table with `pytest -m reliability`."""

from __future__ import annotations

import pkgutil

import pytest

from tests.reliability import full_disks
from tests.reliability.__main__ import main
from tests.reliability.lines import LINES
from tests.reliability.table import Line, attempt, drawn

SHORT = [line for line in LINES if line.in_suite]


def survive(_):
    pass


def fall(_):
    raise AssertionError("gone")


@pytest.mark.parametrize("line", SHORT, ids=lambda line: f"{line.kind}: {line.what}")
def test_a_trial_of_a_line_is_survived(line, tmp_path):
    assert not attempt(line, tmp_path, at_most=1).fell_short


@pytest.mark.reliability
def test_the_whole_table():
    assert main([]) == 0


def test_a_trial_that_falls_short_is_counted_and_told(tmp_path):
    tried = attempt(Line("kill", "that", lambda: [survive, fall, survive]), tmp_path)
    assert (tried.tried, tried.survived) == (3, 2)
    assert "trial 1" in tried.fell_short[0]
    assert "gone" in tried.fell_short[0]


def test_the_table_sums_each_kind(tmp_path):
    tried = attempt(Line("race", "that", lambda: [survive, fall]), tmp_path)
    last = drawn([tried]).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[3:5]] == ["2", "1"]


@pytest.mark.parametrize("function", [full_disks.SAVE, full_disks.EXPORT_BEST, full_disks.ADD, full_disks.TOKENIZE])
def test_the_functions_at_which_a_disk_is_full_are_there(function):
    assert callable(pkgutil.resolve_name(function))
