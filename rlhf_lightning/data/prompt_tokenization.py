"""Validated prompts -> token ids on disk, with their messages -> the prompts of a run."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.examples import LoadReport, Message, PromptExample, Refusal
from rlhf_lightning.data.prompts import iterate_prompts
from rlhf_lightning.data.sources import Split, WeightedSource
from rlhf_lightning.data.splits import Part, prompt_hash
from rlhf_lightning.data.token_store import (
    IDS,
    Fit,
    TokenizedRows,
    TokenStore,
    fit_prompts,
    fitting_rows,
    tokenized_directory,
    with_prompt_ids,
    write_rows,
)

PromptTruncation = Literal["cut", "drop", "error"]
"""What to do with a prompt longer than max_prompt_length: `cut` cuts it from the left (see `ChatFormat.encode_turns`)
and drops it when nothing of its last turn would stay, or when its turns cannot be told apart; `drop` drops it; `error`
refuses the source."""

PROMPT_SCHEMA = pa.schema(
    {
        "prompt": IDS,
        "turns": IDS,
        "divided": pa.bool_(),
        "prompt_hash": pa.uint64(),
        "messages": pa.string(),
        "example_id": pa.string(),
        "origin": pa.string(),
    }
)


def tokenize_prompts(
    source: WeightedSource,
    chat_format: ChatFormat,
    *,
    columns: Mapping[str, str] | None = None,
    split: Split = "train",
    cache_dir: str | Path | None = None,
) -> PromptStore:
    """Read, validate and encode one source of prompts, or find that in the cache (see `tokenized_directory`).

    Raises `DataError` when the source cannot be read; bad rows are counted in the store's report.
    """
    options = {"columns": columns, "split": split, "cache_dir": cache_dir}
    return PromptStore(
        tokenized_directory("prompts", source, chat_format, iterate=iterate_prompts, write=write_prompts, **options)
    )


def write_prompts(
    directory: Path, rows: Iterable[PromptExample | Refusal], report: LoadReport, chat_format: ChatFormat
) -> None:
    """Encode rows, a chunk at a time, into `directory`.

    Refused, and counted in `report` in the order of the rows, are prompts that hold a control token, or that the chat
    template does not take.
    """
    write_rows(directory / PromptStore.file_name, rows, report, chat_format, schema=PROMPT_SCHEMA, encode=_encoded)


def _encoded(chunk: Sequence[PromptExample | Refusal], chat_format: ChatFormat) -> Iterator[dict | Refusal]:
    """Columns of each prompt of a chunk, or why it is refused, in order."""
    for row in with_prompt_ids(chunk, chat_format):
        if isinstance(row, Refusal):
            yield row
            continue
        example, prompt = row
        yield {
            "prompt": prompt.ids,
            "turns": prompt.turns,
            "divided": _is_divided(example.prompt, prompt.turns, head=len(chat_format.head_ids)),
            "prompt_hash": prompt_hash(example.prompt),
            "messages": json.dumps(list(example.prompt), ensure_ascii=False),
            "example_id": example.example_id,
            "origin": example.origin,
        }


def _is_divided(prompt: Sequence[Message], turns: Sequence[int], *, head: int) -> bool:
    """Whether `turns` says where each user's turn begins, so that a cut prompt is a conversation again.

    Where a template writes the turns so that they cannot be told apart, it has one place, after the template's `head`
    ids (see `ChatFormat.encode_turns`).
    """
    users = sum(message["role"] == "user" for message in prompt)
    return len(prompt) == 1 or (len(turns) == users and (users > 1 or turns[0] > head))


class PromptStore(TokenStore):
    """R tokenized prompts in an Arrow file that is mapped into memory, uncut, with their messages as JSON beside them.

    Another model's tokenizer, such as a reward model's, reads the messages.
    """

    file_name = "prompts.arrow"
    id_columns = ("prompt",)


class TokenizedPrompts(TokenizedRows):
    """P prompts out of one or more stores, each cut to fit into `max_length`; the order is the caller's."""

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[P] int64: tokens of each prompt, after the cut."""
        return self.prompt_lengths(self.max_length)

    def ids(self, index: int) -> np.ndarray:
        """Ids of one prompt, int32, up to where the assistant's reply begins."""
        (prompt,) = self.stores[self.source[index]].segments(int(self.rows[index]))
        return self.cut(prompt, index, room=self.max_length)

    def messages(self, index: int) -> list[Message]:
        """The conversation of one prompt, whole also where its ids were cut."""
        return json.loads(self.stores[self.source[index]].text("messages", int(self.rows[index])))

    def messages_as_cut(self, index: int, chat_format: ChatFormat) -> list[Message]:
        """The conversation of one prompt as its ids have it: where they were cut, without the turns that are gone.

        What stays of a last turn that is cut itself is the text of its ids.
        """
        messages, store, row = self.messages(index), self.stores[self.source[index]], int(self.rows[index])
        (prompt,) = store.segments(row)
        if len(prompt) <= self.max_length:
            return messages
        users = [place for place, message in enumerate(messages) if message["role"] == "user"]
        begins, place = store.turns(row), store.kept_from(row, len(prompt), room=self.max_length)
        if place in begins:
            return [*messages[: users[0]], *messages[users[begins.index(place)] :]]
        words = chat_format.decode_after(prompt[: begins[0]], prompt[place : len(prompt) - store.tail_length])
        return [*messages[: users[0]], {"role": "user", "content": words}]


def _fit(store: PromptStore, max_length: int, *, cut: bool) -> Fit:
    """What fits, and what is cut: no conversation whose turns cannot be told apart, for a reward model reads them."""
    fit = fit_prompts(store, room=max_length, cut=cut)
    blurred = fit.cut & ~store.numbers("divided")
    return Fit(fit.kept & ~blurred, fit.cut & ~blurred)


def select_prompts(
    stores: Sequence[PromptStore],
    masks: Sequence[np.ndarray],
    *,
    max_length: int,
    truncation: PromptTruncation = "drop",
    unique: bool = True,
    part: Part | None = None,
) -> tuple[TokenizedPrompts, LoadReport]:
    """The rows of some stores that a run takes: those of `masks` ([R] bool each) that fit into `max_length`.

    With `unique`, a prompt that stands more than once, case and runs of blanks aside, is taken where it fits first.
    Returns the prompts, and a report in which prompts that are too long are refused, and cut and repeated ones named.
    Raises `DataError` when no prompt is left, or when one is too long and `truncation` is `error`.
    """
    fits = [_fit(store, max_length, cut=truncation == "cut") for store in stores]

    def describe(store: PromptStore, row: int) -> str:
        why = "" if store.numbers("divided")[row] else ", and its turns cannot be told apart in the template"
        return f"the prompt has {store.lengths[row, 0]} tokens, max_prompt_length is {max_length}{why}"

    advice = {"cut": "", "drop": ", or set truncation: cut", "error": ", or set truncation: cut or drop"}[truncation]
    rows, report = fitting_rows(
        stores,
        masks,
        fits,
        describe=describe,
        refuse=truncation == "error",
        noun="prompts",
        advice=f"raise max_prompt_length{advice}",
        part=part,
    )
    prompts = TokenizedPrompts(stores, rows, max_length=max_length)
    if unique:
        first = np.unique(prompts.numbers("prompt_hash"), return_index=True)[1]
        report.rows_repeated = prompts.origins(np.setdiff1d(np.arange(len(prompts)), first))
        prompts = prompts.taken(np.sort(first))
    return prompts, report
