"""A policy's weights while it samples: adapters merged, and cast to half precision once instead of at every token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import nn

_SHARE_OF_FREE_MEMORY = 0.5
"""Adapters stay apart where the copy of the weights below them would take more."""


@contextmanager
def sampling_weights(model: nn.Module) -> Iterator[None]:
    """Inside, forward passes without gradients are faster and mean the same; the weights must not change.

    After it every weight is the very tensor that it was.
    """
    with torch.no_grad(), _adapters_merged(model), _cast_once(model):
        yield


@contextmanager
def _adapters_merged(model: nn.Module) -> Iterator[None]:
    """Inside, weights have their adapters' part added, in a copy: the weights themselves are put back.

    Where autocast computes in half precision, the sum is rounded as other weights are.
    """
    layers = [layer for layer in _adapted_layers(model) if not layer.disable_adapters and not layer.merged]
    kept = [(weight, weight.data) for layer in layers for weight in layer.get_base_layer().parameters()]
    if not all(_can_be_merged(data) for _, data in kept) or not _fits_in_memory([data for _, data in kept]):
        layers, kept = [], []
    try:
        for weight, data in kept:
            weight.data = data.clone()
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in layers:
            if layer.merged:
                layer.unmerge()  # by a subtraction, which rounds
        for weight, data in kept:
            weight.data = data


def _adapted_layers(model: nn.Module) -> list[Any]:
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


def _can_be_merged(weight: torch.Tensor) -> bool:
    """Not into 4 bits, nor into halves that are computed with in float32."""
    kind = weight.device.type
    in_half = torch.is_autocast_enabled(kind) and weight.dtype == torch.get_autocast_dtype(kind)
    return weight.dtype == torch.float32 or in_half


def _fits_in_memory(tensors: list[torch.Tensor]) -> bool:
    wanted = sum(tensor.nbytes for tensor in tensors)
    if tensors and tensors[0].is_cuda:
        device = tensors[0].device
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return wanted <= _SHARE_OF_FREE_MEMORY * (torch.cuda.mem_get_info(device)[0] + unused)
    return wanted <= _SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available


@contextmanager
def _cast_once(model: nn.Module) -> Iterator[None]:
    """Inside, autocast keeps the halves that it makes of weights, those of frozen ones too.

    Lightning's autocast keeps none, and torch's only those of weights that are trained.
    """
    kind = next(model.parameters()).device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    frozen = [weight for weight in model.parameters() if weight.is_floating_point() and not weight.requires_grad]
    torch.clear_autocast_cache()  # of a context around this one: its weights may have changed since
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=True):
            yield
    finally:
        torch.clear_autocast_cache()
        for weight in frozen:
            weight.requires_grad_(False)
