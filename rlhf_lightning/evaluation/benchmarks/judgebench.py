"""JudgeBench: pairs of which one response is right and the other wrong, by their answers' correctness.

A scorer is asked once, a judge in both orders. Source of names and rules: github.com/ScalerLab/JudgeBench; Tan et al.
2024 (arXiv 2410.12784).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_lightning.errors import DataError
from rlhf_lightning.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkRow,
    Result,
    ScoredResult,
    checked_rows,
    count_ties,
    is_right,
    messages_of,
    rates,
    read_columns,
    score_rows,
    text_of,
)
from rlhf_lightning.evaluation.benchmarks.judged import JudgedPairs, judge_pairs
from rlhf_lightning.evaluation.blocks import Block, Column, Table
from rlhf_lightning.evaluation.estimates import Estimate, Quantity, wilson
from rlhf_lightning.evaluation.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from rlhf_lightning.evaluation.settings import EvaluationSettings

CATEGORIES: dict[str, str] = {
    "knowledge": "mmlu-pro",
    "reasoning": "livebench-reasoning",
    "math": "livebench-math",
    "coding": "livecodebench",
}
"""The four categories, and how the column `source` begins in each."""


def _table(categories: Mapping[str, Estimate], total: Estimate, name: str) -> Table:
    rows = [*categories.items(), ("all pairs", total)]
    return Table(["category", Column(name)], rows, "JudgeBench: right responses above wrong ones")


def _metrics(categories: Mapping[str, Estimate], total: Estimate) -> dict[str, Quantity]:
    return {"judgebench/score": total, **{f"judgebench/{name}": of for name, of in categories.items()}}


@dataclass(frozen=True, kw_only=True)
class JudgeBenchResult(ScoredResult):
    """JudgeBench of one scorer."""

    title = "further benchmarks"

    categories: dict[str, Estimate]
    total: Estimate
    """Over all pairs."""
    n_ties: int
    """Pairs of equal scores; each is wrong."""

    def subset_scores(self) -> Mapping[str, Estimate]:
        return self.categories

    def metrics(self) -> dict[str, Quantity]:
        return _metrics(self.categories, self.total)

    def summary(self) -> str:
        return f"JudgeBench ({self.total.n} pairs) {self.total.value:.3f}"

    def blocks(self) -> Iterator[Block]:
        yield _table(self.categories, self.total, "accuracy")


class JudgeBench(Benchmark):
    """The benchmark, with a scorer."""

    name = "judgebench"
    title = "JudgeBench"

    def load(self, settings: EvaluationSettings) -> list[BenchmarkRow]:
        """Rows of question, response_A, response_B, label (`A>B` or `B>A`), source and perhaps pair_id.

        Raises `DataError`.
        """
        source = self.source(settings)
        columns = ("question", "response_A", "response_B", "label", "source")
        rows = []
        for row in read_columns(source, columns):
            responses = [text_of(row, "response_A"), text_of(row, "response_B")]
            label = text_of(row, "label")
            if label not in ("A>B", "B>A"):
                raise DataError(f"{row.origin}: label is {label!r}; use A>B or B>A")
            origin = text_of(row, "source")
            category = next((name for name, begins in CATEGORIES.items() if origin.startswith(begins)), origin)
            rows.append(
                BenchmarkRow(
                    str(row.values.get("pair_id") or row.example_id),
                    category,
                    messages_of(row, "question"),
                    responses if label == "A>B" else responses[::-1],
                    1,
                    row.origin,
                )
            )
        return checked_rows(source, rows, CATEGORIES)

    def run(self, by, rows, settings, *, file=None, ranks: Ranks = ALONE) -> Result:
        scored = score_rows(by, rows, file, ranks=ranks)
        right = [is_right(row.scores) for row in scored]
        return JudgeBenchResult(
            **ScoredResult.about(by, rows, scored),
            categories=_by_category(rows, right),
            total=wilson(sum(right), len(right)),
            n_ties=count_ties(scored),
        )


@dataclass(frozen=True, kw_only=True)
class JudgedJudgeBenchResult(JudgedPairs):
    """JudgeBench with a judge: a pair is right with more right than wrong verdicts of two; one of each is wrong."""

    title = "JudgeBench"

    categories: dict[str, Estimate]
    total: Estimate
    """Over all pairs."""

    def metrics(self) -> dict[str, Quantity]:
        return _metrics(self.categories, self.total) | super().metrics()

    def summary(self) -> str:
        return f"JudgeBench {self.total.value:.3f}, {self.n_unparsed} replies without a verdict"

    def text(self, name: str) -> str:
        return (
            f"{name}, asked about each of {self.n_pairs} pairs of JudgeBench in both orders. A pair counts as right "
            "with more right than wrong verdicts; a reply without a verdict is neither."
        )

    def blocks(self) -> Iterator[Block]:
        yield _table(self.categories, self.total, "score")
        yield from super().blocks()


class JudgedJudgeBench(JudgeBench):
    """JudgeBench with a judge."""

    taken_by = "judge"

    def run(self, by, rows, settings, *, file=None, ranks: Ranks = ALONE) -> Result:
        about = judge_pairs(by, rows, file, ranks)
        right = [verdict.score > 0.5 for verdict in about["rows"]]
        return JudgedJudgeBenchResult(
            **about, categories=_by_category(rows, right), total=wilson(sum(right), len(right))
        )


def _by_category(rows: Sequence[BenchmarkRow], right: Sequence[bool]) -> dict[str, Estimate]:
    found = rates((row.subset, each) for row, each in zip(rows, right, strict=True))
    return {name: found[name] for name in CATEGORIES if name in found}
