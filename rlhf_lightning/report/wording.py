"""How numbers and foreign texts are written in a report, in both of its formats. Nothing here is escaped yet."""

from __future__ import annotations

import numbers
import re
import unicodedata
from typing import NamedTuple

from rlhf_lightning.evaluation.blocks import Reference
from rlhf_lightning.evaluation.estimates import Estimate, Quantity, interval_of, value_of
from rlhf_lightning.terminal import JOINERS, visible

NOT_MEASURED, NO_INTERVAL, NO_N = "not measured", "no interval", "not given"
HEADS = {"reward model": "Reward model", "held-out": "Held-out reward model", "implicit reward": "Implicit reward"}
"""What the report calls a scorer, by the title of its results."""
MINUS, THIN, HARD = "\u2212", "\u202f", "\u00a0"
"""The minus sign, the thin space between thousands, and a space at which no line breaks."""


def number(quantity: Quantity, spec: str = ".3f") -> str:
    """`0.712`, `12.0 %`, `−3`: the value alone. An int is printed whole, whatever the spec."""
    value = value_of(quantity)
    if value is None:
        return NOT_MEASURED
    if isinstance(quantity, numbers.Integral):
        return _typeset(f"{quantity:,}")
    text = format(value, spec)
    if len(text) > 16 and "e" not in text:
        text = format(value, ".3e")
    return _typeset(text)


def interval(quantity: Quantity, spec: str = ".3f") -> str:
    """`0.680 to 0.744`, or nothing where there is no interval."""
    ends = interval_of(quantity)
    return "" if ends is None else f"{number(ends[0], spec)} to {number(ends[1], spec)}"


def count(quantity: Quantity, units: str) -> str:
    """`n = 300 prompts`, or nothing where n is not known."""
    return f"n{HARD}={HARD}{number(quantity.n)}{HARD}{units}" if isinstance(quantity, Estimate) else ""


def with_interval(quantity: Quantity, spec: str = ".3f") -> str:
    """`0.712 (0.680 to 0.744)`."""
    ends = interval(quantity, spec)
    return number(quantity, spec) + (f" ({ends})" if ends else "")


def fact(value: str | int | float | None) -> str:
    """A setting or count: None is not measured, floats with six digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else number(value, "g" if isinstance(value, float) else ".3f")


def reference_text(reference: Reference, spec: str) -> str:
    return f"{reference.label} {number(reference.value, spec)}"


def is_numeric(cell: str | Quantity) -> bool:
    """Whether a cell of a table belongs to the right: a number, also one that is written out, as `12 (3.4 %)`."""
    return not isinstance(cell, str) or bool(re.fullmatch(r"[\d.,]+(?: %| \(.*%\)| \*)?|not measured", cell))


def _typeset(text: str) -> str:
    if re.fullmatch(r"[+-]0(\.0*)?%?", text):
        text = text[1:]
    return text.replace("-", MINUS).replace(",", THIN).replace("%", f"{HARD}%")


def paragraphs(text: str) -> list[str]:
    """The visible text, divided at blank lines."""
    return [part.strip() for part in re.split(r"\n\s*\n", visible(text)) if part.strip()]


class Folded(NamedTuple):
    """The beginning of a text and what follows it; `rest` is empty where the text is short."""

    beginning: str
    rest: str


def fold(text: str, *, characters: int, lines: int) -> Folded:
    """Divided after so many characters or lines, at a white space if one is near; a rest of a few words is not cut.

    A combining mark or a joiner is never parted from what it belongs to.
    """
    end = characters
    for line_number, match in enumerate(re.finditer("\n", text), 1):
        if line_number == lines:
            end = min(end, match.end())
            break
    if len(text) <= end * 1.25 and text[end:].count("\n") < 3:
        return Folded(text, "")
    if end == characters:
        space = max(text.rfind(" ", 0, end), text.rfind("\n", 0, end)) + 1
        if space > end * 0.8:
            end = space
    while end < len(text) and (unicodedata.combining(text[end]) or text[end] in JOINERS or text[end - 1] in JOINERS):
        end += 1
    return Folded(text[:end], text[end:])
