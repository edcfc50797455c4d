"""KTO and its relatives: a policy tuned on responses that are judged one at a time, against a reference.

B responses, T padded tokens, K mismatched responses.
"""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from rlhf_lightning.batches import UnpairedBatch
from rlhf_lightning.data.roles import Role
from rlhf_lightning.data.unpaired_datamodule import UnpairedDataModule
from rlhf_lightning.functional.kl import kl_estimate
from rlhf_lightning.functional.unpaired_losses import UNPAIRED_LOSSES, RewardShift, kto_shift
from rlhf_lightning.metrics import LabelAUROC, MeanGap, ResponseCount, ShiftedLoss, TokensPerSecond
from rlhf_lightning.models.causal_lm import ResponseLogprobs
from rlhf_lightning.models.objects import ModelSource
from rlhf_lightning.training.callbacks import ResponseRewards
from rlhf_lightning.training.checks import AdapterWatch, check_finite, check_start
from rlhf_lightning.training.measures import Measured, means
from rlhf_lightning.training.optimization import Fraction
from rlhf_lightning.training.policy_module import PolicyModule
from rlhf_lightning.training.processes import over_processes
from rlhf_lightning.training.references import Reference
from rlhf_lightning.training.resume import batches_of_open_step

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    UnpairedLossType = str
else:
    UnpairedLossType = Literal[tuple(UNPAIRED_LOSSES)]

_SIDES = ("chosen", "rejected")
_LARGEST_RATIO = 4 / 3


