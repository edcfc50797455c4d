"""Two processes that write to one place."""

from __future__ import annotations

from tests.reliability.table import Line

LINES: list[Line] = []
