"""The memory that a forward and a backward pass take, found by running them on tensors without contents.

torch's `FakeTensorMode` runs every operation of the true model for its shapes and dtypes alone: an 8-billion-parameter
model takes seconds and no memory. R rows, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_lightning.errors import reason_of
from rlhf_lightning.models.causal_lm import Lora, decoder, inner_model, output_layer, with_adapters
from rlhf_lightning.models.configuration import no_pooler
from rlhf_lightning.models.precision import frozen_linear, widened_at_once
from rlhf_lightning.models.reward_network import HeadSettings, new_head
from rlhf_lightning.models.states import hidden_states, layer_states, normalised
from rlhf_lightning.terminal import silenced

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_HEAD_CHUNK = 1024
"""Tokens whose logits exist at a time; the default of `linear_logprobs`."""


@dataclass(frozen=True)
class Shape:
    """What the size of a model and of its passes depends on, apart from its configuration."""

    policy: bool
    """A language model with its output layer, or a backbone with a reward head."""
    rows: int
    """Rows of one forward pass."""
    tokens: int
    """Of each row, all of them as long as the longest."""
    lora: Lora | None = None
    packed: bool = False
    gradient_checkpointing: bool = False
    half_weights: bool = False
    """Weights of 2 bytes; else of 4."""
    half_frozen: bool = False
    """Frozen weights of linear layers of 2 bytes (see `models.precision.halve_frozen`)."""
    autocast: bool = False
    """Operations in half precision, as the mixed precisions of the Trainer have it."""
    trust_remote_code: bool = False
    head: HeadSettings = field(default_factory=HeadSettings)
    """Of a reward network."""
    freeze_backbone: bool = False


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters, tied ones counted once."""

    total: int
    trained: int
    quantizable: int
    """Those of linear layers other than the output layer, which QLoRA holds in 4 bits."""
    widened: int
    """Those that are float32 at a time in a forward pass of the backbone where halves compute in float32."""
    output_layer: int
    """Those of a policy's output layer."""


class Pass(NamedTuple):
    """Bytes of one pass over a batch, apart from the weights."""

    kept: int
    """What the forward pass leaves for the backward pass, or for whoever reads the hidden states."""
    head: int
    """What the output layer takes on top; 0 for a reward head, whose part is in the others."""
    peak: int
    """The most at any moment."""


Kind = Literal["training", "growing", "inference"]
"""Forward and backward without the gradients, which are counted elsewhere; the same with the gradients that come into
being on the way; forward alone."""


class NotSimulated(Exception):
    """A model that cannot be run on tensors without contents."""


def count_weights(config: PretrainedConfig, shape: Shape) -> Weights:
    """The parameters of a model, without loading it."""
    model, head = _model(config, shape)
    parameters = [*model.parameters(), *(head.parameters() if head is not None else ())]
    trained = [parameter.numel() for parameter in parameters if parameter.requires_grad]
    out = None if head is not None else inner_model(model).get_output_embeddings()
    frozen = [layer.weight.numel() for layer in frozen_linear(model)]
    return Weights(
        total=sum(parameter.numel() for parameter in parameters),
        trained=sum(trained),
        quantizable=sum(frozen),
        widened=widened_at_once(inner_model(model) if out is None else decoder(model)),
        output_layer=0 if out is None else out.weight.numel(),
    )


def simulate(config: PretrainedConfig, shape: Shape, kind: Kind) -> Pass:
    """Run a pass over one batch for its memory. Raises `NotSimulated` for models that cannot be run so."""
    try:
        with silenced("torch._subclasses.fake_tensor", logging.CRITICAL):  # its page of frames
            return _run(config, shape, kind)
    except Exception as error:  # an operation whose shape depends on contents may raise anything
        raise NotSimulated(reason_of(error)) from error


