"""What can be said of tokenized pairs without looking at a model: copies, contradictions, length bias, padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_lightning.batches import Layout
from rlhf_lightning.data.batching import TrainingPlan
from rlhf_lightning.data.examples import LoadReport
from rlhf_lightning.data.selection import TokenizedPairs, TokenizedResponses, TokenizedRows

_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9))  # odd


def duplicates(rows: TokenizedRows) -> np.ndarray:
    """Positions of rows that repeat prompt, every response and label of an earlier one, outer blanks aside."""
    keys = _pair_keys(rows) if isinstance(rows, TokenizedPairs) else _pair_keys(rows, ("response", "response"))
    if isinstance(rows, TokenizedResponses):
        keys = keys ^ rows.numbers("label").view(np.uint32)
    first = np.unique(keys, return_index=True)[1]
    return np.setdiff1d(np.arange(len(keys)), first)


def contradictions(pairs: TokenizedPairs) -> np.ndarray:
    """Positions of pairs that also occur with the opposite preference; both of each contradiction."""
    return np.flatnonzero(np.isin(_pair_keys(pairs), _pair_keys(pairs, ("rejected", "chosen"))))


def both_labels(rows: TokenizedRows, desirable: np.ndarray) -> np.ndarray:
    """Positions of judged responses that are good in one row and bad in another; `desirable` is [P] bool."""
    keys = _pair_keys(rows, ("response", "response"))
    return np.flatnonzero(np.isin(keys, np.intersect1d(keys[desirable], keys[~desirable])))


def longer_chosen(pairs: TokenizedPairs) -> float:
    """Share of pairs whose chosen response has more characters, ties one half: what "the longer one wins" gets."""
    chosen, rejected = pairs.numbers("chosen_characters"), pairs.numbers("rejected_characters")
    return float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))


def shared_prompts(train: TokenizedRows, val: TokenizedRows) -> np.ndarray:
    """Positions of validation rows whose prompt is also trained on."""
    return np.flatnonzero(np.isin(val.numbers("prompt_hash"), train.numbers("prompt_hash")))


def leak_in_words(shared: int, val: TokenizedRows) -> str:
    """What to say of the number of validation rows whose prompt is also trained on."""
    if not shared:
        return "no prompt of val is trained on"
    return f"{shared} of {len(val)} {val.kind} of val have a prompt that is also trained on, so they are not held out"


def counts_in_words(
    role: str,
    rows: TokenizedRows,
    report: LoadReport,
    *,
    weights: Sequence[float] | None = None,
    drawn: str | None = None,
) -> str:
    """One line on what a role takes of its sources, and, by their `weights` where not all are 1, of its epoch.

    `drawn` says by which settings the rows were drawn at random, where they are a part.
    """
    epoch = cut = ""
    if weights is not None and set(weights) != {1}:
        sizes = np.bincount(rows.source, minlength=len(weights))
        count = sum(round(n * weight) for n, weight in zip(sizes, weights, strict=True))
        epoch = f", {count} an epoch by their weights"
    if report.rows_cut:
        cut = f"; {len(report.rows_cut)} prompts cut to fit {rows.limit_key} {rows.max_length}"
    epoch += f", drawn at random ({drawn})" if drawn else ""
    return f"{role}: {len(rows)} {rows.kind}{epoch} ({report.summary()}{cut})"


@dataclass(frozen=True, slots=True)
class LayoutCost:
    """How much a way of computing batches computes."""

    name: str
    layout: Layout
    tokens_per_pair: float
    """Of a conversation, per conversation."""
    padding: float
    """Share of the tokens that are padding."""


def layout_costs(rows: TokenizedRows, batch_size: int, accumulate: int) -> list[LayoutCost]:
    """Tokens that a training epoch computes, in the ways of computing its batches, most of them first."""
    prompt, *sides = rows.segment_lengths.sum(axis=0) / len(rows)
    needed, costs = len(sides) * prompt + sum(sides), []
    for name, grouped in (("padded, random order", False), ("padded, grouped by length in each step", True)):
        plan = TrainingPlan(rows.lengths, batch_size=batch_size, accumulate=accumulate, group_by_length=grouped)
        share = _padding_share(rows, (batch.indices for batch in plan.epoch(0)))
        costs.append(LayoutCost(name, "padded", needed / (1 - share), share))
    costs.append(LayoutCost("packed", "packed", needed, 0.0))
    if len(sides) > 1:
        costs.append(LayoutCost("packed, the prompt once for both", "shared", needed - prompt, 0.0))
    return costs


def layout_in_words(layout: Layout, rows: TokenizedRows, batch_size: int, accumulate: int) -> str:
    """A layout, and how many fewer tokens it computes of training rows than padded rows are."""
    if layout == "padded":
        return layout
    costs = {cost.layout: cost.tokens_per_pair for cost in layout_costs(rows, batch_size, accumulate)}
    fewer = costs["padded"] / costs.get(layout, costs["packed"])
    beginnings = ", what rows begin with in common once" if layout == "shared" else ""
    return f"{layout}: no padding{beginnings}, {fewer:.1f}x fewer tokens than padded"


def _padding_share(pairs: TokenizedRows, batches: Iterable[np.ndarray]) -> float:
    """Share of padding among the tokens of batches (arrays of positions) of right-padded rows, one for a response."""
    rows = pairs.segment_lengths[:, :1] + pairs.segment_lengths[:, 1:]
    real = padded = 0
    for batch in batches:
        lengths = rows[batch]
        real, padded = real + int(lengths.sum()), padded + lengths.size * int(lengths.max())
    return 1 - real / padded if padded else 0.0


def _pair_keys(pairs: TokenizedRows, sides: tuple[str, str] = ("chosen", "rejected")) -> np.ndarray:
    """[P] uint64, equal for pairs of the same prompt and the same texts."""
    columns = (pairs.numbers(f"{name}_hash") for name in ("prompt_text", *sides))
    with np.errstate(over="ignore"):
        first, second, third = (column * mix for column, mix in zip(columns, _MIX, strict=True))
    return first ^ (second + (second >> np.uint64(29))) ^ (third + (third >> np.uint64(31)))
