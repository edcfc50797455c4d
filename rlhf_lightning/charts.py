"""Charts by matplotlib: curves and histograms, as SVG for a page or as pixels for TensorBoard.

matplotlib is imported when something is drawn, not before. The same numbers give the same characters of SVG.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 360, 230
"""Of a chart, in px at its natural size, in which its text is 11 px high."""
MARKED = 24
"""Points of a curve up to which each has a marker and a whisker; beyond, there is a line and a band."""
MOST_POINTS = 300
"""Points of a curve that are drawn; of more, the lowest and highest of each stretch are."""
MOST_BINS = 40
LARGEST = 1e100
"""Larger numbers are not drawn: their squares overflow."""

COLOURS = {
    **{"s0": "#1a66b3", "s1": "#c2500a", "s2": "#0d7f6d", "s3": "#8a3fa0"},
    **{"ink": "#18212b", "muted": "#566270", "grid": "#e8ecf0", "axis": "#8894a1", "page": "#ffffff"},
}
"""In SVG each becomes the variable of its name, such as `var(--s0)`, which the page sets for light and dark."""
SERIES = [COLOURS[f"s{index}"] for index in range(4)]
MARKERS = "osD^"
DASHES = ((0, ()), (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
LEVEL_DASHES = ((0, (3, 2)), (0, (1, 2)), (0, (6, 2)), (0, (6, 2, 1, 2)))
"""Series and reference lines differ in these as well, never in colour alone."""


class Curve(NamedTuple):
    """y against x, NaN where nothing was measured; `low` and `high` are the ends of the interval of each y."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    label: str = ""
    """Stands beside the last point."""


class RolloutPoint(NamedTuple):
    """A rollout: its optimizer step, the root of its KL in nats per response, and its mean reward."""

    step: int
    sqrt_kl: float
    reward: float


@contextmanager
def _look(salt: str = "") -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's are, with what differs here; `salt` makes ids in SVG unique."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the page's fonts have it
        matplotlib.rcdefaults()
        matplotlib.rcParams |= {
            **{"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": 11},
            **{"axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False},
            **{"axes.edgecolor": COLOURS["axis"], "axes.labelcolor": COLOURS["muted"], "text.color": COLOURS["muted"]},
            **{"xtick.color": COLOURS["axis"], "ytick.color": COLOURS["axis"], "ytick.major.size": 0},
            **{"xtick.labelcolor": COLOURS["muted"], "ytick.labelcolor": COLOURS["muted"]},
            **{"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": COLOURS["grid"]},
        }
        yield


def _chart() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, layout="constrained")
    return figure, figure.subplots()


@_look()
def curves(
    drawn: Sequence[Curve],
    *,
    diagonal: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    x_percent: bool = False,
    y_percent: bool = False,
) -> Figure:
    """Up to four curves, and y = x as a diagonal; the ranges are the least shown."""
    figure, axes = _chart()
    for index, curve in enumerate(drawn):
        _draw(axes, index, curve)
    low, high = axes.get_xlim()
    if labelled := any(curve.label for curve in drawn):
        high += 0.25 * (high - low)
    axes.set_xlim(*_least((low, high), x_range))
    axes.set_ylim(*_least(axes.get_ylim(), y_range))
    if diagonal:
        axes.axline((0, 0), slope=1, color=COLOURS["ink"], linewidth=1.2, linestyle=(0, (5, 4)), zorder=1)
    whole = all(float(x).is_integer() for curve in drawn for x in _finite(curve.x))
    _ticks(axes.xaxis, x_percent, 6, whole=whole)
    _ticks(axes.yaxis, y_percent, 5)
    if labelled:
        _labels(axes, drawn)
    return figure


@_look()
def histogram(distributions: Sequence[Sequence[float]], *, marks: Sequence[float] = ()) -> Figure:
    """Up to four distributions over common bins, each as shares of its own values, and vertical lines at `marks`."""
    edges = bin_edges(distributions)
    figure, axes = _chart()
    for index, values in enumerate(distributions):
        counts = bin_counts(values, edges)
        if not counts.any():
            continue
        shares, colour = counts / counts.sum(), SERIES[index]
        axes.stairs(shares, edges, linewidth=1.8, linestyle=DASHES[index], color=colour, zorder=2)
        if index == 0:
            axes.stairs(shares, edges, fill=True, alpha=0.25, linewidth=0, color=colour, zorder=2)
    for index, mark in enumerate(_finite(marks)):
        axes.axvline(mark, color=COLOURS["ink"], linewidth=1.2, linestyle=LEVEL_DASHES[index % 4])
    axes.set_ylim(bottom=0)
    _ticks(axes.xaxis, False, 6)
    _ticks(axes.yaxis, True, 4)
    return figure


