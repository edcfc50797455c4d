"""The value of a cell -> the turns of a conversation, or the text of a response."""

from __future__ import annotations

import json
import re
import reprlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_lightning.data.examples import BAD_ROW_REASONS, Message

ROLES = ("system", "user", "assistant")
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}
"""What ShareGPT and OpenAI call roles, and their names here."""
_TURN_KEYS = frozenset(("role", "content", "from", "value"))
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn for what the assistant thought before it replied; they have a place in a response alone."""
_KNOWN_KEYS = _TURN_KEYS.union(_REASONING)
_CALLS = ("tool_calls", "function_call")
"""Keys of a turn that neither a prompt nor a response has a place for."""
_QUOTED_TURN = re.compile(
    r"""\[?\s*\{\s*['"](?:role|content|from|value)['"]\s*:.*(?<=['"])(?:system|user|assistant|human|gpt)['"].*\}\s*\]?$""",
    re.DOTALL,
)
_QUOTED_KEYS = [
    [re.compile(rf"""['"]{key}['"]\s*:""") for key in keys] for keys in (("role", "content"), ("from", "value"))
]
_INVISIBLE = "\u00ad\u200b\u2060\ufeff"
_JOINERS = "\u200c\u200d"
_BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001)))) + _JOINERS
"""White space and joiners: two responses that differ only in these at their ends are the same."""


class BadRow(Exception):
    """A row that cannot be used: reason code and the rest of the sentence."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def plain_form(text: str) -> str:
    """A text in its composed Unicode form (NFC), without zero-width blanks and soft hyphens and without outer blanks.

    Two texts of one plain form look the same to a reader.
    """
    if not text.isascii():
        for blank in _INVISIBLE:
            text = text.replace(blank, "")
        text = unicodedata.normalize("NFC", text)
    return text.strip(_BLANKS)


def says_something(value: Any) -> bool:
    """Whether a cell holds more than null, blanks, or lists and mappings of nothing, written as text or not."""
    if value is None:
        return False
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null", "None")
    if isinstance(value, Mapping):
        return any(map(says_something, value.values()))
    if isinstance(value, list | tuple):
        return any(map(says_something, value))
    return True


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of turns, or a turn alone; whether they are well-formed is not looked at."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and not _TURN_KEYS.isdisjoint(first)


def unused_keys(value: Any) -> Iterator[str]:
    """Keys of the turns of a conversation, beside role and content, that say something."""
    for turn in _mappings(value):
        if not turn.keys() <= _KNOWN_KEYS:
            yield from (str(key) for key, said in turn.items() if key not in _KNOWN_KEYS and says_something(said))


def has_reasoning(value: Any) -> bool:
    """Whether a turn of a conversation has its reasoning in a key of its own."""
    return any(says_something(_said(turn, *_REASONING)) for turn in _mappings(value))


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    """The mappings among the items of a list, or a mapping alone."""
    return [turn for turn in (value if isinstance(value, list) else [value]) if isinstance(turn, Mapping)]


def parsed_json(text: str) -> Any:
    """What a text holds as JSON; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def check_values(values: Mapping[str, Any]) -> None:
    """Refuse what is absent, neither text nor messages, or messages written into a text."""
    if absent := [name for name, value in values.items() if value is None]:
        raise BadRow("missing_key", f"{', '.join(absent)} absent or null")
    if wrong := [name for name, value in values.items() if not isinstance(value, str | list | dict)]:
        found = ", ".join(f"{name} of type {type(values[name]).__name__}" for name in wrong)
        raise BadRow("wrong_type", f"{found}, not text or a list of messages")
    if quoted := [name for name, value in values.items() if _is_quoted_conversation(value)]:
        raise BadRow(
            "bad_messages",
            f"{', '.join(quoted)} holds a list of messages inside a string; decode it, and save the rows as .jsonl or "
            ".parquet",
        )


