"""Direct preference optimization and its relatives: a policy tuned on preference pairs against a reference.

B pairs, 2B rows, T padded tokens.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.data.datamodules import chat_format_of
from rlhf_lightning.data.roles import Role
from rlhf_lightning.data.same_tokenizer import check_reference_tokenizer
from rlhf_lightning.errors import ConfigurationError, ModelError, TrainingError
from rlhf_lightning.functional.kl import kl_estimate
from rlhf_lightning.metrics import PairCount, PairwiseAccuracy, TokensPerSecond
from rlhf_lightning.models.causal_lm import CausalLM, FrozenCausalLM, ResponseLogprobs, load_causal_config
from rlhf_lightning.models.fingerprint import weights_fingerprint
from rlhf_lightning.models.precision import float32_arithmetic
from rlhf_lightning.training.callbacks import PairScores
from rlhf_lightning.training.checkpoints import ORIGIN
from rlhf_lightning.training.checks import (
    adapters_moved,
    check_finite,
    check_schedule,
    check_start,
    schedule_lead,
    warn_of_falling_chosen,
)
from rlhf_lightning.training.module import Measured, PolicyModule
from rlhf_lightning.training.optimization import Fraction, Smoothing
from rlhf_lightning.training.pair_loss import LossType, PairLogprobs, PairLoss
from rlhf_lightning.training.references import (
    ADAPTER,
    ReferenceKind,
    check_reference_config,
    check_same_reference,
    choose_reference,
    named_like_a_kind,
    precomputed_logprobs,
)

log = logging.getLogger(__name__)

_PAIRS_BEFORE_ALARM = 64
"""Of so many pairs at least are the mean log-ratios that are looked at: a few steps may go up and down."""


class DPO(PolicyModule):
    """DPO: a causal language model tuned so that chosen responses gain on rejected ones, relative to a reference.

    Args:
        backbone: Policy to start from: hub name or directory of any causal language model, or `builtin:tiny`.
        loss_type: Name of the loss; its formula stands in the function of that name in `rlhf_lightning.functional`.
            `ipo`, `sigmoid_norm`, `simpo` and `orpo` take log-probs per token, the others those of whole responses. Or
            `module:function` of yours, which takes what `dpo_loss` does, and gives the loss of each pair.
        beta: Strength of the pull to the reference; about 5 for `sigmoid_norm`, 2 to 10 for `simpo`.
        label_smoothing: Probability with which a label is taken to be wrong; for `sigmoid` (cDPO), `robust`,
            `sigmoid_norm`, `simpo` and `exo_pair`.
        gamma: Margin of `simpo`, itself, not divided by beta.
        alpha: Weight of the difference in length of `r_dpo`.
        dpop_lambda: Weight of the penalty of `dpop`; 50 when not given.
        sft_weight: Weight of the chosen response's negative log-likelihood per token (RPO, arXiv 2404.19733). The mean
            is taken within each response, so that every pair counts the same, whatever its length and its batch.
        reference: `frozen`, a copy of the start; `adapter`, the policy without its adapters; or the directory or name
            of another model of the same architecture and tokenizer. `adapter` with LoRA and else `frozen` when not
            given. `simpo` and `orpo` have none.
        precompute_reference: Compute the reference's log-probs once, keep them on disk, and train without it in memory.
        reference_cache: Where precomputed log-probs are kept; `~/.cache/rlhf_lightning/references` when not given.
        optimizer: Any torch optimizer with its arguments, which has torch's defaults for the rest of them; Adam with
            learning rate 5e-6 when none is named.
        warmup_ratio: Share of all optimizer steps in which the learning rate rises to its value.
    """

    shown = ("loss", "rewards/accuracies")
    log_line = {"loss": "loss", "rewards/accuracies": "reward accuracy"}  # noqa: RUF012

    def __init__(
        self,
        backbone: str,
        loss_type: LossType = "sigmoid",
        beta: PositiveFloat = 0.1,
        label_smoothing: Smoothing | None = None,
        gamma: NonNegativeFloat | None = None,
        alpha: NonNegativeFloat | None = None,
        dpop_lambda: NonNegativeFloat | None = None,
        sft_weight: NonNegativeFloat = 0.0,
        reference: str | None = None,
        precompute_reference: bool = False,
        reference_cache: str | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=5e-6),
        warmup_ratio: Fraction = 0.1,
        **shared: Any,
    ) -> None:
        super().__init__(backbone, optimizer=optimizer, warmup_ratio=warmup_ratio, **shared)
        self.loss = PairLoss(
            loss_type,
            beta=beta,
            label_smoothing=label_smoothing,
            gamma=gamma,
            alpha=alpha,
            dpop_lambda=dpop_lambda,
        )
        self.precomputed = precompute_reference
        self.reference_source = None
        if self.loss.uses_reference:
            self.reference_source = choose_reference(
                reference, backbone, adapters=self.lora is not None, load_in_4bit=self.hparams.load_in_4bit
            )
        elif reference is not None or precompute_reference:
            raise ConfigurationError(
                f"model.reference: the loss {loss_type} has no reference; leave the key out (null), and "
                "model.precompute_reference"
            )
        if self.reference_source not in (None, ADAPTER, backbone):
            try:
                config = load_causal_config(self.reference_source, trust_remote_code=self.hparams.trust_remote_code)
            except ModelError as error:
                if not named_like_a_kind(self.reference_source):
                    raise
                raise ConfigurationError(
                    f"model.reference: {self.reference_source} is neither frozen nor adapter nor a model ({error})"
                ) from error
            check_reference_config(self.reference_source, config, backbone, self.backbone_config)
        self._frozen: FrozenCausalLM | None = None
        self._reference_fingerprint: str | None = None
        self._precomputed: dict[str, Tensor] = {}
        self.train_metrics = self._metrics()
        self.throughput = TokensPerSecond()
        self.log_ratios = nn.ModuleDict(
            {"chosen": MeanMetric(nan_strategy="disable"), "rejected": MeanMetric(nan_strategy="disable")}
        )
        self.log_ratio_pairs = PairCount()
        self.val_metrics = self._metrics(pairs=PairCount())
        self.test_metrics = self._metrics(pairs=PairCount())
        self._learning_rate = 0.0
        self._steps_without_move = 0
        self._schedule_lead = 0
        self._start_checked = self._moved = self._warned = False

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.reference_source not in (None, ADAPTER) and self._frozen is None:
            self._frozen = FrozenCausalLM(CausalLM.from_pretrained(self.reference_source, **self.loading))
            self._reference_fingerprint = self._frozen.fingerprint

    def check_data(self, data: LightningDataModule | None) -> None:
        """Check the data's tokens against policy and reference. Raises `ConfigurationError` when they do not fit."""
        super().check_data(data)
        chat_format = chat_format_of(data)
        if chat_format is not None and self.reference_source not in (None, ADAPTER, self.hparams.backbone):
            check_reference_tokenizer(self.reference_source, chat_format.tokenizer, key="model.reference")

    @property
    def reference_kind(self) -> ReferenceKind:
        if self.reference_source is None:
            return "none"
        if self.reference_source == ADAPTER:  # its own weights, at hand at any time
            return "none" if self.precomputed else "adapter"
        return "precomputed" if self.precomputed else "copy"

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._precompute("train", "val")
        settings = self.loss.settings | ({"sft_weight": self.hparams.sft_weight} if self.hparams.sft_weight else {})
        numbers = ", ".join(f"{name} {value:g}" for name, value in settings.items())
        source = self.reference_source
        how = "none" if source is None else "the policy without its adapters" if source == ADAPTER else source
        how += ", precomputed" if self.precomputed and source is not None else ""
        log.info("loss: %s, %s; reference: %s", self.hparams.loss_type, numbers, how)

    def forward(self, batch: PreferenceBatch) -> PairLogprobs:
        """Log-probabilities of both responses of each pair under the policy, in one pass over 2B rows."""
        responses = self.policy(batch.input_ids, batch.attention_mask, batch.response_mask)
        return PairLogprobs(*responses.sums.chunk(2), *responses.lengths.chunk(2))

    @torch.no_grad()
    def reference_logprobs(self, batch: PreferenceBatch, role: Role = "train") -> PairLogprobs | None:
        """The same under the reference; None for losses without one. All that the loss learns of the reference.

        `role` is that of the data which the batch's positions count in.
        """
        if self.reference_source is None:
            return None
        if self.precomputed:
            sums = self._precomputed[role][batch.index.cpu()].to(self.device)
            return PairLogprobs(*sums.unbind(dim=1), *batch.response_mask.sum(dim=1).chunk(2))
        responses = self._reference(batch.input_ids, batch.attention_mask, batch.response_mask)
        return PairLogprobs(*responses.sums.chunk(2), *responses.lengths.chunk(2))

    def _reference(self, *rows: Tensor) -> ResponseLogprobs:
        if self.reference_source != ADAPTER:
            self._frozen.match(self.policy)
            return self._frozen(*rows)
        with self.policy.adapters_off():
            return self.policy(*rows)

    def _precompute(self, *roles: Role) -> None:
        """Get the reference's log-probs of all pairs, then let go of it."""
        if not self.precomputed or self.reference_source is None:
            return
        if self._frozen is not None:
            self._frozen.match(self.policy)
        network = self.policy if self.reference_source == ADAPTER else self._frozen.network
        config = network.config.to_dict() | {"_name_or_path": None}  # a copy elsewhere is the same model
        weights = weights_fingerprint(network, ignore=("lora_", "modules_to_save"))
        for role in roles:
            # In training as the policy is computed, so that the rounding of the two cancels where they are equal.
            training, precision = role == "train", str(self.trainer.precision)
            if not training and precision in ("16-mixed", "bf16-mixed"):
                precision = "32-true"
            self._precomputed[role] = precomputed_logprobs(
                self,
                self._reference,
                role,
                (weights, sorted(config.items()), precision, self.device.type),
                precision=precision,
                arithmetic=self.trainer.precision_plugin.forward_context if training else self._float32,
                cache_dir=self.hparams.reference_cache,
            )
        self._frozen = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def losses(self, policy: PairLogprobs, reference: PairLogprobs | None) -> Tensor:
        """Loss of each pair, [B] float32."""
        preference = self.loss(policy, reference)
        if self.hparams.sft_weight == 0:
            return preference
        return preference - self.hparams.sft_weight * policy.averages()[0]

    @torch.no_grad()
    def rewards(self, policy: PairLogprobs, reference: PairLogprobs | None) -> tuple[Tensor, Tensor]:
        """Implicit rewards beta (policy - reference) of both responses, [B] each, of what the loss takes.

        For losses without a reference beta times the policy's average log-probs.
        """
        sides = self.loss.taken(policy)
        if reference is not None:
            sides = [own - its for own, its in zip(sides, self.loss.taken(reference), strict=True)]
        return tuple(self.hparams.beta * side for side in sides)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        policy = self(batch)
        reference = self.reference_logprobs(batch, "train")
        losses = self.losses(policy, reference)
        check_finite(self, batch, losses)
        self._check_start(losses, policy, reference)
        self._measured(losses.detach(), policy, reference).feed(self.train_metrics)
        if reference is not None:
            self.log_ratios["chosen"].update(policy.chosen.detach() - reference.chosen)
            self.log_ratios["rejected"].update(policy.rejected.detach() - reference.rejected)
            self.log_ratio_pairs.update(policy.chosen, policy.rejected)
        return batch.weight * losses.mean()

    def trial_loss(self, batch: PreferenceBatch) -> Tensor:
        """The mean loss of a batch of training pairs, of which nothing is logged."""
        return self.losses(self(batch), self.reference_logprobs(batch, "train")).mean()

    def on_train_start(self) -> None:
        self._schedule_lead = schedule_lead(self)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._learning_rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, outputs, batch: PreferenceBatch, batch_idx: int) -> None:
        self._check_adapters()
        check_schedule(self, self._schedule_lead)
        super().on_train_batch_end(outputs, batch, batch_idx)

    def log_numbers(self) -> dict[str, float] | None:
        logged = super().log_numbers()
        if logged is None or self.reference_source is None:
            return logged
        if self.log_ratio_pairs.compute() >= _PAIRS_BEFORE_ALARM:  # of all processes: they must agree
            means = {side: metric.compute().item() for side, metric in self.log_ratios.items()}
            has_sft = self.hparams.sft_weight > 0
            self._warned = self._warned or warn_of_falling_chosen(**means, sft_weight=has_sft)
            for metric in (*self.log_ratios.values(), self.log_ratio_pairs):
                metric.reset()
        return logged

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> PairScores:
        with self._float32():
            return PairScores(batch.index, *self.rewards(self(batch), self.reference_logprobs(batch, "test")))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[ORIGIN]["reference"] = self._reference_fingerprint

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        check_same_reference(checkpoint[ORIGIN].get("reference"), self._reference_fingerprint, self.reference_source)
        super().on_load_checkpoint(checkpoint)

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._precompute("val")

    def on_test_start(self) -> None:
        self._precompute("test")

    on_predict_start = on_test_start

    def _float32(self) -> AbstractContextManager:
        """For what is judged by: a log-ratio near the start is smaller than the rounding of mixed precision."""
        if self._frozen is None:
            return float32_arithmetic(self.policy)
        self._frozen.match(self.policy)
        return float32_arithmetic(self.policy, self._frozen.network)

    def measure(self, batch: PreferenceBatch, stage: Role) -> Measured:
        with self._float32():
            policy, reference = self(batch), self.reference_logprobs(batch, stage)
        return self._measured(self.losses(policy, reference), policy, reference)

    def _metrics(self, **others: Metric) -> nn.ModuleDict:
        """Metrics of many pairs; each is defined in the README under its logged name."""
        means = [
            "loss",
            *(f"{what}/{side}" for what in ("rewards", "logps", "lengths") for side in ("chosen", "rejected")),
        ]
        means += ["rewards/margins"] + (["kl"] if self.reference_source is not None else [])
        metrics: dict[str, Metric] = {name: MeanMetric(nan_strategy="disable") for name in means}
        return nn.ModuleDict(metrics | {"rewards/accuracies": PairwiseAccuracy()} | others)

    @torch.no_grad()
    def _measured(self, losses: Tensor, policy: PairLogprobs, reference: PairLogprobs | None) -> Measured:
        """What B pairs give to the metrics."""
        chosen, rejected = self.rewards(policy, reference)
        values = {
            "loss": losses,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "logps/chosen": policy.chosen,
            "logps/rejected": policy.rejected,
            "lengths/chosen": policy.chosen_lengths.float(),
            "lengths/rejected": policy.rejected_lengths.float(),
        }
        if reference is not None:
            values["kl"] = kl_estimate(torch.cat(policy[:2]), torch.cat(reference[:2]), estimator="k1")
        return Measured(values, (chosen, rejected))

    def _check_start(self, losses: Tensor, policy: PairLogprobs, reference: PairLogprobs | None) -> None:
        """At the first batch of all: a policy that begins as its reference must have the loss of two equal models."""
        begins_as_reference = self.reference_source in (ADAPTER, self.hparams.backbone)
        if not self._start_checked and begins_as_reference and self.trainer.global_step == 0:
            check_start(self, losses, self.losses(reference, reference))
        self._start_checked = True

    def _check_adapters(self) -> None:
        """After the first optimizer step with a learning rate above 0 the adapters must have moved."""
        if self._moved or not self.policy.has_adapters or self._learning_rate == 0:
            return
        self._moved = adapters_moved(self.policy)
        self._steps_without_move += 1
        # float16's loss scaler skips some of its first steps.
        allowed = 20 * self.trainer.accumulate_grad_batches if self.trainer.precision == "16-mixed" else 1
        if not self._moved and self._steps_without_move >= allowed:
            raise TrainingError(
                f"step {self.trainer.global_step}: the optimizer stepped with learning rate {self._learning_rate:g}, "
                "but no adapter moved: no gradient reaches them; check model.optimizer and model.lora.target_modules"
            )
