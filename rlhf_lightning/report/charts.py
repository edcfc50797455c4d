"""Charts of a report, as SVG without a script: pure functions from numbers to a string.

Two kinds. A *strip* is one row of a chart whose labels are HTML (bars, changes): it is as wide as its place, because
every x in it is a percentage, and so its lines and text keep their size on any screen. A *plot* (histogram, lines)
has a fixed width in px; the page holds it twice, `NARROW` and `WIDE`, and shows the one that fits.

Colours are CSS classes (`s0` to `s3`: the series); the page defines them. Series differ in their dashes and markers
as well, never in colour alone.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from rlhf_lightning.evaluation.blocks import Bar, Bars, Change, Changes, Histogram, Lines, Point, Series
from rlhf_lightning.evaluation.estimates import Quantity, interval_of, value_of
from rlhf_lightning.report.wording import MINUS, number
from rlhf_lightning.terminal import visible

NARROW, WIDE = 320, 720
"""Widths of a plot in px. Its font is 12 px on both."""

MOST_BINS, FEWEST_BINS = 40, 5
MOST_POINTS = 300
"""Points of a series that are drawn; of more, the first, lowest, highest and last of each stretch are."""

MOST_LABELS = 40
"""Labelled points of a series; of more, only the first and the last keep their labels in the drawing."""

DASHES = ("", "7 4", "2 3", "9 3 2 3")
REFERENCE_DASHES = ("4 3", "1 3", "8 3", "8 3 1 3")
NARROWEST_STRIP = 240
"""In px, of the layouts of the page from 360 px up."""
FONT = 12.0

_WIDTHS = {
    "ijl.,:;|!'()[]": 0.4,
    "frt/- \u00a0\u202f": 0.45,
    "ABCDEFGHKNOPQRSUVXYZ&#+=<>~\u2212": 0.85,
    "mwMW@%": 1.0,
}
"""In em: of DejaVu Sans and rounded up, the widest font that a page without fonts of its own commonly gets."""
_WIDTH_OF = {character: width for characters, width in _WIDTHS.items() for character in characters}


class Axis(NamedTuple):
    """A stretch of numbers and the ticks on it."""

    low: float
    high: float
    ticks: list[float]

    def share(self, value: float) -> float:
        """Where on the axis, 0 to 1; values beyond its ends are put at the end."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


def axis(
    values: Sequence[float], *, count: int = 5, least: tuple[float, float] | None = None, round_out: bool = True
) -> Axis:
    """An axis that shows all values and at least `least`, about `count` ticks; rounded out, it ends in ticks.

    Whole numbers, such as steps, get no ticks between them.
    """
    shown = [*values, *(least or ())] or [0.0, 1.0]
    low, high = min(shown), max(shown)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        around = abs(low) / 2 or 1.0
        low, high = low - around, high + around
    step = _nice_step((high - low) / max(count - 1, 1))
    if step < 1 and not round_out and all(float(value).is_integer() for value in values):
        step = 1.0
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if round_out and (least is None or (low, high) != (min(least), max(least))):
        low, high = first * step, last * step
    ticks = [tick * step for tick in range(first, last + 1)]
    return Axis(low, high, [tick for tick in ticks if low - 1e-9 * step <= tick <= high + 1e-9 * step])


def _nice_step(step: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(step))
    return next(nice * magnitude for nice in (1.0, 2.0, 2.5, 5.0, 10.0) if nice * magnitude >= step * (1 - 1e-9))


def tick_labels(ticks: Sequence[float], spec: str = ".3f") -> list[str]:
    """As many decimals as the ticks need, `25 %` where the spec is one of percentages, `40k`, `1.5M`, `1e−7`."""
    if not ticks:
        return []
    percent = spec.endswith("%")
    scaled = [100 * tick if percent else tick for tick in ticks]
    largest = max(map(abs, scaled))
    step = min((abs(b - a) for a, b in pairwise(scaled)), default=largest) or 1.0
    if largest >= 1e12 or (0 < largest < 1e-4):
        labels = [f"{value:.3g}" if abs(value) > 1e-9 * step else "0" for value in scaled]
    else:
        unit, suffix = next(
            ((size, letter) for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if largest >= max(size, 1e4)),
            (1.0, ""),
        )
        decimals = next((d for d in range(7) if abs(round(step / unit, d) - step / unit) < 1e-3 * step / unit), 7)
        labels = [f"{value / unit:.{decimals}f}{suffix}" for value in scaled]
    labels = ["0" if label.strip("-0.kMG") == "" else label for label in labels]
    return [label.replace("-", MINUS) + ("\u00a0%" if percent else "") for label in labels]


