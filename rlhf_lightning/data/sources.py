"""Rows out of files, directories and hub data sets. Nothing is interpreted here: a row is a dict of plain values."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import re
import reprlib
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Required, TypedDict

from jsonargparse.typing import PositiveFloat

from rlhf_lightning.data.in_memory import RowsInMemory, are_rows
from rlhf_lightning.errors import DataError, reason_of
from rlhf_lightning.hub import use_cache_without_network

if TYPE_CHECKING:
    import datasets
    import pyarrow

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet")
Split = Literal["train", "val", "test"]
SPLIT_STEMS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test",),
}
BUILTIN = {"builtin:courtesy": "", "builtin:courtesy_answers": "answers_"}
"""The sets that come with the package, and how their files' names begin."""
_PARQUET_ROWS = 1024
"""Rows of a parquet file that are Python objects at a time."""
_JSON_CHARACTERS = 1 << 20
"""Characters of a .json file that are read at a time."""
_JSON_BLANKS = re.compile(r"[ \t\n\r]*")
_LIST_BEGIN, _ITEM_END = re.compile(r"[ \t\n\r]*\["), re.compile(r"[ \t\n\r]*([,\]])")
_SIGNATURES = {
    b"PAR1": ("a parquet file", (".parquet",)),
    b"\x1f\x8b": ("gzip data", (".jsonl.gz",)),
    b"ARROW1": ("an Arrow file", ()),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", ()),
    b"\x28\xb5\x2f\xfd": ("zstd data", ()),
    b"\xfd7zXZ\x00": ("xz data", ()),
}
"""First bytes of a file -> what it is, and the names that it may have here."""


@dataclass(frozen=True, slots=True)
class WeightedSource:
    """One source of a mixture.

    Args:
        source: File, directory, hub data set or rows in memory.
        weight: How often each of its rows comes in an epoch: 1 once, 2 twice, 0.5 every other one (others each epoch).
        columns: Our names to this source's columns, where they differ from the other sources'.
    """

    source: str | RowsInMemory
    weight: PositiveFloat = 1.0
    columns: dict[str, str] | None = None

    def __post_init__(self) -> None:
        """Raises `DataError` for a weight that is no positive number."""
        if not (isinstance(self.weight, int | float) and 0 < self.weight < math.inf):
            raise DataError(f"{self.source}: the weight {self.weight!r} is no positive number; 1 takes each row once")


class SourceKeys(TypedDict, total=False):  # of a dataclass the parser would look for the fields in the data file
    """One source of a mixture: its name, how often each of its rows comes in an epoch, our names to its columns."""

    source: Required[str]
    weight: PositiveFloat
    columns: dict[str, str]


if TYPE_CHECKING:
    Source = str | Path | datasets.Dataset | Sequence[str | Path | SourceKeys | WeightedSource | Mapping[str, Any]]
else:
    Source = str | list[str | SourceKeys]  # what a configuration can name
"""A file, a directory, a hub data set or a set of `BUILTIN`; or a list of them, some with a weight. In a script also
the rows themselves: a list of mappings, or a `datasets.Dataset`."""


def source_list(source: Source) -> list[WeightedSource]:
    """The sources of a mixture; a single one is a mixture of one. Raises `DataError` for what is no source."""
    sources = source if isinstance(source, list | tuple) and not are_rows(source) else [source]
    if not sources:
        raise DataError("data: the list of sources is empty; name at least one file")
    return [_weighted(one) for one in sources]


def _weighted(source: Source | SourceKeys | WeightedSource) -> WeightedSource:
    if isinstance(source, WeightedSource):
        return source
    if are_rows(source):
        return WeightedSource(RowsInMemory(source))
    if isinstance(source, str | Path):
        return WeightedSource(str(source))
    keys = dict(source) if isinstance(source, Mapping) else {}
    if not {"source"} <= keys.keys() <= {"source", "weight", "columns"}:
        found = f" with the keys {', '.join(map(str, keys))}" if keys else ""
        raise DataError(
            f"data: a {type(source).__name__}{found} is no source; give a file, a directory, a hub name, a list of "
            "rows or a datasets.Dataset, or {source: ONE OF THEM, weight: 1, columns: {}}"
        )
    return WeightedSource(**keys | {"source": _weighted(keys["source"]).source})


class Row(NamedTuple):
    """One raw row: its values, and where it stands (`origin` for messages, `example_id` when it has no id)."""

    values: dict[str, Any]
    origin: str
    example_id: str


