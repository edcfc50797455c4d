"""How far the stages are, as it is shown."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.live import Live
from rich.text import Text

from rlhf_lightning.commands.pipeline.description import Stage
from rlhf_lightning.terminal import Terminal, say

_TELLS = re.compile(r"(validation at |rollout \d+ \()?step \d+|.*: \d+\.\d s$")
"""Lines of a log that tell how far a run, or an evaluation, is."""

_HEADER = re.compile(r"\d{4}-\d\d-\d\d ")
"""The line of a log that says when the command was given."""


class Progress:
    """The newest line of a log that tells how far a stage is; until there is one, the newest line at all."""

    def __init__(self, log: Path) -> None:
        self.log, self.position = log, log.stat().st_size if log.exists() else 0
        self.rest, self.line, self.told = b"", "", False

    def read(self) -> str:
        with suppress(FileNotFoundError), self.log.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self.position:  # it was begun anew
                self.position, self.rest = 0, b""
            file.seek(self.position)
            new = file.read()
            self.position += len(new)
            *lines, self.rest = (self.rest + new).split(b"\n")
            for line in (line.decode("utf-8", errors="replace").strip() for line in lines):
                tells = _TELLS.match(line) is not None
                if tells or (line and not self.told and not _HEADER.match(line)):
                    self.line, self.told = line, tells
        return self.line


_STYLES = {"done": "green", "unchanged": "green", "running": "bold", "waiting": "dim"}
_STYLES |= {"failed": "red", "interrupted": "red"}


class Board:
    """One line for each stage: live on a terminal, else printed when a stage begins and when it ends."""

    def __init__(self, title: str, stages: Sequence[Stage]) -> None:
        self.console = Terminal()
        self.names = [stage.name for stage in stages]
        self.states = dict.fromkeys(self.names, ("waiting", ""))
        self.began: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.title = title
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> Board:
        self.console.print(self.title, soft_wrap=True, highlight=False, markup=False)
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the lines as they are."""
        if self.live:
            self.live.update(self._lines(), refresh=True)
            self.live.stop()

    def show(self, name: str, state: str, text: str = "") -> None:
        """Show a stage in a state; without a text, that which stands there stays."""
        before, known = self.states[name]
        text = text or known
        self.states[name] = (state, text)
        if state == "running" and before != "running":
            self.began[name] = time.monotonic()
        if name in self.began:
            self.seconds[name] = time.monotonic() - self.began[name]
        if self.live:
            self.live.update(self._lines(), refresh=True)
        elif state != before and state not in ("looking", "stopping"):
            say(self._line(name))

    def _line(self, name: str) -> str:
        state, text = self.states[name]
        seconds = f" {self.seconds[name]:.0f} s" if name in self.seconds and state != "running" else ""
        return f"{name}: {state}{seconds}{'; ' if text else ''}{text}"

    def _lines(self) -> Text:
        """A line for each stage, as long as the terminal is wide: only the text is cut."""
        width = max(map(len, self.names))
        lines = []
        for name, (state, text) in self.states.items():
            seconds = f"{self.seconds[name]:.0f} s" if name in self.seconds else ""
            line = Text.assemble(
                f"{name:{width}}  ", (f"{state:11}", _STYLES.get(state, "")), f"  {seconds:>6}  {text}"
            )
            line.truncate(self.console.width - 1, overflow="ellipsis")
            lines.append(line)
        return Text("\n", no_wrap=True).join(lines)
