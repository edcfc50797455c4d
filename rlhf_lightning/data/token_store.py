"""Token ids of validated rows on disk, and the rows of them that a run takes; what pairs and prompts have in common.

The ids of a source are written once, uncut, to an Arrow file that is then mapped into memory, so that a set may be
larger than the memory. What a run takes of them, and where it cuts a prompt, is decided on their lengths alone.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import numpy as np
import pyarrow as pa

from rlhf_lightning.data.chat_format import ChatFormat, EncodedPrompt
from rlhf_lightning.data.examples import LoadReport, PreferenceExample, PromptExample, Refusal
from rlhf_lightning.data.reading import reading
from rlhf_lightning.data.sources import Split, WeightedSource, described, fingerprint, row_count
from rlhf_lightning.data.splits import Part
from rlhf_lightning.data.token_cache import cached_directory, content_key
from rlhf_lightning.errors import DataError

log = logging.getLogger(__name__)

Example = PreferenceExample | PromptExample
IDS = pa.list_(pa.int32())
_CHUNK_ROWS, _CHUNK_CHARACTERS = 2048, 4_000_000


def tokenized_directory(
    kind: str,
    source: WeightedSource,
    chat_format: ChatFormat,
    *,
    iterate: Callable[..., Iterable[Example | Refusal]],
    write: Callable[[Path, Iterable[Example | Refusal], LoadReport, ChatFormat], None],
    columns: Mapping[str, str] | None,
    split: Split,
    cache_dir: str | Path | None,
) -> Path:
    """Where the cache holds a source that was read with `iterate` and encoded with `write`; done where it does not.

    The entry's name is a hash of the rows, the columns, the tokenizer, the template and this code. Raises `DataError`
    when the source cannot be read.
    """
    columns = source.columns or columns
    rows = fingerprint(source.source, split=split)
    key = content_key(kind, rows, sorted((columns or {}).items()), chat_format.fingerprint())

    def make(directory: Path) -> None:
        began = time.monotonic()
        report = LoadReport(source=described(source.source, split=split))
        rows = iterate(source.source, report, columns=columns, split=split)
        with reading(report.source, lambda: row_count(source.source, split=split)) as watched, collecting_little():
            write(directory, watched(rows), report, chat_format)
        if (seconds := time.monotonic() - began) > 5:
            log.info("%s: %d rows tokenized in %.0f s, kept for later runs", source.source, report.rows_read, seconds)

    return cached_directory(key, make, cache_dir=cache_dir)


@contextlib.contextmanager
def collecting_little() -> Iterator[None]:
    """Inside, the garbage collector leaves alone what is there already: all modules, again and again, while rows are
    made by the thousand. It took a quarter of the time of a row without a tokenizer."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def write_rows(
    file: Path,
    rows: Iterable[Example | Refusal],
    report: LoadReport,
    chat_format: ChatFormat,
    *,
    schema: pa.Schema,
    encode: Callable[[Sequence[Example | Refusal], ChatFormat], Iterator[dict | Refusal]],
) -> None:
    """Write rows to an Arrow file, a chunk at a time, and what became of them to `report.json` beside it.

    `encode` gives the columns of each row of a chunk, or why it is refused; refusals are counted in the order of the
    rows.
    """
    ordered = LoadReport(source=report.source)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for chunk in _chunks(rows):
            columns: dict[str, list] = {name: [] for name in schema.names}
            for row in encode(chunk, chat_format):
                if isinstance(row, Refusal):
                    ordered.refuse(row)
                else:
                    for name, value in row.items():
                        columns[name].append(value)
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
    ordered.rows_read, ordered.label, ordered.columns_unused = report.rows_read, report.label, report.columns_unused
    details = {"report": asdict(ordered), "tail_length": chat_format.tail_length}
    file.with_name("report.json").write_text(json.dumps(details), encoding="utf-8")


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


