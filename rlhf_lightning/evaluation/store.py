"""Results on disk, appended as they come, so that a run that was cut off goes on and pays for nothing twice."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import DataError
from rlhf_lightning.evaluation.ranks import ALONE, Ranks
from rlhf_lightning.files.disks import write_whole, writing_to

log = logging.getLogger(__name__)

_START = b'{"crc32": "'
_BODY = len(_START) + len('89abcdef", ')
"""Where in a line begins what its checksum is of."""


class Ledger:
    """Entries of one maker by key, in a JSONL file that others may share; in memory alone where there is no file.

    A line is `{"crc32", "maker", "entries"}`, with all entries of one `add` and the CRC-32 of what stands behind it. A
    line that is damaged, or was not written to its end, is named, and is dropped with all of its entries: what was made
    together is made again together, in the same batches, and so comes out equal to the last bit.

    Raises `DataError` for a file that holds something else, and leaves it as it is.

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
        """Keep entries by their keys, the same in every process; they are on the disk when it returns."""
        self.known |= {key: dict(entry) for key, entry in entries.items()}
        if self.file is not None:
            self.ranks.once(lambda: self._append(entries))

    def _append(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        body = json.dumps({"maker": self.maker, "entries": entries}).encode().removeprefix(b"{")
        with writing_to(self.file), self.file.open("ab") as file:
            file.write(_START + b'%08x", ' % zlib.crc32(body) + body + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> dict[str, dict[str, Any]]:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_bytes().split(b"\n") if self.file.exists() else [b""]
        whole = {number: line for number, line in enumerate(lines[:-1], start=1) if _holds(line)}
        if any(lines) and not whole and not any(_may_be_ours(line) for line in lines if line):
            raise DataError(
                f"{self.file}: not written by an evaluation, and it will not be replaced; give another file, or remove "
                "this one"
            )
        damaged = [number for number in range(1, len(lines)) if number not in whole]
        for number in damaged:
            log.warning("%s, line %d: damaged (its checksum is wrong); what it held is made again", self.file, number)
        if lines[-1]:
            log.info("%s: its last line was not written to its end and is dropped", self.file)
        if damaged or lines[-1]:
            write_whole(self.file, b"".join(line + b"\n" for line in whole.values()))
        return dict(self._entries(whole.values()))

    def _entries(self, lines: Sequence[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
        for stored in map(json.loads, lines):
            if stored["maker"] == self.maker:
                for key, entry in stored["entries"].items():
                    yield key, {name: entry[name] for name in self.fields}


def _holds(line: bytes) -> bool:
    """Whether a line is one of ours, and is as it was written."""
    return line[:_BODY] == _START + b'%08x", ' % zlib.crc32(line[_BODY:])


def _may_be_ours(line: bytes) -> bool:
    """Whether a line that does not hold was one of ours, or the beginning of one, or what a power cut leaves."""
    return line.startswith(_START) or _START.startswith(line) or b'"maker": "' in line or not line.strip(b"\0")
