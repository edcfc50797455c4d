"""Validated pairs -> token ids on disk -> the pairs of a run."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.chat_text import TURN_MARKERS
from rlhf_lightning.data.conversations import plain_form
from rlhf_lightning.data.examples import LoadReport, PreferenceExample, Refusal
from rlhf_lightning.data.preferences import iterate_preferences
from rlhf_lightning.data.sources import Split, WeightedSource
from rlhf_lightning.data.splits import Part, prompt_hash
from rlhf_lightning.data.token_store import (
    IDS,
    Fit,
    TokenizedRows,
    TokenStore,
    fit_prompts,
    fitting_rows,
    template_refusal,
    tokenized_directory,
    with_prompt_ids,
    write_rows,
)
from rlhf_lightning.errors import DataError

Truncation = Literal["keep_response", "drop", "error"]
"""What to do with a pair longer than max_length: `keep_response` cuts its prompt from the left (see
`ChatFormat.encode_turns`), and drops the pair when nothing of its last turn would stay; `drop` drops it; `error`
refuses the source."""


PAIR_SCHEMA = pa.schema(
    {
        "prompt": IDS,
        "chosen": IDS,
        "rejected": IDS,
        "turns": IDS,
        "margin": pa.float32(),
        "prompt_hash": pa.uint64(),
        "prompt_text_hash": pa.uint64(),
        "chosen_hash": pa.uint64(),
        "rejected_hash": pa.uint64(),
        "chosen_characters": pa.int32(),
        "rejected_characters": pa.int32(),
        "foreign_tokens": pa.bool_(),  # often a leak of another model's format
        "example_id": pa.string(),
        "origin": pa.string(),
    }
)


def tokenize_source(
    source: WeightedSource,
    chat_format: ChatFormat,
    *,
    columns: Mapping[str, str] | None = None,
    split: Split = "train",
    cache_dir: str | Path | None = None,
) -> PairStore:
    """Read, validate and encode one source of pairs, or find that in the cache (see `tokenized_directory`).

    Raises `DataError` when the source cannot be read; bad rows are counted in the store's report.
    """
    options = {"columns": columns, "split": split, "cache_dir": cache_dir}
    return PairStore(
        tokenized_directory("pairs", source, chat_format, iterate=iterate_preferences, write=write_pairs, **options)
    )


def write_pairs(
    directory: Path, rows: Iterable[PreferenceExample | Refusal], report: LoadReport, chat_format: ChatFormat
) -> None:
    """Encode rows, a chunk at a time, into `directory`.

    Both sides of a pair get the same prompt and the same terminator (see `ChatFormat`). Refused, and counted in
    `report` in the order of the rows, are pairs that hold a control token, that the chat template does not take, or
    whose sides are empty or the same to the tokenizer.
    """
    write_rows(directory / PairStore.file_name, rows, report, chat_format, schema=PAIR_SCHEMA, encode=_encoded)


def _encoded(chunk: Sequence[PreferenceExample | Refusal], chat_format: ChatFormat) -> Iterator[dict | Refusal]:
    """Columns of each pair of a chunk, or why it is refused, in order."""
    rows = with_prompt_ids([_with_place(row, chat_format) for row in chunk], chat_format)
    readable = [row for row in rows if not isinstance(row, Refusal)]
    responses = [(pair.chosen, pair.rejected) for pair, _ in readable]
    encoded = iter(chat_format.encode_responses([prompt for _, prompt in readable], responses))
    for row in rows:
        if isinstance(row, Refusal):
            yield row
            continue
        pair, prompt = row
        ids = next(encoded)
        if isinstance(ids, DataError):
            yield template_refusal(pair, ids)
            continue
        chosen, rejected = ids.responses
        if chat_format.says_nothing(pair.chosen, chosen) or chat_format.says_nothing(pair.rejected, rejected):
            message = f"{pair.origin}: a response has no text that the tokenizer knows"
            yield Refusal("empty_response", message, pair.origin)
        elif chosen == rejected:
            message = f"{pair.origin}: chosen and rejected are the same text to the tokenizer"
            yield Refusal("identical_pair", message, pair.origin)
        else:
            yield {
                "prompt": ids.prompt,
                "turns": prompt.turns,
                "chosen": chosen,
                "rejected": rejected,
                "margin": pair.margin,
                "prompt_hash": prompt_hash(pair.prompt),
                "prompt_text_hash": _text_hash(
                    "\x1e".join(f"{m['role']}\x1f{plain_form(m['content'])}" for m in pair.prompt)
                ),
                "chosen_hash": _text_hash(pair.chosen),
                "rejected_hash": _text_hash(pair.rejected),
                "chosen_characters": len(pair.chosen),
                "rejected_characters": len(pair.rejected),
                "foreign_tokens": any(map(TURN_MARKERS.search, pair.texts)),
                "example_id": pair.example_id,
                "origin": pair.origin,
            }


def _with_place(row: PreferenceExample | Refusal, chat_format: ChatFormat) -> PreferenceExample | Refusal:
    """A row, or why it is refused: its reasoning has no place in a template that does not know `<think>`."""
    if isinstance(row, Refusal) or not row.has_reasoning or not isinstance(chat_format, ChatFormat):
        return row
    if chat_format.template is not None and "</think>" in chat_format.template:
        return row
    message = (
        f"{row.origin}: reasoning_content has no place in the chat template; write it into the content, or remove it"
    )
    return Refusal("no_place", message, row.origin)


def _text_hash(text: str) -> int:
    """64 bits of a text's plain form (see `plain_form`). Case may be all that a pair is about, so it counts."""
    return int.from_bytes(hashlib.sha256(plain_form(text).encode()).digest()[:8], "big")


