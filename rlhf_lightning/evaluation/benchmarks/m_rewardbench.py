"""M-RewardBench: RewardBench in 23 languages, each scored by RewardBench's own sections and weights.

Source of names and rules: the data set `CohereLabsCommunity/multilingual-reward-bench`; Gureja et al. 2024 (arXiv
2410.15522).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.errors import DataError
from rlhf_lightning.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkRow,
    Result,
    ScoredResult,
    checked_rows,
    is_right,
    mean_of,
    pair_row,
    rates,
    read_columns,
    score_rows,
    text_of,
)
from rlhf_lightning.evaluation.benchmarks.rewardbench import SECTIONS, SUBSETS, SectionTable
from rlhf_lightning.evaluation.blocks import Block, Column, Table
from rlhf_lightning.evaluation.estimates import Estimate, Quantity
from rlhf_lightning.evaluation.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from rlhf_lightning.evaluation.settings import EvaluationSettings


@dataclass(frozen=True, kw_only=True)
class MRewardBenchResult(ScoredResult):
    """M-RewardBench of one scorer."""

    title = "further benchmarks"

    languages: dict[str, SectionTable]
    total: Estimate | None
    """Unweighted mean over the languages of their mean of four sections; None while a language lacks a section."""

    def subset_scores(self) -> Mapping[str, Estimate]:
        return {name: table.total for name, table in self.languages.items() if table.total is not None}

    def metrics(self) -> dict[str, Quantity]:
        return {f"m_rewardbench/{name}": of for name, of in {"score": self.total, **self.subset_scores()}.items()}

    def summary(self) -> str:
        total = "not measured" if self.total is None else f"{self.total.value:.3f}"
        return f"M-RewardBench ({len(self.languages)} languages) {total}"

    def blocks(self) -> Iterator[Block]:
        rows = [
            (name, *(table.sections.get(section) for section in SECTIONS), table.total)
            for name, table in self.languages.items()
        ]
        columns: list[Column | str] = ["language", *(Column(section) for section in SECTIONS), Column("mean of four")]
        nothing = [None] * len(SECTIONS)
        yield Table(columns, [*rows, ("mean over languages", *nothing, self.total)], "M-RewardBench")


class MRewardBench(Benchmark):
    """The benchmark, with a scorer."""

    name = "m_rewardbench"
    title = "M-RewardBench"

    def load(self, settings: EvaluationSettings) -> list[BenchmarkRow]:
        """Rows of RewardBench's columns and `language`, of a file, or of a directory with one per language in it.

        Raises `DataError`.
        """
        source, rows = self.source(settings), []
        for part in _parts(source):
            for row in read_columns(part, ("prompt", "chosen", "rejected", "subset", "language")):
                subset, language = text_of(row, "subset"), text_of(row, "language")
                if subset not in SUBSETS:
                    raise DataError(
                        f"{row.origin}: unknown subset {subset!r}; M-RewardBench has those of RewardBench, and its "
                        "pairs of translations are no part of a score: leave them out"
                    )
                rows.append(pair_row(row, f"{language}/{subset}"))
        return checked_rows(source, rows, dict.fromkeys(row.subset for row in rows))

    def run(self, by, rows, settings, *, file=None, ranks: Ranks = ALONE) -> Result:
        scored = score_rows(by, rows, file, ranks=ranks)
        right: dict[str, list[tuple[str, bool]]] = {}
        for row in scored:
            language, subset = row.subset.split("/")
            right.setdefault(language, []).append((subset, is_right(row.scores)))
        languages = {name: SectionTable.of(rates(right[name])) for name in sorted(right)}
        totals = [table.total for table in languages.values()]
        whole = [total for total in totals if total is not None]
        return MRewardBenchResult(
            **ScoredResult.about(by, rows, scored),
            languages=languages,
            total=mean_of(whole) if len(whole) == len(totals) else None,
        )


def _parts(source: str) -> Sequence[str | Path]:
    """The directories in a directory, as the data set's own repository has them; else the source itself."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return [source]
    inner = sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
    return [each for each in inner if each.name != "translation"] or [source]
