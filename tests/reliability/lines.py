"""All lines of the table; each kind has a module of its own."""

from __future__ import annotations

from tests.reliability import corruptions, full_disks, kills, races
from tests.reliability.table import Line

LINES: list[Line] = [*kills.LINES, *corruptions.LINES, *full_disks.LINES, *races.LINES]
