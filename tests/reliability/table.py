"""Lines of the table "what, tried, survived", and how they are tried."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

Kind = Literal["kill", "corruption", "full disk", "race"]
WANTED: dict[Kind, int] = {"kill": 150, "corruption": 60, "full disk": 30, "race": 10}
"""Trials of each kind in the whole table, at least."""

Trial = Callable[[Path], None]
"""Tries once, in an empty directory of its own. Raises AssertionError where that was not survived."""


class Line(NamedTuple):
    """One line of the table: what is done to what, and its trials, made anew at each call."""

    kind: Kind
    what: str
    trials: Callable[[], Sequence[Trial]]
    in_suite: bool = True
    """Whether the suite tries one of them; where a trial takes long, and other tests are like it, it does not."""


class Tried(NamedTuple):
    line: Line
    survived: int
    fell_short: list[str]
    seconds: float

    @property
    def tried(self) -> int:
        return self.survived + len(self.fell_short)


def attempt(line: Line, directory: Path, at_most: int | None = None) -> Tried:
    """Try a line's trials, or `at_most` of them drawn at random (seeded), each in a directory of its own."""
    trials = list(enumerate(line.trials()))
    if at_most is not None and at_most < len(trials):
        trials = sorted(random.Random(line.what).sample(trials, at_most), key=lambda trial: trial[0])
    begun, survived, fell_short = time.monotonic(), 0, []
    for number, trial in trials:
        place = directory / str(number)
        place.mkdir(parents=True)
        try:
            trial(place)
        except Exception:
            fell_short.append(f"{line.kind}, {line.what}, trial {number}: {traceback.format_exc()}")
        else:
            survived += 1
    return Tried(line, survived, fell_short, time.monotonic() - begun)


def drawn(results: Iterable[Tried]) -> str:
    """The table in Markdown, with a sum of each kind."""
    rows = [("", "what", "tried", "survived", "seconds")]
    results = list(results)
    for kind in WANTED:
        of_kind = [tried for tried in results if tried.line.kind == kind]
        rows += [(kind, t.line.what, str(t.tried), str(t.survived), f"{t.seconds:.0f}") for t in of_kind]
        tried, survived = sum(t.tried for t in of_kind), sum(t.survived for t in of_kind)
        rows.append((kind, f"**all, of {WANTED[kind]} wanted**", str(tried), str(survived), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(row) + " |" for row in padded)
