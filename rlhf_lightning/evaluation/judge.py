"""A language model that judges the rows of benchmarks: its most likely reply to each question, kept in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from rlhf_lightning.errors import DataError
from rlhf_lightning.evaluation.ranks import ALONE, Ranks
from rlhf_lightning.evaluation.store import Ledger
from rlhf_lightning.rewards.writers import PolicyWriter, Sampling, load_frozen_policy


class Judge(Protocol):
    """Takes questions, each the one turn of a user, and gives a reply to each."""

    name: str
    fingerprint: str
    """A hash of all that decides its replies."""

    def __call__(self, questions: list[str]) -> list[str]: ...


TOO_LONG = "(not asked: the question is longer than the model has positions for)"
"""In place of a reply; no verdict can be read in it."""

_QUESTIONS_AT_A_TIME = 64


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a `Ledger` keeps of a question."""

    reply: str


def ask(judge: Judge, questions: Sequence[str], file: str | Path | None = None, *, ranks: Ranks = ALONE) -> list[str]:
    """The judge's reply to each question, of which each of the processes asks a share; the same one is asked once.

    With a file, replies are appended to it as they come (see `Ledger`), and those that are in it are not asked for
    again. Raises `DataError` when the judge gives another number of replies than of questions, and for a file that
    holds something else.
    """
    keys = [hashlib.sha256(question.encode()).hexdigest() for question in questions]
    by_key = dict(zip(keys, questions, strict=True))

    def replies_to(part: Sequence[str]) -> list[_Kept]:
        replies = judge([by_key[key] for key in part])
        if len(replies) != len(part):
            raise DataError(f"{judge.name}: gave {len(replies)} replies to {len(part)} questions")
        return [_Kept(reply) for reply in replies]

    ledger = Ledger(file, judge.fingerprint, _Kept, ranks)
    ledger.fill("judgements", keys, replies_to, at_a_time=_QUESTIONS_AT_A_TIME)
    return [ledger.known[key].reply for key in keys]


class PolicyJudge:
    """A causal language model as a judge: the most likely reply to each question, token by token.

    Args:
        name: Directory or hub name of a causal language model, whole or LoRA adapters alone.
        max_new_tokens: Longest reply, in tokens.
        batch_size: Replies that are made at a time.
        device: Such as `cpu` or `cuda`.
        dtype: Dtype of the weights.
        trust_remote_code: Run code that comes with the model.

    Raises `ModelError` for what is no language model, and `ConfigurationError` when its positions leave no room.
    """

    def __init__(
        self,
        name: str,
        *,
        max_new_tokens: int = 1024,
        batch_size: int = 8,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        loaded = load_frozen_policy(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        self.writer = PolicyWriter(name, *loaded, Sampling(max_new_tokens), batch_size=batch_size)
        self.name, self.fingerprint = name, self.writer.fingerprint

    def __call__(self, questions: list[str]) -> list[str]:
        """The reply to each question; `TOO_LONG` to one that does not fit, which is cut for nobody."""
        turns = [[{"role": "user", "content": question}] for question in questions]
        replies = self.writer(turns, [0] * len(questions))
        return [TOO_LONG if reply is None else reply.text for reply in replies]
