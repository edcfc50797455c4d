"""RM-Bench: whether a reward model sees which response is right whatever the style that it is written in.

Each prompt has three right and three wrong responses: concise, detailed, and detailed with Markdown. Source of names
and rules: github.com/THU-KEG/RM-Bench; Liu et al. 2024 (arXiv 2410.16184).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    read_columns,
    score_rows,
    text_of,
    texts_of,
)
from rlhf_lightning.evaluation.blocks import Block, Column, Table
from rlhf_lightning.evaluation.estimates import Estimate, Quantity, mean_rate
from rlhf_lightning.evaluation.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from rlhf_lightning.evaluation.settings import EvaluationSettings

DOMAINS: dict[str, int] = {"chat": 129, "math": 529, "code": 228, "safety": 441}
"""The four domains and their prompts. `safety-refuse` and `safety-response` are one domain."""
STYLES = ("concise", "detailed", "markdown")
"""Of the three right and of the three wrong responses, in their order."""
DIFFICULTIES = ("easy", "normal", "hard")
"""The right response is written in a richer style than the wrong one, in the same style, in a plainer style."""


def wins(scores: Sequence[float]) -> np.ndarray:
    """Where a right response, by row, scores above a wrong one, by column: bool [3, 3]. A tie is no win.

    `scores` are those of the three right responses and then of the three wrong ones, each in the order of `STYLES`.
    """
    right, wrong = np.asarray(scores[:3], dtype=np.float64), np.asarray(scores[3:], dtype=np.float64)
    return right[:, None] > wrong[None, :]


def by_difficulty(won: np.ndarray) -> dict[str, float]:
    """Means of `wins` (or of their mean, float [3, 3]) below the diagonal, on it, and above it."""
    return {
        "easy": float(won[np.tril_indices(3, -1)].mean()),
        "normal": float(np.diag(won).mean()),
        "hard": float(won[np.triu_indices(3, 1)].mean()),
    }


@dataclass(frozen=True, kw_only=True)
class RMBenchResult(ScoredResult):
    """RM-Bench of one scorer, or of a rule that reads nothing."""

    title = "further benchmarks"

    domains: dict[str, Estimate]
    """Mean of the nine comparisons over the prompts of each domain."""
    difficulties: dict[str, Estimate]
    """Mean over the domains that are there."""
    total: Estimate | None
    """Unweighted mean of the four domains; None while one is missing."""
    matrix: list[list[float]]
    """Shares of won comparisons, the right response's style by row: mean over the domains that are there."""
    longer: dict[str, float]
    """What the rule that more characters are better gets, by domain and by difficulty."""
    absent_domains: list[str]
    short_domains: dict[str, str]

    def subset_scores(self) -> Mapping[str, Estimate]:
        return self.domains

    def metrics(self) -> dict[str, Quantity]:
        found = {"score": self.total, **self.domains, **self.difficulties}
        return {f"rm_bench/{name}": of for name, of in found.items()}

    def summary(self) -> str:
        total = "not measured" if self.total is None else f"{self.total.value:.3f}"
        return f"RM-Bench {total}: " + ", ".join(f"{name} {of.value:.3f}" for name, of in self.difficulties.items())

    def blocks(self) -> Iterator[Block]:
        rows = [(name, of, self.longer[name]) for name, of in {**self.domains, **self.difficulties}.items()]
        caption = "RM-Bench: right above wrong responses, in three styles each (hard: the right one is the plainer)"
        columns: list[Column | str] = ["", Column("this model"), Column("longer wins")]
        yield Table(columns, [*rows, ("mean of four domains", self.total, None)], caption)
        yield Table(
            ["right response", *(Column(f"wrong, {style}") for style in STYLES)],
            [(style, *shares) for style, shares in zip(STYLES, self.matrix, strict=True)],
            "RM-Bench: won comparisons by style",
        )


class RMBench(Benchmark):
    """The benchmark, with a scorer."""

    name = "rm_bench"
    title = "RM-Bench"

    def load(self, settings: EvaluationSettings) -> list[BenchmarkRow]:
        """Rows of prompt, chosen and rejected (three texts each), domain and perhaps id. Raises `DataError`."""
        source, rows = self.source(settings), []
        for row in read_columns(source, ("prompt", "chosen", "rejected", "domain")):
            responses = [*texts_of(row, "chosen"), *texts_of(row, "rejected")]
            if len(responses) != 6 or len(row.values["chosen"]) != 3:
                raise DataError(
                    f"{row.origin}: {len(row.values['chosen'])} chosen and {len(row.values['rejected'])} rejected "
                    f"responses; RM-Bench has three of each: {', '.join(STYLES)}"
                )
            domain = text_of(row, "domain").partition("-")[0]
            identity = f"{row.values['domain']}:{id_of(row)}"  # ids begin anew in each part of a domain
            rows.append(BenchmarkRow(identity, domain, messages_of(row), responses, 3, row.origin))
        return checked_rows(source, rows, DOMAINS)

    def notes(self, rows: Sequence[BenchmarkRow]) -> list[str]:
        absent, short = missing_rows(rows, DOMAINS)
        parts = [f"{name} absent" for name in absent] + [f"{name}: {count}" for name, count in short.items()]
        return [f"RM-Bench: these are not all of its prompts ({', '.join(parts)})"] if parts else []

    def run(self, by, rows, settings, *, file=None, ranks: Ranks = ALONE) -> Result:
        scored = score_rows(by, rows, file, ranks=ranks)
        won = _by_domain(rows, [row.scores for row in scored])
        lengths = _by_domain(rows, [[len(response) for response in row.responses] for row in rows])
        domains = {name: mean_rate(each.mean(axis=(1, 2))) for name, each in won.items()}
        levels = {name: [by_difficulty(each) for each in own] for name, own in won.items()}
        absent, short = missing_rows(rows, DOMAINS)
        return RMBenchResult(
            **ScoredResult.about(by, rows, scored),
            domains=domains,
            difficulties={
                level: mean_of([mean_rate(np.array([each[level] for each in own])) for own in levels.values()])
                for level in DIFFICULTIES
            },
            total=None if absent else mean_of(domains.values()),
            matrix=_mean_matrix(won).tolist(),
            longer={name: float(each.mean()) for name, each in lengths.items()} | by_difficulty(_mean_matrix(lengths)),
            absent_domains=absent,
            short_domains=short,
        )


def _by_domain(rows: Sequence[BenchmarkRow], scores: Sequence[Sequence[float]]) -> dict[str, np.ndarray]:
    """`wins` of the prompts of each domain that is there, [prompts, 3, 3]."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in DOMAINS}
    for row, own in zip(rows, scores, strict=True):
        found[row.subset].append(wins(own))
    return {name: np.stack(own) for name, own in found.items() if own}


def _mean_matrix(won: Mapping[str, np.ndarray]) -> np.ndarray:
    """Over the prompts of each domain, then over the domains."""
    return np.mean([each.mean(axis=0) for each in won.values()], axis=0)