class PairStore(TokenStore):
    """R tokenized pairs in an Arrow file that is mapped into memory, uncut; responses end with the terminator.

    Its columns of ids, and so those of `lengths` and `segments`, are prompt, chosen and rejected response.
    """

    file_name = "pairs.arrow"
    id_columns = ("prompt", "chosen", "rejected")


def fit_rows(store: PairStore, *, max_length: int, truncation: Truncation = "keep_response") -> Fit:
    """Decide on each row by its longer side. A cut keeps the template's head and at least one id of the messages."""
    room = max_length - store.lengths[:, 1:].max(axis=1)
    return fit_prompts(store, room=room, cut=truncation == "keep_response")


class TokenizedPairs(TokenizedRows):
    """P pairs out of one or more stores, each cut to fit into `max_length`; the order is the caller's."""

    @functools.cached_property
    def margin(self) -> np.ndarray:
        """[P] float32, 0 where the data does not say."""
        return np.nan_to_num(self.numbers("margin"), nan=0.0)

    @functools.cached_property
    def segment_lengths(self) -> np.ndarray:
        """[P, 3] int64: tokens of prompt (after the cut), chosen and rejected response."""
        lengths = self.gathered(lambda store: store.lengths)
        lengths[:, 0] = self.prompt_lengths(self.max_length - lengths[:, 1:].max(axis=1))
        return lengths

    @property
    def lengths(self) -> np.ndarray:
        """[P] int64: tokens of the longer of the two rows of each pair."""
        return self.segment_lengths[:, 0] + self.segment_lengths[:, 1:].max(axis=1)

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of prompt, chosen response and rejected response of one pair, int32."""
        prompt, chosen, rejected = self.stores[self.source[index]].segments(int(self.rows[index]))
        room = self.max_length - max(len(chosen), len(rejected))
        return self.cut(prompt, index, room=room), chosen, rejected


def select_pairs(
    stores: Sequence[PairStore],
    masks: Sequence[np.ndarray],
    *,
    max_length: int,
    truncation: Truncation = "keep_response",
    part: Part | None = None,
) -> tuple[TokenizedPairs, LoadReport]:
    """The rows of some stores that a run takes: those of `masks` ([R] bool each) that fit into `max_length`.

    Returns the pairs, and a report in which pairs that are too long are refused and cut ones are named. Raises
    `DataError` when no pair is left, or when one is too long and `truncation` is `error`.
    """
    fits = [fit_rows(store, max_length=max_length, truncation=truncation) for store in stores]

    def describe(store: PairStore, row: int) -> str:
        prompt, response = store.lengths[row, 0], store.lengths[row, 1:].max()
        return (
            f"the longer row has {prompt + response} tokens (prompt {prompt}, response and terminator {response}), "
            f"max_length is {max_length}"
        )

    refuse = truncation == "error"
    advice = "raise max_length" + (", or set truncation: keep_response or drop" if refuse else "")
    rows, report = fitting_rows(
        stores, masks, fits, describe=describe, refuse=refuse, noun="pairs", advice=advice, part=part
    )
    return TokenizedPairs(stores, rows, max_length=max_length), report