def read_rows(source: str | Path | RowsInMemory, *, split: Split = "train") -> Iterator[Row]:
    """Yield the rows of a source, in order.

    A source is a file (`.jsonl`, `.jsonl.gz`, `.json`, `.csv`, `.tsv`, `.parquet`), a directory of such files, the
    name of a hub data set (`owner/name`, or `owner/name:split`), or one of `BUILTIN`. From a directory the files of
    the split are read (`train*` or `*train`, and so on); where none is named so, those that are named after no split.

    Raises `DataError` when the source is missing, empty, of an unknown kind, or cannot be parsed.
    """
    if isinstance(source, RowsInMemory):
        for number, values in enumerate(source):
            yield Row(values, f"{source}, row {number}", f"memory:{number}")
        return
    files = local_files(source, split=split)
    if files is None:
        yield from _hub_rows(str(source), split)
        return
    for file in files:
        count = 0
        for row in _file_rows(file):
            count += 1
            yield row
        if count == 0:
            raise DataError(f"{file}: the file is empty: it holds no rows; give one with at least one preference pair")


def local_files(source: str | Path | RowsInMemory, *, split: Split = "train") -> list[Path] | None:
    """The files a source stands for; None for a hub name or rows in memory. Raises `DataError` where it is neither."""
    if isinstance(source, RowsInMemory):
        return None
    if str(source) in BUILTIN:
        name = f"{BUILTIN[str(source)]}{'train' if split == 'train' else 'val'}.jsonl"
        return [Path(__file__).parent / "courtesy" / name]
    if str(source).startswith("builtin:"):
        raise DataError(f"{source}: no such set; those that come with the package are {', '.join(BUILTIN)}")
    path = _local_path(source)
    if path.is_dir():
        files = _split_files(path, split)
        if not files:
            raise DataError(
                f"{path}: the directory holds no {split} file; name one {split}.jsonl "
                f"(or {', '.join(FILE_SUFFIXES[1:])}), or give the file itself"
            )
        return files
    if path.exists():
        if not _suffix(path):
            raise DataError(f"{path}: unknown kind of file; use one of {', '.join(FILE_SUFFIXES)}")
        return [path]
    if _looks_local(str(source)):
        relative = "" if path.is_absolute() else f" (relative to {Path.cwd().name}/)"
        raise DataError(f"{source}: no such file or directory; check the path{relative}")
    return None


def described(source: str | RowsInMemory, *, split: Split = "train") -> str:
    """A source in words: a directory with the files that are read of it."""
    if isinstance(source, RowsInMemory) or not _local_path(source).is_dir():
        return str(source)
    return f"{source} ({', '.join(file.name for file in local_files(source, split=split))})"


def has_split(source: str | Path | RowsInMemory, split: Split) -> bool:
    """Whether a directory, or a built-in set, brings files of its own for this split."""
    if str(source) in BUILTIN:
        return split in ("train", "val")
    if isinstance(source, RowsInMemory):
        return False
    path = _local_path(source)
    return path.is_dir() and any(_split_of(file) == split for file in _data_files(path))


def row_count(source: str | RowsInMemory, *, split: Split = "train") -> int | None:
    """About how many rows a source has, where that can be said without reading them; for a progress bar."""
    if isinstance(source, RowsInMemory):
        return len(source)
    files = local_files(source, split=split)
    counts = [_file_row_count(file) for file in files] if files is not None else [None]
    return None if None in counts else sum(counts)


def _file_row_count(file: Path) -> int | None:
    import pyarrow
    import pyarrow.parquet

    try:
        if _suffix(file) == ".parquet":
            return pyarrow.parquet.read_metadata(file).num_rows
        if _suffix(file) == ".jsonl":
            with file.open("rb") as content:
                return sum(block.count(b"\n") for block in iter(lambda: content.read(1 << 20), b""))
    except (OSError, pyarrow.ArrowException):  # said by whoever reads the rows
        pass
    return None


def fingerprint(source: str | RowsInMemory, *, split: Split = "train") -> str:
    """A hash of the rows of a source and of the names that stand in their ids. Raises `DataError`."""
    if isinstance(source, RowsInMemory):
        return source.fingerprint()
    digest = hashlib.sha256(f"{source}:{split}".encode())
    files = local_files(source, split=split)
    if files is None:
        digest.update(_hub_split(source, split)[0]._fingerprint.encode())
    for file in files or ():
        digest.update(file.name.encode())
        try:
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        except OSError as error:
            raise DataError(_unreadable(file, error)) from error
    return digest.hexdigest()


def _local_path(source: str | Path) -> Path:
    """The path that a source names, whether or not anything is there. Raises `DataError` when none can be."""
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # a name too long for the file system; ~somebody without a home
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{str(source)[:200]}: no file or directory can be called so ({reason})") from error
    return path


def _split_files(directory: Path, split: Split) -> list[Path]:
    """The files that a directory holds for a split.

    Those named after it; else those named after no split, which are training files where others are held out.
    """
    files = _data_files(directory)
    named = [file for file in files if _split_of(file) == split]
    unnamed = [file for file in files if _split_of(file) is None]
    return named or (unnamed if split == "train" or unnamed == files else [])


