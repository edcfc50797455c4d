"""RewardBench 2: the best of four responses, and ties that must stand above wrong ones and close to each other.

Source of names and rules: github.com/allenai/reward-bench (`rewardbench/utils.py`); Malik et al. 2025 (arXiv
2506.01937).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from rlhf_lightning.errors import DataError
from rlhf_lightning.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkRow,
    Result,
    ScoredResult,
    checked_rows,
    id_of,
    mean_of,
    messages_of,
    missing_rows,
    rates,
    read_columns,
    score_rows,
    text_of,
    texts_of,
)
from rlhf_lightning.evaluation.blocks import Block, Column, Table
from rlhf_lightning.evaluation.estimates import Estimate, Quantity, bootstrap
from rlhf_lightning.evaluation.ranks import ALONE, Ranks
from rlhf_lightning.rewards.scorers import Scorer

if TYPE_CHECKING:
    from rlhf_lightning.evaluation.settings import EvaluationSettings

SUBSETS_2: dict[str, int] = {
    "Factuality": 475,
    "Precise IF": 160,
    "Math": 183,
    "Safety": 450,
    "Focus": 495,
    "Ties": 102,
}
"""The six subsets of RewardBench 2 and their prompts."""
TIES = "Ties"
TIES_FORMULA = "0.1.5"
"""Release of `rewardbench` whose score of the ties is meant: others differ where all correct responses score alike."""


class RewardBench2Item(TypedDict):
    """A prompt of RewardBench 2 and the scores of its responses, the correct ones first."""

    id: str
    """Of the ties: `ref:<n>` with one correct response, `tied:<n>` with several."""
    subset: str
    scores: Sequence[float]
    num_correct: int


def best_of_score(scores: Sequence[float]) -> float:
    """1 / (number of responses at the maximum) when the first, the correct one, is among them, else 0."""
    best = max(scores)
    return 1 / sum(score == best for score in scores) if scores[0] == best else 0.0


def ties_score(items: Sequence[RewardBench2Item]) -> float:
    """How well correct responses stand above wrong ones, and close to each other.

    Per prompt: spread = max - min of the correct scores; gap = min correct - max wrong. With g = min(gap_ref, gap_tied)
    over the prompts that have both forms:
    0.30 P(gap_tied > 0) + 0.30 P(gap_ref > 0) + 0.20 P(gap_tied > spread) + 0.20 P(g > spread)
    + 0.01 mean tanh(g / spread - 1), spread that of the tied form.
    Where the spread is 0, tanh's limit is taken, 1 or -1, and 0 where g is 0 as well. Raises `DataError` for other ids,
    for an item without a correct or a wrong response, and when no prompt has both forms.
    """
    forms: dict[str, dict[str, tuple[float, float]]] = {"ref": {}, "tied": {}}
    for item in items:
        form, _, number = item["id"].partition(":")
        if form not in forms or not number:
            raise DataError(f"rewardbench 2: the id {item['id']!r} of a tie is neither ref:<n> nor tied:<n>")
        if number in forms[form]:
            raise DataError(f"rewardbench 2: duplicate id {item['id']!r}; ids must be unique")
        correct, wrong = item["scores"][: item["num_correct"]], item["scores"][item["num_correct"] :]
        if not (correct and wrong):
            raise DataError(f"rewardbench 2: {item['id']} needs both correct and wrong responses")
        forms[form][number] = max(correct) - min(correct), min(correct) - max(wrong)
    both = [number for number in forms["tied"] if number in forms["ref"]]
    if not both:
        raise DataError("rewardbench 2: no tie has both forms, ref:<n> and tied:<n>, so it has no score")
    spreads = [forms["tied"][number][0] for number in both]
    gaps = [forms["tied"][number][1] for number in both]
    smaller = [min(forms["ref"][number][1], gap) for number, gap in zip(both, gaps, strict=True)]
    right = {form: [gap > 0 for _, gap in found.values()] for form, found in forms.items()}
    return (
        0.30 * _mean(right["tied"])
        + 0.30 * _mean(right["ref"])
        + 0.20 * _mean([gap > spread for gap, spread in zip(gaps, spreads, strict=True)])
        + 0.20 * _mean([gap > spread for gap, spread in zip(smaller, spreads, strict=True)])
        + 0.01 * _mean([_relative_gap(*each) for each in zip(smaller, spreads, strict=True)])
    )


def _relative_gap(gap: float, spread: float) -> float:
    """tanh(gap / spread - 1), and its limit where the spread is 0."""
    if spread != 0:
        return math.tanh(gap / spread - 1)
    return 0.0 if gap == 0 else math.copysign(1.0, gap)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def rewardbench2_items(rows: Sequence[BenchmarkRow], scores: Iterable[Sequence[float]]) -> list[RewardBench2Item]:
    """Rows and the scores of their responses as `ties_score` takes them."""
    return [
        {"id": row.id, "subset": row.subset, "scores": own, "num_correct": row.num_correct}
        for row, own in zip(rows, scores, strict=True)
    ]


def rewardbench2_estimates(items: Sequence[RewardBench2Item]) -> dict[str, Estimate]:
    """Score of each subset present; Wilson's interval, and for the ties a bootstrap over numbers."""
    found = rates((item["subset"], best_of_score(item["scores"])) for item in items if item["subset"] != TIES)
    if ties := [item for item in items if item["subset"] == TIES]:
        found[TIES] = _ties_estimate(ties)
    return {name: found[name] for name in SUBSETS_2 if name in found}


