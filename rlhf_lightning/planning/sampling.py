"""What a run that samples its own responses holds: reward models, a value model, the cache of the responses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlhf_lightning.models.configuration import load_config
from rlhf_lightning.models.reward_network import HeadSettings, saved_head
from rlhf_lightning.models.value_network import value_source
from rlhf_lightning.planning.simulation import Kind, Pass, Shape, Weights, cache_bytes, count_weights
from rlhf_lightning.rewards.functions import is_function, is_judge
from rlhf_lightning.rewards.source import reward_list
from rlhf_lightning.training.online import OnlineModule
from rlhf_lightning.training.ppo import PPO, SHARED

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rlhf_lightning.planning.memory import Run

log = logging.getLogger(__name__)

_PER_LOGIT = 4 * 3
"""Bytes while a token is drawn: the logit, its noise, and their sum, in float32."""


@dataclass(frozen=True)
class SideModel:
    """A model beside the policy that gives one number for a row, or for each of its tokens."""

    config: PretrainedConfig
    head: HeadSettings

    def shape(self, policy: Shape, *, rows: int, trained: bool = False) -> Shape:
        """Of its pass over rows that are as long as the policy's."""
        own = replace(policy, policy=False, lora=None, half_frozen=False, head=self.head, rows=rows)
        return own if trained else replace(own, freeze_backbone=True, gradient_checkpointing=False)


@dataclass(frozen=True)
class SamplingShape:
    """What the memory of a run that samples depends on, beside its policy."""

    slots: int
    """Responses that are made at a time; 0 where a server makes them."""
    scored: int
    """Rows of a pass without gradients."""
    rewards: tuple[SideModel, ...]
    value: SideModel | None
    """A value model of its own; a head on the policy's states takes next to nothing."""
    reference: bool
    """There is a frozen copy of the policy."""


@dataclass(frozen=True)
class Beside:
    """Bytes of each device that such a run takes beside its policy."""

    held: dict[str, float]
    """All the time, by what it is."""
    training: float
    """More in a training batch."""
    step: float
    """More in an optimizer step."""
    phases: dict[str, float]
    """More than what is held all the time, at times that only such a run has."""


def sampling_of(module: OnlineModule) -> SamplingShape:
    """Read the configurations of the models that a module names, and nothing else of them; judges are not counted.

    A reward model of the policy's architecture and vocabulary is taken to have its tokenizer, and so to be what the
    value model begins as. Raises `ConfigurationError` and `ModelError` as loading the configurations does.
    """
    settings, config = module.hparams, module.backbone_config
    given = [each.source for each in reward_list(module.reward_source, settings.reward_chat_template)]
    names = [name for name in given if isinstance(name, str) and not is_function(name) and not is_judge(name)]
    rewards = {name: _scorer(name, settings.trust_remote_code) for name in names}
    for judge in filter(is_judge, given):
        log.warning("memory: %s is not counted; leave room for it, or let a server run it", judge)
    value = None
    if isinstance(module, PPO) and module.estimator.uses_values and settings.value_model != SHARED:
        size = config.get_text_config().vocab_size
        alike = [name for name, each in rewards.items() if getattr(each.config, "vocab_size", None) == size]
        source = value_source(
            settings.value_model,
            reward_model=alike[0] if alike else None,
            backbone=settings.backbone,
            policy=config,
            trust_remote_code=settings.trust_remote_code,
        )
        value = SideModel(config, {}) if source == settings.backbone else _scorer(source, settings.trust_remote_code)
    rows = settings.generation_micro_batch_size
    slots = rows if settings.engine == "transformers" else 0
    return SamplingShape(slots, rows, tuple(rewards.values()), value, module.reference_kind == "copy")


def _scorer(name: str, trust_remote_code: bool) -> SideModel:
    config = load_config(name, trust_remote_code=trust_remote_code)
    return SideModel(config, saved_head(config) or {"head": "linear"})


def beside(
    run: Run,
    sampling: SamplingShape,
    policy: PretrainedConfig,
    shape: Shape,
    weights: Weights,
    simulated: Callable[[PretrainedConfig, Shape, Kind], Pass],
) -> Beside:
    """What a run takes beside the policy, which has `weights` and makes passes of `shape` in training."""
    number = 2 if shape.half_weights else 4
    frozen = weights.total - (weights.trained if shape.lora else 0)
    scorers = [(each.config, each.shape(shape, rows=sampling.scored)) for each in sampling.rewards]
    held = {
        "reference model": float(number * frozen if sampling.reference else 0),
        "reward models": float(sum(number * count_weights(*each).total for each in scorers)),
    }
    scorers.append((policy, replace(shape, rows=sampling.scored, gradient_checkpointing=False)))
    scoring = max(simulated(*each, "inference").peak for each in scorers)
    training = step = 0.0
    if sampling.value is not None:
        its = sampling.value.shape(shape, rows=shape.rows, trained=True)
        counted = count_weights(sampling.value.config, its)
        trained = counted.trained / (run.processes if run.zero else 1)
        on_device = 0.0 if run.offload else number + run.optimizer_bytes + (4 if run.zero else 0)
        held["value model"] = float(number * counted.total)
        held["its gradients and optimizer states"] = on_device * trained
        training = float(simulated(sampling.value.config, its, "training").peak)
        step = 0.0 if run.offload else run.optimizer_temporary * trained
    # A validation samples in float32. Adapters are merged into a copy of the weights where there is room, uncounted.
    making = cache_bytes(policy, sampling.slots * shape.tokens, size_of_number=4)
    making += _PER_LOGIT * sampling.slots * policy.get_text_config().vocab_size
    if sampling.slots and run.half and not (shape.half_weights or shape.half_frozen):
        making += 2 * weights.quantizable  # cast once for all tokens
    return Beside(held, training, step, {"responses": float(making), "scoring": float(scoring)})
