"""Validated pairs or prompts -> token ids, and the Arrow file on disk that holds those of a source.

The ids of a source are written once, untruncated, and the file is then mapped into memory, so that a data set may be
larger than the memory. What a run takes of them is decided by `selection`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from rlhf_lightning.data.chat_format import ChatFormat, EncodedPrompt
from rlhf_lightning.data.chat_text import TURN_MARKERS
from rlhf_lightning.data.conversations import plain_form
from rlhf_lightning.data.examples import LoadReport, Message, PreferenceExample, PromptExample, Refusal
from rlhf_lightning.data.preferences import iterate_preferences
from rlhf_lightning.data.prompts import iterate_prompts
from rlhf_lightning.data.reading import reading
from rlhf_lightning.data.sources import Split, WeightedSource, described, fingerprint, row_count
from rlhf_lightning.data.splits import prompt_hash
from rlhf_lightning.data.token_cache import cached_directory, content_key
from rlhf_lightning.errors import DataError

log = logging.getLogger(__name__)

Kind = Literal["pairs", "prompts"]
Example = PreferenceExample | PromptExample
_CHUNK_ROWS, _CHUNK_CHARACTERS = 2048, 4_000_000
_IDS = pa.list_(pa.int32())
_FILE, _REPORT = "rows.arrow", "report.json"

PAIR_SCHEMA = pa.schema(
    {
        "prompt": _IDS,
        "chosen": _IDS,
        "rejected": _IDS,
        "turns": _IDS,
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
PROMPT_SCHEMA = pa.schema(
    {
        "prompt": _IDS,
        "turns": _IDS,
        "divided": pa.bool_(),
        "prompt_hash": pa.uint64(),
        "messages": pa.string(),  # as JSON: another model's tokenizer, such as a reward model's, reads them
        "example_id": pa.string(),
        "origin": pa.string(),
    }
)


def tokenize_source(
    source: WeightedSource,
    chat_format: ChatFormat,
    *,
    kind: Kind = "pairs",
    columns: Mapping[str, str] | None = None,
    split: Split = "train",
    cache_dir: str | Path | None = None,
) -> TokenStore:
    """Read, validate and tokenize one source of pairs or prompts, or find that in the cache.

    The cache's entry is named by a hash of the rows, the columns, the tokenizer, the template and this code. Raises
    `DataError` when the source cannot be read; bad rows are counted in the store's report.
    """
    columns = source.columns or columns
    rows_hash = fingerprint(source.source, split=split)
    key = content_key(kind, rows_hash, sorted((columns or {}).items()), chat_format.fingerprint())

    def make(directory: Path) -> None:
        began = time.monotonic()
        report = LoadReport(source=described(source.source, split=split))
        iterate = iterate_preferences if kind == "pairs" else iterate_prompts
        rows = iterate(source.source, report, columns=columns, split=split)
        with reading(report.source, lambda: row_count(source.source, split=split)) as watched, _collecting_little():
            write_store(directory, watched(rows), report, chat_format, kind=kind)
        if (seconds := time.monotonic() - began) > 5:
            log.info("%s: %d rows tokenized in %.0f s, kept for later runs", source.source, report.rows_read, seconds)

    return TokenStore(cached_directory(key, make, cache_dir=cache_dir))


@contextlib.contextmanager
def _collecting_little() -> Iterator[None]:
    """Inside, the garbage collector leaves alone what is there already: all modules, again and again, while rows are
    made by the thousand. It took a quarter of the time of a row without a tokenizer."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def write_store(
    directory: Path,
    rows: Iterable[Example | Refusal],
    report: LoadReport,
    chat_format: ChatFormat,
    *,
    kind: Kind = "pairs",
) -> None:
    """Tokenize rows, a chunk at a time, into the files of a `TokenStore`; refusals are counted in their order.

    Of `report` the number of rows read, the label and the unused columns are kept.
    """
    tokenize, schema = (tokenize_pairs, PAIR_SCHEMA) if kind == "pairs" else (tokenize_prompts, PROMPT_SCHEMA)
    ordered = LoadReport(source=report.source)
    with pa.OSFile(str(directory / _FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for chunk in _chunks(rows):
            tokenized = tokenize(chunk, chat_format)
            writer.write_batch(tokenized.table)
            for refusal in tokenized.refused:
                ordered.refuse(refusal)
    ordered.rows_read, ordered.label, ordered.columns_unused = report.rows_read, report.label, report.columns_unused
    details = {"report": asdict(ordered), "tail_length": chat_format.tail_length}
    (directory / _REPORT).write_text(json.dumps(details), encoding="utf-8")


def _chunks(rows: Iterable[Example | Refusal]) -> Iterator[list[Example | Refusal]]:
    chunk: list[Example | Refusal] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        if not isinstance(row, Refusal):
            characters += sum(map(len, row.texts))
        if len(chunk) == _CHUNK_ROWS or characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


class Tokenized(NamedTuple):
    """Rows as token ids, and those of them that were refused, each in the order of the rows."""

    table: pa.RecordBatch
    """Of `PAIR_SCHEMA` or `PROMPT_SCHEMA`."""
    refused: list[Refusal]


def tokenize_pairs(rows: Sequence[PreferenceExample | Refusal], chat_format: ChatFormat) -> Tokenized:
    """Token ids of pairs. Both sides get the same prompt and the same EOS token at their end (see `ChatFormat`).

    Refused are pairs that hold a control token, that the chat template does not take, or whose sides are empty or the
    same to the tokenizer. Refusals among the rows stay what they are.
    """
    encoded = _with_prompt_ids([_with_place(row, chat_format) for row in rows], chat_format)
    readable = [row for row in encoded if not isinstance(row, Refusal)]
    responses = iter(
        chat_format.encode_responses(
            [prompt for _, prompt in readable], [(pair.chosen, pair.rejected) for pair, _ in readable]
        )
    )
    made = [row if isinstance(row, Refusal) else _pair(*row, next(responses), chat_format) for row in encoded]
    return _tokenized(made, PAIR_SCHEMA)


def tokenize_prompts(rows: Sequence[PromptExample | Refusal], chat_format: ChatFormat) -> Tokenized:
    """Token ids of prompts, with their messages beside them.

    Refused are prompts that hold a control token, or that the chat template does not take. Refusals among the rows stay
    what they are.
    """
    head = len(chat_format.head_ids)
    encoded = _with_prompt_ids(rows, chat_format)
    made = [row if isinstance(row, Refusal) else _prompt(*row, head=head) for row in encoded]
    return _tokenized(made, PROMPT_SCHEMA)


def _tokenized(rows: Sequence[dict | Refusal], schema: pa.Schema) -> Tokenized:
    values = [row for row in rows if not isinstance(row, Refusal)]
    table = pa.RecordBatch.from_pylist(values, schema=schema)
    return Tokenized(table, [row for row in rows if isinstance(row, Refusal)])


def _pair(pair: PreferenceExample, prompt: EncodedPrompt, ids: object, chat_format: ChatFormat) -> dict | Refusal:
    """The values of one pair by `PAIR_SCHEMA`, or why it is refused; `ids` is what `encode_responses` gives for it."""
    if isinstance(ids, DataError):
        return _template_refusal(pair, ids)
    chosen, rejected = ids.responses
    if chat_format.says_nothing(pair.chosen, chosen) or chat_format.says_nothing(pair.rejected, rejected):
        message = f"{pair.origin}: a response has no text that the tokenizer knows"
        return Refusal("empty_response", message, pair.origin)
    if chosen == rejected:
        message = f"{pair.origin}: chosen and rejected are the same text to the tokenizer"
        return Refusal("identical_pair", message, pair.origin)
    words = "\x1e".join(f"{message['role']}\x1f{plain_form(message['content'])}" for message in pair.prompt)
    return {
        "prompt": ids.prompt,
        "turns": prompt.turns,
        "chosen": chosen,
        "rejected": rejected,
        "margin": pair.margin,
        "prompt_hash": prompt_hash(pair.prompt),
        "prompt_text_hash": _text_hash(words),
        "chosen_hash": _text_hash(pair.chosen),
        "rejected_hash": _text_hash(pair.rejected),
        "chosen_characters": len(pair.chosen),
        "rejected_characters": len(pair.rejected),
        "foreign_tokens": any(map(TURN_MARKERS.search, pair.texts)),
        "example_id": pair.example_id,
        "origin": pair.origin,
    }


def _prompt(example: PromptExample, prompt: EncodedPrompt, *, head: int) -> dict:
    """The values of one prompt by `PROMPT_SCHEMA`."""
    return {
        "prompt": prompt.ids,
        "turns": prompt.turns,
        "divided": _is_divided(example.prompt, prompt.turns, head=head),
        "prompt_hash": prompt_hash(example.prompt),
        "messages": json.dumps(list(example.prompt), ensure_ascii=False),
        "example_id": example.example_id,
        "origin": example.origin,
    }


def _is_divided(prompt: Sequence[Message], turns: Sequence[int], *, head: int) -> bool:
    """Whether `turns` says where each user's turn begins, so that a truncated prompt is a conversation again.

    Where a template writes the turns so that they cannot be told apart, it has one place, after the template's `head`
    ids (see `ChatFormat.encode_turns`).
    """
    users = sum(message["role"] == "user" for message in prompt)
    return len(prompt) == 1 or (len(turns) == users and (users > 1 or turns[0] > head))


def _with_prompt_ids(
    rows: Sequence[Example | Refusal], chat_format: ChatFormat
) -> list[tuple[Example, EncodedPrompt] | Refusal]:
    """Each row with the ids of its prompt (see `ChatFormat.encode_turns`), in order.

    Refused are rows that hold a control token, or that the chat template does not take.
    """
    rows = [row if isinstance(row, Refusal) else _with_prompt_text(row, chat_format) for row in rows]
    # Neighbours often share a prompt.
    texts = {text: example.prompt for example, text in (row for row in rows if not isinstance(row, Refusal))}
    encoded = chat_format.encode_turns([(prompt, text) for text, prompt in texts.items()])
    prompts = dict(zip(texts, encoded, strict=True))
    return [row if isinstance(row, Refusal) else (row[0], prompts[row[1]]) for row in rows]


def _with_prompt_text(example: Example, chat_format: ChatFormat) -> tuple[Example, str] | Refusal:
    if (token := chat_format.control_token_in(example.texts)) is not None:
        message = f"{example.origin}: a text contains the control token {token!r}"
        return Refusal("special_tokens", message, example.origin)
    try:
        return example, chat_format.generation_text(example.prompt)
    except DataError as error:
        return _template_refusal(example, error)


def _template_refusal(example: Example, error: DataError) -> Refusal:
    return Refusal("template_refused", f"{example.origin}: {error}", example.origin)


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


class TokenStore:
    """R tokenized rows in an Arrow file that is mapped into memory, untruncated.

    C of its columns hold token ids: the prompt first, then, for pairs, the chosen and the rejected response, which end
    with the EOS token.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        details = json.loads((self.directory / _REPORT).read_text(encoding="utf-8"))
        self.report = LoadReport(**details["report"])
        self.tail_length: int = details["tail_length"]
        """Ids that every prompt has after its last message."""
        self._table = pa.ipc.open_file(pa.memory_map(str(self.directory / _FILE))).read_all()
        self._columns = {
            field.name: _id_lists(self._table.column(field.name)) for field in self._table.schema if field.type == _IDS
        }
        self.id_columns = tuple(name for name in self._columns if name != "turns")

    def __reduce__(self):
        return type(self), (self.directory,)

    def __len__(self) -> int:
        return self._table.num_rows

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, [R]; a margin that is not said is NaN."""
        return self._table.column(name).to_numpy()

    def texts(self, name: str, rows: np.ndarray) -> list[str]:
        """A column of texts, such as `example_id` or `origin`, of some rows."""
        return self._table.column(name).take(pa.array(rows)).to_pylist()

    def text(self, name: str, row: int) -> str:
        """A column of texts of one row."""
        return self._table.column(name)[row].as_py()

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[R, C] int64: tokens of each column of ids."""
        lists = (self._columns[name] for name in self.id_columns)
        columns = (np.concatenate([np.diff(offsets) for offsets, _ in batches] or [[]]) for batches in lists)
        return np.stack([column.astype(np.int64) for column in columns], axis=1)

    @functools.cached_property
    def heads(self) -> np.ndarray:
        """[R] int64: ids at the prompt's beginning that truncation keeps."""
        return np.concatenate([ids[offsets[:-1]] for offsets, ids in self._columns["turns"]] or [[]]).astype(np.int64)

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """First row of each record batch, and the number of rows."""
        return np.cumsum([0, *(len(offsets) - 1 for offsets, _ in self._columns["prompt"])])

    def segments(self, row: int) -> tuple[np.ndarray, ...]:
        """Ids of each column of one row, int32, untruncated."""
        return tuple(self._ids(name, row) for name in self.id_columns)

    def turns(self, row: int) -> list[int]:
        """Where in a row's prompt each user's words begin (see `ChatFormat.encode_turns`)."""
        return self._ids("turns", row).tolist()

    def _ids(self, name: str, row: int) -> np.ndarray:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        row -= int(self._starts[batch])
        offsets, ids = self._columns[name][batch]
        return ids[offsets[row] : offsets[row + 1]]


def _id_lists(column: pa.ChunkedArray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Offsets and ids of each record batch, without a copy."""
    return [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in column.chunks if len(chunk)]
