"""Online DPO: a policy that learns a preference loss from pairs of its own responses, ranked by their rewards.

B responses of a process, P prompts, R pairs of a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.functional.advantages import best_and_worst, groups_that_differ
from rlhf_lightning.models.objects import ModelSource
from rlhf_lightning.rollouts import Experience
from rlhf_lightning.training.checks import check_finite_step, check_start
from rlhf_lightning.training.online import OnlineModule
from rlhf_lightning.training.optimization import Fraction, Smoothing, optimizer_and_schedule
from rlhf_lightning.training.pair_loss import LossType, PairLogprobs, PairLoss
from rlhf_lightning.user_code import name_of


class Pairs(NamedTuple):
    """Of P prompts, which of the B responses are compared. [P] each."""

    best: Tensor
    """int64, positions among the responses."""
    worst: Tensor
    """int64"""
    learned: Tensor
    """bool, True where their scores are far enough apart."""


class OnlineDPO(OnlineModule):
    """Online DPO: each batch of prompts is a rollout, whose best and worst response to a prompt are a pair for DPO.

    Args:
        backbone: Policy to start from: hub name, directory (whole, or LoRA adapters, which are merged) or GGUF file of
            any causal language model, or `builtin:tiny`.
        loss_type: Name of the loss, as of DPO; or `module:function` of yours.
        beta: Strength of the pull to the reference, and the weight of the KL in `val/reward_with_kl`.
        label_smoothing: Probability with which a label is taken to be wrong; for `sigmoid` (cDPO), `robust`,
            `sigmoid_norm`, `simpo` and `exo_pair`.
        gamma: Margin of `simpo`, itself, not divided by beta.
        alpha: Weight of the difference in length of `r_dpo`.
        dpop_lambda: Weight of the penalty of `dpop`; 50 when not given.
        num_generations: Responses sampled to each prompt, 2 or more.
        min_score_gap: A prompt is learned from where the scores of its best and its worst response, penalties taken
            off, differ by more than this; equal ones never are.
        num_epochs: Passes over a rollout.
        optimizer: Any torch optimizer with its arguments, which has torch's defaults for the rest of them; Adam with
            learning rate 5e-7 when none is named.
        warmup_ratio: Share of all optimizer steps in which the learning rate rises to its value.
    """

    log_line = {"loss": "loss", "left_out": "left out"}  # noqa: RUF012
    objects = (*OnlineModule.objects, "loss_type")

    def __init__(
        self,
        backbone: ModelSource,
        loss_type: LossType = "sigmoid",
        beta: PositiveFloat = 0.1,
        label_smoothing: Smoothing | None = None,
        gamma: NonNegativeFloat | None = None,
        alpha: NonNegativeFloat | None = None,
        dpop_lambda: NonNegativeFloat | None = None,
        num_generations: PositiveInt = 2,
        min_score_gap: NonNegativeFloat = 0.0,
        num_epochs: PositiveInt = 1,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=5e-7),
        warmup_ratio: Fraction = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(
            backbone, num_generations=num_generations, optimizer=optimizer, warmup_ratio=warmup_ratio, **shared
        )
        self.save_hyperparameters({"loss_type": name_of(loss_type)})  # which is what a checkpoint holds
        if num_generations < 2:
            raise ConfigurationError("model.num_generations is 1, which makes no pair; set it to 2 or more")
        self.loss = PairLoss(
            loss_type,
            beta=beta,
            label_smoothing=label_smoothing,
            gamma=gamma,
            alpha=alpha,
            dpop_lambda=dpop_lambda,
        )

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizer_and_schedule(self, steps_per_batch=self.steps_per_rollout)

    @property
    def steps_per_rollout(self) -> int:
        return self.hparams.num_epochs * self.hparams.num_mini_batches

    @property
    def kl_weight(self) -> float:
        return self.hparams.beta

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Roll out, score, pair, passes of minibatches, log."""
        self.learn(batch)

    @torch.no_grad()
    def _learnable(self, experience: Experience) -> tuple[Pairs, dict[str, float]]:
        responses, scores, *_ = experience
        settings, ended = self.hparams, responses.ended.to(self.device)
        penalties = settings.missing_eos_penalty * (~ended).float() + self.overlong_penalty(responses)
        shaped, size = self.learned_scores(experience) - penalties, settings.num_generations
        pairs = Pairs(*best_and_worst(shaped, group_size=size, min_gap=settings.min_score_gap))
        numbers = experience.numbers() | {
            "reward_with_kl": shaped - self.kl_penalty(experience, self.kl_weight),
            "score_gap": shaped[pairs.best] - shaped[pairs.worst],
            "frac_reward_zero_std": (~groups_that_differ(shaped, group_size=size)).float(),
            "left_out": (~pairs.learned).float(),
        }
        self.rollout_log.samples(responses, scores, numbers["kl"])
        return pairs, self.rollout_means(scores, numbers) | {"pairs": self._sum(pairs.learned.sum()).item()}

    def _update(self, experience: Experience, targets: Pairs) -> dict[str, float]:
        """All passes over the pairs of a rollout, one optimizer step per minibatch of prompts; means over the steps."""
        parts = [
            part for epoch in range(self.hparams.num_epochs) for part in self.minibatches(len(targets.best), epoch)
        ]
        steps = [self._step(experience, targets, part) for part in parts]
        return {name: sum(numbers[name] for numbers in steps) / len(steps) for name in _STEP_NUMBERS}

    def _step(self, experience: Experience, pairs: Pairs, part: Sequence[int]) -> dict[str, float]:
        """One optimizer step on the pairs of some prompts of all processes: their mean, however they are divided."""
        self.optimizers().zero_grad()
        learned = [prompt for prompt in part if pairs.learned[prompt]]
        # Where there is no pair, the step has no gradient.
        size = self._sum(torch.tensor(len(learned), device=self.device)).clamp(min=1)
        best = experience.responses.order(pairs.best[learned].tolist())
        sums = self.step_gradients(
            [response // self.hparams.num_generations for response in best],
            lambda piece, counts: self._losses(experience, pairs, piece, counts=counts),
            size=size,
            spare=part[0],
        )
        self.optimize()
        return dict(zip(_STEP_NUMBERS, (sums / size).tolist(), strict=True))

    def _losses(
        self, experience: Experience, pairs: Pairs, piece: Sequence[int], *, counts: bool
    ) -> tuple[Tensor, Tensor]:
        """The summed loss of the pairs of R prompts, and sums of what is logged. Both 0 where they do not count."""
        rows = [*pairs.best[piece].tolist(), *pairs.worst[piece].tolist()]
        responses, rollouts = experience.responses.select(rows), self.rollouts
        with self.trainer.precision_plugin.forward_context():
            policy = PairLogprobs.of(self.policy(*rollouts.padded(responses).text))
        sums = experience.tokens.reference[rows].sum(dim=1)
        lengths = experience.tokens.mask[rows].sum(dim=1)
        reference = PairLogprobs(*sums.chunk(2), *lengths.chunk(2)) if self.loss.uses_reference else None
        losses = self.loss(policy, reference)
        if reference is not None and counts and self.trainer.global_step == 0 and self.reference.is_start:
            check_start(self, losses, self.loss(reference, reference))
        loss = float(counts) * losses.sum()
        check_finite_step(self.trainer, loss, key="beta")
        with torch.no_grad():
            chosen, rejected = self.loss.rewards(policy, reference)
            logged = {
                "loss": losses,
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
                "rewards/accuracies": ((chosen > rejected).float() + (chosen >= rejected).float()) / 2,
            }
            return loss, float(counts) * torch.stack([logged[name].double().sum() for name in _STEP_NUMBERS])


_STEP_NUMBERS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
"""Means over the pairs of a minibatch."""
