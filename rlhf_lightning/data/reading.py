"""What is said while a source is read: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from rlhf_lightning.terminal import visible

log = logging.getLogger(__name__)
Item = TypeVar("Item")
_SECONDS_BETWEEN_LINES = 10
_ROWS_BETWEEN_LOOKS = 256


def watched(rows: Iterable[Item], name: str, total: Callable[[], int | None]) -> Iterator[Item]:
    """The rows, while it is said on stderr how many went through.

    `total` counts the rows beforehand, or gives None where that would mean to read them all; only a bar asks it.
    """
    if sys.stderr.isatty():
        console = Console(stderr=True)
        yield from track(rows, escape(visible(name)), total=total(), console=console, transient=True)
        return
    began = said = time.monotonic()
    for count, row in enumerate(rows):
        if count % _ROWS_BETWEEN_LOOKS == 0 and (now := time.monotonic()) - said > _SECONDS_BETWEEN_LINES:
            said = now
            log.info("%s: %d rows read, %.0f s", name, count, now - began)
        yield row
