"""Replies of a policy to prompts: the most likely ones, and drawn ones that do not depend on their batch.

V vocabulary. Prompts and replies are ragged: 1-D int64 ids, never padded tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_lightning.models.causal_lm import CausalLM, inner_model


class Reply(NamedTuple):
    """A drawn reply of L tokens."""

    ids: Tensor
    """[L] int64, its terminator included."""
    logprobs: Tensor | None = None
    """[L] float32, in nats, as the engine says that it drew them, where that is not by the policy itself."""


class RolloutEngine(Protocol):
    """What draws replies. An engine may be another program with its own copy of the weights."""

    def synchronize(self, policy: CausalLM) -> None:
        """Take the policy's weights as they are now; called by one process, before replies are drawn with them."""
        ...

    def draw(
        self,
        policy: CausalLM,
        prompts: Sequence[Tensor],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        terminator_id: int,
        pad_id: int,
    ) -> list[Reply]:
        """One reply to each prompt, on the prompt's device.

        Each is drawn from softmax(logits / temperature), without any filter, and ends with the terminator or has
        `max_new_tokens` ids. The same seed gives the same reply. Temperature 0 takes the most likely token.
        """
        ...


class TransformersEngine:
    """Draws replies with transformers' `generate`, in batches of prompts of like length.

    Args:
        batch_size: Replies that are made at a time.
    """

    def __init__(self, batch_size: int = 64) -> None:
        self.batch_size = batch_size

    def synchronize(self, policy: CausalLM) -> None:
        """Nothing: the policy itself draws."""

    @torch.no_grad()
    def draw(
        self,
        policy: CausalLM,
        prompts: Sequence[Tensor],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        terminator_id: int,
        pad_id: int,
    ) -> list[Reply]:
        """As `RolloutEngine.draw`."""
        found: list[Reply | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        options = {"max_new_tokens": max_new_tokens, "terminator_id": terminator_id, "pad_id": pad_id}
        with _ready_to_generate(policy):
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                drawing = _Drawing([seeds[i] for i in part], temperature) if temperature > 0 else None
                for i, reply in zip(
                    part, _generate(policy, [prompts[i] for i in part], drawing, **options), strict=True
                ):
                    found[i] = Reply(reply)
        return found


def greedy_replies(
    policy: CausalLM, prompts: Sequence[Tensor], *, max_new_tokens: int, terminator_id: int, pad_id: int
) -> list[Tensor]:
    """The most likely continuation of each prompt, token by token; as `RolloutEngine.draw` with temperature 0."""
    engine = TransformersEngine(batch_size=1)  # a handful of them, and no padding that could matter
    drawn = engine.draw(
        policy,
        prompts,
        [0] * len(prompts),
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        terminator_id=terminator_id,
        pad_id=pad_id,
    )
    return [reply.ids for reply in drawn]


def seed_of(*parts: object) -> int:
    """A seed of 63 bits for what the parts name, such as a run's seed, a prompt and the number of the reply."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class _Drawing:
    """Turns the most likely token into a drawn one: logits / temperature plus Gumbel noise, of which each row has its
    own, so that a reply does not depend on the rows beside it.

    Gumbel 1954; Maddison et al. 2014 (arXiv 1411.0030), section 2.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.seeds = seeds
        self.temperature = temperature
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.generators:
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self.temperature - noise.log()


def _generate(
    policy: CausalLM,
    prompts: Sequence[Tensor],
    drawing: _Drawing | None,
    *,
    max_new_tokens: int,
    terminator_id: int,
    pad_id: int,
) -> list[Tensor]:
    from transformers import GenerationConfig, LogitsProcessorList

    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0), value=pad_id) for p in prompts])
    lengths = torch.tensor([len(p) for p in prompts], device=ids.device)
    mask = torch.arange(width, device=ids.device) >= (width - lengths)[:, None]
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=terminator_id,
        pad_token_id=pad_id,
        use_cache=True,
    )
    out = policy.model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        generation_config=settings,
        logits_processor=LogitsProcessorList([drawing] if drawing else []),
    )[:, width:]
    ended = out == terminator_id
    first = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, out.shape[1])
    return [row[:length] for row, length in zip(out, first.tolist(), strict=True)]


@contextmanager
def _ready_to_generate(policy: CausalLM) -> Iterator[None]:
    """Eval mode, and none of the model's own settings: a repetition penalty or top-p of its generation_config.json
    would apply to `generate` whatever it is given, and the replies would be drawn from another distribution.
    """
    from transformers import GenerationConfig

    training, model = policy.training, inner_model(policy.model)
    own, model.generation_config = model.generation_config, GenerationConfig()
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)
        model.generation_config = own
