"""Conversations -> text: how a chat template, or the built-in transcript, writes a prompt and the response after it.

prompt_text | opening                | ...
prompt_text | response_lead response response_trail end
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lightning.data.examples import Message
from rlhf_lightning.errors import ConfigurationError, DataError, ModelError, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRANSCRIPT = "transcript"
"""Name of the built-in plain format, for tokenizers without a chat template."""
TRANSCRIPT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\n\nHuman: ' + message['content'] }}"
    "{% else %}{{ '\n\nAssistant:' + ('' if message['content'][:1].isspace() else ' ') + message['content'] }}"
    "{% if loop.last and not add_generation_prompt %}{{ EOS }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
"""The plain format in Jinja, for the tokenizers of exported models."""
TURN_MARKERS = re.compile(
    r"<[|｜][\w▁]+[|｜]>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>|<</?SYS>>"
    r"|### (?:Human|Assistant|Instruction|Response):"
)
"""Control tokens and role markers of well-known models."""
_BRACKETED = re.compile(r"[<\[{|｜].+[>\]}|｜]")
"""An added token that is a mark, and no word such as `user`."""

_CLOCKS = (datetime.datetime(2001, 2, 3, 4, 5, 6), datetime.datetime(2032, 11, 29, 20, 47, 58))
_OWN_ARGUMENTS = ("messages", "conversation", "chat_template", "tokenize", "add_generation_prompt")
USER_PROBE = "PROBEUSERPROBE"
REPLY_PROBE = "PROBEREPLYPROBE"
_THOUGHT_PROBE = "PROBETHOUGHTPROBE"
PROBE = [{"role": "user", "content": USER_PROBE}]
_EARLIER_PROBE = "PROBEEARLIERPROBE"
_THINK, _END_THINK = "<think>", "</think>"
_OPENS_THOUGHT = re.compile(r"<(?:\w+:)?think(?:ing)?>|\[THINK\]|◁think▷")


class ChatText:
    """How a tokenizer writes a conversation as text: `prompt_text`, then `response_text`, then `end`.

    Uses the tokenizer's chat template, the Jinja file `chat_template`, or, when there is neither or `chat_template` is
    `"transcript"`, the plain format `\\n\\nHuman: ...\\n\\nAssistant: ...`. `chat_template_kwargs` are handed to the
    template, such as `{enable_thinking: false}` (Qwen 3) or `{date_string: 26 Jul 2024}` (Llama 3.1).

    A response is written as the template writes the last turn of a conversation: with the empty thought that it puts
    before one that has none (Qwen 3), without the blanks that it strips. A template that leaves thoughts out of the
    turns it writes (DeepSeek R1) does so with earlier turns alone: the response keeps its own.

    Raises `ModelError` when a template rewrites the prompt once a reply follows it, so that a prompt would be no
    beginning of the whole; when it ends a reply with text that is no token, so that a sampled reply would have nothing
    to stop at; or when it writes today's date, so that a run would differ from day to day. `DataError` when the
    template cannot be rendered; `ConfigurationError` for an argument that no template can read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template_kwargs = _checked_arguments(chat_template_kwargs or {})
        self.template = self._choose_template(chat_template)
        self.prompt_tail = ""
        """The header of a reply, where the template leaves it out of its generation prompt."""
        self.opening = ""
        """What the generation prompt writes of the reply itself: an empty thought, or the beginning of one."""
        self.response_lead, self.response_trail = " ", ""
        """What is written right before and right after a response that has no thought of its own."""
        self.end: str | None = None
        """The token that the template writes after a reply; None where it writes none."""
        self._closing = ""
        self._keeps_thoughts = self._reads_thoughts = True
        if self.template is not None:
            self._refuse_dates(self.template)
            self._measure()

    @property
    def after_end(self) -> str:
        """What the template writes after the token that ends the last reply."""
        return "" if self.end is None else self._closing.removeprefix(self.end)

    @property
    def knows_thoughts(self) -> bool:
        """Whether thoughts in `<think>...</think>` have a place in the template."""
        return self.template is not None and _END_THINK in self.template

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the assistant's turn begins. Raises `DataError` as the template does."""
        return self.generation_text(messages).removesuffix(self.opening)

    def generation_text(self, messages: Sequence[Message]) -> str:
        """The conversation up to where a policy goes on: `prompt_text` and `opening`."""
        if self.template is None:
            return _transcript_text(messages)
        return self._render(messages, add_generation_prompt=True) + self.prompt_tail

    def response_text(self, response: str) -> str:
        """The text between `prompt_text` and the end of the turn. Raises `DataError` as `turn_text` does."""
        return self.turn_text(PROBE, self._probe_text, response)

    def turn_text(self, messages: Sequence[Message], prompt_text: str, response: str) -> str:
        """`response_text` of a response to these messages, of which `prompt_text` is known.

        Raises `DataError` when the template does not take the response, changes its words, rewrites the prompt because
        of it, or puts an empty thought before its own.
        """
        if self.template is None:
            return response if response[:1].isspace() else self.response_lead + response
        whole = self._render([*messages, {"role": "assistant", "content": response}], add_generation_prompt=False)
        if not (whole.startswith(prompt_text) and whole.endswith(self._closing)):
            raise DataError("the chat template writes the prompt, or the end, differently once this response follows")
        text = whole[len(prompt_text) : len(whole) - len(self._closing)]
        if response not in text and _compact(response) not in _compact(text):
            if _END_THINK in response and not self._keeps_thoughts:
                return self._with_own_thought(response)
            raise DataError("the chat template changes the words of the response")
        if text.count(_THINK) > response.count(_THINK) > 0:
            if self._is_opened and response.lstrip().startswith(self.opening.strip()):
                return self._with_own_thought(response)
            raise DataError("the chat template writes an empty thought before a response that has one of its own")
        return text

    def control_token_in(self, texts: Iterable[str]) -> str | None:
        """The first control token written out in one of the texts, or None. It would be encoded as a command."""
        if self._control_tokens is None:
            return None
        found = (self._control_tokens.search(text) for text in texts)
        return next((match.group() for match in found if match), None)

    @functools.cached_property
    def control_ids(self) -> set[int]:
        """Ids of the tokenizer's control tokens, and of other added tokens that the format writes around turns."""
        written = (token for token in self._added_tokens if _BRACKETED.fullmatch(token) and token in self._frame)
        return self._special_ids | {self._added_tokens[token] for token in (*written, self.end) if token}

    @functools.cached_property
    def _special_ids(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder
        return set(self.tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}

    @functools.cached_property
    def _added_tokens(self) -> dict[str, int]:
        """Tokens that are found in a text before anything else, blanks aside (Gemma has runs of line breaks)."""
        added = {token.content: index for index, token in self.tokenizer.added_tokens_decoder.items()}
        special = zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True)
        return {token: index for token, index in {**added, **dict(special)}.items() if token.strip()}

    @functools.cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        return _any_of(self._added_tokens) or re.compile(r"(?!)")

    @functools.cached_property
    def _control_tokens(self) -> re.Pattern[str] | None:
        tokens = [token for token in self.tokenizer.convert_ids_to_tokens(sorted(self.control_ids)) if token]
        return _any_of({*tokens, *TURN_MARKERS.findall(self._frame)})

    @functools.cached_property
    def _frame(self) -> str:
        """All that the template writes around the words of turns. Tags of thoughts are words where it reads them."""
        if self.template is None:
            return ""
        between = (
            text if role else text.removesuffix(self.opening)  # the last ends with what is of the reply
            for (_, role), text in self._between.items()
        )
        frame = "\n".join([*between, self.response_trail, self._closing])
        return frame.replace(_THINK, "").replace(_END_THINK, "") if self._reads_thoughts else frame

    @functools.cached_property
    def _between(self) -> dict[tuple[str, str], str]:
        """What the format writes between the words of two roles, before the first ("") and after the last ("")."""
        found: dict[tuple[str, str], str] = {}
        for roles in (("user",), ("system", "user"), ("user", "assistant", "user")):
            probes = [{"role": role, "content": f"PROBE{number}PROBE"} for number, role in enumerate(roles)]
            try:
                rest = self.generation_text(probes)
            except DataError:  # a template that knows no system message, or one turn alone
                continue
            before = ""
            for probe in probes:
                between, _, rest = rest.partition(probe["content"])
                found.setdefault((before, probe["role"]), between)
                before = probe["role"]
            found.setdefault((before, ""), rest)
        return found

    @functools.cached_property
    def _probe_text(self) -> str:
        return self.prompt_text(PROBE)

    @property
    def _is_opened(self) -> bool:
        """Whether a policy goes on in the midst of a thought."""
        return bool(self.opening) and "/" not in self.opening

    def _with_own_thought(self, response: str) -> str:
        """A response with its thought, in a template that would leave that out, or open it twice."""
        opening, tag = self.opening, self.opening.strip()
        if not self._is_opened:
            response = self.response_lead + response
        elif not response.startswith(opening):
            own = response.lstrip()
            response = opening + (own.removeprefix(tag).lstrip("\n") if own.startswith(tag) else response)
        return response + self.response_trail

    def _measure(self) -> None:
        """Find out what the template writes between prompt and response, and after it."""
        reply = {"role": "assistant", "content": REPLY_PROBE}
        between = ""
        with contextlib.suppress(DataError):  # a template for single turns alone
            earlier = {"role": "assistant", "content": _EARLIER_PROBE}
            text, _, _ = self._prompt_and_whole([*PROBE, earlier, *PROBE], reply)
            between = text.partition(_EARLIER_PROBE)[2].partition(USER_PROBE)[0]
        prompt, whole, begin = self._prompt_and_whole(PROBE, reply)
        self.opening = prompt[begin:]
        lead, _, after = whole[begin:].partition(REPLY_PROBE)
        if lead.strip() and prompt == self._render(PROBE, add_generation_prompt=False):
            self.prompt_tail = lead.partition(_THINK)[0].rstrip(" ")
            lead = lead[len(self.prompt_tail) :]
        self.response_lead = lead.removeprefix(self.opening)
        self._closing = after
        ends = list(self._added_pattern.finditer(after))
        if ends:
            # The last that an earlier reply has too; more of them end the conversation (Phi 3), not the turn.
            end = next((end for end in reversed(ends) if between.startswith(after[: end.end()])), ends[0])
            self.end, self.response_trail, self._closing = end.group(), after[: end.start()], after[end.start() :]
        elif after.strip():
            raise no_end(after.strip())
        thought = f"{_THINK}\n{_THOUGHT_PROBE}\n{_END_THINK}\n\n{REPLY_PROBE}"
        with contextlib.suppress(DataError):
            text = self._render([*PROBE, {"role": "assistant", "content": thought}], add_generation_prompt=False)
            self._keeps_thoughts = _THOUGHT_PROBE in text
            self._reads_thoughts = text.count(_THINK) <= 1

    def _prompt_and_whole(self, prompt: Sequence[Message], reply: Message) -> tuple[str, str, int]:
        """A prompt alone and with its reply, and where in the first the assistant's turn begins."""
        alone = self._render(prompt, add_generation_prompt=True)
        whole = self._render([*prompt, reply], add_generation_prompt=False)
        words_end = alone.rfind(USER_PROBE) + len(USER_PROBE)
        begin = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
        thought = _OPENS_THOUGHT.search(alone, words_end)
        if thought:
            begin = min(begin, thought.start())
        fits = begin == len(alone) or (thought and begin == thought.start())
        if reply["content"] not in whole or begin < words_end or not fits:
            raise ModelError(
                "the chat template writes the prompt differently once a response follows it, so that has no fixed "
                f"place; give another one with chat_template: FILE.jinja, or chat_template: {TRANSCRIPT}"
            )
        return alone, whole, begin

    def _refuse_dates(self, template: str) -> None:
        """Raise `ModelError` where a prompt is another one under another clock."""
        clocks = (_with_clock(template, clock) for clock in _CLOCKS)
        first, second = (self._render(PROBE, add_generation_prompt=True, template=one) for one in clocks)
        if first != second:
            advice = "give a copy with a fixed date: chat_template: FILE.jinja"
            if "date_string" in template:
                advice = 'fix it with chat_template_kwargs: {date_string: "26 Jul 2024"}'
            raise ModelError(f"the chat template writes the current date, so a run differs from day to day; {advice}")

    def _choose_template(self, chat_template: str | None) -> str | None:
        if chat_template == TRANSCRIPT:
            return None
        if chat_template is None:
            own = self.tokenizer.chat_template
            if isinstance(own, dict) and "default" not in own:
                raise ModelError(
                    f"{self.tokenizer.name_or_path}: the tokenizer has the chat templates {', '.join(own)} and none of "
                    "them is the default; name one with chat_template: FILE.jinja"
                )
            return own["default"] if isinstance(own, dict) else own
        path = Path(chat_template).expanduser()
        if not path.is_file():
            raise DataError(f"chat_template: {chat_template} is neither a Jinja file nor {TRANSCRIPT!r}")
        return path.read_text(encoding="utf-8")

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool, template: str | None = None) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=template or self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.chat_template_kwargs,
            )
        except Exception as error:  # Jinja's own errors, and whatever a template raises on purpose
            roles = ", ".join(message["role"] for message in messages)
            reason = reason_of(error, whole=True)
            raise DataError(f"the chat template refuses a conversation of the turns {roles}: {reason}") from error


