"""Conversations -> token ids: those of the whole rendered text, split where the prompt ends; and back to text."""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_lightning.data.assistant_turns import text_spans, token_spans
from rlhf_lightning.data.chat_text import PROBE, REPLY_PROBE, USER_PROBE, ChatText, no_end
from rlhf_lightning.data.examples import Message
from rlhf_lightning.data.tokenizer import TokenizerSource, load_tokenizer
from rlhf_lightning.errors import ConfigurationError, DataError, ModelError
from rlhf_lightning.files.leftovers import held_directory, temporary_directory

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_RULES = 2
"""Number of the rules by which texts become ids and ids texts, for fingerprints; other rules get another number."""
_CONTEXT = 16
"""Ids of a prompt before a reply that decide how its first ones are read."""
_TEXTS_AT_ONCE = 128
"""Handed to the tokenizer at once: of thousands it takes up to twice the CPU time for each (tokenizers 0.23)."""
_NEIGHBOURS = ("\n", "a", ".", "1", "-")
"""Texts before a response whose own tokens end where they end, so that what follows is in the midst of a text."""


def load_chat_format(
    tokenizer: TokenizerSource | None,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> ChatFormat:
    """The format of the tokenizer that a data module was given, by hub name or directory or as an object.

    Says in a line where responses follow a prompt otherwise than in the whole text. Raises `ConfigurationError` when
    none was given, and what `load_tokenizer` and `ChatFormat` raise.
    """
    if tokenizer is None:
        raise ConfigurationError("data.tokenizer: give the hub name or directory of a tokenizer")
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    elif not hasattr(tokenizer, "apply_chat_template"):
        raise ConfigurationError(
            f"data.tokenizer: a {type(tokenizer).__name__} is no tokenizer of transformers; give its hub name or "
            "directory, or wrap it in PreTrainedTokenizerFast(tokenizer_object=...)"
        )
    chat_format = ChatFormat(tokenizer, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs)
    prompt = chat_format.generation_text(PROBE)
    if not _begins(*chat_format.encode_prompts([prompt + REPLY_PROBE, prompt])):
        log.warning(
            "the generation prompt of the chat template ends with %r, which the tokenizer joins to the next word: "
            "prompt and response have their ids apart, as a policy is asked, and not those of the whole text",
            prompt[-1],
        )
    if chat_format.opening and not chat_format.response_text(REPLY_PROBE).startswith(chat_format.opening):
        log.warning(
            "the generation prompt of the chat template begins a thought, %r: a response without one is learned as the "
            "template writes it, without that beginning, while a policy is asked with it",
            chat_format.opening,
        )
    return chat_format


class EncodedPrompt(NamedTuple):
    """A prompt as a policy continues it."""

    messages: Sequence[Message]
    text: str
    """Its `generation_text`."""
    ids: list[int]
    turns: list[int]
    """Where in the ids each user's words begin (see `ChatFormat.encode_turns`)."""
    encoding: Encoding | None = None
    """Where in the text its ids stand, of several messages by a fast tokenizer."""


class EncodedResponses(NamedTuple):
    """The ids of a prompt, and of each response to it."""

    prompt: list[int]
    responses: list[list[int]]
    """Each with its EOS."""


class _Border(NamedTuple):
    """How every prompt ends: what a format writes after the last user's words, from its last added token on."""

    text: str
    ids: list[int]

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether some prompt's ids end so; where the words before may have changed the first of them, the rest."""
        own = self.ids[len(self.ids) // 2 :]
        return bool(own) and list(ids[-len(own) :]) == own


class _Waiting(NamedTuple):
    """A response that is to be encoded."""

    row: EncodedResponses
    """Where its ids belong."""
    text: str
    """Of its prompt."""
    border: _Border
    turn: str
    """What follows, the end of the turn included."""
    whole: bool
    """Whether it has ended."""


class ChatFormat(ChatText):
    """How a tokenizer writes a conversation, as ids: a prompt, then a response, then one EOS token.

    The ids of a row are those of its whole text (see `ChatText`), up to that EOS, with exactly one start token
    where the tokenizer has one. They are split where the generation prompt ends, so that those of the prompt are the
    same for each response, and are those that a policy is asked with. There are two exceptions. Where a token would
    reach over the end of the prompt, as `\\n\\n` does when a response begins with a line break, the prompt keeps its
    own ids, and the response has those that its text has in the midst of another: a policy that is asked with the
    prompt could sample no others. And where the generation prompt writes a thought, opened or empty, with which one of
    the responses to a prompt does not begin, the prompt ends before it.

    The EOS token (`eos_id`) is the one that the template puts after an assistant's response (Qwen:
    `<|im_end|>`, Llama 3: `<|eot_id|>`), so that the last token of a training row is the one at which a sampled
    response ends. Where the template writes none, and without a template, it is the tokenizer's EOS, or SEP for an
    encoder. Raises `ModelError` when there is none, and what `ChatText` raises.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs)
        self.eos_id = self._choose_eos()
        self.start_ids = self._find_start_ids()
        before, _, after = self.generation_text(PROBE).partition(USER_PROBE)
        self.head_ids = self.encode_prompts([before])[0]
        """The ids before the first message of a prompt. A cut from the left must not lose them."""
        self.tail_length = len(self.token_ids([after])[0])
        """The number of ids after the last message of a prompt, which no cut must lose either."""
        self._prompt_border = self._border(self.prompt_text)
        self._generation_border = self._border(self.generation_text) if self.opening else self._prompt_border

    @property
    def pad_id(self) -> int:
        """Id to fill padding with. Nothing reads it: masks come from lengths."""
        return self.eos_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text from its beginning, with exactly one start token where the tokenizer has one."""
        return [self._started(ids) for ids in self.token_ids(texts)]

    def encode_turns(self, prompts: Sequence[tuple[Sequence[Message], str]]) -> list[EncodedPrompt]:
        """Ids of each prompt (its messages and its `generation_text`), and where in them each user's words begin.

        A cut from the left keeps what stands before the first place: start token, system message, header. It goes on at
        a later place, or within the last turn, so that no words come under the header of another role. Where a template
        writes the turns so that they cannot be told apart, there is one place, after the template's head.
        """
        core, found = self._core(), []
        several = [text for messages, text in prompts if core is not None and len(messages) > 1]
        encodings = iter(core.encode_batch(several, add_special_tokens=False) if core is not None and several else ())
        others = iter(self.token_ids([text for messages, text in prompts if core is None or len(messages) == 1]))
        for messages, text in prompts:
            encoding = next(encodings) if core is not None and len(messages) > 1 else None
            ids = self._started(next(others) if encoding is None else encoding.ids)
            found.append(EncodedPrompt(messages, text, ids, self._turns(messages, text, ids, encoding), encoding))
        return found

    def assistant_turns(self, prompt: EncodedPrompt) -> list[tuple[int, int]]:
        """First and one past the last id of each assistant turn within a prompt, EOS included (see `text_spans`).

        Raises `DataError` where they cannot be told.
        """
        if all(message["role"] != "assistant" for message in prompt.messages):
            return []
        if prompt.encoding is None:
            raise DataError(
                "the tokenizer does not say where in a text its tokens are, so earlier assistant turns cannot be "
                "learned; use a fast tokenizer, or rows of one prompt and one response"
            )
        added = len(prompt.ids) - len(prompt.encoding.ids)
        spans = token_spans(text_spans(self, prompt.messages, prompt.text), prompt.encoding, eos_id=self.eos_id)
        return [(start + added, stop + added) for start, stop in spans]

    def encode_responses(
        self,
        prompts: Sequence[EncodedPrompt],
        responses: Sequence[Sequence[str]],
        *,
        ended: Sequence[bool] | None = None,
        refuse: bool = True,
    ) -> list[EncodedResponses | DataError]:
        """Ids of the responses to each prompt, or why the template does not take them (see `turn_text`).

        Those to a prompt have no EOS where they have not `ended` (all have when not given). Without `refuse` a
        response that the template would change is written as it stands: what a policy wrote has to be scored.
        """
        found: list[EncodedResponses | DataError] = []
        waiting: list[_Waiting] = []
        for prompt, its, whole in zip(prompts, responses, ended or itertools.repeat(True), strict=False):
            text = prompt.text.removesuffix(self.opening)
            opening = prompt.text[len(text) :]
            try:
                turns = [self._turn(prompt.messages, text, response, refuse=refuse) for response in its]
            except DataError as error:
                found.append(error)
                continue
            if not whole:
                turns = [turn.removesuffix(self.response_trail) for turn in turns]
            ids, border = prompt.ids, self._generation_border
            if all(turn.startswith(opening) for turn in turns):
                turns, text = [turn[len(opening) :] for turn in turns], prompt.text
            else:
                (ids,), border = self.encode_prompts([text]), self._prompt_border
            row = EncodedResponses(ids, [])
            found.append(row)
            waiting += [_Waiting(row, text, border, turn + (self.end or "" if whole else ""), whole) for turn in turns]
        # From the last added token of a prompt on, ids do not depend on what is before it.
        encoded = self.token_ids([one.border.text + one.turn for one in waiting])
        for (row, text, border, turn, whole), ids in zip(waiting, encoded, strict=True):
            known = text.endswith(border.text) and border.ends(row.prompt) and _begins(ids, border.ids)
            response = ids[len(border.ids) :] if known else self._after_prompt(text, row.prompt, turn)
            row.responses.append([*response, self.eos_id] if whole and not self.end else response)
        return found

    def _turn(self, messages: Sequence[Message], text: str, response: str, *, refuse: bool) -> str:
        try:
            return self.turn_text(messages, text, response)
        except DataError:
            if refuse:
                raise
            return response + self.response_trail

    def says_nothing(self, response: str, ids: Sequence[int]) -> bool:
        """Whether the tokenizer knows no part of a response, which has these ids."""
        return len(ids) <= self._frame_length and not self.token_ids([response])[0]

    @functools.cached_property
    def _frame_length(self) -> int:
        """Ids at most of a response without words."""
        frame = self.opening + self.response_lead + self.response_trail
        return len(self.token_ids([frame])[0]) + 2

    def _after_prompt(self, text: str, prompt: Sequence[int], turn: str) -> list[int]:
        """Ids of a turn after the text of a prompt, which has these ids."""
        (whole,) = self.encode_prompts([text + turn])
        return whole[len(prompt) :] if _begins(whole, prompt) else self._in_the_midst(turn)

    def _in_the_midst(self, text: str) -> list[int]:
        """Ids of a text that follows another, none of whose tokens begin in that.

        A tokenizer of the SentencePiece kind puts a blank before a text that stands alone.
        """
        for neighbour in _NEIGHBOURS:
            own, both = self.token_ids([neighbour, neighbour + text])
            if _begins(both, own):
                return both[len(own) :]
        return self.token_ids([text])[0]

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text that stands alone, without any token that is not in the text."""
        core = self._core()
        if core is None:
            return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        few = (texts[start : start + _TEXTS_AT_ONCE] for start in range(0, len(texts), _TEXTS_AT_ONCE))
        return [one.ids for part in few for one in core.encode_batch_fast(list(part), add_special_tokens=False)]

    def _core(self) -> Tokenizer | None:
        """The fast tokenizer, set to leave nothing out and to add nothing; it may bring such settings of its own."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        if core is not None:
            core.no_truncation()
            core.no_padding()
        return core

    def _started(self, ids: list[int]) -> list[int]:
        start = self.start_ids
        return ids if ids[: len(start)] == start else [*start, *ids]

    def _border(self, text_of: Callable[[Sequence[Message]], str]) -> _Border:
        text = text_of(PROBE).rpartition(USER_PROBE)[2]
        last = max((match.start() for match in self._added_pattern.finditer(text)), default=0)
        return _Border(text[last:], self.token_ids([text[last:]])[0])

    def _turns(
        self, messages: Sequence[Message], text: str, ids: Sequence[int], encoding: Encoding | None
    ) -> list[int]:
        """Where in the ids of a prompt each user's words begin; without that, where its first message does."""
        if encoding is not None and (places := self._word_places(messages, text)) is not None:
            begins = [begin for begin, _ in encoding.offsets]
            added = len(ids) - len(begins)
            if (tokens := _tokens_at(places, begins)) is not None:
                return [token + added for token in tokens]
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.head_ids, ids, strict=False))
        return [sum(1 for _ in shared)]

    def _word_places(self, prompt: Sequence[Message], text: str) -> list[tuple[int, int]] | None:
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
    def unseen(self) -> list[str]:
        """Differences between texts that vanish in the token ids: of `line breaks` and blanks, of `capitals`."""
        probes = {"line breaks": ("a\nb", "a b"), "capitals": ("A", "a")}
        encoded = {name: self.token_ids(both) for name, both in probes.items()}
        return [name for name, (first, second) in encoded.items() if first == second]

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text of ids that follow others, with its leading blanks and with control tokens."""
        before = [int(index) for index in before[-_CONTEXT:]]
        ids = [int(index) for index in ids]
        context = self._decoded(before)
        text = self._decoded([*before, *ids])
        if not text.startswith(context):
            return self._decoded(ids)
        text = text[len(context) :]
        if self._blank_behind_tokens:
            tokens = self._splitting_tokens
            start = ["^"] if before[-1:] and before[-1] in tokens.values() else []
            places = "|".join([*start, *map(re.escape, tokens)])
            text = re.sub(f"({places}){self._blank_behind_tokens}", r"\1", text)
        return text

    def _decoded(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    @functools.cached_property
    def _splitting_tokens(self) -> dict[str, int]:
        """Added tokens, but for the unknown one: it is the id of some text, not a token within it."""
        return {token: index for token, index in self._added_tokens.items() if index != self.tokenizer.unk_token_id}

    @functools.cached_property
    def _blank_behind_tokens(self) -> str:
        """Pattern of what some tokenizers put behind every added token, and so before each text that follows one."""
        token = next(iter(self._splitting_tokens), "")
        texts = [f"{token}x", f"{token} x"]
        first, second = (self._decoded(ids) for ids in self.token_ids(texts))
        if not token or first != f"{token} x":
            return ""
        return " " if second == f"{token}  x" else " (?! )"  # before a text that begins with one too, or not there

    def reply_text(self, prompt: Sequence[int], reply: Sequence[int]) -> str:
        """The response that a policy's reply to a prompt is, both in ids.

        Where there is one whose `response_text` is that of the reply, it is that: its ids are the reply's, up to the
        ways to write one text in tokens. Else it is the reply's text, without control tokens and without what the
        format puts around a response.
        """
        reply = [int(index) for index in reply]
        ended = reply[-1:] == [self.eos_id]
        reply = reply[:-1] if ended else reply
        trail = self.response_trail if ended else ""
        opened = self.opening if self._is_opened else ""
        written = self.decode_after(prompt, reply)
        whole = self.opening + written + ("" if ended else self.response_trail)
        bare = written.removeprefix(self.response_lead)
        for text in (bare, opened + written) if bare != written else (opened + written,):
            text = text.removesuffix(trail)
            if self.control_token_in([text]) is None and self._is_written(text, whole):
                return text
        known = self.decode_after(prompt, [index for index in reply if index not in self.control_ids])
        known = known.removesuffix(trail)
        return opened + known if opened else known.removeprefix(self.response_lead)

    def _is_written(self, response: str, text: str) -> bool:
        try:
            return self.response_text(response) == text
        except DataError:
            return False

    def fingerprint(self) -> str:
        """A hash of all that decides which ids a conversation becomes."""
        core = self._core()
        digest = hashlib.sha256()
        if core is not None:
            digest.update(core.to_str().encode())
        else:
            with held_directory(temporary_directory() / "tokenizer") as directory:
                self.tokenizer.save_pretrained(directory)
                for file in sorted(directory.iterdir()):
                    digest.update(file.read_bytes())
        rules = (_RULES, self.template, sorted(self.chat_template_kwargs.items()), self.start_ids, self.eos_id)
        spelling = (self.prompt_tail, self.opening, self.response_lead, self.response_trail, self.end)
        frame = (self.head_ids, self.tail_length, sorted(self.control_ids))
        digest.update(repr((*rules, *spelling, *frame, self.tokenizer.special_tokens_map)).encode())
        return digest.hexdigest()

    def _find_start_ids(self) -> list[int]:
        """What the tokenizer itself puts before a text: [BOS], [CLS] or nothing."""
        plain = self.token_ids(["x"])[0]
        whole = self.tokenizer("x")["input_ids"]
        return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []

    def _choose_eos(self) -> int:
        tokenizer = self.tokenizer
        if self.end is not None:
            eos = self._added_tokens[self.end]
            if self.token_ids([self._probe_text + self.response_text(REPLY_PROBE) + self.end])[0][-1] != eos:
                raise no_end(self.end)  # a token that is looked for in normalized text alone, with a blank before it
            return eos
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if eos is None:
            raise ModelError(
                f"{tokenizer.name_or_path}: the tokenizer has neither an EOS nor a SEP token, so the end of a "
                "response cannot be marked; set eos_token in its tokenizer_config.json"
            )
        return eos


def _begins(ids: Sequence[int], beginning: Sequence[int]) -> bool:
    return list(ids[: len(beginning)]) == list(beginning)


def _tokens_at(places: Sequence[tuple[int, int]], begins: Sequence[int]) -> list[int] | None:
    """The tokens that begin at places in a text (with the blank before a word, or without), or None if one has none."""
    tokens = [bisect.bisect_left(begins, blank) for blank, _ in places]
    whole = all(token < len(begins) and begins[token] <= word for token, (_, word) in zip(tokens, places, strict=True))
    return tokens if whole else None
