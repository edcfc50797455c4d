"""Validated pairs -> token ids on disk -> the pairs of a run.

The ids of a source are written once, uncut, to an Arrow file that is then mapped into memory, so that a set may be
larger than the memory. What a run takes of them, and where it cuts a prompt, is decided on their lengths alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.examples import LoadReport, PreferenceExample, Refusal
from rlhf_lightning.data.preferences import iterate_preferences
from rlhf_lightning.data.sources import Split, WeightedSource, fingerprint
from rlhf_lightning.data.splitting import prompt_hash
from rlhf_lightning.data.token_cache import cached_directory, content_key
from rlhf_lightning.errors import DataError

log = logging.getLogger(__name__)

Truncation = Literal["keep_response", "drop", "error"]
"""What to do with a pair longer than max_length: `keep_response` cuts its prompt from the left, after the template's
head, and drops the pair when nothing of the prompt would stay; `drop` drops it; `error` refuses the source."""

_CHUNK_ROWS, _CHUNK_CHARACTERS = 2048, 4_000_000
_IDS = pa.list_(pa.int32())
PAIR_SCHEMA = pa.schema(
    {
        "prompt": _IDS,
        "chosen": _IDS,
        "rejected": _IDS,
        "head": pa.int32(),
        "margin": pa.float32(),
        "prompt_hash": pa.uint64(),
        "chosen_hash": pa.uint64(),
        "rejected_hash": pa.uint64(),
        "chosen_characters": pa.int32(),
        "rejected_characters": pa.int32(),
        "foreign_tokens": pa.bool_(),
        "example_id": pa.string(),
        "origin": pa.string(),
    }
)
_FOREIGN_TOKENS = re.compile(
    r"<\|\w+\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>|<</?SYS>>|### (?:Human|Assistant|Instruction|Response):"
)
"""Control tokens and role markers of well-known models; in a text they are often a leak of another model's format."""


def tokenize_source(
    source: WeightedSource,
    chat_format: ChatFormat,
    *,
    columns: Mapping[str, str] | None = None,
    split: Split = "train",
    cache_dir: str | Path | None = None,
) -> PairStore:
    """Read, validate and encode one source, or find that in the cache.

    The entry's name is a hash of the rows, the columns, the tokenizer, the template and this code. Raises `DataError`
    when the source cannot be read; bad rows are counted in the store's report.
    """
    columns = source.columns or columns
    rows = fingerprint(source.source, split=split)
    key = content_key("pairs", rows, sorted((columns or {}).items()), chat_format.fingerprint())

    def make(directory: Path) -> None:
        began = time.monotonic()
        report = LoadReport(source=source.source)
        rows = iterate_preferences(source.source, report, columns=columns, split=split)
        write_pairs(directory, rows, report, chat_format)
        if (seconds := time.monotonic() - began) > 5:
            log.info("%s: %d rows tokenized in %.0f s, kept for later runs", source.source, report.rows_read, seconds)

    return PairStore(cached_directory(key, make, cache_dir=cache_dir))


def write_pairs(
    directory: Path, rows: Iterable[PreferenceExample | Refusal], report: LoadReport, chat_format: ChatFormat
) -> None:
    """Encode rows, a chunk at a time, into `directory`.

    Both sides of a pair get the same prompt and the same terminator. Refused, and counted in `report` in the order of
    the rows, are pairs that hold a control token, that the chat template does not take, or whose sides are empty or
    the same to the tokenizer.
    """
    ordered = LoadReport(source=report.source)
    with pa.OSFile(str(directory / "pairs.arrow"), "wb") as file, pa.ipc.new_file(file, PAIR_SCHEMA) as writer:
        for chunk in _chunks(rows):
            columns: dict[str, list] = {name: [] for name in PAIR_SCHEMA.names}
            for row in _encoded(chunk, chat_format):
                if isinstance(row, Refusal):
                    ordered.refuse(row)
                else:
                    for name, value in row.items():
                        columns[name].append(value)
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=PAIR_SCHEMA))
    ordered.rows_read = report.rows_read
    details = {"report": asdict(ordered), "tail_length": chat_format.tail_length}
    (directory / "report.json").write_text(json.dumps(details), encoding="utf-8")


