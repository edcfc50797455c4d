"""Rows -> validated preference pairs. The one way in for training, validation and users."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from rlhf_lightning.data.columns import PROMPT_COLUMNS, SIDES, SourceColumns
from rlhf_lightning.data.conversations import (
    BadRow,
    check_prompt,
    check_unicode,
    check_values,
    has_reasoning,
    implicit_prompt,
    plain_form,
    prompt_messages,
    reply,
    says_something,
    with_context,
)
from rlhf_lightning.data.examples import BAD_ROW_REASONS, LoadReport, Message, OnBadRows, PreferenceExample, Refusal
from rlhf_lightning.data.labels import as_number, responses_of
from rlhf_lightning.data.sources import OneSource, Row, Source, Split, described, read_rows, source_list
from rlhf_lightning.errors import DataError

Example = TypeVar("Example")
_SYSTEM_COLUMNS = ("system", "system_prompt")
_WITHOUT_A_PLACE = {
    "tools": "remove the column, or write the tools into the system message as the model's chat template does",
    "chat_template_kwargs": "remove the column, and set data.chat_template_kwargs for all rows alike",
}
"""Columns that change what a chat template writes, row by row, and what to do instead."""
_LARGEST_MARGIN = 1e6


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
    - labelled: two responses and a label that says which is better, or a list of responses with scores, of which the
      best and the worst make the pair, as PKU-SafeRLHF, HelpSteer, UltraFeedback, Nectar, SHP, AlpacaFarm and Chatbot
      Arena lay them out (see `LAYOUTS`). Ties are counted, and left out under either policy.
    Optional columns: `system` or `system_prompt` (a system message), `history` (earlier turns), `margin` (a finite
    number), `id` (kept as `example_id`) and `source` (a name, by which accuracy is told apart). A response's
    `reasoning_content` is put before its text as `<think>...</think>`. The report names every column that was not used.

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
    examples: list[Example] = []
    reports = []
    for one in source_list(source):
        reports.append(LoadReport(source=described(one.source, split=split)))
        rows = iterate(one.source, reports[-1], columns=one.columns or columns, split=split)
        examples += [row for row in rows if not isinstance(row, Refusal)]
        reports[-1].enforce(on_bad_rows)
    return examples, LoadReport.merged(reports)


def iterate_preferences(
    source: OneSource, report: LoadReport, *, columns: Mapping[str, str] | None = None, split: Split = "train"
) -> Iterator[PreferenceExample | Refusal]:
    """Each row of one source as an example or a refusal, in order, a few at a time, counted in `report`.

    Raises `DataError` when the source cannot be read, or, after its last row, when it lacks a column.
    """
    known = SourceColumns(columns)
    yield from validated_rows(source, report, preference_of, columns=known, split=split)
    known.check(source, needed=() if known.layout else SIDES)


def validated_rows(
    source: OneSource,
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
        if not columns.have_prompts and columns.fallback not in row.values and columns.has_guessed_prompt(row):
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


def preference_of(row: Row, columns: SourceColumns) -> PreferenceExample:
    """The pair that a row holds. Raises `BadRow`."""
    margin = _margin(columns.take(row, columns.name("margin")))
    source = _source(columns.take(row, columns.name("source")), mapped="source" in columns.mapped)
    parts = row_parts(row, columns)
    if columns.layout:
        if not columns.layout.ranking:
            for name in columns.layout.labels:
                columns.take(row, name)
        preference = columns.layout.preference(row.values)
        if preference == 0:
            raise BadRow("tie", BAD_ROW_REASONS["tie"])
        if preference < 0:
            parts = parts._replace(chosen=parts.rejected, rejected=parts.chosen)
        if columns.layout.graded and margin is None:
            margin = abs(preference)
    else:
        _check_scores(row.values, columns)
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
    """Where a label says which response is better, the first of them."""
    rejected: Any
    has_prompt: bool
    """False: the prompt is a part of the responses, and `prompt` is None."""


def row_parts(row: Row, columns: SourceColumns) -> RowParts:
    """The parts of a row; which response of a labelled one is better is not looked at."""
    layout = columns.layout
    if layout is None:
        own = columns.has_own_prompt(row)
        prompt = prompt_value(row, columns) if own else None
        chosen, rejected = (columns.take(row, columns.name(side)) for side in SIDES)
        return RowParts(prompt, chosen, rejected, has_prompt=own)
    columns.take(row, layout.prompt or "turn")
    for name in layout.responses:
        columns.used.add(name) if layout.ranking else columns.take(row, name)
    prompt, first, second = responses_of(layout, row.values)
    inside = prompt is None and not any(isinstance(side, str | None) for side in (first, second))
    return RowParts(_with_input(prompt, row, columns, name=layout.prompt), first, second, has_prompt=not inside)


def _texts(parts: RowParts, row: Row, columns: SourceColumns) -> tuple[list[Message], str, str]:
    """Prompt and responses of a row."""
    if not parts.has_prompt:
        prompt, chosen, rejected = implicit_prompt(parts.chosen, parts.rejected)
        if not prompt and (candidates := columns.prompt_candidates):
            raise BadRow(
                "empty_prompt",
                f"chosen and rejected hold no prompt before the response; if it is in {' or '.join(candidates)}, "
                "say so with columns: {prompt: COLUMN}",
            )
        return in_context(prompt, row, columns), chosen, rejected
    check_values({"prompt": parts.prompt, "chosen": parts.chosen, "rejected": parts.rejected})
    own = prompt_messages(parts.prompt)
    prompt = in_context(own, row, columns)
    chosen = reply("chosen", parts.chosen, prompt, own_prompt=own)
    return prompt, chosen, reply("rejected", parts.rejected, prompt, own_prompt=own)


def in_context(prompt: Sequence[Message], row: Row, columns: SourceColumns) -> list[Message]:
    """A prompt with what the row's other columns put before it: a system message, earlier turns.

    Raises `BadRow` where a column changes what the chat template writes in a way that is not supported.
    """
    for name, advice in _WITHOUT_A_PLACE.items():
        if says_something(row.values.get(name)) and name not in columns.mapped.values():
            raise BadRow("no_place", f"the column {name} has no place in a prompt here; {advice}")
    names = [columns.mapped["system"]] if "system" in columns.mapped else _SYSTEM_COLUMNS
    taken = {columns.mapped.get("prompt"), columns.layout and columns.layout.prompt}
    system = next((columns.take(row, name) for name in names if says_something(row.values.get(name))), None)
    history = None if columns.name("history") in taken else columns.take(row, columns.name("history"))
    return with_context(prompt, system=system, history=history)


def id_of(row: Row, columns: SourceColumns) -> str:
    """The row's own id, or `file:row`."""
    own = columns.take(row, columns.name("id"))
    example_id = row.example_id if own is None else str(own)
    check_unicode(example_id)
    return example_id


def prompt_value(row: Row, columns: SourceColumns) -> Any:
    """The value of the prompt's column: the mapped one, else the first of `PROMPT_COLUMNS` that says something."""
    present = [name for name in PROMPT_COLUMNS if name in row.values]
    said = (name for name in present if row.values[name] is not None)
    name = columns.mapped.get("prompt") or next(said, next(iter(present), ""))
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