def no_end(text: str) -> ModelError:
    """The error for a template that ends a reply with a text that the tokenizer does not read as one token."""
    return ModelError(
        f"the chat template ends a response with {text!r}, which is no token of the tokenizer, so a sampled response "
        "would have nothing to stop at; use a tokenizer that has it as a special token, or give a template that ends a "
        f"response with eos_token: chat_template: FILE.jinja, or {TRANSCRIPT}"
    )


def _compact(text: str) -> str:
    return "".join(text.split())


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds each of some texts, the longest where several begin at one place."""
    ordered = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _checked_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a template, which must be plain values: transformers hands it `<date>` in place of a date."""
    for name, value in arguments.items():
        if name in _OWN_ARGUMENTS:
            raise ConfigurationError(f"chat_template_kwargs: {name} is what this program itself hands to the template")
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"chat_template_kwargs: {name} is a {type(value).__name__}, which no template can read; give text, "
                "numbers, true, false, or lists and mappings of them"
            ) from error
    return dict(arguments)


def _with_clock(template: str, clock: datetime.datetime) -> str:
    """A template that is told another time by `strftime_now`, which transformers gives templates to read the date.

    A macro takes that function's place: a function among the template's arguments would become text.
    """
    time = "format | replace('%-', '%')"
    for letter in "aAbBcdfHIjmMpSUwWxXyYzZ":
        time += f" | replace('%{letter}', {clock.strftime(f'%{letter}')!r})"
    return f"{{% macro strftime_now(format) %}}{{{{ {time} }}}}{{% endmacro %}}\n{template}"


def _transcript_text(messages: Sequence[Message]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    text = ""
    for message in messages:
        role, content = message["role"], message["content"]
        blank = "" if role == "assistant" and content[:1].isspace() else " "  # as in response_text
        text += content if role == "system" else f"\n\n{names[role]}:{blank}{content}"
    return text + "\n\nAssistant:"
