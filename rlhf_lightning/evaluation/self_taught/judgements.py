"""Judgements of pairs in both orders, sampled several times, and whether they agree with how a pair was built."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rlhf_lightning.data.examples import PreferenceExample
from rlhf_lightning.evaluation.self_taught.replies import Asking, content_key
from rlhf_lightning.rewards.questions import comparison_question, parse_verdict
from rlhf_lightning.rewards.writers import Reply, Writer

Outcome = Literal["right", "wrong", "unreadable", "cut", "not_asked"]
"""Right: for the chosen response. Cut: it reached max_new_tokens, whatever it says. Not asked: see `PolicyWriter`."""
OUTCOMES: tuple[Outcome, ...] = ("right", "wrong", "unreadable", "cut", "not_asked")
ORDERS = ("chosen_first", "chosen_second")
LETTERS = ("A", "B")
"""Of the chosen response, in each order."""
EarlyStop = Literal["right", "both", "never"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """One reply of a judge."""

    sample: int
    """Its number among those of the same question, from 0."""
    outcome: Outcome
    verdict: str | None
    """A or B."""
    text: str


@dataclass(frozen=True, slots=True)
class Ordered:
    """A pair in one order, and what was said of it."""

    key: str
    """Of the pair, a hash of its texts; it is the same in both orders."""
    order: int
    """Place in `ORDERS`."""
    pair: PreferenceExample
    question: str
    judgements: list[Judgement]

    def first(self, *outcomes: Outcome) -> Judgement | None:
        """The first judgement of these outcomes.

        As good as one drawn at random from all of them, since samples are exchangeable, and the same wherever sampling
        stopped after it.
        """
        return next((each for each in self.judgements if each.outcome in outcomes), None)

    def share(self, outcome: Outcome, rate: int) -> float:
        """Of the first `rate` judgements."""
        return sum(each.outcome == outcome for each in self.judgements[:rate]) / rate


@dataclass(frozen=True)
class Judging:
    """How pairs are judged.

    Args:
        writer: The judge.
        asking: Where its replies are kept.
        samples: Most judgements of a pair in one order.
        rate: Judgements that each pair gets in each order whatever they say. Rates are of them alone: what is sampled
            further stops by what it says, and would count successes too often.
        early_stop: Stop after a right judgement, after a right and a wrong one, or never.
        max_wrong: A pair that is called wrong in more than this share, in both orders, is doubted.
        template: The question in other words (see `comparison_question`).
    """

    writer: Writer
    asking: Asking
    samples: int
    rate: int
    early_stop: EarlyStop = "right"
    max_wrong: float = 1.0
    template: Mapping[str, str] = field(default_factory=dict)

    def judge(self, pairs: Sequence[PreferenceExample], what: str = "judgements") -> list[Ordered]:
        """Both orders of each pair, side by side, sorted by the pairs' keys; the same pair is judged once."""
        by_key = {pair_key(pair): pair for pair in pairs}
        ordered = [self._ordered(key, by_key[key], order) for key in sorted(by_key) for order in (0, 1)]
        open_, start, stop = ordered, 0, self.samples if self.early_stop == "never" else self.rate
        while open_ and start < self.samples:
            questions = {f"{one.key} {one.order}": one.question for one in open_}
            turns = {key: [{"role": "user", "content": question}] for key, question in questions.items()}
            found = self.asking.replies(what, self.writer, turns, range(start, stop))
            for one in open_:
                for sample, reply in zip(range(start, stop), found[f"{one.key} {one.order}"], strict=True):
                    one.judgements.append(_judgement(sample, reply, LETTERS[one.order]))
            start, stop = stop, min(2 * stop, self.samples)
            open_ = self._open(ordered, start)
        return ordered

    def _ordered(self, key: str, pair: PreferenceExample, order: int) -> Ordered:
        responses = pair.responses if order == 0 else pair.responses[::-1]
        return Ordered(key, order, pair, comparison_question(pair.prompt, responses, **self.template), [])

    def _open(self, ordered: Sequence[Ordered], sampled: int) -> list[Ordered]:
        """Those that are sampled further."""
        doubted = self.doubted(ordered)
        needed: tuple[Outcome, ...] = ("right",) if self.early_stop == "right" else ("right", "wrong")
        return [
            one
            for one in ordered
            if one.key not in doubted
            and len(one.judgements) == sampled
            and not all(one.first(outcome) for outcome in needed)
            and one.first("not_asked") is None
        ]

    def doubted(self, ordered: Sequence[Ordered]) -> set[str]:
        """Keys of pairs whose construction the judge contradicts, by their first `rate` judgements in both orders."""
        return {
            first.key
            for first, second in zip(ordered[::2], ordered[1::2], strict=True)
            if min(first.share("wrong", self.rate), second.share("wrong", self.rate)) > self.max_wrong
        }


def pair_key(pair: PreferenceExample) -> str:
    """A hash of the texts of a pair."""
    texts = "\x1f".join([content_key(pair.prompt), *pair.responses])
    return hashlib.sha256(texts.encode(errors="surrogatepass")).hexdigest()[:24]


def _judgement(sample: int, reply: Reply | None, right: str) -> Judgement:
    if reply is None:
        return Judgement(sample, "not_asked", None, "")
    verdict = parse_verdict(reply.text)
    if not reply.ended:
        return Judgement(sample, "cut", verdict, reply.text)
    outcome: Outcome = "unreadable" if verdict is None else "right" if verdict == right else "wrong"
    return Judgement(sample, outcome, verdict, reply.text)