def _chunks(rows: Iterable[PreferenceExample | Refusal]) -> Iterator[list[PreferenceExample | Refusal]]:
    chunk: list[PreferenceExample | Refusal] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        if isinstance(row, PreferenceExample):
            characters += len(row.chosen) + len(row.rejected) + sum(len(turn["content"]) for turn in row.prompt)
        if len(chunk) == _CHUNK_ROWS or characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encoded(chunk: Sequence[PreferenceExample | Refusal], chat_format: ChatFormat) -> Iterator[dict | Refusal]:
    """Columns of each pair of a chunk, or why it is refused, in order."""
    rows = [row if isinstance(row, Refusal) else _with_prompt_text(row, chat_format) for row in chunk]
    readable = [row for row in rows if not isinstance(row, Refusal)]
    texts = list(dict.fromkeys(text for _, text in readable))  # neighbours often share a prompt
    prompts = dict(zip(texts, chat_format.encode_prompts(texts), strict=True))
    responses = chat_format.encode(
        [chat_format.response_text(text) for pair, _ in readable for text in (pair.chosen, pair.rejected)]
    )
    sides = iter(responses)
    for row in rows:
        if isinstance(row, Refusal):
            yield row
            continue
        pair, text = row
        chosen, rejected = next(sides), next(sides)
        if not (chosen and rejected):
            message = f"{pair.origin}: a response has no text that the tokenizer knows"
            yield Refusal("empty_response", message, pair.origin)
        elif chosen == rejected:
            message = f"{pair.origin}: chosen and rejected are the same text to the tokenizer"
            yield Refusal("identical_pair", message, pair.origin)
        else:
            yield {
                "prompt": prompts[text],
                "chosen": [*chosen, chat_format.terminator_id],
                "rejected": [*rejected, chat_format.terminator_id],
                "head": chat_format.shared_head(prompts[text]),
                "margin": pair.margin,
                "prompt_hash": prompt_hash(pair.prompt),
                "chosen_hash": _text_hash(pair.chosen),
                "rejected_hash": _text_hash(pair.rejected),
                "chosen_characters": len(pair.chosen),
                "rejected_characters": len(pair.rejected),
                "foreign_tokens": any(map(_FOREIGN_TOKENS.search, pair.texts)),
                "example_id": pair.example_id,
                "origin": pair.origin,
            }


def _with_prompt_text(pair: PreferenceExample, chat_format: ChatFormat) -> tuple[PreferenceExample, str] | Refusal:
    if (token := chat_format.control_token_in(pair.texts)) is not None:
        message = f"{pair.origin}: a text contains the control token {token!r}"
        return Refusal("special_tokens", message, pair.origin)
    try:
        return pair, chat_format.prompt_text(pair.prompt)
    except DataError as error:
        return Refusal("template_refused", f"{pair.origin}: {error}", pair.origin)


def _text_hash(text: str) -> int:
    """64 bits that ignore case and runs of white space."""
    normalized = " ".join(text.split()).casefold()
    return int.from_bytes(hashlib.sha256(normalized.encode("utf-8", "surrogatepass")).digest()[:8], "big")


class PairStore:
    """R tokenized pairs in an Arrow file that is mapped into memory, uncut; responses end with the terminator."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        details = json.loads((self.directory / "report.json").read_text(encoding="utf-8"))
        self.report = LoadReport(**details["report"])
        self.tail_length: int = details["tail_length"]
        """Ids that every prompt has after its last message."""
        reader = pa.ipc.open_file(pa.memory_map(str(self.directory / "pairs.arrow")))
        self._table = reader.read_all()
        self._columns = {name: _id_lists(self._table.column(name)) for name in ("prompt", "chosen", "rejected")}

    def __reduce__(self):
        return PairStore, (self.directory,)

    def __len__(self) -> int:
        return self._table.num_rows

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, [R]; a margin that is not said is NaN."""
        return self._table.column(name).to_numpy()

    def texts(self, name: str, rows: np.ndarray) -> list[str]:
        """`example_id` or `origin` of some rows."""
        return self._table.column(name).take(pa.array(rows)).to_pylist()

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[R, 3] int64: tokens of prompt, chosen response and rejected response."""
        columns = (np.concatenate([np.diff(o) for o, _ in lists] or [[]]) for lists in self._columns.values())
        return np.stack([column.astype(np.int64) for column in columns], axis=1)

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """First row of each record batch, and the number of rows."""
        return np.cumsum([0, *(len(offsets) - 1 for offsets, _ in self._columns["prompt"])])

    def segments(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of prompt, chosen and rejected response of one row, int32, uncut."""
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        row -= int(self._starts[batch])
        lists = (self._columns[name][batch] for name in ("prompt", "chosen", "rejected"))
        return tuple(ids[offsets[row] : offsets[row + 1]] for offsets, ids in lists)


