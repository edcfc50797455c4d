"""Rows out of files, directories and hub data sets. Nothing is interpreted here: a row is a dict of plain values."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf_lightning.errors import DataError

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet")
Split = Literal["train", "val", "test"]
SPLIT_STEMS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test",),
}
COURTESY = "builtin:courtesy"


class Row(NamedTuple):
    """One raw row: its values, and where it stands (`origin` for messages, `example_id` when it has no id)."""

    values: dict[str, Any]
    origin: str
    example_id: str


def read_rows(source: str | Path, *, split: Split = "train") -> Iterator[Row]:
    """Yield the rows of a source, in order.

    A source is a file (`.jsonl`, `.jsonl.gz`, `.json`, `.csv`, `.tsv`, `.parquet`), a directory of such files, the
    name of a hub data set (`owner/name`, or `owner/name:split`), or `builtin:courtesy`. From a directory the files of
    the split are read (`train*`, `val*`, `test*`); for `train`, all files when none is named so.

    Raises `DataError` when the source is missing, empty, of an unknown kind, or cannot be parsed.
    """
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
            raise DataError(f"{file}: the file holds no rows; give a file with at least one preference pair")


def local_files(source: str | Path, *, split: Split = "train") -> list[Path] | None:
    """The files a source stands for, or None when it is a hub name. Raises `DataError` when it is neither."""
    if str(source) == COURTESY:
        return [Path(__file__).parent / "courtesy" / f"{'train' if split == 'train' else 'val'}.jsonl"]
    path = Path(source).expanduser()
    if path.is_dir():
        files = split_files(path, split)
        if not files and split == "train":
            files = sorted(file for file in path.iterdir() if _suffix(file))
        if not files:
            raise DataError(f"{path}: the directory holds no {split} file ({split}*{{{','.join(FILE_SUFFIXES)}}})")
        return files
    if path.exists():
        if not _suffix(path):
            raise DataError(f"{path}: unknown kind of file; use one of {', '.join(FILE_SUFFIXES)}")
        return [path]
    if _looks_local(str(source)):
        raise DataError(f"{source}: no such file or directory; check the path (relative to {Path.cwd().name}/)")
    return None


def has_split(source: str | Path, split: Split) -> bool:
    """Whether a directory, or the built-in set, brings files of its own for this split."""
    if str(source) == COURTESY:
        return split in ("train", "val")
    path = Path(source).expanduser()
    return path.is_dir() and bool(split_files(path, split))


def split_files(directory: Path, split: Split) -> list[Path]:
    """The files of a directory whose name begins with the split's name (`val` also: valid, validation, dev, eval)."""
    stems = SPLIT_STEMS[split]
    return sorted(
        file
        for file in directory.iterdir()
        if _suffix(file) and file.name.split(".")[0].split("-")[0].split("_")[0].lower() in stems
    )


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
        for number, values in enumerate(readers[suffix](path)):
            yield Row(values, origin=f"{path}, row {number}", example_id=f"{path.name}:{number}")
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); check the file, it may be cut short") from error


def _jsonl_values(path: Path) -> Iterator[dict[str, Any]]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _as_object(_parse_json(line, f"{path}, line {number}"), f"{path}, line {number}")


def _json_values(path: Path) -> Iterator[dict[str, Any]]:
    rows = _parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {_kind(rows)}, not a list of rows; write [{{...}}, ...] or use .jsonl")
    for number, row in enumerate(rows):
        yield _as_object(row, f"{path}, row {number}")


def _csv_values(path: Path) -> Iterator[dict[str, Any]]:
    delimiter = "\t" if path.name.lower().endswith(".tsv") else ","
    previous_limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default, 128 kB, cuts long answers
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            for number, row in enumerate(csv.DictReader(lines, delimiter=delimiter, strict=True)):
                if None in row:
                    raise DataError(f"{path}, row {number}: more cells than the header has columns; quote the text")
                yield row
    except csv.Error as error:
        raise DataError(f"{path}: not well-formed {delimiter!r}-separated text ({error})") from error
    finally:
        csv.field_size_limit(previous_limit)


def _parquet_values(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        for batch in file.iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({_first_line(error)})") from error


def _hub_rows(source: str, split: Split) -> Iterator[Row]:
    import datasets

    name, _, named_split = source.partition(":")
    try:
        if not named_split:
            available = datasets.get_dataset_split_names(name)
            wanted = next((s for stem in _split_order(split) for s in available if s == stem), None)
            if wanted is None:
                raise DataError(f"{name}: has no {split} split, only {', '.join(available)}; name one: {name}:SPLIT")
            named_split = wanted
        rows = datasets.load_dataset(name, split=named_split)
    except DataError:
        raise
    except Exception as error:  # the hub client raises dozens of types; each means the same to the user
        raise DataError(
            f"{name}: neither a file or directory here, nor a hub data set that could be loaded "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error
    if len(rows) == 0:
        raise DataError(f"{name}:{named_split}: the split holds no rows")
    for number, values in enumerate(rows):
        yield Row(dict(values), origin=f"{name}:{named_split}, row {number}", example_id=f"{name}:{number}")


def _split_order(split: Split) -> tuple[str, ...]:
    """Names to look for on the hub. Sets of two splits call the held-out one `test`, so `val` accepts it."""
    return SPLIT_STEMS[split] + (("test",) if split == "val" else ())


def _parse_json(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{origin}: not valid JSON ({_first_line(error)})") from error


def _as_object(value: Any, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: holds {_kind(value)}, not an object with columns such as prompt, chosen, rejected")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