def text_width(text: str, size: float = FONT) -> float:
    """An upper estimate in px for the usual sans-serif fonts; wide characters (CJK, emoji) count a whole em."""
    return size * sum(_WIDTH_OF.get(c, 0.66) if ord(c) < 0x1100 or c in _WIDTH_OF else 1.1 for c in text)


def bin_edges(distributions: Sequence[Sequence[float]]) -> list[float]:
    """Common bins of round width, about 5 to 40 of them: fine enough for the narrowest of the distributions.

    Equal values get one bin around them; without any value there is no bin.
    """
    values = np.array([value for values in distributions for value in values if drawable(value)], dtype=np.float64)
    if values.size == 0:
        return []
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        around = max(0.5, abs(low) / 1000)
        return [low - around, low + around]
    width = min(_bin_width(np.array([v for v in row if drawable(v)]), high - low) for row in distributions)
    width = min(max(width, (high - low) / MOST_BINS), (high - low) / FEWEST_BINS)
    step = _nice_step(width * 0.7)
    first = math.floor(low / step)
    last = max(math.floor(high / step) + 1, first + 1)
    if last - first > MOST_BINS:
        step = _nice_step(width)
        first, last = math.floor(low / step), math.floor(high / step) + 1
    edges = [edge * step for edge in range(first, last + 1)]
    # 95 * 0.02 is above 1.9, and would leave it out.
    return [min(edges[0], low), *edges[1:-1], max(edges[-1], high)]


def _bin_width(values: np.ndarray, spread: float) -> float:
    """Freedman and Diaconis 1981, 2 IQR / n^(1/3); Sturges's rule over the whole spread where the IQR is 0."""
    if values.size < 2:
        return spread
    quartile_range = float(np.subtract(*np.percentile(values, [75, 25])))
    return 2 * quartile_range / values.size ** (1 / 3) or spread / (1 + math.log2(values.size))


def bin_shares(values: Sequence[float], edges: Sequence[float]) -> tuple[list[int], list[float]]:
    """How many of the values, and which share of them, lie in each bin; a value on an edge belongs to the right."""
    finite = [value for value in values if drawable(value)]
    counts = np.histogram(finite, bins=np.asarray(edges))[0].tolist()
    return counts, [count / len(finite) if finite else 0.0 for count in counts]


def drawable(value: float | None) -> bool:
    """Finite, and small enough that differences are finite too."""
    return value is not None and math.isfinite(value) and abs(value) < 1e300


# Strips ------------------------------------------------------------------------------------------------------------


def bars_axis(block: Bars) -> Axis:
    return _strip_axis([bar.value for group in block.groups for bar in group.bars], block, zero=block.domain is None)


def changes_axis(block: Changes) -> Axis:
    return _strip_axis([side for row in block.rows for side in (row.before, row.after)], block, zero=False)


def _strip_axis(quantities: Sequence[Quantity], block: Bars | Changes, *, zero: bool) -> Axis:
    values = [end for quantity in quantities for end in _extent(quantity)]
    values += [line.value for line in block.references if drawable(line.value)]
    return axis([*values, 0.0] if zero and values else values, least=block.domain)


def _extent(quantity: Quantity) -> Iterator[float]:
    value = value_of(quantity)
    if drawable(value):
        yield from (end for end in (value, *(interval_of(quantity) or ())) if drawable(end))


