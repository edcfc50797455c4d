"""Charts: what is drawn is where its numbers say, whatever the numbers; SVG holds nothing but the drawing."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf_lightning import charts
from rlhf_lightning.charts import Curve, RolloutPoint, curves, histogram, pixels, reward_against_kl, svg

NAN = math.nan
numbers = st.floats(-1e9, 1e9).filter(lambda value: value == 0 or abs(value) > 1e-6)


def paths(drawing: str, series: int) -> list[list[tuple[float, float]]]:
    """Corners of the lines and outlines in the colour of a series, from the left."""
    found = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none;[^"]*stroke: var\(--s{series}\)', drawing)
    return [
        [tuple(map(float, corner.split())) for corner in re.split("[MLz]", path) if corner.strip()] for path in found
    ]


def texts(drawing: str) -> list[str]:
    return re.findall("<text[^>]*>([^<]*)</text>", drawing)


def test_a_curve_goes_through_its_points_in_proportion():
    drawing = svg(curves([Curve([0, 1, 4], [0.0, 0.25, 1.0])]), "a")
    ((x0, y0), (x1, y1), (x2, y2)) = paths(drawing, 0)[0]
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.25, abs=1e-3)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(0.25, abs=1e-3)
    assert 0 < x0 < x2 < charts.WIDTH


def test_a_gap_divides_a_curve_and_a_point_alone_in_a_long_one_is_marked():
    few = svg(curves([Curve(range(6), [1, 2, None, NAN, 3, 4])]), "a")
    (line,) = re.findall(r'd="([^"]*)"[^>]*stroke: var\(--s0\); stroke-width: 1.8', few)
    assert (line.count("M"), line.count("L")) == (2, 2)
    many = [float(x) if x != 10 and x != 12 else NAN for x in range(40)]
    marker = re.compile(r'<use [^>]*style="fill: var\(--s0\)')
    assert len(marker.findall(svg(curves([Curve(range(40), many)]), "a"))) == 1
    assert not marker.findall(svg(curves([Curve(range(40), range(40))]), "a"))


@pytest.mark.parametrize(("count", "band"), [(charts.MARKED, False), (charts.MARKED + 1, True)])
def test_many_points_with_intervals_get_a_band_and_few_get_whiskers(count, band):
    y = np.arange(count)
    drawing = svg(curves([Curve(y, y, y - 1, y + 1)]), "a")
    assert ("fill-opacity: 0.2" in drawing) == band
    whiskers = [path for path in paths(drawing, 0) if len(path) == 2 and path[0][0] == path[1][0]]
    assert len(whiskers) == (0 if band else count)


def test_a_long_curve_keeps_its_ends_extremes_and_gaps():
    y = np.random.default_rng(0).normal(size=20_000)
    y[[7, 13_000]] = NAN
    kept = charts._thinned(y)
    assert len(kept) <= charts.MOST_POINTS
    assert {0, 7, 13_000, 19_999, int(np.nanargmin(y)), int(np.nanargmax(y))} <= set(kept.tolist())
    assert charts._thinned(y[:300]).tolist() == list(range(300))


def test_a_histogram_is_as_high_as_its_shares():
    drawing = svg(histogram([[0.1] * 3 + [5.1], [5.1]]), "a")
    first, second = (path for index in (0, 1) for path in paths(drawing, index))
    floor = first[0][1]
    assert (floor - min(y for _, y in first)) / (floor - min(y for _, y in second)) == pytest.approx(0.75, abs=1e-3)


@example([[2.0, 1.9]])  # 95 * 0.02 > 1.9
@given(st.lists(st.lists(numbers, max_size=60), min_size=1, max_size=4))
def test_bins_are_equal_and_hold_every_value_once(distributions):
    edges = charts.bin_edges(distributions)
    if not any(distributions):
        assert len(edges) == 0
        return
    widths = np.diff(edges)
    assert 1 <= len(widths) <= charts.MOST_BINS + 2
    np.testing.assert_allclose(widths, widths[0], rtol=1e-6)
    for values in distributions:
        counts = charts.bin_counts(values, edges).tolist()
        slow = [sum(a <= v < b for v in values) for a, b in pairwise(edges)]
        slow[-1] += sum(v == edges[-1] for v in values)
        assert counts == slow
        assert sum(counts) == len(values)


def test_bins_are_fine_enough_for_the_narrowest_distribution():
    draw = np.random.default_rng(0)
    left, right = draw.normal(0, 1, 100), draw.normal(9, 1, 100)
    alone, both = charts.bin_edges([left]), charts.bin_edges([left, right])
    assert both[1] - both[0] <= 1.5 * (alone[1] - alone[0])
    values = [1.0, 2.0, NAN, math.inf]
    assert charts.bin_counts(values, charts.bin_edges([values])).sum() == 2


def test_a_range_is_the_least_that_is_shown():
    axes = curves([Curve([0.2, 0.4], [0.3, 0.6])], x_range=(0, 1), y_range=(0, 0.5)).axes[0]
    assert axes.get_xlim() == (0, 1)
    assert axes.get_ylim() == (0, pytest.approx(0.6, abs=0.01))


def test_steps_get_no_ticks_between_whole_numbers():
    assert [t for t in texts(svg(curves([Curve([0, 3], [0.0, 1.5])]), "a")) if "." not in t] == ["0", "1", "2", "3"]
    assert "1.5" in texts(svg(curves([Curve([0, 2.5], [7, 9])]), "a"))


def test_labels_stand_beside_the_last_points_and_apart():
    three = [Curve([0, 1], [0, 1 + n / 1000], label=f"end {n}") for n in range(3)]
    drawing = svg(curves(three), "a")
    found = re.findall(r'<text [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*>end \d', drawing)
    places = sorted((float(y), float(x)) for x, y in found)
    assert len(places) == 3
    assert all(below[0] - above[0] >= 11 for above, below in pairwise(places))
    assert min(x for _, x in places) > paths(drawing, 0)[0][-1][0]


def test_svg_has_the_pages_colours_no_ids_but_those_that_are_named_and_nothing_else():
    first, second = (svg(curves([Curve([0, 1], [0, 1], label="<b>&漢$x$")]), salt) for salt in "ab")
    root = ElementTree.fromstring(first)
    assert {node.tag for node in root.iter()} <= {"svg", "defs", "g", "path", "use", "text", "clipPath", "rect"}
    assert "<b>&漢$x$" in [node.text for node in root.iter("text")]
    assert not re.search(r"(stroke|fill): #", first)
    ids = re.findall(r' id="([^"]*)"', first)
    assert len(set(ids)) == len(ids)
    assert all(f"#{name}" in first for name in ids)
    assert not set(ids) & set(re.findall(r' id="([^"]*)"', second))
    assert "font" not in first


def test_the_same_numbers_give_the_same_characters_in_another_process_with_other_settings(tmp_path):
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\naxes.grid: True\nfont.size: 33\naxes.facecolor: red\n")
    script = (
        "from rlhf_lightning.charts import *;"
        "print(svg(curves([Curve([0, 1], [0, 1])]), 'a') + svg(histogram([[1, 2, 3]]), 'b'))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    expected = svg(curves([Curve([0, 1], [0, 1])]), "a") + svg(histogram([[1, 2, 3]]), "b")
    assert result.stdout.strip() == expected


@given(
    data=st.lists(st.lists(st.tuples(st.floats(), st.none() | st.floats()), max_size=12), max_size=4),
    label=st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc", "Cn"]), max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_any_numbers_make_a_drawing(data, label):
    drawn = [Curve([x for x, _ in row], [y for _, y in row], label=label) for row in data]
    for figure in (curves(drawn, diagonal=True), histogram([curve.y for curve in drawn])):
        ElementTree.fromstring(svg(figure, "salt"))


@pytest.mark.parametrize("points", [[RolloutPoint(1, 0.0, 5.0)], [RolloutPoint(4, 0, -1), RolloutPoint(8, 2.0, 3)]])
def test_the_picture_for_tensorboard_is_a_run_s_path(points):
    picture = reward_against_kl(points)
    assert picture.shape == (2 * charts.HEIGHT, 2 * charts.WIDTH, 3)
    assert picture.dtype == np.uint8
    assert picture[0, 0].tolist() == [255] * 3
    rows, columns = np.nonzero((picture == (0x1A, 0x66, 0xB3)).all(axis=-1))
    assert len(rows) > 20
    if len(points) > 1:
        assert rows[columns.argmin()] > rows[columns.argmax()], "more reward is higher up"


def test_a_picture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no rollouts"):
        reward_against_kl([])


def test_pixels_do_not_depend_on_the_users_settings():
    import matplotlib

    plain = pixels(curves([Curve([0, 1], [0, 1])]))
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "font.size": 30}):
        assert (pixels(curves([Curve([0, 1], [0, 1])])) == plain).all()
        assert matplotlib.rcParams["lines.linewidth"] == 9