def with_prompt_ids(
    chunk: Sequence[Example | Refusal], chat_format: ChatFormat
) -> list[tuple[Example, EncodedPrompt] | Refusal]:
    """Each row with the ids of its prompt (see `ChatFormat.encode_turns`), in order.

    Refused are rows that hold a control token, or that the chat template does not take.
    """
    rows = [row if isinstance(row, Refusal) else _with_prompt_text(row, chat_format) for row in chunk]
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
        return template_refusal(example, error)


def template_refusal(example: Example, error: DataError) -> Refusal:
    """What becomes of a row that the chat template does not take."""
    return Refusal("template_refused", f"{example.origin}: {error}", example.origin)


class TokenStore:
    """R tokenized rows in an Arrow file that is mapped into memory, uncut."""

    file_name: ClassVar[str]
    id_columns: ClassVar[tuple[str, ...]]
    """The C columns of token ids, the prompt first."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        details = json.loads((self.directory / "report.json").read_text(encoding="utf-8"))
        self.report = LoadReport(**details["report"])
        self.tail_length: int = details["tail_length"]
        """Ids that every prompt has after its last message."""
        reader = pa.ipc.open_file(pa.memory_map(str(self.directory / self.file_name)))
        self._table = reader.read_all()
        self._columns = {name: _id_lists(self._table.column(name)) for name in (*self.id_columns, "turns")}

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
        """[R] int64: ids at the prompt's beginning that a cut keeps."""
        return np.concatenate([ids[offsets[:-1]] for offsets, ids in self._columns["turns"]] or [[]]).astype(np.int64)

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """First row of each record batch, and the number of rows."""
        return np.cumsum([0, *(len(offsets) - 1 for offsets, _ in self._columns["prompt"])])

    def segments(self, row: int) -> tuple[np.ndarray, ...]:
        """Ids of each column of one row, int32, uncut."""
        return tuple(self._ids(name, row) for name in self.id_columns)

    def turns(self, row: int) -> list[int]:
        """Where in a row's prompt each user's words begin (see `ChatFormat.encode_turns`)."""
        return self._ids("turns", row).tolist()

    def kept_from(self, row: int, length: int, *, room: int) -> int:
        """Where a prompt of `length` ids goes on after its head, when it is cut to at most `room` ids.

        At the earliest user's turn from which on it fits, or within the last one.
        """
        first, *later = self.turns(row)
        return next((place for place in later if first + length - place <= room), length - (room - first))

    def _ids(self, name: str, row: int) -> np.ndarray:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        row -= int(self._starts[batch])
        offsets, ids = self._columns[name][batch]
        return ids[offsets[row] : offsets[row + 1]]


