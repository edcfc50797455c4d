"""Direct preference optimization and its relatives: a policy tuned on preference pairs against a reference.

B pairs, 2B rows, T padded tokens.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.data.roles import Role
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.functional.kl import kl_estimate
from rlhf_lightning.metrics import PairCount, PairwiseAccuracy, TokensPerSecond
from rlhf_lightning.models.objects import ModelSource
from rlhf_lightning.models.precision import float32_arithmetic
from rlhf_lightning.training.callbacks import PairScores
from rlhf_lightning.training.checks import AdapterWatch, check_finite, check_start, warn_of_falling_chosen
from rlhf_lightning.training.measures import Measured, means, named
from rlhf_lightning.training.optimization import Fraction, Smoothing
from rlhf_lightning.training.pair_loss import LossType, PairLogprobs, PairLoss
from rlhf_lightning.training.policy_module import PolicyModule
from rlhf_lightning.training.references import Reference
from rlhf_lightning.user_code import name_of

log = logging.getLogger(__name__)

_PAIRS_BEFORE_ALARM = 64
"""Of so many pairs at least are the mean log-ratios that are looked at: a few steps may go up and down."""


class DPO(PolicyModule):
    """DPO: a causal language model tuned so that chosen responses gain on rejected ones, relative to a reference.

    Args:
        backbone: Policy to start from: hub name, directory (whole, or LoRA adapters, which are merged) or GGUF file of
            any causal language model, or `builtin:tiny`.
        loss_type: Name of the loss; its formula stands in the function of that name in `rlhf_lightning.functional`.
            `ipo`, `sigmoid_norm`, `simpo` and `orpo` take log-probs per token, the others those of whole responses. Or
            `module:function` of yours (in Python, the function itself), which takes what `dpo_loss` does, and gives the
            loss of each pair.
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
        reference_update_steps: Let a reference that is a model of its own follow the policy: it is updated every so
            many optimizer steps (TR-DPO). Checkpoints hold its weights, too.
        reference_update_alpha: How far an update goes, above 0 to 1; 1, when not given, makes it the policy.
        optimizer: Any torch optimizer with its arguments, which has torch's defaults for the rest of them; Adam with
            learning rate 5e-6 when none is named.
        warmup_ratio: Share of all optimizer steps in which the learning rate rises to its value.
    """

    shown = ("loss", "rewards/accuracies")
    log_line = {"loss": "loss", "rewards/accuracies": "reward accuracy"}  # noqa: RUF012
    objects = (*PolicyModule.objects, "loss_type")

    def __init__(
        self,
        backbone: ModelSource,
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
        reference_update_steps: PositiveInt | None = None,
        reference_update_alpha: PositiveFloat | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=5e-6),
        warmup_ratio: Fraction = 0.1,
        **shared: Any,
    ) -> None:
        super().__init__(backbone, optimizer=optimizer, warmup_ratio=warmup_ratio, **shared)
        self.save_hyperparameters({"loss_type": name_of(loss_type)})  # which is what a checkpoint holds
        self.loss = PairLoss(
            loss_type,
            beta=beta,
            label_smoothing=label_smoothing,
            gamma=gamma,
            alpha=alpha,
            dpop_lambda=dpop_lambda,
        )
        if self.loss.uses_reference:
            self.reference = Reference(
                reference,
                self,
                precomputed=precompute_reference,
                update_steps=reference_update_steps,
                update_alpha=reference_update_alpha,
            )
        elif reference is not None or precompute_reference or reference_update_steps is not None:
            raise ConfigurationError(
                f"model.reference: the loss {self.loss.name} has no reference; leave the key out (null), and "
                "model.precompute_reference and model.reference_update_steps"
            )
        self.train_metrics = self._metrics()
        self.val_metrics, self.test_metrics = self._metrics(PairCount()), self._metrics(PairCount())
        self.throughput = TokensPerSecond()
        self.log_ratios = nn.ModuleDict(means("chosen", "rejected") | {"pairs": PairCount()})
        self._adapters = AdapterWatch()
        self._start_checked = self._warned = False

    def _metrics(self, pairs: PairCount | None = None) -> nn.ModuleDict:
        names = [f"{what}/{side}" for what in ("rewards", "logps", "lengths") for side in ("chosen", "rejected")]
        names += ["rewards/margins"] + (["kl"] if self.reference is not None else [])
        metrics = means("loss", *names) | {"rewards/accuracies": PairwiseAccuracy()}
        return nn.ModuleDict(metrics | ({} if pairs is None else {"pairs": pairs}))

    def _precompute(self, *roles: Role) -> None:
        if self.reference is not None:
            self.reference.precompute(self, *roles, cache_dir=self.hparams.reference_cache)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._precompute("train", "val")
        settings = self.loss.settings | ({"sft_weight": self.hparams.sft_weight} if self.hparams.sft_weight else {})
        numbers = ", ".join(f"{name} {value:g}" for name, value in settings.items())
        log.info("loss: %s, %s; reference: %s", self.hparams.loss_type, numbers, self.reference or "none")

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._precompute("val")

    def on_test_start(self) -> None:
        self._precompute("test")

    on_predict_start = on_test_start

    def forward(self, batch: PreferenceBatch) -> PairLogprobs:
        """Log-probabilities of both responses of each pair under the policy, in one pass over 2B rows."""
        return PairLogprobs.of(self.policy(batch.input_ids, batch.attention_mask, batch.response_mask))

    @torch.no_grad()
    def reference_logprobs(self, batch: PreferenceBatch, role: Role = "train") -> PairLogprobs | None:
        """The same under the reference; None for losses without one. All that the loss learns of the reference.

        `role` is that of the data which the batch's positions count in.
        """
        if self.reference is None:
            return None
        if self.reference.precomputed:
            sums = self.reference.sums(role, batch.index)
            return PairLogprobs(*sums.unbind(dim=1), *batch.response_mask.sum(dim=1).chunk(2))
        rows = (batch.input_ids, batch.attention_mask, batch.response_mask)
        return PairLogprobs.of(self.reference(self.policy, *rows))

    def losses(self, policy: PairLogprobs, reference: PairLogprobs | None) -> Tensor:
        """Loss of each pair, [B] float32."""
        preference = self.loss(policy, reference)
        if self.hparams.sft_weight == 0:
            return preference
        return preference - self.hparams.sft_weight * policy.averages()[0]

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        policy = self(batch)
        reference = self.reference_logprobs(batch, "train")
        losses = self.losses(policy, reference)
        check_finite(self, batch, losses)
        if self.reference is not None and reference is not None:
            if not self._start_checked and self.reference.is_start and self.trainer.global_step == 0:
                check_start(self, losses, self.losses(reference, reference))
            self._start_checked = True
            own = PairLogprobs(*(each.detach() for each in policy))
            ratios = {"chosen": own.chosen - reference.chosen, "rejected": own.rejected - reference.rejected}
            Measured(ratios, own[:2]).feed(self.log_ratios)
        self._measured(losses.detach(), policy, reference).feed(self.train_metrics)
        return batch.weight * losses.mean()

    def measure(self, batch: PreferenceBatch, stage: Role) -> Measured:
        with self._float32():
            policy, reference = self(batch), self.reference_logprobs(batch, stage)
        return self._measured(self.losses(policy, reference), policy, reference)

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> PairScores:
        with self._float32():
            return PairScores(batch.index, *self.loss.rewards(self(batch), self.reference_logprobs(batch, "test")))

    def _float32(self) -> AbstractContextManager[None]:
        return float32_arithmetic(self.policy) if self.reference is None else self.reference.float32(self.policy)

    def trial_loss(self, batch: PreferenceBatch) -> Tensor:
        """The mean loss of a batch of training pairs, of which nothing is logged."""
        return self.losses(self(batch), self.reference_logprobs(batch, "train")).mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._adapters.before_step(optimizer)

    def on_train_batch_end(self, outputs, batch: PreferenceBatch, batch_idx: int) -> None:
        self._adapters.after_batch(self.trainer, self.policy)
        super().on_train_batch_end(outputs, batch, batch_idx)

    def log_numbers(self) -> dict[str, float] | None:
        logged, ratios = super().log_numbers(), named(self.log_ratios)
        # Of all processes: they must agree.
        if logged is not None and self.reference is not None and ratios["pairs"].compute() >= _PAIRS_BEFORE_ALARM:
            fallen = {side: ratios[side].compute().item() for side in ("chosen", "rejected")}
            has_sft = self.hparams.sft_weight > 0
            self._warned = self._warned or warn_of_falling_chosen(**fallen, sft_weight=has_sft)
            for metric in ratios.values():
                metric.reset()
        return logged

    @torch.no_grad()
    def _measured(self, losses: Tensor, policy: PairLogprobs, reference: PairLogprobs | None) -> Measured:
        """What B pairs give to the metrics."""
        chosen, rejected = self.loss.rewards(policy, reference)
        values: dict[str, Tensor] = {
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