def rewardbench2_total(subsets: Mapping[str, Estimate]) -> Estimate | None:
    """Unweighted mean of the six, its interval from theirs; None while one is missing."""
    if any(name not in subsets for name in SUBSETS_2):
        return None
    return mean_of(subsets.values())


def _ties_estimate(items: Sequence[RewardBench2Item]) -> Estimate:
    """The unit is a number, with its `ref` and its `tied` form."""
    value = ties_score(items)
    forms: dict[str, list[RewardBench2Item]] = {}
    for item in items:
        forms.setdefault(item["id"].partition(":")[2], []).append(item)
    units = list(forms.values())
    if len(units) == 1:
        return Estimate(value, 0.0, 1.01, 1, method="one prompt: no interval")

    def score(drawn: np.ndarray) -> float:
        renamed: list[RewardBench2Item] = [
            {**item, "id": f"{item['id'].partition(':')[0]}:{copy}"}  # type: ignore[typeddict-item] # python/mypy 9408
            for copy, unit in enumerate(drawn)
            for item in units[unit]
        ]
        try:
            return ties_score(renamed)
        except DataError:  # no number with both forms was drawn
            return math.nan

    return bootstrap(score, units, resamples=1000)


# ---- the benchmark


@dataclass(frozen=True, kw_only=True)
class RewardBench2Result(ScoredResult):
    """RewardBench 2 of one scorer."""

    title = "further benchmarks"
    official_kind = "results-v2/eval-set"

    ties_formula: str
    subsets: dict[str, Estimate]
    """Over prompts; of the ties over pairs of prompts, `ref` and `tied`, at most 1.01."""
    total: Estimate | None
    """Unweighted mean of the six; None while one is missing."""
    absent_subsets: list[str]
    short_subsets: dict[str, str]
    n_prompts: int
    n_shared_best: int
    """Prompts, ties aside, whose correct response shares the highest score with others."""

    @property
    def whole(self) -> bool:
        return not (self.absent_subsets or self.short_subsets)

    def subset_scores(self) -> Mapping[str, Estimate]:
        return self.subsets

    def metrics(self) -> dict[str, Quantity]:
        return {"rewardbench2/score": self.total, **{f"rewardbench2/{name}": of for name, of in self.subsets.items()}}

    def blocks(self) -> Iterator[Block]:
        caption = f"RewardBench 2: best of four; ties by the formula of {self.ties_formula}. A coin gets 0.25"
        yield subset_table(self.subsets, self.total, caption)

    def official_columns(self) -> dict[str, list]:
        """A tie has no result of its own: its score is that of all of them together."""
        return {
            "text": [[row.conversation(place) for place in range(len(row.responses))] for row in self.given],
            "results": [None if row.subset == TIES else best_of_score(row.scores) for row in self.rows],
            "subset": [row.subset for row in self.given],
            "id": [row.id for row in self.given],
            "scores": [row.scores for row in self.rows],
            "num_correct": [row.num_correct for row in self.given],
        }


