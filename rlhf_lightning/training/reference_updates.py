"""A reference that follows its policy: every so many optimizer steps its weights go towards those of the policy."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.models.causal_lm import CausalLM

if TYPE_CHECKING:
    from rlhf_lightning.training.policy_module import PolicyModule

log = logging.getLogger(__name__)

_KEY = "reference"
_MOVED = ("val/loss", "val/rewards/margins", "val/kl")
"""Metrics that an update of the reference sets back."""


class ReferenceUpdates:
    """reference <- alpha * policy + (1 - alpha) * reference, every `steps` optimizer steps; 1 copies the policy.

    Adapters count as merged into the policy's weights. An update comes before the first batch of the next step, so that
    a validation at a step, and the checkpoint of it, still have the reference that the step was made with.
    Gorbatovski et al. 2024 (TR-DPO, arXiv 2404.09656), eq. 3 (soft) and 4 (hard).

    Raises `ConfigurationError` for settings under which there is no model to move, or none to move it to.
    """

    def __init__(
        self, steps: int | None, alpha: float | None, module: PolicyModule, *, is_copy: bool, precomputed: bool
    ) -> None:
        self.steps, self.alpha = steps, 1.0 if alpha is None else alpha
        self._updated_at = 0
        """The optimizer step before which the last update came."""
        self._warned = False
        if steps is None:
            if alpha is not None:
                raise ConfigurationError(
                    "model.reference_update_alpha: nothing is updated; give model.reference_update_steps as well"
                )
            return
        key = "model.reference_update_steps"
        if not 0 < self.alpha <= 1:
            raise ConfigurationError(f"model.reference_update_alpha is {self.alpha:g}; give a share above 0, at most 1")
        if not is_copy:
            raise ConfigurationError(
                f"{key}: reference adapter is the policy's own weights without the adapters, which do not move; give "
                "model.reference frozen, a model of its own"
            )
        if precomputed:
            raise ConfigurationError(f"{key}: precomputed log-probs are of one reference; leave one of both out")
        if module.hparams.load_in_4bit:
            raise ConfigurationError(f"{key}: weights in 4 bits cannot be handed on; leave out model.load_in_4bit")

    def __str__(self) -> str:
        if self.steps is None:
            return ""
        share = "" if self.alpha == 1 else f" by {self.alpha:g} of the way"
        return f", moved to the policy{share} every {self.steps} steps"

    def check_trainer(self, trainer: Trainer) -> None:
        """Refuse DeepSpeed, and warn where the best checkpoint is judged by a number that updates set back."""
        if self.steps is None:
            return
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ConfigurationError(
                "model.reference_update_steps: not with DeepSpeed, which holds the policy in half precision; use "
                "trainer.strategy auto or ddp"
            )
        monitors = [each.monitor for each in trainer.callbacks if isinstance(each, ModelCheckpoint)]
        for monitor in {*monitors} & {*_MOVED} if not self._warned else ():
            self._warned = True
            log.warning(
                "ModelCheckpoint.monitor: %s is relative to a reference that moves, so its values at two steps cannot "
                "be compared; monitor an accuracy or AUROC, or keep the last checkpoint",
                monitor,
            )

    @torch.no_grad()
    def follow(self, network: CausalLM, policy: CausalLM, step: int) -> None:
        """Move a reference's weights if an update is due, given the number of optimizer steps that are done."""
        if self.steps is None or step == 0 or step % self.steps or step == self._updated_at:
            return
        self._updated_at = step
        own = dict(network.model.named_parameters())
        moved = set()
        for name, weight in policy.merged_weights():
            if name in own:
                target = own[name]
                target.copy_(target.float().lerp(weight.float(), self.alpha))
                moved.add(name)
        assert moved == own.keys(), sorted(own.keys() - moved)

    def store(self, network: CausalLM | None, checkpoint: dict[str, Any]) -> None:
        """Write the weights of a reference that moves into a checkpoint."""
        if self.steps is not None and network is not None:
            checkpoint[_KEY] = {"weights": dict(network.model.named_parameters()), "updated_at": self._updated_at}

    @torch.no_grad()
    def restore(self, network: CausalLM | None, checkpoint: dict[str, Any]) -> None:
        """Give a reference the weights that it had when a checkpoint was written; nothing where it had not moved."""
        state = checkpoint.get(_KEY)
        self._updated_at = checkpoint["global_step"] if state is None else state["updated_at"]
        if state is not None and network is not None:
            for name, parameter in network.model.named_parameters():
                parameter.copy_(state["weights"][name])
