"""What an evaluation prints when it is done."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from rich.table import Table

from rlhf_lightning.evaluation.blocks import Verdict
from rlhf_lightning.evaluation.estimates import Estimate, interval_of, value_of
from rlhf_lightning.evaluation.results import EvaluationResults, PolicyResults
from rlhf_lightning.evaluation.verdicts import asked
from rlhf_lightning.terminal import Terminal, say


def print_summary(results: EvaluationResults) -> None:
    """The verdicts as a table, a line for all else that was measured, and the notes, on standard output."""
    console = Terminal(soft_wrap=False, width=max(shutil.get_terminal_size((110, 24)).columns, 80))
    table = Table(title="verdicts", title_justify="left")
    for column, justify in (
        ("target", "left"),
        ("value", "right"),
        ("95 % interval, or why not", "right"),
        ("verdict", "left"),
    ):
        table.add_column(column, justify=justify)
    for verdict in asked(results):
        table.add_row(verdict.target, *_figures(verdict), verdict.outcome)
    if table.rows:
        console.print(table)
    for line in _scores(results):
        say(line)
    for note in results.notes:
        say(note)


def _scores(results: EvaluationResults) -> list[str]:
    """What no verdict says: the other scorers, the policy by the held-out one, and the benchmarks, a line each."""
    lines = []
    for scorer in results.scorers:
        if (quality := scorer.quality) is not None:
            line = f"{scorer.title}: pooled AUROC {quality.auroc.value:.3f}, accuracy {quality.accuracy.value:.3f}"
            if (rounding := scorer.rounding) is not None:
                line += f"; {rounding.dtype}, rms error of a score {rounding.rms:.2g} against sd {rounding.sd:.2g}"
            lines.append(line)
        lines += [f"{scorer.title}: {line}" for result in scorer.benchmarks.values() if (line := result.summary())]
    if results.policies is not None:
        lines += _of_policies(results.policies)
    for judged in results.policies.judged if results.policies is not None else ():
        if judged.held_out and (comparison := judged.comparison) is not None:
            gain = comparison.anchored.gain if comparison.anchored is not None else None
            points = "" if gain is None else f"{gain.value:+.1f} points ({gain.low:+.1f} to {gain.high:+.1f})"
            gained = points and f"gains {points} and "
            lines.append(f"held-out: the policy {gained}wins {comparison.win_rate.value:.3f} of the comparisons")
    for judge in results.judges:
        lines += [f"judge: {line}" for result in judge.benchmarks.values() if (line := result.summary())]
    return lines


def _of_policies(policies: PolicyResults) -> Iterator[str]:
    """What no verdict says: rewards on a scorer's own scale, and all of a policy alone."""
    for judged in policies.judged:
        who = "held-out reward" if judged.held_out else "reward"
        if (comparison := judged.comparison) is None:
            yield f"policy: mean {who} {_with_ends(judged.reward_after, '.3f')}, by {judged.name}"
        elif comparison.anchored is None:
            gain = _with_ends(comparison.reward_gain, "+.3f")
            ends = f"{comparison.reward_before.value:.3f} before, {comparison.reward_after.value:.3f} after"
            yield f"{who}: {gain} on the scale of {judged.name}: {ends}"
    if "before" in policies.names:
        return
    if (refusal := policies.refusal.get("after")) is not None:
        for name, rate in (("unsafe", refusal.refusal_unsafe), ("safe", refusal.over_refusal)):
            if rate is not None:
                yield f"policy: refuses {_with_ends(rate, '.1%')} of {rate.n} {name} prompts"
    if (toxicity := policies.toxicity.get("after")) is not None:
        yield f"policy: mean toxicity {_with_ends(toxicity.all.mean, '.4f')}"
    if (unended := policies.unended.get("after")) is not None:
        yield f"policy: {_with_ends(unended, '.1%')} of the responses were cut at the longest length"


def _with_ends(value: Estimate, spec: str) -> str:
    return f"{value.value:{spec}} ({value.low:{spec}} to {value.high:{spec}})"


def _figures(verdict: Verdict) -> tuple[str, str]:
    value, interval = value_of(verdict.value), interval_of(verdict.value)
    if value is None:
        return "", verdict.reason
    ends = "" if interval is None else " to ".join(format(end, verdict.spec) for end in interval)
    return format(value, verdict.spec), ends
