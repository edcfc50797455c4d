"""What an evaluation has kept on the disk."""

from __future__ import annotations

import json
import zlib
from pathlib import Path


def kept_entries(file: Path) -> list[tuple[str, dict]]:
    """The entries of a `Ledger`'s file with their keys, as often as they stand there; each line has its checksum."""
    found = []
    for line in file.read_bytes().splitlines():
        head, _, body = line.partition(b", ")
        assert head == b'{"crc32": "%08x"' % zlib.crc32(body)
        found += json.loads(line)["entries"].items()
    return found
