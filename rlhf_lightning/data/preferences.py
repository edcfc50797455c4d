"""Rows -> validated preference pairs. The one way in for training, validation and users."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from rlhf_lightning.data.examples import BAD_ROW_REASONS, LoadReport, Message, OnBadRows, PreferenceExample, Refusal
from rlhf_lightning.data.sources import Row, Source, Split, WeightedSource, described, read_rows, source_list
from rlhf_lightning.errors import DataError

Example = TypeVar("Example")
COLUMNS = ("prompt", "chosen", "rejected", "margin", "id", "source")
PROMPT_COLUMNS = frozenset(("prompt", "conversations", "instruction"))
"""Columns that a prompt is looked for in, where none is mapped."""
ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SURROGATE = re.compile("[\ud800-\udfff]")
_BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u200c\u200d\u2060\ufeff"
"""White space and zero-width characters: two responses that differ only in these at their ends are the same."""
_LARGEST_MARGIN = 3.4e38  # float32


class BadRow(Exception):
    """A row that cannot be used: reason code and the rest of the sentence."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def load_preferences(
    source: Source | Path | Sequence[WeightedSource],
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
      their beginning (only where no row of the source has a prompt);
    - conversations: `prompt` a list of messages, responses a string, a message or a list that ends with the reply;
    - ShareGPT-like: `conversations` as the prompt, and turns of `{from, value}` for `{role, content}`;
    - Alpaca-like: `instruction` and `input` as the prompt.
    Optional columns: `margin` (a finite number), `id` (kept as `example_id`) and `source` (a name, by which accuracy is
    told apart).

    `columns` maps our names (prompt, chosen, rejected, margin, id, source) to the file's. `on_bad_rows`: `error`
    refuses the source and names the first ten bad rows, `drop` leaves them out and counts them in the report.

    Returns the examples in the order of the rows, and the report. Raises `DataError` when the source cannot be read,
    lacks a column, has no usable row, or has a bad row under `on_bad_rows="error"`.
    """
    return load_examples(iterate_preferences, source, columns=columns, on_bad_rows=on_bad_rows, split=split)


def load_examples(
    iterate: Callable[..., Iterator[Example | Refusal]],
    source: Source | Path | Sequence[WeightedSource],
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
    columns, found = known_columns(columns), {}
    yield from validated_rows(source, report, _example, columns=columns, split=split, found=found)
    check_columns(source, columns, found, needed=("chosen", "rejected"))


def known_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    """A copy of a mapping of columns. Raises `DataError` when it maps a name that is none of `COLUMNS`."""
    if unknown := sorted(set(columns or {}) - set(COLUMNS)):
        raise DataError(f"columns: unknown name {unknown[0]!r}; it maps {', '.join(COLUMNS)} to the file's columns")
    return dict(columns or {})


def validated_rows(
    source: str | Path,
    report: LoadReport,
    make: Callable[..., Example],
    *,
    columns: Mapping[str, str],
    split: Split,
    found: dict[str, None],
) -> Iterator[Example | Refusal]:
    """Each row of one source as `make(row, columns, has_prompts=...)` makes it, or as the refusal that this raises.

    `has_prompts` says whether this row or one before it has a prompt of its own. The names of all columns are put into
    `found`. Raises `DataError` when the source cannot be read, or mixes rows with a prompt and rows whose prompt would
    have to be guessed.
    """
    guessed: Row | None = None
    for row in read_rows(source, split=split):
        report.rows_read += 1
        found.update(dict.fromkeys(row.values))
        has_prompts = "prompt" in columns or not PROMPT_COLUMNS.isdisjoint(found)
        if not has_prompts and is_guess(row, columns):
            guessed = guessed or row
        elif guessed and has_prompts:
            raise DataError(
                f"{row.origin}: has a prompt, but {guessed.origin} has none: give every row a prompt, or none of them"
            )
        try:
            yield make(row, columns, has_prompts=has_prompts)
        except BadRow as error:
            refusal = Refusal(error.reason, f"{row.origin}: {error}", row.origin)
            report.refuse(refusal)
            yield refusal


def check_columns(
    source: str | Path, columns: Mapping[str, str], found: Mapping[str, None], *, needed: Sequence[str]
) -> None:
    """A column that no row has, of those needed or mapped, is a mistake in the settings or the file, not in the rows.

    Raises `DataError`.
    """
    needed = {*needed, *columns}
    missing = [name for name in COLUMNS if name in needed and columns.get(name, name) not in found]
    if missing:
        absent = ", ".join(f"{columns.get(name, name)!r} for {name}" for name in missing)
        if "prompt" not in needed and "prompt" not in found:
            missing.insert(0, "prompt")
        raise DataError(
            f"{source}: no column {absent}; the columns found are {' '.join(', '.join(found).split())}. "
            f"Map them with columns: {{{', '.join(f'{name}: COLUMN' for name in missing)}}}"
        )


def is_guess(row: Row, columns: Mapping[str, str]) -> bool:
    """Whether the prompt of a row without one is guessed, from the common beginning of two plain strings."""
    sides = [row.values.get(columns.get(name, name)) for name in ("chosen", "rejected")]
    return all(isinstance(side, str) for side in sides) and not all(map(_HH_TURN.match, sides))


def _example(row: Row, columns: Mapping[str, str], *, has_prompts: bool) -> PreferenceExample:
    values = {name: row.values.get(columns.get(name, name)) for name in COLUMNS}
    if has_own_prompt(row, columns, has_prompts=has_prompts):
        values["prompt"] = prompt_value(row.values, columns)
        check_values({name: values[name] for name in ("prompt", "chosen", "rejected")})
        prompt, chosen, rejected = _explicit(values["prompt"], values["chosen"], values["rejected"])
    else:
        prompt, chosen, rejected = implicit_prompt(values["chosen"], values["rejected"])
    _check_texts(prompt, chosen, rejected)
    return PreferenceExample(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=_margin(values["margin"]),
        example_id=id_of(row, columns),
        origin=row.origin,
        source=_source(values["source"], mapped="source" in columns),
    )


def id_of(row: Row, columns: Mapping[str, str]) -> str:
    """The row's own id, or where it stands."""
    own = row.values.get(columns.get("id", "id"))
    example_id = row.example_id if own is None else str(own)
    if _SURROGATE.search(example_id):
        raise BadRow("bad_unicode", BAD_ROW_REASONS["bad_unicode"])
    return example_id


