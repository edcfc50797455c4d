"""Responses of a policy to prompts, kept in a file as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.examples import PromptExample
from rlhf_lightning.errors import ConfigurationError, DataError
from rlhf_lightning.evaluation.ranks import ALONE, Ranks
from rlhf_lightning.evaluation.store import Ledger
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.configuration import max_positions
from rlhf_lightning.models.generation import RolloutEngine, seed_of
from rlhf_lightning.rollouts import Rollouts


@dataclass(frozen=True, slots=True)
class Response:
    """One response of a policy."""

    prompt_id: str
    sample: int
    """Its number among the responses to its prompt, from 0."""
    text: str
    """See `ChatFormat.reply_text`."""
    tokens: int
    """EOS included."""
    ended: bool
    """Whether it ended by itself, with the EOS token, and not at `max_new_tokens`."""
    ids: list[int]
    """As they were sampled: encoding the text may give others."""


def generate_responses(
    policy: CausalLM,
    chat_format: ChatFormat,
    prompts: Sequence[PromptExample],
    *,
    samples: int,
    temperature: float,
    top_p: float = 1.0,
    max_new_tokens: int,
    seed: int,
    engine: RolloutEngine,
    model: str,
    file: Path | None = None,
    keep_every: int = 256,
    ranks: Ranks = ALONE,
) -> list[Response]:
    """`samples` responses to each prompt, those to one prompt side by side, in the order of the prompts.

    Response k to a prompt has the seed of (seed, prompt id, k), so it depends neither on the batch nor on the other
    prompts, and two policies sample with the same noise. Temperature 0 takes the most likely tokens; `top_p`: see
    `RolloutEngine.draw`.

    With `file` (see `Ledger`) responses are appended as they come, and the same call resumes where one was killed:
    responses to the same prompts with the same settings are read from it, more samples or prompts are added. `model`
    is the caller's fingerprint of the weights; with another one, or other settings, other responses are sampled and
    kept beside them. Each of the processes samples a share, and the first of them has the file, to which it appends
    the `keep_every` responses of each.

    Raises `ConfigurationError` for prompts of the same id, or a prompt for which the model has too few positions;
    `DataError` for a prompt that holds a control token, and for a file that holds something else.
    """
    encoded = _encoded(policy, chat_format, prompts, max_new_tokens=max_new_tokens)
    settings = {
        "model": model,
        "chat_format": chat_format.fingerprint(),
        "temperature": float(temperature),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "engine": type(engine).__name__,
        "dtype": str(next(policy.parameters()).dtype),
    } | ({} if top_p == 1 else {"top_p": top_p})
    hashes = {name: _hash(ids.tolist()) for name, ids in encoded.items()}
    wanted = {f"{hashes[name]} {sample} {name}": (name, sample) for name in encoded for sample in range(samples)}
    rollouts = Rollouts(policy, chat_format, engine, max_new_tokens=max_new_tokens)

    def sample(keys: Sequence[str]) -> list[Response]:
        part = [wanted[key] for key in keys]
        ids = [encoded[name] for name, _ in part]
        seeds = [seed_of(seed, *each) for each in part]
        sampled = rollouts.sample(ids, seeds, temperature=temperature, top_p=top_p)
        ends = zip(sampled.texts(chat_format), sampled.lengths.tolist(), sampled.ended.tolist(), strict=True)
        return [
            Response(*each, text, length, ended, row[-length:].tolist())
            for each, row, (text, length, ended) in zip(part, sampled.rows, ends, strict=True)
        ]

    ledger = Ledger(file, _hash(settings), Response, ranks)
    order = sorted(wanted, key=lambda key: len(encoded[wanted[key][0]]))  # prompts of like length share a batch
    ledger.fill("responses", order, sample, at_a_time=keep_every)
    return [ledger.known[key] for key in wanted]


def _encoded(
    policy: CausalLM, chat_format: ChatFormat, prompts: Sequence[PromptExample], *, max_new_tokens: int
) -> dict[str, Tensor]:
    """The ids of each prompt up to where the response begins, by the prompt's id."""
    device, limit = next(policy.parameters()).device, max_positions(policy.config.get_text_config())
    for prompt in prompts:
        if token := chat_format.control_token_in(prompt.texts):
            raise DataError(f"{prompt.origin}: the prompt holds the control token {token!r}; leave it out")
    rows = chat_format.encode_prompts([chat_format.generation_text(prompt.prompt) for prompt in prompts])
    found: dict[str, Tensor] = {}
    for prompt, row in zip(prompts, rows, strict=True):
        if limit is not None and len(row) + max_new_tokens > limit:
            raise ConfigurationError(
                f"{prompt.origin}: {len(row)} tokens and max_new_tokens {max_new_tokens} are more than the {limit} "
                "positions of the model; lower max_new_tokens, or leave the prompt out"
            )
        if prompt.example_id in found:
            raise ConfigurationError(f"{prompt.origin}: duplicate id {prompt.example_id!r}; ids must be unique")
        found[prompt.example_id] = torch.tensor(row, device=device)
    return found


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
