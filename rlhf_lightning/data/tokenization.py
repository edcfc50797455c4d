"""Validated pairs -> token ids. Prompt ids, response ids and one terminator id; never a second look at joined text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from rlhf_lightning.data.examples import LoadReport, Message, OnBadRows, PreferenceExample
from rlhf_lightning.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["keep_response", "drop", "error"]
"""What to do with a pair longer than max_length: `keep_response` cuts its prompt from the left, after the template's
head, and drops the pair when nothing of the prompt would stay; `drop` drops it; `error` refuses the source."""

TRANSCRIPT = "transcript"
"""Name of the built-in plain format, for tokenizers without a chat template."""

_USER_PROBE = "PROBEUSERPROBE"
_REPLY_PROBE = "PROBEREPLYPROBE"


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer by hub name or directory. Raises `ModelError` when there is none."""
    from transformers import AutoTokenizer

    from rlhf_lightning.tiny import resolve_model

    try:
        return AutoTokenizer.from_pretrained(resolve_model(name_or_path), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for the same mistake
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{name_or_path}: no tokenizer could be loaded from it ({reason[:200]}); give the hub name of one, or a "
            "directory with tokenizer.json and tokenizer_config.json"
        ) from error


class ChatFormat:
    """How a tokenizer writes a conversation, as ids: `prompt`, then a response, then one `terminator`.

    Uses the tokenizer's chat template, the Jinja file `chat_template`, or, when there is neither or `chat_template` is
    `"transcript"`, the plain format `\\n\\nHuman: ...\\n\\nAssistant: ...`. The terminator is what the template puts
    right after an assistant's reply (Qwen: `<|im_end|>`, Llama 3: `<|eot_id|>`), so that the last token of a training
    row is the one at which a sampled answer ends; without a template it is the tokenizer's EOS, or SEP for an encoder.
    A response is stripped where the template strips replies.

    Raises `ModelError` when the tokenizer has no terminator, or when a template rewrites the prompt once a reply
    follows it, so that prompt ids would be no prefix of the whole; `DataError` when the template cannot be rendered.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
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

    def control_token_in(self, example: PreferenceExample) -> str | None:
        """The first control token written out in a text of the pair, or None. It would be encoded as a command."""
        if self._control_tokens is None:
            return None
        texts = [*(message["content"] for message in example.prompt), example.chosen, example.rejected]
        found = (self._control_tokens.search(text) for text in texts)
        return next((match.group() for match in found if match), None)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without any token that is not in the text."""
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each `prompt_text`, with exactly one start token where the tokenizer has one."""
        start = self.start_ids
        return [ids if ids[: len(start)] == start else [*start, *ids] for ids in self.encode(texts)]

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

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
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
        user = [{"role": "user", "content": _USER_PROBE}]
        prompt = self._render(user, add_generation_prompt=True)
        reply = {"role": "assistant", "content": _REPLY_PROBE}
        whole = self._render([*user, reply], add_generation_prompt=False)
        if not whole.startswith(prompt) or _REPLY_PROBE not in whole:
            raise ModelError(
                "the chat template writes the prompt differently once a reply follows it, so a response has no fixed "
                f"place; give another one with chat_template: FILE.jinja, or chat_template: {TRANSCRIPT}"
            )
        padded = {"role": "assistant", "content": f"\n\t{_REPLY_PROBE}\t\n"}
        self.strips_responses = padded["content"] not in self._render([*user, padded], add_generation_prompt=False)
        lead, _, after = whole[len(prompt) :].partition(_REPLY_PROBE)
        if lead.strip():  # a header of the reply that the template leaves out of its generation prompt
            self.prompt_tail, self.response_lead = lead, ""
        else:
            self.response_lead = lead
        control = self._control_ids()
        return self._checked_terminator(next((i for i in self.encode([after])[0] if i in control), fallback))

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
        before, _, after = self.prompt_text([{"role": "user", "content": _USER_PROBE}]).partition(_USER_PROBE)
        return self.encode_prompts([before])[0], len(self.encode([after])[0])

    def _control_ids(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder
        return set(self.tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}

    def _control_token_pattern(self) -> re.Pattern[str] | None:
        tokens = [token for token in self.tokenizer.convert_ids_to_tokens(sorted(self._control_ids())) if token]
        return re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True))) if tokens else None


@dataclass(frozen=True, slots=True)
class TokenizedPairs:
    """P pairs as one flat array of N token ids; segment 3i is the prompt of pair i, then chosen, then rejected.

    The prompt is stored once. Responses end with the terminator.
    """

    ids: np.ndarray
    """[N] int32."""
    offsets: np.ndarray
    """[3P + 1] int64: where each segment begins in `ids`."""
    margin: np.ndarray
    """[P] float32, 0 where the data does not say."""
    example_ids: list[str]
    prompts_cut: int
    """Number of pairs whose prompt was cut from the left."""

    def __len__(self) -> int:
        return len(self.example_ids)

    @property
    def lengths(self) -> np.ndarray:
        """[P] int64: tokens of the longer of the two rows of each pair."""
        prompt, chosen, rejected = np.diff(self.offsets).reshape(-1, 3).T
        return prompt + np.maximum(chosen, rejected)

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of prompt, chosen response and rejected response of one pair."""
        a, b, c, d = self.offsets[3 * index : 3 * index + 4]
        return self.ids[a:b], self.ids[b:c], self.ids[c:d]


