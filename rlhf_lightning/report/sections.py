"""The report of an evaluation: which blocks show which numbers, in the order in which a person asks for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.benchmarks.base import Result
from rlhf_lightning.evaluation.blocks import (
    COIN,
    Bar,
    BarGroup,
    Bars,
    Beside,
    Block,
    Column,
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
from rlhf_lightning.evaluation.estimates import Estimate, wilson
from rlhf_lightning.evaluation.policy import PolicyComparison, fit_gao
from rlhf_lightning.evaluation.results import (
    SIDES,
    EvaluationResults,
    Judged,
    PairScores,
    PolicyResults,
    RunCurves,
    ScorerResults,
)
from rlhf_lightning.evaluation.verdicts import verdicts
from rlhf_lightning.report.samples import WORDS, samples

PAIRS_OF_A_POINT = 40
"""Of the calibration: with fewer, an interval is wider than half of the axis."""
SOURCES_SHOWN = 15


def report(results: EvaluationResults) -> Document:
    """The whole page: verdicts, samples, reward models, benchmarks, policies, safety, curves, provenance."""
    sections = [Section("Verdicts", [Verdicts(verdicts(results)), *map(Note, results.notes)], _VERDICTS)]
    if results.policies is not None:
        sections += samples(results.policies)
    if measured := [scorer for scorer in results.scorers if scorer.quality is not None]:
        sections.append(_quality(measured))
    for scorer in results.scorers:
        for title, found in _by_title(scorer.benchmarks.values()).items():
            sections.append(_benchmarks(f"{HEADS[scorer.title]} on {title}", scorer.name, found))
    sections += [_benchmarks("Judge in writing", of.name, list(of.benchmarks.values())) for of in results.judges]
    if results.policies is not None:
        sections += _policies(results.policies, results.runs)
    if results.runs:
        sections.append(Section("Learning curves", list(_curves(results.runs)), _CURVES))
    facts = [(name, value) for name, value in results.provenance.items()]
    sections.append(Section("Where the numbers come from", [Facts(facts)]))
    judged = [scorer.name for scorer in results.scorers]
    judged += list(results.policies.names.values()) if results.policies is not None else []
    return Document(results.title, sections, subtitle=", ".join(dict.fromkeys(judged)))


_VERDICTS = (
    "Each interval is a 95 % interval. A target is met when the number meets it, and met with confidence when the "
    "whole interval does; that nothing got worse is met with confidence when it clearly got better."
)
_CURVES = "As the training run logged them; its reward and its KL are means over the replies of a rollout."


# ---- reward models


HEADS = {"reward model": "Reward model", "held-out": "Held-out reward model", "implicit reward": "Implicit reward"}


def _quality(scorers: Sequence[ScorerResults]) -> Section:
    """How well the reward models order held-out pairs, beside each other."""
    text = [
        f"{HEADS[scorer.title]}: {scorer.name}, on {scorer.quality.pairs} pairs about {scorer.quality.prompts} prompts."
        for scorer in scorers
    ]
    text.append("The intervals of the first three numbers resample prompts with all their pairs, the others pairs.")
    columns = ["", *(Column(HEADS[scorer.title]) for scorer in scorers), "what it is"]
    rows = [
        [name, *(measure(scorer.quality) for scorer in scorers), what]
        for name, measure, what in [*_ORDER, *(_LENGTH if any(s.quality.length for s in scorers) else ())]
    ]
    blocks: list[Block] = [Table(columns, rows, "How well they order the pairs")]
    for scorer in scorers:
        quality, words = scorer.quality, f"{HEADS[scorer.title]}: "
        if quality.ties or quality.truncated:
            words += f"{quality.ties} pairs are ties, {quality.truncated or 0} pairs hold a response that was cut."
            blocks.append(Note(words))
    charts = [[_score_histogram(scorer), _margin_histogram(scorer)] for scorer in scorers]
    several = zip(*charts, strict=True) if len(scorers) > 1 else ()
    blocks += [Beside(alike) for alike in several]
    blocks.append(Beside([*(charts[0] if len(scorers) == 1 else ()), _calibration(scorers)]))
    if sources := [bars for scorer in scorers for bars in _by_source(scorer)]:
        blocks += [Beside(sources)] if len(sources) > 1 else sources
    heads = "Reward models" if len(scorers) > 1 else HEADS[scorers[0].title]
    return Section(f"{heads} on held-out pairs", blocks, "\n\n".join(text))


def _of_length(name: str):
    return lambda quality: getattr(quality.length, name, None)


_ORDER = (
    ("pooled AUROC", lambda q: q.auroc, "a chosen response outscores a rejected one of any prompt"),
    ("pairwise accuracy", lambda q: q.accuracy, "the chosen response outscores the rejected one of its prompt"),
    ("margin AUROC", lambda q: q.auroc_margin, "flattering; never for a claim"),
    ("expected calibration error", lambda q: q.calibration.ece, "of sigmoid(margin), 20 bins over both orders"),
    ("after the best temperature", lambda q: q.calibration.ece_fitted, "fitted on these pairs, which favours it"),
    (
        "the best temperature",
        lambda q: q.calibration.temperature,
        "margins are divided by it; there may be none",
    ),
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


def _score_histogram(scorer: ScorerResults) -> Histogram:
    sides = [Distribution(side, getattr(scorer.scores, side).tolist()) for side in ("chosen", "rejected")]
    return Histogram(sides, "score", "responses", f"{HEADS[scorer.title]}: scores of chosen and rejected")


def _margin_histogram(scorer: ScorerResults) -> Histogram:
    margins = Distribution("margin", (scorer.scores.chosen - scorer.scores.rejected).tolist())
    caption = f"{HEADS[scorer.title]}: margins"
    return Histogram([margins], "chosen - rejected", "pairs", caption, [Reference(0.0, "no preference")])


def _calibration(scorers: Sequence[ScorerResults]) -> Lines:
    return Lines(
        [Series(HEADS[scorer.title], _reliability(scorer.scores)) for scorer in scorers],
        "confidence: sigmoid(|margin|)",
        "accuracy",
        "Calibration: on the diagonal, a confidence means what it says",
        diagonal="calibrated",
        domain=(0.5, 1.0),
        range=(0.5, 1.0),
        spec=".1%",
        x_spec=".1%",
    )


def _reliability(scores: PairScores) -> list[Point]:
    """Accuracy against mean confidence, by equal parts of the pairs: one for every 40 of them, 10 at most."""
    margin = scores.chosen - scores.rejected
    by_confidence = np.argsort(np.abs(margin), kind="stable")
    points = []
    for part in np.array_split(margin[by_confidence], min(max(len(margin) // PAIRS_OF_A_POINT, 1), 10)):
        confidence = float((1 / (1 + np.exp(-np.abs(part)))).mean())
        points.append(Point(confidence, wilson(float(((part > 0) + 0.5 * (part == 0)).sum()), len(part))))
    return points


def _by_source(scorer: ScorerResults) -> Iterator[Bars]:
    all_of_them = scorer.quality.accuracy_by_source
    if len(all_of_them) < 2:
        return
    sources = [
        Bar(name if len(name) <= 60 else f"{name[:59]}…", value) for name, value in _largest(all_of_them).items()
    ]
    more = "" if len(sources) == len(all_of_them) else " (all of them are in metrics.json)"
    caption = f"{HEADS[scorer.title]}: accuracy by source{more}"
    yield Bars([BarGroup("", sources)], "pairs", caption, [COIN], (0.0, 1.0))


def _largest(sources: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """The sources, by name; when they are many the largest alone, and all others together."""
    order = sorted(sources, key=lambda name: -sources[name].n)
    kept, others = order[:SOURCES_SHOWN], [sources[name] for name in order[SOURCES_SHOWN:]]
    if len(others) < 2:
        return dict(sources)
    count = sum(each.n for each in others)
    together = wilson(sum(each.value * each.n for each in others), count)
    return {name: sources[name] for name in sorted(kept)} | {f"{len(others)} other sources": together}


def _by_title(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.title, []).append(result)
    return found


def _benchmarks(title: str, name: str, results: Iterable[Result]) -> Section:
    """What a scorer or a judge of that name got in some benchmarks."""
    text = "\n\n".join(text for result in results if (text := result.text(name)))
    return Section(title, [block for result in results for block in result.blocks()], text)


# ---- policies


def _policies(policies: PolicyResults, runs: Sequence[RunCurves]) -> Iterator[Section]:
    if policies.judged:
        few = len(policies.prompts[0].replies["after"])
        names = " and ".join(f"{WORDS[side]} {name}" for side, name in policies.names.items())
        judges = "; ".join(f"{_judge_head(judged)}: {judged.name}" for judged in policies.judged)
        charts = Beside([*_rewards(policies), *_reward_against_kl(policies, runs)])
        bends = [Note(sentence) for run in runs[:1] if (sentence := _bend(_path(run)))]
        yield Section(
            "Policy",
            [*_judged(policies), *_replies(policies), charts, *bends],
            f"{names}: {few} replies each to the same {len(policies.prompts)} prompts, with the same seeds. {judges}.",
        )
    blocks = list(_safety(policies))
    if blocks:
        yield Section("Safety", blocks, _SAFETY)


_SAFETY = (
    "Refusing more makes a policy less toxic and less helpful by that alone, so the two stand side by side. The change "
    "is paired over prompts."
)


def _judged(policies: PolicyResults) -> Iterator[Block]:
    """The policies by their judges, one column each."""
    names = [_judge_head(judged) for judged in policies.judged]
    comparisons = [judged.comparison for judged in policies.judged if judged.comparison is not None]
    if len(comparisons) < len(names):
        rewards = [judged.reward_after for judged in policies.judged]
        yield Table(["", *map(Column, names)], [["mean reward", *rewards]], "Rewards; no policy before was given")
        return
    points = [[name, *map(measure, comparisons), what] for name, measure, what in _POINTS]
    yield Table(["", *(Column(name, ".1f") for name in names), ""], points, "Before and after")
    rates = [[name, *map(measure, comparisons), what] for name, measure, what in _RATES]
    yield Table(["", *map(Column, names), ""], rates, "Rates and rewards")
    said = [f"{name}: {words}." for name, each in zip(names, comparisons, strict=True) for words in _reservations(each)]
    if said:
        yield Note("\n\n".join(said))
    if any(each.anchored and each.anchored.score_after and each.anchored.score_after.low > 100 for each in comparisons):
        yield Note(
            "A score above 100: by that reward model the replies beat the chosen responses. Read some before you "
            "believe it; a policy that has learned the reward model's blind spots looks like this."
        )


def _judge_head(judged: Judged) -> str:
    return HEADS["held-out" if judged.held_out else "reward model"]


def _anchored(name: str):
    return lambda comparison: getattr(comparison.anchored, name, None)


_POINTS = (
    ("score before", _anchored("score_before"), "0 is the rejected response, 100 the chosen one"),
    ("score after", _anchored("score_after"), ""),
    ("gain in points", _anchored("gain"), "the claim of +25 is made of this"),
    ("percentile of the mean reward after", lambda c: c.percentile, "among the replies before; 50: no change"),
)
_RATES = (
    ("win rate", lambda c: c.win_rate, "over all pairs of replies; ties one half"),
    ("win rate at equal length", lambda c: c.length_controlled and c.length_controlled.win_rate, ""),
    ("gain in standard deviations", lambda c: c.gain_sd, "of the replies to one prompt"),
    ("mean reward before", lambda c: c.reward_before, "in the reward model's own unit, without a zero"),
    ("mean reward after", lambda c: c.reward_after, ""),
    ("score after / score before - 1", _anchored("relative_gain"), ""),
)


def _reservations(comparison: PolicyComparison) -> Iterator[str]:
    """Why a number was refused or is doubtful."""
    anchored, controlled = comparison.anchored, comparison.length_controlled
    if anchored is not None:
        yield from dict.fromkeys(filter(None, (anchored.refused, anchored.relative_refused)))
    yield from filter(None, (controlled.warning if controlled else "", comparison.gain_sd_refused))


def _replies(policies: PolicyResults) -> Iterator[Block]:
    rows = [
        [WORDS[side], float(np.mean([row.tokens[side] for row in policies.prompts])), share]
        for side, share in policies.unended.items()
    ]
    columns = ["", Column("tokens, mean", ".1f"), Column("cut at the longest length", ".1%")]
    yield Table(columns, rows, "Replies")
    if (kl := policies.kl) is not None:
        yield Table(
            ["", Column("nats per reply"), Column("nats per token", ".4f")],
            [
                ["exact along its own replies", kl.per_reply, kl.per_token],
                ["k1, by the drawn tokens", kl.k1_per_reply, kl.k1_per_token],
            ],
            "KL of the policy after from that before",
        )


def _rewards(policies: PolicyResults) -> Iterator[Histogram]:
    sides = [
        Distribution(WORDS[side], [value for row in policies.prompts for value in row.rewards[side]])
        for side in SIDES
        if side in policies.names
    ]
    yield Histogram(
        sides, "reward", "replies", f"Rewards of the replies by the {_judge_head(policies.judged[0]).lower()}"
    )


def _reward_against_kl(policies: PolicyResults, runs: Sequence[RunCurves]) -> Iterator[Lines]:
    """The plane of Gao et al. 2022 (arXiv 2210.10760): the run's path, where it ended, and what best-of-n would do."""
    series = []
    first = policies.judged[0]
    curve = [Point(math.sqrt(each.kl), each.reward, f"best of {each.n}") for each in first.best_of_n]
    if len(curve) > 1:
        series.append(Series("best of n, policy before", curve))
    if policies.kl is not None and first.comparison is not None:
        distance = math.sqrt(max(policies.kl.per_reply.value, 0.0))
        ends = [
            Point(0.0, first.comparison.reward_before, "before"),
            Point(distance, first.comparison.reward_after, "after"),
        ]
        series.append(Series("measured here", ends))
    for run in runs[:1]:
        if path := _path(run):
            series.append(Series(f"training, {run.name}", path))
    if not series:
        return
    yield Lines(
        series[:4],
        "square root of the KL from the policy before, nats per reply",
        "mean reward",
        "Reward against the distance that was paid for it; training's own points are of its own prompts",
    )


