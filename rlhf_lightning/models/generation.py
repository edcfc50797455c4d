"""Replies of a policy to prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_lightning.models.causal_lm import CausalLM


@torch.no_grad()
def greedy_replies(
    policy: CausalLM, prompts: Sequence[Tensor], *, max_new_tokens: int, terminator_id: int, pad_id: int
) -> list[Tensor]:
    """The most likely continuation of each prompt, token by token.

    `prompts` are 1-D int64 ids of any lengths, on the policy's device. Each reply is 1-D int64 and ends with the
    terminator, or has `max_new_tokens` ids. Nothing is drawn at random, and the policy's mode is as it was.
    """
    training, model = policy.training, policy.model
    policy.eval()
    replies = []
    for prompt in prompts:  # one by one: a handful of them, and no padding that could matter
        ids = model.generate(
            input_ids=prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            eos_token_id=terminator_id,
            pad_token_id=pad_id,
        )
        replies.append(ids[0, len(prompt) :])
    policy.train(training)
    return replies
