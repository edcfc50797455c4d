"""Which tokenized rows a run takes, and where their prompts are truncated; decided on lengths alone.

P rows taken, R rows of a store.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np

from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.examples import LoadReport, Message, Refusal
from rlhf_lightning.data.splits import Part
from rlhf_lightning.data.tokenized import Kind, TokenStore
from rlhf_lightning.data.truncation import resume_at, truncate_left
from rlhf_lightning.data.unpaired import desirable_of
from rlhf_lightning.errors import DataError

Truncation = Literal["left", "drop", "error"]
"""What to do with a row that is too long: `left` cuts its prompt from the left (see `ChatFormat.encode_turns`), and
drops the row when nothing of its last turn would stay, or, of a prompt alone, when its turns cannot be told apart;
`drop` drops it; `error` refuses the source."""
_INSTEAD = {"left": "", "drop": ", or set truncation: left", "error": ", or set truncation: left or drop"}


class Fit(NamedTuple):
    """Which rows of a store fit into the limit of tokens."""

    kept: np.ndarray
    """[R] bool."""
    cut: np.ndarray
    """[R] bool: kept, with the prompt truncated from the left."""


def fit_rows(store: TokenStore, *, max_length: int, truncation: Truncation) -> Fit:
    """Decide on each row by its longest response. Truncation keeps the head and at least one id of the last turn."""
    room = max_length - store.lengths[:, 1:].max(axis=1, initial=0)
    short = store.lengths[:, 0] <= room
    cut = ~short & (room - store.heads > store.tail_length) & store.divided & (truncation == "left")
    return Fit(short | cut, cut)


class TokenizedRows:
    """P rows out of one or more stores, each truncated to fit into `max_length`; the order is the caller's."""

    kind: ClassVar[Kind]
    limit_key: ClassVar[str]
    """The setting that gives `max_length`."""

    def __init__(self, stores: Sequence[TokenStore], rows: Sequence[np.ndarray], *, max_length: int) -> None:
        self.stores = tuple(stores)
        self.max_length = max_length
        self.source: np.ndarray = np.repeat(np.arange(len(stores), dtype=np.int32), [len(r) for r in rows])
        """[P] int32: which store each row comes from."""
        self.rows: np.ndarray = np.concatenate([np.asarray(r, dtype=np.int64) for r in rows])
        """[P] int64: its row there."""

    @classmethod
    def fitting(
        cls,
        stores: Sequence[TokenStore],
        masks: Sequence[np.ndarray],
        *,
        max_length: int,
        truncation: Truncation = "left",
        part: Part | None = None,
    ) -> tuple[Self, LoadReport]:
        """The rows of some stores that a run takes: those of `masks` ([R] bool each) that fit into `max_length`.

        Returns them and a report in which rows that are too long are refused, and truncated ones named. Where stores
        are divided by prompt, `masks` are those of `part`, and so are the rows of the report; rows that no prompt was
        read of belong to the training part. Raises `DataError` when no row is left, or when one is too long and
        `truncation` is `error`.
        """
        reports, rows, messages = [], [], []
        for store, mask in zip(stores, masks, strict=True):
            fit = fit_rows(store, max_length=max_length, truncation=truncation)
            report = LoadReport(**asdict(store.report))  # a deep copy
            if part == "train":
                report.rows_read -= int(np.count_nonzero(~mask))
            elif part == "val":
                report = LoadReport(f"held out by prompt of {report.source}", int(np.count_nonzero(mask)))
            too_long = np.flatnonzero(mask & ~fit.kept)
            for row, origin in zip(too_long, store.texts("origin", too_long), strict=True):
                messages.append(f"{origin}: {cls._too_long(store, int(row))}, {cls.limit_key} is {max_length}")
                report.refuse(Refusal("too_long", messages[-1], origin))
            report.rows_cut = store.texts("origin", np.flatnonzero(mask & fit.cut))
            rows.append(np.flatnonzero(mask & fit.kept))
            reports.append(report)
        report = LoadReport.merged(reports)
        if messages and (truncation == "error" or not any(map(len, rows))):
            more = f"; and {len(messages) - 10} more" if len(messages) > 10 else ""
            raise DataError(
                f"{report.source}: {len(messages)} of {sum(map(np.count_nonzero, masks))} {cls.kind} do not fit: "
                f"{'; '.join(messages[:10])}{more}; raise {cls.limit_key}{_INSTEAD[truncation]}"
            )
        return cls(stores, rows, max_length=max_length), report

    @staticmethod
    def _too_long(store: TokenStore, row: int) -> str:
        """How long a row of a store is, and why it is not truncated where it cannot be."""
        prompt, *responses = store.lengths[row].tolist()
        if responses:
            both = f"prompt {prompt}, response and EOS {max(responses)}"
            return f"the longer row has {prompt + max(responses)} tokens ({both})"
        why = "" if store.divided[row] else ", and its turns cannot be told apart in the template"
        return f"the prompt has {prompt} tokens{why}"

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def segment_lengths(self) -> np.ndarray:
        """[P, C] int64: tokens of the prompt, after truncation, and of each response (of a pair: chosen, rejected)."""
        lengths = self._gathered([store.lengths for store in self.stores])
        room = self.max_length - lengths[:, 1:].max(axis=1, initial=0)
        for index in np.flatnonzero(lengths[:, 0] > room).tolist():
            store, row = self._place(index)
            turns, length = store.turns(row), int(lengths[index, 0])
            lengths[index, 0] = turns[0] + length - resume_at(turns, length, room=int(room[index]))
        return lengths

    @property
    def lengths(self) -> np.ndarray:
        """[P] int64: tokens of each row after truncation; of a pair, of the longer of its two."""
        return self.segment_lengths[:, 0] + self.segment_lengths[:, 1:].max(axis=1, initial=0)

    def segments(self, index: int) -> tuple[np.ndarray, ...]:
        """Ids of the prompt, truncated, and of each response of one row, int32."""
        store, row = self._place(index)
        prompt, *responses = store.segments(row)
        room = self.max_length - max(map(len, responses), default=0)
        if len(prompt) > room:
            prompt = truncate_left(prompt, store.turns(row), room=room)
        return prompt, *responses

    def select(self, positions: np.ndarray) -> Self:
        """Those at some positions, in the order of the stores."""
        rows = [self.rows[positions][self.source[positions] == source] for source in range(len(self.stores))]
        return type(self)(self.stores, rows, max_length=self.max_length)

    def sample(self, count: int | None, *, seed: int) -> Self:
        """So many of the rows, chosen at random by the seed, in their order; all when there are no more or it is None.

        A larger sample by the same seed holds the smaller one.
        """
        if count is None or count >= len(self):
            return self
        return self.select(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))

    def longest_first(self, positions: np.ndarray) -> np.ndarray:
        """Some positions, those of the longest rows first."""
        return positions[np.argsort(-self.lengths[positions], kind="stable")]

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers of the stores, [P]."""
        return self._gathered([store.numbers(name) for store in self.stores])

    @functools.cached_property
    def example_ids(self) -> list[str]:
        """The id of each row: its own, or `file:row`."""
        return self._texts("example_id", np.arange(len(self)))

    def origins(self, positions: np.ndarray) -> list[str]:
        """Where some rows stand: `file, row 17`."""
        return self._texts("origin", positions)

    def _place(self, index: int) -> tuple[TokenStore, int]:
        """The store of a row, and its row there."""
        return self.stores[self.source[index]], int(self.rows[index])

    def _gathered(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        """[P, ...] out of a column [R, ...] of each store."""
        return np.concatenate([column[self.rows[self.source == source]] for source, column in enumerate(columns)])

    def _texts(self, name: str, positions: np.ndarray) -> list[str]:
        found: np.ndarray = np.empty(len(positions), dtype=object)
        for number, store in enumerate(self.stores):
            own = self.source[positions] == number
            found[own] = store.texts(name, self.rows[positions][own])
        return found.tolist()


class TokenizedPairs(TokenizedRows):
    """P pairs out of one or more stores, each truncated to fit into `max_length`."""

    kind, limit_key = "pairs", "max_length"

    @functools.cached_property
    def margin(self) -> np.ndarray:
        """[P] float32, 0 where the data does not say."""
        return np.nan_to_num(self.numbers("margin"), nan=0.0)


class TokenizedConversations(TokenizedRows):
    """P conversations out of one or more stores, each truncated to fit into `max_length`."""

    kind, limit_key = "conversations", "max_length"

    def response_mask(self, index: int) -> np.ndarray:
        """[T] bool of the ids of one row, truncated: True on those of the assistant turns that are learned, with EOS.

        A turn that truncation has left out is not among them.
        """
        store, row = self._place(index)
        prompt, response = store.segments(row)
        learned: np.ndarray = np.zeros(len(prompt), dtype=bool)
        for start, stop in store.learned(row):
            learned[start:stop] = True
        learned = truncate_left(learned, store.turns(row), room=self.max_length - len(response))
        return np.concatenate([learned, np.ones(len(response), dtype=bool)])


class TokenizedResponses(TokenizedRows):
    """P judged responses out of one or more stores, each truncated to fit into `max_length`."""

    kind, limit_key = "responses", "max_length"

    def desirable(self, threshold: float | None) -> np.ndarray:
        """[P] bool: which are good by their labels. Raises `DataError` as `desirable_of` does for each store."""
        labels = self.numbers("label")
        found: np.ndarray = np.empty(len(self), dtype=bool)
        for number in range(len(self.stores)):
            own = self.source == number
            found[own] = desirable_of(labels[own], threshold)
        return found

    def mismatched(self, index: int, other: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids of the prompt of one row and of the response of another; None where none of its last turn would fit."""
        store, row = self._place(index)
        prompt, response = store.segments(row)[0], self.segments(other)[1]
        room, turns = self.max_length - len(response), store.turns(row)
        if len(prompt) > room and room - turns[0] <= store.tail_length:
            return None
        return truncate_left(prompt, turns, room=room), response


