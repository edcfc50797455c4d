"""Log-probabilities of tokens and responses, in nats. Every log-softmax is taken in float32 (or float64).

B sequences, T padded tokens, N flat tokens, V vocabulary, H hidden. Targets are token ids, already shifted:
the logits of position t belong to the target that stands in position t.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rlhf_lightning.functional.reductions import masked_mean
from rlhf_lightning.functional.shapes import (
    as_mask,
    at_least_float32,
    check_layout,
    check_positive,
    check_same_shape,
    check_token_ids,
)

_SPREAD = 2.0**14
"""float16 ends at 6e-8, where many a token's probability is smaller; times this it ends at 4e-12, and 1 still fits."""


def gather_logprobs(logits: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the targets, float32, [...] for logits [..., V] and targets [...].

    ValueError: targets not the shape of logits without V, targets not integer, temperature <= 0. A target
    outside [0, V), such as a label of -100, is refused by torch: put a valid id there and mask afterwards.
    """
    check_same_shape(**{"logits[..., 0]": logits[..., 0], "targets": targets})
    check_token_ids(targets)
    check_positive(temperature=temperature)
    scaled = at_least_float32(logits)
    if temperature != 1:  # a division by 1 would copy all of [..., V]
        scaled = scaled / temperature
    logprobs = torch.log_softmax(scaled, dim=-1)
    return logprobs.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)


def sequence_logprobs(token_logprobs: Tensor, mask: Tensor, *, average: bool = False) -> Tensor:
    """Log-probability of each response, float32, [B]: the sum over its tokens, with `average` their mean.

    Both inputs are [B, T]; True marks the response tokens, EOS included. The sum over no tokens is 0, the
    log-prob of the empty text; their mean does not exist.
    ValueError: shapes, float mask, and with `average` a row without tokens (on an accelerator: NaN).
    """
    check_layout(token_logprobs=(token_logprobs, "B T"), mask=(mask, "B T"))
    if average:
        return masked_mean(token_logprobs, mask, dim=1)
    return torch.where(as_mask(mask), at_least_float32(token_logprobs), 0).sum(dim=1)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> Tensor:
    """`gather_logprobs(hidden @ weight.T + bias, targets)`, float32, [N]; the [N, V] logits never exist.

    hidden [N, H], weight [V, H], targets [N], bias [V]. Logits exist for `chunk_size` tokens at a time, so
    chunk_size * V * 4 bytes instead of N * V * 4. The backward pass makes them again, 8 H V FLOP per token instead of
    6, unless they fit into one chunk, and are kept. Where weight and bias are frozen it makes nothing again: 4 H V.
    Products of half-precision operands are summed and returned in float32, weight gradients are summed over the chunks
    in float32. Under autocast the operands are rounded as `nn.Linear` would round them. Not differentiable twice.
    ValueError: shapes, targets not integer, temperature <= 0, chunk_size < 1.
    """
    shapes = {"hidden": (hidden, "N H"), "weight": (weight, "V H"), "targets": (targets, "N")}
    check_layout(**shapes if bias is None else shapes | {"bias": (bias, "V")})
    check_token_ids(targets)
    check_positive(temperature=temperature, chunk_size=chunk_size)
    options = temperature, int(chunk_size), _operand_dtype(hidden, weight)
    return _LinearLogprobs.apply(hidden, weight, bias, targets.long(), *options)


@torch.no_grad()
def linear_argmax(hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, chunk_size: int = 1024) -> Tensor:
    """`(hidden @ weight.T + bias).argmax(-1)`, the most likely token, [N] int64; the [N, V] logits never exist.

    hidden [N, H], weight [V, H], bias [V]; rounding as in `linear_logprobs`. Of equal logits the first counts.
    ValueError: shapes, chunk_size < 1.
    """
    shapes = {"hidden": (hidden, "N H"), "weight": (weight, "V H")}
    check_layout(**shapes if bias is None else shapes | {"bias": (bias, "V")})
    check_positive(chunk_size=chunk_size)
    operand_dtype = _operand_dtype(hidden, weight)
    hidden, weight = hidden.to(operand_dtype), weight.to(operand_dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [_chunk_logits(hidden[rows], weight, bias, 1.0).argmax(-1) for rows in _chunks(hidden, int(chunk_size))]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device=hidden.device)


def linear_entropies(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0, chunk_size: int = 1024
) -> Tensor:
    """Entropy of softmax((hidden @ weight.T + bias) / temperature), nats, float32, [N]; gradients go through.

    hidden [N, H], weight [V, H], bias [V]; the logits exist for `chunk_size` tokens at a time, and are made again in
    the backward pass. ValueError: shapes, temperature <= 0, chunk_size < 1.
    """
    shapes = {"hidden": (hidden, "N H"), "weight": (weight, "V H")}
    check_layout(**shapes if bias is None else shapes | {"bias": (bias, "V")})
    check_positive(temperature=temperature, chunk_size=chunk_size)
    hidden, weight = (each.to(_operand_dtype(hidden, weight)) for each in (hidden, weight))
    parts = [
        checkpoint(_entropies, hidden[rows], weight, bias, temperature, use_reentrant=False)
        for rows in _chunks(hidden, int(chunk_size))
    ]
    return torch.cat(parts) if parts else hidden.new_empty(0, dtype=_sum_dtype(hidden.dtype))


def _entropies(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = at_least_float32(F.linear(hidden, weight, None if bias is None else bias.to(weight.dtype)))
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


class _LinearLogprobs(torch.autograd.Function):
    """`gather_logprobs` chunk by chunk, and its gradients: d logprob / d logits = (one-hot - softmax) / temperature.

    With a frozen weight all is made in the forward pass, since the gradient of a token's hidden state is the one number
    that comes back times a row that is known there. Else the logits are made again, unless they are a single chunk.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, operand_dtype):
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        frozen = needs_hidden and not (needs_weight or needs_bias)
        ctx.options, ctx.hidden_dtype = (temperature, chunk_size, operand_dtype), hidden.dtype
        originals = hidden, weight, bias, targets
        hidden, weight = hidden.to(operand_dtype), weight.to(operand_dtype)
        logprobs = torch.empty(hidden.shape[0], dtype=_sum_dtype(operand_dtype), device=hidden.device)
        slopes = torch.empty_like(hidden, dtype=logprobs.dtype) if frozen else None
        only = None
        # Autocast would take the float32 products back to half precision.
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(hidden, chunk_size):
                logits = _chunk_logits(hidden[rows], weight, bias, temperature)
                logprobs[rows] = gather_logprobs(logits, targets[rows])
                if slopes is not None:
                    slopes[rows] = _slopes(logits, targets[rows], weight, temperature)
                elif (needs_weight or needs_bias) and hidden.shape[0] <= chunk_size:
                    only = logits  # as large as what the backward pass begins with anyhow
        ctx.frozen = frozen
        ctx.save_for_backward(*((slopes,) if frozen else (*originals, only)))
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs):
        if ctx.frozen:
            (slopes,) = ctx.saved_tensors
            return (slopes * grad_logprobs.unsqueeze(1)).to(ctx.hidden_dtype), *[None] * 6
        hidden, weight, bias, targets, only = ctx.saved_tensors
        temperature, chunk_size, operand_dtype = ctx.options
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        sum_dtype = _sum_dtype(operand_dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=sum_dtype) if needs_bias else None
        hidden, weight = hidden.to(operand_dtype), weight.to(operand_dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(hidden, chunk_size):
                logits = only if only is not None else _chunk_logits(hidden[rows], weight, bias, temperature)
                scale = (grad_logprobs[rows] / temperature).unsqueeze(1)
                grad_logits = _minus_softmax(logits, targets[rows], scale)
                if needs_hidden:
                    grad_hidden[rows] = _matmul(grad_logits, weight)
                if needs_weight:
                    grad_weight += _matmul(grad_logits.T, hidden[rows])
                if needs_bias:
                    grad_bias += grad_logits.sum(dim=0)
        # Autograd rounds each of them, once, to the dtype of its tensor.
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _minus_softmax(logits: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """scale * (one-hot(targets) - softmax(logits)), [N, V] for logits [N, V], targets [N] and scale [N, 1]."""
    return torch.softmax(logits, dim=-1).mul_(-scale).scatter_add_(1, targets.unsqueeze(1), scale)


def _slopes(logits: Tensor, targets: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """d logprob / d hidden, [N, H]: (one-hot - softmax) @ weight / temperature."""
    spread = _SPREAD if weight.dtype == torch.float16 else 1.0
    scale = torch.full_like(logits[:, :1], spread)
    return _matmul(_minus_softmax(logits, targets, scale), weight).div_(spread * temperature)


def _operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype the operands of the product are rounded to: their own, or autocast's (not for float64)."""
    device, dtype = hidden.device.type, torch.promote_types(hidden.dtype, weight.dtype)
    autocast = dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else dtype


def _sum_dtype(operand_dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(operand_dtype, torch.float32)


def _chunks(hidden: Tensor, chunk_size: int) -> Iterator[slice]:
    return (slice(start, start + chunk_size) for start in range(0, hidden.shape[0], chunk_size))


def _chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = _matmul(hidden, weight.T)
    if bias is not None:
        logits += bias
    return logits.div_(temperature)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, summed and returned in float32 (float64 for float64), whatever the operands are.

    On CUDA half-precision operands keep the tensor cores busy, and `out_dtype` hands out their float32 sums
    (torch >= 2.8); elsewhere torch has no such product, and the operands are widened instead.
    """
    dtype = _sum_dtype(right.dtype)
    if right.is_cuda and right.dtype != dtype:
        return torch.mm(left.to(right.dtype), right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)
