"""What is said while a source is read: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlhf_lightning.terminal import visible

log = logging.getLogger(__name__)
Item = TypeVar("Item")
_SECONDS_BETWEEN_LINES = 10
_ROWS_BETWEEN_STEPS = 256


@contextlib.contextmanager
def reading(name: str, total: Callable[[], int | None]) -> Iterator[Callable[[Iterable[Item]], Iterator[Item]]]:
    """Inside, the function that is given passes rows on, and says on stderr how many went through.

    `total` counts the rows beforehand, or gives None where that would mean to read them all; only a bar asks it.
    """
    if not sys.stderr.isatty():
        yield lambda rows: _with_lines(rows, name)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(visible(name), total=total())

        def watched(rows: Iterable[Item]) -> Iterator[Item]:
            for count, row in enumerate(rows, start=1):
                if count % _ROWS_BETWEEN_STEPS == 0:
                    bar.update(task, completed=count)
                yield row

        yield watched


def _with_lines(rows: Iterable[Item], name: str) -> Iterator[Item]:
    began = said = time.monotonic()
    for count, row in enumerate(rows):
        if count % _ROWS_BETWEEN_STEPS == 0 and (now := time.monotonic()) - said > _SECONDS_BETWEEN_LINES:
            said = now
            log.info("%s: %d rows read, %.0f s", name, count, now - began)
        yield row
