"""Results on disk, appended as they come, so that a run that was cut off goes on and pays for nothing twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import DataError
from rlhf_lightning.evaluation.ranks import ALONE, Ranks

log = logging.getLogger(__name__)


class Ledger:
    """Entries of one maker by key, in a JSONL file that others may share; in memory alone where there is no file.

    A line is `{"maker", "key", ...}` with the fields given. A last line that was not written to its end is dropped.
    Raises `DataError` for a file that holds other lines, and leaves it as it is.

    Args:
        file: Made, with the directories above it, when it is not there.
        maker: Who made the entries: another one's are not seen.
        fields: What an entry consists of.
        ranks: The processes that keep the same entries, of which the first one reads and writes the file.
    """

    def __init__(self, file: str | Path | None, maker: str, fields: Sequence[str], ranks: Ranks = ALONE) -> None:
        self.file = None if file is None else Path(file)
        self.maker = maker
        self.fields = tuple(fields)
        self.ranks = ranks
        self.known: dict[str, dict[str, Any]] = {} if file is None else ranks.once(self._read)

    def add(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep entries by their keys, the same in every process."""
        self.known |= {key: dict(entry) for key, entry in entries.items()}
        if self.file is not None:
            self.ranks.once(lambda: self._append(entries))

    def _append(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        lines = [json.dumps({"maker": self.maker, "key": key, **entry}) + "\n" for key, entry in entries.items()]
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def _read(self) -> dict[str, dict[str, Any]]:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = self.file.read_bytes() if self.file.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        found = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                if entry["maker"] == self.maker:
                    found[entry["key"]] = {name: entry[name] for name in self.fields}
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{self.file}, line {number}: not written by an evaluation of this kind; give another file, or "
                    "remove this one"
                ) from error
        if len(whole) < len(content):  # only now: the file is one of ours
            log.info("%s: its last line was not written to its end and is dropped", self.file)
            with self.file.open("r+b") as torn:
                torn.truncate(len(whole))
        return found
