"""Judgements that a judge is to learn from: rows for SFT, and pairs for DPO. Pure functions of what was judged."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.evaluation.self_taught.judgements import LETTERS, ORDERS, Judgement, Ordered, Outcome
from rlhf_lightning.rewards.questions import after_thinking

Keep = Literal["right", "readable"]


@dataclass(frozen=True)
class Selection:
    """Which judgements are learned from.

    Args:
        rate: Judgements that every question has.
        keep: `right`, those that agree with how the pair was built; `readable`, whatever they say.
        min_right: Least share of right ones among the first `rate` of a question; above one half a majority.
        keep_thinking: Learn a thinking block as well, or what follows it alone.
        seed: Of the choice of what is left out for balance.
    """

    rate: int
    keep: Keep = "right"
    min_right: float = 0.0
    keep_thinking: bool = True
    seed: int = 0

    def sft(self, ordered: Sequence[Ordered], doubted: Collection[str]) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """A row for each question with a judgement to keep, and how often each letter was there before balancing.

        One judgement of a question is kept, and as many for A as for B: a judge that learned from more of one letter
        would say it more often. Raises `ConfigurationError` where nothing is left.
        """
        outcomes: tuple[Outcome, ...] = ("right",) if self.keep == "right" else ("right", "wrong")
        found = [(one, kept) for one in self._trusted(ordered, doubted) if (kept := one.first(*outcomes)) is not None]
        letters = {letter: sum(kept.verdict == letter for _, kept in found) for letter in LETTERS}
        rows = [self._row(one) | {"response": self._text(kept)} for one, kept in self._balanced(found)]
        if not rows:
            made = [judgement.outcome for one in ordered for judgement in one.judgements]
            raise ConfigurationError(
                f"judge: no judgement is left to learn from: {letters['A']} were kept for A and {letters['B']} for B, "
                f"and as many are taken of each; {made.count('cut')} of {len(made)} were cut at max_new_tokens, "
                f"{made.count('unreadable')} gave no verdict. A judge with one letter for all, or without verdicts "
                "that can be read, cannot teach itself; take another model or template, more temperature or "
                "num_judgements, or longer judgements where they were cut"
            )
        return rows, letters

    def dpo(self, ordered: Sequence[Ordered], doubted: Collection[str]) -> list[dict[str, Any]]:
        """A pair of judgements for each question that has both: a right one, and a wrong or else an unreadable one."""
        found = [
            (one, right)
            for one in self._trusted(ordered, doubted)
            if (right := one.first("right")) is not None and _rejected(one) is not None
        ]
        return [
            self._row(one) | {"chosen": self._text(right), "rejected": self._text(rejected)}
            for one, right in self._balanced(found)
            if (rejected := _rejected(one)) is not None
        ]

    def _trusted(self, ordered: Sequence[Ordered], doubted: Collection[str]) -> list[Ordered]:
        """In the order of their keys, whatever the order in which they were given."""
        trusted = [one for one in ordered if one.key not in doubted and one.share("right", self.rate) >= self.min_right]
        return sorted(trusted, key=lambda one: (one.key, one.order))

    def _balanced(self, found: Sequence[tuple[Ordered, Judgement]]) -> list[tuple[Ordered, Judgement]]:
        """As many of each verdict; those that are left out are chosen by a hash, so that no other row changes it."""
        count = min(sum(kept.verdict == letter for _, kept in found) for letter in LETTERS)
        lots = sorted(found, key=lambda each: self._lot(each[0]))
        chosen = {
            (one.key, one.order)
            for letter in LETTERS
            for one, _ in [each for each in lots if each[1].verdict == letter][:count]
        }
        return [each for each in found if (each[0].key, each[0].order) in chosen]

    def _lot(self, one: Ordered) -> bytes:
        return hashlib.sha256(f"{self.seed} {one.key} {one.order}".encode()).digest()

    def _row(self, one: Ordered) -> dict[str, Any]:
        return {"id": f"{one.key} {ORDERS[one.order]}", "prompt": [{"role": "user", "content": one.question}]}

    def _text(self, judgement: Judgement) -> str:
        return judgement.text if self.keep_thinking else after_thinking(judgement.text).strip()


def _rejected(one: Ordered) -> Judgement | None:
    """What is not empty alone: a response without text makes no pair."""
    unreadable = [each for each in one.judgements if each.outcome == "unreadable" and each.text.strip()]
    return one.first("wrong") or next(iter(unreadable), None)
