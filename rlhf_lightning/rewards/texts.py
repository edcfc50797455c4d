"""A conversation with its response, as the text that a reward model reads.

The default is the chat format that our reward models are trained in. A classifier of somebody else's may have been
trained on another text, which no file of it tells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rlhf_lightning.data.chat_text import TRANSCRIPT
from rlhf_lightning.data.examples import Message
from rlhf_lightning.errors import ConfigurationError, DataError, ModelError, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = "plain"
"""The words of all turns, a line each; the tokenizer puts around them what it puts around any text."""
PAIR = "pair"
"""The words of the prompt and the response as the tokenizer's two texts: `[CLS] prompt [SEP] response [SEP]`."""

_PROBE = "PROBERESPONSEPROBE"


class EncodedRow(NamedTuple):
    """The ids of a prompt and of one response, as they are scored."""

    prompt: list[int]
    response: list[int]
    """Terminator included."""
    truncated: bool
    """Whether ids of the conversation were left out."""


def check_reward_template(given: str | None, key: str = "reward_chat_template") -> None:
    """Raise `ConfigurationError` for a template that is neither named nor a file."""
    if given not in (None, TRANSCRIPT, PLAIN, PAIR) and not Path(given).expanduser().is_file():
        raise ConfigurationError(f"{key}: {given} is neither a Jinja file nor {PLAIN}, {PAIR} or {TRANSCRIPT}")


class WrittenText:
    """Rows of exactly the text that a Jinja file writes, or of the words alone (`plain`, `pair`).

    No token is added but those of the tokenizer for `plain` and `pair`, as `tokenizer(text)` and `tokenizer(text,
    text_pair)` give them: an EOS stands there only where one of the two puts it. A Jinja file gets `messages`, the
    response the last of them, and writes all special tokens itself, as transformers has it.

    Raises `ConfigurationError` when there is no such file.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str) -> None:
        check_reward_template(chat_template)
        self.tokenizer = tokenizer
        self.kind = chat_template if chat_template in (PLAIN, PAIR) else "jinja"
        self.template = "" if self.kind != "jinja" else Path(chat_template).expanduser().read_text(encoding="utf-8")
        ids = self._ids("a", special=True)
        bare = self._ids("a", special=False)
        self._before = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), 0)
        self._after = len(ids) - len(bare) - self._before

    @property
    def pad_id(self) -> int:
        """Id to fill padding with. Nothing reads it: masks come from lengths."""
        return self.tokenizer.pad_token_id or 0

    def fingerprint(self) -> str:
        """A hash of all that decides which ids a conversation becomes."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = sorted(self.tokenizer.get_vocab().items()) if core is None else core.to_str()
        return hashlib.sha256(repr((self.kind, self.template, vocabulary)).encode()).hexdigest()

    def rows(
        self,
        prompts: Sequence[Sequence[Message]],
        responses: Sequence[str],
        ended: Sequence[bool],
        *,
        limit: int | None,
    ) -> list[EncodedRow]:
        """Rows of at most `limit` tokens; longer ones lose tokens from the left, after the special ones there.

        What a Jinja file writes after a response that has not `ended` is left out. Raises `DataError` when it does not
        take a conversation.
        """
        return [self._row(*each, limit) for each in zip(prompts, responses, ended, strict=True)]

    def _row(self, prompt: Sequence[Message], response: str, ended: bool, limit: int | None) -> EncodedRow:
        if self.kind == "jinja":
            head, tail = self._written(prompt, response, ended)
            ids, count = self._ids(head + tail, special=False), len(self._ids(tail, special=False))
        else:
            words = "\n".join(message["content"] for message in prompt)
            pair = (words, response) if self.kind == PAIR else (f"{words}\n{response}",)
            ids = self.tokenizer(*pair, verbose=False)["input_ids"]
            count = len(self._ids(response, special=False))
            count += self._after if count or self.kind == PLAIN else 0  # an empty second text makes no pair
        specials = set(self.tokenizer.all_special_ids)
        lead = next((place for place, token in enumerate(ids) if token not in specials), 0)
        limit = len(ids) if limit is None else limit
        cut = max(len(ids) - limit, 0)
        if cut:
            lead = min(lead, max(limit - 1, 0))
            ids = [*ids[:lead], *ids[lead + cut :]]
        count = min(count, len(ids))
        return EncodedRow(ids[: len(ids) - count], ids[len(ids) - count :], cut > 0)

    def _written(self, prompt: Sequence[Message], response: str, ended: bool) -> tuple[str, str]:
        """What the file writes before the response, and from there on."""
        head, _, after = self._rendered(prompt, _PROBE).partition(_PROBE)
        text = self._rendered(prompt, response)
        start = len(head) if text.startswith(head) else max(text.rfind(response.strip()), 0)
        stop = len(text) - len(after) if not ended and after and text.endswith(after) else len(text)
        return text[:start], text[start:stop]

    def _rendered(self, prompt: Sequence[Message], response: str) -> str:
        messages = [*prompt, {"role": "assistant", "content": response}]
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False)
        except Exception as error:  # Jinja's own errors, and whatever a template raises on purpose
            reason = reason_of(error, whole=True)
            raise DataError(f"reward_chat_template: the file refuses a conversation: {reason}") from error

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def check_pair(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise `ModelError` where nothing would stand between the two texts of a pair."""
    both, first, second = (tokenizer(*texts, verbose=False)["input_ids"] for texts in (("a", "b"), ("a",), ("b",)))
    if both == [*first, *second]:
        raise ModelError(
            f"{name}: its tokenizer puts nothing between the two texts of a pair; give reward_chat_template: {PLAIN}, "
            "or a Jinja file"
        )
