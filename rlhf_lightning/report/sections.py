"""The report of an evaluation: which blocks show which numbers, in the order in which a person asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_lightning.evaluation.benchmarks.base import Result
from rlhf_lightning.evaluation.blocks import (
    COIN,
    Bar,
    BarGroup,
    Bars,
    Beside,
    Block,
    Distribution,
    Document,
    Facts,
    Histogram,
    Lines,
    Note,
    Point,
    Reference,
    Section,
    Series,
    Table,
    Verdicts,
)
from rlhf_lightning.evaluation.estimates import Estimate, Quantity, wilson
from rlhf_lightning.evaluation.results import EvaluationResults, PairScores, RunCurves, ScorerResults
from rlhf_lightning.evaluation.reward_quality import RewardQuality
from rlhf_lightning.evaluation.verdicts import asked
from rlhf_lightning.report.policies import policy_sections
from rlhf_lightning.report.samples import samples
from rlhf_lightning.report.wording import HEADS

PAIRS_OF_A_POINT = 40
"""Of the calibration: with fewer, an interval is wider than half of the axis."""
SOURCES_SHOWN = 15


def report(results: EvaluationResults) -> Document:
    """The whole page: verdicts, samples, reward models, benchmarks, policies, safety, curves, provenance."""
    targets, notes = asked(results), [*map(Note, results.notes)]
    sections = [Section("Verdicts", [Verdicts(targets), *notes], _VERDICTS)] if targets else []
    if notes and not targets:
        sections = [Section("Notes", notes)]
    if results.policies is not None:
        sections += samples(results.policies)
    if measured := list(_measured(results.scorers)):
        sections.append(_quality(measured))
    for scorer in results.scorers:
        by_title: dict[str, list[Result]] = {}
        for result in scorer.benchmarks.values():
            by_title.setdefault(result.title, []).append(result)
        for title, found in by_title.items():
            sections.append(_benchmarks(f"{HEADS[scorer.title]} on {title}", scorer.name, found))
    sections += [_benchmarks("Judge in writing", of.name, of.benchmarks.values()) for of in results.judges]
    if results.policies is not None:
        sections += policy_sections(results.policies, results.runs)
    if results.runs:
        sections.append(Section("Learning curves", list(_curves(results.runs)), _CURVES))
    sections.append(Section("Where the numbers come from", [Facts(list(results.provenance.items()))]))
    judged = [scorer.name for scorer in results.scorers]
    judged += list(results.policies.names.values()) if results.policies is not None else []
    return Document(results.title, sections, subtitle=", ".join(dict.fromkeys(judged)))


_VERDICTS = (
    "Each interval is a 95 % interval. A target is met when the number meets it, and met with confidence when the "
    "whole interval does; that nothing got worse is met with confidence when it clearly got better."
)
_CURVES = "As the training run logged them; its reward and its KL are means over the responses of a rollout."


def _benchmarks(title: str, name: str, results: Iterable[Result]) -> Section:
    """What a scorer or a judge of that name got in some benchmarks."""
    text = "\n\n".join(text for result in results if (text := result.text(name)))
    return Section(title, [block for result in results for block in result.blocks()], text)


# ---- reward models


class _Measured(NamedTuple):
    """A scorer that was measured on pairs; `head` is what the report calls it."""

    head: str
    name: str
    quality: RewardQuality
    scores: PairScores

    @property
    def margins(self) -> np.ndarray:
        return self.scores.chosen - self.scores.rejected


def _measured(scorers: Iterable[ScorerResults]) -> Iterator[_Measured]:
    for scorer in scorers:
        if scorer.quality is not None and scorer.scores is not None:
            yield _Measured(HEADS[scorer.title], scorer.name, scorer.quality, scorer.scores)


def _quality(scorers: Sequence[_Measured]) -> Section:
    """How well the reward models order held-out pairs, beside each other."""
    text = [f"{of.head}: {of.name}, on {of.quality.pairs} pairs about {of.quality.prompts} prompts." for of in scorers]
    text.append("The intervals of the first three numbers resample prompts with all their pairs, the others pairs.")
    rows = [[name, *(measure(scorer.quality) for scorer in scorers), what] for name, measure, what in _rows(scorers)]
    heads = [scorer.head for scorer in scorers]
    blocks: list[Block] = [Table(["", *heads, "what it is"], rows, "How well they order the pairs")]
    for head, _, quality, _ in scorers:
        if quality.ties or quality.truncated:
            cut = f"{quality.truncated or 0} pairs hold a response that was cut"
            blocks.append(Note(f"{head}: {quality.ties} pairs are ties, {cut}."))
    scores, margins = [_score_histogram(of) for of in scorers], [_margin_histogram(of) for of in scorers]
    if len(scorers) > 1:
        blocks += [Beside(scores), Beside(margins), Beside([_calibration(scorers)])]
    else:
        blocks.append(Beside([*scores, *margins, _calibration(scorers)]))
    if sources := [bars for scorer in scorers for bars in _by_source(scorer)]:
        blocks += [Beside(sources)] if len(sources) > 1 else sources
    head = "Reward models" if len(scorers) > 1 else scorers[0].head
    return Section(f"{head} on held-out pairs", blocks, "\n\n".join(text))


def _rows(scorers: Sequence[_Measured]) -> list[tuple[str, Callable[[RewardQuality], Quantity], str]]:
    length = _LENGTH if any(of.quality.length for of in scorers) else ()
    heads = _HEADS if any(of.quality.heads for of in scorers) else ()
    return [*_ORDER, *length, *heads]


def _of_heads(name: str) -> Callable[[RewardQuality], Quantity]:
    return lambda quality: getattr(quality.heads, name, None)


def _of_length(name: str) -> Callable[[RewardQuality], Quantity]:
    return lambda quality: getattr(quality.length, name, None)


_ORDER: tuple[tuple[str, Callable[[RewardQuality], Quantity], str], ...] = (
    ("pooled AUROC", lambda q: q.auroc, "a chosen response outscores a rejected one of any prompt"),
    ("pairwise accuracy", lambda q: q.accuracy, "the chosen response outscores the rejected one of its prompt"),
    ("margin AUROC", lambda q: q.auroc_margin, "flattering; never for a claim"),
    ("expected calibration error", lambda q: q.calibration.ece, "of sigmoid(margin), 20 bins over both orders"),
    ("after the best temperature", lambda q: q.calibration.ece_fitted, "fitted on these pairs, which favours it"),
    ("the best temperature", lambda q: q.calibration.temperature, "margins are divided by it; there may be none"),
    ("Brier score", lambda q: q.calibration.brier, "0 at best, 0.25 for a coin"),
    ("negative log-likelihood", lambda q: q.calibration.nll, "nats; 0.693 for a coin"),
)
_LENGTH = (
    ("longer wins", _of_length("longer_wins"), "accuracy of the rule that the longer response is better"),
    ("prefers the longer", _of_length("prefers_longer"), "share of its choices"),
    ("margin against length", _of_length("spearman"), "Spearman, within pairs"),
    ("accuracy, chosen is longer", _of_length("accuracy_chosen_longer"), "in tokens; of a function, in characters"),
    ("accuracy, chosen is shorter", _of_length("accuracy_chosen_shorter"), ""),
)
_HEADS = (
    ("heads", _of_heads("heads"), "of one reward model; the score is their mean"),
    ("spread of a score", _of_heads("spread"), "standard deviation over the heads, mean over responses"),
    ("spread of the margin, right order", _of_heads("spread_right"), "mean over pairs that the mean orders right"),
    ("spread of the margin, wrong order", _of_heads("spread_wrong"), "mean over the others: larger, if it knows doubt"),
    ("wrong pairs spread more", _of_heads("wrong_auroc"), "AUROC of the spread of the margin; 0.5: it says nothing"),
)


def _score_histogram(of: _Measured) -> Histogram:
    sides = [Distribution("chosen", of.scores.chosen.tolist()), Distribution("rejected", of.scores.rejected.tolist())]
    return Histogram(sides, "score", "responses", f"{of.head}: scores of chosen and rejected")


def _margin_histogram(of: _Measured) -> Histogram:
    margins, references = Distribution("margin", of.margins.tolist()), [Reference(0.0, "no preference")]
    return Histogram([margins], "chosen - rejected", "pairs", f"{of.head}: margins", references)


def _calibration(scorers: Sequence[_Measured]) -> Lines:
    return Lines(
        [Series(scorer.head, _reliability(scorer.margins)) for scorer in scorers],
        "confidence: sigmoid(|margin|)",
        "accuracy",
        "Reliability diagram: on the diagonal, a confidence is the accuracy",
        diagonal="calibrated",
        domain=(0.5, 1.0),
        range=(0.5, 1.0),
        spec=".1%",
        x_spec=".1%",
    )


def _reliability(margin: np.ndarray) -> list[Point]:
    """Accuracy against mean confidence, by equal parts of the pairs: one for every 40 of them, 10 at most."""
    by_confidence = np.argsort(np.abs(margin), kind="stable")
    points = []
    for part in np.array_split(margin[by_confidence], min(max(len(margin) // PAIRS_OF_A_POINT, 1), 10)):
        confidence = float((1 / (1 + np.exp(-np.abs(part)))).mean())
        points.append(Point(confidence, wilson(float(((part > 0) + 0.5 * (part == 0)).sum()), len(part))))
    return points


def _by_source(of: _Measured) -> Iterator[Bars]:
    all_of_them = of.quality.accuracy_by_source
    if len(all_of_them) < 2:
        return
    shown = _largest(all_of_them)
    bars = [Bar(name if len(name) <= 60 else f"{name[:59]}…", value) for name, value in shown.items()]
    more = "" if len(shown) == len(all_of_them) else " (all of them are in metrics.json)"
    yield Bars([BarGroup("", bars)], "pairs", f"{of.head}: accuracy by source{more}", [COIN])


def _largest(sources: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """The sources, by name; when they are many the largest alone, and all others together."""
    order = sorted(sources, key=lambda name: -sources[name].n)
    kept, others = order[:SOURCES_SHOWN], [sources[name] for name in order[SOURCES_SHOWN:]]
    if len(others) < 2:
        return dict(sources)
    count = sum(each.n for each in others)
    together = wilson(sum(each.value * each.n for each in others), count)
    return {name: sources[name] for name in sorted(kept)} | {f"{len(others)} other sources": together}


# ---- curves

SHOWN_CURVES = (
    ("train/reward", "val/reward"),
    ("train/kl", "val/kl"),
    ("train/response_length", "val/response_length"),
    ("train/entropy",),
    ("train/clip_fraction",),
    ("train/explained_variance",),
    ("train/loss", "val/loss"),
    ("train/accuracy", "val/accuracy"),
    ("val/auroc",),
    ("val/rewards/margins",),
)


def _curves(runs: Sequence[RunCurves]) -> Iterator[Block]:
    for run in runs:
        charts = []
        for names in SHOWN_CURVES:
            logged = {name: run.values[name] for name in names if run.values.get(name)}
            series = [Series(name, [Point(point.step, point.value) for point in of]) for name, of in logged.items()]
            if series:
                what = names[0].partition("/")[2]
                charts.append(Lines(series, "optimizer step", what, f"{run.name}: {what}"))
        if charts:
            yield Beside(charts)