def bin_edges(distributions: Sequence[Sequence[float]]) -> np.ndarray:
    """Edges of round numbers around all values, at most about 40 bins; none without a value.

    As many bins as numpy's `auto` gives to the distribution that bears the narrowest ones.
    """
    from matplotlib.ticker import MaxNLocator

    rows = [_finite(values) for values in distributions]
    values = np.concatenate([*rows, []])
    if not values.size:
        return values
    low, high = values.min(), values.max()
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        around = max(0.5, abs(low) / 1000)
        return np.array([low - around, low + around])
    widths = [np.ptp(row) / _bins(row) for row in rows if row.size and np.ptp(row) > 0]
    count = int(np.clip(1.4 * (high - low) / min([*widths, high - low]), 5, MOST_BINS))  # rounding makes them wider
    edges = np.array(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    # 95 * 0.02 is above 1.9, and would leave it out.
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    return edges


def _bins(values: np.ndarray) -> int:
    """The greater number of Sturges 1926 and of Freedman and Diaconis 1981, up to `MOST_BINS`."""
    quartiles = np.subtract(*np.percentile(values, [75, 25]))
    finest = np.ptp(values) / (2 * quartiles) * values.size ** (1 / 3) if quartiles > 0 else 0
    return int(np.clip(max(finest, np.log2(values.size) + 1), 1, MOST_BINS))


def bin_counts(values: Sequence[float], edges: np.ndarray) -> np.ndarray:
    """How many of the values lie in each bin; a value on an edge belongs to the right one, the last edge to both."""
    return np.histogram(_finite(values), bins=edges)[0] if len(edges) else np.zeros(0, dtype=int)


def svg(figure: Figure, salt: str) -> str:
    """The figure as an element of an HTML page, without a size of its own; charts of one page differ in `salt`."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with _look(salt):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = re.sub(r"<style.*?</style>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<[^>]+>", _tidy, text)
    return re.sub(r">\s+<", "><", text).strip()


def _tidy(tag: re.Match[str]) -> str:
    """A tag of matplotlib's SVG with fewer digits, the page's font and colours, and no ids that nothing names."""
    text = tag[0]
    if text.startswith("<svg"):
        return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">'
    if text.startswith("<g"):
        text = re.sub(r' id="[^"]*"', "", text)
    text = re.sub(r'font-(size|family): [^;"]*; | transform="rotate\(-0 [^"]*"', "", text.replace("xlink:href", "href"))
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r"-?\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), text)
    return re.sub(r"\s+", " ", text)


def pixels(figure: Figure) -> np.ndarray:
    """The figure twice as large on white, [H, W, 3] uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with _look():
        figure.set_dpi(144)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def reward_against_kl(points: Sequence[RolloutPoint]) -> np.ndarray:
    """The path of a run, reward over sqrt(KL), as pixels; the axes of Gao et al. 2022 (arXiv 2210.10760).

    Raises `ValueError` without points.
    """
    if not points:
        raise ValueError("a picture of no rollouts")
    path = Curve([p.sqrt_kl for p in points], [p.reward for p in points], label=f"step {points[-1].step}")
    figure = curves([path])
    with _look():
        figure.axes[0].set_xlabel("square root of the KL from the reference, nats per response")
        figure.axes[0].set_ylabel("mean reward of a rollout")
    return pixels(figure)


def _draw(axes: Axes, index: int, curve: Curve) -> None:
    x, y, low, high = (_array(values) for values in curve[:4])
    colour, drawn = SERIES[index], np.isfinite(x) & np.isfinite(y)
    many = drawn.sum() > MARKED
    kept = _thinned(y) if many else np.arange(len(y))
    marker: dict[str, Any] = {"marker": MARKERS[index], "markeredgecolor": COLOURS["page"], "markersize": 6.5}
    axes.plot(x[kept], y[kept], color=colour, linestyle=DASHES[index], linewidth=1.8, **({} if many else marker))
    if many:  # a point between two gaps is no line
        beside = np.concatenate([[False], drawn, [False]])
        alone = drawn & ~beside[:-2] & ~beside[2:]
        axes.plot(x[alone], y[alone], color=colour, linestyle="none", **marker)
    if len(low) and many:
        axes.fill_between(x[kept], low[kept], high[kept], color=colour, alpha=0.2, linewidth=0)
    elif len(low):
        axes.vlines(x, low, high, color=colour, alpha=0.7, linewidth=1.2)


def _thinned(y: np.ndarray) -> np.ndarray:
    """Places of at most `MOST_POINTS` values: first and last, and the gaps, lowest and highest of each stretch."""
    if len(y) <= MOST_POINTS:
        return np.arange(len(y))
    kept = {0, len(y) - 1}
    for part in np.array_split(np.arange(len(y)), MOST_POINTS // 3 - 1):
        values, gaps = y[part], np.isnan(y[part])
        kept |= {int(part[gaps.argmax()])} if gaps.any() else set()
        if not gaps.all():
            kept |= {int(part[np.nanargmin(values)]), int(part[np.nanargmax(values)])}
    return np.array(sorted(kept))


def _labels(axes: Axes, drawn: Sequence[Curve]) -> None:
    """The labels to the right of the last points, one above the other where these are close."""
    ends = []
    for index, curve in enumerate(drawn):
        x, y = _array(curve.x), _array(curve.y)
        shown = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
        if curve.label and shown.size:
            ends.append((*axes.transLimits.transform((x[shown[-1]], y[shown[-1]])), index))
    lowest = 0.0
    for x, y, index in sorted(ends, key=lambda end: end[1]):
        lowest = max(y, lowest)
        label = axes.text(x + 0.025, lowest, drawn[index].label, color=SERIES[index], transform=axes.transAxes)
        label.set(horizontalalignment="left", verticalalignment="center")
        lowest += 0.075


def _ticks(axis: Axis, percent: bool, most: int, *, whole: bool = False) -> None:
    """At most so many intervals between ticks, whole numbers where all values are."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=whole))
    if percent:
        axis.set_major_formatter(lambda share, _: f"{100 * share:.3g}\u00a0%")


def _least(limits: tuple[float, float], asked: tuple[float, float] | None) -> tuple[float, float]:
    """The limits of an axis around those asked for, where a margin alone reaches beyond them."""
    if asked is None:
        return limits
    margin = 0.05 * (limits[1] - limits[0])
    return min(asked[0], limits[0] + margin), max(asked[1], limits[1] - margin)


def _array(values: Sequence[float]) -> np.ndarray:
    """As float64, NaN where it cannot be drawn."""
    array = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return np.where(np.abs(array) < LARGEST, array, np.nan)


def _finite(values: Sequence[float]) -> np.ndarray:
    array = _array(values)
    return array[np.isfinite(array)]