def bar_strip(bar: Bar, block: Bars, scale: Axis) -> str:
    """One bar from 0, or from the end of the axis nearest to 0, with its whisker, grid and reference lines."""
    value = value_of(bar.value)
    parts = [*_strip_grid(scale)]
    base = scale.share(0.0)
    if scale.low < 0 < scale.high:
        parts.append(_strip_line(base, "zero"))
    if drawable(value):
        start, end = sorted((base, scale.share(value)))
        place = f'x="{_percent(start)}" y="50%" width="{_percent(end - start)}" height="12"'
        parts.append(f'<rect class="bar" {place} transform="translate(0,-6)"/>')
        parts += _strip_whisker(bar.value, scale, "50%")
    return _strip([*parts, *_strip_references(block, scale)])


def change_strip(change: Change, block: Changes, scale: Axis) -> str:
    """A hollow point (before) above a filled one (after), joined by a line, each with its whisker."""
    sides, lanes = (change.before, change.after), ("25%", "75%")
    parts = [*_strip_grid(scale), *_strip_references(block, scale)]
    values = [value_of(side) for side in sides]
    places = [scale.share(value) if drawable(value) else None for value in values]
    if None not in places:
        ends = f'x1="{_percent(places[0])}" x2="{_percent(places[1])}"'
        parts.append(f'<line class="join" {ends} y1="{lanes[0]}" y2="{lanes[1]}"/>')
    for side, place, lane, look in zip(sides, places, lanes, ("before", "after"), strict=True):
        if place is not None:
            parts += _strip_whisker(side, scale, lane)
            parts.append(f'<circle class="{look}" cx="{_percent(place)}" cy="{lane}" r="5"/>')
    return _strip(parts)


def axis_strip(scale: Axis, spec: str) -> str:
    """The numbers below a column of strips, as many as have room at the least width."""
    wide = 6 + max(map(text_width, tick_labels(scale.ticks, spec)))
    fewer = (scale.ticks[::every] for every in range(1, len(scale.ticks) + 1))
    ticks = next((ticks for ticks in fewer if len(ticks) * wide <= NARROWEST_STRIP + 6), scale.ticks[:1])
    parts = []
    for tick, label in zip(ticks, tick_labels(ticks, spec), strict=True):
        place = scale.share(tick)
        anchor = "start" if place < 0.08 else "end" if place > 0.92 else "middle"
        parts.append(f'<text x="{_percent(place)}" y="14" text-anchor="{anchor}">{label}</text>')
    return _strip(parts)


def _strip(parts: Sequence[str]) -> str:
    return f'<svg class="strip" aria-hidden="true">{"".join(parts)}</svg>'


def _strip_grid(scale: Axis) -> Iterator[str]:
    return (_strip_line(scale.share(tick), "grid") for tick in scale.ticks)


def _strip_references(block: Bars | Changes, scale: Axis) -> Iterator[str]:
    for index, line in enumerate(block.references):
        if drawable(line.value):
            yield _strip_line(scale.share(line.value), "reference", REFERENCE_DASHES[index % len(REFERENCE_DASHES)])


def _strip_line(place: float, look: str, dashes: str = "") -> str:
    x = _percent(place)
    return f'<line class="{look}" x1="{x}" x2="{x}" y1="0" y2="100%"{_dashed(dashes)}/>'


def _strip_whisker(quantity: Quantity, scale: Axis, lane: str) -> Iterator[str]:
    ends = interval_of(quantity)
    if ends is not None and all(map(drawable, ends)):
        low, high = (_percent(scale.share(end)) for end in ends)
        yield f'<line class="whisker" x1="{low}" x2="{high}" y1="{lane}" y2="{lane}"/>'
        for x in (low, high):
            yield f'<rect class="cap" x="{x}" y="{lane}" width="1.5" height="8" transform="translate(-.75,-4)"/>'


def _percent(share: float) -> str:
    return f"{_short(100 * share)}%"


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


