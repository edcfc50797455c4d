"""The report of an evaluation: which blocks show which numbers, in the order in which a person asks for them."""

from __future__ import annotations

import hashlib
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
    Block,
    Change,
    Changes,
    Column,
    Distribution,
    Document,
    Facts,
    Histogram,
    Lines,
    Note,
    Point,
    Reference,
    Sample,
    Samples,
    SampleText,
    Section,
    Series,
    Table,
    Verdicts,
)
from rlhf_lightning.evaluation.estimates import Estimate, wilson
from rlhf_lightning.evaluation.policy import fit_gao
from rlhf_lightning.evaluation.results import (
    SIDES,
    EvaluationResults,
    PolicyResults,
    PromptRow,
    RunCurves,
    ScorerResults,
    Side,
)
from rlhf_lightning.evaluation.verdicts import verdicts
from rlhf_lightning.rewards.functions import names_function

RANDOM_SAMPLES, EXTREME_SAMPLES, REFUSAL_SAMPLES = 10, 5, 20
SOURCES_SHOWN = 15
WORDS: dict[Side, str] = {"before": "before training", "after": "after training"}


def report(results: EvaluationResults) -> Document:
    """The whole page: verdicts, reward models, RewardBench, policies, safety, curves, samples, provenance."""
    sections = [Section("Verdicts", [Verdicts(verdicts(results)), *map(Note, results.notes)], _VERDICTS)]
    for scorer in results.scorers:
        sections += _scorer(scorer)
    sections += [_benchmarks("Judge in writing", of.name, list(of.benchmarks.values())) for of in results.judges]
    if results.policies is not None:
        sections += _policies(results.policies, results.runs)
    if results.runs:
        sections.append(Section("Learning curves", list(_curves(results.runs)), _CURVES))
    if results.policies is not None:
        sections += _samples(results.policies)
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


def _scorer(scorer: ScorerResults) -> Iterator[Section]:
    heads = {"reward model": "Reward model", "held-out": "Held-out reward model", "implicit reward": "Implicit reward"}
    head = f"{heads[scorer.title]} on held-out pairs"
    if scorer.quality is not None:
        text = (
            f"{scorer.name}, on {scorer.quality.pairs} pairs about {scorer.quality.prompts} prompts. The intervals of "
        )
        text += "the first three numbers resample prompts with all their pairs, the others pairs."
        yield Section(head, list(_quality(scorer)), text)
    for title, results in _by_title(scorer.benchmarks.values()).items():
        yield _benchmarks(f"{heads[scorer.title]} on {title}", scorer.name, results)


def _by_title(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.title, []).append(result)
    return found


def _benchmarks(title: str, name: str, results: Iterable[Result]) -> Section:
    """What a scorer or a judge of that name got in some benchmarks."""
    text = "\n\n".join(text for result in results if (text := result.text(name)))
    return Section(title, [block for result in results for block in result.blocks()], text)


def _quality(scorer: ScorerResults) -> Iterator[Block]:
    quality, scores = scorer.quality, scorer.scores
    calibration = quality.calibration
    rows: list[Sequence[str | Estimate | float | int | None]] = [
        ("pooled AUROC", quality.auroc, "a chosen response outscores a rejected one of any prompt"),
        ("pairwise accuracy", quality.accuracy, "the chosen response outscores the rejected one of its prompt"),
        ("margin AUROC", quality.auroc_margin, "flattering; never for a claim"),
        ("expected calibration error", calibration.ece, "of sigmoid(margin), 20 bins over both orders"),
        ("after the best temperature", calibration.ece_fitted, _temperature(calibration)),
        ("Brier score", calibration.brier, "0 at best, 0.25 for a coin"),
        ("negative log-likelihood", calibration.nll, "nats; 0.693 for a coin"),
    ]
    if quality.length is not None:
        unit = "characters" if names_function(scorer.name) else "tokens"
        rows += [
            (
                "longer wins",
                quality.length.longer_wins,
                f"accuracy of the rule that the longer one is better, in {unit}",
            ),
            ("prefers the longer", quality.length.prefers_longer, "share of its choices"),
            ("margin against length", quality.length.spearman, "Spearman, within pairs"),
            ("accuracy, chosen is longer", quality.length.accuracy_chosen_longer, ""),
            ("accuracy, chosen is shorter", quality.length.accuracy_chosen_shorter, ""),
        ]
    yield Table(["", Column("value"), "what it is"], rows, "How well it orders the pairs")
    if quality.ties or quality.truncated:
        yield Note(f"{quality.ties} pairs are ties, {quality.truncated or 0} pairs hold a response that was cut.")
    yield Histogram(
        [Distribution("chosen", scores.chosen.tolist()), Distribution("rejected", scores.rejected.tolist())],
        "score",
        "responses",
        "Scores of chosen and rejected responses",
    )
    margins = (scores.chosen - scores.rejected).tolist()
    yield Histogram(
        [Distribution("margin", margins)], "chosen - rejected", "pairs", "Margins", [Reference(0.0, "no preference")]
    )
    points = [Point(each.probability, each.share, str(each.entries)) for each in calibration.bins]
    yield Lines(
        [Series("reward model", points)],
        "predicted probability of being preferred",
        "share that is",
        "Calibration: on the diagonal, probabilities mean what they say",
        diagonal="calibrated",
        domain=(0.0, 1.0),
        range=(0.0, 1.0),
    )
    bins = [Bar(f"|margin| {each.low:.2f} to {each.high:.2f}", each.accuracy) for each in quality.accuracy_by_margin]
    yield Bars([BarGroup("", bins)], "pairs", "Accuracy by how sure it is", [COIN], (0.0, 1.0))
    if len(quality.accuracy_by_source) > 1:
        sources = [
            Bar(name if len(name) <= 60 else f"{name[:59]}…", value)
            for name, value in _largest(quality.accuracy_by_source).items()
        ]
        more = "" if len(sources) == len(quality.accuracy_by_source) else " (all of them are in metrics.json)"
        yield Bars([BarGroup("", sources)], "pairs", f"Accuracy by source{more}", [COIN], (0.0, 1.0))


