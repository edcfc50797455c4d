"""Responses sampled in slots that are refilled as responses end: nothing is computed for one that has ended.

S slots, V vocabulary. Prompts and responses are ragged: 1-D int64 ids, never padded tensors.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from rlhf_lightning.errors import reason_of
from rlhf_lightning.models.causal_lm import CausalLM, decoder
from rlhf_lightning.models.configuration import max_positions, rope_limits
from rlhf_lightning.models.generation import (
    Sampled,
    TransformersEngine,
    company_tolerance,
    ready_to_generate,
    until_eos,
    with_noise,
)
from rlhf_lightning.models.precision import float32_arithmetic
from rlhf_lightning.models.rollout_weights import sampling_weights
from rlhf_lightning.models.row_check import difference, exact_arithmetic, probe_of
from rlhf_lightning.models.slots import Prompts, Slots, compute_prompts
from rlhf_lightning.models.states import forget_longest_row
from rlhf_lightning.terminal import progress

log = logging.getLogger(__name__)

_REFILL_SHARE = 8
"""Slots are refilled when an eighth of them is free: prompts are computed faster together."""
_SHORTEST = 0.75
"""Of the longest prompt that is computed in the same pass."""
_LOOK_EVERY = {"cpu": 1}
"""Steps between two looks at what was sampled: an accelerator is waited for, every 8 steps."""

_fits: dict[str, bool] = {}
"""Whether the scores of a configuration's slots were found to be those of a plain pass."""


class SlotEngine:
    """Samples responses with the policy itself, each prompt computed once, in slots that are refilled.

    The responses are those of `TransformersEngine`, which takes over where a model's scores in slots are other ones.

    Args:
        batch_size: Slots: responses that are made at a time.
        say_progress: Write into a log how far a call is, in tokens, of which there may be fewer than it says.
    """

    def __init__(self, batch_size: int = 64, *, say_progress: bool = False) -> None:
        self.batch_size = batch_size
        self.say_progress = say_progress

    def synchronize(self, policy: CausalLM) -> None:
        """Nothing: the policy itself samples."""

    @torch.no_grad()
    def draw(
        self,
        policy: CausalLM,
        prompts: Sequence[Tensor],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        eos_id: int,
        pad_id: int,
    ) -> list[Sampled]:
        """As `RolloutEngine.draw`."""
        if not prompts:
            return []
        options = _Options(max_new_tokens, temperature, top_p, eos_id)
        longest = max(map(len, prompts)) + max_new_tokens
        with ready_to_generate(policy):
            if not _fit(policy) or any(longest > limit for _, limit in rope_limits(policy.config)):
                engine = TransformersEngine(self.batch_size)
                return engine.draw(policy, prompts, seeds, pad_id=pad_id, **options._asdict())
            with sampling_weights(policy.model):
                drawing = _Drawing(policy, prompts, seeds, min(self.batch_size, len(prompts)), options)
                told = self.say_progress and not sys.stderr.isatty()  # a terminal has the bar of its caller
                with progress("tokens of these responses", len(prompts) * max_new_tokens, shown=told) as advance:
                    return [Sampled(response) for response in drawing.responses(advance)]


def greedy_responses(
    policy: CausalLM, prompts: Sequence[Tensor], *, max_new_tokens: int, eos_id: int, pad_id: int
) -> list[Tensor]:
    """The most likely continuation of each prompt, token by token; as `RolloutEngine.draw` with temperature 0."""
    options = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "pad_id": pad_id}
    sampled = SlotEngine().draw(policy, prompts, [0] * len(prompts), temperature=0.0, **options)
    return [response.ids for response in sampled]


