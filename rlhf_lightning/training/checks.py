"""What stops a run, or warns, because its numbers cannot be what they should be.

B pairs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from rlhf_lightning.batches import PreferenceBatch, SFTBatch, UnpairedBatch
from rlhf_lightning.data.datamodules import DataModule, PreferenceDataModule
from rlhf_lightning.data.prompt_datamodule import PromptDataModule
from rlhf_lightning.data.sft_datamodule import SFTDataModule
from rlhf_lightning.data.tokenized import Kind
from rlhf_lightning.data.unpaired_datamodule import UnpairedDataModule
from rlhf_lightning.errors import ConfigurationError, ModelError, TrainingError
from rlhf_lightning.functional.advantages import AdvantageEstimator
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.configuration import max_positions
from rlhf_lightning.training.best import best_checkpoint
from rlhf_lightning.training.checkpoints import ORIGIN, metrics_of, read_checkpoint, restored_module
from rlhf_lightning.training.results import network_of, weights_sum

if TYPE_CHECKING:
    from transformers import PretrainedConfig


log = logging.getLogger(__name__)

_START_TOLERANCE = {"16-mixed": 1e-2, "bf16-mixed": 5e-2}
"""How far the first loss may be off in half precision; 1e-4 in others. The two forwards are the same arithmetic, but an
accelerator may choose another attention kernel for the one without gradients."""

_FALLEN = -1.0
"""Nats by which the chosen responses must have fallen on average before there is an alarm."""


def check_precision(trainer: Trainer) -> None:
    """Refuse precisions that compute wrong numbers. Raises `ConfigurationError`."""
    if trainer.precision in ("16-true", "bf16-true"):
        half = trainer.precision.removesuffix("-true")
        raise ConfigurationError(
            f"trainer.precision: {trainer.precision} rounds the rotary position frequencies as well, which spoils long "
            f"rows; use {half}-mixed or 32-true"
        )


def check_tokens_fit(
    data: LightningDataModule | None,
    config: PretrainedConfig,
    name: str,
    *,
    kinds: Sequence[Kind],
    new_tokens: int | None = None,
) -> None:
    """Check that the data is of one of some kinds, and that its token ids fit a model.

    Where the data's limit of tokens is beyond the model's positions, it is lowered to them, with a line that says so.
    `new_tokens` are those that the model adds to a prompt. Raises `ConfigurationError`.
    """
    kind = data.rows_class.kind if isinstance(data, DataModule) else "pairs"
    if data is not None and kind not in kinds:
        modules = (PreferenceDataModule, SFTDataModule, UnpairedDataModule, PromptDataModule)
        known = [each.__name__ for each in modules if each.rows_class.kind in kinds]
        raise ConfigurationError(
            f"data: this model learns from {' or '.join(kinds)}; use {' or '.join(known)}, not {type(data).__name__}"
        )
    if not isinstance(data, DataModule):
        return
    limit, key = max_positions(config), data.rows_class.limit_key
    room = None if limit is None else limit - (new_tokens or 0)
    if room is not None and room < 1:
        raise ConfigurationError(
            f"model.max_new_tokens is {new_tokens}, but {name} has positions for {limit} tokens, which leaves no room "
            f"for a prompt; set max_new_tokens to less"
        )
    longest = getattr(data, key)
    if room is not None and data.lower_limit(room):
        beside = "" if new_tokens is None else f", {new_tokens} of them for model.max_new_tokens"
        log.warning(
            "data.%s is %d, but %s has positions for %d tokens%s: it is set to %d",
            key,
            longest,
            name,
            limit,
            beside,
            room,
        )
    if data.chat_format is not None and len(data.chat_format.tokenizer) > config.vocab_size:
        raise ConfigurationError(
            f"the tokenizer {data.tokenizer_source} has {len(data.chat_format.tokenizer)} tokens, but "
            f"{name} knows {config.vocab_size}; give the tokenizer of this model"
        )


def check_finite(module: LightningModule, batch: PreferenceBatch | SFTBatch | UnpairedBatch, losses: Tensor) -> None:
    """Stop before a NaN or infinite loss, [B], reaches the weights. Raises `TrainingError` naming step and examples."""
    wrong = ~losses.detach().isfinite()
    if not wrong.any():
        return
    data, kept = module.trainer.datamodule, best_checkpoint(module.trainer)
    positions = batch.index[wrong].tolist()
    examples = [str(i) if data is None else data.rows["train"].example_ids[i] for i in positions[:8]]
    more = f" and {len(positions) - 8} more" if len(positions) > 8 else ""
    raise TrainingError(
        f"step {module.trainer.global_step}: the loss is {losses.detach()[wrong][0].item()} for the examples "
        f"{', '.join(examples)}{more}; the weights were not changed by it. Lower the learning rate, set "
        "trainer.gradient_clip_val, or look at these examples; "
        + (f"the last good checkpoint is {kept.path}" if kept else "no checkpoint was saved yet")
    )


def start_tolerance(precision: str) -> float:
    """How far two forwards of one model may be apart, relative, under a precision of the Trainer."""
    return _START_TOLERANCE.get(precision, 1e-4)


def check_start(module: LightningModule, losses: Tensor, expected: Tensor) -> None:
    """Check the first losses against those of a policy equal to its reference, both [B]. Raises `TrainingError`.

    For the sigmoid family that is ln 2, for KTO 1/2: nothing has been learned yet.
    """
    tolerance = start_tolerance(str(module.trainer.precision)) * expected.abs().clamp(min=1)
    difference = (losses - expected).detach().abs()
    if (difference > tolerance).any():
        worst = difference.argmax()
        raise TrainingError(
            f"step 0: a loss is {losses[worst].item():.4f}, but {expected[worst].item():.4f} is due while policy and "
            "reference are the same model: something random (dropout) or other weights are in one of them; give the "
            "policy's own start as reference, or set model.reference to the model that is meant"
        )


def check_finite_step(trainer: Trainer, loss: Tensor, *, key: str) -> None:
    """Stop before a loss, [], that is not finite reaches the weights. Raises `TrainingError`.

    `key` is the setting that holds the policy to its reference.
    """
    if not torch.isfinite(loss):
        raise TrainingError(
            f"step {trainer.global_step}: the loss of a minibatch is {loss.item()}; the weights were not changed by "
            f"it. Lower the learning rate or raise model.{key}"
        )


def check_first_step(trainer: Trainer, numbers: dict[str, float], *, clipped: bool = True) -> None:
    """Before the first step of all, the policy is the one that sampled the rollout. Raises `TrainingError`.

    `clipped`: nothing may be clipped then; off where rounding alone leaves the clip range.
    """
    tolerance = start_tolerance(str(trainer.precision))
    if any(numbers[name] > tolerance for name in ("moved", "approx_kl", *(["clip_fraction"] * clipped))):
        raise TrainingError(
            f"step {trainer.global_step}: before the first update the policy gives its own responses other "
            f"probabilities than when they were sampled (mean ratio {numbers['ratio']:.5f}, mean change "
            f"{numbers['moved']:.2g} nats a token, clipped {numbers['clip_fraction']:.1%}): something random "
            "(dropout) is in it, or its attention sees padding; try another model.attn_implementation"
        )


def check_ppo_settings(settings: Any, estimator: AdvantageEstimator) -> None:
    """Refuse settings of PPO that contradict each other. Raises `ConfigurationError`."""
    if settings.adaptive_kl_target is not None and settings.kl_coef == 0:
        raise ConfigurationError(
            "model.adaptive_kl_target: the coefficient that it steers is model.kl_coef, which is 0 and stays so; give "
            "a start above 0"
        )
    if estimator.uses_groups and settings.num_generations < 2:
        raise ConfigurationError(
            f"model.advantage_estimator: {settings.advantage_estimator} compares responses to one prompt; set "
            "model.num_generations to 2 or more"
        )
    if settings.value_model is not None and not estimator.uses_values:
        raise ConfigurationError(
            f"model.value_model: {settings.advantage_estimator} has no value model; leave the key out"
        )


def adapters_moved(policy: CausalLM) -> bool:
    """Whether any adapter has left its start, where every B is 0."""
    return any(bool(parameter.any()) for name, parameter in policy.named_parameters() if "lora_B" in name)


class AdapterWatch:
    """Stops a run whose adapters have not moved after the first optimizer step with a learning rate above 0."""

    def __init__(self) -> None:
        self.moved = False
        self._learning_rate = 0.0
        self._steps_without_move = 0

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the learning rate of the step to come."""
        self._learning_rate = optimizer.param_groups[0]["lr"]

    def after_batch(self, trainer: Trainer, policy: CausalLM) -> None:
        """Raises `TrainingError`."""
        if self.moved or not policy.has_adapters or self._learning_rate == 0:
            return
        self.moved = adapters_moved(policy)
        self._steps_without_move += 1
        # float16's loss scaler skips some of its first steps.
        allowed = 20 * trainer.accumulate_grad_batches if trainer.precision == "16-mixed" else 1
        if not self.moved and self._steps_without_move >= allowed:
            raise TrainingError(
                f"step {trainer.global_step}: the optimizer stepped with learning rate {self._learning_rate:g}, "
                "but no adapter moved: no gradient reaches them; check model.optimizer and model.lora.target_modules"
            )


