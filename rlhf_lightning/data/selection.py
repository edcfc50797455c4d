"""Which tokenized rows a run takes, and where their prompts are truncated; decided on lengths alone.

P rows taken, R rows of a store.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Literal, NamedTuple, Self

import numpy as np

from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.examples import LoadReport, Message, Refusal
from rlhf_lightning.data.splits import Part
from rlhf_lightning.data.tokenized import TokenStore
from rlhf_lightning.data.truncation import resume_at, truncate_left
from rlhf_lightning.errors import DataError

Truncation = Literal["left", "drop", "error"]
"""What to do with a pair longer than max_length: `left` cuts its prompt from the left (see
`ChatFormat.encode_turns`), and drops the pair when nothing of its last turn would stay; `drop` drops it; `error`
refuses the source."""
PromptTruncation = Literal["left", "drop", "error"]
"""What to do with a prompt longer than max_prompt_length: `cut` cuts it from the left (see `ChatFormat.encode_turns`)
and drops it when nothing of its last turn would stay, or when its turns cannot be told apart; `drop` drops it; `error`
refuses the source."""


class TokenizedRows:
    """P rows out of one or more stores, each truncated to fit into `max_length`; the order is the caller's."""

    def __init__(self, stores: Sequence[TokenStore], rows: Sequence[np.ndarray], *, max_length: int) -> None:
        self.stores = tuple(stores)
        self.max_length = max_length
        self.source = np.repeat(np.arange(len(stores), dtype=np.int32), [len(r) for r in rows])
        """[P] int32: which store each row comes from."""
        self.rows = np.concatenate([np.asarray(r, dtype=np.int64) for r in rows])
        """[P] int64: its row there."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """[P] int64: tokens of each row, after truncation."""
        raise NotImplementedError

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

    def _truncated(self, prompt: np.ndarray, index: int, *, room: int) -> np.ndarray:
        """A row's prompt, truncated from the left, after its head, to at most `room` ids where it is longer."""
        if len(prompt) <= room:
            return prompt
        store, row = self._place(index)
        return truncate_left(prompt, store.turns(row), room=room)

    def _prompt_lengths(self, room: np.ndarray | int) -> np.ndarray:
        """[P] int64: ids of each prompt after its truncation to `room` ([P] or one number)."""
        lengths = self._gathered([store.lengths[:, 0] for store in self.stores])
        room = np.broadcast_to(room, len(self))
        for index in np.flatnonzero(lengths > room):
            store, row = self._place(index)
            turns, length = store.turns(row), int(lengths[index])
            lengths[index] = turns[0] + length - resume_at(turns, length, room=int(room[index]))
        return lengths

    def _texts(self, name: str, positions: np.ndarray) -> list[str]:
        found = np.empty(len(positions), dtype=object)
        for number, store in enumerate(self.stores):
            own = self.source[positions] == number
            found[own] = store.texts(name, self.rows[positions][own])
        return found.tolist()


class TokenizedPairs(TokenizedRows):
    """P pairs out of one or more stores, each truncated to fit into `max_length`."""

    @functools.cached_property
    def margin(self) -> np.ndarray:
        """[P] float32, 0 where the data does not say."""
        return np.nan_to_num(self.numbers("margin"), nan=0.0)

    @functools.cached_property
    def segment_lengths(self) -> np.ndarray:
        """[P, 3] int64: tokens of prompt (after truncation), chosen and rejected response."""
        lengths = self._gathered([store.lengths for store in self.stores])
        lengths[:, 0] = self._prompt_lengths(self.max_length - lengths[:, 1:].max(axis=1))
        return lengths

    @property
    def lengths(self) -> np.ndarray:
        """[P] int64: tokens of the longer of the two rows of each pair."""
        return self.segment_lengths[:, 0] + self.segment_lengths[:, 1:].max(axis=1)

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of prompt, chosen response and rejected response of one pair, int32."""
        store, row = self._place(index)
        prompt, chosen, rejected = store.segments(row)
        room = self.max_length - max(len(chosen), len(rejected))
        return self._truncated(prompt, index, room=room), chosen, rejected


class TokenizedPrompts(TokenizedRows):
    """P prompts out of one or more stores, each truncated to fit into `max_length`."""

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[P] int64: tokens of each prompt, after truncation."""
        return self._prompt_lengths(self.max_length)

    def ids(self, index: int) -> np.ndarray:
        """Ids of one prompt, int32, up to where the assistant's reply begins."""
        store, row = self._place(index)
        (prompt,) = store.segments(row)
        return self._truncated(prompt, index, room=self.max_length)

    def messages(self, index: int) -> list[Message]:
        """The conversation of one prompt, whole also where its ids were truncated."""
        store, row = self._place(index)
        return json.loads(store.text("messages", row))

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
        words = chat_format.decode_after(prompt[: begins[0]], prompt[place : len(prompt) - store.tail_length])
        return [*messages[: users[0]], {"role": "user", "content": words}]


class Fit(NamedTuple):
    """Which rows of a store fit into the limit of tokens."""

    kept: np.ndarray
    """[R] bool."""
    cut: np.ndarray
    """[R] bool: kept, with the prompt truncated from the left."""


def fit_pairs(store: TokenStore, *, max_length: int, truncation: Truncation = "left") -> Fit:
    """Decide on each pair by its longer side. Truncation keeps the head and at least one id of the last turn."""
    room = max_length - store.lengths[:, 1:].max(axis=1)
    return _fit(store, room, cut=truncation == "left")


