"""Rows -> validated preference pairs. The one way in for training, validation and users."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

from rlhf_lightning.data.conversations import (
    HH_TURN,
    BadRow,
    check_prompt,
    check_unicode,
    check_values,
    has_reasoning,
    implicit_prompt,
    is_conversation,
    plain_form,
    prompt_messages,
    reply,
    says_something,
    unused_keys,
    with_context,
)
from rlhf_lightning.data.examples import BAD_ROW_REASONS, LoadReport, Message, OnBadRows, PreferenceExample, Refusal
from rlhf_lightning.data.labels import LAYOUTS, Layout, as_number, label_columns, layout_of, responses_of
from rlhf_lightning.data.sources import Row, Source, Split, described, read_rows, source_list
from rlhf_lightning.errors import DataError

Example = TypeVar("Example")
COLUMNS = ("prompt", "chosen", "rejected", "system", "history", "margin", "id", "source")
PROMPT_COLUMNS = ("prompt", "conversations", "instruction")
"""Columns that a prompt is looked for in, in this order, where none is mapped."""
SYSTEM_COLUMNS = ("system", "system_prompt")
_SIDES = ("chosen", "rejected")
_WITHOUT_A_PLACE = {
    "tools": "remove the column, or write the tools into the system message as the model's chat template does",
    "chat_template_kwargs": "remove the column, and set data.chat_template_kwargs for all rows alike",
}
"""Columns that change what a chat template writes, row by row, and what to do instead."""
_LARGEST_MARGIN = 1e6
_SCORES = [
    (pattern.format("chosen", word), pattern.format("rejected", word))
    for word in ("score", "rating", "reward")
    for pattern in ("{1}_{0}", "{0}_{1}", "{0}-{1}")
]
"""Columns that may hold the scores of the two responses."""
_ID_NAME = re.compile(r"(?:^|[_-])(?:id|idx|index|uuid|hash)$", re.IGNORECASE)


@dataclass(slots=True)
class SourceColumns:
    """What one source calls its columns, which of them were met, and which of them were used."""

    mapped: dict[str, str]
    """Our names (`COLUMNS`) to the source's."""
    found: dict[str, Any] = field(default_factory=dict)
    """Every column met so far, with the first of its values that says something."""
    used: set[str] = field(default_factory=set)
    keys_unused: dict[str, None] = field(default_factory=dict)
    """Keys of turns, such as `prompt[].name`, that say something and that nothing was made of."""
    fallback: str | None = None
    """A column that is the prompt where nothing else is."""
    layout: Layout | None = None
    """The layout of a labelled source (`LAYOUTS`); None where chosen and rejected stand in the rows."""
    have_prompts: bool = False
    """Whether a row so far has a prompt of its own."""
    score_columns: list[tuple[str, str]] = field(default_factory=list)
    """The columns met so far that may hold scores of the two responses."""
    _said: set[str] = field(default_factory=set)
    """The columns of `found` whose value says something."""

    def __post_init__(self) -> None:
        self.have_prompts = "prompt" in self.mapped

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
        layout, sides = layout_of(self.found), [self.name(side) for side in _SIDES]
        if layout and not {*_SIDES}.isdisjoint(self.mapped) and not {*sides}.isdisjoint(layout.responses):
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
            self.keys_unused.update((f"{name}[].{key}", None) for key in unused_keys(value))
        return value

    @property
    def unused(self) -> list[str]:
        """Columns, and keys of turns, that nothing was made of."""
        return [*(str(name) for name in self.found if name not in self.used), *self.keys_unused]

    @property
    def prompt_candidates(self) -> list[str]:
        """Columns of texts or conversations that are none of ours, and so may be the prompt."""
        ours = {self.name(name) for name in ("chosen", "rejected", "margin", "id", "source")}
        return [
            str(name) for name, value in self.found.items() if name not in ours and _may_be_prompt(str(name), value)
        ]


def _may_be_prompt(name: str, value: Any) -> bool:
    if not isinstance(value, str):
        return is_conversation(value) or (
            isinstance(value, list) and all(isinstance(one, str) for one in value[:1]) and bool(value)
        )
    return (
        bool(value.strip())
        and not _ID_NAME.search(name)
        and not re.fullmatch(r"\s*[-+]?[\d.]+(?:[eE][-+]?\d+)?\s*", value)
    )


