"""Responses of a policy to prompts: the most likely ones, and sampled ones that do not depend on their batch.

V vocabulary. Prompts and responses are ragged: 1-D int64 ids, never padded tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.causal_lm import CausalLM, decoder, inner_model
from rlhf_lightning.models.configuration import max_positions, rope_limits
from rlhf_lightning.models.precision import float32_arithmetic
from rlhf_lightning.models.row_check import computes_in_half, difference, exact_arithmetic, probe_of
from rlhf_lightning.models.states import forget_longest_row

_NEW_TOKENS = 2
"""Of a probe: the first follows a prompt, the second is made from what the model kept of it."""
_ROUNDING, _ROUNDING_IN_HALF = 1e-3, 0.1
"""Share of the scores of a probe that rounding may account for, by the weights' dtype."""
_checked: set[str] = set()
"""Configurations whose responses were found not to change with their company."""


class Sampled(NamedTuple):
    """A sampled response of L tokens."""

    ids: Tensor
    """[L] int64, its EOS included."""
    logprobs: Tensor | None = None
    """[L] float32, in nats, as the engine says that it sampled them, where that is not by the policy itself."""


class RolloutEngine(Protocol):
    """What samples responses. An engine may be another program with its own copy of the weights."""

    def synchronize(self, policy: CausalLM) -> None:
        """Take the policy's weights as they are now; called by one process, before responses are sampled with them."""
        ...

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
        """One response to each prompt, on the prompt's device.

        Each is sampled from softmax(logits / temperature), with `top_p` below 1 from the tokens of its `nucleus`
        alone, and ends with the EOS token or has `max_new_tokens` ids. The same seed gives the same response.
        Temperature 0 takes the most likely token.
        """
        ...


class TransformersEngine:
    """Samples responses with transformers' `generate`, in batches of prompts of like length.

    Args:
        batch_size: Responses that are made at a time.
    """

    def __init__(self, batch_size: int = 64) -> None:
        self.batch_size = batch_size

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
        found: dict[int, Sampled] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        options = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "pad_id": pad_id}
        with ready_to_generate(policy):
            if self.batch_size > 1 and len(prompts) > 1:
                _check_company(policy)
            for part in self._batches(policy, order, [len(prompt) + max_new_tokens for prompt in prompts]):
                drawing = _Drawing([seeds[i] for i in part], temperature, top_p) if temperature > 0 else None
                for i, response in zip(
                    part, _generate(policy, [prompts[i] for i in part], drawing, **options), strict=True
                ):
                    found[i] = Sampled(response)
        return [found[i] for i in range(len(prompts))]

    def _batches(self, policy: CausalLM, order: list[int], lengths: list[int]) -> Iterator[list[int]]:
        """Parts of the prompts; one that may grow beyond a length that changes the model is a part of its own."""
        limit = min((limit for _, limit in rope_limits(policy.config)), default=None)
        together = [place for place in order if limit is None or lengths[place] <= limit]
        for start in range(0, len(together), self.batch_size):
            yield together[start : start + self.batch_size]
        for place in order:
            if limit is not None and lengths[place] > limit:
                yield [place]


def seed_of(*parts: object) -> int:
    """A seed of 63 bits for what the parts name, such as a run's seed, a prompt and the number of the response."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class _Drawing:
    """Turns the most likely token into a sampled one: logits / temperature plus Gumbel noise, of which each row has its
    own, so that a response does not depend on the rows beside it.

    Gumbel 1954; Maddison et al. 2014 (arXiv 1411.0030), section 2.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        self.seeds = seeds
        self.temperature = temperature
        self.top_p = top_p
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.generators:
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        return with_noise(scores, self.generators, self.temperature, self.top_p)


