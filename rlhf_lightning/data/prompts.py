"""Rows -> validated prompts, for PPO and for generation. Rows of preference data are prompts as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_lightning.data.columns import PROMPT_COLUMNS, SIDES, SourceColumns
from rlhf_lightning.data.conversations import (
    check_prompt,
    check_values,
    implicit_prompt,
    prompt_messages,
    without_reply,
)
from rlhf_lightning.data.examples import LoadReport, Message, OnBadRows, PromptExample, Refusal
from rlhf_lightning.data.preferences import id_of, in_context, load_examples, prompt_value, row_parts, validated_rows
from rlhf_lightning.data.sources import OneSource, Row, Source, Split
from rlhf_lightning.data.splits import prompt_hash
from rlhf_lightning.errors import DataError


def load_prompts(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    on_bad_rows: OnBadRows = "error",
    split: Split = "train",
    unique: bool = True,
) -> tuple[list[PromptExample], LoadReport]:
    """Read prompts from a file, a directory or a hub data set (see `read_rows`), or from a list of them.

    Shapes of a row, told apart by what it holds:
    - `prompt`, `conversations` or `messages`: a text, an hh-rlhf transcript, a message or a list of messages
      (`{role, content}` or `{from, value}`); where it ends with an assistant's turn, that is left out;
    - Alpaca-like: `instruction`, and `input` after an empty line;
    - preference pairs of every shape of `load_preferences`, whose prompt is taken. Responses beside a prompt are not
      looked at, so a row that makes no pair (an empty response, the same text twice, a bad margin) makes a prompt.
      Where the prompt is a part of the responses, both must be there and share it; what they say after it does not
      matter.
    `system`, `system_prompt` and `history` are taken as for pairs; `id` is kept as `example_id`. The report names every
    column that was not used. With `unique`, each prompt is taken once, where it comes first (case, runs of blanks and
    Unicode forms aside), and the report counts the others.

    `columns` maps our names (prompt, chosen, rejected, system, history, margin, id, source) to the file's.
    `on_bad_rows`: `error` refuses the source and names the first ten bad rows, `drop` leaves them out and counts them
    in the report.

    Returns the prompts in the order of the rows, and the report. Raises `DataError` when the source cannot be read,
    lacks a column, has no usable row, or has a bad row under `on_bad_rows="error"`.
    """
    examples, report = load_examples(iterate_prompts, source, columns=columns, on_bad_rows=on_bad_rows, split=split)
    if not unique:
        return examples, report
    first: dict[int, PromptExample] = {}
    for example in examples:
        if first.setdefault(prompt_hash(example.prompt), example) is not example:
            report.rows_repeated.append(example.origin)
    return list(first.values()), report


def iterate_prompts(
    source: OneSource, report: LoadReport, *, columns: Mapping[str, str] | None = None, split: Split = "train"
) -> Iterator[PromptExample | Refusal]:
    """Each row of one source as a prompt or a refusal, in order, a few at a time, counted in `report`.

    Raises `DataError` when the source cannot be read, or, after its last row, when it lacks a column.
    """
    known = SourceColumns(columns, fallback="messages")
    yield from validated_rows(source, report, _example, columns=known, split=split)
    known.check(source, needed=())
    has_prompts = known.have_prompts or known.layout is not None
    if not has_prompts and known.found.keys().isdisjoint({"messages", *map(known.name, SIDES)}):
        raise DataError(
            f"{source}: no column prompt, messages, conversations or instruction, nor chosen and rejected; the columns "
            f"found are {known.listed}. Map one with columns: {{prompt: COLUMN}}"
        )


def _example(row: Row, columns: SourceColumns) -> PromptExample:
    prompt = in_context(_prompt(row, columns), row, columns)
    check_prompt(prompt)
    return PromptExample(prompt=prompt, example_id=id_of(row, columns), origin=row.origin)


def _prompt(row: Row, columns: SourceColumns) -> list[Message]:
    """The prompt that a row has itself, without what its other columns put before it."""
    if columns.layout and not columns.layout.ranking:
        parts = row_parts(row, columns)
        return _own_prompt(parts.prompt) if parts.has_prompt else implicit_prompt(parts.chosen, parts.rejected)[0]
    sides = [columns.name(side) for side in SIDES]
    present = [row.values.get(side) is not None for side in sides]
    own_column = "prompt" in columns.mapped or any(name in row.values for name in PROMPT_COLUMNS)
    conversations = all(present) and not columns.has_guessed_prompt(row)
    if "messages" in row.values and not own_column and not conversations:
        return _own_prompt(columns.take(row, "messages"))
    if columns.has_own_prompt(row) or not any(present):
        return _own_prompt(prompt_value(row, columns))
    return implicit_prompt(*(columns.take(row, side) for side in sides))[0]


def _own_prompt(prompt: Any) -> list[Message]:
    """The turns of a prompt, up to the assistant's reply that it may end with."""
    check_values({"prompt": prompt})
    asked = without_reply(prompt)
    messages = prompt_messages(asked)
    return messages[:-1] if asked is prompt and messages[-1]["role"] == "assistant" else messages
