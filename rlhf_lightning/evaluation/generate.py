"""Replies of a policy to prompts, kept in a file as they come; and how far the policy has moved, told by them.

N reply tokens of some rows together, V vocabulary, H hidden size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.examples import PromptExample
from rlhf_lightning.errors import ConfigurationError, DataError
from rlhf_lightning.evaluation.ranks import ALONE, Ranks
from rlhf_lightning.evaluation.store import Ledger
from rlhf_lightning.functional.kl import exact_kl, kl_estimate
from rlhf_lightning.functional.logprobs import gather_logprobs
from rlhf_lightning.models.backbones import max_positions
from rlhf_lightning.models.causal_lm import CausalLM, FrozenCausalLM, output_layer
from rlhf_lightning.models.generation import RolloutEngine, seed_of
from rlhf_lightning.rewards.scorers import EncodedRow, padded
from rlhf_lightning.rollouts import Rollouts

_CHUNK = 512
"""Reply tokens whose logits exist at a time, of both models."""


@dataclass(frozen=True, slots=True)
class GeneratedReply:
    """One reply of a policy."""

    prompt_id: str
    sample: int
    """Its number among the replies to its prompt, from 0."""
    text: str
    """See `ChatFormat.reply_text`."""
    tokens: int
    """Terminator included."""
    ended: bool
    """Whether it ended by itself, with the terminator, and not at `max_new_tokens`."""
    ids: tuple[int, ...]
    """As they were drawn: encoding the text may give others."""


def generate_replies(
    policy: CausalLM,
    chat_format: ChatFormat,
    prompts: Sequence[PromptExample],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    engine: RolloutEngine,
    model: str,
    file: Path | None = None,
    keep_every: int = 256,
    ranks: Ranks = ALONE,
) -> list[GeneratedReply]:
    """`samples` replies to each prompt, those to one prompt side by side, in the order of the prompts.

    Reply k to a prompt has the seed of (seed, prompt id, k), so it depends neither on the batch nor on the other
    prompts, and two policies are drawn with the same noise. Temperature 0 takes the most likely tokens.

    With `file` (see `Ledger`) replies are appended as they come, and the same call goes on where one was killed:
    replies to the same prompts with the same settings are read from it, more samples or prompts are added. `model` is
    the caller's fingerprint of the weights; with another one, or other settings, other replies are drawn and kept
    beside them. Each of the processes draws a share of the replies, and the first of them has the file, to which it
    appends the `keep_every` replies of each.

    Raises `ConfigurationError` for impossible settings, prompts of the same id, or a prompt for which the model has too
    few positions; `DataError` for a prompt that holds a control token, and for a file that holds something else.
    """
    if samples < 1 or max_new_tokens < 1 or not 0 <= temperature < float("inf"):
        raise ConfigurationError(
            f"replies: samples {samples}, max_new_tokens {max_new_tokens} and temperature {temperature} must be at "
            "least 1, 1 and 0"
        )
    by_id = {prompt.example_id: prompt for prompt in prompts}
    if len(by_id) < len(prompts):
        ids = [prompt.example_id for prompt in prompts]
        repeated = next(one for one in ids if ids.count(one) > 1)
        raise ConfigurationError(f"replies: {repeated!r} is the id of two prompts, and replies are told apart by it")
    encoded = _encoded(policy, chat_format, prompts, max_new_tokens=max_new_tokens)
    settings = {
        "model": model,
        "chat_format": chat_format.fingerprint(),
        "temperature": float(temperature),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "engine": type(engine).__name__,
        "dtype": str(next(policy.parameters()).dtype),
    }
    wanted = [(prompt.example_id, sample) for prompt in prompts for sample in range(samples)]
    ledger = Ledger(file, _hash(settings), [field.name for field in fields(GeneratedReply)], ranks)
    hashes = {name: _hash(ids.tolist()) for name, ids in encoded.items()}
    places = {key: f"{hashes[key[0]]} {key[1]} {key[0]}" for key in wanted}
    missing = [key for key in wanted if places[key] not in ledger.known]
    missing.sort(key=lambda key: len(encoded[key[0]]))  # prompts of like length share a batch

    rollouts = Rollouts(policy, chat_format, engine, max_new_tokens=max_new_tokens)

    def sample(part: Sequence[tuple[str, int]]) -> list[GeneratedReply]:
        seeds = [seed_of(seed, *key) for key in part]
        responses = rollouts.sample(
            [encoded[name] for name, _ in part], seeds, index=range(len(part)), temperature=temperature
        )
        return [
            GeneratedReply(*key, text, int(length), bool(ended), tuple(row[-length:].tolist()))
            for key, text, length, ended, row in zip(
                part, responses.texts(chat_format), responses.lengths, responses.ended, responses.rows, strict=True
            )
        ]

    at_a_time = keep_every * ranks.size
    for start in range(0, len(missing), at_a_time):
        part = missing[start : start + at_a_time]
        made = ranks.each(part, sample)
        ledger.add({places[key]: asdict(reply) for key, reply in zip(part, made, strict=True)})
    found = (ledger.known[places[key]] for key in wanted)
    return [GeneratedReply(**{**entry, "ids": tuple(entry["ids"])}) for entry in found]


def _encoded(
    policy: CausalLM, chat_format: ChatFormat, prompts: Sequence[PromptExample], *, max_new_tokens: int
) -> dict[str, Tensor]:
    """The ids of each prompt up to where the reply begins, by its id."""
    device, limit = next(policy.parameters()).device, max_positions(policy.config.get_text_config())
    for prompt in prompts:
        if token := chat_format.control_token_in(prompt.texts):
            raise DataError(f"{prompt.origin}: the prompt holds the control token {token!r}; leave it out")
    rows = chat_format.encode_prompts([chat_format.generation_text(prompt.prompt) for prompt in prompts])
    for prompt, row in zip(prompts, rows, strict=True):
        if limit is not None and len(row) + max_new_tokens > limit:
            raise ConfigurationError(
                f"{prompt.origin}: {len(row)} tokens and max_new_tokens {max_new_tokens} are more than the {limit} "
                "positions of the model; lower max_new_tokens, or leave the prompt out"
            )
    return {prompt.example_id: torch.tensor(row, device=device) for prompt, row in zip(prompts, rows, strict=True)}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ReplyKL:
    """How far the policy is from the reference along one reply, in nats, sums over its tokens."""

    prompt_id: str
    sample: int
    tokens: int
    exact: float
    """Sum of KL(policy, reference) over the whole vocabulary in each state that the reply visits."""
    k1: float
    """Sum of log p - log p_ref of the reply's own tokens."""