def with_noise(scores: Tensor, generators: Sequence[torch.Generator], temperature: float, top_p: float = 1.0) -> Tensor:
    """Scores [R, V] whose largest is a sample of softmax(scores / temperature), by a generator for each row.

    With `top_p` below 1 it is one of the `nucleus` of that distribution.
    """
    noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    scores = scores.float() / temperature
    return (scores if top_p == 1 else nucleus(scores, top_p)) - noise.log()


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Scores [R, V] with -inf outside of the fewest most likely tokens whose softmax adds up to `top_p` or more.

    Of equally likely tokens those of lower ids come first. Holtzman et al. 2020 (arXiv 1904.09751), section 3.1.
    """
    ordered, places = scores.sort(dim=-1, descending=True, stable=True)
    shares = ordered.softmax(dim=-1)
    outside = shares.cumsum(dim=-1) - shares >= top_p
    outside[:, 0] = False
    return scores.masked_fill(outside.scatter(-1, places, outside), -torch.inf)


def _generate(
    policy: CausalLM,
    prompts: Sequence[Tensor],
    drawing: Callable[[Tensor, Tensor], Tensor] | None,
    *,
    max_new_tokens: int,
    eos_id: int,
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
        eos_token_id=eos_id if eos_id >= 0 else None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    if rope_limits(policy.config):
        forget_longest_row(decoder(policy.model))
    out = policy.model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        generation_config=settings,
        logits_processor=LogitsProcessorList([drawing] if drawing else []),
    )[:, width:]
    return until_eos(out, eos_id)


def until_eos(ids: Tensor, eos_id: int) -> list[Tensor]:
    """Each row of ids [R, S] up to its first EOS token, that included."""
    ended = ids == eos_id
    first = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, ids.shape[1])
    return [row[:length] for row, length in zip(ids, first.tolist(), strict=True)]


def _check_company(policy: CausalLM) -> None:
    """Refuse a policy whose responses change with the other prompts of a batch, measured once for each configuration.

    Some recurrent layers let padding into their state while text is generated, though not in a plain pass. The scores
    of two tokens after a padded prompt are compared with those after the prompt alone. Raises `ModelError`.
    """
    config, weight = policy.config, next(policy.parameters())
    key = config.to_json_string(use_diff=False)
    if key in _checked:
        return
    positions = max_positions(config.get_text_config())
    room = None if positions is None else positions - _NEW_TOKENS
    rows = probe_of(config, positions=room, device=weight.device).rows
    same = int(rows[0][0])
    with exact_arithmetic(), float32_arithmetic(policy):
        batch = _scores_of_probe(policy, rows, same)
        alone = torch.cat([_scores_of_probe(policy, (row,), same) for row in rows])
    error = max(difference(*pair) for pair in zip(batch, alone, strict=True))
    if not error <= company_tolerance(policy):
        raise ModelError(
            f"the responses of a {config.model_type} model change with the other prompts (scores by {error:.2g} "
            "of their size); use another model, or generate one response at a time"
        )
    _checked.add(key)


def company_tolerance(policy: CausalLM) -> float:
    """The share of a policy's scores that rounding may account for."""
    in_half = next(policy.parameters()).dtype != torch.float32 or computes_in_half(policy.model)
    return _ROUNDING_IN_HALF if in_half else _ROUNDING


def _scores_of_probe(policy: CausalLM, prompts: Sequence[Tensor], same: int) -> Tensor:
    """Scores [R, 2, V] after each prompt, and after the token `same` behind it."""
    scores: list[Tensor] = []

    def keep(_: Tensor, now: Tensor) -> Tensor:
        scores.append(now.float())
        forced = torch.full_like(now, -torch.inf)
        forced[:, same] = 0
        return forced

    _generate(policy, prompts, keep, max_new_tokens=_NEW_TOKENS, eos_id=-1, pad_id=same)
    return torch.stack(scores, dim=1)


@contextmanager
def ready_to_generate(policy: CausalLM) -> Iterator[None]:
    """Eval mode, and none of the model's own settings: a repetition penalty or top-p of its generation_config.json
    would apply to `generate` whatever it is given, and the responses would be sampled from another distribution.
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
