"""Results on disk, appended as they come, so that an interrupted run resumes and computes nothing twice."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from rlhf_lightning.errors import DataError
from rlhf_lightning.evaluation.ranks import ALONE, Ranks
from rlhf_lightning.files.disks import write_whole, writing_to
from rlhf_lightning.terminal import progress

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Entry = TypeVar("Entry", bound=DataclassInstance)
else:
    Entry = TypeVar("Entry")

log = logging.getLogger(__name__)

_START = b'{"crc32": "'
_BODY = len(_START) + len('89abcdef", ')
"""Where in a line begins what its checksum is of."""


class Ledger(Generic[Entry]):
    """Entries of one maker by key, in a JSONL file that others may share; in memory alone where there is no file.

    A line is `{"crc32", "maker", "entries"}`, with all entries of one `add` and the CRC-32 of what follows it. A
    line that is damaged, or was not written to its end, is named, and is dropped with all of its entries: what was made
    together is made again together, in the same batches, and so comes out equal to the last bit.

    Raises `DataError` for a file that holds something else, and leaves it as it is.

    Args:
        file: Made, with the directories above it, when it is not there.
        maker: Who made the entries: another one's are not seen.
        kind: What an entry is: a dataclass of values that JSON knows.
        ranks: The processes that keep the same entries, of which the first one reads and writes the file.
    """

    def __init__(self, file: str | Path | None, maker: str, kind: type[Entry], ranks: Ranks = ALONE) -> None:
        self.file = None if file is None else Path(file)
        self.maker = maker
        self.kind = kind
        self.ranks = ranks
        self.known: dict[str, Entry] = ranks.once(self._read)

    def fill(
        self, what: str, keys: Iterable[str], make: Callable[[Sequence[str]], Sequence[Entry]], *, at_a_time: int
    ) -> None:
        """Make the entries of those keys that are not known, in their order, each process a share; the first shows how
        far it is with `what`.

        They are kept after so many of each process.
        """
        missing = [key for key in dict.fromkeys(keys) if key not in self.known]
        step = at_a_time * self.ranks.size
        with progress(what, len(missing), shown=self.ranks.rank == 0) as advance:
            for start in range(0, len(missing), step):
                part = missing[start : start + step]
                self.add(dict(zip(part, self.ranks.each(part, make), strict=True)))
                advance(len(part))

    def add(self, entries: Mapping[str, Entry]) -> None:
        """Keep entries by their keys, the same in every process; they are on the disk when it returns."""
        self.known |= entries
        self.ranks.once(lambda: self._append(entries))

    def _append(self, entries: Mapping[str, Entry]) -> None:
        if self.file is None:
            return
        plain = {key: asdict(entry) for key, entry in entries.items()}
        body = json.dumps({"maker": self.maker, "entries": plain}).encode().removeprefix(b"{")
        with writing_to(self.file), self.file.open("ab") as file:
            file.write(_START + b'%08x", ' % zlib.crc32(body) + body + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> dict[str, Entry]:
        if self.file is None:
            return {}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_bytes().split(b"\n") if self.file.exists() else [b""]
        whole = {number: line for number, line in enumerate(lines[:-1], start=1) if _holds(line)}
        if any(lines) and not whole and not any(_may_be_ours(line) for line in lines if line):
            raise DataError(
                f"{self.file}: not written by an evaluation, and it will not be replaced; give another file, or delete "
                "this one"
            )
        damaged = [number for number in range(1, len(lines)) if number not in whole]
        for number in damaged:
            log.warning("%s, line %d: damaged (its checksum is wrong); what it held is made again", self.file, number)
        if lines[-1]:
            log.info("%s: its last line was not written to its end and is dropped", self.file)
        if damaged or lines[-1]:
            write_whole(self.file, b"".join(line + b"\n" for line in whole.values()))
        stored = [json.loads(line) for line in whole.values()]
        own = [line["entries"] for line in stored if line["maker"] == self.maker]
        return {key: self.kind(**entry) for entries in own for key, entry in entries.items()}


def _holds(line: bytes) -> bool:
    """Whether a line is one of ours, and is as it was written."""
    return line[:_BODY] == _START + b'%08x", ' % zlib.crc32(line[_BODY:])


def _may_be_ours(line: bytes) -> bool:
    """Whether a line that does not hold was one of ours, or the beginning of one, or what a power cut leaves."""
    return line.startswith(_START) or _START.startswith(line) or b'"maker": "' in line or not line.strip(b"\0")