def warn_of_falling_chosen(chosen: float, rejected: float, *, sft_weight: bool = False) -> bool:
    """Warn when both responses became less likely than under the reference. Returns whether it did.

    `chosen` and `rejected` are mean summed log-ratios policy - reference, in nats. A preference loss sees only their
    difference, so it can be lowered while the chosen responses are unlearned too (Pal et al. 2024, arXiv 2402.13228).
    """
    if not (chosen < _FALLEN and rejected < 0):
        return False
    log.warning(
        "warning: the chosen responses became less likely together with the rejected ones, by %.1f and %.1f nats a "
        "response since the last look: the policy moves to answers outside of the data; %s, or use loss_type dpop",
        -chosen,
        -rejected,
        "raise model.sft_weight" if sft_weight else "add model.sft_weight (0.2 to 1)",
    )
    return True


def trained_module(kind: type[LightningModule], path: str | Path) -> tuple[LightningModule, dict[str, Any]]:
    """The module of a checkpoint that is to be exported, on the CPU, and what else the checkpoint holds.

    Raises `ModelError` for one that has learned nothing or diverged, and `ConfigurationError` for a damaged one; warns
    of one of the start, or far above it.
    """
    module, stored = restored_module(kind, path), read_checkpoint(path, weights=False)
    if fault := _fault_of_training(module, stored):
        raise ModelError(f"{path}: {fault}")
    if stored["global_step"] == 0:
        log.warning(
            "warning: step 0 has the weights that the run began with; where that is the best checkpoint, no later "
            "validation was better"
        )
    warn_of_divergence(stored)
    return module, stored


