"""The reference of a policy: which model it is, whether it may be, and its log-probs, computed now or beforehand."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from rlhf_lightning.data.roles import Role
from rlhf_lightning.data.tokenizer import check_reference_tokenizer
from rlhf_lightning.errors import ConfigurationError, ModelError, TrainingError
from rlhf_lightning.models.causal_lm import CausalLM, ResponseLogprobs, load_causal_config
from rlhf_lightning.models.fingerprint import weights_fingerprint
from rlhf_lightning.models.precision import float32_arithmetic, move
from rlhf_lightning.terminal import progress
from rlhf_lightning.training.checkpoints import ORIGIN
from rlhf_lightning.training.checks import start_tolerance
from rlhf_lightning.training.reference_cache import ReferenceCache, pair_hash
from rlhf_lightning.training.reference_updates import ReferenceUpdates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_lightning.training.policy_module import PolicyModule

log = logging.getLogger(__name__)

FROZEN, ADAPTER = "frozen", "adapter"

ReferenceKind = Literal["none", "adapter", "copy", "precomputed"]
"""How a reference is held in memory: not at all, as the policy's own weights, as a copy, or by its log-probs alone."""

HALVES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


def held_dtype(trainer: Trainer) -> torch.dtype | None:
    """Of the weights, where DeepSpeed's mixed precision holds them as halves; None where they stay as loaded."""
    return HALVES.get(str(trainer.precision)) if isinstance(trainer.strategy, DeepSpeedStrategy) else None


_CHECKED = 4
"""Pairs of which the log-probs found in the cache are computed again."""
_SECONDS_OF_A_PART = 60