def _id_lists(column: pa.ChunkedArray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Offsets and ids of each record batch, without a copy."""
    return [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in column.chunks if len(chunk)]


class TokenizedRows:
    """P rows out of one or more stores, each cut to fit into `max_length`; the order is the caller's."""

    def __init__(self, stores: Sequence[TokenStore], rows: Sequence[np.ndarray], *, max_length: int) -> None:
        self.stores = tuple(stores)
        self.max_length = max_length
        self.source = np.repeat(np.arange(len(stores), dtype=np.int32), [len(r) for r in rows])
        """[P] int32: which store each row comes from."""
        self.rows = np.concatenate([np.asarray(r, dtype=np.int64) for r in rows])
        """[P] int64: its row there."""

    def __len__(self) -> int:
        return len(self.rows)

    def taken(self, positions: np.ndarray) -> Self:
        """Some of the rows, in the order of the stores."""
        rows = [self.rows[positions][self.source[positions] == source] for source in range(len(self.stores))]
        return type(self)(self.stores, rows, max_length=self.max_length)

    def sample(self, count: int | None, *, seed: int) -> Self:
        """So many of the rows, chosen at random by the seed, in their order; all when there are no more or it is None.

        A larger sample by the same seed holds the smaller one.
        """
        if count is None or count >= len(self):
            return self
        return self.taken(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers of the stores, [P]."""
        return self.gathered(lambda store: store.numbers(name))

    @functools.cached_property
    def example_ids(self) -> list[str]:
        """The id of each row: its own, or `file:row`."""
        return self._texts("example_id", np.arange(len(self)))

    def origins(self, positions: np.ndarray) -> list[str]:
        """Where some rows stand: `file, row 17`."""
        return self._texts("origin", positions)

    def gathered(self, column: Callable[[TokenStore], np.ndarray]) -> np.ndarray:
        """A column that is computed of each store, [P, ...]."""
        parts = [column(store)[self.rows[self.source == source]] for source, store in enumerate(self.stores)]
        return np.concatenate(parts)

    def cut(self, prompt: np.ndarray, index: int, *, room: int) -> np.ndarray:
        """A row's prompt, cut from the left, after its head, to at most `room` ids where it is longer."""
        if len(prompt) <= room:
            return prompt
        store, row = self.stores[self.source[index]], int(self.rows[index])
        place = store.kept_from(row, len(prompt), room=room)
        return np.concatenate([prompt[: store.heads[row]], prompt[place:]])

    def prompt_lengths(self, room: np.ndarray | int) -> np.ndarray:
        """[P] int64: ids of each prompt after its cut to `room` ([P] or one number)."""
        lengths, room = self.gathered(lambda store: store.lengths[:, 0]), np.broadcast_to(room, len(self))
        for index in np.flatnonzero(lengths > room):
            store, row, length = self.stores[self.source[index]], int(self.rows[index]), int(lengths[index])
            lengths[index] = store.heads[row] + length - store.kept_from(row, length, room=int(room[index]))
        return lengths

    def _texts(self, name: str, positions: np.ndarray) -> list[str]:
        found = np.empty(len(positions), dtype=object)
        for number, store in enumerate(self.stores):
            own = self.source[positions] == number
            found[own] = store.texts(name, self.rows[positions][own])
        return found.tolist()


class Fit(NamedTuple):
    """Which rows of a store fit into the limit of tokens."""

    kept: np.ndarray
    """[R] bool."""
    cut: np.ndarray
    """[R] bool: kept, with the prompt cut from the left."""


def fit_prompts(store: TokenStore, *, room: np.ndarray | int, cut: bool) -> Fit:
    """Decide on each row by the room for its prompt ([R] or one number, in tokens).

    Where it is longer and `cut` allows it, its head and at least one id of its last turn must stay.
    """
    short = store.lengths[:, 0] <= room
    cuttable = ~short & (room - store.heads > store.tail_length) & cut
    return Fit(short | cuttable, cuttable)


def fitting_rows(
    stores: Sequence[TokenStore],
    masks: Sequence[np.ndarray],
    fits: Sequence[Fit],
    *,
    describe: Callable[[TokenStore, int], str],
    refuse: bool,
    noun: str,
    advice: str,
    part: Part | None,
) -> tuple[list[np.ndarray], LoadReport]:
    """The rows of `masks` ([R] bool for each store) that fit, and a report of those that do not and those cut.

    Where the stores are divided by prompt, `masks` are those of `part`, and so are the rows of the report. Rows that no
    prompt was read of belong to the training part.
    `describe` says of a row that does not fit how long it is. Raises `DataError`, which names `noun` and ends with
    `advice`, when no row is left, or when one does not fit and `refuse` is set.
    """
    reports, taken, messages = [], [], []
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
        taken.append(np.flatnonzero(mask & fit.kept))
        reports.append(report)
    whole = LoadReport.merged(reports)
    if messages and (refuse or not any(map(len, taken))):
        more = f"; and {len(messages) - 10} more" if len(messages) > 10 else ""
        raise DataError(
            f"{whole.source}: {len(messages)} of {sum(map(np.count_nonzero, masks))} {noun} do not fit: "
            f"{'; '.join(messages[:10])}{more}; {advice}"
        )
    return taken, whole
