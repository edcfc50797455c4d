"""The benchmarks by a language model's verdicts: pairs in both orders, the best of four, ratings for ties."""

from __future__ import annotations

import hashlib
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_lightning.evaluation.benchmarks.base import BenchmarkRow, Result, rates
from rlhf_lightning.evaluation.benchmarks.rewardbench import SECTIONS, RewardBench, SectionTable, selected_rows
from rlhf_lightning.evaluation.benchmarks.rewardbench2 import (
    SUBSETS_2,
    TIES,
    TIES_FORMULA,
    RewardBench2,
    rewardbench2_estimates,
    rewardbench2_items,
    rewardbench2_total,
    subset_table,
)
from rlhf_lightning.evaluation.blocks import Block, Column, Note, Table
from rlhf_lightning.evaluation.estimates import Estimate, Quantity, wilson
from rlhf_lightning.evaluation.judge import TOO_LONG, Judge, ask
from rlhf_lightning.evaluation.ranks import ALONE, Ranks
from rlhf_lightning.rewards.questions import comparison_question, parse_rating, parse_verdict, rating_question

UNPARSED_RATING = -1.0
"""What a rating that cannot be read counts as, as in the official tool: below all others."""


@dataclass(frozen=True, kw_only=True)
class JudgedResult(Result):
    """A `Result` of a judge."""

    judge: str
    kind: str
    """RewardBench's `model_type`."""
    parsed: Estimate
    """Replies that could be read."""
    n_too_long: int
    """Questions that were too long to be asked."""

    @staticmethod
    def about(judge: Judge, replies: Sequence[str], readings: Sequence[object]) -> dict[str, Any]:
        """The fields that every result has; a reading is None where a reply could not be read."""
        return {
            "judge": judge.name,
            "kind": "Generative RM",
            "parsed": wilson(sum(reading is not None for reading in readings), len(readings)),
            "n_too_long": replies.count(TOO_LONG),
        }

    def blocks(self) -> Iterator[Block]:
        """What is to be said of any judge."""
        if self.n_too_long:
            yield Note(f"{self.n_too_long} questions were too long for the model and were not asked.")


# ---- pairs


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


@dataclass(frozen=True, kw_only=True)
class JudgedPairs(JudgedResult):
    """What a judge said of pairs, in both orders."""

    strict_accuracy: Estimate
    """Pairs that were judged right in both orders."""
    consistency: Estimate | None
    """Pairs with the same verdict in both orders, of those with two."""
    first_place: Estimate | None
    """Verdicts for the response that was shown first, of those that could be read; a fair judge has one half."""
    n_pairs: int
    n_unparsed: int
    """Replies."""
    rows: list[PairVerdicts]

    def metrics(self) -> dict[str, Quantity]:
        return {"parsed": self.parsed, "consistency": self.consistency}

    def blocks(self) -> Iterator[Block]:
        rows = [
            ("verdicts that could be read", self.parsed),
            ("the same verdict in both orders", self.consistency),
            ("right in both orders", self.strict_accuracy),
            ("chose the first place", self.first_place),
        ]
        yield Table(["", Column("share")], rows, "How it judges")
        yield from super().blocks()


@dataclass(frozen=True, kw_only=True)
class JudgedRewardBenchResult(JudgedPairs):
    """RewardBench with a judge."""

    title = "RewardBench"

    table: SectionTable
    """Of `PairVerdicts.score`: one half for what could not be read, as in the official tool."""

    def metrics(self) -> dict[str, Quantity]:
        return {"rewardbench": self.table.total} | super().metrics()

    def summary(self) -> str:
        total = "not measured" if self.table.total is None else f"{self.table.total.value:.3f}"
        return f"RewardBench {total}, {self.n_unparsed} replies without a verdict"

    def text(self, name: str) -> str:
        return f"{name}, asked about each of {self.n_pairs} pairs of RewardBench in both orders."

    def blocks(self) -> Iterator[Block]:
        sections = [(section, self.table.sections.get(section)) for section in SECTIONS]
        yield Table(["section", Column("score")], [*sections, ("mean of four", self.table.total)], "Sections")
        yield from super().blocks()
        if self.n_unparsed:
            yield Note(f"{self.n_unparsed} of its replies held no verdict; each counts one half, never a guess.")


class JudgedRewardBench(RewardBench):
    """RewardBench, or its Lite set, with a judge."""

    taken_by = "judge"

    def run(self, by, rows, settings, *, file=None, ranks=ALONE) -> Result:
        return judge_rewardbench(by, selected_rows(rows, settings.rewardbench_size), file, ranks=ranks)


def judge_rewardbench(
    judge: Judge, rows: Sequence[BenchmarkRow], file: str | Path | None = None, *, ranks: Ranks = ALONE
) -> JudgedRewardBenchResult:
    """Ask about each pair in both orders. `file` and `ranks`: see `ask`, which raises what this raises."""
    about = judge_pairs(judge, rows, file, ranks)
    return JudgedRewardBenchResult(
        **about, table=SectionTable.of(rates((verdict.subset, verdict.score) for verdict in about["rows"]))
    )


