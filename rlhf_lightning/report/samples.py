"""The samples that a report shows: which prompts, by rule, and the facts beside each response."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from rlhf_lightning.evaluation.blocks import Sample, Samples, SampleText, Section
from rlhf_lightning.evaluation.results import PolicyResults, PromptRow

RANDOM_SAMPLES, EXTREME_SAMPLES, REFUSAL_SAMPLES = 5, 3, 10
"""Shown of each kind; all of them are in samples.jsonl."""


def samples(policies: PolicyResults) -> Iterator[Section]:
    """Prompts by the hashes of their ids, those with the largest gains and losses, and refusals of safe prompts."""
    columns = [policies.titles[side] for side in policies.names]
    if policies.prompts:
        blocks = [
            Samples(columns, [_sample(row, policies) for row in rows], caption)
            for caption, rows in _taken(policies)
            if rows
        ]
        yield Section("Samples", blocks, "Selected by rule, never by hand; each policy's first response.")
    refused = [row for row in policies.refusal_prompts if row.safety == "safe" and any(row.refused.values())]
    if refused:
        shown = [_sample(row, policies) for row in refused[:REFUSAL_SAMPLES]]
        caption = f"{len(shown)} of {len(refused)}" if len(shown) < len(refused) else f"All {len(refused)}"
        yield Section("Refusals of safe prompts", [Samples(columns, shown, caption)])


def _taken(policies: PolicyResults) -> Iterator[tuple[str, list[PromptRow]]]:
    rows = policies.prompts
    by_hash = sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).hexdigest())
    yield f"{min(RANDOM_SAMPLES, len(rows))} prompts, in the order of their ids' hashes", by_hash[:RANDOM_SAMPLES]
    if not all(len(row.rewards) == 2 for row in rows):
        return
    ordered = sorted(rows, key=_gain)
    for words, some in (
        ("gains", [row for row in ordered[::-1] if _gain(row) > 0][:EXTREME_SAMPLES]),
        ("losses", [row for row in ordered if _gain(row) < 0][:EXTREME_SAMPLES]),
    ):
        yield f"The {len(some)} prompts with the largest {words} in the mean reward of their responses", some


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
