"""The numbers behind the plots, as tables: shown in Markdown in their place, and on the page below them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rlhf_lightning.evaluation.blocks import Column, Histogram, Lines, Table
from rlhf_lightning.report.charts import bin_edges, bin_shares, tick_labels
from rlhf_lightning.report.wording import NO_N

MOST_ROWS = 60
"""Rows of a table of numbers; of a longer series, evenly spread points are listed, the first and last among them."""


def histogram_table(block: Histogram) -> Table:
    """One row a bin, one column a distribution: how many of its values lie there."""
    edges = bin_edges([series.values for series in block.series])
    columns = [block.x_label, *(f"{series.name} ({block.units})" for series in block.series)]
    if not edges:
        return Table(columns, [], "")
    labels = tick_labels(edges)
    counts = [bin_shares(series.values, edges)[0] for series in block.series]
    rows = [
        [f"{start} to {end}", *(row[index] for row in counts)] for index, (start, end) in enumerate(pairwise(labels))
    ]
    return Table(columns, rows, "Each bin holds its lower end, the last one both ends.")


def lines_table(block: Lines) -> Table:
    """One row a point: series, x, y with its interval, n, label."""
    labelled = any(point.label for series in block.series for point in series.points)
    counted = any(hasattr(point.y, "n") for series in block.series for point in series.points)
    rows, thinned = [], []
    for series in block.series:
        indices = spread(len(series.points), MOST_ROWS)
        if len(indices) < len(series.points):
            thinned.append(f"{series.name}: {len(indices)} of {len(series.points)} points, evenly spread.")
        for index in indices:
            point = series.points[index]
            rows.append(
                [
                    series.name,
                    point.x,
                    point.y,
                    *([getattr(point.y, "n", NO_N)] if counted else []),
                    *([point.label] if labelled else []),
                ]
            )
    columns = ["series", Column(block.x_label, block.x_spec), Column(block.y_label, block.spec)]
    return Table([*columns, *(["n"] if counted else []), *(["label"] if labelled else [])], rows, " ".join(thinned))


def spread(total: int, most: int) -> Sequence[int]:
    """At most `most` indices of `total`, evenly spread, with the first and the last."""
    if total <= most:
        return range(total)
    return sorted({round(index * (total - 1) / (most - 1)) for index in range(most)})
