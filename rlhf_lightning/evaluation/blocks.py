"""What a report is made of: a title, sections, and in each section blocks. Plain data, rendered elsewhere.

`report.pages.to_html` makes one self-contained page of a `Document`, `report.pages.to_markdown` the same as Markdown.
Every string is plain text: both renderers escape it, whatever it holds. Blocks know nothing of what they show.

A number is an `Estimate` (with its 95 % interval and n), a bare float or int, or None: not measured. It is printed
by a format spec (`.3f`, `.1%`). A number that is not finite is printed as not measured, and never drawn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_lightning.evaluation.estimates import Quantity

Outcome = Literal["met with confidence", "met", "over-optimized", "not met", "not measured"]
"""Over-optimized: met by the reward model that was trained against, but not by one that was held out."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target and what became of it. `units` names what n counts: prompts, pairs, responses."""

    target: str
    outcome: Outcome
    value: Quantity
    units: str
    reason: str
    spec: str = ".3f"


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The targets, one below the other."""

    rows: Sequence[Verdict]


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    spec: str = ".3f"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of strings and numbers; columns without any string are aligned right."""

    columns: Sequence[Column | str]
    rows: Sequence[Sequence[str | Quantity]]
    caption: str

    def __post_init__(self) -> None:
        if wrong := [row for row in self.rows if len(row) != len(self.columns)]:
            raise ValueError(f"{self.caption}: a row of {len(wrong[0])} cells under {len(self.columns)} columns")


@dataclass(frozen=True, slots=True)
class Facts:
    """Names with one or several values: settings, versions, counts."""

    rows: Sequence[tuple[str, str | int | float | Sequence[str] | None]]


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence that must not be missed."""

    text: str


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    value: Quantity


@dataclass(frozen=True, slots=True)
class BarGroup:
    """Bars below a heading; without a name, no heading."""

    name: str
    bars: Sequence[Bar]


@dataclass(frozen=True, slots=True)
class Reference:
    """A line at a value to compare with: the coin flip at 0.5."""

    value: float
    label: str


COIN = Reference(0.5, "coin flip")


@dataclass(frozen=True, slots=True)
class Bars:
    """Horizontal bars with whiskers, of shares from 0 to 1."""

    groups: Sequence[BarGroup]
    units: str
    caption: str
    references: Sequence[Reference] = ()
    spec: str = ".3f"


@dataclass(frozen=True, slots=True)
class Distribution:
    name: str
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Up to four distributions over the same bins, each as shares of its own values."""

    series: Sequence[Distribution]
    x_label: str
    units: str
    caption: str
    references: Sequence[Reference] = ()


@dataclass(frozen=True, slots=True)
class Point:
    """`label` stands beside the point where there is room, and always in the numbers."""

    x: float
    y: Quantity
    label: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """Points in the order of the line. A point whose y is None is a gap."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Lines:
    """Up to four series over common axes. `diagonal` is the label of a line y = x, drawn where it is given.

    `domain` and `range` are the least that the axes show.
    """

    series: Sequence[Series]
    x_label: str
    y_label: str
    caption: str
    diagonal: str = ""
    domain: tuple[float, float] | None = None
    range: tuple[float, float] | None = None
    spec: str = ".3f"
    x_spec: str = "g"


@dataclass(frozen=True, slots=True)
class SampleText:
    """A response and facts about it: (reward, 1.234), (tokens, 87), (flag, refusal)."""

    text: str
    facts: Sequence[tuple[str, str | int | float | None]] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and one text per column; None where there is none."""

    title: str
    prompt: str
    texts: Sequence[SampleText | None]


@dataclass(frozen=True, slots=True)
class Samples:
    """Prompts with their responses side by side, one or two columns."""

    columns: Sequence[str]
    rows: Sequence[Sample]
    caption: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a text. `look` is one of control, prompt, response and gap, perhaps with ` masked`: underlined."""

    text: str
    look: str


@dataclass(frozen=True, slots=True)
class Pieces:
    """A text whose stretches differ in their looks."""

    title: str
    pieces: Sequence[Piece]


@dataclass(frozen=True, slots=True)
class Beside:
    """Charts that stand beside each other where the page is wide enough."""

    blocks: Sequence[Bars | Histogram | Lines]


Block = Verdicts | Table | Facts | Note | Bars | Histogram | Lines | Samples | Pieces | Beside


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, paragraphs (divided by blank lines), and blocks."""

    title: str
    blocks: Sequence[Block]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """A whole report; with more than three sections it has a table of contents."""

    title: str
    sections: Sequence[Section]
    subtitle: str = ""


def anchors(document: Document) -> list[str]:
    """One id a section: its title in small letters and hyphens, as GitHub makes it; numbered where it is taken."""
    found: list[str] = []
    for index, section in enumerate(document.sections, 1):
        words = re.sub(r"[^a-z0-9_\s-]", "", section.title.lower()).strip()
        base = re.sub(r"\s", "-", words) or f"section-{index}"
        free = (name for name in (base, *(f"{base}-{n}" for n in range(1, index + 1))) if name not in found)
        found.append(next(free))
    return found