class TokenizedPrompts(TokenizedRows):
    """P prompts out of one or more stores, each truncated to fit into `max_length`."""

    kind, limit_key = "prompts", "max_prompt_length"

    def once(self) -> tuple[Self, list[str]]:
        """Each prompt where it comes first (see `prompt_hash`), and the origins of the rows that repeat one."""
        first = np.unique(self.numbers("prompt_hash"), return_index=True)[1]
        repeated = self.origins(np.setdiff1d(np.arange(len(self)), first))
        return self.select(np.sort(first)), repeated

    def ids(self, index: int) -> np.ndarray:
        """Ids of one prompt, int32, up to where the assistant's reply begins."""
        return self.segments(index)[0]

    def messages(self, index: int) -> list[Message]:
        """The conversation of one prompt, whole also where its ids were truncated."""
        store, row = self._place(index)
        return json.loads(store.texts("messages", np.array([row]))[0])

    def messages_as_cut(self, index: int, chat_format: ChatFormat) -> list[Message]:
        """The conversation of one prompt as its ids have it: where they were cut, without the turns that are gone.

        What stays of a last turn that is cut itself is the text of its ids.
        """
        messages, (store, row) = self.messages(index), self._place(index)
        (prompt,) = store.segments(row)
        if len(prompt) <= self.max_length:
            return messages
        users = [place for place, message in enumerate(messages) if message["role"] == "user"]
        begins = store.turns(row)
        place = resume_at(begins, len(prompt), room=self.max_length)
        if place in begins:
            return [*messages[: users[0]], *messages[users[begins.index(place)] :]]
        ids = prompt.tolist()
        words = chat_format.decode_after(ids[: begins[0]], ids[place : len(ids) - store.tail_length])
        return [*messages[: users[0]], {"role": "user", "content": words}]