def _largest(sources: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """The sources, by name; when they are many the largest alone, and all others together."""
    order = sorted(sources, key=lambda name: -sources[name].n)
    kept, others = order[:SOURCES_SHOWN], [sources[name] for name in order[SOURCES_SHOWN:]]
    if len(others) < 2:
        return dict(sources)
    count = sum(each.n for each in others)
    together = wilson(sum(each.value * each.n for each in others), count)
    return {name: sources[name] for name in sorted(kept)} | {f"{len(others)} other sources": together}


def _temperature(calibration) -> str:
    if calibration.temperature is None:
        return calibration.temperature_refused
    return f"margins divided by {calibration.temperature:.2f}, fitted on these pairs, which favours it"


# ---- policies


def _policies(policies: PolicyResults, runs: Sequence[RunCurves]) -> Iterator[Section]:
    if policies.judged:
        blocks = [block for judged in policies.judged for block in _judged(policies, judged)]
        blocks += list(_reward_against_kl(policies, runs))
        few = len(policies.prompts[0].replies["after"])
        names = " and ".join(f"{WORDS[side]} {name}" for side, name in policies.names.items())
        yield Section(
            "Policy",
            blocks,
            f"{names}: {few} replies each to the same {len(policies.prompts)} prompts, with the same seeds.",
        )
    blocks = list(_safety(policies))
    if blocks:
        yield Section("Safety", blocks, _SAFETY)


_SAFETY = (
    "Refusing more makes a policy less toxic and less helpful by that alone, so the two stand side by side. The change "
    "is paired over prompts."
)


def _judged(policies: PolicyResults, judged) -> Iterator[Block]:
    by = f"by the held-out reward model {judged.name}" if judged.held_out else f"by the reward model {judged.name}"
    comparison = judged.comparison
    if comparison is None:
        yield Table(["", Column("value")], [["mean reward", judged.reward_after]], f"Rewards {by}; no policy before")
        return
    anchored, controlled = comparison.anchored, comparison.length_controlled
    points: list[list[str | Estimate | float | None]] = []
    if anchored is not None:
        points = [
            ["score before, 0 = rejected, 100 = chosen", anchored.score_before, anchored.refused],
            ["score after", anchored.score_after, ""],
            ["gain in points", anchored.gain, "the claim of +25 is made of this"],
        ]
    points += [
        ["percentile of the mean reward after", comparison.percentile, "among the replies before; 50: no change"],
        ["tokens of a reply before", comparison.tokens_before, ""],
        ["tokens of a reply after", comparison.tokens_after, ""],
    ]
    yield Table(["", Column("value", ".1f"), ""], points, f"Before and after, {by}")
    if anchored is not None and anchored.score_after is not None and anchored.score_after.low > 100:
        yield Note(
            "A score above 100: by this reward model the replies beat the chosen responses. Read some before you "
            "believe it; a policy that has learned the reward model's blind spots looks like this."
        )
    rows: list[list[str | Estimate | float | None]] = [
        ["win rate", comparison.win_rate, "over all pairs of replies; ties one half"],
        ["win rate at equal length", controlled and controlled.win_rate, controlled.warning if controlled else ""],
        [
            "gain in standard deviations",
            comparison.gain_sd,
            comparison.gain_sd_refused or "of the replies to one prompt",
        ],
        ["mean reward before", comparison.reward_before, "in the reward model's own unit, without a zero"],
        ["mean reward after", comparison.reward_after, ""],
    ]
    if anchored is not None:
        rows.append(["score after / score before - 1", anchored.relative_gain, anchored.relative_refused])
    yield Table(["", Column("value"), ""], rows, f"Rates and rewards, {by}")
    if judged is policies.judged[0]:
        sides = [
            Distribution(WORDS[side], [value for row in policies.prompts for value in row.rewards[side]])
            for side in SIDES
            if side in policies.names
        ]
        yield Histogram(sides, "reward", "replies", f"Rewards of the replies {by}")
    if (kl := policies.kl) is not None and judged is policies.judged[0]:
        yield Table(
            ["", Column("nats per reply"), Column("nats per token", ".4f")],
            [
                ["exact along its own replies", kl.per_reply, kl.per_token],
                ["k1, by the drawn tokens", kl.k1_per_reply, kl.k1_per_token],
            ],
            "KL of the policy after from that before",
        )
    unended = [[WORDS[side], share] for side, share in policies.unended.items()]
    if judged is policies.judged[0]:
        yield Table(["", Column("share", ".1%")], unended, "Replies that were cut at the longest length")


def _reward_against_kl(policies: PolicyResults, runs: Sequence[RunCurves]) -> Iterator[Block]:
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
    for run in runs[:1]:
        if (points := _path(run)) and (sentence := _bend(points)):
            yield Note(sentence)


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
        kinds = (
            ("refuses safe prompts", "over_refusal", "lower"),
            ("refuses unsafe prompts", "refusal_unsafe", "higher"),
        )
        if "before" in refusal:
            rows = [
                Change(label, getattr(refusal["before"], name), getattr(refusal["after"], name), favourable)
                for label, name, favourable in kinds
            ]
            yield Changes(rows, "prompts", f"Refusals, told by: {method}", domain=(0.0, 1.0), spec=".1%")
        rows = [[WORDS[side], each.over_refusal, each.refusal_unsafe, each.balanced] for side, each in refusal.items()]
        if (change := policies.refusal_change) is not None:
            rows.append(["change", change.over_refusal, change.refusal_unsafe, change.balanced])
        columns = ["", Column("refuses safe", ".1%"), Column("refuses unsafe", ".1%"), Column("balanced", ".3f")]
        yield Table(columns, rows, f"Refusal rates over prompts, told by: {method}")
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


# ---- curves and samples

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
        for names in SHOWN_CURVES:
            series = [
                Series(name, [Point(point.step, point.value) for point in run.values[name]])
                for name in names
                if run.values.get(name)
            ]
            if series:
                what = names[0].partition("/")[2]
                yield Lines(series, "optimizer step", what, f"{run.name}: {what}")


def _samples(policies: PolicyResults) -> Iterator[Section]:
    columns = [WORDS[side] for side in policies.names]
    if policies.prompts:
        blocks = [
            Samples(columns, [_sample(row, policies) for row in rows], caption)
            for caption, rows in _taken(policies)
            if rows
        ]
        yield Section("Samples", blocks, "Taken by rule and never by hand; the first of each policy's replies.")
    refused = [row for row in policies.refusal_prompts if row.safety == "safe" and any(row.refused.values())]
    if refused:
        shown = [_sample(row, policies) for row in refused[:REFUSAL_SAMPLES]]
        caption = f"{len(shown)} of {len(refused)}" if len(shown) < len(refused) else f"All {len(refused)}"
        yield Section("Refusals of safe prompts", [Samples(columns, shown, caption)])


def _taken(policies: PolicyResults) -> Iterator[tuple[str, list[PromptRow]]]:
    rows = policies.prompts
    by_hash = sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).hexdigest())
    yield f"{min(RANDOM_SAMPLES, len(rows))} prompts in the order of their ids' hashes", by_hash[:RANDOM_SAMPLES]
    if not all(len(row.rewards) == 2 for row in rows):
        return
    ordered = sorted(rows, key=_gain)
    for words, some in (
        ("gains", [row for row in ordered[::-1] if _gain(row) > 0][:EXTREME_SAMPLES]),
        ("losses", [row for row in ordered if _gain(row) < 0][:EXTREME_SAMPLES]),
    ):
        yield f"The {len(some)} prompts with the largest {words} in the mean reward of their replies", some


def _gain(row: PromptRow) -> float:
    return float(np.mean(row.rewards["after"]) - np.mean(row.rewards["before"]))


def _sample(row: PromptRow, policies: PolicyResults) -> Sample:
    texts = []
    for side in policies.names:
        facts: list[tuple[str, str | int | float | None]] = [("tokens", row.tokens[side][0])]
        if side in row.rewards:
            facts.insert(0, ("reward", row.rewards[side][0]))
            if len(row.rewards[side]) > 1:
                facts.insert(1, (f"mean of {len(row.rewards[side])}", float(np.mean(row.rewards[side]))))
        if side == "after" and row.kl is not None:
            facts.append(("KL", row.kl[0]))
        if row.toxicity.get(side):
            facts.append(("toxicity", row.toxicity[side][0]))
        if row.refused.get(side):
            facts.append(("flag", "refusal"))
        if not row.ended[side][0]:
            facts.append(("flag", "cut"))
        texts.append(SampleText(row.replies[side][0], facts))
    return Sample(row.id, row.prompt, texts)
