"""The preference test sets that were there before RewardBench, of which four make up its fifth section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkRow,
    Result,
    ScoredResult,
    checked_rows,
    count_ties,
    is_right,
    pair_row,
    rates,
    read_columns,
    score_rows,
)
from rlhf_lightning.evaluation.blocks import COIN, Bar, BarGroup, Bars, Block
from rlhf_lightning.evaluation.estimates import Estimate, Quantity
from rlhf_lightning.evaluation.ranks import ALONE, Ranks
from rlhf_lightning.rewards.scorers import Scorer

if TYPE_CHECKING:
    from rlhf_lightning.evaluation.settings import EvaluationSettings

PREFERENCE_TEST_SETS = "allenai/pref-test-sets"
"""Hub name of the data; a local copy serves as well."""
PRIOR_SETS: dict[str, int] = {
    "anthropic_harmless": 2266,
    "anthropic_helpful": 6192,
    "anthropic_hhh": 221,
    "summarize": 9000,
    "shp": 1741,
    "mtbench_human": 3355,
    "mtbench_gpt4": 2400,
}
"""The sets of `allenai/pref-test-sets` and their pairs."""
SCORED_PRIOR_SETS = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")
"""Those that make up the fifth section, of half the weight."""


@dataclass(frozen=True, kw_only=True)
class PriorSetsResult(ScoredResult):
    """The prior sets of one scorer."""

    title = "further benchmarks"
    official_kind = "results/pref-sets"
    whole = True

    sets: dict[str, Estimate]
    score: float | None
    """Plain mean of those of anthropic_helpful, anthropic_hhh, shp and summarize that are there."""
    absent_sets: list[str]
    n_ties: int

    def subset_scores(self) -> Mapping[str, Estimate]:
        return self.sets

    def metrics(self) -> dict[str, Quantity]:
        return {"prior_sets/score": self.score, **{f"prior_sets/{name}": value for name, value in self.sets.items()}}

    def blocks(self) -> Iterator[Block]:
        bars = [Bar(name, value) for name, value in self.sets.items()]
        yield Bars([BarGroup("", bars)], "pairs", "Prior sets", [COIN])


class PriorSets(Benchmark):
    """Those of `prior_sets`."""

    name = "prior_sets"
    title = "prior sets"

    def source(self, settings: EvaluationSettings) -> dict[str, str | None] | None:
        return settings.prior_sets

    def load(self, settings: EvaluationSettings) -> list[BenchmarkRow]:
        sets = settings.prior_sets or {}
        return [row for name, source in sets.items() for row in load_prior_set(name, source)]

    def run(self, by, rows, settings, *, file=None, ranks=ALONE) -> Result:
        return run_prior_sets(by, rows, file=file, ranks=ranks)


def load_prior_set(name: str, source: str | Path | None = None) -> list[BenchmarkRow]:
    """One of `PRIOR_SETS`, of the hub's data set, or of a file with the columns prompt, chosen and rejected.

    Raises `DataError` as `load_rewardbench` does.
    """
    source = f"{PREFERENCE_TEST_SETS}:{name}" if source is None else source
    columns = ("prompt", "chosen", "rejected")
    return checked_rows(source, [pair_row(row, name) for row in read_columns(source, columns)], PRIOR_SETS)


def run_prior_sets(
    scorer: Scorer, rows: Sequence[BenchmarkRow], *, file: str | Path | None = None, ranks: Ranks = ALONE
) -> PriorSetsResult:
    """The prior sets, of `load_prior_set`, one after the other. Raises what `score_rows` raises."""
    scored = score_rows(scorer, rows, file, ranks=ranks)
    sets = rates((row.subset, is_right(row.scores)) for row in scored)
    present = [sets[name].value for name in SCORED_PRIOR_SETS if name in sets]
    return PriorSetsResult(
        **ScoredResult.about(scorer, rows, scored),
        sets=sets,
        score=sum(present) / len(present) if present else None,
        absent_sets=[name for name in PRIOR_SETS if name not in sets],
        n_ties=count_ties(scored),
    )
