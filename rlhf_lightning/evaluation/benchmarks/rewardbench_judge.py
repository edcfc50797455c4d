"""RewardBench by a language model's verdicts: each pair in both orders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.evaluation.benchmarks.base import BenchmarkRow, Result
from rlhf_lightning.evaluation.benchmarks.rewardbench import SECTIONS, RewardBench, SectionTable, selected_rows
from rlhf_lightning.evaluation.blocks import Block, Column, Note, Table
from rlhf_lightning.evaluation.estimates import Estimate, Quantity, wilson
from rlhf_lightning.evaluation.judge import JUDGE_KIND, TOO_LONG, Judge, ask, comparison_question, parse_verdict
from rlhf_lightning.evaluation.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class PairVerdicts:
    """What a judge said of a pair: the better side with the chosen response shown first, and second."""

    id: str
    subset: str
    chosen_first: str | None
    """`chosen` or `rejected`; None when the reply could not be read."""
    chosen_second: str | None

    @property
    def score(self) -> float:
        """1 for a right verdict, 0 for a wrong one, one half for one that could not be read; mean of both orders."""
        points = {"chosen": 1.0, "rejected": 0.0, None: 0.5}
        return (points[self.chosen_first] + points[self.chosen_second]) / 2

    @property
    def parsed(self) -> bool:
        """Whether both verdicts could be read."""
        return None not in (self.chosen_first, self.chosen_second)


@dataclass(frozen=True)
class JudgeResult(Result):
    """RewardBench with a judge."""

    title = "RewardBench"

    judge: str
    kind: str
    table: SectionTable
    """Of `PairVerdicts.score`: one half for what could not be read, as in the official tool."""
    strict_accuracy: Estimate
    """Pairs that were judged right in both orders."""
    parsed: Estimate
    """Replies that could be read."""
    consistency: Estimate | None
    """Pairs with the same verdict in both orders, of those with two."""
    first_place: Estimate | None
    """Verdicts for the response that was shown first, of those that could be read; a fair judge has one half."""
    n_pairs: int
    n_unparsed: int
    """Replies."""
    n_too_long: int
    """Questions among them that were not asked."""
    rows: list[PairVerdicts]

    def metrics(self) -> dict[str, Quantity]:
        return {"rewardbench": self.table.total, "parsed": self.parsed, "consistency": self.consistency}

    def summary(self) -> str:
        total = "not measured" if self.table.total is None else f"{self.table.total.value:.3f}"
        return f"RewardBench {total}, {self.n_unparsed} replies without a verdict"

    def text(self, name: str) -> str:
        return f"{name}, asked about each of {self.n_pairs} pairs of RewardBench in both orders."

    def blocks(self) -> Iterator[Block]:
        sections = [[section, self.table.sections.get(section)] for section in SECTIONS]
        yield Table(["section", Column("score")], [*sections, ["mean of four", self.table.total]], "Sections")
        rows = [
            ("verdicts that could be read", self.parsed),
            ("the same verdict in both orders", self.consistency),
            ("right in both orders", self.strict_accuracy),
            ("chose the first place", self.first_place),
        ]
        yield Table(["", Column("share")], rows, "How it judges")
        if self.n_too_long:
            yield Note(f"{self.n_too_long} questions were too long for the model and were not asked.")
        if self.n_unparsed:
            yield Note(f"{self.n_unparsed} of its replies held no verdict; each counts one half, never a guess.")


class JudgedRewardBench(RewardBench):
    """RewardBench, or its Lite set, with a judge."""

    taken_by = "judge"

    def run(self, by, rows, settings, *, file=None, ranks=ALONE) -> JudgeResult:
        given = selected_rows(rows, settings.rewardbench_size)
        return run_judge(by, given, name=by.name, replies_file=file, ranks=ranks)


def run_judge(
    judge: Judge,
    rows: Sequence[BenchmarkRow],
    *,
    name: str,
    replies_file: str | Path | None = None,
    ranks: Ranks = ALONE,
) -> JudgeResult:
    """Ask about each pair of `load_rewardbench`'s rows in both orders. `replies_file` and `ranks`: see `ask`.

    Raises `ConfigurationError` when there are no rows, and what `ask` raises.
    """
    if not rows:
        raise ConfigurationError(f"{name}: there are no pairs to judge")
    questions = [
        comparison_question(row.prompt, order) for row in rows for order in (row.responses, row.responses[::-1])
    ]
    replies = ask(judge, questions, name=name, replies_file=replies_file, ranks=ranks)
    letters = [parse_verdict(reply) for reply in replies]
    sides = {"A": ("chosen", "rejected"), "B": ("rejected", "chosen"), None: (None, None)}
    verdicts = [
        PairVerdicts(row.id, row.subset, sides[first][0], sides[second][1])
        for row, first, second in zip(rows, letters[::2], letters[1::2], strict=True)
    ]
    points: dict[str, list[float]] = {}
    for verdict in verdicts:
        points.setdefault(verdict.subset, []).append(verdict.score)
    read = [letter for letter in letters if letter is not None]
    twice = [verdict for verdict in verdicts if verdict.parsed]
    return JudgeResult(
        judge=name,
        kind=JUDGE_KIND,
        table=SectionTable.of({subset: wilson(sum(own), len(own)) for subset, own in points.items()}),
        strict_accuracy=wilson(sum(verdict.score == 1 for verdict in verdicts), len(verdicts)),
        parsed=wilson(len(read), len(letters)),
        consistency=wilson(sum(v.chosen_first == v.chosen_second for v in twice), len(twice)) if twice else None,
        first_place=wilson(read.count("A"), len(read)) if read else None,
        n_pairs=len(rows),
        n_unparsed=len(letters) - len(read),
        n_too_long=replies.count(TOO_LONG),
        rows=verdicts,
    )