class _Options(NamedTuple):
    """Of `SlotEngine.draw`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    eos_id: int


class _Drawing:
    """One call of `SlotEngine.draw`."""

    def __init__(
        self, policy: CausalLM, prompts: Sequence[Tensor], seeds: Sequence[int], slots: int, options: _Options
    ) -> None:
        self.policy, self.prompts, self.seeds, self.options = policy, prompts, seeds, options
        self.slots = Slots(policy, slots)
        self.running: list[_Running] = []
        """What is in the slots that are in use."""
        self.waiting: deque[list[int]] = deque(_by_prompt(prompts))
        """Responses that are not begun, those to one prompt together, the longest prompt first."""
        self.begun = _Begun(None, deque())
        self.found: dict[int, Tensor] = {}

    def responses(self, advance: Callable[[int], None]) -> list[Tensor]:
        """All of them; `advance` is told how many tokens were sampled, or need not be."""
        look_every = _LOOK_EVERY.get(self.slots.device.type, 8)
        steps = told = 0
        while self.running or self.left:
            self._refill()
            self._end(look=steps % look_every == 0)
            if self.running:
                self._take(self.slots.step(), self.running)
                steps += 1
            settled = len(self.found) * self.options.max_new_tokens + sum(each.tokens for each in self.running)
            advance(settled - told)
            told = settled
        rows = [self.found[i] for i in range(len(self.prompts))]
        return until_eos(pad_sequence(rows, batch_first=True, padding_value=self.options.eos_id), self.options.eos_id)

    @property
    def left(self) -> bool:
        """Whether there are responses that have not begun."""
        return bool(self.waiting or self.begun.responses)

    def _refill(self) -> None:
        """Begin responses in the free slots, as far as there are any left."""
        free = self.slots.size - len(self.running)
        if free * _REFILL_SHARE < self.slots.size:
            return
        while free and self.left:
            if not self.begun.responses:
                self._compute_prompts(free)
            assert self.begun.prompts is not None
            part = [self.begun.responses.popleft() for _ in range(min(free, len(self.begun.responses)))]
            free -= len(part)
            rows = [row for _, row in part]
            self.slots.fill(self.begun.prompts, rows)
            new = [_Running(i, self._generator(self.seeds[i])) for i, _ in part]
            self.running += new
            self._take(self.begun.prompts.scores[rows], new)

    def _compute_prompts(self, free: int) -> None:
        """Compute as many of the waiting prompts as have responses for the free slots, of about one length."""
        groups: list[list[int]] = []
        while self.waiting and sum(map(len, groups)) < free:
            if groups and len(self.prompts[self.waiting[0][0]]) < _SHORTEST * len(self.prompts[groups[0][0]]):
                break
            groups.append(self.waiting.popleft())
        computed = compute_prompts(self.policy, [self.prompts[group[0]] for group in groups])
        self.begun = _Begun(computed, deque((i, row) for row, group in enumerate(groups) for i in group))

    def _generator(self, seed: int) -> torch.Generator | None:
        return torch.Generator(self.slots.device).manual_seed(seed) if self.options.temperature > 0 else None

    def _take(self, scores: Tensor, running: list[_Running]) -> None:
        """Sample the next token of the last responses, whose scores [N, V] are given."""
        generators = [each.generator for each in running if each.generator is not None]
        if generators:
            scores = with_noise(scores, generators, self.options.temperature, self.options.top_p)
        self.slots.put(scores.argmax(dim=-1))
        for each in running:
            each.tokens += 1

    def _end(self, *, look: bool) -> None:
        """Free the slots of responses that have ended: with `look` also of those that did so with the EOS token."""
        ended = {place for place, each in enumerate(self.running) if each.tokens == self.options.max_new_tokens}
        if look and self.running and self.options.eos_id >= 0:
            found = (self.slots.sampled == self.options.eos_id).any(dim=1)
            ended |= {place for place, is_one in enumerate(found.tolist()) if is_one}
        for place in ended:
            each = self.running[place]
            self.found[each.response] = self.slots.sampled[place, -each.tokens :].clone()
        order = self.slots.free(sorted(ended))
        self.running = [self.running[place] for place in order]


class _Running:
    """A response in a slot."""

    def __init__(self, response: int, generator: torch.Generator | None) -> None:
        self.response = response
        self.generator = generator
        self.tokens = 0


class _Begun(NamedTuple):
    """Prompts that are computed, and the responses to them that have no slot yet, with the prompt's row."""

    prompts: Prompts | None
    responses: deque[tuple[int, int]]


def _by_prompt(prompts: Sequence[Tensor]) -> list[list[int]]:
    """The places of equal prompts together, the longest first."""
    ids = torch.cat(tuple(prompts)).tolist()  # one wait for an accelerator
    groups: dict[tuple[int, ...], list[int]] = {}
    begin = 0
    for place, prompt in enumerate(prompts):
        groups.setdefault(tuple(ids[begin : begin + len(prompt)]), []).append(place)
        begin += len(prompt)
    return [groups[key] for key in sorted(groups, key=lambda key: (-len(key), key))]


def _fit(policy: CausalLM) -> bool:
    """Whether a policy's scores in slots are those of a plain pass, measured once for each configuration."""
    config, weight = policy.config, next(policy.parameters())
    key = f"{config._attn_implementation} {weight.dtype} {config.to_json_string(use_diff=False)}"
    if key not in _fits:
        try:
            error = _measured(policy)
            reason = f"scores differ by {error:.2g} of their size"
            _fits[key] = error <= company_tolerance(policy)
        except Exception as error:  # each architecture that has another cache fails in its own way
            _fits[key], reason = False, reason_of(error)
        if not _fits[key]:
            log.info("a %s model samples without refilled slots: %s", config.model_type, reason)
    return _fits[key]


def _measured(policy: CausalLM) -> float:
    """Largest difference of scores in slots that are filled, moved and freed to those of plain passes."""
    config, device = policy.config.get_text_config(), next(policy.parameters()).device
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            raise TypeError(f"it has a {type(layer).__name__}")
    if rope_limits(config):
        forget_longest_row(decoder(policy.model))
    long, short = probe_of(policy.config, positions=max_positions(config), device=device).rows
    with exact_arithmetic(), float32_arithmetic(policy):
        alone = [policy.model(input_ids=row[None], use_cache=False).logits[0].float() for row in (long, short)]
        prompts = compute_prompts(policy, [long[:-3], short[:-2]])
        slots = Slots(policy, 2)
        slots.fill(prompts, [0])
        slots.put(long[-3:-2])
        found = [prompts.scores, slots.step()]
        slots.put(long[-2:-1])
        slots.fill(prompts, [1])
        slots.put(short[-2:-1])
        found.append(slots.step())
        slots.put(torch.stack([long[-1], short[-1]]))
        slots.move()
        slots.free([0])
        found.append(slots.step())
    expected = [alone[0][-4], alone[1][-3], alone[0][-3], alone[0][-2], alone[1][-2], alone[1][-1]]
    return difference(torch.cat(found).float(), torch.stack(expected))
