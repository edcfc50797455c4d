"""Which model is the reference of a policy, and whether it may be."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from rlhf_lightning.errors import ConfigurationError, TrainingError
from rlhf_lightning.models.causal_lm import ResponseLogprobs
from rlhf_lightning.training.checks import start_tolerance
from rlhf_lightning.training.reference_cache import ReferenceCache, pair_hash

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

FROZEN, ADAPTER = "frozen", "adapter"

ReferenceKind = Literal["none", "adapter", "copy", "precomputed"]
"""How a reference is held in memory: not at all, as the policy's own weights, as a copy, or by its log-probs alone."""

Reference = Callable[[Tensor, Tensor, Tensor], ResponseLogprobs]
"""Takes what `CausalLM.forward` takes."""

_CHECKED = 4
"""Pairs of which the log-probs found in the cache are computed again."""
_SECONDS_OF_A_PART = 60


@torch.no_grad()
def precomputed_logprobs(
    module: LightningModule,
    reference: Reference,
    role: str,
    key: Sequence[object],
    *,
    precision: str,
    arithmetic: Callable[[], AbstractContextManager],
    cache_dir: str | None,
) -> Tensor:
    """Summed log-probs of both responses of each pair of a role, [P, 2] float32, nats, found in the cache or computed.

    `reference` computes them inside of `arithmetic()`, whose rounding is that of the Trainer's `precision`; `key` names
    it and its way to compute. The processes share the work. A few of those found
    are computed again: raises `TrainingError` when they differ, or when another process's are not seen here.
    """
    trainer, data = module.trainer, module.trainer.datamodule
    pairs, cache = data.pairs[role], ReferenceCache(key, cache_dir=cache_dir)
    hashes = [pair_hash(*pairs.segments(index)) for index in range(len(pairs))]

    def computed(positions: np.ndarray) -> Iterator[tuple[list[int], Tensor]]:
        for batch in data.batches(role, positions):
            batch = trainer.strategy.batch_to_device(batch)
            with arithmetic():
                sums = reference(batch.input_ids, batch.attention_mask, batch.response_mask).sums
            yield batch.index.tolist(), torch.stack(sums.chunk(2), dim=1).float().cpu()

    # Processes of one run would wait for each other as well.
    with cache.computing() if trainer.world_size == 1 and not cache.find(hashes)[1].all() else nullcontext():
        values, known = cache.find(hashes)
        missing = np.flatnonzero(~known.numpy())
        found = len(pairs) - len(missing)
        log.info("reference: log-probs of %d %s pairs found, %d to compute", found, role, len(missing))
        _check_found(values, computed(np.flatnonzero(known.numpy())[:_CHECKED]), cache, precision)
        done: list[int] = []
        began = time.monotonic()
        # By position, since what is missing differs from process to process once one of them has begun to write.
        for positions, sums in computed(missing[missing % trainer.world_size == trainer.global_rank]):
            values[positions] = sums
            done += positions
            if time.monotonic() - began > _SECONDS_OF_A_PART:  # what a kill can cost
                cache.add([hashes[position] for position in done], values[done])
                done, began = [], time.monotonic()
        if done:
            cache.add([hashes[position] for position in done], values[done])
    if trainer.world_size > 1:
        trainer.strategy.barrier()
        values, known = cache.find(hashes)
        if not known.all():
            raise TrainingError(
                f"{cache.directory}: the reference log-probs of other processes are not seen here; give model."
                "reference_cache a directory that all machines share"
            )
    return values


def _check_found(
    found: Tensor, again: Iterator[tuple[list[int], Tensor]], cache: ReferenceCache, precision: str
) -> None:
    for positions, sums in again:
        tolerance = start_tolerance(precision) * sums.abs().clamp(min=1)
        if ((found[positions] - sums).abs() > tolerance).any():
            raise TrainingError(
                f"{cache.directory}: its reference log-probs are not those that the reference gives now; remove this "
                "directory, and they are computed again"
            )


def choose_reference(given: str | None, backbone: str, *, adapters: bool, load_in_4bit: bool) -> str:
    """`adapter`, or the directory or name of the model to freeze.

    Raises `ConfigurationError` when the settings contradict each other.
    """
    chosen = given or (ADAPTER if adapters else FROZEN)
    if chosen == ADAPTER and not adapters:
        raise ConfigurationError(
            "model.reference: adapter is the policy without its adapters, and there are none; give model.lora, or "
            "reference: frozen"
        )
    if load_in_4bit and not adapters:
        raise ConfigurationError("model.load_in_4bit: 4-bit weights cannot be trained; give model.lora as well")
    if chosen == FROZEN and load_in_4bit:
        raise ConfigurationError(
            "model.reference: frozen would be a copy without the policy's 4-bit quantization, so another model; use "
            "reference: adapter"
        )
    return backbone if chosen == FROZEN else chosen


def check_reference_config(reference: str, its: PretrainedConfig, backbone: str, own: PretrainedConfig) -> None:
    """Refuse a reference of another kind of model or another vocabulary. Raises `ConfigurationError`."""
    for what in ("model_type", "vocab_size"):
        mine, other = (getattr(config.get_text_config(), what) for config in (own, its))
        if mine != other:
            raise ConfigurationError(
                f"model.reference: {reference} has {what} {other}, but {backbone} has {mine}; their log-probs cannot "
                "be compared. Give a model of the same architecture and tokenizer"
            )


def named_like_a_kind(reference: str) -> bool:
    """Whether a reference is no path, and so may be one of the kinds, misspelt."""
    return "/" not in reference and ":" not in reference and not Path(reference).exists()


def check_same_reference(before: str | None, now: str | None, name: str | None) -> None:
    """Raise `ConfigurationError` when the reference has other weights than that of a checkpoint's run."""
    if before is not None and now is not None and before != now:
        raise ConfigurationError(
            f"ckpt_path: the reference of its run had other weights than {name} has now, so its losses and rewards "
            "would mean nothing; give model.backbone and model.reference as they were then"
        )
