"""Supervised fine-tuning: a policy that learns the chosen responses by heart, the usual start of DPO and PPO.

B pairs, T padded tokens.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.metrics import PairCount, Perplexity, TokensPerSecond
from rlhf_lightning.models.backbones import AttentionImplementation, check_attention
from rlhf_lightning.models.causal_lm import CausalLM, Lora, Quantization, ResponseLogprobs, load_causal_config
from rlhf_lightning.models.precision import float32_arithmetic
from rlhf_lightning.training.callbacks import PairScores
from rlhf_lightning.training.checkpoints import (
    CheckedModule,
    complete_adapters,
    store_adapters_alone,
    store_origin,
    warn_of_other_settings,
)
from rlhf_lightning.training.checks import check_finite, check_tokens_fit
from rlhf_lightning.training.logs import (
    begin_log,
    let_monitor_means,
    log_parameters,
    log_split,
    log_training_means,
    update_metrics,
)
from rlhf_lightning.training.optimization import (
    Fraction,
    Schedule,
    begin_with_found_rate,
    check_optimizer,
    optimizer_and_schedule,
)


class SFT(CheckedModule):
    """SFT: a causal language model trained with cross-entropy on the chosen response of each preference pair.

    The loss is the mean over pairs of the mean negative log-likelihood per token of the chosen response, terminator
    included, prompt excluded: every response counts the same, whatever its length and its batch. Rejected responses are
    read by `predict` alone.

    Args:
        backbone: Model to start from: hub name or directory of any causal language model, or `builtin:tiny`.
        lora: Train low-rank adapters alone: `{r: 16, alpha: 32, dropout: 0, targets: all-linear}`.
        quantization: `4bit` holds the weights below the adapters in NF4 (QLoRA); needs bitsandbytes.
        optimizer: Any torch optimizer with its arguments, which has torch's defaults for the rest of them; Adam with
            learning rate 1e-5 when none is named.
        schedule: Learning rate after the warm-up.
        warmup_ratio: Share of all optimizer steps in which the learning rate rises to its value.
        attn_implementation: What transformers prefers when not given. `packed` computes nothing on padding.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        trust_remote_code: Run code that comes with the model.
    """

    def __init__(
        self,
        backbone: str,
        lora: Lora | None = None,
        quantization: Quantization | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-5),
        schedule: Schedule = "cosine",
        warmup_ratio: Fraction = 0.03,
        attn_implementation: AttentionImplementation | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        lora = asdict(lora) if isinstance(lora, Lora) else lora  # a checkpoint holds plain values
        self.save_hyperparameters(ignore=["optimizer"])
        check_optimizer(optimizer)
        check_attention(attn_implementation)
        self.optimizer_factory = optimizer
        self.lora = None if lora is None else Lora(**lora)
        self.backbone_config = load_causal_config(backbone, trust_remote_code=trust_remote_code)
        self.policy: CausalLM | None = None
        self.train_metrics = nn.ModuleDict(
            {"loss": MeanMetric(nan_strategy="disable"), "lengths/chosen": MeanMetric(nan_strategy="disable")}
        )
        self.throughput = TokensPerSecond()
        self.val_metrics = _evaluation_metrics()
        self.test_metrics = _evaluation_metrics()
        self.logged_step = 0
        self.lr: float | None = None
        """A learning rate in the place of the optimizer's own, such as Lightning's Tuner finds."""
        self._batch_began = 0.0

    def setup(self, stage: str) -> None:
        self.check_data(self.trainer.datamodule)

    def check_data(self, data: LightningDataModule | None) -> None:
        """Check that the data's tokens fit the model. Raises `ConfigurationError` when they cannot."""
        check_tokens_fit(data, self.backbone_config.get_text_config(), self.hparams.backbone)

    def configure_model(self) -> None:
        """Load the policy, once."""
        if self.policy is not None:
            return
        settings = self.hparams
        self.policy = CausalLM.from_pretrained(
            settings.backbone,
            lora=self.lora,
            quantization=settings.quantization,
            attn_implementation=settings.attn_implementation,
            gradient_checkpointing=settings.gradient_checkpointing,
            trust_remote_code=settings.trust_remote_code,
        )

    def on_fit_start(self) -> None:
        begin_log(self, self.train_metrics)
        begin_with_found_rate(self)
        log_parameters(self.policy, self.policy.config, self.hparams.backbone)

    def configure_optimizers(self):
        return optimizer_and_schedule(
            self, self.optimizer_factory, schedule=self.hparams.schedule, warmup_ratio=self.hparams.warmup_ratio
        )

    def forward(self, batch: PreferenceBatch) -> ResponseLogprobs:
        """Log-probabilities of the B chosen responses."""
        return self.policy(*_chosen_rows(batch))

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        responses = self(batch)
        losses = -responses.averages
        check_finite(self, batch, losses)
        update_metrics(self.train_metrics, {"loss": losses.detach(), "lengths/chosen": responses.lengths.float()})
        return batch.weight * losses.mean()

    def trial_loss(self, batch: PreferenceBatch) -> Tensor:
        """The mean loss of a batch, of which nothing is logged."""
        return -self(batch).averages.mean()

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self._batch_began = time.perf_counter()

    def on_train_batch_end(self, outputs, batch: PreferenceBatch, batch_idx: int) -> None:
        seconds = time.perf_counter() - self._batch_began
        self.throughput.update(batch.attention_mask[: batch.pairs].sum(), seconds)
        self.log_numbers()

    def log_numbers(self) -> None:
        """Log the training numbers, if it is time to."""
        log_training_means(self, self.train_metrics, shown={"loss": "loss"}, throughput=self.throughput)

    def on_validation_epoch_start(self) -> None:
        let_monitor_means(self, self.train_metrics)

    on_train_epoch_end = on_validation_epoch_start

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self._evaluation_step(batch, "val", self.val_metrics)

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self._evaluation_step(batch, "test", self.test_metrics)

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> PairScores:
        """Log-probabilities of both responses of each pair."""
        with float32_arithmetic(self.policy):
            responses = self.policy(batch.input_ids, batch.attention_mask, batch.response_mask)
        return PairScores(batch.index, *responses.sums.chunk(2))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        store_origin(self, checkpoint)
        store_adapters_alone(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        warn_of_other_settings(self, checkpoint)
        complete_adapters(self, checkpoint)

    def export(self, directory: str | Path, *, merge: bool = True) -> None:
        """Write the policy as `CausalLM.save_pretrained` does."""
        self.policy.save_pretrained(directory, merge=merge)

    def _evaluation_step(self, batch: PreferenceBatch, stage: str, metrics: nn.ModuleDict) -> None:
        with float32_arithmetic(self.policy):
            states = self.policy.states(*_chosen_rows(batch))
            responses = self.policy.logprobs(states)
            most_likely = self.policy.most_likely(states)
        values = {
            "loss": -responses.averages,
            "token_accuracy": (most_likely == states.targets).float(),
            "lengths/chosen": responses.lengths.float(),
            "perplexity": (-responses.sums, responses.lengths),
        }
        update_metrics(metrics, values, responses.sums, responses.sums)
        log_split(self, stage, metrics, shown=("loss", "token_accuracy"))


def _chosen_rows(batch: PreferenceBatch) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and response mask of the chosen rows, [B, T] each."""
    return tuple(rows[: batch.pairs] for rows in (batch.input_ids, batch.attention_mask, batch.response_mask))


def _evaluation_metrics() -> nn.ModuleDict:
    """Metrics of a whole split; each is defined in the README under its logged name."""
    metrics: dict[str, Metric] = {
        "loss": MeanMetric(nan_strategy="disable"),
        "perplexity": Perplexity(),
        "token_accuracy": MeanMetric(nan_strategy="disable"),
        "lengths/chosen": MeanMetric(nan_strategy="disable"),
        "pairs": PairCount(),
    }
    return nn.ModuleDict(metrics)