@torch.no_grad()
def kl_of_replies(
    policy: CausalLM,
    reference: CausalLM | FrozenCausalLM | None,
    chat_format: ChatFormat,
    prompts: Sequence[PromptExample],
    replies: Sequence[GeneratedReply],
    *,
    batch_size: int = 8,
) -> list[ReplyKL]:
    """The KL of the policy from the reference along each of its replies, whatever the batch size.

    Without a reference it is the policy with its adapters switched off. The states are those of the replies' own ids,
    at temperature 1, in eval mode, with a log-softmax in float32. The sum of `exact` is an unbiased estimate of the KL
    of whole replies, as k1's is, where the policy itself drew them at temperature 1.

    Raises `ConfigurationError` for a reply to a prompt that is not given, and `ModelError` when there is neither a
    reference nor adapters.
    """
    other = policy if reference is None else reference if isinstance(reference, CausalLM) else reference.network
    texts = {prompt.example_id: chat_format.generation_text(prompt.prompt) for prompt in prompts}
    if absent := [reply.prompt_id for reply in replies if reply.prompt_id not in texts]:
        raise ConfigurationError(f"kl: a reply to the prompt {absent[0]!r}, which is not among the prompts")
    encoded = dict(zip(texts, chat_format.encode_prompts(list(texts.values())), strict=True))
    rows = [EncodedRow(encoded[reply.prompt_id], list(reply.ids), False) for reply in replies]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].response))
    found: list[ReplyKL | None] = [None] * len(rows)
    with _judging(policy), _judging(other):
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            inputs = padded([rows[i] for i in part], chat_format.pad_id)
            exact, k1 = _token_kl(policy, other, inputs.text, adapters_off=reference is None)
            lengths = [len(rows[i].response) for i in part]
            for i, its_exact, its_k1 in zip(part, exact.split(lengths), k1.split(lengths), strict=True):
                reply = replies[i]
                sums = its_exact.double().sum().item(), its_k1.double().sum().item()
                found[i] = ReplyKL(reply.prompt_id, reply.sample, len(reply.ids), *sums)
    return found


def _token_kl(
    policy: CausalLM, other: CausalLM, rows: tuple[Tensor, Tensor, Tensor], *, adapters_off: bool
) -> tuple[Tensor, Tensor]:
    """Exact KL and k1 at each response token, row by row, both [N]."""
    rows = tuple(tensor.to(next(policy.parameters()).device) for tensor in rows)
    states = policy.states(*rows)
    layer = _float_layer(policy, states.hidden)
    with policy.adapters_off() if adapters_off else nullcontext():
        place = next(other.parameters()).device
        other_hidden = other.states(*(tensor.to(place) for tensor in rows)).hidden.to(states.hidden.device)
        other_layer = _float_layer(other, other_hidden)
    exact, k1 = [], []
    for start in range(0, len(states.targets), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        logits = _logits(states.hidden[chunk], *layer, policy.temperature)
        reference_logits = _logits(other_hidden[chunk], *other_layer, other.temperature)
        exact.append(exact_kl(logits, reference_logits))
        own, its = (gather_logprobs(each, states.targets[chunk]) for each in (logits, reference_logits))
        k1.append(kl_estimate(own, its, estimator="k1"))
    return torch.cat(exact).cpu(), torch.cat(k1).cpu()


def _float_layer(model: CausalLM, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """The output layer beside these hidden states, float32 at least."""
    weight, bias = output_layer(model.model)
    place = hidden.device, torch.promote_types(weight.dtype, torch.float32)
    return weight.to(*place), None if bias is None else bias.to(*place)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[n, V], float32 at least."""
    return F.linear(hidden.to(weight.dtype), weight, bias) / temperature


@contextmanager
def _judging(model: CausalLM) -> Iterator[None]:
    """Eval mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