class Reference:
    """The model that a policy is compared with, outside of every module tree: no optimizer, no checkpoint and no
    `train()` reaches it.

    Args:
        given: `frozen`, a copy of the policy's start; `adapter`, the policy without its adapters; or the directory or
            name of another model. `adapter` with LoRA and else `frozen` when not given.
        module: The policy's, with all its settings.
        temperature: What its logits are divided by, besides what the model itself does.
        precomputed: Compute the log-probs of all pairs once, keep them on disk, and let go of the model.
        update_steps: Move the model towards the policy after so many optimizer steps (see `ReferenceUpdates`).
        update_alpha: How far.

    Raises `ConfigurationError` when the settings contradict each other, or the model is of another kind.
    """

    def __init__(
        self,
        given: str | None,
        module: PolicyModule,
        *,
        temperature: float = 1.0,
        precomputed: bool = False,
        update_steps: int | None = None,
        update_alpha: float | None = None,
    ) -> None:
        kind = given or (FROZEN if module.lora is None else ADAPTER)
        _check_kind(kind, module)
        self.source: str = module.hparams.backbone if kind == FROZEN else kind
        """`adapter`, or the directory or name of the model."""
        self.precomputed = precomputed
        self.is_start = kind in (FROZEN, ADAPTER) or kind == module.backbone
        """Whether the policy begins as its reference."""
        self.network: CausalLM | None = None
        """The model, once it is loaded; None for `adapter`, and once its log-probs are computed."""
        self.fingerprint: str | None = None
        """A hash of its weights, as loaded."""
        self._model = module.backbone if self.is_start else kind
        self._temperature = temperature
        self._sums: dict[Role, Tensor] = {}
        if precomputed and kind == FROZEN and not isinstance(self._model, str):
            raise ConfigurationError(
                "model.precompute_reference: goes with a backbone by name, not with a model object; leave it out"
            )
        is_copy = kind != ADAPTER
        self.updates = ReferenceUpdates(update_steps, update_alpha, module, is_copy=is_copy, precomputed=precomputed)
        if not self.is_start:
            _check_model(kind, module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of the module, such as an average of its weights, has the same reference: one in memory is enough."""
        return self

    @property
    def kind(self) -> ReferenceKind:
        """How it is held in memory."""
        if self.source == ADAPTER:  # the policy's own weights, at hand at any time
            return "none" if self.precomputed else "adapter"
        return "precomputed" if self.precomputed else "copy"

    def __str__(self) -> str:
        words = "the policy without its adapters" if self.source == ADAPTER else self.source
        return f"{words}, precomputed" if self.precomputed else f"{words}{self.updates}"

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ConfigurationError` when another model has another tokenizer than the data."""
        if not self.is_start:
            check_reference_tokenizer(self.source, tokenizer, key="model.reference")

    def load(self, loading: dict[str, Any], trainer: Trainer | None = None) -> None:
        """Load the model, once; a policy that was given as an object is copied as it is now.

        With a Trainer it goes to its device, so that the host never holds it beside the policy or an optimizer there.
        """
        if trainer is not None:
            self.updates.check_trainer(trainer)
        if self.source == ADAPTER or self.network is not None:
            return
        model = self._model if isinstance(self._model, str) else copy.deepcopy(self._model)
        self.network = CausalLM.from_pretrained(model, **loading).eval().requires_grad_(False)
        self.network.temperature *= self._temperature
        self.fingerprint = weights_fingerprint(self.network.model)
        if trainer is not None:
            self.place(trainer.strategy.root_device, held_dtype(trainer))

    @torch.no_grad()
    def __call__(self, policy: CausalLM, *rows: Tensor) -> ResponseLogprobs:
        """Log-probs of response tokens; `rows` are what `CausalLM.forward` takes."""
        if self.network is None:
            with policy.adapters_off():
                return policy(*rows)
        self.match(policy)
        return self.network(*rows)

    def follow(self, policy: CausalLM, step: int) -> None:
        """Move towards the policy where that is due after so many optimizer steps."""
        if self.network is not None:
            self.match(policy)
            self.updates.follow(self.network, policy, step)

    def match(self, policy: CausalLM) -> None:
        """Take the policy's device, and the dtype of its weights: the same arithmetic gives the same log-probs."""
        like = next(policy.parameters())
        self.place(like.device, like.dtype)

    def place(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Move the model, where there is one and it is not there; its weights stay as they are without a `dtype`."""
        if self.network is not None:
            first = next(self.network.parameters())
            if (first.device, first.dtype) != (device, dtype or first.dtype):
                move(self.network, device, dtype)

    def float32(self, policy: CausalLM, *others: nn.Module | None) -> AbstractContextManager[None]:
        """For what is judged by: a log-ratio near the start is smaller than the rounding of mixed precision."""
        self.match(policy)
        return float32_arithmetic(policy, self.network, *others)

    def store(self, checkpoint: dict[str, Any]) -> None:
        """Write into a checkpoint which weights it was loaded with, and those that it has where they move."""
        checkpoint[ORIGIN]["reference"] = self.fingerprint
        self.updates.store(self.network, checkpoint)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Go on as that of a checkpoint's run. Raises `ConfigurationError` when it was loaded with other weights."""
        before = checkpoint[ORIGIN].get("reference")
        if None not in (before, self.fingerprint) and before != self.fingerprint:
            raise ConfigurationError(
                f"ckpt_path: the reference of its run had other weights than {self.source} has now, so its losses and "
                "rewards would mean nothing; give model.backbone and model.reference as they were then"
            )
        self.updates.restore(self.network, checkpoint)

    def sums(self, role: Role, index: Tensor) -> Tensor:
        """Precomputed log-probs of both responses of the pairs at B positions of a role, [B, 2]."""
        return self._sums[role][index.cpu()].to(index.device)

    def precompute(self, module: PolicyModule, *roles: Role, cache_dir: str | None) -> None:
        """Get the log-probs of all pairs of some roles, then let go of the model."""
        if not self.precomputed:
            return
        policy = module.policy
        self.match(policy)
        network = policy if self.network is None else self.network
        config = network.config.to_dict() | {"_name_or_path": None}  # a copy elsewhere is the same model
        weights = weights_fingerprint(network, ignore=("lora_", "modules_to_save"))
        for role in roles:
            # In training as the policy is computed, so that the rounding of the two cancels where they are equal.
            training, precision = role == "train", str(module.trainer.precision)
            if not training and precision in ("16-mixed", "bf16-mixed"):
                precision = "32-true"
            self._sums[role] = self._precomputed_sums(
                module,
                role,
                ReferenceCache((weights, sorted(config.items()), precision, module.device.type), cache_dir=cache_dir),
                precision=precision,
                arithmetic=module.trainer.precision_plugin.forward_context
                if training
                else lambda: self.float32(policy),
            )
        self.network = None
        if module.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _precomputed_sums(
        self,
        module: PolicyModule,
        role: Role,
        cache: ReferenceCache,
        *,
        precision: str,
        arithmetic: Callable[[], AbstractContextManager],
    ) -> Tensor:
        """Summed log-probs of both responses of each pair of a role, [P, 2] float32, nats, found or computed.

        Inside of `arithmetic()` their rounding is that of the Trainer's `precision`. The processes share the work.
        Raises `TrainingError` when some of those found, computed again, differ, or another process's are not seen here.
        """
        trainer, data = module.trainer, module.trainer.datamodule
        pairs = data.pairs[role]
        hashes = [pair_hash(*pairs.segments(index)) for index in range(len(pairs))]

        def computed(positions: np.ndarray) -> Iterator[tuple[list[int], Tensor]]:
            for batch in data.batches(role, positions):
                batch = trainer.strategy.batch_to_device(batch)
                with arithmetic():
                    sums = self(module.policy, batch.input_ids, batch.attention_mask, batch.response_mask).sums
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
            own = missing[missing % trainer.world_size == trainer.global_rank]
            with progress(f"reference: {role} pairs", len(own), shown=trainer.global_rank == 0) as advance:
                for positions, sums in computed(own):
                    values[positions] = sums
                    done += positions
                    advance(len(positions))
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


def _check_kind(kind: str, module: PolicyModule) -> None:
    adapters, load_in_4bit = module.lora is not None, module.hparams.load_in_4bit
    if kind == ADAPTER and not adapters:
        raise ConfigurationError(
            "model.reference: adapter is the policy without its adapters, and there are none; give model.lora, or "
            "reference: frozen"
        )
    if kind == ADAPTER and module.lora is not None and module.lora.changes_base:
        raise ConfigurationError(
            f"model.lora.init_lora_weights: {module.lora.init_lora_weights} changes the weights below the adapters, so "
            "the policy without them is not its start; set model.reference: frozen, a copy of it, or leave the key out"
        )
    if load_in_4bit and not adapters:
        raise ConfigurationError("model.load_in_4bit: 4-bit weights cannot be trained; give model.lora as well")
    if kind == FROZEN and load_in_4bit:
        raise ConfigurationError(
            "model.reference: frozen would be a copy without the policy's 4-bit quantization, so another model; use "
            "reference: adapter"
        )


def _check_model(reference: str, module: PolicyModule) -> None:
    """Refuse what is no model, or one of another kind or another vocabulary. Raises `ConfigurationError`."""
    try:
        config = load_causal_config(reference, trust_remote_code=module.hparams.trust_remote_code)
    except ModelError as error:
        if "/" in reference or ":" in reference or Path(reference).exists():
            raise
        raise ConfigurationError(
            f"model.reference: {reference} is neither frozen nor adapter nor a model ({error})"
        ) from error
    for what in ("model_type", "vocab_size"):
        mine, its = (getattr(each.get_text_config(), what) for each in (module.backbone_config, config))
        if mine != its:
            raise ConfigurationError(
                f"model.reference: {reference} has {what} {its}, but {module.hparams.backbone} has {mine}; their "
                "log-probs cannot be compared. Give a model of the same architecture and tokenizer"
            )
