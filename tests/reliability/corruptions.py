"""Files that were damaged: each is refused in a line, or mended with the same numbers."""

from __future__ import annotations

from tests.reliability.table import Line

LINES: list[Line] = []
