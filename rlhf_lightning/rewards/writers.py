"""What writes replies to conversations: a language model here, one behind a server, or a function of the user's.

B replies. Reply b depends on its conversation and its seed, not on the others beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import Protocol, Self

import torch

from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.examples import Message
from rlhf_lightning.data.tokenizer import load_tokenizer
from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.configuration import max_positions
from rlhf_lightning.models.fingerprint import weights_fingerprint
from rlhf_lightning.models.precision import move
from rlhf_lightning.models.slot_engine import SlotEngine
from rlhf_lightning.models.vllm_server import Server
from rlhf_lightning.user_code import call, code_fingerprint, load_function, names_function

_REQUESTS = 64
"""To a server, under way at a time."""
_TIMEOUT = 3600.0


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply."""

    text: str
    ended: bool
    """Whether it ended by itself, and not at `max_new_tokens`."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How replies are sampled; temperature 0 takes the most likely tokens."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0


class Writer(Protocol):
    """Writes replies."""

    name: str
    fingerprint: str
    """A hash of all that decides its replies."""

    def __call__(self, conversations: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[Reply | None]:
        """A reply to each of B conversations; None to one that it was not asked about: see its class."""
        ...

    def sampling(self, sampling: Sampling) -> Self:
        """The same writer with other sampling."""
        ...


def load_writer(
    given: str,
    sampling: Sampling,
    *,
    batch_size: int = 16,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Writer:
    """What a model of the settings names: `module:function`, the http:// address of a server, or a model.

    The keywords are those of `PolicyWriter`. Raises `ConfigurationError` or `ModelError` where it names none of them.
    """
    if given.startswith(("http://", "https://")):
        return ServerWriter(given, sampling)
    if names_function(given):
        return FunctionWriter(given)
    policy, chat_format = load_frozen_policy(given, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    return PolicyWriter(given, policy, chat_format, sampling, batch_size=batch_size)


def load_frozen_policy(
    name: str, *, device: str, dtype: torch.dtype, trust_remote_code: bool = False
) -> tuple[CausalLM, ChatFormat]:
    """A policy in eval mode and without gradients, and its tokenizer's format. Raises `ModelError`."""
    policy = CausalLM.from_pretrained(name, layout="auto", trust_remote_code=trust_remote_code)
    move(policy.eval().requires_grad_(False), torch.device(device), dtype)
    return policy, ChatFormat(load_tokenizer(name, trust_remote_code=trust_remote_code))