def _data_files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.iterdir() if _suffix(file) and not file.name.startswith("."))


def _split_of(file: Path) -> str | None:
    """The split that a file's name begins or ends with: `train-00000-of-00002.parquet`, `dev_1.csv`, `my_val.jsonl`."""
    words = re.split(r"[.\-_]", file.name.lower().removesuffix(_suffix(file) or ""))
    for word in (words[0], words[-1]):
        if split := next((split for split, stems in SPLIT_STEMS.items() if word in stems), None):
            return split
    return None


def _suffix(path: Path) -> str | None:
    if not path.is_file():
        return None
    return next((suffix for suffix in FILE_SUFFIXES if path.name.lower().endswith(suffix)), None)


def _looks_local(source: str) -> bool:
    """A hub name is `owner/name` or `name`, each of letters, digits, dot, dash and underscore."""
    name = source.partition(":")[0]
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or not name
        or name.lower().endswith(FILE_SUFFIXES)
        or any(char.isspace() or char == "\\" for char in name)
    )


def _file_rows(path: Path) -> Iterator[Row]:
    suffix = _suffix(path)
    readers = {
        ".jsonl": _jsonl_values,
        ".jsonl.gz": _jsonl_values,
        ".json": _json_values,
        ".csv": _csv_values,
        ".tsv": _csv_values,
        ".parquet": _parquet_values,
    }
    try:
        _check_kind(path, suffix)
        place, name = f"{path}, row ", f"{path.name}:"
        for number, values in enumerate(readers[suffix](path)):
            yield Row(values, f"{place}{number}", f"{name}{number}")
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {_not_utf8(error)}") from error
    except gzip.BadGzipFile as error:
        with path.open("rb") as content:
            begins_well = content.read(2) == b"\x1f\x8b"
        fault = "no gzip data; name it without .gz if it is plain text"
        if begins_well:
            fault = "after valid gzip data come bytes that are none; cut them off, or copy the file again"
        raise DataError(f"{path}: {fault}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(_unreadable(path, error)) from error


def _check_kind(path: Path, suffix: str) -> None:
    """Refuse a file whose first bytes are those of another kind than its name says."""
    with path.open("rb") as content:
        begin = content.read(64)
    for signature, (kind, suffixes) in _SIGNATURES.items():
        if begin.startswith(signature) and suffix not in suffixes:
            advice = f"name it {suffixes[0]}" if suffixes else f"save it as one of {', '.join(FILE_SUFFIXES)}"
            raise DataError(f"{path}: is called {suffix}, but by its first bytes it is {kind}; {advice}")
    if suffix == ".parquet" and begin.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")):
        raise DataError(
            f"{path}: is called .parquet, but begins as JSON does; name it .jsonl, or .json if it is one list"
        )


def _jsonl_values(path: Path) -> Iterator[dict[str, Any]]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    place = f"{path}, line "
    with opener(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            origin = f"{place}{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{origin}: {_not_utf8(error)}") from error
            if text and not text.isspace():
                yield _as_object(_parse_json(text, origin), origin)


def _json_values(path: Path) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_list_items(path)):
        yield _as_object(row, f"{path}, row {number}")


def _list_items(path: Path) -> Iterator[Any]:
    """The items of the list that a JSON file holds, with no more of its text in memory than an item needs.

    Where the items cannot be told apart so, the whole text is parsed, which says what is wrong with it. Raises
    `DataError`.
    """
    count = 0
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(_JSON_CHARACTERS)
        begin = _LIST_BEGIN.match(text)
        place = begin.end() if begin else 0
        while begin:
            place = _JSON_BLANKS.match(text, place).end()
            try:
                item, end = _DECODER.raw_decode(text, place)
                delimiter = _ITEM_END.match(text, end)
            except (ValueError, RecursionError):
                delimiter = None
            if delimiter:
                yield item
                count, place = count + 1, delimiter.end()
                if delimiter[1] == "]":
                    if (text[place:] + file.read()).strip(" \t\n\r"):
                        break
                    return
            elif more := file.read(max(_JSON_CHARACTERS, len(text) - place)):  # the item may go on there
                text, place = text[place:] + more, 0
            else:
                break
    rows = _parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {_kind(rows)}, not a list of rows; write [{{...}}, ...] or use .jsonl")
    yield from rows[count:]


def _csv_values(path: Path) -> Iterator[dict[str, Any]]:
    delimiter = "\t" if path.name.lower().endswith(".tsv") else ","
    previous_limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default, 128 kB, cuts long answers
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
            _check_header(path, reader.fieldnames or [], delimiter)
            for number, row in enumerate(reader):
                if None in row:
                    raise DataError(f"{path}, row {number}: more cells than the header has columns; quote the text")
                yield row
    except csv.Error as error:
        raise DataError(f"{path}: not well-formed {delimiter!r}-separated text ({error})") from error
    finally:
        csv.field_size_limit(previous_limit)


