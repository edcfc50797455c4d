"""Rows -> validated responses that are judged one at a time: a prompt, a response, and a label. P rows."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rlhf_lightning.data.columns import LABEL, SFT_COLUMNS, SourceColumns
from rlhf_lightning.data.conversations import BadRow
from rlhf_lightning.data.examples import LabelledExample, LoadReport, OnBadRows, Refusal
from rlhf_lightning.data.labels import as_number
from rlhf_lightning.data.preferences import load_examples, preference_of, validated_rows
from rlhf_lightning.data.sft import has_pair, is_sft_row, single_response
from rlhf_lightning.data.sources import OneSource, Row, Source, Split
from rlhf_lightning.errors import DataError

GOOD, BAD = math.inf, -math.inf
"""Labels that say it under any threshold."""
_WORDS = dict.fromkeys(("true", "good", "desirable"), GOOD) | dict.fromkeys(("false", "bad", "undesirable"), BAD)


def load_unpaired(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    on_bad_rows: OnBadRows = "error",
    split: Split = "train",
) -> tuple[list[LabelledExample], LoadReport]:
    """Read judged responses from a file, a directory or a hub data set (see `read_rows`), or from a list of them.

    Shapes of a row:
    - those of `load_sft` with one response (of a conversation its last assistant turn is the one that is judged), and a
      `label`: true or false, 1 or 0, 1 or -1, good or bad; or a rating, which a threshold divides later;
    - preference pairs of every shape of `load_preferences`: two rows, the chosen response good, the rejected one bad.

    `columns` maps our names (those of `load_sft`, and `label`) to the file's. Everything else is as in `load_sft`; the
    report counts a pair as two rows.
    """
    return load_examples(iterate_unpaired, source, columns=columns, on_bad_rows=on_bad_rows, split=split)


def iterate_unpaired(
    source: OneSource, report: LoadReport, *, columns: Mapping[str, str] | None = None, split: Split = "train"
) -> Iterator[LabelledExample | Refusal]:
    """Each row of one source as an example, two of a pair, or a refusal, in order, counted in `report`.

    Raises `DataError` when the source cannot be read, or, after its last row, when it lacks a mapped column.
    """
    known = SourceColumns(columns, fallback="messages", others=(*SFT_COLUMNS, LABEL))
    for made in validated_rows(source, report, _examples, columns=known, split=split):
        if isinstance(made, Refusal):
            yield made
        else:
            report.rows_read += len(made) - 1
            yield from made
    known.check(source, needed=())


def is_labelled_row(values: Mapping[str, Any]) -> bool:
    """Whether a row holds one response and a label, and no pair."""
    return values.get(LABEL) is not None and is_sft_row(values)


def _examples(row: Row, columns: SourceColumns) -> list[LabelledExample]:
    if has_pair(row, columns):
        pair = preference_of(row, columns)
        sides = (("chosen", pair.chosen, GOOD), ("rejected", pair.rejected, BAD))
        return [
            LabelledExample(
                pair.prompt, text, False, f"{pair.example_id}:{side}", pair.origin, pair.has_reasoning, label
            )
            for side, text, label in sides
        ]
    label = _label(columns.name(LABEL), columns.take(row, columns.name(LABEL)))
    one = single_response(row, columns)
    return [LabelledExample(one.prompt, one.response, False, one.example_id, one.origin, one.has_reasoning, label)]


def _label(name: str, value: Any) -> float:
    """A label as a number, `GOOD` or `BAD` where it says so itself. Raises `BadRow`."""
    if value is None or value == "":
        raise BadRow(
            "missing_key",
            f"{name} absent or null: is the response good? Map the column with columns: {{label: COLUMN}}",
        )
    word = str(value).strip().lower() if isinstance(value, str | bool) else None
    number = _WORDS[word] if word in _WORDS else as_number(value)
    if number is None:
        raise BadRow("bad_label", f"{name} is {reprlib.repr(value)}, neither true or false, good or bad, nor a number")
    return number


def desirable_of(labels: np.ndarray, threshold: float | None) -> np.ndarray:
    """Which responses of a source are good by their labels, [P] float32: those of `threshold` and above, [P] bool.

    Without one, those of 1. Raises `DataError` where the labels are other numbers than 1 and 0, or 1 and -1.
    """
    if threshold is not None:
        return labels >= threshold
    found = np.unique(labels[np.isfinite(labels)]).tolist()
    if not ({*found} <= {0, 1} or {*found} <= {-1, 1}):
        shown = ", ".join(f"{label:g}" for label in found[:6]) + (", ..." if len(found) > 6 else "")
        raise DataError(
            f"data.rating_threshold: the labels are {shown}, neither 1 and 0 nor 1 and -1; say from which rating on a "
            "response is good"
        )
    return labels > 0


def partners(prompts: np.ndarray) -> np.ndarray:
    """For each row the position of one whose response does not belong to its prompt, [P] int64; -1 where there is none.

    `prompts` [P] are hashes. In their order, responses are rotated by the rows of the prompt that has the most: then
    none meets its own prompt, unless that prompt has more than half of the rows, of which some are left over.
    """
    order = np.argsort(prompts, kind="stable")
    most = np.unique(prompts, return_counts=True)[1].max(initial=0)
    rotated = np.roll(order, -most)
    found: np.ndarray = np.empty(len(prompts), dtype=np.int64)
    found[order] = np.where(prompts[order] == prompts[rotated], -1, rotated)
    return found
