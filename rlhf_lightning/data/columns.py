"""What one source calls its columns: which were met, which were used, and where its prompts may stand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_lightning.data.conversations import HH_TURN, is_conversation, says_something, unused_keys
from rlhf_lightning.data.labels import LAYOUTS, Layout, label_columns, layout_of
from rlhf_lightning.data.sources import Row
from rlhf_lightning.errors import DataError

COLUMNS = ("prompt", "chosen", "rejected", "system", "history", "margin", "id", "source")
SFT_COLUMNS = ("response", "messages")
"""What is mapped beside `COLUMNS` where rows are for SFT."""
LABEL = "label"
"""What is mapped beside both where a row says how good its response is."""
RESPONSE_COLUMNS = ("response", "completion", "output")
"""Columns that the response of an SFT row is looked for in, in this order, where none is mapped."""
CONVERSATION_COLUMNS = ("messages", "conversations")
"""Columns that may hold a whole conversation."""
PROMPT_COLUMNS = ("prompt", "conversations", "instruction")
"""Columns that a prompt is looked for in, in this order, where none is mapped."""
SIDES = ("chosen", "rejected")
_SCORES = [
    (pattern.format("chosen", word), pattern.format("rejected", word))
    for word in ("score", "rating", "reward")
    for pattern in ("{1}_{0}", "{0}_{1}", "{0}-{1}")
]
"""Columns that may hold the scores of the two responses."""
_ID_NAME = re.compile(r"(?:^|[_-])(?:id|idx|index|uuid|hash)$", re.IGNORECASE)
_NUMBER = re.compile(r"\s*[-+]?[\d.]+(?:[eE][-+]?\d+)?\s*")


class SourceColumns:
    """The columns of one source, as its rows are met.

    `mapped` are our names (`COLUMNS` and `others`) to the source's, `fallback` is a column that is the prompt where
    nothing else is. Raises `DataError` for a name that is none of ours.
    """

    def __init__(
        self, mapped: Mapping[str, str] | None, *, fallback: str | None = None, others: Sequence[str] = ()
    ) -> None:
        self.mapped = dict(mapped or {})
        self._names = (*COLUMNS, *others)
        if unknown := sorted(self.mapped.keys() - set(self._names)):
            raise DataError(
                f"columns: unknown name {unknown[0]!r}; it maps {', '.join(self._names)} to the file's columns"
            )
        self.fallback = fallback
        self.found: dict[str, Any] = {}
        """Every column met so far, with the first of its values that says something."""
        self.used: set[str] = set()
        self.layout: Layout | None = None
        """The layout of a labelled source (`LAYOUTS`); None where chosen and rejected stand in the rows."""
        self.have_prompts = "prompt" in self.mapped
        """Whether a row so far has a prompt of its own."""
        self.score_columns: list[tuple[str, str]] = []
        """The columns met so far that may hold scores of the two responses."""
        self._keys_unused: dict[str, None] = {}
        """Keys of turns, such as `prompt[].name`, that say something and that nothing was made of."""
        self._said: set[str] = set()
        """The columns of `found` whose value says something."""

    def meet(self, row: Row) -> None:
        """Note the columns of a row. Raises `DataError` where a mapping would overrule the label of a known layout."""
        if row.values.keys() <= self._said:
            return
        known = len(self.found)
        for name, value in row.values.items():
            if name not in self._said:
                self.found[name] = value
                if says_something(value):
                    self._said.add(name)
        if len(self.found) == known:
            return
        self.have_prompts = self.have_prompts or any(name in self.found for name in PROMPT_COLUMNS)
        self.score_columns = [names for names in _SCORES if all(name in self.found for name in names)]
        layout, sides = layout_of(self.found), [self.name(side) for side in SIDES]
        if layout and not {*SIDES}.isdisjoint(self.mapped) and not {*sides}.isdisjoint(layout.responses):
            raise DataError(
                f"{row.origin}: columns maps {' and '.join(sides)}, but which of the two is better is said by "
                f"{' and '.join(layout.labels)}, row by row; leave chosen and rejected out of columns, and it is read "
                f"({layout.name})"
            )
        self.layout = None if any(side in self.found for side in sides) else layout
        if self.layout and "prompt" in self.mapped:
            self.layout = self.layout._replace(prompt=self.mapped["prompt"])

    def name(self, ours: str) -> str:
        """What the source calls one of our columns."""
        return self.mapped.get(ours, ours)

    def take(self, row: Row, name: str) -> Any:
        """The value of a column by the source's own name, from now on a used one."""
        if name not in row.values:
            return None
        value = row.values[name]
        self.used.add(name)
        if isinstance(value, list | dict):
            self._keys_unused.update((f"{name}[].{key}", None) for key in unused_keys(value))
        return value

    @property
    def unused(self) -> list[str]:
        """Columns, and keys of turns, that nothing was made of."""
        return [*(str(name) for name in self.found if name not in self.used), *self._keys_unused]

    @property
    def prompt_candidates(self) -> list[str]:
        """Columns of texts or conversations that are none of ours, and so may be the prompt."""
        ours = {self.name(name) for name in (*SIDES, "margin", "id", "source")}
        return [str(name) for name, value in self.found.items() if name not in ours and _may_be_prompt(name, value)]

    def has_guessed_prompt(self, row: Row) -> bool:
        """Whether a prompt would be guessed, from the common beginning of two plain strings, if none stood apart."""
        sides = [row.values.get(self.name(side)) for side in SIDES]
        texts = [side for side in sides if isinstance(side, str)]
        return len(texts) == 2 and not all(map(HH_TURN.match, texts))

    def has_own_prompt(self, row: Row) -> bool:
        """Whether a row's prompt has, or should have, a column of its own, and is no part of the responses."""
        own = "prompt" in self.mapped or any(row.values.get(name) is not None for name in PROMPT_COLUMNS)
        return own or (self.have_prompts and self.has_guessed_prompt(row))

    def check(self, source: object, *, needed: Sequence[str]) -> None:
        """Raise `DataError` for a column of those needed or mapped that no row of the source has.

        It is a mistake in the settings or the file, not in the rows.
        """
        names = {*needed, *self.mapped}
        missing = [name for name in self._names if name in names and self.name(name) not in self.found]
        if not missing:
            return
        absent = ", ".join(f"{self.name(name)!r} for {name}" for name in missing)
        said = f"{source}: no column {absent}; the columns found are {self.listed}"
        if not {*SIDES}.isdisjoint(missing) and (labels := label_columns(self.found)):
            read = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
            raise DataError(
                f"{said}. {' and '.join(labels)} may say which response is better, so that no mapping of columns would "
                f"be right for every row; write chosen and rejected by it (read as they are: the layouts of {read})"
            )
        if not {*SIDES}.isdisjoint(missing) and not self.found.keys().isdisjoint(
            {*RESPONSE_COLUMNS, *CONVERSATION_COLUMNS}
        ):
            raise DataError(
                f"{said}, which look like rows of one response, for SFT: read them with --data SFTDataModule. For "
                f"pairs, map them with columns: {{{', '.join(f'{name}: COLUMN' for name in missing)}}}"
            )
        if "prompt" not in names and "prompt" not in self.found:
            missing.insert(0, "prompt")
        raise DataError(f"{said}. Map them with columns: {{{', '.join(f'{name}: COLUMN' for name in missing)}}}")

    @property
    def listed(self) -> str:
        """The columns found, in one line."""
        return " ".join(", ".join(map(str, self.found)).split())


def _may_be_prompt(name: object, value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip()) and not _ID_NAME.search(str(name)) and not _NUMBER.fullmatch(value)
    return is_conversation(value) or (isinstance(value, list) and bool(value) and isinstance(value[0], str))