def has_own_prompt(row: Row, columns: Mapping[str, str], *, has_prompts: bool) -> bool:
    """Whether a row's prompt stands, or should stand, in a column of its own, and not within the responses."""
    own = "prompt" in columns or not PROMPT_COLUMNS.isdisjoint(row.values)
    return own or (has_prompts and is_guess(row, columns))


def prompt_value(values: Mapping[str, Any], columns: Mapping[str, str]) -> Any:
    """What stands in the prompt's column: the mapped one, else `prompt`, `conversations` or Alpaca's `instruction`.

    Where the column is called `instruction`, a text in `input` belongs to it, after an empty line.
    """
    name = columns.get("prompt") or next((n for n in ("prompt", "conversations", "instruction") if n in values), "")
    value = values.get(name)
    if name == "instruction" and isinstance(value, str) and isinstance(values.get("input"), str):
        value = f"{value}\n\n{values['input']}" if values["input"].strip() else value
    return value


def check_values(values: Mapping[str, Any]) -> None:
    """Refuse what is absent, neither text nor messages, or messages written into a text."""
    if absent := [name for name, value in values.items() if value is None]:
        raise BadRow("missing_key", f"{', '.join(absent)} absent or null")
    if wrong := [name for name, value in values.items() if not isinstance(value, str | list | dict)]:
        found = ", ".join(f"{name} of type {type(values[name]).__name__}" for name in wrong)
        raise BadRow("wrong_type", f"{found}, not text or a list of messages")
    if quoted := [name for name, value in values.items() if _is_quoted_conversation(value)]:
        raise BadRow("bad_messages", f"{', '.join(quoted)} holds a list of messages inside a string; decode it")


def _is_quoted_conversation(value: Any) -> bool:
    """Whether a string is the JSON of a list of messages."""
    if not (isinstance(value, str) and value.lstrip().startswith("[") and '"role"' in value):
        return False
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return any(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns)


def check_prompt(prompt: Sequence[Message]) -> None:
    """Refuse a prompt that says nothing, does not end with the user's turn, or that cannot be encoded."""
    if not any(message["content"].strip() for message in prompt if message["role"] == "user"):
        raise BadRow("empty_prompt", "the prompt has no text")
    if prompt[-1]["role"] != "user":
        raise BadRow("bad_messages", "the prompt does not end with the user's turn")
    if any(_SURROGATE.search(message["content"]) for message in prompt):
        raise BadRow("bad_unicode", BAD_ROW_REASONS["bad_unicode"])


def _check_texts(prompt: Sequence[Message], chosen: str, rejected: str) -> None:
    """Refuse texts that state no preference, or that cannot be encoded."""
    check_prompt(prompt)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise BadRow("empty_response", f"{name} has no text")
    if chosen.strip(_BLANKS) == rejected.strip(_BLANKS):
        raise BadRow("identical_pair", BAD_ROW_REASONS["identical_pair"])
    if _SURROGATE.search(chosen) or _SURROGATE.search(rejected):
        raise BadRow("bad_unicode", BAD_ROW_REASONS["bad_unicode"])


