"""Runs and commands that are killed, begun again, and compared with unbroken ones."""

from __future__ import annotations

from tests.reliability.table import Line

LINES: list[Line] = []
