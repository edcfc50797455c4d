"""How far a policy has moved from its reference, along its own responses.

N response tokens of some rows together, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.batches import like_together
from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.examples import PromptExample
from rlhf_lightning.evaluation.generate import Response
from rlhf_lightning.functional.kl import exact_kl, kl_estimate
from rlhf_lightning.functional.logprobs import gather_logprobs
from rlhf_lightning.models.causal_lm import CausalLM, output_layer
from rlhf_lightning.rewards.scorers import EncodedRow, padded

_CHUNK = 512
"""Response tokens whose logits exist at a time, of both models."""


@dataclass(frozen=True)
class ResponseKL:
    """How far the policy is from the reference along one response, in nats, sums over its tokens."""

    tokens: int
    exact: float
    """Sum of KL(policy, reference) over the whole vocabulary in each state that the response visits."""
    k1: float
    """Sum of log p - log p_ref of the response's own tokens."""


@torch.no_grad()
def kl_of_responses(
    policy: CausalLM,
    reference: CausalLM,
    chat_format: ChatFormat,
    prompts: Sequence[PromptExample],
    responses: Sequence[Response],
    *,
    batch_size: int = 8,
) -> list[ResponseKL]:
    """The KL of the policy from the reference along each of its responses, whatever the batch size.

    The states are those of the responses' own ids, at temperature 1, with a log-softmax in float32; both models are in
    eval mode. The sum of `exact` is an unbiased estimate of the KL of whole responses, as k1's is, where the policy
    itself sampled them at temperature 1.
    """
    encoded = chat_format.encode_prompts([chat_format.generation_text(prompt.prompt) for prompt in prompts])
    by_id = {prompt.example_id: ids for prompt, ids in zip(prompts, encoded, strict=True)}
    rows = [EncodedRow(by_id[response.prompt_id], response.ids, False) for response in responses]
    order = like_together([row.prompt for row in rows], [len(row.prompt) + len(row.response) for row in rows])
    found: dict[int, ResponseKL] = {}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        exact, k1 = _token_kl(policy, reference, *padded([rows[i] for i in part], chat_format.pad_id).text)
        lengths = [len(rows[i].response) for i in part]
        for i, its_exact, its_k1 in zip(part, exact.split(lengths), k1.split(lengths), strict=True):
            found[i] = ResponseKL(len(rows[i].response), its_exact.double().sum().item(), its_k1.double().sum().item())
    return [found[i] for i in range(len(rows))]


def _token_kl(
    policy: CausalLM, reference: CausalLM, ids: Tensor, mask: Tensor, response_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact KL and k1 at each response token, row by row, both [N]."""
    device = next(policy.parameters()).device
    rows = ids.to(device), mask.to(device), response_mask.to(device)
    states, others = policy.states(*rows), reference.states(*rows)
    layer, other_layer = _float_layer(policy), _float_layer(reference)
    exact, k1 = [], []
    for start in range(0, len(states.targets), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        logits = _logits(states.hidden[chunk], *layer, policy.temperature)
        other_logits = _logits(others.hidden[chunk], *other_layer, reference.temperature)
        exact.append(exact_kl(logits, other_logits))
        own, its = (gather_logprobs(each, states.targets[chunk]) for each in (logits, other_logits))
        k1.append(kl_estimate(own, its, estimator="k1"))
    return torch.cat(exact).cpu(), torch.cat(k1).cpu()


def _float_layer(model: CausalLM) -> tuple[Tensor, Tensor | None]:
    """The output layer, float32 at least."""
    weight, bias = output_layer(model.model)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[n, V], float32 at least."""
    return F.linear(hidden.to(weight.dtype), weight, bias) / temperature
