"""What is said on a terminal: texts of others (names, rows, messages) with nothing in them that hides or commands."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
"""Where progress is written into a log, without a terminal."""

JOINERS = "\u200c\u200d"
"""Zero-width, but part of how Persian, Hindi and many emoji are spelled."""

_KEPT = "\n\t" + JOINERS + "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2"
_LOOKS_EMPTY = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters and a symbol by their category, and yet nothing to see."""

_PLAIN = re.compile(r"[\n\t -~]*")


def visible(text: str) -> str:
    """The text with everything that could hide, reorder or control written out.

    Control characters, bidirectional overrides, zero-width and other invisible characters become their code point
    (⟨U+202E⟩), lone surrogates U+FFFD. Line ends and tabs stay.
    """
    return text if _PLAIN.fullmatch(text) else "".join(map(_visible, text.replace("\r\n", "\n")))


def _visible(character: str) -> str:
    code = ord(character)
    if character in _KEPT:
        return character
    category = unicodedata.category(character)
    if category == "Cs":
        return "\ufffd"
    if category in ("Cc", "Cf", "Cn", "Co", "Zl", "Zp") or character in _LOOKS_EMPTY:
        return f"⟨U+{code:04X}⟩"
    return character


def say(text: str, *, file: TextIO | None = None) -> None:
    """Print a text as it is `visible`, at once."""
    print(visible(text), file=file, flush=True)


def short_path(path: str | Path) -> str:
    """A path as short as it can be said from the working directory."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)


class Terminal(Console):
    """rich's console: its own colours and cursor, but every text as it is `visible`.

    A `str` is laid out as it is shown; in a `Text`, what is written out may be cut off at the end of its cell.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


class Pace:
    """How much time is left of a work at the speed that it had so far.

    `done` of its parts had been done when it began, by a run that is resumed.
    """

    def __init__(self, done: int = 0) -> None:
        self._began = self._said = time.monotonic()
        self._before = done

    def left(self, done: int, total: float) -> str:
        """`about 40 s left`, or `about 12 min left`, with so many parts of all done; empty where that is not known."""
        if not self._before < done < total < math.inf:
            return ""
        seconds = (time.monotonic() - self._began) / (done - self._before) * (total - done)
        return f"about {seconds:.0f} s left" if seconds < 120 else f"about {seconds / 60:.0f} min left"

    def say(self, what: str, done: int, total: float) -> None:
        """Write a line into the log, unless the last one is younger than `SECONDS_BETWEEN_LINES` or all is done."""
        if (now := time.monotonic()) - self._said > SECONDS_BETWEEN_LINES and done < total < math.inf:
            self._said = now
            log.info("%s: %d of %d, %s", what, done, total, self.left(done, total))


@contextmanager
def progress(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """How far a work of `total` parts is, on stderr; call what it gives with the number of parts just done.

    A bar on a terminal; in a log, a line every `SECONDS_BETWEEN_LINES` with the time that is left at this speed.
    """
    if not shown:
        yield lambda parts: None
        return
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Terminal(stderr=True), transient=True, refresh_per_second=1) as bar:
            task = bar.add_task(escape(visible(what)), total=total)
            yield lambda parts: bar.advance(task, parts)
        return
    pace, done = Pace(), 0

    def advance(parts: int) -> None:
        nonlocal done
        done += parts
        pace.say(what, done, total)

    yield advance


_written = warnings.formatwarning


def visible_warning(*details: Any, **named: Any) -> str:
    """For `warnings.formatwarning`: as Python writes it, and `visible`."""
    return visible(_written(*details, **named))


class VisibleLines(logging.Formatter):
    """A message of a log as it is `visible`."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def search_no_gpu() -> None:
    """Keep DeepSpeed, which transformers imports where it is installed, from telling that it found no GPU."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextmanager
def silenced(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Inside, a logger says nothing below this level."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
