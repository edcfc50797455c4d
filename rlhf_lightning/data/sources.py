"""Rows out of files, directories and hub data sets. Nothing is interpreted here: a row is a dict of plain values."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Required, TypeAlias, TypedDict

from jsonargparse.typing import PositiveFloat

from rlhf_lightning.data.file_rows import FILE_SUFFIXES, file_row_count, file_rows, suffix_of, unreadable
from rlhf_lightning.errors import DataError, reason_of
from rlhf_lightning.hub import use_cache_without_network

if TYPE_CHECKING:
    import datasets

Split = Literal["train", "val", "test"]
SPLIT_STEMS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test",),
}
BUILTIN = {"builtin:courtesy": "", "builtin:courtesy_answers": "answers_", "builtin:courtesy_others": "others_"}
"""The sets that come with the package, and how their files' names begin."""


class RowsInMemory:
    """Rows that a script gives as Python objects, where else a file is named: mappings, or a `datasets.Dataset`."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows

    def __str__(self) -> str:
        return f"{len(self)} rows in memory"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Each row. Raises `DataError` for one that is no mapping, and where there is none."""
        if not len(self):
            raise DataError(f"{self}: give at least one row")
        for number, row in enumerate(self.rows):
            if not isinstance(row, Mapping):
                raise DataError(
                    f"{self}, row {number}: holds a {type(row).__name__}, not a mapping with columns such as prompt, "
                    "chosen, rejected"
                )
            yield dict(row)

    def fingerprint(self) -> str:
        """A hash of the rows."""
        if known := getattr(self.rows, "_fingerprint", None):  # what datasets itself names its caches by
            return known
        digest = hashlib.sha256()
        for row in self:
            digest.update(json.dumps(row, default=repr).encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()


OneSource = str | Path | RowsInMemory
"""A file, a directory, a hub data set, a set of `BUILTIN`, or rows in memory."""


@dataclass(frozen=True, slots=True)
class WeightedSource:
    """One source of a mixture."""

    source: str | RowsInMemory
    weight: float = 1.0
    """How often each of its rows comes in an epoch: 1 once, 2 twice, 0.5 every other one (others each epoch)."""
    columns: dict[str, str] | None = None
    """Our names to this source's columns, where they differ from the other sources'."""

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
    Source: TypeAlias = (
        str | Path | datasets.Dataset | Sequence[str | Path | SourceKeys | WeightedSource | Mapping[str, Any]]
    )
else:
    Source = str | list[str | SourceKeys]  # what a configuration can name
"""A file, a directory, a hub data set or a set of `BUILTIN`; or a list of them, some with a weight. In a script also
the rows themselves: a list of mappings, or a `datasets.Dataset`."""


def source_list(source: Source) -> list[WeightedSource]:
    """The sources of a mixture; a single one is a mixture of one. Raises `DataError` for what is no source."""
    sources = source if isinstance(source, list | tuple) and not _are_rows(source) else [source]
    if not sources:
        raise DataError("data: the list of sources is empty; name at least one file")
    return [_weighted(one) for one in sources]


def _weighted(source: Any) -> WeightedSource:
    if isinstance(source, WeightedSource):
        return source
    if _are_rows(source):
        return WeightedSource(RowsInMemory(source))
    if isinstance(source, str | Path):
        return WeightedSource(str(source))
    keys = dict(source) if isinstance(source, Mapping) else {}
    if not {"source"} <= keys.keys() <= {"source", "weight", "columns"}:
        found = f" with the keys {', '.join(map(str, keys))}" if keys else ""
        raise DataError(
            f"data: a {type(source).__name__}{found} is not a valid source; give a file, a directory, a hub name, a "
            "list of rows or a datasets.Dataset, or {source: ONE OF THEM, weight: 1, columns: {}}"
        )
    return WeightedSource(**keys | {"source": _weighted(keys["source"]).source})


def _are_rows(value: object) -> bool:
    """Whether a value is rows of data, and not one or several names of files.

    Of a list, an item is a row where it holds a text or a list; `{source: FILE, weight: 2}` names a file.
    """
    datasets = sys.modules.get("datasets")  # whoever has a data set of it has imported it
    if datasets is not None and isinstance(value, datasets.Dataset):
        return True
    return isinstance(value, list | tuple) and any(
        isinstance(item, Mapping)
        and any(isinstance(item[key], str | list) for key in item.keys() - {"source", "weight", "columns"})
        for item in value
    )


class Row(NamedTuple):
    """One raw row: its values, and where it is (`origin` for messages, `example_id` when it has no id)."""

    values: dict[str, Any]
    origin: str
    example_id: str


def read_rows(source: OneSource, *, split: Split = "train") -> Iterator[Row]:
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
        place, name, number = f"{file}, row ", f"{file.name}:", -1
        for number, values in enumerate(file_rows(file)):
            yield Row(values, f"{place}{number}", f"{name}{number}")
        if number < 0:
            raise DataError(f"{file}: the file is empty: it holds no rows; give one with at least one preference pair")


def local_files(source: OneSource, *, split: Split = "train") -> list[Path] | None:
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
        if not suffix_of(path):
            raise DataError(f"{path}: unknown kind of file; use one of {', '.join(FILE_SUFFIXES)}")
        return [path]
    if _looks_local(str(source)):
        relative = "" if path.is_absolute() else f" (relative to {Path.cwd().name}/)"
        raise DataError(f"{source}: no such file or directory; check the path{relative}")
    return None


def described(source: OneSource, *, split: Split = "train") -> str:
    """A source in words: a directory with the files that are read of it."""
    if isinstance(source, RowsInMemory) or not _local_path(source).is_dir():
        return str(source)
    return f"{source} ({', '.join(file.name for file in local_files(source, split=split) or ())})"


def has_split(source: OneSource, split: Split) -> bool:
    """Whether a directory, or a built-in set, brings files of its own for this split."""
    if str(source) in BUILTIN:
        return split in ("train", "val")
    if isinstance(source, RowsInMemory):
        return False
    path = _local_path(source)
    return path.is_dir() and any(_split_of(file) == split for file in _data_files(path))


def row_count(source: OneSource, *, split: Split = "train") -> int | None:
    """About how many rows a source has, where that can be said without reading them; for a progress bar."""
    if isinstance(source, RowsInMemory):
        return len(source)
    counts = [file_row_count(file) for file in local_files(source, split=split) or ()]
    known = [count for count in counts if count is not None]
    return sum(known) if counts and len(known) == len(counts) else None


def fingerprint(source: OneSource, *, split: Split = "train") -> str:
    """A hash of the rows of a source and of the names that stand in their ids. Raises `DataError`."""
    if isinstance(source, RowsInMemory):
        return source.fingerprint()
    digest = hashlib.sha256(f"{source}:{split}".encode())
    files = local_files(source, split=split)
    if files is None:
        digest.update(_hub_split(str(source), split)[0]._fingerprint.encode())
    for file in files or ():
        digest.update(file.name.encode())
        try:
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        except OSError as error:
            raise DataError(unreadable(file, error)) from error
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
    return sorted(file for file in directory.iterdir() if suffix_of(file) and not file.name.startswith("."))


def _split_of(file: Path) -> str | None:
    """The split that a file's name begins or ends with: `train-00000-of-00002.parquet`, `dev_1.csv`, `my_val.jsonl`."""
    words = re.split(r"[.\-_]", file.name.lower().removesuffix(suffix_of(file) or ""))
    for word in (words[0], words[-1]):
        if split := next((split for split, stems in SPLIT_STEMS.items() if word in stems), None):
            return split
    return None


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


def _hub_rows(source: str, split: Split) -> Iterator[Row]:
    rows, name = _hub_split(source, split)
    if len(rows) == 0:
        repository = source.partition(":")[0]
        raise DataError(f"{name}: the split is empty: it holds no rows; name another one: {repository}:SPLIT")
    for number, values in enumerate(rows):
        yield Row(dict(values), f"{name}, row {number}", f"{name}:{number}")


def _hub_split(source: str, split: Split) -> tuple[datasets.Dataset, str]:
    """The split of a hub data set that is named, or that serves as `split`, and `owner/name:split`.

    Sets of two splits call the held-out one `test`, so `val` accepts it. Raises `DataError`.
    """
    import datasets

    use_cache_without_network()
    name, _, named_split = source.partition(":")
    try:
        if not named_split:
            available = datasets.get_dataset_split_names(name)
            stems = SPLIT_STEMS[split] + (("test",) if split == "val" else ())
            wanted = next((stem for stem in stems if stem in available), None)
            if wanted is None:
                raise DataError(f"{name}: has no {split} split, only {', '.join(available)}; name one: {name}:SPLIT")
            named_split = wanted
        return datasets.load_dataset(name, split=named_split), f"{name}:{named_split}"
    except DataError:
        raise
    except Exception as error:  # the hub client raises dozens of types; each means the same to the user
        raise DataError(
            f"{name}: no file or directory here, and no hub data set that could be loaded "
            f"({type(error).__name__}: {reason_of(error)})"
        ) from error