def _fault_of_training(module: LightningModule, stored: dict[str, Any]) -> str | None:
    """Why the model of a checkpoint is none that was trained, or None.

    `module` is restored from the checkpoint, and `stored` is what it holds.
    """
    network = network_of(module)
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    if wrong := [name for name, parameter in trained if not parameter.isfinite().all()]:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return f"{wrong[0]}{more}: not finite, so the training diverged; lower the learning rate"
    loss = metrics_of(stored).get("loss", 0.0)
    if not math.isfinite(loss):
        return f"its validation loss is {loss}, so the training diverged; lower the learning rate"
    if stored["global_step"] == 0 and metrics_of(stored):
        return None  # the start of a run that validated it
    start = stored.get(ORIGIN, {}).get("measured", {}).get("start")
    unmoved = isinstance(network, CausalLM) and network.has_adapters and not adapters_moved(network)
    if unmoved or (start is not None and weights_sum(network) == start):
        return (
            f"step {stored['global_step']} has changed no weight, so this is still {module.hparams.backbone} as it was "
            "loaded; train for more steps, or raise the learning rate"
        )
    return None


def warn_of_divergence(stored: dict[str, Any]) -> None:
    """Warn where the validation loss of a checkpoint is far above what the training began with."""
    loss, first = metrics_of(stored).get("loss"), stored.get(ORIGIN, {}).get("measured", {}).get("first_loss")
    if loss is not None and first is not None and loss > 2 * abs(first) + 1:
        log.warning(
            "warning: step %d has a validation loss of %.4g, and the training began with %.4g: it diverged; lower the "
            "learning rate",
            stored["global_step"],
            loss,
            first,
        )
