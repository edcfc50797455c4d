"""Held-out splits by prompt: the same prompt is never on both sides, in whatever order the rows come."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

import numpy as np

from rlhf_lightning.data.examples import Message

Part = Literal["train", "val"]
"""Side of sources that are divided by prompt."""


_ZERO_WIDTH = re.compile("[\u00ad\u200b\u200c\u200d\u2060\ufeff]")


def prompt_hash(prompt: Sequence[Message]) -> int:
    """64 bits of a prompt that ignore case, runs of white space, zero-width characters and Unicode forms (NFKC)."""
    text = "\x1e".join(f"{message['role']}\x1f{_words(message['content'])}" for message in prompt)
    return int.from_bytes(hashlib.sha256(text.casefold().encode()).digest()[:8], "big")


def _words(text: str) -> str:
    if not text.isascii():
        folded = unicodedata.normalize("NFKC", _ZERO_WIDTH.sub("", text)).casefold()
        text = unicodedata.normalize("NFKC", folded)  # folding may leave letters and accents apart
    return " ".join(text.split())


def held_out(prompt_hashes: np.ndarray, *, val_fraction: float) -> np.ndarray:
    """Which rows are for validation, [R] bool, given the hashes of their prompts, [R] uint64.

    About `val_fraction` of the prompts; which ones depends on the prompts alone, not on order, seed or the other rows.
    """
    return prompt_hashes.astype(np.float64) / 2.0**64 < val_fraction
