"""Replies of a writer, some to each conversation, kept in a file as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_lightning.data.examples import Message
from rlhf_lightning.errors import DataError
from rlhf_lightning.evaluation.ranks import Ranks
from rlhf_lightning.evaluation.store import Ledger
from rlhf_lightning.models.generation import seed_of
from rlhf_lightning.rewards.writers import Reply, Writer


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a `Ledger` keeps of a conversation."""

    texts: list[str | None]
    """None where the writer was not asked."""
    ended: list[bool]


@dataclass(frozen=True)
class Asking:
    """Where replies are kept, and who asks.

    Args:
        file: See `Ledger`; the same call resumes where one was killed.
        seed: Of the sampling.
        at_a_time: Replies of each process between two writes.
        ranks: The processes, of which each asks a share.
    """

    file: Path | None
    seed: int
    at_a_time: int
    ranks: Ranks

    def replies(
        self, what: str, writer: Writer, conversations: Mapping[str, Sequence[Message]], samples: range = range(1)
    ) -> dict[str, list[Reply | None]]:
        """Some of the replies to each conversation, in the order of their numbers, by the conversation's key.

        Reply k has the seed of (seed, the conversation's content, k): it depends on nothing else, and what has the same
        content under two keys is asked about once. `what` is the name of the progress bar.
        """
        contents = {key: content_key(turns) for key, turns in conversations.items()}
        turns_of = {contents[key]: turns for key, turns in conversations.items()}
        wanted = {f"{content} {samples.start}-{samples.stop}": content for content in turns_of}

        def ask(keys: Sequence[str]) -> list[_Kept]:
            each = [(wanted[key], number) for key in keys for number in samples]
            seeds = [seed_of(self.seed, *one) for one in each]
            replies = writer([turns_of[content] for content, _ in each], seeds)
            if len(replies) != len(each):
                raise DataError(f"{writer.name}: gave {len(replies)} replies to {len(each)} questions")
            parts = [replies[start : start + len(samples)] for start in range(0, len(each), len(samples))]
            return [_kept(part) for part in parts]

        ledger = Ledger(self.file, f"{writer.fingerprint} {self.seed}", _Kept, self.ranks)
        order = sorted(wanted, key=lambda key: (sum(len(turn["content"]) for turn in turns_of[wanted[key]]), key))
        ledger.fill(what, order, ask, at_a_time=max(1, self.at_a_time // len(samples)))
        found = {wanted[key]: _replies(ledger.known[key]) for key in wanted}
        return {key: found[content] for key, content in contents.items()}


def content_key(turns: Sequence[Message]) -> str:
    """A hash of a conversation, word by word."""
    plain = json.dumps([[turn["role"], turn["content"]] for turn in turns])
    return hashlib.sha256(plain.encode()).hexdigest()[:24]


def _kept(replies: Sequence[Reply | None]) -> _Kept:
    texts = [None if reply is None else reply.text for reply in replies]
    return _Kept(texts, [reply is not None and reply.ended for reply in replies])


def _replies(kept: _Kept) -> list[Reply | None]:
    both = zip(kept.texts, kept.ended, strict=True)
    return [None if text is None else Reply(text, ended) for text, ended in both]
