"""The report's sections on a policy: rewards before and after, what they cost in KL, refusals and toxicity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.blocks import (
    Bar,
    BarGroup,
    Bars,
    Beside,
    Block,
    Column,
    Distribution,
    Histogram,
    Lines,
    Note,
    Point,
    Section,
    Series,
    Table,
)
from rlhf_lightning.evaluation.estimates import Quantity
from rlhf_lightning.evaluation.policy import PolicyComparison, fit_gao
from rlhf_lightning.evaluation.refusal import RefusalChange, RefusalSummary
from rlhf_lightning.evaluation.results import Judged, PolicyResults, RunCurves
from rlhf_lightning.report.wording import HEADS


def policy_sections(policies: PolicyResults, runs: Sequence[RunCurves]) -> Iterator[Section]:
    """The policy by its judges, and its safety; `runs` are training's own curves."""
    if policies.judged:
        few = len(policies.prompts[0].replies["after"])
        names = " and ".join(f"{policies.titles[side]} {name}" for side, name in policies.names.items())
        judges = "; ".join(f"{_head(judged)}: {judged.name}" for judged in policies.judged)
        path = _path(runs[0]) if runs else []
        series = [*_best_of_n(policies.judged[0]), *_measured_here(policies)]
        series += [Series(f"training, {runs[0].name}", path)] if path else []
        blocks = [*_judged(policies), *_responses(policies), Beside([_rewards(policies), *_reward_against_kl(series)])]
        blocks += [Note(sentence)] if (sentence := _bend(path)) else []
        prompts = f"the same {len(policies.prompts)} prompts, with the same seeds"
        text = f"{names}: {few} responses each to {prompts}. {judges}."
        yield Section("Policy", blocks, text)
    yield Section("Safety", [*_refusal(policies), *_toxicity(policies)], _SAFETY)


_SAFETY = (
    "Refusing more makes a policy less toxic and less helpful by that alone, so the two stand side by side. The change "
    "is paired over prompts."
)


def _judged(policies: PolicyResults) -> Iterator[Block]:
    """The policies by their judges, one column each."""
    names = [_head(judged) for judged in policies.judged]
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
            "A score above 100: by that reward model the responses beat the chosen ones. Read some before you believe "
            "it; a policy that has learned the reward model's blind spots looks like this."
        )


def _head(judged: Judged) -> str:
    return HEADS["held-out" if judged.held_out else "reward model"]


def _anchored(name: str) -> Callable[[PolicyComparison], Quantity]:
    return lambda comparison: getattr(comparison.anchored, name, None)


_POINTS: tuple[tuple[str, Callable[[PolicyComparison], Quantity], str], ...] = (
    ("score before", _anchored("score_before"), "0 is the rejected response, 100 the chosen one"),
    ("score after", _anchored("score_after"), ""),
    ("gain in points", _anchored("gain"), "the claim of +25 is made of this"),
    ("percentile of the mean reward after", lambda c: c.percentile, "among the responses before; 50: no change"),
)
_RATES: tuple[tuple[str, Callable[[PolicyComparison], Quantity], str], ...] = (
    ("win rate", lambda c: c.win_rate, "over all pairs of responses; ties one half"),
    ("win rate at equal length", lambda c: c.length_controlled.win_rate if c.length_controlled else None, ""),
    ("gain in standard deviations", lambda c: c.gain_sd, "of the responses to one prompt"),
    ("mean reward before", lambda c: c.reward_before, "in the reward model's own unit, without a zero"),
    ("mean reward after", lambda c: c.reward_after, ""),
    ("gain in mean reward", lambda c: c.reward_gain, "over the same prompts"),
    ("score after / score before - 1", _anchored("relative_gain"), ""),
)


def _reservations(comparison: PolicyComparison) -> Iterator[str]:
    """Why a number was refused or is doubtful."""
    anchored, controlled = comparison.anchored, comparison.length_controlled
    if anchored is not None:
        yield from dict.fromkeys(filter(None, (anchored.refused, anchored.relative_refused)))
    yield from filter(None, (controlled.warning if controlled else "", comparison.gain_sd_refused))


def _responses(policies: PolicyResults) -> Iterator[Block]:
    rows = [
        (policies.titles[side], float(np.mean([row.tokens[side] for row in policies.prompts])), share)
        for side, share in policies.unended.items()
    ]
    yield Table(["", Column("tokens, mean", ".1f"), Column("cut at the longest length", ".1%")], rows, "Responses")
    if (kl := policies.kl) is not None:
        yield Table(
            ["", Column("nats per response"), Column("nats per token", ".4f")],
            [
                ["exact along its own responses", kl.per_reply, kl.per_token],
                ["k1, by the sampled tokens", kl.k1_per_reply, kl.k1_per_token],
            ],
            "KL of the policy after from that before",
        )


