"""Commands whose disk is full: a line that names the path, what stood before untouched, and a second try that works."""

from __future__ import annotations

from tests.reliability.table import Line

LINES: list[Line] = []
