"""Responses sampled from a policy, scored, with the log-probs of policy and reference: what online methods learn from.

B responses, R of them in a forward pass, T tokens of the longest row, S tokens of the longest response, N response
tokens of all rows together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_lightning.batches import ModelInputs, collate_rows, like_together
from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.examples import Message
from rlhf_lightning.errors import ModelError, TrainingError
from rlhf_lightning.functional.kl import kl_estimate
from rlhf_lightning.functional.logprobs import linear_entropies
from rlhf_lightning.functional.reductions import scatter_to_mask
from rlhf_lightning.models.causal_lm import CausalLM, ResponseLogprobs, ResponseStates, output_layer
from rlhf_lightning.models.generation import RolloutEngine
from rlhf_lightning.models.reward_network import RewardHead
from rlhf_lightning.models.value_network import ValueNetwork
from rlhf_lightning.rewards.source import Rewards, RewardSource, check_scores, first_few


class Reference(Protocol):
    """A model that a policy is compared with."""

    def __call__(self, policy: CausalLM, *rows: Tensor) -> ResponseLogprobs:
        """Its log-probs of response tokens; `rows` are what `CausalLM.forward` takes."""
        ...


class Responses(NamedTuple):
    """B responses as they were sampled."""

    rows: list[Tensor]
    """Token ids of prompt and response, 1-D int64 each."""
    prompt_lengths: list[int]
    ended: Tensor
    """[B] bool, True where the response ended with its EOS token, False where it reached `max_new_tokens`."""
    engine_logprobs: list[Tensor] | None = None
    """Of each response's tokens, as an engine gave them that is not the policy itself; float32."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, EOS included, [B] int64."""
        return torch.tensor([len(row) - start for row, start in zip(self.rows, self.prompt_lengths, strict=True)])

    def select(self, which: Sequence[int]) -> Responses:
        """Those at some positions, without `engine_logprobs`."""
        return Responses(
            [self.rows[i] for i in which],
            [self.prompt_lengths[i] for i in which],
            self.ended[torch.as_tensor(which)],
        )

    def order(self, which: Sequence[int]) -> list[int]:
        """Some positions in the order in which to divide them into batches (see `like_together`)."""
        prompts = _ids([self.rows[i][: self.prompt_lengths[i]] for i in which])
        return [which[place] for place in like_together(prompts, [len(self.rows[i]) for i in which])]

    def texts(self, chat_format: ChatFormat) -> list[str]:
        """Each response as text (see `ChatFormat.reply_text`)."""
        ids = zip(_ids(self.rows), self.prompt_lengths, strict=True)
        return [chat_format.reply_text(row[:start], row[start:]) for row, start in ids]


def _ids(rows: Sequence[Tensor]) -> list[list[int]]:
    """The token ids of rows, for which a GPU is waited for once."""
    ids = iter(torch.cat(list(rows)).tolist()) if rows else iter(())
    return [list(itertools.islice(ids, len(row))) for row in rows]


class TokenNumbers(NamedTuple):
    """Numbers of response tokens. A response begins in column 0; outside of `mask` everything is 0. [B, S] each."""

    mask: Tensor
    """bool, True on the tokens of a response, its EOS included."""
    logprobs: Tensor
    """float32, in nats, of the policy that sampled the responses, computed again by a forward pass."""
    reference: Tensor
    """float32, in nats; 0 without a reference."""
    values: Tensor
    """float32, of the states before each token; 0 without a value model."""

    def kl(self, estimator: Literal["k1", "k3"]) -> Tensor:
        """The KL from the reference at each token, in nats, [B, S]; 0 outside of the mask."""
        return torch.where(self.mask, kl_estimate(self.logprobs, self.reference, estimator=estimator), 0)


class Experience(NamedTuple):
    """A rollout: B responses with their scores and the numbers of their tokens."""

    responses: Responses
    scores: Tensor
    """[B] float32, the weighted sum of what the reward source gave."""
    tokens: TokenNumbers
    rewards: Mapping[str, Tensor]
    """Every reward by itself, by its name, [B] each."""
    spreads: Mapping[str, Tensor]
    """Of each of them that comes of an ensemble, by its name, the standard deviation over the heads, [B]."""

    def numbers(self) -> dict[str, Tensor]:
        """What is logged of each response, [B]; each is defined in docs/metrics.md under its name."""
        mask, device = self.tokens.mask, self.scores.device
        several = {f"reward/{name}": values for name, values in self.rewards.items()} if len(self.rewards) > 1 else {}
        several |= {spread_name(name, several=bool(several)): values for name, values in self.spreads.items()}
        return several | {
            "reward": self.scores,
            "kl": self.tokens.kl("k1").sum(dim=1),
            "kl_k3": self.tokens.kl("k3").sum(dim=1),
            "response_length": self.responses.lengths.float().to(device),
            "missing_eos": (~self.responses.ended).float().to(device),
            "entropy": torch.where(mask, -self.tokens.logprobs, 0).sum(dim=1) / mask.sum(dim=1),
        }

    def engine_log_ratio(self) -> Tensor | None:
        """The policy's log-probs of the N tokens less an engine's own, in nats, [N]; None without any."""
        given, mask = self.responses.engine_logprobs, self.tokens.mask
        return None if given is None else self.tokens.logprobs[mask] - torch.cat(given).to(mask.device)

    def engine_mismatch(self) -> Tensor | None:
        """How far an engine's own log-probs of the N tokens are from the policy's, in nats, [N]; None without any."""
        ratio = self.engine_log_ratio()
        return None if ratio is None else ratio.abs()