def _is_quoted_conversation(value: Any) -> bool:
    """Whether a string is a message, or a list of messages, as JSON, Python or NumPy write it."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return False
    if _QUOTED_TURN.match(value.strip()):
        return any(all(key.search(value) for key in keys) for keys in _QUOTED_KEYS)
    turns = parsed_json(value) if '"role"' in value else None
    return isinstance(turns, list) and any({"role", "content"} <= turn.keys() for turn in _mappings(turns))


def check_prompt(prompt: Sequence[Message]) -> None:
    """Refuse a prompt that says nothing, does not end with the user's turn, or that cannot be encoded."""
    if not any(message["content"].strip() for message in prompt if message["role"] == "user"):
        raise BadRow("empty_prompt", "the prompt has no text")
    if prompt[-1]["role"] != "user":
        raise BadRow("bad_messages", "the prompt does not end with the user's turn")
    check_unicode(*(message["content"] for message in prompt))


def check_unicode(*texts: str) -> None:
    """Refuse texts that cannot be encoded."""
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise BadRow("bad_unicode", BAD_ROW_REASONS["bad_unicode"]) from error


def prompt_messages(prompt: Any) -> list[Message]:
    """The turns of a prompt that is a text, an hh-rlhf transcript or a list of messages."""
    if not isinstance(prompt, str):
        return messages_of("prompt", prompt)
    if not HH_TURN.match(prompt):
        return [{"role": "user", "content": prompt}]
    messages = transcript(prompt)
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()  # the open turn that the responses fill
    return messages


def without_reply(prompt: Any) -> Any:
    """A prompt's value without the assistant's reply that a list of messages may end with."""
    if isinstance(prompt, list) and len(prompt) > 1:
        last = prompt[-1]
        if isinstance(last, Mapping) and _said(last, "role", "from") in ("assistant", "gpt"):
            return prompt[:-1]
    return prompt


def reply(name: str, response: Any, prompt: Sequence[Message], *, own_prompt: Sequence[Message]) -> str:
    """The text of a response that may repeat turns before it: those of `prompt`, or of `own_prompt`.

    `own_prompt` is the prompt as its column has it, without what other columns put before it.
    """
    if isinstance(response, str) and not response.startswith("\n\nHuman:"):
        return response
    messages = _answered(name, response)
    if messages[:-1] and not (_same_turns(messages[:-1], prompt) or _same_turns(messages[:-1], own_prompt)):
        raise BadRow("prompts_differ", f"{name} repeats another prompt than the row's")
    return messages[-1]["content"]


def _answered(name: str, value: Any) -> list[Message]:
    """The turns of a transcript or of messages that end with a response."""
    messages = transcript(value) if isinstance(value, str) else messages_of(name, value, replies=True)
    if messages[-1]["role"] != "assistant":
        raise BadRow("bad_messages", f"{name} does not end with an assistant's reply")
    return messages


def _same_turns(turns: Sequence[Message], prompt: Sequence[Message]) -> bool:
    """Whether turns repeat the prompt; a system message may stand in the prompt alone."""
    without_system = [message for message in prompt if message["role"] != "system"]
    return list(turns) in (list(prompt), without_system)


def implicit_prompt(chosen: Any, rejected: Any) -> tuple[list[Message], str, str]:
    """The prompt that two responses share, and what each says after it; what they say is not judged."""
    check_values({"chosen": chosen, "rejected": rejected})
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("wrong_type", "chosen and rejected are not of one kind: a string and a conversation")
    if isinstance(chosen, str) and not (HH_TURN.match(chosen) and HH_TURN.match(rejected)):
        return _common_beginning(chosen, rejected)
    *prompt, response = _answered("chosen", chosen)
    *other, other_response = _answered("rejected", rejected)
    if prompt != other:
        raise BadRow("prompts_differ", "chosen and rejected differ before the last assistant's reply")
    return prompt, response["content"], other_response["content"]