def tokenize_pairs(
    examples: Sequence[PreferenceExample],
    chat_format: ChatFormat,
    report: LoadReport,
    *,
    max_length: int,
    truncation: Truncation = "keep_response",
    on_bad_rows: OnBadRows = "error",
) -> TokenizedPairs:
    """Encode pairs; both rows of a pair fit into `max_length` tokens, terminator included.

    Both sides get the same prompt and the same terminator; a response is never cut. Left out and counted in `report`
    are pairs that are too long (after `truncation`), whose sides are empty or the same to this tokenizer, and, under
    `on_bad_rows="drop"`, those that hold a control token or that the chat template refuses.

    Raises `DataError` for the latter two under `on_bad_rows="error"`, for pairs that are too long when `truncation` is
    `error`, and when no pair is left.
    """
    refused: dict[str, list[str]] = {}

    def refuse(example: PreferenceExample, reason: str, message: str) -> None:
        message = f"{example.origin}: {message}"
        refused.setdefault(reason, []).append(message)
        report.refuse(reason, message, example.origin)

    readable: list[PreferenceExample] = []
    prompt_texts: list[str] = []
    for example in examples:
        if (token := chat_format.control_token_in(example)) is not None:
            refuse(example, "special_tokens", f"a text contains the control token {token!r}")
            continue
        try:
            prompt_texts.append(chat_format.prompt_text(example.prompt))
        except DataError as error:
            refuse(example, "template_refused", str(error))
            continue
        readable.append(example)

    prompts = chat_format.encode_prompts(prompt_texts)
    sides = [
        chat_format.encode([chat_format.response_text(getattr(example, side)) for example in readable])
        for side in ("chosen", "rejected")
    ]
    pieces: list[Sequence[int]] = []
    kept: list[PreferenceExample] = []
    prompts_cut = 0
    for example, prompt, chosen, rejected in zip(readable, prompts, *sides, strict=True):
        if not (chosen and rejected):
            refuse(example, "empty_response", "a response has no text that the tokenizer knows")
            continue
        if chosen == rejected:
            refuse(example, "identical_pair", "chosen and rejected are the same text to the tokenizer")
            continue
        response = max(len(chosen), len(rejected)) + 1
        if len(prompt) + response > max_length:
            shorter = _cut_from_left(prompt, chat_format, max_length - response)
            if truncation != "keep_response" or shorter is None:
                message = (
                    f"the longer row has {len(prompt) + response} tokens (prompt {len(prompt)}, response and "
                    f"terminator {response}), max_length is {max_length}"
                )
                refuse(example, "too_long", message)
                continue
            prompt, prompts_cut = shorter, prompts_cut + 1
        kept.append(example)
        pieces += [prompt, [*chosen, chat_format.terminator_id], [*rejected, chat_format.terminator_id]]
    bad = refused.get("special_tokens", []) + refused.get("template_refused", [])
    if bad and on_bad_rows == "error":
        raise DataError(_first_ten(bad, examples, "mend them, or leave them out with on_bad_rows: drop"))
    if "too_long" in refused and truncation == "error":
        raise DataError(
            _first_ten(refused["too_long"], examples, "raise max_length, or set truncation: keep_response or drop")
        )
    if not kept:
        messages = [message for messages in refused.values() for message in messages]
        raise DataError(_first_ten(messages, examples, "raise max_length, or mend them"))
    lengths = np.fromiter((len(piece) for piece in pieces), dtype=np.int64, count=len(pieces))
    return TokenizedPairs(
        ids=np.concatenate([np.asarray(piece, dtype=np.int32) for piece in pieces]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        margin=np.array([example.margin or 0.0 for example in kept], dtype=np.float32),
        example_ids=[example.example_id for example in kept],
        prompts_cut=prompts_cut,
    )


def _first_ten(messages: Sequence[str], examples: Sequence[PreferenceExample], advice: str) -> str:
    more = f"; and {len(messages) - 10} more" if len(messages) > 10 else ""
    return f"{len(messages)} of {len(examples)} pairs cannot be used: {'; '.join(messages[:10])}{more}; {advice}"


def _cut_from_left(prompt: list[int], chat_format: ChatFormat, room: int) -> list[int] | None:
    """The prompt's head and as much of its end as fits, or None when no token of its messages would be left."""
    head, shared = chat_format.head_ids, 0
    while shared < min(len(prompt), len(head)) and prompt[shared] == head[shared]:
        shared += 1
    tail = room - shared
    return prompt[:shared] + prompt[-tail:] if tail > chat_format.tail_length else None


def _transcript_text(messages: Sequence[Message]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    turns = [
        message["content"] if message["role"] == "system" else f"\n\n{names[message['role']]}: {message['content']}"
        for message in messages
    ]
    return "".join(turns) + "\n\nAssistant:"