def _rewards(policies: PolicyResults) -> Histogram:
    sides = [
        Distribution(policies.titles[side], [value for row in policies.prompts for value in row.rewards[side]])
        for side in policies.names
    ]
    judge = _head(policies.judged[0]).lower()
    return Histogram(sides, "reward", "responses", f"Rewards of the responses by the {judge}")


# ---- reward against KL: the plane of Gao et al. 2022 (arXiv 2210.10760)


def _best_of_n(judged: Judged) -> Iterator[Series]:
    curve = [Point(math.sqrt(each.kl), each.reward, f"best of {each.n}") for each in judged.best_of_n]
    if len(curve) > 1:
        yield Series("best of n" + ("" if judged.comparison is None else ", policy before"), curve)


def _measured_here(policies: PolicyResults) -> Iterator[Series]:
    comparison = policies.judged[0].comparison
    if policies.kl is not None and comparison is not None:
        distance = math.sqrt(max(policies.kl.per_reply.value, 0.0))
        ends = [Point(0.0, comparison.reward_before, "before"), Point(distance, comparison.reward_after, "after")]
        yield Series("measured here", ends)


def _reward_against_kl(series: Sequence[Series]) -> Iterator[Lines]:
    if series:
        yield Lines(
            series,
            "square root of the KL from the policy before, nats per response",
            "mean reward",
            "Reward against the distance that was paid for it; training's own points are of its own prompts",
        )


def _path(run: RunCurves) -> list[Point]:
    """Where training went."""
    kl = {point.step: point.value for point in run.values.get("train/kl", [])}
    rewards = run.values.get("train/reward", [])
    return [
        Point(math.sqrt(max(kl[each.step], 0.0)), each.value, f"step {each.step}")
        for each in rewards
        if each.step in kl
    ]


def _bend(path: Sequence[Point]) -> str:
    """Where the curve fitted to a run's path would turn down, in words; empty where nothing can be said."""
    rewards = [point.y for point in path if isinstance(point.y, float)]
    try:
        fit = fit_gao([point.x**2 for point in path], [reward - rewards[0] for reward in rewards])
    except UserError:
        return ""
    furthest = max(point.x for point in path)
    if fit.peak_distance is None or fit.peak_distance > 3 * furthest:
        return "The fit d (alpha - beta log d) to the training path does not turn down within three times its length."
    return (
        f"The fit d (alpha - beta log d) to the training path turns down at sqrt(KL) = {fit.peak_distance:.2f}; the "
        f"run went to {furthest:.2f}."
    )


# ---- safety


def _refusal(policies: PolicyResults) -> Iterator[Block]:
    if not (refusal := policies.refusal):
        return
    groups = [
        BarGroup(label, [Bar(policies.titles[side], getattr(each, name)) for side, each in refusal.items()])
        for label, name in (("refuses safe prompts", "over_refusal"), ("refuses unsafe prompts", "refusal_unsafe"))
    ]
    method = refusal["after"].method
    yield Bars(groups, "prompts", f"Refusals, detected by: {method}", spec=".1%")
    lines: list[tuple[str, RefusalSummary | RefusalChange]] = [
        (policies.titles[side], of) for side, of in refusal.items()
    ]
    lines += [] if policies.refusal_change is None else [("change", policies.refusal_change)]
    rows = [(name, each.over_refusal, each.refusal_unsafe, each.balanced) for name, each in lines]
    columns = (Column("refuses safe", ".1%"), Column("refuses unsafe", ".1%"), "balanced")
    yield Table(["", *columns], rows, "Refusal rates over prompts")


def _toxicity(policies: PolicyResults) -> Iterator[Block]:
    if policies.toxicity:
        rows: list[list[str | Quantity]] = []
        for side, summary in policies.toxicity.items():
            each = summary.all
            rows.append([policies.titles[side], each.mean, each.rate, each.expected_max, each.prob_any, each.failed])
        if (changed := policies.toxicity_change) is not None:
            rows.append(["change", changed.mean, changed.rate, changed.expected_max, changed.prob_any, None])
        numbers = [Column("mean", ".4f"), Column("rate", ".1%"), Column("expected maximum"), Column("any", ".1%")]
        method = policies.toxicity["after"].method
        yield Table(["", *numbers, "not scored"], rows, f"Toxicity of the responses, by {method}")
    else:
        yield Note("Toxicity: not measured, no toxicity_model was given.")
    if policies.lexicon:
        rates = [(policies.titles[side], found.lexicon_rate) for side, found in policies.lexicon.items()]
        caption = f"Responses with a word of {policies.lexicon['after'].lexicon}; this is no toxicity"
        yield Table(["", Column("share of responses", ".1%")], rates, caption)
