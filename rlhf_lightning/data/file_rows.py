"""Rows out of one file: JSON Lines, JSON, CSV, TSV or Parquet. Nothing is interpreted: a row is a dict of values."""

from __future__ import annotations

import csv
import gzip
import json
import re
import reprlib
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lightning.errors import DataError, reason_of

if TYPE_CHECKING:
    import pyarrow

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet")
_PARQUET_ROWS = 1024
"""Rows of a parquet file that are Python objects at a time."""
_JSON_CHARACTERS = 1 << 20
"""Characters of a .json file that are read at a time."""
_BLANKS = " \t\n\r"
_LIST_BEGIN, _ITEM_END = re.compile(rf"[{_BLANKS}]*\["), re.compile(rf"[{_BLANKS}]*([,\]])[{_BLANKS}]*")
_SIGNATURES = {
    b"PAR1": ("a parquet file", (".parquet",)),
    b"\x1f\x8b": ("gzip data", (".jsonl.gz",)),
    b"ARROW1": ("an Arrow file", ()),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", ()),
    b"\x28\xb5\x2f\xfd": ("zstd data", ()),
    b"\xfd7zXZ\x00": ("xz data", ()),
}
"""First bytes of a file -> what it is, and the names that it may have here."""


def suffix_of(path: Path) -> str | None:
    """The one of `FILE_SUFFIXES` that a file ends with; None for any other, and for what is no file."""
    if not path.is_file():
        return None
    return next((suffix for suffix in FILE_SUFFIXES if path.name.lower().endswith(suffix)), None)


def file_row_count(file: Path) -> int | None:
    """About how many rows a file has, where that can be said without reading them."""
    import pyarrow
    import pyarrow.parquet

    try:
        if suffix_of(file) == ".parquet":
            return pyarrow.parquet.read_metadata(file).num_rows
        if suffix_of(file) == ".jsonl":
            with file.open("rb") as content:
                return sum(block.count(b"\n") for block in iter(lambda: content.read(1 << 20), b""))
    except (OSError, pyarrow.ArrowException):  # said by whoever reads the rows
        pass
    return None


def file_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The values of each row of a file, in order. Raises `DataError` for a file that cannot be parsed."""
    suffix = suffix_of(path) or ""
    try:
        _check_kind(path, suffix)
        yield from _READERS[suffix](path)
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
        raise DataError(unreadable(path, error)) from error


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
        text = text[begin.end() :].lstrip(_BLANKS) if begin else text
        place = 0
        while begin:
            try:
                item, end = _DECODER.raw_decode(text, place)
                delimiter = _ITEM_END.match(text, end)
            except (ValueError, RecursionError):
                delimiter = None
            if delimiter:
                yield item
                count, place = count + 1, delimiter.end()
                if delimiter[1] == "]":
                    if text[place:] + file.read().strip(_BLANKS):
                        break
                    return
            elif more := file.read(max(_JSON_CHARACTERS, len(text) - place)):  # the item may go on there
                text, place = (text[place:] + more).lstrip(_BLANKS), 0
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
        inner = {part.name: decode for part in kind if (decode := _json_decoder(part, origin)) is not None}
        if inner:
            return lambda value: value and value | {name: decode(value[name]) for name, decode in inner.items()}
    elif pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        item = _json_decoder(kind.value_field, origin)
        if item is not None:
            return lambda value: value and [item(one) for one in value]
    return None


class _TwiceError(ValueError):
    """A duplicate key in a JSON object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys: of the values of one, all but the last would be lost."""
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
        raise DataError(f"{origin}: duplicate key {name} in one object; keep one of its values") from error
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4300 digits
        raise DataError(f"{origin}: not valid JSON ({reason_of(error)})") from error


def _as_object(value: Any, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: holds {_kind(value)}, not an object with columns such as prompt, chosen, rejected")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


_READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": _jsonl_values,
    ".jsonl.gz": _jsonl_values,
    ".json": _json_values,
    ".csv": _csv_values,
    ".tsv": _csv_values,
    ".parquet": _parquet_values,
}


def unreadable(path: Path, error: Exception) -> str:
    """What is said of a file that cannot be read."""
    return f"{path}: cannot be read ({reason_of(error)}); check the file, it may be cut short"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text (byte 0x{error.object[error.start]:02x}); save the file as UTF-8"
