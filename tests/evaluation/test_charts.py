"""Charts: axes, ticks, bins, thinning and the SVG that is made of them."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf_lightning.evaluation.blocks import (
    Bar,
    BarGroup,
    Bars,
    Change,
    Changes,
    Distribution,
    Histogram,
    Lines,
    Point,
    Reference,
    Series,
)
from rlhf_lightning.evaluation.estimates import Estimate
from rlhf_lightning.report import charts

numbers = st.floats(-1e9, 1e9).filter(lambda value: value == 0 or abs(value) > 1e-6)


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return [node.text for node in parsed(svg).iter("text")]


def paths(svg: str, look: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, corner.split())) for corner in re.split("[MLZ]", node.get("d")) if corner]
        for node in parsed(svg).iter("path")
        if look in node.get("class").split()
    ]


@pytest.mark.parametrize(
    ("values", "low", "high", "ticks"),
    [
        ([0, 1], 0, 1, [0, 0.25, 0.5, 0.75, 1]),
        ([-1.3, 2.4], -2, 3, [-2, -1, 0, 1, 2, 3]),
        ([97, 99], 97, 99, [97, 97.5, 98, 98.5, 99]),
        ([], 0, 1, [0, 0.25, 0.5, 0.75, 1]),
        ([0], -1, 1, [-1, -0.5, 0, 0.5, 1]),
        ([4], 2, 6, [2, 3, 4, 5, 6]),
    ],
)
def test_an_axis_ends_in_round_ticks(values, low, high, ticks):
    axis = charts.axis(values)
    assert (axis.low, axis.high, axis.ticks) == (low, high, ticks)


@given(st.lists(numbers, min_size=1, max_size=20), st.integers(2, 9))
def test_an_axis_shows_every_value_between_few_ticks_that_do_not_repeat(values, count):
    axis = charts.axis(values, count=count)
    assert axis.low <= min(values) + 1e-9 * (axis.high - axis.low)
    assert axis.high >= max(values) - 1e-9 * (axis.high - axis.low)
    assert 2 <= len(axis.ticks) <= 2 * count + 2
    labels = charts.tick_labels(axis.ticks)
    assert len(set(labels)) == len(labels)


def test_an_axis_shows_at_least_what_is_asked_and_is_widened_to_the_values():
    assert charts.axis([0.6], least=(0, 1))[:2] == (0, 1)
    assert charts.axis([1.2], least=(0, 1))[:2] == (0, 1.5)


def test_whole_numbers_get_no_ticks_between_them():
    assert charts.axis([0, 3], count=9, round_out=False).ticks == [0, 1, 2, 3]
    assert charts.axis([0, 2.5], count=6, round_out=False).ticks == [0, 0.5, 1, 1.5, 2, 2.5]


@pytest.mark.parametrize(
    ("ticks", "spec", "labels"),
    [
        ([0, 0.5, 1], ".3f", ["0", "0.5", "1.0"]),
        ([-0.25, 0, 0.25], ".3f", ["−0.25", "0", "0.25"]),
        ([0, 0.25, 0.5], ".1%", ["0\u00a0%", "25\u00a0%", "50\u00a0%"]),
        ([0, 5000], "g", ["0", "5000"]),
        ([0, 20_000, 40_000], "g", ["0", "20k", "40k"]),
        ([0, 5e8, 1e9], "g", ["0", "0.5G", "1.0G"]),
        ([0, 1e-7, 2e-7], "g", ["0", "1e−07", "2e−07"]),
        ([1e15, 2e15], "g", ["1e+15", "2e+15"]),
        ([], "g", []),
    ],
)
def test_tick_labels_say_no_more_than_they_must(ticks, spec, labels):
    assert charts.tick_labels(ticks, spec) == labels


@example([[2.0, 1.9]])  # 95 * 0.02 > 1.9
@given(st.lists(st.lists(numbers, max_size=60), min_size=1, max_size=4))
def test_bins_are_equal_and_hold_every_value_once(distributions):
    edges = charts.bin_edges(distributions)
    if not any(distributions):
        assert edges == []
        return
    widths = np.diff(edges)
    assert 1 <= len(widths) <= charts.MOST_BINS + 1
    np.testing.assert_allclose(widths, widths[0], rtol=1e-6)
    for values in distributions:
        counts, shares = charts.bin_shares(values, edges)
        assert sum(counts) == len(values)
        assert sum(shares) == pytest.approx(1 if values else 0)
        slow = [sum(a <= v < b for v in values) for a, b in pairwise(edges)]
        slow[-1] += sum(v == edges[-1] for v in values)
        assert counts == slow


def test_bins_do_not_widen_because_distributions_lie_apart():
    draw = np.random.default_rng(0)
    narrow = charts.bin_edges([draw.normal(0, 1, 200), draw.normal(0, 2, 200)])
    assert narrow[1] - narrow[0] <= 0.5
    left, right = draw.normal(0, 1, 100), draw.normal(9, 1, 100)
    alone, both = charts.bin_edges([left]), charts.bin_edges([left, right])
    assert both[1] - both[0] <= 1.5 * (alone[1] - alone[0])


def test_values_that_are_not_finite_are_left_out_of_the_bins_and_counted_in_the_legend():
    values = [1.0, 2.0, math.nan, math.inf]
    assert sum(charts.bin_shares(values, charts.bin_edges([values]))[0]) == 2
    assert charts.legend_count(values, "pairs") == "n\u00a0=\u00a02\u00a0pairs, median 1.5, 2 not finite and left out"
    assert charts.legend_count([], "pairs") == "not measured"


def test_thinning_keeps_the_ends_and_the_extremes():
    draw = np.random.default_rng(0)
    points = [Point(x, float(y)) for x, y in enumerate(draw.normal(size=20_000))]
    kept = charts.thinned(points)
    heights = [point.y for point in points]
    assert len(kept) <= charts.MOST_POINTS
    assert kept[0] is points[0]
    assert kept[-1] is points[-1]
    assert {min(heights), max(heights)} <= {point.y for point in kept}
    assert [point.x for point in kept] == sorted(point.x for point in kept)


def test_a_gap_divides_the_line():
    points = [Point(0, 1), Point(1, 2), Point(2, None), Point(3, math.nan), Point(4, 3), Point(5, 4)]
    assert [[point.x for point in part] for part in charts.stretches(points)] == [[0, 1], [4, 5]]
    svg = charts.lines(Lines([Series("a", points)], "x", "y", "caption"), charts.WIDE)
    assert [len(path) for path in paths(svg, "line")] == [2, 2]


@pytest.mark.parametrize("width", [charts.NARROW, charts.WIDE])
def test_a_line_goes_through_its_points_in_proportion(width):
    block = Lines(
        [Series("a", [Point(0, 0.0), Point(1, 0.25), Point(4, 1.0)])],
        "x",
        "y",
        "caption",
        domain=(0, 4),
        range=(0, 1),
    )
    ((x0, y0), (x1, y1), (x2, y2)) = paths(charts.lines(block, width), "line")[0]
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.25, abs=1e-3)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(0.25, abs=1e-3)
    assert 0 < x0 < x2 < width


def test_a_histogram_is_as_high_as_its_shares():
    block = Histogram([Distribution("a", [0.1] * 3 + [5.1]), Distribution("b", [5.1])], "x", "pairs", "caption")
    svg = charts.histogram(block, charts.WIDE)
    first, second = paths(svg, "outline")
    floor = first[0][1]
    assert (floor - min(y for _, y in first)) / (floor - min(y for _, y in second)) == pytest.approx(0.75, abs=1e-3)


def test_many_points_with_intervals_get_a_band_and_few_get_whiskers():
    def drawn(count):
        points = [Point(x, Estimate(x, x - 1, x + 1, 9, "")) for x in range(count)]
        svg = charts.lines(Lines([Series("a", points)], "x", "y", "caption"), charts.WIDE)
        whiskers = [node for node in parsed(svg).iter("line") if "whisker" in node.get("class")]
        return len(paths(svg, "band")), len(whiskers)

    assert drawn(24) == (0, 24)
    assert drawn(25) == (1, 0)


def test_labels_of_points_touch_neither_each_other_nor_a_marker():
    points = [Point(x / 10, (x * 7 % 5) / 5, f"step {x}") for x in range(20)]
    block = Lines([Series("a", points), Series("b", [Point(p.x, p.y + 0.1, p.label) for p in points])], "x", "y", "c")
    svg = parsed(charts.lines(block, charts.WIDE))
    boxes = [
        charts.Box(x - wide / 2, y - 10, x + wide / 2, y + 2)
        for node in svg.iter("text")
        if "point" in (node.get("class") or "")
        for x, y, wide in [(float(node.get("x")), float(node.get("y")), charts.text_width(node.text, 11))]
    ]
    dots = [(float(node.get("cx")), float(node.get("cy"))) for node in svg.iter("circle")]
    assert len(boxes) > 5
    assert len(dots) == 20
    for index, box in enumerate(boxes):
        assert not any(box.touches(other) for other in boxes[:index])
        assert all(box.distance(*dot) > 2 for dot in dots)


@pytest.mark.parametrize(
    ("value", "start", "wide"), [(2.0, "50%", "25%"), (-4.0, "0%", "50%"), (0.0, "50%", "0%"), (1e-9, "50%", "0%")]
)
def test_a_bar_reaches_from_zero_to_its_value(value, start, wide):
    block = Bars([BarGroup("", [Bar("a", value)])], "pairs", "caption", domain=(-4, 4))
    bar = next(node for node in parsed(charts.bar_strip(Bar("a", value), block, charts.bars_axis(block))).iter("rect"))
    assert (bar.get("x"), bar.get("width")) == (start, wide)


def test_a_bar_has_a_whisker_from_end_to_end_and_a_line_per_reference():
    bar = Bar("a", Estimate(0.5, 0.25, 0.75, 10, "wilson"))
    block = Bars(
        [BarGroup("", [bar])], "pairs", "c", references=[Reference(0.6, "a"), Reference(0.1, "b")], domain=(0, 1)
    )
    svg = parsed(charts.bar_strip(bar, block, charts.bars_axis(block)))
    lines = {
        look: [node for node in svg.iter("line") if node.get("class") == look] for look in ("whisker", "reference")
    }
    assert [(node.get("x1"), node.get("x2")) for node in lines["whisker"]] == [("25%", "75%")]
    assert [node.get("x1") for node in lines["reference"]] == ["60%", "10%"]
    assert len({node.get("stroke-dasharray") for node in lines["reference"]}) == 2


def test_a_label_is_clearly_nearest_to_its_own_point():
    crowd = [Point(x / 10, 1.0, f"label {x}") for x in range(9)]
    svg = parsed(charts.lines(Lines([Series("a", crowd)], "x", "y", "caption"), charts.NARROW))
    dots = {dot.find("title").text.split(", ")[-1]: (dot.get("cx"), dot.get("cy")) for dot in svg.iter("circle")}
    labels = [node for node in svg.iter("text") if "t0" in (node.get("class") or "")]
    assert labels
    for node in labels:
        x, y, wide = float(node.get("x")), float(node.get("y")), charts.text_width(node.text, 11)
        box = charts.Box(x - wide / 2, y - 10, x + wide / 2, y + 2)
        away = {name: box.distance(*map(float, dot)) for name, dot in dots.items()}
        own = away.pop(node.text)
        assert 1.45 * own <= min(away.values())


def test_bars_without_a_domain_begin_at_zero():
    block = Bars([BarGroup("", [Bar("a", 30.0), Bar("b", 50.0)])], "pairs", "caption")
    assert charts.bars_axis(block)[:2] == (0, 60)


def test_long_numbers_on_an_axis_do_not_run_into_each_other():
    points = [Point(1e6, 0.0), Point(1e6 + 1.5, 1.0)]
    svg = parsed(charts.lines(Lines([Series("a", points)], "x", "y", "caption"), charts.NARROW))
    lowest = max(float(node.get("y")) for node in svg.iter("text"))
    labels = [node for node in svg.iter("text") if float(node.get("y")) == lowest]
    half = [charts.text_width(node.text) / 2 for node in labels]
    middle = [float(node.get("x")) for node in labels]
    assert len(labels) > 1
    assert all(b - a >= v + w for (a, v), (b, w) in pairwise(zip(middle, half, strict=True)))
    numbers = texts(charts.axis_strip(charts.axis([1e6, 1e6 + 1]), "g"))
    assert numbers
    assert sum(map(charts.text_width, numbers)) <= charts.NARROWEST_STRIP


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_was_not_measured_is_not_drawn(value):
    block = Bars([BarGroup("", [Bar("a", value)])], "pairs", "caption")
    assert "rect" not in charts.bar_strip(Bar("a", value), block, charts.bars_axis(block))
    changes = Changes([Change("a", value, 1.0)], "prompts", "caption")
    assert charts.change_strip(changes.rows[0], changes, charts.changes_axis(changes)).count("<circle") == 1
    empty = Lines([Series("a", [Point(0, value)])], "x", "y", "caption")
    assert texts(charts.lines(empty, charts.WIDE)) == ["not measured"]
    nothing = Histogram([Distribution("a", [] if value is None else [value])], "x", "pairs", "caption")
    assert texts(charts.histogram(nothing, charts.WIDE)) == ["not measured"]


@pytest.mark.parametrize("width", [charts.NARROW, charts.WIDE])
@given(
    data=st.lists(
        st.lists(st.tuples(st.floats(), st.none() | st.floats(), st.text(max_size=9)), max_size=12), max_size=4
    )
)
@settings(max_examples=60)
def test_any_numbers_make_a_drawing_within_its_box(width, data):
    series = [Series(str(i), [Point(*point) for point in points]) for i, points in enumerate(data)]
    values = [[y for _, y, _ in points if y is not None] for points in data]
    for svg in (
        charts.lines(Lines(series, "x", "y", "caption", diagonal="d"), width),
        charts.histogram(Histogram([Distribution("a", row) for row in values], "x", "n", "caption"), width),
    ):
        root = parsed(svg)
        high = float(root.get("height"))
        for node in root.iter():
            for names, most in ((("x", "x1", "x2", "cx"), width), (("y", "y1", "y2", "cy"), high)):
                assert all(-1 <= float(node.get(name, 0)) <= most + 1 for name in names)
            for x, y in (tuple(map(float, c.split())) for c in re.split("[MLZ]", node.get("d", "")) if c):
                assert -1 <= x <= width + 1
                assert -1 <= y <= high + 1


def test_a_plot_has_a_title_a_description_and_the_role_of_a_picture():
    block = Lines([Series("first", [Point(0, 1.0), Point(2, 3.0)])], "step", "reward", "<the caption>")
    svg = parsed(charts.lines(block, charts.WIDE))
    assert svg.get("role") == "img"
    assert svg[0].tag == "title"
    assert svg[0].text == "<the caption>"
    assert svg[1].tag == "desc"
    assert svg[1].text == "reward against step. first: 2 points, from 1.000 at 0 to 3.000 at 2."


def test_series_differ_in_more_than_colour():
    assert len(set(charts.DASHES)) == 4
    shapes = {re.sub(r'class="[^"]*"', "", charts.marker(index, 9, 9)) for index in range(4)}
    assert len(shapes) == 4
