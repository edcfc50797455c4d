"""Arithmetic in float32 of models that mixed precision would compute in halves."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

HALVES = (torch.float16, torch.bfloat16)


_float32: ContextVar[bool] = ContextVar("float32", default=False)


def in_float32() -> bool:
    """Whether this is inside of `float32_arithmetic`."""
    return _float32.get()


@contextmanager
def float32_arithmetic(*models: nn.Module | None) -> Iterator[None]:
    """Inside, forward passes of the models compute in float32; for passes without gradients.

    Autocast is off, so that float32 weights give what they give without mixed precision. Weights that are held as
    halves, as DeepSpeed holds them, are widened block by block while they are used; they stay rounded. Those of 4 bits
    are dequantized to float32.
    """
    present = [model for model in models if model is not None]
    with ExitStack() as stack:
        stack.callback(_float32.reset, _float32.set(True))
        stack.enter_context(exact_products())
        for device_type in {parameter.device.type for model in present for parameter in model.parameters()}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        for model in present:
            stack.enter_context(_widened(model))
            stack.enter_context(_dequantized_to_float32(model))
            stack.enter_context(_without_flash(model))
        yield


def allow_tf32(device: torch.device, precision: str) -> bool:
    """Let float32 products of a run be TF32 on a CUDA device (10 bits of mantissa, 8 of exponent), unless the user
    chose already; whether it did so. What is measured stays exact (`float32_arithmetic`).

    Args:
        device: That of the run.
        precision: The Trainer's; under any but `32-true` products are halves anyway.
    """
    chosen = "NVIDIA_TF32_OVERRIDE" in os.environ or torch.get_float32_matmul_precision() != "highest"
    if device.type != "cuda" or precision != "32-true" or chosen:
        return False
    torch.set_float32_matmul_precision("high")
    return True


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside, products of float32 matrices are float32 on an accelerator, not TF32 with its 10 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def widened_at_once(model: nn.Module) -> int:
    """Most weights that are float32 at a time in a forward pass of a model whose weights are halves."""
    (_, beside), *parts = _parts(model, _token_embeddings(model))
    outside = set(beside)
    blocks = [sum(each.numel() for each in parameters if each not in outside) for _, parameters in parts]
    return sum(parameter.numel() for parameter in beside) + max(blocks, default=0)


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """Inside, weights that are halves are float32 while a module that may read them runs."""
    tables = _token_embeddings(model)
    hooks = [table.register_forward_hook(_as_float32) for table in tables if table.weight.dtype in HALVES]
    for part, parameters in _parts(model, tables):
        if halves := [parameter for parameter in parameters if parameter.dtype in HALVES]:
            hooks += _widening(part, halves)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _as_float32(_: nn.Module, __: tuple, looked_up: Tensor) -> Tensor:
    return looked_up.float()


def _widening(part: nn.Module, parameters: list[nn.Parameter]) -> list[RemovableHandle]:
    kept: dict[nn.Parameter, Tensor] = {}

    def widen(*_) -> None:
        for parameter in parameters:
            if parameter.dtype in HALVES:  # not already, by a module around this one
                kept[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def narrow(*_) -> None:
        for parameter, half in kept.items():
            parameter.data = half
        kept.clear()

    return [part.register_forward_pre_hook(widen), part.register_forward_hook(narrow, always_call=True)]


def _parts(module: nn.Module, tables: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules and the weights that they read: each block of a list its own, each module around it all others.

    Without the `tables` of token embeddings: what is looked up in them can be widened instead.
    """
    if isinstance(module, nn.ModuleList):
        yield from ((block, list(block.parameters())) for block in module)
        return
    below = list(module.modules())
    lists = [each for each in below if isinstance(each, nn.ModuleList)]
    elsewhere = [*lists, *(table for table in tables if table in below)]
    theirs = {parameter for each in elsewhere for parameter in each.parameters()}
    yield module, [parameter for parameter in module.parameters() if parameter not in theirs]
    for child in module.children() if lists else ():
        if child not in tables:
            yield from _parts(child, tables)


def _token_embeddings(model: nn.Module) -> list[nn.Embedding]:
    """The tables of token embeddings: large, and read by a look-up alone. With adapters they are other modules."""
    tables = []
    for module in model.modules():
        if callable(embeddings := getattr(module, "get_input_embeddings", None)):
            with suppress(NotImplementedError):
                tables.append(embeddings())
    return [table for table in dict.fromkeys(tables) if type(table) is nn.Embedding]


@contextmanager
def _dequantized_to_float32(model: nn.Module) -> Iterator[None]:
    """Inside, bitsandbytes' linear layers compute in float32."""
    layers: list[Any] = [layer for layer in model.modules() if getattr(layer, "compute_dtype", None) in HALVES]
    before = [layer.compute_dtype for layer in layers]
    for layer in layers:
        layer.compute_dtype = torch.float32
    try:
        yield
    finally:
        for layer, dtype in zip(layers, before, strict=True):
            layer.compute_dtype = dtype


def is_flash(attn_implementation: str | None) -> bool:
    """Whether an attention of transformers is one of the flash-attn packages, which compute in halves alone."""
    return attn_implementation is not None and attn_implementation.startswith("flash_attention_")


@contextmanager
def _without_flash(model: nn.Module) -> Iterator[None]:
    """Inside, models with an attention of the flash-attn packages have sdpa."""
    models: list[Any] = [part for part in model.modules() if hasattr(part, "set_attn_implementation")]
    flash = [(part, name) for part in models if is_flash(name := part.config._attn_implementation)]
    for part, _ in flash:
        part.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        for part, name in flash:
            part.set_attn_implementation(name)


def frozen_linear(model: nn.Module) -> list[nn.Linear]:
    """The linear layers whose weights are not trained, but the output layer, which may be one with the embeddings."""
    models: list[Any] = [part for part in model.modules() if hasattr(part, "get_output_embeddings")]
    outputs = [part.get_output_embeddings() for part in models]
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return [layer for layer in layers if not layer.weight.requires_grad and all(layer is not out for out in outputs)]


def halve_frozen(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Hold the weights of `frozen_linear` in autocast's `dtype`, if there is one, where that loses nothing.

    Such are those of a model that is stored so. Autocast would cast them in every pass, and keep what it has cast for
    the backward pass; no number changes.
    """
    for layer in frozen_linear(model) if dtype is not None else ():
        half = layer.weight.data.to(dtype)
        if layer.weight.dtype == torch.float32 and torch.equal(half.float(), layer.weight):
            layer.weight.data = half


def move(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Move a model, its weights in `dtype` where one is given: rotary frequencies stay float32, or long rows suffer."""
    for parameter in model.parameters():  # one by one and converted first: never twice on the device
        parameter.data = parameter.data.to(dtype or parameter.dtype).to(device)
    model.to(device)
