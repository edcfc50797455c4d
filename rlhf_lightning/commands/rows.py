"""Files of rows that commands write, and beside each what it was made from and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.files.disks import write_whole

NUMBERS = "numbers.json"
"""What was measured of the rows, by name."""


def kept(out: Path) -> Path:
    """Where the replies behind a file of rows are kept, and `NUMBERS`."""
    return out.parent / f".{out.name}.kept"


def check_out(command: str, out: str) -> None:
    """Raise `ConfigurationError` for a directory, and for a file that this command has not written."""
    if Path(out).is_dir():
        raise ConfigurationError(f"out: {out} is a directory; name a file, such as pairs.jsonl")
    if Path(out).exists() and not kept(Path(out)).exists():
        raise ConfigurationError(f"out: {out} exists, and was not written by {command}; name another file")


def write_rows(out: Path, rows: Sequence[Mapping[str, Any]], numbers: Mapping[str, float]) -> None:
    """Write a file of rows, and `numbers` beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, as_lines(rows))
    write_whole(kept(out) / NUMBERS, json.dumps({"rows": len(rows), **numbers}, allow_nan=False))


def as_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