def _explicit(prompt: Any, chosen: Any, rejected: Any) -> tuple[list[Message], str, str]:
    messages = prompt_messages(prompt)
    return messages, *(
        _reply(name, response, messages) for name, response in (("chosen", chosen), ("rejected", rejected))
    )


def prompt_messages(prompt: Any) -> list[Message]:
    """The turns of a prompt that is a text, an hh-rlhf transcript or a list of messages."""
    if not isinstance(prompt, str):
        return _messages("prompt", prompt)
    if not _HH_TURN.match(prompt):
        return [{"role": "user", "content": prompt}]
    messages = _transcript("prompt", prompt)
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()  # the open turn that the responses fill
    return messages


def _reply(name: str, response: Any, prompt: Sequence[Message]) -> str:
    """The text of a response that may repeat the prompt's turns before it."""
    if isinstance(response, str) and not response.startswith("\n\nHuman:"):
        return response
    messages = _transcript(name, response) if isinstance(response, str) else _messages(name, response)
    if messages[-1]["role"] != "assistant":
        raise BadRow("bad_messages", f"{name} does not end with an assistant's reply")
    if messages[:-1] and not _same_turns(messages[:-1], prompt):
        raise BadRow("prompts_differ", f"{name} repeats another prompt than the row's")
    return messages[-1]["content"]


def _same_turns(turns: Sequence[Message], prompt: Sequence[Message]) -> bool:
    """Whether turns repeat the prompt; a system message may stand in the prompt alone."""
    without_system = [message for message in prompt if message["role"] != "system"]
    return list(turns) in (list(prompt), without_system)


def implicit_prompt(chosen: Any, rejected: Any) -> tuple[list[Message], str, str]:
    """The prompt that two responses share, and what each says after it; what they say is not judged."""
    check_values({"chosen": chosen, "rejected": rejected})
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not (_HH_TURN.match(chosen) and _HH_TURN.match(rejected)):
            return _common_beginning(chosen, rejected)
        conversations = _transcript("chosen", chosen), _transcript("rejected", rejected)
    elif isinstance(chosen, str) or isinstance(rejected, str):
        raise BadRow("wrong_type", "chosen and rejected are not of one kind: a string and a conversation")
    else:
        conversations = _messages("chosen", chosen), _messages("rejected", rejected)
    for name, messages in zip(("chosen", "rejected"), conversations, strict=True):
        if messages[-1]["role"] != "assistant":
            raise BadRow("bad_messages", f"{name} does not end with an assistant's reply")
    prompt, other = (messages[:-1] for messages in conversations)
    if prompt != other:
        raise BadRow("prompts_differ", "chosen and rejected differ before the last assistant's reply")
    return prompt, conversations[0][-1]["content"], conversations[1][-1]["content"]


def _common_beginning(chosen: str, rejected: str) -> tuple[list[Message], str, str]:
    """Split two strings after the whole words that they share at their beginning."""
    if chosen == rejected:
        raise BadRow("identical_pair", BAD_ROW_REASONS["identical_pair"])
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    prompt = chosen[:shared].strip()
    return [{"role": "user", "content": prompt}], chosen[shared:].strip(), rejected[shared:].strip()


def _transcript(name: str, text: str) -> list[Message]:
    """Turns of an hh-rlhf transcript, each stripped of outer blanks."""
    parts = _HH_TURN.split(text)
    assert not parts[0], "callers check that the text begins with a turn"
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _messages(name: str, value: Sequence[Any] | Mapping[str, Any]) -> list[Message]:
    """Check a conversation, or a message alone, and keep role and content. ShareGPT's names are known."""
    if not value:
        raise BadRow("bad_messages", f"{name} is an empty conversation")
    messages = []
    for turn in [value] if isinstance(value, Mapping) else value:
        if not isinstance(turn, Mapping):
            raise BadRow("bad_messages", f"{name} holds a turn that is no {{role, content}} with text")
        role, content = (turn.get(key, turn.get(other)) for key, other in (("role", "from"), ("content", "value")))
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        if not isinstance(content, str):
            raise BadRow("bad_messages", f"{name} holds a turn that is no {{role, content}} with text")
        if role not in ROLES:
            raise BadRow("bad_messages", f"{name} holds the role {reprlib.repr(role)}; use {', '.join(ROLES)}")
        messages.append({"role": role, "content": content})
    return messages


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
    try:
        margin = float(value)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if isinstance(value, bool) or not abs(margin) <= _LARGEST_MARGIN:
        raise BadRow("bad_margin", f"margin is {reprlib.repr(value)}, not a finite number")
    return margin
