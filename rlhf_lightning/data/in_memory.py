"""Rows that a script gives as Python objects: a list of mappings, or a `datasets.Dataset`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_lightning.errors import DataError


class RowsInMemory:
    """Rows of a list of mappings or of a `datasets.Dataset`, where else a file is named."""

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


def are_rows(value: object) -> bool:
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