def spread_name(reward: str, *, several: bool) -> str:
    """Under which the spread of an ensemble is logged, that may be one of `several` rewards."""
    return f"reward_spread/{reward}" if several else "reward_spread"


@dataclass(frozen=True)
class Rollouts:
    """Samples responses of a policy, scores them, and computes their log-probs, whoever learns from them.

    Args:
        policy: The policy that samples.
        chat_format: Of its tokenizer.
        engine: What samples: the policy itself, or another program with its weights.
        max_new_tokens: Longest response.
        micro_batch_size: Rows of a forward pass without gradients; changes no result.
        scorer: Gives the scores.
        reference: Gives the reference's log-probs.
        value: Gives the values: a network of its own, or a head on the policy's hidden states.
        arithmetic: A context for every pass without gradients, such as a Trainer's mixed precision.
    """

    policy: CausalLM
    chat_format: ChatFormat
    engine: RolloutEngine
    max_new_tokens: int
    micro_batch_size: int = 8
    scorer: RewardSource | None = None
    reference: Reference | None = None
    value: ValueNetwork | RewardHead | None = None
    arithmetic: Callable[[], AbstractContextManager] = nullcontext

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Tensor], seeds: Sequence[int], *, temperature: float, top_p: float = 1.0
    ) -> Responses:
        """One response to each of B prompts (1-D int64), which may be repeated; `top_p`: see `RolloutEngine.draw`.

        A response depends on its prompt and its seed, not on its batch.
        """
        with self.arithmetic():
            sampled = self.engine.draw(
                self.policy,
                prompts,
                seeds,
                max_new_tokens=self.max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                eos_id=self.chat_format.eos_id,
                pad_id=self.chat_format.pad_id,
            )
        logprobs = [response.logprobs for response in sampled if response.logprobs is not None]
        return Responses(
            [torch.cat([prompt, response.ids]) for prompt, response in zip(prompts, sampled, strict=True)],
            [len(prompt) for prompt in prompts],
            (torch.stack([response.ids[-1] for response in sampled]) == self.chat_format.eos_id).cpu(),
            logprobs if len(logprobs) == len(sampled) else None,
        )

    @torch.no_grad()
    def score(self, responses: Responses, prompts: Sequence[Sequence[Message]], example_ids: Sequence[str]) -> Rewards:
        """What the reward source gives, on the responses' device; it is shown an end only where there is one.

        `prompts` are the conversations that the responses answer, `example_ids` their names. Raises `TrainingError`
        naming the prompts for a score that is not finite, and when a function raises or gives too few.
        """
        assert self.scorer is not None
        try:
            with self.arithmetic():
                rewards = self.scorer.each(prompts, responses.texts(self.chat_format), responses.ended.tolist())
        except ModelError as error:
            raise TrainingError(f"model.reward_model: {error}, asked about {first_few(example_ids)}") from error
        for scores, scorer in zip(rewards.scores.unbind(dim=1), self.scorer.scorers, strict=True):
            check_scores(scores, example_ids, scorer.name)
        device = responses.rows[0].device
        spreads = {name: values.to(device) for name, values in rewards.spreads.items()}
        return Rewards(rewards.scores.to(device), spreads)

    @torch.no_grad()
    def logprobs(self, responses: Responses, *, values: bool = True) -> TokenNumbers:
        """Log-probs of policy and reference and, with `values`, the values of the responses' tokens."""
        device, lengths = responses.rows[0].device, responses.lengths
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
        numbers = TokenNumbers(mask, *(torch.zeros(mask.shape, device=device) for _ in range(3)))
        order = responses.order(range(len(responses.rows)))
        for start in range(0, len(order), self.micro_batch_size):
            part = order[start : start + self.micro_batch_size]
            with self.arithmetic():
                rows = self.padded(responses.select(part))
                own, estimates, _ = self.forward(rows, values=values)
                reference = None if self.reference is None else self.reference(self.policy, *rows.text)
            others = None if reference is None else reference.tokens[reference.mask]
            for target, flat in zip(numbers[1:], (own, others, estimates), strict=True):
                if flat is not None:
                    target[part] = scatter_to_mask(flat.float(), mask[part])
        return numbers

    def padded(self, responses: Responses) -> ModelInputs:
        """Rows for `forward`, on the responses' device."""
        return collate_rows(responses.rows, responses.prompt_lengths, pad_id=self.chat_format.pad_id)

    def forward(
        self, rows: ModelInputs, *, values: bool = True, entropies: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs, values and, with `entropies`, entropies of the N response tokens of R rows, [N] each, in one pass.

        Gradients go through. The values are None where they are not asked for, or nothing gives them.
        """
        states = self.policy.states(*rows.text)
        flat = self.policy.token_logprobs(states)
        spread = self._entropies(states) if entropies else None
        if self.value is None or not values:
            return flat, None, spread
        estimates = self.value(*rows.text) if isinstance(self.value, ValueNetwork) else self.value(states.hidden)
        return flat, estimates, spread

    def _entropies(self, states: ResponseStates) -> Tensor:
        """Of the policy at each of the N positions, in nats, [N]."""
        weight, bias = output_layer(self.policy.model)
        return linear_entropies(states.hidden, weight, bias=bias, temperature=self.policy.temperature)
