"""Training and evaluation of a reward model on preference pairs.

B pairs, T padded tokens.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.data.chat_export import padding_of_scored
from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.datamodules import chat_format_of
from rlhf_lightning.data.roles import Role
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.functional.ensembles import ensemble_spread
from rlhf_lightning.functional.losses import bradley_terry_loss
from rlhf_lightning.metrics import (
    LabelAUROC,
    MarginAUROC,
    PairCount,
    PairwiseAccuracy,
    PairwiseCalibrationError,
    PooledAUROC,
)
from rlhf_lightning.models.linear_head import classifier_without_weights
from rlhf_lightning.models.objects import ModelSource
from rlhf_lightning.models.precision import float32_arithmetic
from rlhf_lightning.models.reward_network import (
    Activation,
    HeadKind,
    HeadSettings,
    Pooling,
    RewardNetwork,
    check_head,
    is_reward_network,
    saved_head,
)
from rlhf_lightning.models.states import counts_from_padding
from rlhf_lightning.models.storage import pad_with
from rlhf_lightning.training.callbacks import EnsembleScores, PairScores
from rlhf_lightning.training.checkpoints import save_format
from rlhf_lightning.training.checks import check_finite
from rlhf_lightning.training.frozen_states import FrozenStates
from rlhf_lightning.training.measures import Measured, means
from rlhf_lightning.training.module import TrainedModule
from rlhf_lightning.training.optimization import Fraction, Smoothing

log = logging.getLogger(__name__)


class RewardModel(TrainedModule):
    """Reward model: a transformer backbone with a small head, trained with -log sigmoid(r_chosen - r_rejected).

    Args:
        backbone: Hub name, directory (whole, or LoRA adapters) or GGUF file of any decoder or encoder, of a
            saved reward network (its head is kept), or `builtin:tiny`.
        head: `mlp`, two layers, or `linear`, one without bias on the last token's state. What is exported with an
            `mlp`, transformers loads with `trust_remote_code=True`, and refuses without; with `linear` it is a
            `*ForSequenceClassification` of transformers itself, which pipelines, CrossEncoder, TRL and vLLM load.
            Encoders have no such class. Of a saved reward network, its own is kept.
        hidden_size: Width of the hidden layer of an `mlp` head; the backbone's hidden size when not given.
        activation: Of the head's hidden layer.
        dropout: Of the head's hidden layer. The backbone's dropout is always off.
        pooling: The hidden state that the head reads: of the `last` token, the `mean` over all tokens, or `layers`, the
            means of the embeddings and of all layers side by side. Of a saved reward network, its own is kept.
        num_heads: Heads on the one backbone, each begun and trained by itself. Above 1 the score is their mean, and
            their standard deviation, the spread, says how sure it is. Set `center_rewards_coefficient` too: the loss
            leaves an offset of each head free, and the spread contains it. Of a saved reward network, its own is kept.
        freeze_backbone: Train the head alone, on states of the backbone that are computed once for a fit of one process
            (up to 2 GiB of them). Goes with `pooling: layers`, as the last layer alone says little of what nobody
            trained it for. Gradient checkpointing does nothing then.
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
        head: HeadKind = "mlp",
        hidden_size: PositiveInt | None = None,
        activation: Activation = "relu",
        dropout: Fraction = 0.0,
        pooling: Pooling = "last",
        num_heads: PositiveInt = 1,
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
        self._keep_own_head(head=head, pooling=pooling, num_heads=num_heads)
        check_head(self.head_settings)
        if self.hparams.head == "linear":
            classifier_without_weights(self.backbone_config)
        self.frozen_states = FrozenStates()
        several = self.hparams.num_heads > 1
        names = ("loss", "margin", "reward", *(["spread"] if several else []))
        self.train_metrics = nn.ModuleDict({"accuracy": PairwiseAccuracy()} | means(*names))
        self.val_metrics, self.test_metrics = (_evaluation_metrics(*names) for _ in range(2))

    def _keep_own_head(self, **given: str | int) -> None:
        """A saved reward network keeps its head, and says so where another was asked for."""
        for key, value in (saved_head(self.backbone_config) or {}).items():
            if key in given and given[key] not in (_USUAL[key], value):
                log.warning("model.%s: %s keeps its own, %s, not %s", key, self.hparams.backbone, value, given[key])
            self.hparams[key] = value

    @property
    def head_settings(self) -> HeadSettings:
        """Those of the head that is trained."""
        settings = self.hparams
        return {
            "head": settings.head,
            "hidden_size": settings.hidden_size,
            "activation": settings.activation,
            "dropout": settings.dropout,
            "pooling": settings.pooling,
            "num_heads": settings.num_heads,
        }

    def build_network(self) -> None:
        settings = self.hparams
        if is_reward_network(self.backbone_config):
            self.network = RewardNetwork.from_pretrained(settings.backbone, **self.loading).train()
        else:
            self.network = RewardNetwork.from_backbone(self.backbone, **self.head_settings, **self.loading)
        self.network.backbone.requires_grad_(not settings.freeze_backbone)
        if settings.gradient_checkpointing and not settings.freeze_backbone:
            self.network.backbone.activation_checkpointing_enable()

    def on_fit_start(self) -> None:
        super().on_fit_start()
        head = "its own" if is_reward_network(self.backbone_config) else "a new"
        head = head if self.trainer.ckpt_path is None else "the checkpoint's"
        settings = self.hparams
        several = f", {settings.num_heads} of them" if settings.num_heads > 1 else ""
        log.info("reward: %s %s head%s, pooling %s", head, settings.head, several, settings.pooling)
        if self.hparams.freeze_backbone:
            self.frozen_states.prepare(self)

    def on_fit_end(self) -> None:
        self.frozen_states.clear()

    def forward(self, batch: PreferenceBatch, role: Role | None = None) -> tuple[Tensor, Tensor]:
        """Scores of the chosen and of the rejected responses, each [B] float32: the means of `each`."""
        chosen, rejected = self.each(batch, role)
        return chosen.mean(dim=1), rejected.mean(dim=1)

    def each(self, batch: PreferenceBatch, role: Role | None = None) -> tuple[Tensor, Tensor]:
        """Scores by each of K heads, [B, K] float32 of the chosen and the rejected ones, in one pass over 2B rows.

        Those of a `role` that the fit has the states of a frozen backbone of take the heads alone.
        """
        states, network = None if role is None else self.frozen_states.find(role, batch), self.network
        rows = (batch.input_ids, batch.attention_mask)
        chosen, rejected = (network.each(*rows) if states is None else network.each_of(states)).chunk(2)
        return chosen, rejected

    def losses(self, batch: PreferenceBatch, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Loss of each pair, [B] float32, of scores [B]; or of scores [B, K] the mean of the K heads' own losses."""
        if chosen.dim() == 2:
            heads = zip(chosen.unbind(dim=1), rejected.unbind(dim=1), strict=True)
            return torch.stack([self.losses(batch, *scores) for scores in heads]).mean(dim=0)
        return bradley_terry_loss(
            chosen,
            rejected,
            margin=batch.margin if self.hparams.use_margin else None,
            label_smoothing=self.hparams.label_smoothing,
            centering=self.hparams.center_rewards_coefficient,
        )

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        chosen, rejected = self.each(batch, "train")
        losses = self.losses(batch, chosen, rejected)
        check_finite(self, batch, losses)
        _measured(losses.detach(), chosen.detach(), rejected.detach()).feed(self.train_metrics)
        return batch.weight * losses.mean()

    def trial_loss(self, batch: PreferenceBatch) -> Tensor:
        """The mean loss of a batch, of which nothing is logged."""
        return self.losses(batch, *self.each(batch)).mean()

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> PairScores | EnsembleScores:
        with float32_arithmetic(self.network):
            chosen, rejected = self.each(batch)
        scores = PairScores(batch.index, chosen.mean(dim=1), rejected.mean(dim=1))
        return scores if chosen.shape[1] == 1 else EnsembleScores(*scores, *_spreads(chosen, rejected))

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Raises `ConfigurationError` when the head would read other states, or go on with an optimizer of others."""
        super().on_load_checkpoint(checkpoint)
        for key, usual in _USUAL.items():
            value = checkpoint["hyper_parameters"].get(key, usual)
            if value != self.hparams[key]:
                raise ConfigurationError(
                    f"ckpt_path: its run had model.{key} {value}, this one has {self.hparams[key]}, so its head is "
                    f"another one; give the model.backbone and the model.{key} of its run"
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

    def check_data(self, data: LightningDataModule | None) -> None:
        super().check_data(data)
        chat_format = chat_format_of(data)
        if self.hparams.head == "linear" and chat_format is not None and padding_of_scored(chat_format) is None:
            raise ConfigurationError(
                "model.head: linear is a class of transformers that finds the last token by the padding, and the "
                "tokenizer has no special token to pad with but the one that ends the responses; give it one "
                "(tokenizer.pad_token), or use model.head: mlp"
            )

    def save_chat_format(self, chat_format: ChatFormat, directory: Path) -> None:
        save_format(chat_format, directory, scored=True)
        padding = padding_of_scored(chat_format)
        if padding is not None and not counts_from_padding(self.network.backbone):
            pad_with(directory, padding)

    def measure(self, batch: PreferenceBatch, stage: Role) -> Measured:
        with float32_arithmetic(self.network):
            chosen, rejected = self.each(batch, stage)
        return _measured(self.losses(batch, chosen, rejected), chosen, rejected)


_USUAL = {"head": "mlp", "pooling": "last", "num_heads": 1}
"""Keys of a head that a saved network, and a checkpoint, keep, as they are when not given."""


def _evaluation_metrics(*names: str) -> nn.ModuleDict:
    ours = {"accuracy": PairwiseAccuracy(), "auroc": PooledAUROC(), "margin_auroc": MarginAUROC()}
    ours |= {"calibration_error": PairwiseCalibrationError(), "pairs": PairCount()}
    if "spread" in names:
        ours["spread_auroc"] = LabelAUROC()
    return nn.ModuleDict(means(*names) | ours)


def _measured(losses: Tensor, chosen: Tensor, rejected: Tensor) -> Measured:
    """What B pairs give, by K heads [B, K]: losses, differences, mean rewards, spreads, and the two sides."""
    sides = c, r = chosen.mean(dim=1), rejected.mean(dim=1)
    values: dict[str, Tensor | tuple[Tensor, ...]] = {"loss": losses, "margin": c - r, "reward": (c + r) / 2}
    if chosen.shape[1] > 1:
        of_chosen, of_rejected, of_margin = _spreads(chosen, rejected)
        values |= {"spread": (of_chosen + of_rejected) / 2, "spread_auroc": (of_margin, c <= r)}
    return Measured(values, sides)


def _spreads(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the scores of K heads, [B, K], and of the differences of the two sides, [B] each."""
    return ensemble_spread(chosen), ensemble_spread(rejected), ensemble_spread(chosen - rejected)