def load_preferences(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    on_bad_rows: OnBadRows = "error",
    split: Split = "train",
) -> tuple[list[PreferenceExample], LoadReport]:
    """Read preference pairs from a file, a directory or a hub data set (see `read_rows`), or from a list of them.

    Shapes of a row, told apart by what it holds:
    - explicit prompt: `prompt`, `chosen`, `rejected` as strings;
    - implicit prompt: no `prompt`; `chosen` and `rejected` are hh-rlhf transcripts (`\\n\\nHuman: ...\\n\\nAssistant:
      ...`) or conversations (lists of `{role, content}`) that share all turns but the last, or plain strings that share
      their beginning (only where no row of the source has a prompt, or another column of texts that may be one);
    - conversations: `prompt` a list of messages, responses a string, a message or a list that ends with the reply;
    - ShareGPT-like: `conversations` as the prompt, and turns of `{from, value}` for `{role, content}`;
    - Alpaca-like: `instruction` and `input` as the prompt;
    - labelled: two responses and a label that says which is better, as PKU-SafeRLHF, HelpSteer3, SHP, AlpacaFarm and
      Chatbot Arena lay them out (see `LAYOUTS`). Ties are counted, and left out under either policy.
    Optional columns: `system` or `system_prompt` (a system message), `history` (earlier turns), `margin` (a finite
    number), `id` (kept as `example_id`) and `source` (a name, by which accuracy is told apart). A response's
    `reasoning_content` stands before its text as `<think>...</think>`. The report names every column that was not used.

    `columns` maps our names (prompt, chosen, rejected, system, history, margin, id, source) to the file's.
    `on_bad_rows`: `error` refuses the source and names the first ten bad rows, `drop` leaves them out and counts them
    in the report.

    Returns the examples in the order of the rows, and the report. Raises `DataError` when the source cannot be read,
    lacks a column, has no usable row, or has a bad row under `on_bad_rows="error"`.
    """
    return load_examples(iterate_preferences, source, columns=columns, on_bad_rows=on_bad_rows, split=split)


def load_examples(
    iterate: Callable[..., Iterator[Example | Refusal]],
    source: Source,
    *,
    columns: Mapping[str, str] | None,
    on_bad_rows: OnBadRows,
    split: Split,
) -> tuple[list[Example], LoadReport]:
    """What `iterate` makes of the rows of some sources, and their report. Raises `DataError` by `on_bad_rows`."""
    if on_bad_rows not in get_args(OnBadRows):
        raise DataError(f"on_bad_rows: {on_bad_rows!r} is no policy; use one of {', '.join(get_args(OnBadRows))}")
    examples: list[Example] = []
    reports = []
    for one in source_list(source):
        reports.append(LoadReport(source=described(one.source, split=split)))
        rows = iterate(one.source, reports[-1], columns=one.columns or columns, split=split)
        examples += [row for row in rows if not isinstance(row, Refusal)]
        reports[-1].enforce(on_bad_rows)
    return examples, LoadReport.merged(reports)


def iterate_preferences(
    source: str | Path, report: LoadReport, *, columns: Mapping[str, str] | None = None, split: Split = "train"
) -> Iterator[PreferenceExample | Refusal]:
    """Each row of one source as an example or a refusal, in order, a few at a time, counted in `report`.

    Raises `DataError` when the source cannot be read, or, after its last row, when it lacks a column.
    """
    known = known_columns(columns)
    yield from validated_rows(source, report, _example, columns=known, split=split)
    check_columns(source, known, needed=() if known.layout else _SIDES)


def known_columns(columns: Mapping[str, str] | None, *, fallback: str | None = None) -> SourceColumns:
    """A mapping of columns. Raises `DataError` when it maps a name that is none of `COLUMNS`."""
    if unknown := sorted(set(columns or {}) - set(COLUMNS)):
        raise DataError(f"columns: unknown name {unknown[0]!r}; it maps {', '.join(COLUMNS)} to the file's columns")
    return SourceColumns(dict(columns or {}), fallback=fallback)


def validated_rows(
    source: str | Path,
    report: LoadReport,
    make: Callable[[Row, SourceColumns], Example],
    *,
    columns: SourceColumns,
    split: Split,
) -> Iterator[Example | Refusal]:
    """Each row of one source as `make(row, columns)` makes it, or as the refusal that this raises.

    Which columns were met and used is noted in `columns`, and at the end in `report`. Raises `DataError` when the
    source cannot be read, or when a prompt would have to be guessed though other rows, or other columns, may have it.
    """
    guessed: Row | None = None
    for row in read_rows(source, split=split):
        report.rows_read += 1
        columns.meet(row)
        if not columns.have_prompts and columns.fallback not in row.values and is_guess(row, columns):
            guessed = guessed or row
        elif guessed and columns.have_prompts:
            raise DataError(
                f"{row.origin}: has a prompt, but {guessed.origin} has none: give every row a prompt, or none of them"
            )
        if guessed and (candidates := columns.prompt_candidates):
            raise DataError(
                f"{row.origin}: no column prompt, and the prompt is not guessed from the beginning of chosen and "
                f"rejected where it may stand in {' or '.join(candidates)}; say which it is with columns: "
                "{prompt: COLUMN}, or remove them if it is none"
            )
        try:
            yield make(row, columns)
        except BadRow as error:
            refusal = Refusal(error.reason, f"{row.origin}: {error}", row.origin)
            report.refuse(refusal)
            yield refusal
    report.columns_unused = columns.unused
    label = columns.layout.labels[0] if columns.layout else None
    report.label = label if label in columns.used else None  # prompts are read whoever wins


