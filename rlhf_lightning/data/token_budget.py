"""Batches of as many training pairs as a number of tokens holds, in the place of a number of pairs.

Packed rows cost what their tokens cost, so batches of equal tokens take equal time and memory, whatever their rows.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlhf_lightning.batches import Layout
from rlhf_lightning.data.batching import TrainingPlan
from rlhf_lightning.errors import ConfigurationError


class TokenPlan(TrainingPlan):
    """A `TrainingPlan` whose batches hold at most `tokens_per_batch` tokens, and nearly equal numbers of them.

    `tokens` [P] int64 are those of each pair. One optimizer step takes pairs of equal token counts in all steps, so
    their number differs from step to step; each pair of a step counts the same, as it does in a `TrainingPlan`. Every
    epoch has as many steps. Raises `ConfigurationError` for a budget that the longest pair takes too much of.
    """

    def __init__(
        self, tokens: np.ndarray, *, tokens_per_batch: int, accumulate: int = 1, world_size: int = 1, **settings: Any
    ) -> None:
        super().__init__(tokens, batch_size=1, accumulate=accumulate, world_size=world_size, **settings)
        self.tokens_per_batch = tokens_per_batch
        batches, longest = accumulate * world_size, int(tokens.max())
        # A step ends within a pair of its share, and its fullest batch within a pair of the average one. In half of
        # what is left, each batch of a step still has a pair: of two steps or more, each has more than half.
        room = tokens_per_batch - longest - -(-longest // batches)
        needed = 3 * (longest + -(-longest // batches))
        if tokens_per_batch < needed:
            raise ConfigurationError(
                f"data.tokens_per_batch: {tokens_per_batch} is too few for rows of which the longest takes {longest} "
                f"tokens; give at least {needed}, lower data.max_length, or leave it out and give data.batch_size"
            )
        most = sum(_most_tokens(tokens[indices], weight) for indices, weight in self.mixture)
        self.steps = max(1, -(-most // (room * batches)))

    @property
    def layout(self) -> dict[str, int]:
        layout = super().layout
        del layout["data.batch_size"]
        return layout | {"data.tokens_per_batch": int(self.tokens_per_batch)}

    def __len__(self) -> int:
        return self.steps * self._batches_of(self.epoch_rows) if self.steps == 1 else self.steps * self.accumulate

    def _steps_of(self, order: np.ndarray) -> Iterator[np.ndarray]:
        ends = np.cumsum(self.lengths[order])
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, self.steps) / self.steps, side="right")
        yield from np.split(order, cuts)

    def _divided(self, step: np.ndarray, count: int) -> list[np.ndarray]:
        if not self.shuffle:
            ends, before = np.cumsum(self.lengths[step]), np.arange(1, count)
            cuts = np.searchsorted(ends, ends[-1] * before / count, side="right")
            cuts = np.maximum.accumulate(cuts.clip(before) - before) + before  # none empty
            return np.split(step, cuts.clip(max=len(step) - count + before))
        # The longest first, each to the batch with the fewest tokens so far (Graham 1969: longest processing time).
        heap: list[tuple[int, int]] = [(0, batch) for batch in range(count)]
        parts: list[list[int]] = [[] for _ in range(count)]
        for pair in step[np.argsort(-self.lengths[step], kind="stable")].tolist():
            tokens, batch = heap[0]
            parts[batch].append(pair)
            heapq.heapreplace(heap, (tokens + int(self.lengths[pair]), batch))
        return [np.array(part) for part in parts]


def _most_tokens(tokens: np.ndarray, weight: float) -> int:
    """Most tokens that an epoch may take of a source whose rows come `weight` times."""
    whole = int(weight)
    rest = round(len(tokens) * weight) - whole * len(tokens)
    return whole * int(tokens.sum()) + int(np.sort(tokens)[len(tokens) - rest :].sum())


def tokens_of(segment_lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """Tokens that are computed of each row of `segment_lengths` [P, 1 + responses], [P]: its prompt once where shared.

    Raises `ConfigurationError` for padded rows, which have no number of their own.
    """
    if layout == "padded":
        raise ConfigurationError(
            "data.tokens_per_batch: the rows of this model are padded, and padding would come on top; leave it out and "
            "give data.batch_size, or give model.layout packed"
        )
    prompts, sides = segment_lengths[:, 0], segment_lengths[:, 1:]
    return prompts * (1 if layout == "shared" else sides.shape[1]) + sides.sum(axis=1)