def judge_pairs(
    judge: Judge, rows: Sequence[BenchmarkRow], file: str | Path | None = None, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """The fields of `JudgedPairs`."""
    orders = [(row.prompt, order) for row in rows for order in (row.responses, row.responses[::-1])]
    replies = ask(judge, [comparison_question(*each) for each in orders], file, ranks=ranks)
    letters = [parse_verdict(reply) for reply in replies]
    sides = {"A": ("chosen", "rejected"), "B": ("rejected", "chosen"), None: (None, None)}
    verdicts = [
        PairVerdicts(row.id, row.subset, sides[first][0], sides[second][1])
        for row, first, second in zip(rows, letters[::2], letters[1::2], strict=True)
    ]
    read = [letter for letter in letters if letter is not None]
    twice = [verdict for verdict in verdicts if None not in (verdict.chosen_first, verdict.chosen_second)]
    return JudgedResult.about(judge, replies, letters) | {
        "strict_accuracy": wilson(sum(verdict.score == 1 for verdict in verdicts), len(verdicts)),
        "consistency": wilson(sum(v.chosen_first == v.chosen_second for v in twice), len(twice)) if twice else None,
        "first_place": wilson(read.count("A"), len(read)) if read else None,
        "n_pairs": len(rows),
        "n_unparsed": len(letters) - len(read),
        "rows": verdicts,
    }


# ---- the best of four, and ties


@dataclass(frozen=True, kw_only=True)
class JudgedRewardBench2Result(JudgedResult):
    """RewardBench 2 with a judge: the best of four by its letter, and ratings for the ties."""

    title = "RewardBench 2"

    ties_formula: str
    subsets: dict[str, Estimate]
    """Over prompts; 1/4 for a choice of four that could not be read. Of the ties over pairs of prompts."""
    total: Estimate | None
    chosen_places: dict[str, int]
    """How often each letter was chosen. The correct response stands in each place alike."""
    n_unparsed_choices: int
    n_unparsed_ratings: int
    """They count as -1."""

    def metrics(self) -> dict[str, Quantity]:
        return {"rewardbench2": self.total}

    def text(self, name: str) -> str:
        return f"{name}, asked for the best response to each prompt of RewardBench 2, and for ratings of its ties."

    def blocks(self) -> Iterator[Block]:
        yield subset_table(self.subsets, self.total, "RewardBench 2")
        yield from super().blocks()


class JudgedRewardBench2(RewardBench2):
    """RewardBench 2 with a judge."""

    taken_by = "judge"

    def run(self, by, rows, settings, *, file=None, ranks=ALONE) -> Result:
        return judge_rewardbench2(by, rows, file, ranks=ranks)


def judge_rewardbench2(
    judge: Judge, rows: Sequence[BenchmarkRow], file: str | Path | None = None, *, ranks: Ranks = ALONE
) -> JudgedRewardBench2Result:
    """Ask for the best response to each prompt, and for ratings of each tie's.

    The correct response is shown in `right_place`. Raises what `ask` and `ties_score` raise.
    """
    choices, ties = ([row for row in rows if (row.subset == TIES) == tied] for tied in (False, True))
    questions = [comparison_question(row.prompt, _shown(row)) for row in choices]
    questions += [rating_question(row.prompt, response) for row in ties for response in row.responses]
    replies = ask(judge, questions, file, ranks=ranks)
    letters = [
        parse_verdict(reply, string.ascii_uppercase[: len(row.responses)])
        for row, reply in zip(choices, replies[: len(choices)], strict=True)
    ]
    ratings = [parse_rating(reply) for reply in replies[len(choices) :]]
    subsets = rates((row.subset, _points(row, letter)) for row, letter in zip(choices, letters, strict=True))
    given = iter(UNPARSED_RATING if rating is None else float(rating) for rating in ratings)
    items = rewardbench2_items(ties, [[next(given) for _ in row.responses] for row in ties])
    subsets |= rewardbench2_estimates(items)
    subsets = {subset: subsets[subset] for subset in SUBSETS_2 if subset in subsets}
    return JudgedRewardBench2Result(
        **JudgedResult.about(judge, replies, [*letters, *ratings]),
        ties_formula=TIES_FORMULA,
        subsets=subsets,
        total=rewardbench2_total(subsets),
        chosen_places=dict(sorted(Counter(letter for letter in letters if letter is not None).items())),
        n_unparsed_choices=letters.count(None),
        n_unparsed_ratings=ratings.count(None),
    )


def right_place(row: BenchmarkRow) -> int:
    """Where among its responses the correct one is shown: as good as random, and the same in every run."""
    digest = hashlib.sha256(f"place\x1f{row.key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % len(row.responses)


def _shown(row: BenchmarkRow) -> list[str]:
    """The responses with the first, the correct one, in its `right_place`."""
    first, *others = row.responses
    place = right_place(row)
    return [*others[:place], first, *others[place:]]


def _points(row: BenchmarkRow, letter: str | None) -> float:
    """1 for the letter of the correct response, 0 for another, a guess's chance for none."""
    return 1 / len(row.responses) if letter is None else float(letter == string.ascii_uppercase[right_place(row)])
