"""Conversations -> token ids: prompt ids, response ids and one terminator id; never a second look at joined text."""

from __future__ import annotations

import bisect
import contextlib
import copy
import datetime
import functools
import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lightning.data.examples import Message
from rlhf_lightning.errors import ConfigurationError, DataError, ModelError
from rlhf_lightning.hub import use_cache_without_network

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TRANSCRIPT = "transcript"
"""Name of the built-in plain format, for tokenizers without a chat template."""
_TRANSCRIPT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\n\nHuman: ' + message['content'] }}"
    "{% else %}{{ '\n\nAssistant:' + ('' if message['content'][:1].isspace() else ' ') + message['content'] }}"
    "{% if loop.last and not add_generation_prompt %}{{ TERMINATOR }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
"""The plain format in Jinja, for the tokenizers of exported models."""
_CLOCKS = (datetime.datetime(2001, 2, 3, 4, 5, 6), datetime.datetime(2032, 11, 29, 20, 47, 58))

_USER_PROBE = "PROBEUSERPROBE"
_REPLY_PROBE = "PROBEREPLYPROBE"
_OWN_ARGUMENTS = ("messages", "conversation", "chat_template", "tokenize", "add_generation_prompt")
_PROBE = [{"role": "user", "content": _USER_PROBE}]


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer by hub name or directory. Raises `ModelError` when there is none."""
    from transformers import AutoTokenizer

    from rlhf_lightning.tiny import resolve_model

    path = resolve_model(name_or_path)
    if not Path(path).exists():
        use_cache_without_network()
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for the same mistake
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{name_or_path}: no tokenizer could be loaded from it ({reason[:200]}); give the hub name of one, or a "
            "directory with tokenizer.json and tokenizer_config.json"
        ) from error


def load_chat_format(
    tokenizer: str | None,
    *,
    chat_template: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> ChatFormat:
    """The format of the tokenizer that a data module was given by hub name or directory.

    Raises `ConfigurationError` when none was given, and what `load_tokenizer` and `ChatFormat` raise.
    """
    if tokenizer is None:
        raise ConfigurationError("data.tokenizer: give the hub name or directory of a tokenizer")
    loaded = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    return ChatFormat(loaded, chat_template=chat_template, template_arguments=template_arguments)


class ChatFormat:
    """How a tokenizer writes a conversation, as ids: `prompt`, then a response, then one `terminator`.

    Uses the tokenizer's chat template, the Jinja file `chat_template`, or, when there is neither or `chat_template` is
    `"transcript"`, the plain format `\\n\\nHuman: ...\\n\\nAssistant: ...`. The terminator is what the template puts
    right after an assistant's reply (Qwen: `<|im_end|>`, Llama 3: `<|eot_id|>`), so that the last token of a training
    row is the one at which a sampled answer ends; without a template it is the tokenizer's EOS, or SEP for an encoder.
    A response is stripped where the template strips replies. `template_arguments` are handed to the template, such as
    `{enable_thinking: false}` (Qwen 3) or `{date_string: 26 Jul 2024}` (Llama 3.1).

    Raises `ModelError` when the tokenizer has no terminator, when a template rewrites the prompt once a reply follows
    it, so that prompt ids would be no prefix of the whole, or when it writes today's date, so that a run would differ
    from day to day; `DataError` when the template cannot be rendered; `ConfigurationError` for an argument that no
    template can read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template_arguments = _checked_arguments(template_arguments or {})
        self.template = self._choose_template(chat_template)
        self.start_ids = self._start_ids()
        self.prompt_tail = ""
        self.response_lead = " "
        self.strips_responses = False
        self.terminator_id = self._measure_reply()
        self.head_ids, self.tail_length = self._prompt_frame()
        self._control_tokens = self._control_token_pattern()

    @property
    def pad_id(self) -> int:
        """Id to fill padding with. Nothing reads it: masks come from lengths."""
        return self.terminator_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the assistant's reply begins."""
        if self.template is None:
            return _transcript_text(messages)
        return self._render(messages, add_generation_prompt=True) + self.prompt_tail

    def response_text(self, response: str) -> str:
        """The response with the blank, if any, that the format puts before it."""
        text = response.strip() if self.strips_responses else response
        return text if text[:1].isspace() else self.response_lead + text

    def control_token_in(self, texts: Iterable[str]) -> str | None:
        """The first control token written out in one of the texts, or None. It would be encoded as a command."""
        if self._control_tokens is None:
            return None
        found = (self._control_tokens.search(text) for text in texts)
        return next((match.group() for match in found if match), None)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without any token that is not in the text."""
        core = self._core()
        if core is None:
            return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return [encoding.ids for encoding in core.encode_batch_fast(list(texts), add_special_tokens=False)]

    @functools.cached_property
    def unseen(self) -> list[str]:
        """Differences between texts that vanish in the token ids: of `line breaks` and blanks, of `capitals`."""
        probes = {"line breaks": ("a\nb", "a b"), "capitals": ("A", "a")}
        encoded = {name: self.encode(both) for name, both in probes.items()}
        return [name for name, (first, second) in encoded.items() if first == second]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each `prompt_text`, with exactly one start token where the tokenizer has one."""
        return [self._started(ids) for ids in self.encode(texts)]

    def encode_turns(self, prompts: Sequence[tuple[Sequence[Message], str]]) -> list[tuple[list[int], list[int]]]:
        """Ids of each prompt (its messages and its `prompt_text`), and where in them each user's words begin.

        A cut from the left keeps what stands before the first place: start token, system message, header. It goes on at
        a later place, or within the last turn, so that no words come under the header of another role. Where a template
        writes the turns so that they cannot be told apart, there is one place, after the template's head.
        """
        core = self._core()
        if core is None:
            return [(ids, [self._shared_head(ids)]) for ids in self.encode_prompts([text for _, text in prompts])]
        encodings = core.encode_batch([text for _, text in prompts], add_special_tokens=False)
        found = []
        for (messages, text), encoding in zip(prompts, encodings, strict=True):
            ids = self._started(encoding.ids)
            places = self._text_places(messages, text) if len(messages) > 1 else None
            tokens = None if places is None else _tokens_at(places, [begin for begin, _ in encoding.offsets])
            added = len(ids) - len(encoding.ids)
            found.append((ids, [self._shared_head(ids)] if tokens is None else [token + added for token in tokens]))
        return found

    def _core(self) -> Tokenizer | None:
        """The fast tokenizer, set to leave nothing out and to add nothing; it may bring such settings of its own."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        if core is not None:
            core.no_truncation()
            core.no_padding()
        return core

    def _shared_head(self, ids: Sequence[int]) -> int:
        """Number of ids at a prompt's beginning that belong to the template, up to the words of the first message."""
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.head_ids, ids, strict=False))
        return sum(1 for _ in shared)

    def _text_places(self, prompt: Sequence[Message], text: str) -> list[tuple[int, int]] | None:
        """Where in a prompt's text the words of each user's turn begin, with and without the blank before them."""
        place, before, places = 0, "", []
        for message in prompt:
            between = self._between.get((before, message["role"]))
            if between is None or not text.startswith(between, place):
                return None
            place += len(between)
            if message["role"] == "user":
                places.append((place - len(between) + len(between.rstrip(" ")), place))
            words = message["content"]
            words = words if text.startswith(words, place) else words.strip()
            if not text.startswith(words, place):
                return None
            place, before = place + len(words), message["role"]
        return places if text[place:] == self._between.get((before, "")) else None

    @functools.cached_property
    def _between(self) -> dict[tuple[str, str], str]:
        """What the format writes between the words of two roles, before the first ("") and after the last ("")."""
        found: dict[tuple[str, str], str] = {}
        for roles in (("user",), ("system", "user"), ("user", "assistant", "user")):
            probes = [{"role": role, "content": f"PROBE{number}PROBE"} for number, role in enumerate(roles)]
            try:
                rest = self.prompt_text(probes)
            except DataError:  # a template that knows no system message, or one turn alone
                continue
            before = ""
            for probe in probes:
                between, _, rest = rest.partition(probe["content"])
                found.setdefault((before, probe["role"]), between)
                before = probe["role"]
            found.setdefault((before, ""), rest)
        return found

    def _started(self, ids: list[int]) -> list[int]:
        start = self.start_ids
        return ids if ids[: len(start)] == start else [*start, *ids]

    def fingerprint(self) -> str:
        """A hash of all that decides which ids a conversation becomes."""
        core = self._core()
        digest = hashlib.sha256()
        if core is not None:
            digest.update(core.to_str().encode())
        else:
            with tempfile.TemporaryDirectory() as directory:
                self.tokenizer.save_pretrained(directory)
                for file in sorted(Path(directory).iterdir()):
                    digest.update(file.read_bytes())
        rules = (self.template, sorted(self.template_arguments.items()), self.start_ids, self.terminator_id)
        spelling = (self.prompt_tail, self.response_lead, self.strips_responses, self.head_ids, self.tail_length)
        digest.update(repr((*rules, *spelling, self.tokenizer.special_tokens_map)).encode())
        return digest.hexdigest()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the tokenizer with the template that was used, so that the model is asked as it was trained.

        `apply_chat_template` of what is written gives the ids of a prompt as they were trained on. Those of a whole
        conversation end with what the template writes after a reply, around the terminator.
        """
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.chat_template = self._exported_template()
        tokenizer.save_pretrained(directory)

    def _exported_template(self) -> str:
        """The template, with what training added to its text written into it: arguments, start tokens, prompt tail."""
        end, *start = self.tokenizer.convert_ids_to_tokens([self.terminator_id, *self.start_ids])
        template = self.template or _TRANSCRIPT_TEMPLATE.replace("TERMINATOR", repr(end))
        # Each line ends with a block, after which Jinja, as transformers sets it up, leaves out the line end.
        for name, value in self.template_arguments.items():
            if name.isidentifier() and name in template:
                template = f"{{% set {name} = {name} if {name} is defined else {value!r} %}}\n{template}"
        if self.encode([self.prompt_text(_PROBE)])[0][: len(start)] != self.start_ids:
            template = f"{{% if true %}}{{{{ {''.join(start)!r} }}}}{{% endif %}}\n{template}"
        if self.prompt_tail:
            tail = f"{{{{ {self.prompt_tail!r} if add_generation_prompt else '' }}}}"
            template = template.removesuffix("\n") + tail  # Jinja leaves the last line end out as well
        return template

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
                **self.template_arguments,
            )
        except Exception as error:  # Jinja's own errors, and whatever a template raises on purpose
            roles = ", ".join(message["role"] for message in messages)
            reason = " ".join(str(error).split())
            raise DataError(f"the chat template refuses a conversation of the turns {roles}: {reason}") from error

    def _start_ids(self) -> list[int]:
        """What the tokenizer itself puts before a text: [BOS], [CLS] or nothing."""
        plain = self.encode(["x"])[0]
        whole = self.tokenizer("x")["input_ids"]
        return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []

    def _measure_reply(self) -> int:
        """Find out what stands between prompt and response; return the id after the response."""
        tokenizer = self.tokenizer
        fallback = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if self.template is None:
            return self._checked_terminator(fallback)
        reply = {"role": "assistant", "content": _REPLY_PROBE}
        self._refuse_dates(_PROBE)
        with contextlib.suppress(DataError):  # a template for single turns alone
            self._refuse_rewriting([*_PROBE, {"role": "assistant", "content": "An earlier reply."}, *_PROBE], reply)
        prompt, whole = self._refuse_rewriting(_PROBE, reply)
        padded = {"role": "assistant", "content": f"\n\t{_REPLY_PROBE}\t\n"}
        self.strips_responses = padded["content"] not in self._render([*_PROBE, padded], add_generation_prompt=False)
        lead, _, after = whole[len(prompt) :].partition(_REPLY_PROBE)
        if lead.strip():  # a header of the reply that the template leaves out of its generation prompt
            self.prompt_tail, self.response_lead = lead, ""
        else:
            self.response_lead = lead
        return self._checked_terminator(next((i for i in self.encode([after])[0] if i in self.control_ids), fallback))

    def _refuse_dates(self, messages: Sequence[Message]) -> None:
        """Render under two clocks."""
        first, second = (
            self._render(messages, add_generation_prompt=True, template=_with_clock(self.template, clock))
            for clock in _CLOCKS
        )
        if first != second:
            advice = "give a copy with a fixed date: chat_template: FILE.jinja"
            if "date_string" in self.template:
                advice = 'fix it with template_arguments: {date_string: "26 Jul 2024"}'
            raise ModelError(f"the chat template writes the current date, so a run differs from day to day; {advice}")

    def _refuse_rewriting(self, prompt: Sequence[Message], reply: Message) -> tuple[str, str]:
        """A prompt alone and with its reply, as texts of which the first begins the second."""
        alone = self._render(prompt, add_generation_prompt=True)
        whole = self._render([*prompt, reply], add_generation_prompt=False)
        if not whole.startswith(alone) or reply["content"] not in whole:
            raise ModelError(
                "the chat template writes the prompt differently once a reply follows it, so a response has no fixed "
                f"place; give another one with chat_template: FILE.jinja, or chat_template: {TRANSCRIPT}"
            )
        return alone, whole

    def _checked_terminator(self, terminator: int | None) -> int:
        if terminator is None:
            raise ModelError(
                f"{self.tokenizer.name_or_path}: the tokenizer has neither an EOS nor a SEP token, so the end of a "
                "response cannot be marked; set eos_token in its tokenizer_config.json"
            )
        return terminator

    def _prompt_frame(self) -> tuple[list[int], int]:
        """The ids before the first message of a prompt, and the number of those after the last.

        A cut from the left must not lose them.
        """
        before, _, after = self.prompt_text(_PROBE).partition(_USER_PROBE)
        return self.encode_prompts([before])[0], len(self.encode([after])[0])

    @functools.cached_property
    def control_ids(self) -> set[int]:
        """Ids of the tokenizer's control tokens."""
        added = self.tokenizer.added_tokens_decoder
        return set(self.tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}

    def _control_token_pattern(self) -> re.Pattern[str] | None:
        tokens = [token for token in self.tokenizer.convert_ids_to_tokens(sorted(self.control_ids)) if token]
        return re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True))) if tokens else None


def _tokens_at(places: Sequence[tuple[int, int]], begins: Sequence[int]) -> list[int] | None:
    """The tokens that begin at places in a text (with the blank before a word, or without), or None if one has none."""
    tokens = [bisect.bisect_left(begins, blank) for blank, _ in places]
    whole = all(token < len(begins) and begins[token] <= word for token, (_, word) in zip(tokens, places, strict=True))
    return tokens if whole else None


def _checked_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a template, which must be plain values: transformers hands it `<date>` in place of a date."""
    for name, value in arguments.items():
        if name in _OWN_ARGUMENTS:
            raise ConfigurationError(f"template_arguments: {name} is what this program itself hands to the template")
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"template_arguments: {name} is a {type(value).__name__}, which no template can read; give text, "
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