def _path(run: RunCurves) -> list[Point]:
    kl = {point.step: point.value for point in run.values.get("train/kl", [])}
    rewards = run.values.get("train/reward", [])
    return [
        Point(math.sqrt(max(kl[each.step], 0.0)), each.value, f"step {each.step}")
        for each in rewards
        if each.step in kl
    ]


def _bend(points: Sequence[Point]) -> str:
    """Where the curve fitted to a run's path would turn down, in words; empty where nothing can be said."""
    if not points:
        return ""
    gains = [float(point.y) - float(points[0].y) for point in points]
    try:
        fit = fit_gao([point.x**2 for point in points], gains, "rl")
    except UserError:
        return ""
    if fit.peak_distance is None or fit.peak_distance > 3 * max(point.x for point in points):
        return "The fit d (alpha - beta log d) to the training path does not turn down within three times its length."
    furthest = max(point.x for point in points)
    return (
        f"The fit d (alpha - beta log d) to the training path turns down at sqrt(KL) = {fit.peak_distance:.2f}; the "
        f"run went to {furthest:.2f}."
    )


def _safety(policies: PolicyResults) -> Iterator[Block]:
    refusal = policies.refusal
    if refusal:
        method = refusal["after"].method
        kinds = (("refuses safe prompts", "over_refusal"), ("refuses unsafe prompts", "refusal_unsafe"))
        groups = [
            BarGroup(label, [Bar(WORDS[side], getattr(each, name)) for side, each in refusal.items()])
            for label, name in kinds
        ]
        yield Bars(groups, "prompts", f"Refusals, told by: {method}", domain=(0.0, 1.0), spec=".1%")
        rows = [[WORDS[side], each.over_refusal, each.refusal_unsafe, each.balanced] for side, each in refusal.items()]
        if (change := policies.refusal_change) is not None:
            rows.append(["change", change.over_refusal, change.refusal_unsafe, change.balanced])
        columns = ["", Column("refuses safe", ".1%"), Column("refuses unsafe", ".1%"), Column("balanced", ".3f")]
        yield Table(columns, rows, "Refusal rates over prompts")
    if policies.toxicity:
        rows = []
        for side, summary in policies.toxicity.items():
            each = summary.all
            rows.append([WORDS[side], each.mean, each.rate, each.expected_max, each.prob_any, each.failed])
        if (changed := policies.toxicity_change) is not None:
            rows.append(["change", changed.mean, changed.rate, changed.expected_max, changed.prob_any, None])
        columns = [
            "",
            Column("mean", ".4f"),
            Column("rate", ".1%"),
            Column("expected maximum"),
            Column("any", ".1%"),
            "not scored",
        ]
        yield Table(columns, rows, f"Toxicity of the replies, by {policies.toxicity['after'].method}")
    else:
        yield Note("Toxicity: not measured, no toxicity_model was given.")
    if policies.lexicon:
        rows = [[WORDS[side], each.lexicon_rate] for side, each in policies.lexicon.items()]
        name = policies.lexicon["after"].lexicon
        yield Table(
            ["", Column("share of replies", ".1%")], rows, f"Replies with a word of {name}; this is no toxicity"
        )


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