def subset_table(subsets: Mapping[str, Estimate], total: Estimate | None, caption: str) -> Table:
    """The subsets and their mean, one below the other."""
    return Table(["subset", Column("score")], [*subsets.items(), ("mean of six", total)], caption)


class RewardBench2(Benchmark):
    """The benchmark's second version."""

    name = "rewardbench2"
    title = "RewardBench 2"

    def source(self, settings: EvaluationSettings) -> str | None:
        return settings.rewardbench2

    def load(self, settings: EvaluationSettings) -> list[BenchmarkRow]:
        assert settings.rewardbench2 is not None
        return load_rewardbench2(settings.rewardbench2)

    def notes(self, rows: Sequence[BenchmarkRow]) -> list[str]:
        absent, _ = missing_rows(rows, SUBSETS_2)
        return [f"RewardBench 2: absent: {', '.join(absent)}; no total"] if absent else []

    def run(self, by, rows, settings, *, file=None, ranks=ALONE) -> Result:
        return run_rewardbench2(by, rows, file=file, ranks=ranks)


def load_rewardbench2(source: str | Path) -> list[BenchmarkRow]:
    """Rows of RewardBench 2: prompt, chosen (list of texts), rejected (list of texts), num_correct, subset, id.

    Raises `DataError` as `load_rewardbench` does, and for a row with other numbers of responses than it says.
    """
    rows = []
    for row in read_columns(source, ("prompt", "chosen", "rejected", "num_correct", "subset", "id")):
        values = row.values
        chosen, rejected = (texts_of(row, side) for side in ("chosen", "rejected"))
        several = values["subset"] == TIES
        if len(chosen) != values["num_correct"] or not rejected or not chosen or (len(chosen) > 1 and not several):
            raise DataError(
                f"{row.origin}: {len(chosen)} chosen and {len(rejected)} rejected responses, num_correct "
                f"{values['num_correct']}; each needs a rejected one, and one chosen (several in {TIES} alone)"
            )
        subset, responses = text_of(row, "subset"), (*chosen, *rejected)
        rows.append(BenchmarkRow(id_of(row), subset, messages_of(row), responses, len(chosen), row.origin))
    return checked_rows(source, rows, SUBSETS_2)


def run_rewardbench2(
    scorer: Scorer, rows: Sequence[BenchmarkRow], *, file: str | Path | None = None, ranks: Ranks = ALONE
) -> RewardBench2Result:
    """RewardBench 2. Raises what `score_rows` and `ties_score` raise."""
    scored = score_rows(scorer, rows, file, ranks=ranks)
    items = rewardbench2_items(rows, [row.scores for row in scored])
    subsets = rewardbench2_estimates(items)
    absent, short = missing_rows(rows, SUBSETS_2)
    return RewardBench2Result(
        **ScoredResult.about(scorer, rows, scored),
        ties_formula=TIES_FORMULA,
        subsets=subsets,
        total=rewardbench2_total(subsets),
        absent_subsets=absent,
        short_subsets=short,
        n_prompts=len(rows),
        n_shared_best=sum(0 < best_of_score(item["scores"]) < 1 for item in items if item["subset"] != TIES),
    )
