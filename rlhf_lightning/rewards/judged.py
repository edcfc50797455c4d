"""A language model as a reward: a rating from 1 to 10, or whether it prefers the response to a given one."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import torch
from torch import nn

from rlhf_lightning.data.examples import Message
from rlhf_lightning.data.sft import load_sft
from rlhf_lightning.data.splits import prompt_hash
from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.precision import move
from rlhf_lightning.rewards.questions import (
    comparison_question,
    parse_rating,
    parse_verdict,
    rating_question,
    read_template,
)
from rlhf_lightning.rewards.scorers import Scored, ScorerKind
from rlhf_lightning.rewards.writers import PolicyWriter, Reply, Sampling, load_writer

log = logging.getLogger(__name__)

JUDGE = "judge://"
"""Begins the name of a language model that is asked for rewards; what follows is one of `load_writer`."""
UNREADABLE = 0.0
"""The reward where no rating, or no verdict, can be read: below all others, so nothing is gained by confusing it."""


class JudgeScorer:
    """A `Scorer` that asks a language model, and takes its most likely reply.

    Without a reference the reward is the rating, 1 to 10. With one it is the share of both orders in which the judge
    prefers the response to the reference's: 0, 0.5 or 1. A reply that cannot be read counts `UNREADABLE`.

    Args:
        name: `judge://` and what `load_writer` takes.
        reference: Rows of a prompt and a response each (see `load_sft`): what responses to this prompt are compared
            with.
        chat_template: A file with the question (see `read_template`), or `builtin:short`.
        batch_size: Replies that are made at a time.
        max_new_tokens: Longest reply.
        trust_remote_code: Run code that comes with the model.

    Raises `ConfigurationError`, `DataError` or `ModelError` for what is no judge, template or reference.
    """

    kind: ScorerKind = "Custom Classifier"

    def __init__(
        self,
        name: str,
        *,
        reference: str | None = None,
        chat_template: str | None = None,
        batch_size: int = 8,
        max_new_tokens: int = 256,
        trust_remote_code: bool = False,
    ) -> None:
        self.name = name
        self.template = read_template(chat_template, "conversation", "answers")
        self.writer = load_writer(
            name.removeprefix(JUDGE),
            Sampling(max_new_tokens),
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
        )
        rows = [] if reference is None else load_sft(reference)[0]
        self.references = {prompt_hash(row.prompt): row.response for row in rows}
        parts = (self.writer.fingerprint, sorted(self.template.items()), sorted(self.references.items()))
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()
        self._said = False

    @property
    def networks(self) -> list[nn.Module]:
        """What computes its replies here; nothing where a server or a function does."""
        return [self.writer.policy] if isinstance(self.writer, PolicyWriter) else []

    def to(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Move the model there, its weights in `dtype` where one is given."""
        for network in self.networks:
            move(network, device, dtype)

    def __call__(
        self,
        prompts: Sequence[Sequence[Message]],
        responses: Sequence[str],
        ended: Sequence[bool] | None = None,
    ) -> list[Scored]:
        """As `Scorer`. Raises `ModelError` for a prompt without a reference."""
        both = list(zip(prompts, responses, strict=True))
        questions = [question for each in both for question in self._questions(*each)]
        turns = [[{"role": "user", "content": question}] for question in questions]
        replies = self.writer(turns, [0] * len(turns))
        rewards = [self._reward(reply, place % 2) for place, reply in enumerate(replies)]
        unread = sum(reward is None for reward in rewards)
        if unread and not self._said:
            self._said = True
            words = "%s: %d of %d replies cannot be read; each counts %g"
            log.warning(words, self.name, unread, len(rewards), UNREADABLE)
        each = len(questions) // max(1, len(both))
        known = [UNREADABLE if reward is None else reward for reward in rewards]
        means = [sum(known[start : start + each]) / each for start in range(0, len(known), each)]
        return [Scored(mean, len(text), False) for mean, text in zip(means, responses, strict=True)]

    def _questions(self, prompt: Sequence[Message], response: str) -> list[str]:
        if not self.references:
            return [rating_question(prompt, response, **self.template)]
        if (other := self.references.get(prompt_hash(prompt))) is None:
            raise ModelError(f"{self.name}: the reference has no response to {prompt[-1]['content'][:60]!r}")
        return [comparison_question(prompt, pair, **self.template) for pair in ((response, other), (other, response))]

    def _reward(self, reply: Reply | None, order: int) -> float | None:
        if reply is None or not reply.ended:
            return None
        if not self.references:
            return parse_rating(reply.text)
        verdict = parse_verdict(reply.text)
        return None if verdict is None else float(verdict == "AB"[order])