def fit_prompts(store: TokenStore, *, max_length: int, truncation: PromptTruncation = "drop") -> Fit:
    """The same for prompts. One whose turns cannot be told apart is not truncated, for a reward model reads them."""
    fit = _fit(store, max_length, cut=truncation == "left")
    blurred = fit.cut & ~store.numbers("divided")
    return Fit(fit.kept & ~blurred, fit.cut & ~blurred)


def _fit(store: TokenStore, room: np.ndarray | int, *, cut: bool) -> Fit:
    """Decide on each row by the room for its prompt ([R] or one number, in tokens)."""
    short = store.lengths[:, 0] <= room
    cuttable = ~short & (room - store.heads > store.tail_length) & cut
    return Fit(short | cuttable, cuttable)


def select_pairs(
    stores: Sequence[TokenStore],
    masks: Sequence[np.ndarray],
    *,
    max_length: int,
    truncation: Truncation = "left",
    part: Part | None = None,
) -> tuple[TokenizedPairs, LoadReport]:
    """The rows of some stores that a run takes: those of `masks` ([R] bool each) that fit into `max_length`.

    Returns the pairs, and a report in which pairs that are too long are refused and truncated ones are named. Raises
    `DataError` when no pair is left, or when one is too long and `truncation` is `error`.
    """
    fits = [fit_pairs(store, max_length=max_length, truncation=truncation) for store in stores]

    def describe(store: TokenStore, row: int) -> str:
        prompt, response = store.lengths[row, 0], store.lengths[row, 1:].max()
        return (
            f"the longer row has {prompt + response} tokens (prompt {prompt}, response and terminator {response}), "
            f"max_length is {max_length}"
        )

    rows, messages, report = _fitting_rows(stores, masks, fits, describe, part=part)
    advice = "raise max_length" + (", or set truncation: left or drop" if truncation == "error" else "")
    _enforce_fit(rows, masks, messages, report, refuse=truncation == "error", noun="pairs", advice=advice)
    return TokenizedPairs(stores, rows, max_length=max_length), report


def select_prompts(
    stores: Sequence[TokenStore],
    masks: Sequence[np.ndarray],
    *,
    max_length: int,
    truncation: PromptTruncation = "drop",
    unique: bool = True,
    part: Part | None = None,
) -> tuple[TokenizedPrompts, LoadReport]:
    """The rows of some stores that a run takes: those of `masks` ([R] bool each) that fit into `max_length`.

    With `unique`, a prompt that stands more than once, case and runs of blanks aside, is taken where it fits first.
    Returns the prompts, and a report in which prompts that are too long are refused, and truncated and repeated ones
    named. Raises `DataError` when no prompt is left, or when one is too long and `truncation` is `error`.
    """
    fits = [fit_prompts(store, max_length=max_length, truncation=truncation) for store in stores]

    def describe(store: TokenStore, row: int) -> str:
        why = "" if store.numbers("divided")[row] else ", and its turns cannot be told apart in the template"
        return f"the prompt has {store.lengths[row, 0]} tokens, max_prompt_length is {max_length}{why}"

    rows, messages, report = _fitting_rows(stores, masks, fits, describe, part=part)
    advice = {"left": "", "drop": ", or set truncation: left", "error": ", or set truncation: left or drop"}[truncation]
    advice = f"raise max_prompt_length{advice}"
    _enforce_fit(rows, masks, messages, report, refuse=truncation == "error", noun="prompts", advice=advice)
    prompts = TokenizedPrompts(stores, rows, max_length=max_length)
    if unique:
        first = np.unique(prompts.numbers("prompt_hash"), return_index=True)[1]
        report.rows_repeated = prompts.origins(np.setdiff1d(np.arange(len(prompts)), first))
        prompts = prompts.select(np.sort(first))
    return prompts, report


def _fitting_rows(
    stores: Sequence[TokenStore],
    masks: Sequence[np.ndarray],
    fits: Sequence[Fit],
    describe: Callable[[TokenStore, int], str],
    *,
    part: Part | None,
) -> tuple[list[np.ndarray], list[str], LoadReport]:
    """The rows of `masks` that fit, what is said of each that does not, and a report of those and the truncated ones.

    Where the stores are divided by prompt, `masks` are those of `part`, and so are the rows of the report. Rows that no
    prompt was read of belong to the training part. `describe` says of a row that does not fit how long it is.
    """
    reports, rows, messages = [], [], []
    for store, mask, fit in zip(stores, masks, fits, strict=True):
        report = LoadReport(**asdict(store.report))
        if part == "train":
            report.rows_read -= int(np.count_nonzero(~mask))
        elif part == "val":
            report = LoadReport(f"held out by prompt of {report.source}", int(np.count_nonzero(mask)))
        too_long = np.flatnonzero(mask & ~fit.kept)
        for row, origin in zip(too_long, store.texts("origin", too_long), strict=True):
            messages.append(f"{origin}: {describe(store, row)}")
            report.refuse(Refusal("too_long", messages[-1], origin))
        report.rows_cut = store.texts("origin", np.flatnonzero(mask & fit.cut))
        rows.append(np.flatnonzero(mask & fit.kept))
        reports.append(report)
    return rows, messages, LoadReport.merged(reports)


def _enforce_fit(
    rows: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    messages: Sequence[str],
    report: LoadReport,
    *,
    refuse: bool,
    noun: str,
    advice: str,
) -> None:
    """Raise `DataError`, ending with `advice`, when no row is left, or when one does not fit and `refuse` is set."""
    if messages and (refuse or not any(map(len, rows))):
        more = f"; and {len(messages) - 10} more" if len(messages) > 10 else ""
        raise DataError(
            f"{report.source}: {len(messages)} of {sum(map(np.count_nonzero, masks))} {noun} do not fit: "
            f"{'; '.join(messages[:10])}{more}; {advice}"
        )