class KTO(PolicyModule):
    """KTO: a causal language model tuned on responses with a label, good or bad, relative to a reference.

    Learns from an `UnpairedDataModule`. What KTO subtracts from rewards, its estimate of the KL from the reference, is
    a number of the optimizer step: it is made of all its responses, in all processes, each put behind another prompt,
    so that the division of a step into batches changes nothing.

    Args:
        backbone: Policy to start from: hub name, directory (whole, or LoRA adapters, which are merged) or GGUF file of
            any causal language model, or `builtin:tiny`.
        loss_type: Name of the loss; its formula stands in `rlhf_lightning.functional.unpaired_losses`.
        beta: Strength of the pull to the reference.
        desirable_weight: Weight of the losses of good responses.
        undesirable_weight: Weight of the losses of bad ones. KTO wants the weights times the numbers of responses, good
            to bad, between 1:1 and 4:3; a line says where they are not.
        reference: `frozen`, a copy of the start; `adapter`, the policy without its adapters; or the directory or name
            of another model of the same architecture and tokenizer. `adapter` with LoRA and else `frozen` when not
            given.
        reference_update_steps: Let a reference that is a model of its own follow the policy: it is updated every so
            many optimizer steps (TR-DPO). Checkpoints hold its weights, too.
        reference_update_alpha: How far an update goes, above 0 to 1; 1, when not given, makes it the policy.
        optimizer: Any torch optimizer with its arguments, which has torch's defaults for the rest of them; Adam with
            learning rate 5e-6 when none is named.
        warmup_ratio: Share of all optimizer steps in which the learning rate rises to its value.
    """

    rows_per_pair = 1
    data_kinds = ("responses",)
    shown = ("loss", "auroc")
    log_line = {"loss": "loss", "rewards/margins": "reward margin"}  # noqa: RUF012

    reference: Reference

    def __init__(
        self,
        backbone: ModelSource,
        loss_type: UnpairedLossType = "kto",
        beta: PositiveFloat = 0.1,
        desirable_weight: NonNegativeFloat = 1.0,
        undesirable_weight: NonNegativeFloat = 1.0,
        reference: str | None = None,
        reference_update_steps: PositiveInt | None = None,
        reference_update_alpha: PositiveFloat | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=5e-6),
        warmup_ratio: Fraction = 0.1,
        **shared: Any,
    ) -> None:
        super().__init__(backbone, optimizer=optimizer, warmup_ratio=warmup_ratio, **shared)
        self.loss = UNPAIRED_LOSSES[loss_type]
        self.reference = Reference(
            reference, self, update_steps=reference_update_steps, update_alpha=reference_update_alpha
        )
        self.train_metrics = nn.ModuleDict(self._metrics() | means("loss", "shift"))
        self.val_metrics, self.test_metrics = (
            nn.ModuleDict(
                {"loss": ShiftedLoss(self._loss_of_split)}
                | self._metrics()
                | {"auroc": LabelAUROC(), "responses": ResponseCount()}
            )
            for _ in range(2)
        )
        self.throughput = TokensPerSecond()
        self.reward_shift = RewardShift()
        """Of the steps that are done; BCO's."""
        self._shift = torch.tensor(0.0)
        """That of the optimizer step, [] in units of reward."""
        self._step_rewards: list[tuple[Tensor, Tensor]] = []
        """Rewards and labels of the step's batches so far."""
        self._adapters = AdapterWatch()
        self._start_checked = False

    def _metrics(self) -> dict[str, Any]:
        names = [f"{what}/{side}" for what in ("rewards", "logps", "lengths") for side in _SIDES]
        return means(*names, "kl") | {"rewards/margins": MeanGap()}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        settings = self.hparams
        weights = (settings.desirable_weight, settings.undesirable_weight)
        log.info(
            "loss: %s, beta %g, weights %g and %g; reference: %s",
            *(settings.loss_type, settings.beta, *weights, self.reference),
        )
        data = self.trainer.datamodule
        if settings.loss_type == "kto" and isinstance(data, UnpairedDataModule):
            good = data.desirable("train")
            _warn_of_weights(*weights, desirable=int(good.sum()), others=int((~good).sum()))

    def forward(self, batch: UnpairedBatch) -> ResponseLogprobs:
        """Log-probabilities of B responses under the policy."""
        return self.policy(batch.input_ids, batch.attention_mask, batch.response_mask)

    @torch.no_grad()
    def reference_sums(self, batch: UnpairedBatch) -> Tensor:
        """Summed log-probabilities of B responses under the reference, [B]."""
        return self.reference(self.policy, batch.input_ids, batch.attention_mask, batch.response_mask).sums

    @torch.no_grad()
    def mismatched_sums(self, batch: UnpairedBatch) -> tuple[Tensor, Tensor]:
        """Summed log-probabilities of the batch's mismatched responses under policy and reference, [K] each."""
        if batch.mismatched is None or self.loss.shift != "kl" or not len(batch.mismatched.input_ids):
            nothing = torch.zeros(0, device=batch.input_ids.device)
            return nothing, nothing
        own, its = [], []
        for rows in zip(*(each.split(len(batch.index)) for each in batch.mismatched.text), strict=True):
            own.append(self.policy(*rows).sums)  # so many at once as of the batch itself
            its.append(self.reference(self.policy, *rows).sums)
        return torch.cat(own), torch.cat(its)

    def losses(self, policy: Tensor, reference: Tensor, desirable: Tensor, shift: Tensor) -> Tensor:
        """Loss of each response from its summed log-probs, [B]; `shift` [] in units of reward."""
        settings = self.hparams
        given = {"shift": shift.to(policy.device)} if self.loss.shift is not None else {}
        return self.loss.function(
            policy,
            reference,
            desirable,
            beta=settings.beta,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
            **given,
        )

    def _loss_of_split(self, ratios: Tensor, desirable: Tensor, mismatched: Tensor) -> Tensor:
        """The loss of each response of a split, given the mean log-ratio of its mismatched ones."""
        shift = self.hparams.beta * mismatched.clamp(min=0) if self.loss.shift == "kl" else self.reward_shift.value
        return self.losses(ratios, torch.zeros_like(ratios), desirable, shift)

    def training_step(self, batch: UnpairedBatch, batch_idx: int) -> Tensor:
        if batch.mismatched is not None:
            self._begin_step(batch)
        responses, reference = self(batch), self.reference_sums(batch)
        policy = responses.sums
        losses = self.losses(policy, reference, batch.desirable, self._shift)
        check_finite(self, batch, losses)
        if not self._start_checked and self.reference.is_start and self.trainer.global_step == 0:
            check_start(self, losses, self.losses(reference, reference, batch.desirable, torch.tensor(0.0)))
        self._start_checked = True
        self._end_step(policy.detach() - reference, batch.desirable)
        values = self._measured(responses, reference, batch) | {
            "loss": losses.detach(),
            "shift": self._shift.to(losses.device).expand(len(losses)),
        }
        Measured(values).feed(self.train_metrics)
        return batch.weight * losses.mean()

    def _begin_step(self, batch: UnpairedBatch) -> None:
        """Set the shift of the optimizer step that begins with this batch. All processes come here together."""
        self._step_rewards.clear()
        if self.loss.shift == "kl":
            sum_over = functools.partial(over_processes, self.trainer)
            self._shift = kto_shift(*self.mismatched_sums(batch), beta=self.hparams.beta, sum_over=sum_over)
        else:
            self._shift = self.reward_shift.value.float()

    def _end_step(self, ratios: Tensor, desirable: Tensor) -> None:
        """Add the rewards of the step to those that the shift is made of, once its last batch is there."""
        if self.loss.shift != "rewards":
            return
        self._step_rewards.append((self.hparams.beta * ratios, desirable))
        if batches_of_open_step(self.trainer) == 0:
            rewards, labels = (torch.cat(parts) for parts in zip(*self._step_rewards, strict=True))
            self.reward_shift.update(rewards, labels, sum_over=functools.partial(over_processes, self.trainer))

    def measure(self, batch: UnpairedBatch, stage: Role) -> Measured:
        with self._float32():
            responses, reference = self(batch), self.reference_sums(batch)
            own, its = self.mismatched_sums(batch)
        values = self._measured(responses, reference, batch)
        rewards = self.hparams.beta * (responses.sums - reference)
        values["loss"] = (responses.sums - reference, batch.desirable, own - its)
        return Measured(values | {"auroc": (rewards, batch.desirable)}, (rewards,))

    def predict_step(self, batch: UnpairedBatch, batch_idx: int) -> ResponseRewards:
        with self._float32():
            rewards = self.hparams.beta * (self(batch).sums - self.reference_sums(batch))
        return ResponseRewards(batch.index, rewards)

    def _float32(self) -> AbstractContextManager[None]:
        return self.reference.float32(self.policy)

    def trial_loss(self, batch: UnpairedBatch) -> Tensor:
        """The mean loss of a batch of training responses, of which nothing is logged."""
        shift = torch.tensor(0.0)
        return self.losses(self(batch).sums, self.reference_sums(batch), batch.desirable, shift).mean()

    @torch.no_grad()
    def _measured(self, responses: ResponseLogprobs, reference: Tensor, batch: UnpairedBatch) -> dict[str, Any]:
        """What B responses give to the metrics that training and validation share."""
        rewards = self.hparams.beta * (responses.sums - reference)
        numbers = {"rewards": rewards, "logps": responses.sums, "lengths": responses.lengths.float()}
        # Not by weights: torchmetrics 1.9 has none in a MeanMetric that does not look for NaN.
        values: dict[str, Any] = {
            f"{what}/{side}": number[mask]
            for side, mask in zip(_SIDES, (batch.desirable, ~batch.desirable), strict=True)
            for what, number in numbers.items()
        }
        values["rewards/margins"] = (rewards, batch.desirable)
        return values | {"kl": kl_estimate(responses.sums, reference, estimator="k1")}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._adapters.before_step(optimizer)

    def on_train_batch_end(self, outputs: Any, batch: UnpairedBatch, batch_idx: int) -> None:
        self._adapters.after_batch(self.trainer, self.policy)
        super().on_train_batch_end(outputs, batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["kto"] = self.reward_shift.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.reward_shift.load_state_dict(checkpoint["kto"])


def _warn_of_weights(desirable_weight: float, undesirable_weight: float, *, desirable: int, others: int) -> None:
    """Say what the weights ought to be where good responses do not weigh 1 to 4/3 times what bad ones do.

    `desirable` and `others` are numbers of responses, above 0. Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 9.
    """
    good, bad = desirable_weight * desirable, undesirable_weight * others
    if bad <= good <= _LARGEST_RATIO * bad or good == bad == 0:
        return
    lowest = undesirable_weight * others / desirable
    log.warning(
        "model.desirable_weight: %d good responses of weight %g and %d bad ones of weight %g; KTO wants the products "
        "between 1:1 and 4:3: set desirable_weight to %.3g to %.3g, or undesirable_weight to %.3g to %.3g",
        *(desirable, desirable_weight, others, undesirable_weight),
        *(lowest, _LARGEST_RATIO * lowest),
        *(desirable_weight * desirable / others / _LARGEST_RATIO, desirable_weight * desirable / others),
    )