def _common_beginning(chosen: str, rejected: str) -> tuple[list[Message], str, str]:
    """Split two strings after the whole words that they share at their beginning."""
    if chosen == rejected:
        raise BadRow("identical_pair", BAD_ROW_REASONS["identical_pair"])
    differ = (place for place, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    shared = next(differ, min(len(chosen), len(rejected)))
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    prompt = chosen[:shared].strip()
    return [{"role": "user", "content": prompt}], chosen[shared:].strip(), rejected[shared:].strip()


def transcript(text: str) -> list[Message]:
    """Turns of an hh-rlhf transcript, each stripped of outer blanks."""
    parts = HH_TURN.split(text)
    assert not parts[0], "callers check that the text begins with a turn"
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def messages_of(name: str, value: Sequence[Any] | Mapping[str, Any], *, replies: bool = False) -> list[Message]:
    """Check a conversation, or a message alone, and keep role and content. ShareGPT's names are known.

    A content of several parts of text is their texts in a row; the role `developer` is `system`.
    With `replies`, the last turn is a response, and reasoning in a key of its own is put before its text as
    `<think>...</think>`.
    """
    if not value:
        raise BadRow("bad_messages", f"{name} is an empty conversation")
    turns = [value] if isinstance(value, Mapping) else value
    return [_message(name, turn, is_reply=replies and turn is turns[-1]) for turn in turns]


def _message(name: str, turn: Any, *, is_reply: bool) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow("bad_messages", f"{name} holds a turn that is no {{role, content}} with text")
    keys = _CALLS if is_reply else (*_CALLS, *_REASONING)
    if lost := [key for key in keys if says_something(turn.get(key))]:
        raise BadRow(
            "no_place",
            f"{name} holds a turn with {lost[0]}, for which it has no place; write it into the content as the model's "
            "chat template writes it, or remove it",
        )
    role, content = _said(turn, "role", "from"), _said(turn, "content", "value")
    if isinstance(content, list) and content:
        content = "".join(_text_part(name, part) for part in content)
    if not isinstance(content, str):
        raise BadRow("bad_messages", f"{name} holds a turn that is no {{role, content}} with text")
    role = _OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRow("bad_messages", f"{name} holds the role {reprlib.repr(role)}; use {', '.join(ROLES)}")
    reasoning = _said(turn, *_REASONING)
    return {"role": role, "content": _thought(name, reasoning, content) if says_something(reasoning) else content}


def _thought(name: str, reasoning: Any, content: str) -> str:
    """A response after its reasoning, as Qwen 3 and DeepSeek write both into one text."""
    if not isinstance(reasoning, str) or "</think>" in content:
        raise BadRow("bad_messages", f"{name} holds reasoning that is no text, or that is in the content as well")
    newline = "\n"
    return f"<think>\n{reasoning.strip(newline)}\n</think>\n\n{content.lstrip(newline)}"


def _said(turn: Mapping[str, Any], *keys: str) -> Any:
    """The first of some keys' values that is not null: files of several kinds of turns have nulls for the others."""
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _text_part(name: str, part: Any) -> str:
    """The text of a part of a content, `{"type": "text", "text": ...}`. Raises `BadRow` for one of another type."""
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    beside = [key for key in part.keys() - {"type", "text"} if says_something(part[key])] if kind == "text" else []
    if kind != "text" or beside or not isinstance(part.get("text"), str):
        what = beside[0] if beside else kind if isinstance(kind, str) and kind != "text" else "no text"
        raise BadRow("no_place", f"{name} holds a turn with a part of {what}; its place is for text alone")
    return part["text"]


def with_context(prompt: Sequence[Message], *, system: Any, history: Any) -> list[Message]:
    """A prompt after the system message and the earlier turns that its row has in columns of their own.

    `system` is a text, `history` a list of `[user, assistant]` or of messages; either may say nothing.
    """
    own = [message for message in prompt[:1] if message["role"] == "system"]
    turns = [*(_earlier_turns(history) if says_something(history) else []), *prompt[len(own) :]]
    if not says_something(system):
        return [*own, *turns]
    if not isinstance(system, str):
        raise BadRow("wrong_type", f"system is {reprlib.repr(system)}, not text")
    if own and plain_form(own[0]["content"]) != plain_form(system):
        raise BadRow("bad_messages", "the system column and the prompt's own system message differ; keep one")
    return [*(own or [{"role": "system", "content": system}]), *turns]


def _earlier_turns(history: Any) -> list[Message]:
    if isinstance(history, str) and HH_TURN.match(history):
        return transcript(history)
    if isinstance(history, str):
        history = parsed_json(history)
    if not isinstance(history, list):
        raise BadRow(
            "bad_messages",
            "history is no list of [user, assistant]; if it is the prompt itself, say so with columns: "
            "{prompt: history}",
        )
    if is_conversation(history):
        return messages_of("history", history)
    turns: list[Message] = []
    for pair in history:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow("bad_messages", f"history holds {reprlib.repr(pair)}, which is no [user, assistant] of texts")
        turns += exchange(*pair)
    return turns


def exchange(question: str, answer: str) -> list[dict[str, str]]:
    """The turns of a question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
