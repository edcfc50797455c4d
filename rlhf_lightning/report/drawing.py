"""What is drawn of a block, for both forms of a report: chart and legend, strips, and the numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeGuard

import numpy as np

from rlhf_lightning import charts
from rlhf_lightning.evaluation.blocks import Bar, Bars, Column, Histogram, Lines, Series, Table
from rlhf_lightning.evaluation.estimates import Quantity, interval_of, value_of
from rlhf_lightning.evaluation.rounding import spread
from rlhf_lightning.report.wording import NO_N, NOT_MEASURED, number, reference_text
from rlhf_lightning.terminal import visible

MOST_ROWS = 60
"""Rows of a table of numbers; of a longer series, evenly spread points are listed, the first and last among them."""


class Entry(NamedTuple):
    """A line of a legend: `kind` (line, box, mark or diagonal) and `number` say which mark precedes the name."""

    kind: str
    number: int
    name: str


def chart(block: Histogram | Lines, salt: str) -> str:
    """As SVG; charts of one page differ in `salt`. Empty where there is nothing to draw."""
    if isinstance(block, Histogram):
        distributions = [series.values for series in block.series]
        if not any(_is_finite(value) for values in distributions for value in values):
            return ""
        return charts.svg(charts.histogram(distributions, marks=[line.value for line in block.references]), salt)
    curves = [_curve(series) for series in block.series]
    if not any(_is_finite(x) and _is_finite(y) for curve in curves for x, y in zip(curve.x, curve.y, strict=True)):
        return ""
    figure = charts.curves(
        curves,
        diagonal=bool(block.diagonal),
        x_range=block.domain,
        y_range=block.range,
        x_percent=block.x_spec.endswith("%"),
        y_percent=block.spec.endswith("%"),
    )
    return charts.svg(figure, salt)


def _is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and abs(value) < charts.LARGEST  # false for NaN


def _curve(series: Series) -> charts.Curve:
    ends = [interval_of(point.y) for point in series.points]
    low, high = ([end[side] if end else math.nan for end in ends] for side in (0, 1)) if any(ends) else ((), ())
    label = visible(series.points[-1].label) if series.points else ""
    values = [value_of(point.y) for point in series.points]
    y = [math.nan if value is None else value for value in values]
    return charts.Curve([point.x for point in series.points], y, low, high, label)


def legend(block: Bars | Histogram | Lines) -> Iterator[Entry]:
    """The series, the diagonal and the reference lines."""
    if isinstance(block, Histogram):
        for index, distribution in enumerate(block.series):
            yield Entry("box", index, f"{distribution.name}: {_count(distribution.values, block.units)}")
    if isinstance(block, Lines):
        for index, series in enumerate(block.series):
            missing = sum(not _is_finite(value_of(point.y)) for point in series.points)
            words = f" ({number(missing)} of {number(len(series.points))} {NOT_MEASURED})" if missing else ""
            yield Entry("line", index, series.name + (words if series.points else f" ({NOT_MEASURED})"))
        if block.diagonal:
            yield Entry("diagonal", 0, block.diagonal)
        return
    spec = "g" if isinstance(block, Histogram) else block.spec
    for index, line in enumerate(block.references):
        yield Entry("mark", index, reference_text(line, spec))


def _count(values: Sequence[float], units: str) -> str:
    """`n = 200 responses, median 0.52`."""
    finite = [value for value in values if _is_finite(value)]
    if not finite:
        return NOT_MEASURED
    words = f"n\u00a0=\u00a0{number(len(finite))}\u00a0{units}, median {number(float(np.median(finite)), '.4g')}"
    left_out = len(values) - len(finite)
    return words + (f", {number(left_out)} not finite and left out" if left_out else "")


def numbers(block: Histogram | Lines) -> Table:
    """One row a bin, with how many values of each distribution lie there; or one row a point."""
    return _bins(block) if isinstance(block, Histogram) else _points(block)


def _bins(block: Histogram) -> Table:
    edges = charts.bin_edges([series.values for series in block.series])
    counts = [charts.bin_counts(series.values, edges).tolist() for series in block.series]
    names = [f"{number(float(low), '.6g')} to {number(float(high), '.6g')}" for low, high in pairwise(edges)]
    rows = [[name, *row] for name, *row in zip(names, *counts, strict=True)]
    columns = [block.x_label, *(f"{series.name} ({block.units})" for series in block.series)]
    return Table(columns, rows, "Each bin holds its lower end, the last one both ends.")


def _points(block: Lines) -> Table:
    points = [point for series in block.series for point in series.points]
    counted, labelled = any(hasattr(point.y, "n") for point in points), any(point.label for point in points)
    rows, thinned = [], []
    for series in block.series:
        listed = spread(series.points, MOST_ROWS)
        if len(listed) < len(series.points):
            thinned.append(f"{series.name}: {len(listed)} of {len(series.points)} points, evenly spread.")
        for point in listed:
            rest = [getattr(point.y, "n", NO_N)] * counted + [point.label] * labelled
            rows.append([series.name, point.x, point.y, *rest])
    columns: list[str | Column] = ["series", Column(block.x_label, block.x_spec), Column(block.y_label, block.spec)]
    return Table([*columns, *["n"] * counted, *["label"] * labelled], rows, " ".join(thinned))


# ---- strips of `Bars`

TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def at(share: float) -> float:
    """Where on the axis, in percent of its length; beyond its ends, at the end."""
    return round(100 * min(max(share, 0.0), 1.0), 2)


def whisker(quantity: Quantity) -> tuple[float, float] | None:
    """Both ends of the interval, in percent."""
    ends = interval_of(quantity)
    return (at(ends[0]), at(ends[1])) if ends else None


def tick_label(tick: float, block: Bars) -> str:
    return number(tick, ".0%" if block.spec.endswith("%") else ".4g")


def shown_groups(block: Bars) -> list[tuple[str, Sequence[Bar]]]:
    """Names and bars of the groups that have bars."""
    return [(group.name, group.bars) for group in block.groups if group.bars]