def _id_lists(column: pa.ChunkedArray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Offsets and ids of each record batch, without a copy."""
    return [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in column.chunks if len(chunk)]


class Fit(NamedTuple):
    """Which rows of a store fit into max_length."""

    kept: np.ndarray
    """[R] bool."""
    cut: np.ndarray
    """[R] bool: kept, with the prompt cut from the left."""


def fit_rows(store: PairStore, *, max_length: int, truncation: Truncation = "keep_response") -> Fit:
    """Decide on each row by its longer side. A cut keeps the template's head and at least one id of the messages."""
    prompt, chosen, rejected = store.lengths.T
    response = np.maximum(chosen, rejected)
    short = prompt + response <= max_length
    tail = max_length - response - store.numbers("head")
    cut = ~short & (tail > store.tail_length) & (truncation == "keep_response")
    return Fit(short | cut, cut)


class TokenizedPairs:
    """P pairs out of one or more stores, each cut to fit into `max_length`; the order is the caller's."""

    def __init__(self, stores: Sequence[PairStore], rows: Sequence[np.ndarray], *, max_length: int) -> None:
        self.stores = tuple(stores)
        self.max_length = max_length
        self.source = np.repeat(np.arange(len(stores), dtype=np.int32), [len(r) for r in rows])
        """[P] int32: which store each pair comes from."""
        self.rows = np.concatenate([np.asarray(r, dtype=np.int64) for r in rows])
        """[P] int64: its row there."""

    def __len__(self) -> int:
        return len(self.rows)

    def taken(self, positions: np.ndarray) -> TokenizedPairs:
        """Some of the pairs, in the order of the stores."""
        rows = [self.rows[positions][self.source[positions] == source] for source in range(len(self.stores))]
        return TokenizedPairs(self.stores, rows, max_length=self.max_length)

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers of the stores, [P]."""
        return self._gathered(lambda store: store.numbers(name))

    @functools.cached_property
    def margin(self) -> np.ndarray:
        """[P] float32, 0 where the data does not say."""
        return np.nan_to_num(self.numbers("margin"), nan=0.0)

    @functools.cached_property
    def segment_lengths(self) -> np.ndarray:
        """[P, 3] int64: tokens of prompt (after the cut), chosen and rejected response."""
        lengths = self._gathered(lambda store: store.lengths)
        lengths[:, 0] = np.minimum(lengths[:, 0], self.max_length - lengths[:, 1:].max(axis=1))
        return lengths

    @property
    def lengths(self) -> np.ndarray:
        """[P] int64: tokens of the longer of the two rows of each pair."""
        return self.segment_lengths[:, 0] + self.segment_lengths[:, 1:].max(axis=1)

    @functools.cached_property
    def example_ids(self) -> list[str]:
        """The id of each pair: the row's own, or `file:row`."""
        return self._texts("example_id")

    def origins(self) -> list[str]:
        """Where each pair stands: `file, row 17`."""
        return self._texts("origin")

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of prompt, chosen response and rejected response of one pair, int32."""
        store, row = self.stores[self.source[index]], int(self.rows[index])
        prompt, chosen, rejected = store.segments(row)
        room = self.max_length - max(len(chosen), len(rejected))
        if len(prompt) > room:
            head = int(self._heads[index])
            prompt = np.concatenate([prompt[:head], prompt[len(prompt) - (room - head) :]])
        return prompt, chosen, rejected

    @functools.cached_property
    def _heads(self) -> np.ndarray:
        return self.numbers("head")

    def _gathered(self, column) -> np.ndarray:
        parts = [column(store)[self.rows[self.source == source]] for source, store in enumerate(self.stores)]
        return np.concatenate(parts)

    def _texts(self, name: str) -> list[str]:
        parts = [store.texts(name, self.rows[self.source == i]) for i, store in enumerate(self.stores)]
        return [text for part in parts for text in part]


def select_pairs(
    stores: Sequence[PairStore],
    masks: Sequence[np.ndarray],
    *,
    max_length: int,
    truncation: Truncation = "keep_response",
) -> tuple[TokenizedPairs, LoadReport]:
    """The rows of some stores that a run takes: those of `masks` ([R] bool each) that fit into `max_length`.

    Returns the pairs, and a report in which pairs that are too long are refused and cut ones are named. Raises
    `DataError` when no pair is left, or when one is too long and `truncation` is `error`.
    """
    reports, taken, messages = [], [], []
    for store, mask in zip(stores, masks, strict=True):
        fit = fit_rows(store, max_length=max_length, truncation=truncation)
        report = LoadReport(**asdict(store.report))
        too_long = np.flatnonzero(mask & ~fit.kept)
        for row, origin in zip(too_long, store.texts("origin", too_long), strict=True):
            prompt, response = store.lengths[row, 0], store.lengths[row, 1:].max()
            messages.append(
                f"{origin}: the longer row has {prompt + response} tokens (prompt {prompt}, response and terminator "
                f"{response}), max_length is {max_length}"
            )
            report.refuse(Refusal("too_long", messages[-1], origin))
        report.rows_cut = store.texts("origin", np.flatnonzero(mask & fit.cut))
        taken.append(np.flatnonzero(mask & fit.kept))
        reports.append(report)
    pairs, whole = TokenizedPairs(stores, taken, max_length=max_length), LoadReport.merged(reports)
    if messages and (truncation == "error" or not len(pairs)):
        more = f"; and {len(messages) - 10} more" if len(messages) > 10 else ""
        advice = ", or set truncation: keep_response or drop" if truncation == "error" else ""
        raise DataError(
            f"{whole.source}: {len(messages)} of {sum(map(np.count_nonzero, masks))} pairs do not fit: "
            f"{'; '.join(messages[:10])}{more}; raise max_length{advice}"
        )
    return pairs, whole
