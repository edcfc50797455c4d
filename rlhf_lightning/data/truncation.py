"""Truncation of a prompt from the left, turn by turn, so that no words come under the header of another role."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Ids = TypeVar("Ids", list[int], np.ndarray)


def resume_at(turns: Sequence[int], length: int, *, room: int) -> int:
    """The position after its head at which a prompt of `length` tokens goes on once it is truncated to `room` tokens.

    `turns` are the positions at which each user's words begin (see `ChatFormat.encode_turns`); the tokens before the
    first are the head, which stays. It goes on at the earliest later turn from which on everything fits, or within the
    last turn where none does.
    """
    head, *later = turns
    return next((position for position in later if head + length - position <= room), length - (room - head))


def truncate_left(prompt: Ids, turns: Sequence[int], *, room: int) -> Ids:
    """A prompt's token ids, or those of its head and its latest turns where it has more than `room`."""
    if len(prompt) <= room:
        return prompt
    head, rest = prompt[: turns[0]], prompt[resume_at(turns, len(prompt), room=room) :]
    return head + rest if isinstance(prompt, list) else np.concatenate([head, rest])
