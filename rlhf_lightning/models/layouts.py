"""How the rows of a forward pass lie: padded, end to end (`packed`), or with what they begin alike once (`shared`).

A padded batch of preference pairs is more than half padding, and the two responses of a pair have their prompt in
common. Packed, every layer sees real tokens alone. Shared, the tokens that several rows begin with are computed once:
with causal attention, the states of such a token are the same in all of them. R rows, T padded tokens, N tokens of all
rows together, U of them that are computed, H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_SMALLEST_SHARE = 8
"""A row takes its beginning from another one when that is at least an eighth of it: less does not pay for the keys that
it has to gather."""


class RowPlan(NamedTuple):
    """Where the tokens of R rows are computed in one sequence of U tokens, without padding."""

    tokens: Tensor
    """[U] int64: the flat position, in [R * T], of each token that is computed; the rows' own tokens lie together."""
    place: Tensor
    """[R, T] int64: which of the U tokens has the states of a token; 0 at padding."""
    ends: Tensor
    """[Q + 1] int32: where the own tokens of each of the Q <= R rows that have some begin, and U."""
    keys: Tensor | None
    """[M] int64: which of the U tokens each of those rows sees up to its end, row by row; None where no row takes any
    from another, so that they are its own."""
    key_ends: Tensor
    """[Q + 1] int32: where those of each row begin, and M; `ends` where `keys` is None."""
    longest: int
    """Most own tokens of a row."""
    longest_keys: int
    """Most tokens of a row."""


def plan_rows(input_ids: Tensor, attention_mask: Tensor, *, share: bool) -> RowPlan:
    """A plan for rows with padding on any side, on their device.

    `input_ids` [R, T] int64; `attention_mask` [R, T] bool, True on tokens. With `share`, rows that begin with the same
    tokens have them computed once. Looks at the numbers, so that an accelerator is waited for once.
    """
    ids, mask = torch.stack([input_ids, attention_mask.to(input_ids.dtype)]).cpu().numpy()
    columns = [np.flatnonzero(row) for row in mask]
    rows = [row[where] for row, where in zip(ids, columns, strict=True)]
    order = sorted(range(len(rows)), key=lambda row: rows[row].tobytes()) if share else range(len(rows))
    places: dict[int, np.ndarray] = {}
    tokens, keys, own, whole = [], [], [], []
    computed, before = 0, None
    for row in order:
        # In this order, of all rows so far the last one has most tokens in common with the next.
        common = _common(rows[before], rows[row]) if share and before is not None else 0
        begin: np.ndarray = np.empty(0, dtype=np.int64) if before is None else places[before][:common]
        count = len(rows[row]) - common
        places[row] = np.concatenate([begin, np.arange(computed, computed + count)])
        before, computed = row, computed + count
        if count:
            tokens.append(row * mask.shape[1] + columns[row][common:])
            keys.append(places[row])
            own.append(count)
            whole.append(len(rows[row]))
    place = np.zeros(mask.shape, dtype=np.int64)
    for row, where in enumerate(columns):
        place[row, where] = places[row]
    device = input_ids.device
    ends = _ends(own).to(device)
    shared = sum(own) < sum(whole)
    return RowPlan(
        tokens=torch.from_numpy(np.concatenate(tokens)).to(device),
        place=torch.from_numpy(place).to(device),
        ends=ends,
        keys=torch.from_numpy(np.concatenate(keys)).to(device) if shared else None,
        key_ends=_ends(whole).to(device) if shared else ends,
        longest=max(own),
        longest_keys=max(whole),
    )


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens `other` takes from the beginning of `one`."""
    shorter = min(len(one), len(other))
    differs = np.flatnonzero(one[:shorter] != other[:shorter])
    common = int(differs[0]) if len(differs) else shorter
    return common if common * _SMALLEST_SHARE >= len(other) else 0


def _ends(lengths: list[int]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