# Plots -------------------------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """Where the data of a plot lie, in px, and the axes they are measured on."""

    left: float
    top: float
    right: float
    bottom: float
    x_axis: Axis
    y_axis: Axis

    def x(self, value: float) -> float:
        return self.left + self.x_axis.share(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - self.y_axis.share(value) * (self.bottom - self.top)


class Box(NamedTuple):
    """A rectangle that text must not touch."""

    left: float
    top: float
    right: float
    bottom: float

    def distance(self, x: float, y: float) -> float:
        """From the point to the rectangle."""
        return math.hypot(max(self.left - x, x - self.right, 0), max(self.top - y, y - self.bottom, 0))

    def touches(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def histogram(block: Histogram, width: int) -> str:
    """The first distribution filled, the others as outlines of their own dashes, as shares of each."""
    edges = bin_edges([series.values for series in block.series])
    shares = [bin_shares(series.values, edges)[1] if edges else [] for series in block.series]
    if not edges:
        return _empty_plot(block.caption, width)
    reference_values = [line.value for line in block.references if drawable(line.value)]
    x_values = [edges[0], edges[-1], *reference_values]
    y_axis = axis([0.0, *(share for row in shares for share in row)], count=4)
    frame, parts = _frame(width, x_values, None, y_axis, "g", ".0%")
    for index, row in enumerate(shares):
        if not any(row):
            continue
        corners = [(edges[0], 0.0)]
        for (start, end), share in zip(pairwise(edges), row, strict=True):
            corners += [(start, share), (end, share)]
        corners.append((edges[-1], 0.0))
        path = "M" + "L".join(f"{_short(frame.x(x))} {_short(frame.y(y))}" for x, y in corners)
        look = "filled " if index == 0 else ""
        parts.append(f'<path class="{look}outline s{index}"{_dashed(DASHES[index])} d="{path}"/>')
    for index, value in enumerate(reference_values):
        parts.append(_vertical(frame, value, REFERENCE_DASHES[index % len(REFERENCE_DASHES)]))
    described = [
        f"{series.name}: {len(series.values)} {block.units}" + (f", {_span(series.values)}" if any(row) else "")
        for series, row in zip(block.series, shares, strict=True)
    ]
    return _plot(parts, width, frame.bottom + 26, block.caption, f"{block.x_label}. " + "; ".join(described) + ".")


def _span(values: Sequence[float]) -> str:
    finite = [value for value in values if drawable(value)]
    return f"median {number(float(np.median(finite)), '.4g')}, from {number(min(finite), '.4g')} to " + number(
        max(finite), ".4g"
    )


def lines(block: Lines, width: int) -> str:
    """Each series a line with markers, gaps where nothing was measured, whiskers, or a band where points are many."""
    points = [point for series in block.series for point in series.points if plotted(point)]
    if not points:
        return _empty_plot(block.caption, width)
    x_values = [point.x for point in points]
    y_values = [end for point in points for end in _extent(point.y)]
    y_values += [line.value for line in block.references if drawable(line.value)]
    y_axis = axis(y_values, count=5, least=block.range)
    frame, parts = _frame(width, x_values, block.domain, y_axis, block.x_spec, block.spec)
    if block.diagonal and (ends := _diagonal(frame)):
        parts.append(_segment(*ends, "diagonal", "5 4"))
    for index, line in enumerate(block.references):
        if drawable(line.value):
            y = frame.y(line.value)
            dashes = REFERENCE_DASHES[index % len(REFERENCE_DASHES)]
            parts.append(_segment(frame.left, y, frame.right, y, "reference", dashes))
    for index, series in enumerate(block.series):
        parts += _series(series, index, frame, block)
    parts += _point_labels(block, frame, width)
    described = [f"{series.name}: {_course(series, block)}" for series in block.series]
    subject = f"{block.y_label} against {block.x_label}. "
    return _plot(parts, width, frame.bottom + 26, block.caption, subject + "; ".join(described) + ".")


def _diagonal(frame: Frame) -> tuple[float, float, float, float] | None:
    """The ends of y = x where both axes show it."""
    low, high = max(frame.x_axis.low, frame.y_axis.low), min(frame.x_axis.high, frame.y_axis.high)
    return (frame.x(low), frame.y(low), frame.x(high), frame.y(high)) if low < high else None


def plotted(point: Point) -> bool:
    return drawable(point.x) and drawable(value_of(point.y))


def _course(series: Series, block: Lines) -> str:
    points = [point for point in series.points if plotted(point)]
    if not points:
        return "not measured"
    first, last = points[0], points[-1]
    where = [f"{number(point.y, block.spec)} at {number(point.x, block.x_spec)}" for point in (first, last)]
    return where[0] if len(points) == 1 else f"{len(points)} points, from {where[0]} to {where[1]}"


def _series(series: Series, index: int, frame: Frame, block: Lines) -> Iterator[str]:
    dense = sum(map(plotted, series.points)) > 24
    for stretch in stretches(series.points):
        kept = thinned(stretch)
        if dense:
            ends = [(point.x, interval_of(point.y)) for point in kept]
            if len(kept) > 1 and all(pair is not None and all(map(drawable, pair)) for _, pair in ends):
                around = [(x, low) for x, (low, _) in ends] + [(x, high) for x, (_, high) in reversed(ends)]
                yield f'<path class="band s{index}" d="{_path(frame, around)}Z"/>'
        if len(kept) > 1:
            path = _path(frame, [(point.x, value_of(point.y)) for point in kept])
            yield f'<path class="line s{index}"{_dashed(DASHES[index])} d="{path}"/>'
        for point in kept:
            x, y = frame.x(point.x), frame.y(value_of(point.y))
            whisker = None if dense else interval_of(point.y)
            if whisker is not None and all(map(drawable, whisker)):
                low, high = map(frame.y, whisker)
                yield _segment(x, low, x, high, f"whisker s{index}")
            if not dense or len(kept) == 1:
                words = f"{series.name}: {number(point.y, block.spec)} at {number(point.x, block.x_spec)}"
                words += f", {point.label}" if point.label else ""
                mark = marker(index, x, y)
                yield mark.replace("/>", f"><title>{_escape(words)}</title></{mark[1 : mark.index(' ')]}>")


def stretches(points: Sequence[Point]) -> list[list[Point]]:
    """The points between gaps."""
    found: list[list[Point]] = [[]]
    for point in points:
        if plotted(point):
            found[-1].append(point)
        elif found[-1]:
            found.append([])
    return [stretch for stretch in found if stretch]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about `MOST_POINTS`: of each stretch of the line the first, lowest, highest and last, in their order."""
    if len(points) <= MOST_POINTS:
        return list(points)
    values = [value_of(point.y) for point in points]
    bounds = [round(part * len(points) / (MOST_POINTS // 4)) for part in range(MOST_POINTS // 4 + 1)]
    kept: set[int] = set()
    for start, end in pairwise(bounds):
        part = range(start, end)
        kept |= {start, end - 1, min(part, key=values.__getitem__), max(part, key=values.__getitem__)}
    return [points[index] for index in sorted(kept)]


def _point_labels(block: Lines, frame: Frame, width: int) -> Iterator[str]:
    """Labels where they touch nothing and are clearly nearest to their own point; the last of a series goes first.

    What has no room is left out: the table of the numbers has it.
    """
    size, taken = 11.0, list(_obstacles(block, frame))
    markers = [
        (frame.x(point.x), frame.y(value_of(point.y)))
        for series in block.series
        if len(series.points) <= MOST_LABELS
        for point in series.points
        if plotted(point)
    ]
    for index, series in enumerate(block.series):
        labelled = [point for point in series.points if point.label and plotted(point)]
        if len(labelled) > MOST_LABELS:
            labelled = [labelled[0], labelled[-1]]
        for point in [*labelled[-1:], *labelled[:-1]]:
            x, text = frame.x(point.x), visible(point.label)
            bottom, top = (frame.y(end) for end in (min(_extent(point.y)), max(_extent(point.y))))
            middle, wide = frame.y(value_of(point.y)), text_width(text, size)
            for left, height in (
                (x - wide / 2, top - 13),
                (x - wide / 2, bottom + 13),
                (x + 9, middle),
                (x - 9 - wide, middle),
                (x + 7, middle - 11),
                (x - 7 - wide, middle - 11),
                (x + 7, middle + 11),
                (x - 7 - wide, middle + 11),
            ):
                box = Box(left, height - 6, left + wide, height + 6)
                inside = box.left >= frame.left and box.right <= width and box.top >= 0 and box.bottom <= frame.bottom
                others = (box.distance(*place) for place in markers if place != (x, middle))
                belongs = 1.5 * box.distance(x, middle) <= min(others, default=math.inf)
                if inside and belongs and not any(box.touches(other) for other in taken):
                    taken.append(box)
                    place = f'x="{_short(left + wide / 2)}" y="{_short(height + 4)}" text-anchor="middle"'
                    yield f'<text class="point t{index}" {place}>{_escape(text)}</text>'
                    break


def _obstacles(block: Lines, frame: Frame) -> Iterator[Box]:
    """What no label may touch: markers, whiskers, and the lines, these as small boxes along them."""
    if block.diagonal and (ends := _diagonal(frame)):
        yield from _along(*ends)
    for line in block.references:
        if drawable(line.value):
            yield Box(frame.left, frame.y(line.value) - 1, frame.right, frame.y(line.value) + 1)
    for series in block.series:
        for stretch in stretches(series.points):
            corners = [(frame.x(point.x), frame.y(value_of(point.y))) for point in thinned(stretch)]
            for (x1, y1), (x2, y2) in pairwise(corners):
                yield from _along(x1, y1, x2, y2)
            if len(stretch) <= MOST_LABELS:
                for point, (x, y) in zip(stretch, corners, strict=True):
                    ends = [frame.y(end) for end in _extent(point.y)]
                    yield Box(x - 5, y - 5, x + 5, y + 5)
                    yield Box(x - 2, min(ends), x + 2, max(ends))


def _along(x1: float, y1: float, x2: float, y2: float) -> Iterator[Box]:
    pieces = 1 + int(max(abs(x2 - x1), abs(y2 - y1)) // 6)
    for piece in range(pieces + 1):
        x, y = x1 + (x2 - x1) * piece / pieces, y1 + (y2 - y1) * piece / pieces
        yield Box(x - 2, y - 2, x + 2, y + 2)


def marker(index: int, x: float, y: float) -> str:
    """Circle, square, diamond, triangle: one shape per series."""
    look = f'class="marker s{index}"'
    if index == 0:
        return f'<circle {look} cx="{_short(x)}" cy="{_short(y)}" r="4"/>'
    if index == 1:
        return f'<rect {look} x="{_short(x - 3.5)}" y="{_short(y - 3.5)}" width="7" height="7"/>'
    around = [(0, -5), (5, 0), (0, 5), (-5, 0)] if index == 2 else [(0, -5), (4.5, 4), (-4.5, 4)]
    corners = "L".join(f"{_short(x + dx)} {_short(y + dy)}" for dx, dy in around)
    return f'<path {look} d="M{corners}Z"/>'


def swatch(index: int, *, kind: str) -> str:
    """What stands before a name in a legend: a line with its marker, a box, or a reference line."""
    if kind == "reference":
        inner = _segment(12, 0, 12, 14, "reference", REFERENCE_DASHES[index % len(REFERENCE_DASHES)])
    elif kind == "level":
        inner = _segment(0, 7, 24, 7, "reference", REFERENCE_DASHES[index % len(REFERENCE_DASHES)])
    elif kind == "diagonal":
        inner = _segment(2, 13, 22, 1, "diagonal", "5 4")
    elif kind == "box":
        look = "filled " if index == 0 else ""
        inner = f'<path class="{look}outline s{index}"{_dashed(DASHES[index])} d="M2 13V2H22V13"/>'
    elif kind == "line":
        inner = f'<path class="line s{index}"{_dashed(DASHES[index])} d="M0 7H24"/>{marker(index, 12, 7)}'
    else:
        inner = f'<circle class="{kind}" cx="12" cy="7" r="5"/>'
    return f'<svg class="swatch" width="24" height="14" aria-hidden="true">{inner}</svg>'


def _frame(
    width: int, x_values: Sequence[float], domain: tuple[float, float] | None, y_axis: Axis, x_spec: str, y_spec: str
) -> tuple[Frame, list[str]]:
    """The frame with as many x ticks as have room, and the drawing of grid and axes."""
    y_labels = tick_labels(y_axis.ticks, y_spec)
    left = 10 + max(map(text_width, y_labels))
    top, bottom = 12.0, 12.0 + min(max(0.42 * width, 190), 280)
    low, high = min(x_values), max(x_values)
    if domain is None and high > low:
        domain = (low - 0.02 * (high - low), high + 0.02 * (high - low))
    for ticks in range(max(width // 80, 5), 1, -1):
        x_axis = axis(x_values, count=ticks, least=domain, round_out=False)
        x_labels = tick_labels(x_axis.ticks, x_spec)
        frame = Frame(left, top, width - 14.0, bottom, x_axis, y_axis)
        placed = [_x_label(frame, tick, label, width) for tick, label in zip(x_axis.ticks, x_labels, strict=True)]
        ends = [start + text_width(label) for (start, _), label in zip(placed, x_labels, strict=True)]
        if all(end + 16 <= start for end, (start, _) in zip(ends, placed[1:], strict=False)):
            break
    parts = []
    for tick, label in zip(y_axis.ticks, y_labels, strict=True):
        y = frame.y(tick)
        parts.append(_segment(frame.left, y, frame.right, y, "zero" if tick == 0 else "grid"))
        parts.append(f'<text x="{_short(left - 6)}" y="{_short(y + 4)}" text-anchor="end">{label}</text>')
    for label, (start, x) in zip(x_labels, placed, strict=True):
        parts.append(_segment(x, frame.bottom, x, frame.bottom + 4, "tick"))
        middle = start + text_width(label) / 2
        parts.append(f'<text x="{_short(middle)}" y="{_short(bottom + 18)}" text-anchor="middle">{label}</text>')
    parts.append(_segment(frame.left, frame.bottom, frame.right, frame.bottom, "axis"))
    return frame, parts


def _x_label(frame: Frame, tick: float, label: str, width: int) -> tuple[float, float]:
    """Where the label begins, kept inside the picture, and where its tick is."""
    x = frame.x(tick)
    return min(max(x - text_width(label) / 2, 0), width - text_width(label)), x


def _vertical(frame: Frame, value: float, dashes: str) -> str:
    return _segment(frame.x(value), frame.top, frame.x(value), frame.bottom, "reference", dashes)


def _segment(x1: float, y1: float, x2: float, y2: float, look: str, dashes: str = "") -> str:
    ends = f'x1="{_short(x1)}" y1="{_short(y1)}" x2="{_short(x2)}" y2="{_short(y2)}"'
    return f'<line class="{look}" {ends}{_dashed(dashes)}/>'


def _path(frame: Frame, points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_short(frame.x(x))} {_short(frame.y(y))}" for x, y in points)


def _dashed(dashes: str) -> str:
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def _plot(parts: Sequence[str], width: int, height: float, title: str, description: str) -> str:
    size = f'viewBox="0 0 {width} {_short(height)}" width="{width}" height="{_short(height)}"'
    look = "narrow" if width == NARROW else "wide"
    words = f"<title>{_escape(visible(title))}</title><desc>{_escape(visible(description))}</desc>"
    return f'<svg class="plot {look}" role="img" {size}>{words}{"".join(parts)}</svg>'


def _empty_plot(title: str, width: int) -> str:
    words = f'<text class="empty" x="{width / 2:g}" y="52" text-anchor="middle">not measured</text>'
    box = f'<rect class="nothing" x="0.5" y="0.5" width="{width - 1}" height="95"/>'
    return _plot([box, words], width, 96, title, "Not measured.")


def _escape(text: str) -> str:
    return html.escape(visible(text))


def legend_count(values: Sequence[float], units: str) -> str:
    """`n = 200 responses, median 0.52`."""
    finite = [value for value in values if drawable(value)]
    if not finite:
        return "not measured"
    left_out = len(values) - len(finite)
    words = f"n\u00a0=\u00a0{number(len(finite))}\u00a0{units}, median {number(float(np.median(finite)), '.4g')}"
    return words + (f", {number(left_out)} not finite and left out" if left_out else "")
