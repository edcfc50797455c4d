"""Models that this package makes itself, kept in the user's cache: a second run finds them there."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from rlhf_lightning.errors import ModelError
from rlhf_lightning.files.disks import writing_to
from rlhf_lightning.files.leftovers import held_directory, remove_abandoned, temporary_directory
from rlhf_lightning.files.seals import check_seal, seal

log = logging.getLogger(__name__)


def cached_model(name: str, make: Callable[[Path], object]) -> str:
    """The directory of a model in the cache, made first, by `make` in a directory of its own, if need be.

    The name has to say what the model is made of: one that is found is used as it is, unless it is damaged.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlhf_lightning"
    directory = cache / name
    remove_abandoned(cache)
    if directory.is_dir():
        try:
            check_seal(directory)
            return str(directory)
        except ModelError:
            log.warning("%s: this model in the cache is damaged, so it is made again", directory)
            shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    if not os.access(cache, os.W_OK):  # a read-only home
        directory = temporary_directory() / directory.name
    if not directory.is_dir():
        with writing_to(directory), held_directory(directory) as made:
            make(made)
            seal(made)
            try:
                made.rename(directory)
            except OSError:
                if not directory.is_dir():  # else another process was faster
                    raise
    return str(directory)