def head_bytes(positions: int, hidden: int, vocabulary: int, *, operand: int, cast: bool, trained: bool) -> int:
    """Bytes of `linear_logprobs` on a GPU at its highest: two or three chunks of float32 logits.

    `operand` bytes of the numbers that are multiplied; `cast` where the weight is kept in more than those.
    """
    chunk = min(positions, _HEAD_CHUNK) * vocabulary * 4
    logits = 3 * chunk if trained and positions > _HEAD_CHUNK else 2 * chunk + (chunk // 2 if operand == 2 else 0)
    weight = hidden * vocabulary * (operand if cast else 0)
    gradients = 2 * hidden * vocabulary * 4 if trained else 0
    return logits + weight + gradients + positions * hidden * (operand if trained else 4)


def cache_bytes(config: PretrainedConfig, tokens: int, *, size_of_number: int) -> int:
    """Bytes of keys and values of `tokens` tokens in every layer, for generation."""
    config = config.get_text_config()
    if getattr(config, "num_attention_heads", None) is None:  # recurrent: a state of fixed size
        return 0
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * tokens * size_of_number


class Live(TorchDispatchMode):
    """Adds up the storages that are alive, but for those that are known beforehand."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _run(config: PretrainedConfig, shape: Shape, kind: Kind) -> Pass:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, head = _model(config, shape)
    with FakeTensorMode(), torch.device("cpu"):
        for module in filter(None, (model, head)):
            _put_on_cpu(module)
        weights = [*model.parameters(), *model.buffers(), *(head.parameters() if head is not None else ())]
        if kind == "training":
            for parameter in weights:
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_forget)
        size = (1, shape.rows * shape.tokens) if shape.packed else (shape.rows, shape.tokens)
        ids, mask = torch.zeros(size, dtype=torch.long), torch.ones(size, dtype=torch.bool)
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False) if shape.autocast else nullcontext()
        live = Live([*weights, ids, mask])
        with live, torch.set_grad_enabled(kind != "inference"):
            with autocast:
                backbone = decoder(model) if head is None else inner_model(model)
                every_layer = shape.head.get("pooling") == "layers"
                if shape.packed:  # one kernel over all rows takes as much as over one row of their length
                    output = backbone(input_ids=ids, use_cache=False, output_hidden_states=every_layer)
                    states = normalised(output.hidden_states) if every_layer else [output.last_hidden_state]
                elif every_layer:
                    states = layer_states(backbone, ids, mask)
                else:
                    states = [hidden_states(backbone, ids, mask)]
                if head is None:
                    out = states[0][:, :-1].reshape(-1, states[0].shape[-1])
                else:
                    out = head(torch.cat([state.mean(dim=1) for state in states], dim=-1))
            kept = live.now
            on_top = 0 if head is not None else _head_of(model, out, shape, backward=kind != "inference")
            if kind != "inference":
                out.float().sum().backward()
        return Pass(kept, on_top, max(live.peak, kept + on_top))


def _head_of(model: nn.Module, out: Tensor, shape: Shape, *, backward: bool) -> int:
    weight, _ = output_layer(model)
    half = shape.half_weights or shape.autocast
    operand = 2 if half else 4
    return head_bytes(
        out.shape[0],
        weight.shape[1],
        weight.shape[0],
        operand=operand,
        cast=operand < (2 if shape.half_weights else 4),
        trained=backward and weight.requires_grad,
    )


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _model(config: PretrainedConfig, shape: Shape) -> tuple[nn.Module, nn.Module | None]:
    """The model and, for reward networks, the head, on torch's meta device."""
    from transformers import AutoModel, AutoModelForCausalLM

    dtype = torch.bfloat16 if shape.half_weights else torch.float32  # float16 takes as much
    options = {"dtype": dtype, "trust_remote_code": shape.trust_remote_code}
    with torch.device("meta"):
        if shape.policy:
            model, head = AutoModelForCausalLM.from_config(config, **options), None
        else:
            model = AutoModel.from_config(config, **options, **no_pooler(config))
            model.requires_grad_(not shape.freeze_backbone)
            head = new_head(config, **shape.head).to(dtype)
        if shape.lora is not None:
            model = with_adapters(model, replace(shape.lora, init_lora_weights=True)).to(dtype)
            if shape.half_frozen:
                for layer in frozen_linear(model):
                    layer.to(torch.bfloat16)
    if shape.gradient_checkpointing:
        inner_model(model).activation_checkpointing_enable()
    return model.train(), head


def _put_on_cpu(module: nn.Module) -> None:
    """Replace tensors of the meta device, which has no autocast, by such of the CPU; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for layer in module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                layer._parameters[name] = made[id(parameter)]
        for name, buffer in layer._buffers.items():
            if buffer is not None:
                layer._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
