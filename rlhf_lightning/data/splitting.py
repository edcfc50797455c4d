"""Held-out splits by prompt: the same prompt is never on both sides, in whatever order the rows come."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from rlhf_lightning.data.examples import Message, PreferenceExample
from rlhf_lightning.errors import DataError


def prompt_key(prompt: Sequence[Message]) -> str:
    """A hash of a prompt that ignores case and runs of white space."""
    text = "\x1e".join(f"{message['role']}\x1f{' '.join(message['content'].split())}" for message in prompt)
    return hashlib.sha256(text.casefold().encode()).hexdigest()


def split_by_prompt(
    examples: Sequence[PreferenceExample], *, val_fraction: float
) -> tuple[list[PreferenceExample], list[PreferenceExample]]:
    """Divide pairs into training and validation by the hash of their prompt.

    About `val_fraction` of the prompts go to validation; which ones depends on the prompts alone, not on order, seed or
    the other rows. Raises `DataError` when a side stays empty.
    """
    sides: tuple[list[PreferenceExample], list[PreferenceExample]] = ([], [])
    for example in examples:
        fraction = int(prompt_key(example.prompt)[:13], 16) / 16**13
        sides[fraction < val_fraction].append(example)
    for name, side in zip(("training", "validation"), sides, strict=True):
        if not side:
            raise DataError(
                f"splitting {len(examples)} pairs by prompt with val_fraction {val_fraction} leaves no {name} pair; "
                "give a validation file with val: FILE, or another val_fraction"
            )
    return sides


def shared_prompts(train: Sequence[PreferenceExample], val: Sequence[PreferenceExample]) -> int:
    """Number of validation pairs whose prompt is also in the training pairs."""
    known = {prompt_key(example.prompt) for example in train}
    return sum(prompt_key(example.prompt) in known for example in val)