def _check_header(path: Path, names: Sequence[str], delimiter: str) -> None:
    if len(names) == 1 and re.search(r"[;,\t|]", names[0]):
        raise DataError(
            f"{path}: the delimiter is not {delimiter!r}: the only column found is {names[0]!r}; "
            "save it with commas as .csv, or with tabs as .tsv"
        )
    _check_names(path, names)


def _check_names(path: Path, names: Sequence[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}: two columns are called {twice[0]!r}; rename one")


def _parquet_values(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_names(path, file.schema_arrow.names)
        decoders = {f.name: d for f in file.schema_arrow if (d := _json_decoder(f, str(path))) is not None}
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
            for row in batch.to_pylist():
                yield row | {name: decode(row[name]) for name, decode in decoders.items()}
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({reason_of(error)})") from error
    except OverflowError as error:  # a time that Python cannot hold
        raise DataError(f"{path}: a column holds a value beyond Python's types ({reason_of(error)})") from error


def _json_decoder(field: pyarrow.Field, origin: str) -> Callable[[Any], Any] | None:
    """What makes plain values of those of a column that holds JSON, at whatever depth; None where none does.

    Datasets 5 writes such columns (`arrow.json`) where the values of one are not all of one type; each value is then
    JSON source text, of a text as well.
    """
    import pyarrow

    kind = field.type
    name = getattr(kind, "extension_name", None) or (field.metadata or {}).get(b"ARROW:extension:name", b"").decode()
    if name == "arrow.json":
        return lambda value: None if value is None else _parse_json(value, f"{origin}, column {field.name}")
    if pyarrow.types.is_struct(kind):
        inner = {part.name: d for part in kind if (d := _json_decoder(part, origin)) is not None}
        decoded = lambda value: value | {name: decode(value[name]) for name, decode in inner.items()}  # noqa: E731
    elif pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        inner = _json_decoder(kind.value_field, origin)
        decoded = lambda value: [inner(one) for one in value]  # noqa: E731
    else:
        return None
    return (lambda value: None if value is None else decoded(value)) if inner else None


def _hub_rows(source: str, split: Split) -> Iterator[Row]:
    rows, named_split = _hub_split(source, split)
    repository = source.partition(":")[0]
    name = f"{repository}:{named_split}"
    if len(rows) == 0:
        raise DataError(f"{name}: the split is empty: it holds no rows; name another one: {repository}:SPLIT")
    for number, values in enumerate(rows):
        yield Row(dict(values), f"{name}, row {number}", f"{name}:{number}")


def _hub_split(source: str, split: Split) -> tuple[datasets.Dataset, str]:
    """The split of a hub data set that is named, or that serves as `split`, and its name. Raises `DataError`."""
    import datasets

    use_cache_without_network()
    name, _, named_split = source.partition(":")
    try:
        if not named_split:
            available = datasets.get_dataset_split_names(name)
            wanted = next((s for stem in _split_order(split) for s in available if s == stem), None)
            if wanted is None:
                raise DataError(f"{name}: has no {split} split, only {', '.join(available)}; name one: {name}:SPLIT")
            named_split = wanted
        return datasets.load_dataset(name, split=named_split), named_split
    except DataError:
        raise
    except Exception as error:  # the hub client raises dozens of types; each means the same to the user
        raise DataError(
            f"{name}: no file or directory here, and no hub data set that could be loaded "
            f"({type(error).__name__}: {reason_of(error)})"
        ) from error


def _split_order(split: Split) -> tuple[str, ...]:
    """Names to look for on the hub. Sets of two splits call the held-out one `test`, so `val` accepts it."""
    return SPLIT_STEMS[split] + (("test",) if split == "val" else ())


class _TwiceError(ValueError):
    """A key that stands twice in one JSON object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no key may stand twice: of its values all but the last would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # made once: `json.loads` with a hook makes one for each text


def _parse_json(text: str, origin: str) -> Any:
    try:
        return json.loads(text) if text.startswith("\ufeff") else _DECODER.decode(text)  # the first words a stray mark
    except _TwiceError as error:
        name = reprlib.repr(error.args[0])
        raise DataError(f"{origin}: the key {name} stands twice in one object; keep one of its values") from error
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4300 digits
        raise DataError(f"{origin}: not valid JSON ({reason_of(error)})") from error


def _as_object(value: Any, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: holds {_kind(value)}, not an object with columns such as prompt, chosen, rejected")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path}: cannot be read ({reason_of(error)}); check the file, it may be cut short"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text (byte 0x{error.object[error.start]:02x}); save the file as UTF-8"
