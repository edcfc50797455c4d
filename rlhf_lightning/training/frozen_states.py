"""What a reward head reads of a backbone that is not trained: computed once for a fit, not in every pass over the data.

B pairs, P pairs of a role, W numbers that the head reads of a row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.data.datamodules import PreferenceDataModule
from rlhf_lightning.data.roles import Role
from rlhf_lightning.models.precision import float32_arithmetic
from rlhf_lightning.models.reward_network import head_input_size, pooled
from rlhf_lightning.terminal import progress

if TYPE_CHECKING:
    from rlhf_lightning.training.reward_model import RewardModel

_MOST_BYTES = 2 * 2**30
"""Of the states of a role, on the host; with more, they are computed in each pass."""


class FrozenStates:
    """The states that the head of a `RewardModel` with a frozen backbone reads, on the host.

    All pairs of a role are computed at the start of a fit, in batches that go by the data alone: so a resumed run has
    the very numbers of one that was not stopped.
    """

    def __init__(self) -> None:
        self._states: dict[Role, Tensor] = {}

    def prepare(self, module: RewardModel) -> None:
        """Compute those of the pairs that the fit takes more than once, in the arithmetic in which they are used."""
        self.clear()
        trainer, data = module.trainer, module.trainer.datamodule
        if not isinstance(data, PreferenceDataModule) or trainer.world_size > 1 or trainer.fast_dev_run:
            return
        accumulate = trainer.accumulate_grad_batches
        steps = math.ceil(len(data.training_plan(accumulate=accumulate)) / accumulate)
        passes = trainer.estimated_stepping_batches / steps if trainer.limit_train_batches == 1.0 else 0
        width = head_input_size(module.backbone_config, module.hparams.pooling)
        for role, wanted in (("train", passes > 1), ("val", trainer.limit_val_batches == 1.0)):
            if wanted and role in data.rows and len(data.rows[role]) * 2 * width * 4 <= _MOST_BYTES:
                self._states[role] = self._computed(module, data, role, width)

    @torch.no_grad()
    def _computed(self, module: RewardModel, data: PreferenceDataModule, role: Role, width: int) -> Tensor:
        """[P, 2, W] float32: of the chosen and the rejected row of each pair."""
        count = len(data.rows[role])
        states = torch.empty(count, 2, width)
        network, trainer = module.network, module.trainer
        with progress(f"frozen backbone: {role} pairs", count) as advance:
            for batch in data.batches(role, np.arange(count)):
                batch = trainer.strategy.batch_to_device(batch)
                training = role == "train"
                with trainer.precision_plugin.forward_context() if training else float32_arithmetic(network):
                    rows = pooled(network.backbone, batch.input_ids, batch.attention_mask, network.pooling)
                states[batch.index.cpu()] = torch.stack(rows.float().cpu().chunk(2), dim=1)
                advance(batch.pairs)
        return states

    def find(self, role: Role, batch: PreferenceBatch) -> Tensor | None:
        """[2B, W] float32 of the rows of a batch of a role, the chosen ones first; None where they are not kept."""
        states = self._states.get(role)
        if states is None:
            return None
        return states[batch.index.cpu()].transpose(0, 1).flatten(0, 1).to(batch.input_ids.device)

    def clear(self) -> None:
        """Let go of all of them."""
        self._states.clear()
