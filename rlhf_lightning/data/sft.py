"""Rows -> validated examples for SFT: a prompt and its response, or a conversation of several turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_lightning.data.columns import CONVERSATION_COLUMNS, RESPONSE_COLUMNS, SFT_COLUMNS, SIDES, SourceColumns
from rlhf_lightning.data.conversations import (
    HH_TURN,
    BadRow,
    check_prompt,
    check_unicode,
    check_values,
    has_reasoning,
    messages_of,
    prompt_messages,
    reply,
    transcript,
)
from rlhf_lightning.data.examples import LoadReport, Message, OnBadRows, Refusal, SFTExample
from rlhf_lightning.data.preferences import (
    id_of,
    in_context,
    load_examples,
    preference_of,
    prompt_value,
    validated_rows,
)
from rlhf_lightning.data.sources import OneSource, Row, Source, Split


def load_sft(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    on_bad_rows: OnBadRows = "error",
    split: Split = "train",
) -> tuple[list[SFTExample], LoadReport]:
    """Read examples for SFT from a file, a directory or a hub data set (see `read_rows`), or from a list of them.

    Shapes of a row, told apart row by row by what it holds:
    - a prompt and its `response`, `completion` or `output`, each a text or messages; the prompt is `prompt`, or
      `instruction`, with `input` after an empty line. The response alone is learned;
    - `messages` or `conversations`: a list of `{role, content}` or `{from, value}`. Every assistant turn is learned;
      what comes after the last one teaches nothing and is left off;
    - preference pairs of every shape of `load_preferences`, whose chosen response is learned.
    `system`, `system_prompt` and `history` are taken as for pairs; `id` is kept as `example_id`. The report names every
    column that was not used.

    `columns` maps our names (those of `load_preferences`, `response` and `messages`) to the file's. `on_bad_rows`:
    `error` refuses the source and names the first ten bad rows, `drop` leaves them out and counts them in the report.

    Returns the examples in the order of the rows, and the report. Raises `DataError` when the source cannot be read,
    lacks a column, has no usable row, or has a bad row under `on_bad_rows="error"`.
    """
    return load_examples(iterate_sft, source, columns=columns, on_bad_rows=on_bad_rows, split=split)


def iterate_sft(
    source: OneSource, report: LoadReport, *, columns: Mapping[str, str] | None = None, split: Split = "train"
) -> Iterator[SFTExample | Refusal]:
    """Each row of one source as an example or a refusal, in order, a few at a time, counted in `report`.

    Raises `DataError` when the source cannot be read, or, after its last row, when it lacks a mapped column.
    """
    known = SourceColumns(columns, fallback="messages", others=SFT_COLUMNS)
    yield from validated_rows(source, report, _example, columns=known, split=split)
    known.check(source, needed=())


def is_sft_row(values: Mapping[str, Any]) -> bool:
    """Whether a row holds one response or a conversation, and no pair."""
    if any(values.get(side) is not None for side in SIDES):
        return False
    return _first(values, RESPONSE_COLUMNS + CONVERSATION_COLUMNS) is not None


def _example(row: Row, columns: SourceColumns) -> SFTExample:
    if has_pair(row, columns):
        pair = preference_of(row, columns)
        return SFTExample(pair.prompt, pair.chosen, False, pair.example_id, pair.origin, pair.has_reasoning)
    return single_response(row, columns)


def has_pair(row: Row, columns: SourceColumns) -> bool:
    """Whether a row is read as a pair."""
    if any(row.values.get(columns.name(side)) is not None for side in SIDES):
        return True
    return columns.layout is not None and not any(_response_columns(row, columns))


def _response_columns(row: Row, columns: SourceColumns) -> tuple[str | None, str | None]:
    """The column of a row that holds a response, and that which holds a conversation."""
    response, conversation = (
        _first(row.values, [columns.mapped[ours]] if ours in columns.mapped else names)
        for ours, names in (("response", RESPONSE_COLUMNS), ("messages", CONVERSATION_COLUMNS))
    )
    return response, conversation


def single_response(row: Row, columns: SourceColumns) -> SFTExample:
    """The response of a row to its prompt, or the conversation that it holds. Raises `BadRow`."""
    response, conversation = _response_columns(row, columns)
    if response is not None:
        value = columns.take(row, response)
        prompt, text = _answer(value, row, columns)
    elif conversation is not None:
        value = _learned_part(conversation, columns.take(row, conversation))
        *own, last = transcript(value) if isinstance(value, str) else messages_of(conversation, value, replies=True)
        prompt, text = in_context(own, row, columns), last["content"]
        if any(not turn["content"].strip() for turn in prompt if turn["role"] == "assistant"):
            raise BadRow("empty_response", f"{conversation} holds an assistant turn without text")
    else:
        raise BadRow(
            "missing_key",
            f"holds no {', '.join(RESPONSE_COLUMNS)}, {' or '.join(CONVERSATION_COLUMNS)}, and no chosen response; the "
            f"columns found are {columns.listed}; map one with columns: {{response: COLUMN}}",
        )
    check_prompt(prompt)
    if not text.strip():
        raise BadRow("empty_response", f"{response or conversation} has no text")
    check_unicode(text)
    every_turn = response is None
    return SFTExample(prompt, text, every_turn, id_of(row, columns), row.origin, has_reasoning(value))


def _first(values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of some columns whose value is not null."""
    return next((name for name in names if values.get(name) is not None), None)


def _answer(value: Any, row: Row, columns: SourceColumns) -> tuple[list[Message], str]:
    """The prompt of a row, and its response."""
    asked = prompt_value(row, columns)
    check_values({"prompt": asked, "response": value})
    own = prompt_messages(asked)
    prompt = in_context(own, row, columns)
    return prompt, reply("response", value, prompt, own_prompt=own)


def _learned_part(name: str, value: Any) -> Any:
    """A conversation up to its last assistant turn. Raises `BadRow` where there is none."""
    check_values({name: value})
    if isinstance(value, str):
        begins = [match.start() for match in HH_TURN.finditer(value)]
        asked = [begin for begin in begins if value[begin:].lstrip().startswith("Human:")]
        if not HH_TURN.match(value) or asked == begins:
            raise BadRow("no_response", f"{name} is a text without an assistant turn")
        if begins[-1] == asked[-1]:
            return value[: next(begin for begin in asked if begin > max(set(begins) - set(asked)))]
        return value
    turns = [value] if isinstance(value, Mapping) else value
    roles = [turn.get("role") or turn.get("from") if isinstance(turn, Mapping) else None for turn in turns]
    places = [place for place, role in enumerate(roles) if role in ("assistant", "gpt")]
    if not places:
        raise BadRow("no_response", f"{name} holds no assistant turn")
    if any(turns[place].get("weight") == 0 or turns[place].get("train") is False for place in places):
        raise BadRow(
            "no_place",
            f"{name} marks an assistant turn as one that is not learned (weight 0), for which there is no place; give "
            "the turn that is learned as response, and those before it as prompt",
        )
    return list(turns[: places[-1] + 1])
