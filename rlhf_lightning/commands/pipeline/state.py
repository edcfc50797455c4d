"""What is remembered of the stages, on disk."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf_lightning.commands.pipeline.inputs import Contents
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.files.disks import write_whole

_FORMAT = 2
"""Of state.json. State of another format is refused."""


@dataclass
class Record:
    """What is remembered of a stage's latest run."""

    state: Literal["running", "broken", "done"]
    inputs: dict[str, str]
    """What it is made from: name and value, or hash of the content."""
    began: float
    """When the first of the runs with these inputs began, in seconds since 1970. Older checkpoints are of others."""
    outputs: dict[str, str] = field(default_factory=dict)
    """Each directory that it wrote, and the hash of its content."""
    seconds: float = 0.0
    progress: str = ""
    """The last line of its log that tells how far it is."""
    results: str = ""
    """What it printed in the end."""


class State:
    """`state.json`: the records of the stages, and hashes of files. Raises `ConfigurationError` for any other file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.records: dict[str, Record] = {}
        stored: dict[str, Any] = {"files": {}}
        if file.exists():
            try:
                stored = json.loads(file.read_text(encoding="utf-8"))
                if stored["format"] != _FORMAT:
                    raise ValueError(f"format {stored['format']}")
                if stored["crc32"] != _checksum(stored["stages"], stored["files"]):
                    raise ValueError("damaged: its checksum is wrong")
                self.records = {name: Record(**values) for name, values in stored["stages"].items()}
            except (ValueError, LookupError, TypeError) as error:
                raise ConfigurationError(
                    f"{file}: is no state of a pipeline of this version ({error}); remove it to begin anew"
                ) from error
        self.contents = Contents(stored["files"], above=file.parent)

    def put(self, name: str, record: Record) -> None:
        """Remember a record, at once and whole."""
        self.records[name] = record
        stages = {name: asdict(record) for name, record in self.records.items()}
        files = self.contents.known
        stored = {"format": _FORMAT, "crc32": _checksum(stages, files), "stages": stages, "files": files}
        write_whole(self.file, json.dumps(stored, indent=1))


def _checksum(stages: dict[str, Any], files: dict[str, Any]) -> int:
    """Of what is remembered: a changed digit in it would be a wrong result, or another decision, without a word."""
    return zlib.crc32(json.dumps([stages, files], sort_keys=True).encode())