def check_columns(source: str | Path, columns: SourceColumns, *, needed: Sequence[str]) -> None:
    """A column that no row has, of those needed or mapped, is a mistake in the settings or the file, not in the rows.

    Raises `DataError`.
    """
    found = columns.found
    needed = {*needed, *columns.mapped}
    missing = [name for name in COLUMNS if name in needed and columns.name(name) not in found]
    if not missing:
        return
    absent = ", ".join(f"{columns.name(name)!r} for {name}" for name in missing)
    said = f"{source}: no column {absent}; the columns found are {' '.join(', '.join(found).split())}"
    if not {*_SIDES}.isdisjoint(missing) and (labels := label_columns(found)):
        read = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
        raise DataError(
            f"{said}. {' and '.join(labels)} may say which response is better, so that no mapping of columns would be "
            f"right for every row; write chosen and rejected by it (read as they are: the layouts of {read})"
        )
    if "prompt" not in needed and "prompt" not in found:
        missing.insert(0, "prompt")
    raise DataError(f"{said}. Map them with columns: {{{', '.join(f'{name}: COLUMN' for name in missing)}}}")


def is_guess(row: Row, columns: SourceColumns) -> bool:
    """Whether the prompt of a row without one is guessed, from the common beginning of two plain strings."""
    sides = [row.values.get(columns.name(side)) for side in _SIDES]
    return all(isinstance(side, str) for side in sides) and not all(map(HH_TURN.match, sides))


def _example(row: Row, columns: SourceColumns) -> PreferenceExample:
    margin = _margin(columns.take(row, columns.name("margin")))
    source = _source(columns.take(row, columns.name("source")), mapped="source" in columns.mapped)
    parts = labelled_parts(row, columns) if columns.layout else _unlabelled_parts(row, columns)
    if columns.layout:
        for name in columns.layout.labels:
            columns.take(row, name)
        preference = columns.layout.preference(row.values)
        if preference == 0:
            raise BadRow("tie", BAD_ROW_REASONS["tie"])
        if preference < 0:
            parts = parts._replace(chosen=parts.rejected, rejected=parts.chosen)
        if columns.layout.graded and margin is None:
            margin = abs(preference)
    prompt, chosen, rejected = _texts(parts, row, columns)
    _check_texts(prompt, chosen, rejected)
    return PreferenceExample(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=margin,
        example_id=id_of(row, columns),
        origin=row.origin,
        source=source,
        has_reasoning=has_reasoning(parts.chosen) or has_reasoning(parts.rejected),
    )


class RowParts(NamedTuple):
    """The values of a row's prompt and of its two responses, before anything is made of them."""

    prompt: Any
    chosen: Any
    rejected: Any
    has_prompt: bool
    """False: the prompt stands within the responses, and `prompt` is None."""


def labelled_parts(row: Row, columns: SourceColumns) -> RowParts:
    """The parts of a row of a labelled source; which response is better is not looked at."""
    layout = columns.layout
    for name in (layout.prompt or "turn", *layout.responses):
        columns.take(row, name)
    prompt, first, second = responses_of(layout, row.values)
    inside = prompt is None and not any(isinstance(side, str | None) for side in (first, second))
    return RowParts(_with_input(prompt, row, columns, name=layout.prompt), first, second, has_prompt=not inside)


def _unlabelled_parts(row: Row, columns: SourceColumns) -> RowParts:
    _check_scores(row.values, columns)
    own = has_own_prompt(row, columns)
    prompt = prompt_value(row, columns) if own else None
    return RowParts(prompt, *(columns.take(row, columns.name(side)) for side in _SIDES), has_prompt=own)


