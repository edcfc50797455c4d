"""Training and evaluation of a reward model on preference pairs.

B pairs, T padded tokens.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.data.roles import Role
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.functional.losses import bradley_terry_loss
from rlhf_lightning.metrics import (
    MarginAUROC,
    PairCount,
    PairwiseAccuracy,
    PairwiseCalibrationError,
    PooledAUROC,
)
from rlhf_lightning.models.objects import ModelSource
from rlhf_lightning.models.precision import float32_arithmetic
from rlhf_lightning.models.reward_network import Activation, Pooling, RewardNetwork, is_reward_network, pooling_of
from rlhf_lightning.training.callbacks import PairScores
from rlhf_lightning.training.checks import check_finite
from rlhf_lightning.training.module import Measured, TrainedModule, means
from rlhf_lightning.training.optimization import Fraction, Smoothing

log = logging.getLogger(__name__)


class RewardModel(TrainedModule):
    """Reward model: a transformer backbone with a two-layer MLP head, trained with -log sigmoid(r_chosen - r_rejected).

    Args:
        backbone: Hub name or directory of any decoder or encoder, of a saved reward network (its head is kept), or
            `builtin:tiny`.
        hidden_size: Width of the head's hidden layer; the backbone's hidden size when not given.
        activation: Of the head's hidden layer.
        dropout: Of the head's hidden layer. The backbone's dropout is always off.
        pooling: The hidden state that the head reads: of the `last` token, the `mean` over all tokens, or `layers`, the
            means of the embeddings and of all layers side by side. Of a saved reward network, its own is kept.
        freeze_backbone: Train the head alone: a pass without backward, and no optimizer states of the backbone. Goes
            with `pooling: layers`, as the last layer alone says little of what nobody trained it for.
            Gradient checkpointing does nothing then.
        label_smoothing: Probability with which a label is taken to be wrong.
        center_rewards_coefficient: Weight of (r_chosen + r_rejected)^2, which pulls the mean reward to 0 and so makes
            the rewards of different prompts comparable; 0.01 is usual (Eisenstein et al. 2023, arXiv 2312.09244).
        use_margin: Subtract each pair's margin from the difference of its rewards in the loss.
        optimizer: Any torch optimizer with its arguments, which has torch's defaults for the rest of them; Adam with
            learning rate 2e-5 when none is named.
    """

    shown = ("loss", "auroc")
    log_line = {"loss": "loss", "accuracy": "accuracy"}  # noqa: RUF012
    network: RewardNetwork
    """There once `configure_model` has run."""

    def __init__(
        self,
        backbone: ModelSource,
        hidden_size: PositiveInt | None = None,
        activation: Activation = "relu",
        dropout: Fraction = 0.0,
        pooling: Pooling = "last",
        freeze_backbone: bool = False,
        label_smoothing: Smoothing = 0.0,
        center_rewards_coefficient: NonNegativeFloat = 0.0,
        use_margin: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=2e-5),
        **shared: Any,
    ) -> None:
        super().__init__(backbone, optimizer=optimizer, **shared)
        if not isinstance(backbone, str) and is_reward_network(self.backbone_config):
            raise ConfigurationError(
                "model.backbone: a saved reward network as an object has no head; give its directory"
            )
        self.hparams.pooling = pooling_of(self.backbone_config) or pooling
        if pooling not in ("last", self.hparams.pooling):
            log.warning("model.pooling: %s keeps its own, %s, not %s", backbone, self.hparams.pooling, pooling)
        self.train_metrics = nn.ModuleDict({"accuracy": PairwiseAccuracy()} | means("loss", "margin", "reward"))
        self.val_metrics, self.test_metrics = _evaluation_metrics(), _evaluation_metrics()

    def build_network(self) -> None:
        settings = self.hparams
        if is_reward_network(self.backbone_config):
            self.network = RewardNetwork.from_pretrained(settings.backbone, **self.loading).train()
        else:
            self.network = RewardNetwork.from_backbone(
                self.backbone,
                hidden_size=settings.hidden_size,
                activation=settings.activation,
                dropout=settings.dropout,
                pooling=settings.pooling,
                **self.loading,
            )
        self.network.backbone.requires_grad_(not settings.freeze_backbone)
        if settings.gradient_checkpointing and not settings.freeze_backbone:
            self.network.backbone.activation_checkpointing_enable()

    def on_fit_start(self) -> None:
        super().on_fit_start()
        head = "its own" if is_reward_network(self.backbone_config) else "a new"
        head = head if self.trainer.ckpt_path is None else "the checkpoint's"
        log.info("reward: %s head, pooling %s", head, self.hparams.pooling)

    def forward(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Scores of the chosen and of the rejected responses, each [B] float32, in one pass over 2B rows."""
        return self.network(batch.input_ids, batch.attention_mask).chunk(2)

    def losses(self, batch: PreferenceBatch, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Loss of each pair, [B] float32."""
        return bradley_terry_loss(
            chosen,
            rejected,
            margin=batch.margin if self.hparams.use_margin else None,
            label_smoothing=self.hparams.label_smoothing,
            centering=self.hparams.center_rewards_coefficient,
        )

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        chosen, rejected = self(batch)
        losses = self.losses(batch, chosen, rejected)
        check_finite(self, batch, losses)
        _measured(losses.detach(), chosen.detach(), rejected.detach()).feed(self.train_metrics)
        return batch.weight * losses.mean()

    def trial_loss(self, batch: PreferenceBatch) -> Tensor:
        """The mean loss of a batch, of which nothing is logged."""
        return self.losses(batch, *self(batch)).mean()

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> PairScores:
        with float32_arithmetic(self.network):
            return PairScores(batch.index, *self(batch))

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Raises `ConfigurationError` when the head would read other states, or go on with an optimizer of others."""
        super().on_load_checkpoint(checkpoint)
        pooling = checkpoint["hyper_parameters"].get("pooling", "last")
        if pooling != self.hparams.pooling:
            raise ConfigurationError(
                f"ckpt_path: its run had model.pooling {pooling}, this one has {self.hparams.pooling}, so its head "
                "would read other states; give the model.backbone and the model.pooling of its run"
            )
        before, now = checkpoint["hyper_parameters"].get("freeze_backbone", False), self.hparams.freeze_backbone
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if fitting and before != now:
            raise ConfigurationError(
                f"ckpt_path: its run had model.freeze_backbone {before}, this one has {now}, so its optimizer is "
                "one of other weights; export it and give the directory as model.backbone"
            )

    def save_network(self, directory: Path, *, merge: bool) -> None:
        self.network.save_pretrained(directory)

    def measure(self, batch: PreferenceBatch, stage: Role) -> Measured:
        with float32_arithmetic(self.network):
            chosen, rejected = self(batch)
        return _measured(self.losses(batch, chosen, rejected), chosen, rejected)


def _evaluation_metrics() -> nn.ModuleDict:
    ours = {"accuracy": PairwiseAccuracy(), "auroc": PooledAUROC(), "margin_auroc": MarginAUROC()}
    ours |= {"calibration_error": PairwiseCalibrationError(), "pairs": PairCount()}
    return nn.ModuleDict(means("loss", "margin", "reward") | ours)


def _measured(losses: Tensor, chosen: Tensor, rejected: Tensor) -> Measured:
    """What B pairs give: the losses, the differences, the mean rewards, and the two sides."""
    means = {"loss": losses, "margin": chosen - rejected, "reward": (chosen + rejected) / 2}
    return Measured(means, (chosen, rejected))
