"""RewardBench 2 by a language model: the best of four by its letter, and ratings for the ties."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.evaluation.benchmarks.base import BenchmarkRow, Result
from rlhf_lightning.evaluation.benchmarks.rewardbench2 import (
    SUBSETS_2,
    TIES,
    RewardBench2,
    RewardBench2Item,
    TiesFormula,
    rewardbench2_estimates,
    rewardbench2_total,
    subset_table,
)
from rlhf_lightning.evaluation.blocks import Block, Note
from rlhf_lightning.evaluation.estimates import Estimate, Quantity, wilson
from rlhf_lightning.evaluation.judge import (
    JUDGE_KIND,
    TOO_LONG,
    Judge,
    ask,
    comparison_question,
    parse_rating,
    parse_verdict,
    rating_question,
)
from rlhf_lightning.evaluation.ranks import ALONE, Ranks

UNPARSED_RATING = -1.0
"""What a rating that cannot be read counts as, as in the official tool: below all others."""


@dataclass(frozen=True)
class Judge2Result(Result):
    """RewardBench 2 with a judge: the best of four, and ratings for the ties."""

    title = "RewardBench 2"

    judge: str
    kind: str
    ties_formula: TiesFormula
    subsets: dict[str, Estimate]
    """Over prompts; 1/4 for a choice of four that could not be read. Of the ties over pairs of prompts."""
    total: Estimate | None
    parsed: Estimate
    """Replies that could be read."""
    chosen_places: dict[str, int]
    """How often each letter was chosen. The correct response stands in each place alike."""
    n_unparsed_choices: int
    n_unparsed_ratings: int
    """They count as -1."""
    n_too_long: int
    """Questions among both that were not asked."""

    def metrics(self) -> dict[str, Quantity]:
        return {"rewardbench2": self.total}

    def text(self, name: str) -> str:
        return f"{name}, asked for the best response to each prompt of RewardBench 2, and for ratings of its ties."

    def blocks(self) -> Iterator[Block]:
        yield subset_table(self.subsets, self.total, "RewardBench 2")
        if self.n_too_long:
            yield Note(f"{self.n_too_long} questions were too long for the model and were not asked.")


class JudgedRewardBench2(RewardBench2):
    """RewardBench 2 with a judge."""

    taken_by = "judge"

    def run(self, by, rows, settings, *, file=None, ranks=ALONE) -> Judge2Result:
        return run_judge2(by, rows, name=by.name, replies_file=file, ranks=ranks)


def run_judge2(
    judge: Judge,
    rows: Sequence[BenchmarkRow],
    *,
    name: str,
    ties_formula: TiesFormula = "0.1.5",
    replies_file: str | Path | None = None,
    ranks: Ranks = ALONE,
) -> Judge2Result:
    """Ask for the best response to each prompt of `load_rewardbench2`'s rows, and for ratings of each tie's.

    The correct response is shown in `right_place`. Raises `ConfigurationError` when there are no rows, and what `ask`
    and `ties_score` raise.
    """
    if not rows:
        raise ConfigurationError(f"{name}: there are no prompts to judge")
    choices, ties = ([row for row in rows if (row.subset == TIES) == tied] for tied in (False, True))
    questions = [comparison_question(row.prompt, _shown(row)) for row in choices]
    questions += [rating_question(row.prompt, response) for row in ties for response in row.responses]
    replies = ask(judge, questions, name=name, replies_file=replies_file, ranks=ranks)
    letters = [
        parse_verdict(reply, string.ascii_uppercase[: len(row.responses)])
        for row, reply in zip(choices, replies[: len(choices)], strict=True)
    ]
    ratings = [parse_rating(reply) for reply in replies[len(choices) :]]
    points: dict[str, list[float]] = {}
    for row, letter in zip(choices, letters, strict=True):
        right = string.ascii_uppercase[right_place(row)]
        points.setdefault(row.subset, []).append(1 / len(row.responses) if letter is None else float(letter == right))
    subsets = {subset: wilson(sum(own), len(own)) for subset, own in points.items()}
    subsets |= rewardbench2_estimates(_tie_items(ties, ratings), ties_formula)
    subsets = {subset: subsets[subset] for subset in SUBSETS_2 if subset in subsets}
    read = [reading for reading in [*letters, *ratings] if reading is not None]
    return Judge2Result(
        judge=name,
        kind=JUDGE_KIND,
        ties_formula=ties_formula,
        subsets=subsets,
        total=rewardbench2_total(subsets),
        parsed=wilson(len(read), len(replies)),
        chosen_places={letter: letters.count(letter) for letter in sorted({*letters} - {None})},
        n_unparsed_choices=letters.count(None),
        n_unparsed_ratings=ratings.count(None),
        n_too_long=replies.count(TOO_LONG),
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


def _tie_items(ties: Sequence[BenchmarkRow], ratings: Sequence[int | None]) -> list[RewardBench2Item]:
    given = iter(UNPARSED_RATING if rating is None else float(rating) for rating in ratings)
    return [
        {
            "id": row.id,
            "subset": row.subset,
            "scores": [next(given) for _ in row.responses],
            "num_correct": row.num_correct,
        }
        for row in ties
    ]
