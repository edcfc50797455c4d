"""What half-precision weights do to the scores of a model, measured against float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from rlhf_lightning.data.examples import Message
from rlhf_lightning.rewards.scorers import Scorer

ROWS = 32
"""Rows that are scored twice."""

Row = tuple[Sequence[Message], str]
"""A prompt and a response."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Rounding:
    """How far scores are from those of float32 weights and arithmetic."""

    dtype: str
    rows: int
    rms: float
    """Root mean square of the differences."""
    sd: float
    """Standard deviation of the float32 scores of the same rows."""

    def sentence(self, name: str) -> str:
        return (
            f"{name}: scored in {self.dtype}, in which a score is off by {self.rms:.2g} (rms), against a standard "
            f"deviation of {self.sd:.2g}, measured on {self.rows} rows; --dtype float32 has no such error"
        )


def measured_rounding(make: Callable[..., Scorer], scorer: Scorer, rows: Sequence[Row], *, dtype: str) -> Rounding:
    """Score some rows with a scorer and with its float32 twin, which `make(dtype=..., device=...)` loads anew.

    The twin computes on the CPU where the device has no room for it.
    """
    prompts, responses = zip(*rows, strict=True)
    try:
        full = _scores(make(dtype=torch.float32), prompts, responses)
    except torch.OutOfMemoryError:
        full = _scores(make(dtype=torch.float32, device="cpu"), prompts, responses)
    differences = _scores(scorer, prompts, responses) - full
    return Rounding(dtype, len(rows), float(np.sqrt(np.mean(differences**2))), float(full.std()))


def _scores(scorer: Scorer, prompts: Sequence[Any], responses: Sequence[str]) -> np.ndarray:
    return np.array([each.score for each in scorer(prompts, responses)], dtype=np.float64)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of them, from the first to the last at equal distances."""
    places = np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int))
    return [items[place] for place in places]
