"""Validated pairs, conversations or prompts -> token ids, and the Arrow file on disk that holds those of a source.

The ids of a source are written once, untruncated, and the file is then mapped into memory, so that a data set may be
larger than the memory. What a run takes of them is decided by `selection`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from rlhf_lightning.data.chat_format import ChatFormat, EncodedPrompt, EncodedResponses
from rlhf_lightning.data.chat_text import TURN_MARKERS
from rlhf_lightning.data.conversations import BadRow, plain_form
from rlhf_lightning.data.examples import (
    LabelledExample,
    LoadReport,
    Message,
    PreferenceExample,
    PromptExample,
    Refusal,
    SFTExample,
)
from rlhf_lightning.data.preferences import iterate_preferences
from rlhf_lightning.data.prompts import iterate_prompts
from rlhf_lightning.data.reading import watched
from rlhf_lightning.data.sft import iterate_sft
from rlhf_lightning.data.sources import Split, WeightedSource, described, fingerprint, row_count
from rlhf_lightning.data.splits import prompt_hash
from rlhf_lightning.data.token_cache import cached_directory, content_key
from rlhf_lightning.data.unpaired import iterate_unpaired
from rlhf_lightning.errors import DataError

Kind = Literal["pairs", "conversations", "responses", "prompts"]
Example = PreferenceExample | SFTExample | PromptExample
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
SFT_SCHEMA = pa.schema(
    {
        "prompt": _IDS,
        "response": _IDS,
        "turns": _IDS,
        "learned": _IDS,  # first and one past the last id of each earlier assistant turn that is learned
        "prompt_hash": pa.uint64(),
        "prompt_text_hash": pa.uint64(),
        "response_hash": pa.uint64(),
        "foreign_tokens": pa.bool_(),
        "example_id": pa.string(),
        "origin": pa.string(),
    }
)
RESPONSE_SCHEMA = SFT_SCHEMA.remove(SFT_SCHEMA.get_field_index("learned")).append(pa.field("label", pa.float32()))
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

_SCHEMAS: dict[Kind, pa.Schema] = {
    "pairs": PAIR_SCHEMA,
    "conversations": SFT_SCHEMA,
    "responses": RESPONSE_SCHEMA,
    "prompts": PROMPT_SCHEMA,
}
READERS: dict[Kind, Callable[..., Iterator[Example | Refusal]]] = {
    "pairs": iterate_preferences,
    "conversations": iterate_sft,
    "responses": iterate_unpaired,
    "prompts": iterate_prompts,
}


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
        report = LoadReport(source=described(source.source, split=split))
        rows = READERS[kind](source.source, report, columns=columns, split=split)
        shown = watched(rows, report.source, lambda: row_count(source.source, split=split))
        with _collecting_little():
            write_store(directory, shown, report, chat_format, kind=kind)

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

    Refused are rows that hold a control token, that the chat template does not take, or whose responses are empty or
    the same to the tokenizer. Of `report` the number of rows read, the label and the unused columns are kept.
    """
    schema = _SCHEMAS[kind]
    ordered = LoadReport(source=report.source)
    with pa.OSFile(str(directory / _FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for chunk in _chunks(rows):
            refused = {place: row for place, row in enumerate(chunk) if isinstance(row, Refusal)}
            examples = {place: row for place, row in enumerate(chunk) if not isinstance(row, Refusal)}
            values = _tokenize(examples, refused, chat_format)
            writer.write_batch(pa.RecordBatch.from_pylist(values, schema=schema))
            for _, refusal in sorted(refused.items()):
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


def _tokenize(examples: dict[int, Example], refused: dict[int, Refusal], chat_format: ChatFormat) -> list[dict]:
    """The values of the store's columns of each example that is usable; the others' places are put into `refused`.

    Both responses of a pair get the same prompt and the same EOS token at their end (see `ChatFormat`).
    """
    texts = {}
    for place, example in examples.items():
        try:
            texts[place] = _prompt_text(example, chat_format)
        except (BadRow, DataError) as error:
            refused[place] = _refusal(error, example.origin)
    unique = {text: examples[place].prompt for place, text in texts.items()}  # neighbours often share a prompt
    encoded = chat_format.encode_turns([(prompt, text) for text, prompt in unique.items()])
    by_text = dict(zip(unique, encoded, strict=True))
    prompts = {place: by_text[text] for place, text in texts.items()}
    answers = {place: its for place in prompts if (its := examples[place].responses)}
    encoded_answers = chat_format.encode_responses([prompts[place] for place in answers], list(answers.values()))
    responses = dict(zip(answers, encoded_answers, strict=True))
    rows = []
    for place, prompt in prompts.items():
        example = examples[place]
        try:
            if isinstance(example, PreferenceExample):
                rows.append(_pair_values(example, prompt, responses[place], chat_format))
            elif isinstance(example, SFTExample):
                rows.append(_sft_values(example, prompt, responses[place], chat_format))
            else:
                rows.append(_prompt_values(example, prompt, head=len(chat_format.head_ids)))
        except (BadRow, DataError) as error:
            refused[place] = _refusal(error, example.origin)
    return rows


def _refusal(error: BadRow | DataError, origin: str) -> Refusal:
    reason = error.reason if isinstance(error, BadRow) else "template_refused"
    return Refusal(reason, f"{origin}: {error}", origin)


def _prompt_text(example: Example, chat_format: ChatFormat) -> str:
    """The text of a prompt. Raises `BadRow`, or `DataError` as the template does."""
    if example.has_reasoning and not chat_format.knows_thoughts:
        raise BadRow(
            "no_place",
            "reasoning_content has no place in the chat template; write it into the content, or remove it",
        )
    if (token := chat_format.control_token_in(example.texts)) is not None:
        raise BadRow("special_tokens", f"a text contains the control token {token!r}")
    return chat_format.generation_text(example.prompt)


def _pair_values(
    pair: PreferenceExample, prompt: EncodedPrompt, ids: EncodedResponses | DataError, chat_format: ChatFormat
) -> dict[str, object]:
    """The values of one pair by `PAIR_SCHEMA`. Raises `BadRow`, and `ids` where the template did not take it."""
    if isinstance(ids, DataError):
        raise ids
    chosen, rejected = ids.responses
    if chat_format.says_nothing(pair.chosen, chosen) or chat_format.says_nothing(pair.rejected, rejected):
        raise BadRow("empty_response", "a response has no text that the tokenizer knows")
    if chosen == rejected:
        raise BadRow("identical_pair", "chosen and rejected are the same text to the tokenizer")
    return {
        "prompt": ids.prompt,
        "turns": prompt.turns,
        "chosen": chosen,
        "rejected": rejected,
        "margin": pair.margin,
        "prompt_hash": prompt_hash(pair.prompt),
        "prompt_text_hash": _turns_hash(pair.prompt),
        "chosen_hash": _text_hash(pair.chosen),
        "rejected_hash": _text_hash(pair.rejected),
        "chosen_characters": len(pair.chosen),
        "rejected_characters": len(pair.rejected),
        "foreign_tokens": any(map(TURN_MARKERS.search, pair.texts)),
        "example_id": pair.example_id,
        "origin": pair.origin,
    }


def _sft_values(
    example: SFTExample, prompt: EncodedPrompt, ids: EncodedResponses | DataError, chat_format: ChatFormat
) -> dict[str, object]:
    """The values of one example by `SFT_SCHEMA`, or `RESPONSE_SCHEMA`.

    Raises `BadRow`, and `ids` where the template did not take it.
    """
    if isinstance(ids, DataError):
        raise ids
    (response,) = ids.responses
    learned = chat_format.assistant_turns(prompt) if example.every_turn else []
    if chat_format.says_nothing(example.response, response) or any(start >= stop for start, stop in learned):
        raise BadRow("empty_response", "an assistant turn has no text that the tokenizer knows")
    return {
        "prompt": ids.prompt,
        "turns": prompt.turns,
        "response": response,
        "learned": [place for span in learned for place in span],
        "prompt_hash": prompt_hash(example.prompt),
        "prompt_text_hash": _turns_hash(example.prompt),
        "response_hash": _text_hash(example.response),
        "label": example.label if isinstance(example, LabelledExample) else None,
        "foreign_tokens": any(map(TURN_MARKERS.search, example.texts)),
        "example_id": example.example_id,
        "origin": example.origin,
    }


def _prompt_values(example: PromptExample, prompt: EncodedPrompt, *, head: int) -> dict[str, object]:
    """The values of one prompt by `PROMPT_SCHEMA`.

    It is `divided` where `turns` says where each user's turn begins, so that a truncated prompt is a conversation
    again. Where a template writes the turns so that they cannot be told apart, there is one place, after the
    template's `head` ids (see `ChatFormat.encode_turns`).
    """
    users = sum(message["role"] == "user" for message in example.prompt)
    told_apart = len(prompt.turns) == users and (users > 1 or prompt.turns[0] > head)
    return {
        "prompt": prompt.ids,
        "turns": prompt.turns,
        "divided": len(example.prompt) == 1 or told_apart,
        "prompt_hash": prompt_hash(example.prompt),
        "messages": json.dumps(list(example.prompt), ensure_ascii=False),
        "example_id": example.example_id,
        "origin": example.origin,
    }


def _turns_hash(messages: Sequence[Message]) -> int:
    """The same of the texts and roles of some turns."""
    return _text_hash("\x1e".join(f"{turn['role']}\x1f{plain_form(turn['content'])}" for turn in messages))


def _text_hash(text: str) -> int:
    """64 bits of a text's plain form (see `plain_form`). Case may be all that a pair is about, so it counts."""
    return int.from_bytes(hashlib.sha256(plain_form(text).encode()).digest()[:8], "big")


class TokenStore:
    """R tokenized rows in an Arrow file that is mapped into memory, untruncated.

    C of its columns hold token ids: the prompt first, then, for pairs, the chosen and the rejected response, for
    conversations the last assistant turn, of judged responses that one; responses end with the EOS token.
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
        self.id_columns = tuple(name for name in self._columns if name not in ("turns", "learned"))

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

    @property
    def divided(self) -> np.ndarray:
        """[R] bool: whether a prompt may be truncated (see `_prompt_values`); that of a pair may."""
        if "divided" in self._table.column_names:
            return self.numbers("divided")
        return np.ones(len(self), dtype=bool)

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

    def learned(self, row: int) -> np.ndarray:
        """[..., 2]: first and one past the last id of each assistant turn in a row's prompt that is learned."""
        return self._ids("learned", row).reshape(-1, 2)

    def _ids(self, name: str, row: int) -> np.ndarray:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        row -= int(self._starts[batch])
        offsets, ids = self._columns[name][batch]
        return ids[offsets[row] : offsets[row + 1]]


def _id_lists(column: pa.ChunkedArray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Offsets and ids of each record batch, without a copy."""
    return [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in column.chunks if len(chunk)]
