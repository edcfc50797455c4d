"""How much memory a run takes, before it runs: per device, on the host, on the disk.

The static part is arithmetic over the strategy's and the optimizer's copies of the weights (ZeRO: Rajbhandari et al.
2020, arXiv 1910.02054, section 3, and what DeepSpeed 0.19 holds besides); the passes are those of
`models.simulation`. Sizes are bytes; GB are 1e9 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rlhf_lightning.models.causal_lm import Lora
from rlhf_lightning.planning.sampling import SamplingShape, beside
from rlhf_lightning.planning.simulation import Kind, Live, Pass, Shape, Weights, cache_bytes, count_weights, simulate
from rlhf_lightning.training.references import ReferenceKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Strategy = Literal["single", "ddp", "zero1", "zero2"]

GPUS = {
    "A10": 22.0,
    "A100-40GB": 39.4,
    "A100-80GB": 79.1,
    "H100": 79.1,
    "H200": 139.7,
    "L4": 22.0,
    "L40S": 44.4,
    "RTX3090": 23.5,
    "RTX4090": 23.5,
    "T4": 14.5,
    "V100": 31.7,
}
"""Memory in GiB as torch reports it, rounded down: less than the name says."""

CONTEXT, CONTEXT_WITH_NCCL = 1.0e9, 1.5e9
"""CUDA's context and the libraries' workspaces, which no allocator counts, without and with NCCL's buffers. Assumed,
not measured."""
RESERVE = 0.05
"""Share of a device that is left free for what the allocator cannot use. Assumed."""
_BUCKET = 200_000_000
"""Elements of each of DeepSpeed's two buffers of gradients on their way between processes (Lightning's default)."""
_NF4 = 0.5 + 0.127 / 8
"""Bytes per 4-bit weight with double quantization (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""


@dataclass(frozen=True)
class Run:
    """What the memory of a run depends on."""

    shape: Shape
    """Of the training batch, `rows` of `tokens` each: the worst that can come."""
    eval_rows: int
    reference: ReferenceKind
    strategy: Strategy
    offload: bool
    half: bool
    """A mixed precision of the Trainer."""
    processes: int
    processes_per_machine: int
    accumulate: int
    rows_per_pair: int
    on_cpu: bool
    sample_tokens: int
    """Longest prompt and response that are generated on the way; 0 for none."""
    optimizer_bytes: float
    """States of the optimizer, per trained weight."""
    optimizer_temporary: float
    """What its step takes besides, per trained weight."""
    host_temporary: float = 0.0
    """The same of a step on the host, over one flat tensor."""
    float32_gradients: bool = False
    """Gradients are added up in float32 where the weights are halves (see `training.zero`)."""
    stored_as_halves: bool = False
    """The model's files hold numbers of the run's own mixed precision."""
    quantized: bool = False
    stores_reference: bool = False
    """Checkpoints hold the reference's weights as well."""
    sampling: SamplingShape | None = None
    """Of a run that learns from its own responses."""

    @property
    def zero(self) -> bool:
        return self.strategy in ("zero1", "zero2")

    @property
    def gradients_grow(self) -> bool:
        """Whether the gradients come into being in the only batch of each step."""
        return self.accumulate == 1 and not self.zero

    @property
    def context(self) -> float:
        """Bytes on a device beside all that is counted."""
        return CONTEXT_WITH_NCCL if not self.on_cpu and (self.zero or self.processes > 1) else CONTEXT


@dataclass(frozen=True)
class Footprint:
    """Bytes of a run. Each device holds `device`; `phases` are the sums at the times when most is held."""

    weights: Weights
    device: dict[str, float]
    phases: dict[str, float]
    host: dict[str, float]
    checkpoint: float
    exported: float
    context: float
    """Of each device, beside them; assumed."""

    @property
    def peak(self) -> float:
        return max(self.phases.values())

    @property
    def host_peak(self) -> float:
        return max(self.host.values(), default=0.0)


@dataclass(frozen=True)
class Nearest:
    """A run near another one."""

    keys: dict[str, str]
    """What to set for it."""
    footprint: Footprint


class Estimator:
    """Footprints of runs of one model; passes that were simulated are remembered."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self._passes: dict[tuple[str, str, Kind], Pass] = {}

    def footprint(self, run: Run) -> Footprint:
        """Raises `NotSimulated` for models that cannot be run without contents."""
        shape = _shape_of(run)
        weights = count_weights(self.config, shape)
        number = 2 if shape.half_weights else 4
        copy = number * (weights.total - (weights.trained if shape.lora else 0))
        frozen = _NF4 if run.quantized else 2 if shape.half_frozen else number
        held = number * weights.total - weights.quantizable * (number - frozen)
        training, evaluation = self._passes_of(run, shape, weights)
        cache = cache_bytes(self.config, run.sample_tokens, size_of_number=4)
        device = {
            "weights": held,
            **_trained_copies(run, weights, number),
            "reference model": copy if run.reference == "copy" else 0,
            "activations": training.kept,
            "logits and their gradients": training.head,
            "evaluation batch": evaluation,
            "generation cache": cache,
        }
        gradients, buckets = device["gradients"], device["gradient buckets"]
        always = sum(
            device[name] for name in ("weights", "float32 copies of the weights", "optimizer states", "reference model")
        )
        # Gradients that come into being in the only batch of a step are part of the pass. DeepSpeed has let go of them
        # by the time its optimizer steps; DDP's buckets stay.
        phases = {
            "training batch": always + (0 if run.gradients_grow else gradients) + buckets + training.peak,
            "optimizer step": always + (0 if run.zero else gradients + buckets) + device["optimizer step"],
            "validation": always + evaluation,
        }
        if run.sample_tokens:
            phases["samples"] = always + cache + _wide(shape) * (weights.widened + weights.output_layer)
        if run.reference == "precomputed":
            phases["reference pass"] = always + copy + evaluation
        if run.sampling is not None:
            more = beside(run, run.sampling, self.config, shape, weights, self._simulated)
            held = sum(more.held.values())
            besides = {"training batch": more.training, "optimizer step": more.step}
            phases = {name: size + held + besides.get(name, 0) for name, size in phases.items()}
            phases |= {name: always + held + size for name, size in more.phases.items()}
            device |= more.held
        stored = weights.trained if shape.lora else weights.total
        checkpoint = number * stored + (run.optimizer_bytes + (4 if run.zero else 0)) * weights.trained
        checkpoint += copy if run.stores_reference else 0
        host = _on_host(run, weights)
        return Footprint(weights, device, phases, host, checkpoint, 4 * weights.total, run.context)

    def _passes_of(self, run: Run, shape: Shape, weights: Weights) -> tuple[Pass, float]:
        """The pass over a training batch, the reference's within it, and the bytes of an evaluation batch."""
        training = self._pass(shape, "growing" if run.gradients_grow else "training")
        if run.reference in ("adapter", "copy"):  # runs while the policy's activations wait for their backward pass
            reference = self._pass(replace(shape, gradient_checkpointing=False), "inference")
            training = training._replace(peak=max(training.peak, training.kept + reference.peak))
        in_float32 = replace(shape, half_weights=False, half_frozen=False, autocast=False, gradient_checkpointing=False)
        inference = self._pass(replace(in_float32, rows=run.eval_rows), "inference")
        wide = _wide(shape)
        evaluation = max(
            inference.peak + wide * weights.widened, inference.kept + inference.head + wide * weights.output_layer
        )
        return training, evaluation

    def other_checkpointing(self, run: Run) -> float:
        """Activations with gradient checkpointing where the run has none, and the other way round."""
        shape = _shape_of(run)
        return self._pass(replace(shape, gradient_checkpointing=not shape.gradient_checkpointing), "training").kept

    def nearest(self, run: Run, fits: Callable[[Footprint], bool]) -> Nearest | None:
        """The run with the fewest changes that fits, mildest first; None when nothing does."""
        taken: list[_Change] = []
        for change in _changes(run):
            if change.apply(_with(run, taken)) == _with(run, taken):
                continue
            taken.append(change)
            if fits(self.footprint(_with(run, taken))):
                break
        else:
            return None
        for change in reversed(taken[:-1]):
            fewer = [other for other in taken if other is not change]
            if fits(self.footprint(_with(run, fewer))):
                taken = fewer
        keys: dict[str, str] = {}
        for change in taken:
            keys |= change.keys
        return Nearest(keys, self.footprint(_with(run, taken)))

    def _pass(self, shape: Shape, kind: Kind) -> Pass:
        return self._simulated(self.config, shape, kind)

    def _simulated(self, config: PretrainedConfig, shape: Shape, kind: Kind) -> Pass:
        key = (config.to_json_string(), repr(shape), kind)  # lists, such as the targets of adapters, cannot be hashed
        if key not in self._passes:
            self._passes[key] = simulate(config, shape, kind)
        return self._passes[key]


def _shape_of(run: Run) -> Shape:
    """Of its passes, in the precision in which the strategy holds the weights."""
    half_frozen = run.stored_as_halves and run.shape.lora is not None and not run.quantized and not run.zero
    return replace(run.shape, half_weights=run.zero and run.half, half_frozen=half_frozen, autocast=run.half)


def _wide(shape: Shape) -> int:
    """Bytes that a weight takes besides while it is used in float32."""
    return 4 if shape.half_weights or shape.half_frozen else 0


def _trained_copies(run: Run, weights: Weights, number: int) -> dict[str, float]:
    """What a device holds for each trained weight, whose own size is `number` bytes."""
    share = run.processes if run.zero else 1
    trained = weights.trained / share
    buckets = {"ddp": 4 * weights.trained, "zero1": 2 * _BUCKET * number, "zero2": 2 * _BUCKET * number}
    # Under ZeRO, float32 gradients of all that this process steps, made of two flat copies; then the optimizer's own.
    step = max(8, 4 + run.optimizer_temporary) if run.zero else run.optimizer_temporary
    here = 0 if run.offload else 1
    of_gradient = 4 if run.float32_gradients else number
    return {
        "gradients": here * of_gradient * (trained if run.strategy == "zero2" else weights.trained),
        "gradient buckets": buckets.get(run.strategy, 0),
        "float32 copies of the weights": here * 4 * trained if run.zero else 0,
        "optimizer states": here * run.optimizer_bytes * trained,
        "optimizer step": here * step * trained,
    }


def _on_host(run: Run, weights: Weights) -> dict[str, float]:
    """What the processes of a machine hold in its memory, when the optimizer steps and when models are loaded."""
    host: dict[str, float] = {}
    if run.offload:
        own = weights.trained / run.processes
        # Weights and gradients in float32, and the weights as halves on their way to the device.
        pinned = 2 * _pinned(4 * own) + _pinned(2 * own)
        accumulated = 2 * weights.trained if run.accumulate > 1 else 0  # whole in each process
        each = pinned + accumulated + (run.optimizer_bytes + run.host_temporary) * own
        host["optimizer, float32 weights and gradients"] = each * run.processes_per_machine
    if run.zero:  # one model after the other: a reference is on the device before the policy is loaded
        host["loading, float32"] = 4 * weights.total * run.processes_per_machine
    return host


def _pinned(size: float) -> float:
    """Bytes that torch takes for page-locked memory of a size: the next power of two."""
    return 2.0 ** math.ceil(math.log2(size)) if size > 0 else 0.0


@dataclass(frozen=True)
class _Change:
    keys: dict[str, str]
    apply: Callable[[Run], Run]


def _with(run: Run, changes: list[_Change]) -> Run:
    for change in changes:
        run = change.apply(run)
    return run


def _changes(run: Run) -> Iterator[_Change]:
    """Ways to take less memory: first those that change no number, then those that change what is trained."""

    def shape(**values) -> Callable[[Run], Run]:
        return lambda run: replace(run, shape=replace(run.shape, **values))

    per_pair = run.rows_per_pair
    pairs = run.shape.rows // per_pair
    yield _Change({"model.gradient_checkpointing": "true"}, shape(gradient_checkpointing=True))
    for fewer in [n for n in range(pairs - 1, 0, -1) if pairs % n == 0]:  # the same pairs in each optimizer step
        accumulate = run.accumulate * pairs // fewer
        keys = {"data.batch_size": str(fewer), "trainer.accumulate_grad_batches": str(accumulate)}
        if run.sampling is not None:
            keys, accumulate = {"model.micro_batch_size": str(fewer)}, run.accumulate
        yield _Change(keys, _smaller_batches(fewer * per_pair, accumulate))
    if run.sampling is not None:
        for rows in (16, 4, 1):
            yield _Change({"model.generation_micro_batch_size": str(rows)}, _fewer_at_a_time(rows))
    else:
        yield _Change({"data.eval_batch_size": "1"}, lambda run: replace(run, eval_rows=per_pair))
    if run.reference == "copy":
        keys = {"model.precompute_reference": "true"}
        yield _Change(keys, lambda run: replace(run, reference="precomputed"))
    if not run.zero and not run.on_cpu and not run.quantized:
        keys = {"trainer.strategy": "zero2", "trainer.precision": "16-mixed"}
        yield _Change(keys, lambda run: replace(run, strategy="zero2", half=True))
    if not run.offload and not run.on_cpu and not run.quantized:
        keys = {"trainer.strategy": "zero2_offload", "trainer.precision": "16-mixed"}
        yield _Change(keys, lambda run: replace(run, strategy="zero2", half=True, offload=True))
    if not run.shape.policy:
        return
    adapters = {} if run.shape.lora else {"model.lora.r": "16"}
    bound = run.shape.lora is not None and run.shape.lora.changes_base
    own_reference = run.reference in ("copy", "precomputed") or (run.sampling is not None and run.sampling.reference)
    adapters |= {"model.reference": "adapter"} if own_reference and not bound else {}
    if adapters:
        yield _Change(adapters, _on_adapters)
    if not run.quantized and not run.on_cpu and not bound:
        keys = adapters | {"model.load_in_4bit": "true", "trainer.strategy": "auto", "trainer.precision": "16-mixed"}
        yield _Change(keys, _on_four_bits)


def _on_adapters(run: Run) -> Run:
    bound = run.shape.lora is not None and run.shape.lora.changes_base
    reference = "adapter" if run.reference in ("copy", "precomputed") and not bound else run.reference
    sampling = run.sampling if run.sampling is None or bound else replace(run.sampling, reference=False)
    shape = replace(run.shape, lora=run.shape.lora or Lora())
    return replace(run, shape=shape, reference=reference, sampling=sampling)


def _on_four_bits(run: Run) -> Run:
    strategy: Strategy = "ddp" if run.processes > 1 else "single"
    return replace(_on_adapters(run), quantized=True, strategy=strategy, offload=False, half=True)


def _smaller_batches(rows: int, accumulate: int) -> Callable[[Run], Run]:
    return lambda run: replace(run, shape=replace(run.shape, rows=rows), accumulate=accumulate)


def _fewer_at_a_time(rows: int) -> Callable[[Run], Run]:
    def fewer(run: Run) -> Run:
        assert run.sampling is not None
        sampling, scored = run.sampling, min(rows, run.sampling.scored)
        sampling = replace(sampling, slots=min(rows, sampling.slots), scored=scored)
        return replace(run, sampling=sampling, eval_rows=scored)

    return fewer


def optimizer_bytes(factory: Callable, *, foreach: bool) -> tuple[float, float]:
    """Bytes per weight of an optimizer's states, and of what its step makes besides, measured on two small matrices.

    What the larger one takes more: so what an 8-bit optimizer keeps once for each tensor (its tables of 256 numbers) is
    left out, which is nothing next to the matrices of a model. With `foreach`, torch's default on a GPU, a step of the
    Adam family makes the square roots of all weights at once.
    """
    (rows, more), columns = (64, 128), 64
    (fewer, defaults), (larger, _) = (_states(factory, count, columns) for count in (rows, more))
    states = (larger - fewer) / ((more - rows) * columns)
    at_once = foreach and "foreach" in defaults and defaults["foreach"] is not False and not defaults.get("fused")
    return states, 4.0 if at_once and states else 0.0


def _states(factory: Callable, *shape: int) -> tuple[int, dict[str, Any]]:
    """Bytes of an optimizer's states after a step on one weight, and its settings."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(shape))
    optimizer = factory([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    tensors = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in tensors if value.numel() > 1), optimizer.defaults


def host_temporary(factory: Callable) -> float:
    """Bytes per weight that an optimizer's step on the host makes besides its states, measured on a small flat tensor.

    8 of an AdamW, whose square roots and their multiples are tensors of their own, and 0 of a `fused` one.
    """
    import torch

    weight = torch.nn.Parameter(torch.zeros(4096))
    optimizer = factory([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    states = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    with Live([weight, weight.grad, *states]) as live:
        optimizer.step()
    return float(round(live.peak / weight.numel()))
