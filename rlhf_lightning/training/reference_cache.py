"""Log-probabilities of a reference, computed once for each pair and kept on disk.

A pair is found by the hash of its token ids, a reference by the hash of its weights and of how it computes: what is
found is what would be computed. So any part, order or mixture of the data shares the entries, a run that was killed
resumes where it was, and a directory copied to another machine serves there.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import secrets
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.files.disks import write_whole
from rlhf_lightning.files.leftovers import remove_abandoned

log = logging.getLogger(__name__)

_RECORD = np.dtype([("pair", "V16"), ("chosen", "<f4"), ("rejected", "<f4")])


def pair_hash(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> bytes:
    """16 bytes of the token ids (int32 arrays) of a pair, and of where each segment ends."""
    digest = hashlib.blake2b(np.array([len(prompt), len(chosen)], dtype="<i8").tobytes(), digest_size=16)
    for segment in (prompt, chosen, rejected):
        digest.update(np.ascontiguousarray(segment, dtype="<i4").data)
    return digest.digest()


class ReferenceCache:
    """Summed log-probs of both responses of pairs under one reference, in nats, float32.

    `key` names everything but the pairs that decides them. Entries are written in parts, each whole or not at all, with
    a checksum that is verified when they are read; a damaged part is computed again.
    """

    def __init__(self, key: Sequence[object], *, cache_dir: str | Path | None = None) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        root = Path(cache_dir or home / "rlhf_lightning" / "references").expanduser()
        self.directory = root / hashlib.sha256(repr((*key, _code())).encode()).hexdigest()[:32]
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.directory)
        described = self.directory / "key.json"
        if not described.exists() and os.access(self.directory, os.W_OK):
            write_whole(described, json.dumps([str(part) for part in key], indent=2).encode())

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, this process computes what is missing, while others wait, and then find it.

        Raises `ConfigurationError` when the directory cannot be written.
        """
        if not os.access(self.directory, os.W_OK):
            raise ConfigurationError(
                f"{self.directory}: reference log-probs are missing there, and it cannot be written; give "
                "model.reference_cache a directory of yours"
            )
        lock = FileLock(self.directory / "lock")
        with suppress(PermissionError):  # another user's: then both compute, and both are right
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info("%s: another run computes reference log-probs; waiting for them", self.directory)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def find(self, pairs: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        """Log-probs [P, 2] (chosen, rejected) of pairs by their hashes, and which of them are there, [P] bool."""
        wanted: dict[bytes, list[int]] = {}
        for position, pair in enumerate(pairs):
            wanted.setdefault(pair, []).append(position)
        values, known = torch.zeros(len(pairs), 2), torch.zeros(len(pairs), dtype=torch.bool)
        for part in self._parts():
            for pair, chosen, rejected in zip(part["pair"], part["chosen"], part["rejected"], strict=True):
                for position in wanted.get(bytes(pair), ()):
                    values[position, 0], values[position, 1] = float(chosen), float(rejected)
                    known[position] = True
        return values, known

    def add(self, pairs: Sequence[bytes], values: Tensor) -> None:
        """Keep the log-probs [P, 2] of pairs; they are on the disk, as one part, when this returns."""
        records: np.ndarray = np.empty(len(pairs), dtype=_RECORD)
        records["pair"] = np.frombuffer(b"".join(pairs), dtype="V16")
        records["chosen"], records["rejected"] = values.detach().float().cpu().numpy().T
        content = records.tobytes()
        content = zlib.crc32(content).to_bytes(4, "little") + content
        write_whole(self.directory / f"{secrets.token_hex(8)}.part", content)

    def _parts(self) -> Iterator[np.ndarray]:
        for file in sorted(self.directory.glob("[!.]*.part")):
            content = file.read_bytes()
            body = content[4:]
            if (
                len(content) < 4
                or len(body) % _RECORD.itemsize
                or zlib.crc32(body) != int.from_bytes(content[:4], "little")
            ):
                log.warning("%s: damaged, so its reference log-probs are computed again", file)
                with suppress(PermissionError):
                    file.unlink(missing_ok=True)
                continue
            yield np.frombuffer(body, dtype=_RECORD)


@functools.cache
def _code() -> str:
    """Hash of the sources and versions that decide a log-prob."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted([*(package / "models").glob("*.py"), *(package / "functional").glob("*.py"), Path(__file__)]):
        digest.update(file.read_bytes())
    for name in ("torch", "transformers"):
        digest.update(importlib.metadata.version(name).encode())
    return digest.hexdigest()