class PolicyWriter:
    """A causal language model. Replies to equal conversations share the cache of their prompt (see `SlotEngine`).

    It is not asked about a conversation for whose tokens and `max_new_tokens` it has too few positions, nor about one
    that holds a control token of its template: a text that is to be judged could end its own turn with it.

    Args:
        name: As the user gave it.
        policy: The model, with its weights where and as they compute.
        chat_format: Of its tokenizer.
        sampling: How it replies.
        batch_size: Replies that are made at a time; changes none.

    Raises `ConfigurationError` when its positions leave no room for any question.
    """

    def __init__(
        self, name: str, policy: CausalLM, chat_format: ChatFormat, sampling: Sampling, *, batch_size: int = 16
    ) -> None:
        self.name, self.policy, self.chat_format, self.how = name, policy, chat_format, sampling
        self.engine = SlotEngine(batch_size)
        limit = max_positions(policy.config.get_text_config())
        self.room = None if limit is None else limit - sampling.max_new_tokens
        """Longest prompt in tokens."""
        if self.room is not None and self.room < 1:
            raise ConfigurationError(
                f"max_new_tokens: {sampling.max_new_tokens} leaves no room for a question in the {limit} positions of "
                f"{name}"
            )
        dtype = next(policy.parameters()).dtype
        parts = (weights_fingerprint(policy), chat_format.fingerprint(), *astuple(sampling), str(dtype))
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()

    def __call__(self, conversations: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[Reply | None]:
        """As `Writer`."""
        keys = [tuple((turn["role"], turn["content"]) for turn in each) for each in conversations]
        first = dict(zip(keys, conversations, strict=True))
        encoded = zip(first, self._encoded(list(first.values())), strict=True)
        ids = {key: row for key, row in encoded if row is not None}
        asked = [place for place, key in enumerate(keys) if key in ids]
        found: list[Reply | None] = [None] * len(keys)
        sampled = self.engine.draw(
            self.policy,
            [ids[keys[place]] for place in asked],
            [seeds[place] for place in asked],
            max_new_tokens=self.how.max_new_tokens,
            temperature=self.how.temperature,
            top_p=self.how.top_p,
            eos_id=self.chat_format.eos_id,
            pad_id=self.chat_format.pad_id,
        )
        for place, reply in zip(asked, sampled, strict=True):
            new, prompt = reply.ids.tolist(), ids[keys[place]].tolist()
            found[place] = Reply(self.chat_format.reply_text(prompt, new), new[-1] == self.chat_format.eos_id)
        return found

    def sampling(self, sampling: Sampling) -> PolicyWriter:
        """As `Writer`."""
        size = self.engine.batch_size
        return PolicyWriter(self.name, self.policy, self.chat_format, sampling, batch_size=size)

    def _encoded(self, conversations: Sequence[Sequence[Message]]) -> list[torch.Tensor | None]:
        """The ids of each prompt, None where it is not to be asked about."""
        form, device = self.chat_format, next(self.policy.parameters()).device
        rows = form.encode_prompts([form.generation_text(each) for each in conversations])
        found: list[torch.Tensor | None] = []
        for each, row in zip(conversations, rows, strict=True):
            short = self.room is None or len(row) <= self.room
            plain = form.control_token_in([turn["content"] for turn in each]) is None
            found.append(torch.tensor(row, device=device) if short and plain else None)
        return found


class FunctionWriter:
    """`module:function` of the user's: takes B conversations, lists of {role, content}, and B seeds; gives B texts.

    The fingerprint is that of the module's file. Raises `ConfigurationError` when there is no such function.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.function = load_function(name, "the directory of a language model")
        self.fingerprint = code_fingerprint(name)

    def __call__(self, conversations: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[Reply | None]:
        """As `Writer`. Raises `ModelError` when the function raises, or gives another number of texts."""
        texts = call(self.function, self.name, conversations, seeds, gives=str)
        return [Reply(text, True) for text in texts]

    def sampling(self, sampling: Sampling) -> FunctionWriter:
        """Itself: how it samples is its own business."""
        return self


class ServerWriter:
    """The first model of a server with OpenAI's routes, such as `vllm serve MODEL` or llama.cpp's `llama-server`.

    The seed of a reply is sent with its request; how far it is kept is the server's business. The fingerprint holds
    the address and the model's name: what the server has behind the name is not known here.

    Args:
        url: `http://127.0.0.1:8000`.
        sampling: How it replies.
    """

    def __init__(self, url: str, sampling: Sampling) -> None:
        self.server, self.how = Server(url.rstrip("/").removesuffix("/v1"), _TIMEOUT), sampling
        models = self.server.get("/v1/models").get("data")
        if not models:
            raise ModelError(f"{url}: serves no model")
        self.name, self.model = url, models[0]["id"]
        self.fingerprint = hashlib.sha256(repr((url, self.model, *astuple(sampling))).encode()).hexdigest()

    def __call__(self, conversations: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[Reply | None]:
        """As `Writer`. Raises `ModelError` when the server does not answer, or with an error."""
        how = {"max_tokens": self.how.max_new_tokens, "temperature": self.how.temperature, "top_p": self.how.top_p}

        def reply(conversation: Sequence[Message], seed: int) -> Reply:
            content = {"model": self.model, "messages": [dict(turn) for turn in conversation]}
            answer = self.server.post("/v1/chat/completions", content | how | {"seed": seed % 2**31})
            choice = (answer.get("choices") or [{}])[0]
            text = choice.get("message", {}).get("content")
            if not isinstance(text, str):
                raise ModelError(f"{self.name}: gave no message; it needs the route /v1/chat/completions")
            return Reply(text, choice.get("finish_reason") == "stop")

        with ThreadPoolExecutor(max_workers=_REQUESTS) as pool:
            return list(pool.map(reply, conversations, seeds))

    def sampling(self, sampling: Sampling) -> ServerWriter:
        """As `Writer`."""
        return ServerWriter(self.name, sampling)