def _texts(parts: RowParts, row: Row, columns: SourceColumns) -> tuple[list[Message], str, str]:
    """Prompt and responses of a row."""
    if not parts.has_prompt:
        prompt, chosen, rejected = implicit_prompt(parts.chosen, parts.rejected)
        if not prompt and (candidates := columns.prompt_candidates):
            raise BadRow(
                "empty_prompt",
                f"chosen and rejected hold no prompt before the reply; if it stands in {' or '.join(candidates)}, "
                "say so with columns: {prompt: COLUMN}",
            )
        return in_context(prompt, row, columns), chosen, rejected
    values = {"prompt": parts.prompt, "chosen": parts.chosen, "rejected": parts.rejected}
    check_values(values)
    own = prompt_messages(parts.prompt)
    prompt = in_context(own, row, columns)
    return prompt, *(reply(side, values[side], prompt, own_prompt=own) for side in _SIDES)


def in_context(prompt: Sequence[Message], row: Row, columns: SourceColumns) -> list[Message]:
    """A prompt with what the row's other columns put before it: a system message, earlier turns.

    Raises `BadRow` where a column changes what the chat template writes in a way that is not supported.
    """
    for name, advice in _WITHOUT_A_PLACE.items():
        if says_something(row.values.get(name)) and name not in columns.mapped.values():
            raise BadRow("no_place", f"the column {name} has no place in a prompt here; {advice}")
    names = [columns.mapped["system"]] if "system" in columns.mapped else SYSTEM_COLUMNS
    taken = {columns.mapped.get("prompt"), columns.layout and columns.layout.prompt}
    system = next((columns.take(row, name) for name in names if says_something(row.values.get(name))), None)
    history = None if columns.name("history") in taken else columns.take(row, columns.name("history"))
    return with_context(prompt, system=system, history=history)


def id_of(row: Row, columns: SourceColumns) -> str:
    """The row's own id, or where it stands."""
    own = columns.take(row, columns.name("id"))
    example_id = row.example_id if own is None else str(own)
    check_unicode(example_id)
    return example_id


def has_own_prompt(row: Row, columns: SourceColumns) -> bool:
    """Whether a row's prompt stands, or should stand, in a column of its own, and not within the responses."""
    own = "prompt" in columns.mapped or any(name in row.values for name in PROMPT_COLUMNS)
    return own or (columns.have_prompts and is_guess(row, columns))


def prompt_value(row: Row, columns: SourceColumns) -> Any:
    """What stands in the prompt's column: the mapped one, else the first of `PROMPT_COLUMNS`."""
    name = columns.mapped.get("prompt") or next((n for n in PROMPT_COLUMNS if n in row.values), "")
    return _with_input(columns.take(row, name), row, columns, name=name)


def _with_input(prompt: Any, row: Row, columns: SourceColumns, *, name: str | None) -> Any:
    """Where the prompt's column is called `instruction`, a text in `input` belongs to it, after an empty line."""
    if name != "instruction" or not isinstance(prompt, str) or not isinstance(row.values.get("input"), str):
        return prompt
    added = columns.take(row, "input")
    return f"{prompt}\n\n{added}" if added.strip() else prompt


def _check_texts(prompt: Sequence[Message], chosen: str, rejected: str) -> None:
    """Refuse texts that state no preference, or that cannot be encoded."""
    check_prompt(prompt)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise BadRow("empty_response", f"{name} has no text")
    if plain_form(chosen) == plain_form(rejected):
        raise BadRow("identical_pair", BAD_ROW_REASONS["identical_pair"])
    check_unicode(chosen, rejected)


def _check_scores(values: Mapping[str, Any], columns: SourceColumns) -> None:
    """Refuse a row whose scores of its responses say that the rejected one is better."""
    for names in columns.score_columns:
        if names[0] in values and names[1] in values:
            chosen, rejected = (as_number(values[name]) for name in names)
            if chosen is not None and rejected is not None and chosen < rejected:
                raise BadRow("bad_label", f"{names[0]} is {chosen:g}, below {names[1]}, {rejected:g}")


def _source(value: Any, *, mapped: bool) -> str | None:
    """A name; a column that is called `source` by chance, and holds something else, says nothing."""
    if value is None:
        return None
    if isinstance(value, str | int | float):
        return str(value).strip() or None
    if mapped:
        raise BadRow("wrong_type", f"source is {reprlib.repr(value)}, not a name")
    return None


def _margin(value: Any) -> float | None:
    if value is None or value == "":
        return None
    margin = None if isinstance(value, bool) else as_number(value)
    if margin is None:
        raise BadRow("bad_margin", f"margin is {reprlib.repr(value)}, not a finite number")
    if abs(margin) > _LARGEST_MARGIN:
        raise BadRow("bad_margin", f"margin is {margin:g}, beyond {_LARGEST_MARGIN:g}, which no reward can reach")
    return margin
