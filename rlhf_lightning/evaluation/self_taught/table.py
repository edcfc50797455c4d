"""What is measured of a judge: how often it is right, in each order, and how far simple rules would come.

A rate is the mean over pairs of each pair's share, with Wilson's interval of as many pairs: judgements of one pair are
not independent.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_lightning.data.examples import PreferenceExample
from rlhf_lightning.evaluation.benchmarks.base import RowScores
from rlhf_lightning.evaluation.blocks import Block, Document, Note, Sample, Samples, SampleText, Section, Table
from rlhf_lightning.evaluation.estimates import Estimate, Quantity, mean_rate
from rlhf_lightning.evaluation.self_taught.contrast import words
from rlhf_lightning.evaluation.self_taught.judgements import LETTERS, ORDERS, OUTCOMES, Ordered

SUSPECT = 0.9
"""Accuracy of word overlap above which pairs teach little else than to find the topic."""
LISTED = 20
"""Doubted pairs that the report shows."""
_MEANINGS = {
    "pairs": "pairs",
    "questions": "pairs in both orders",
    "judgements": "judgements, all of them",
    "accuracy": "accuracy; one half for what is no verdict",
    "consistency": "the same verdict in both orders, of those with two",
    "first_place": "verdicts for the first place; a fair judge has one half",
    "none_right": "questions without a right one among the first",
    "all_right": "questions with right ones alone among the first",
    "longer": "accuracy of the longer response",
    "overlap": "accuracy of the response with more words of the prompt",
}


def judge_numbers(ordered: Sequence[Ordered], rate: int) -> dict[str, Quantity]:
    """Of the first `rate` judgements of each question; `ordered` has both orders of each pair side by side."""
    by_pair: dict[str, list[Ordered]] = defaultdict(list)
    for one in ordered:
        by_pair[one.key].append(one)
    pairs = list(by_pair.values())
    shares = {name: [[one.share(name, rate) for one in pair] for pair in pairs] for name in OUTCOMES}
    right = np.array(shares["right"])
    lost = 1 - right - np.array(shares["wrong"])
    numbers: dict[str, Quantity] = {
        "pairs": len(pairs),
        "questions": len(ordered),
        "judgements": sum(len(one.judgements) for one in ordered),
        "accuracy": mean_rate((right + lost / 2).mean(axis=1)),
    }
    numbers |= {name: mean_rate(np.array(share).mean(axis=1)) for name, share in shares.items()}
    numbers |= {f"right_{name}": mean_rate(right[:, order]) for order, name in enumerate(ORDERS)}
    return numbers | {
        "consistency": _mean([_consistency(pair, rate) for pair in pairs]),
        "first_place": _mean([_first_place(pair, rate) for pair in pairs]),
        "none_right": int((right == 0).sum()),
        "all_right": int((right == 1).sum()),
        **baselines([pair[0].pair for pair in pairs]),
    }


def baselines(pairs: Sequence[PreferenceExample]) -> dict[str, Quantity]:
    """Accuracy of two rules that read nothing: the longer response, and the one with more words of the prompt."""
    longer = [_wins(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    overlap = [_wins(*(_overlap(pair, response) for response in pair.responses)) for pair in pairs]
    return {"longer": mean_rate(np.array(longer)), "overlap": mean_rate(np.array(overlap))}


def agreement(ordered: Sequence[Ordered], scores: Mapping[str, RowScores], rate: int) -> dict[str, Quantity]:
    """How often readable verdicts are those of a reward model, whose scores of each pair are given by its key."""
    shares = defaultdict(list)
    for one in ordered:
        better = float(np.sign(scores[one.key].scores[0] - scores[one.key].scores[1]))
        for each in one.judgements[:rate]:
            if each.outcome in ("right", "wrong"):
                shares[one.key].append((1 + better * (1 if each.outcome == "right" else -1)) / 2)
    accuracy = [_wins(*each.scores) for each in scores.values()]
    return {
        "reward_model_agreement": _mean([math.fsum(each) / len(each) for each in shares.values()]),
        "reward_model_accuracy": mean_rate(np.array(accuracy)),
    }


@dataclass(frozen=True)
class JudgeTable:
    """All numbers of one `judge`.

    Args:
        judge: Its name.
        training: Of the pairs that rows are made of.
        held_out: Of others, by their names.
        doubted: Pairs whose construction the judge contradicts.
    """

    judge: str
    training: Mapping[str, Quantity]
    held_out: Mapping[str, Mapping[str, Quantity]]
    doubted: Sequence[Ordered]

    def metrics(self) -> dict[str, Quantity]:
        """Every number by its name; those of held-out pairs begin with their name."""
        found = dict(self.training)
        for name, numbers in self.held_out.items():
            found |= {f"{name}/{key}": value for key, value in numbers.items()}
        return {name: value for name, value in found.items() if value is not None}

    def document(self) -> Document:
        """The report."""
        sets = {"training pairs": self.training, **self.held_out}
        names = list(dict.fromkeys(name for numbers in sets.values() for name in numbers))
        words_for = {name: _MEANINGS.get(name, name.replace("_", " ")) for name in names}
        rows = [[words_for[name], *(numbers.get(name) for numbers in sets.values())] for name in names]
        caption = "Rates with 95 % intervals over pairs; of held-out pairs one judgement, the most likely one"
        blocks: list[Block] = [Table(["", *sets], rows, caption), *self._notes(sets)]
        sections = [Section(f"The judge {self.judge}", blocks)]
        if self.doubted:
            sections.append(Section("Doubted pairs", [self._samples()], _DOUBTED.format(len(self.doubted))))
        return Document("Judgements", sections)

    def _notes(self, sets: Mapping[str, Mapping[str, Quantity]]) -> Iterable[Block]:
        for name, numbers in sets.items():
            accuracy, overlap = numbers.get("accuracy"), numbers.get("overlap")
            if isinstance(accuracy, Estimate) and accuracy.low <= 0.5 <= accuracy.high:
                yield Note(f"{name}: the judge is not told from a coin flip; its interval holds one half.")
            if isinstance(overlap, Estimate) and overlap.value > SUSPECT:
                yield Note(
                    f"{name}: counting common words alone is right in {overlap.value:.1%}. Such pairs teach to "
                    "find the topic; mix in others, such as those of `generate --rows pairs`."
                )

    def _samples(self) -> Samples:
        shown = [
            Sample(
                one.pair.example_id,
                "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in one.pair.prompt),
                [SampleText(one.pair.chosen), SampleText(one.pair.rejected)],
            )
            for one in self.doubted[:LISTED]
        ]
        return Samples(["chosen by construction", "rejected by construction"], shown, f"The first {len(shown)}")


_DOUBTED = "{} pairs were left out: in both orders the judge prefers the response that was built to be the worse one."


def _consistency(pair: Sequence[Ordered], rate: int) -> float | None:
    both = zip(*(one.judgements[:rate] for one in pair), strict=True)
    same = [a.outcome == b.outcome for a, b in both if {a.outcome, b.outcome} <= {"right", "wrong"}]
    return sum(same) / len(same) if same else None


def _first_place(pair: Sequence[Ordered], rate: int) -> float | None:
    said = [each.verdict for one in pair for each in one.judgements[:rate] if each.outcome in ("right", "wrong")]
    return said.count(LETTERS[0]) / len(said) if said else None


def _mean(shares: Iterable[float | None]) -> Estimate | None:
    known = [share for share in shares if share is not None]
    return mean_rate(np.array(known)) if known else None


def _wins(first: float, second: float) -> float:
    return float(first > second) + 0.5 * (first == second)


def _overlap(pair: PreferenceExample, response: str) -> float:
    asked = set(words(pair.prompt[-1]["content"]))
    return len(asked & set(words(response))) / max(1, len(asked))
