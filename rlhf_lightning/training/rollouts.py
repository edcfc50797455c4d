"""Replies of a policy with all that PPO learns from them.

B replies, R of them in a forward pass, T tokens of the longest row, S tokens of the longest reply, N reply tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Replies(NamedTuple):
    """B replies as they were drawn."""

    rows: list[Tensor]
    """Prompt and reply, 1-D int64."""
    prompt_lengths: list[int]
    ended: Tensor
    """[B] bool, True where the reply ended with the terminator."""
    index: list[int]
    """Position of each reply's prompt in its data set."""
    drawn_logprobs: list[Tensor] | None = None
    """Of each reply's tokens, as an engine gave them that is not the policy itself."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each reply, terminator included, [B] int64."""
        return torch.tensor([len(row) - start for row, start in zip(self.rows, self.prompt_lengths, strict=True)])

    def taken(self, which: Sequence[int]) -> Replies:
        """Some of them."""
        return Replies(
            [self.rows[i] for i in which],
            [self.prompt_lengths[i] for i in which],
            self.ended[torch.as_tensor(which)],
            [self.index[i] for i in which],
        )


class Experience(NamedTuple):
    """What PPO learns from, fixed for all passes over it. Tokens of a reply begin in column 0; 0 outside of `mask`."""

    replies: Replies
    mask: Tensor
    """[B, S] bool, True on the tokens of a reply, its terminator included."""
    logprobs: Tensor
    """[B, S], of the policy that drew the replies, scored again by a forward pass."""
    reference: Tensor
    """[B, S], log-probs of the reference."""
    values: Tensor
    """[B, S], of the states before each token; 0 without a value model."""
    advantages: Tensor
    """[B, S], whitened where the method has it so."""
    returns: Tensor
    """[B, S], what the value model is trained to; before whitening."""


class PaddedRows(NamedTuple):
    """R rows for a forward pass, padded on the right."""

    input_ids: Tensor
    """[R, T] int64"""
    attention_mask: Tensor
    """[R, T] bool"""
    response_mask: Tensor
    """[R, T] bool"""


def padded_rows(replies: Replies, *, pad_id: int, device: torch.device) -> PaddedRows:
    """The rows of some replies. What they are padded with is not read by anything."""
    width = max(map(len, replies.rows))
    ids = torch.full((len(replies.rows), width), pad_id, device=device)
    for place, row in enumerate(replies.rows):
        ids[place, : len(row)] = row.to(device)
    positions = torch.arange(width, device=device)
    ends = torch.tensor([len(row) for row in replies.rows], device=device)[:, None]
    starts = torch.tensor(replies.prompt_lengths, device=device)[:, None]
    return PaddedRows(ids, positions < ends, (positions >= starts) & (positions < ends))


def reply_mask(lengths: Tensor) -> Tensor:
    """[B, S] bool of lengths [B]: True on the first tokens of each row."""
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def laid_out(flat: Tensor, mask: Tensor) -> Tensor:
    """Numbers of N reply tokens, row by row, at their places in [R, S]; 0 elsewhere. Gradients go through."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


class Moments:
    """Mean and standard deviation of all scores so far, of all processes, as rollouts come.

    Chan et al. 1979: parallel update of mean and sum of squares.
    """

    def __init__(self) -> None:
        self.count = self.mean = self.squares = 0.0

    def update(self, count: float, mean: float, squares: float) -> None:
        """Add `count` scores with their mean and their sum of squared differences from it."""
        total = self.count + count
        difference = mean - self.mean
        self.squares += squares + difference**2 * self.count * count / total
        self.mean += difference * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation; 1 while it is 0."""
        return (self.squares / self.count) ** 0.5 if self.count and self.squares > 0 else 1.0

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


def whitened_over_all(x: Tensor, mask: Tensor, sum_over_all) -> Tensor:
    """`masked_whiten` over the replies of all processes: [B, S] with mean 0 and variance 1 over every mask together.

    `sum_over_all` adds up a tensor over the processes. `x` is float32, so that sums in float64 are exact where all
    values are equal, and these become exactly 0.
    """
    differences, count = centered_over_all(x, mask, sum_over_all)
    variance = sum_over_all(differences.square().sum()) / count
    return (differences * torch.rsqrt(variance + 1e-8)).to(x.dtype)


def centered_over_all(x: Tensor, mask: Tensor, sum_over_all) -> tuple[Tensor, Tensor]:
    """`x` [B, S] less its mean over the masks of all processes, float64, 0 outside; and how many values these are."""
    values = torch.where(mask, x, 0).double()
    count = sum_over_all(mask.sum().double())
    return torch.where(mask, values - sum_over_all(values.sum()) / count, 0), count


def parts(order: Sequence[int], count: int) -> list[list[int]]:
    """`order` in `count` parts of sizes that differ by one at most; some are empty when there are too few."""
    size, more = divmod(len(order), count)
    bounds = [i * size + min(i, more) for i in range(count + 1)]
    return [list(order[begin:end]) for begin, end in itertools.pairwise(bounds)]
