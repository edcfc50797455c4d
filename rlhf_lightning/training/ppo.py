"""Proximal policy optimization: a policy that responds to prompts, is scored, and learns from its own responses.

B responses of a process, S tokens of the longest response, R responses of a forward pass.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.data.datamodules import chat_format_of
from rlhf_lightning.data.tokenizer import different_tokens
from rlhf_lightning.functional.advantages import ScaleRewards, explained_variance, shaped_rewards
from rlhf_lightning.functional.kl import AdaptiveKLController, kl_estimate
from rlhf_lightning.functional.losses import ppo_value_loss
from rlhf_lightning.functional.policy_losses import Aggregation
from rlhf_lightning.functional.reductions import RunningMoments, masked_whiten, scatter_to_mask
from rlhf_lightning.models.objects import ModelSource
from rlhf_lightning.models.reward_network import RewardHead
from rlhf_lightning.models.value_network import ValueNetwork, has_head_for_tokens, value_source, zero_last_layer
from rlhf_lightning.rollouts import Experience
from rlhf_lightning.training.checks import (
    check_finite_step,
    check_first_step,
    check_ppo_settings,
)
from rlhf_lightning.training.estimators import AdvantageName, find_estimator
from rlhf_lightning.training.online import OnlineModule
from rlhf_lightning.training.optimization import Fraction, optimizer_and_schedule
from rlhf_lightning.training.policy_loss import PolicyLossType, StepLoss, Targets, check_policy_settings, left_out
from rlhf_lightning.training.processes import over_processes

log = logging.getLogger(__name__)

SHARED = "shared"
"""The `value_model` that is a head on the policy's own hidden states."""


class PPO(OnlineModule):
    """PPO: a causal language model tuned on the rewards of its own responses, held near a reference.

    Each batch of prompts is a rollout: responses are sampled, scored and turned into advantages, and the policy and the
    value model learn from them in `num_ppo_epochs` passes of `num_mini_batches` optimizer steps.

    Args:
        backbone: Policy to start from: hub name, directory (whole, or LoRA adapters, which are merged) or GGUF file of
            any causal language model, or `builtin:tiny`.
        advantage_estimator: `gae` with a value model (PPO); or without one `grpo` or `rloo`, against the other
            responses to the same prompt, or `reinforce++`, against the whole rollout. Or `module:function` of yours,
            which takes what the functions of `rlhf_lightning.functional.advantages.ADVANTAGES` take.
        value_model: Directory or hub name of what the value model begins as; `shared` is a head on the policy's hidden
            states. When not given, the reward model if it has the policy's tokenizer, else the policy's backbone.
        vf_coef: Weight of the value loss.
        value_lr: Learning rate of the value model, whose parameters are a group of their own.
        kl_coef: Weight of the KL from the reference, per nat: in the reward of each token (`gae`, `reinforce++`), in
            that of the response (`rloo`), or, for `grpo`, of its mean over the tokens, a term of the loss next to
            advantages that are in standard deviations of a group's scores.
        num_ppo_epochs: Passes over a rollout.
        policy_loss_type: Name of the policy loss: `ppo`, `gspo` (one ratio for a response) or `cispo` (capped weights);
            its formula stands in the function of that name in `rlhf_lightning.functional.policy_losses`. Or
            `module:function` of yours, which takes what those functions take.
        loss_aggregation: How the losses of tokens become that of a step: `token`, the mean over all tokens; `response`,
            the mean over responses of their means; `constant`, the mean over responses of sums over `max_new_tokens`.
        clip_range: How far the ratio of probabilities may move below 1, and above if `clip_range_high` is not given;
            null does not clip.
        clip_range_high: How far it may move above 1 (DAPO: 0.28); for `cispo`, its cap less 1.
        dual_clip: Largest ratio with a gradient where the advantage is negative, above 1 (3.0 is usual); none when not
            given.
        clip_range_value: How far a value may move, in units of reward.
        gamma: Discount per token.
        gae_lambda: Of the generalized advantages.
        whiten_advantages: Give them mean 0 and variance 1 over the rollout of all processes; for `gae`.
        scale_rewards: What `grpo` divides by: the standard deviation of the scores of a `group` or the whole `batch`;
            `none` (Dr. GRPO) divides by nothing.
        kl_loss_coef: Weight of the KL from the reference as a term of the loss (k3, its mean over the tokens), beside
            `kl_coef` in the reward, or with `kl_coef` 0 instead of it; for `grpo`, `kl_coef` is it.
        entropy_coef: Weight of the entropy of the policy at each token, of its whole vocabulary, taken off the loss.
        mask_truncated_responses: Do not learn from responses that did not end in `max_new_tokens` tokens; their scores
            still count in their groups.
        skip_equal_groups: Do not learn from the responses to a prompt whose scores are all equal.
        engine_importance_cap: Weigh each advantage by the probability of its token under the policy over that of the
            engine that sampled it, at most this; null does not, nor is there anything to do for `transformers`.
        adaptive_kl_target: Nats per response that `kl_coef` is steered to (Ziegler et al. 2019); fixed when not given.
        kl_horizon: Responses over which it is steered there.
        target_kl: Skip a rollout's remaining passes once the approximate KL to the policy that sampled it, in nats per
            token, exceeds 1.5 times this; never when not given.
        normalize_scores: Divide scores by the standard deviation of all so far, after taking off their mean.
        score_clip: Largest size of a score, after that.
        optimizer: Any torch optimizer with its arguments, which has torch's defaults for the rest of them; Adam with
            learning rate 1e-6 when none is named. The learning rate is the policy's.
        warmup_ratio: Share of all optimizer steps in which the learning rate rises to its value.
    """

    log_line = {"clip_fraction": "clipped"}  # noqa: RUF012

    def __init__(
        self,
        backbone: ModelSource,
        advantage_estimator: AdvantageName = "gae",
        value_model: str | None = None,
        vf_coef: NonNegativeFloat = 0.1,
        value_lr: PositiveFloat = 1e-5,
        kl_coef: NonNegativeFloat = 0.05,
        num_ppo_epochs: PositiveInt = 4,
        policy_loss_type: PolicyLossType = "ppo",
        loss_aggregation: Aggregation = "token",
        clip_range: PositiveFloat | None = 0.2,
        clip_range_high: PositiveFloat | None = None,
        dual_clip: PositiveFloat | None = None,
        clip_range_value: PositiveFloat = 0.2,
        gamma: ClosedUnitInterval = 1.0,
        gae_lambda: ClosedUnitInterval = 0.95,
        whiten_advantages: bool = True,
        scale_rewards: ScaleRewards = "group",
        kl_loss_coef: NonNegativeFloat = 0.0,
        entropy_coef: NonNegativeFloat = 0.0,
        mask_truncated_responses: bool = False,
        skip_equal_groups: bool = False,
        engine_importance_cap: PositiveFloat | None = 2.0,
        adaptive_kl_target: PositiveFloat | None = None,
        kl_horizon: PositiveFloat = 10000.0,
        target_kl: PositiveFloat | None = None,
        normalize_scores: bool = False,
        score_clip: PositiveFloat | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-6),
        warmup_ratio: Fraction = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(backbone, optimizer=optimizer, warmup_ratio=warmup_ratio, **shared)
        self.estimator = find_estimator(advantage_estimator)
        check_ppo_settings(self.hparams, self.estimator)
        check_policy_settings(self.hparams, self.estimator)
        self.policy_loss = StepLoss(
            policy_loss_type,
            aggregation=loss_aggregation,
            max_new_tokens=self.hparams.max_new_tokens,
            clip_range=clip_range,
            clip_range_high=clip_range_high,
            dual_clip=dual_clip,
        )
        self.kl_control = AdaptiveKLController(kl_coef or 1.0, adaptive_kl_target or 1.0, kl_horizon)
        self.moments = RunningMoments()
        self._checked_start = False

    # ---- models

    def setup(self, stage: str) -> None:
        super().setup(stage)
        settings = self.hparams
        if self.estimator.uses_values and settings.value_model != SHARED:  # a checkpoint says what its value model was
            chat_format, alike = chat_format_of(self.trainer.datamodule), []
            if chat_format is not None:
                models = self.rewards.models
                alike = [each.name for each in models if not different_tokens(each.tokenizer, chat_format.tokenizer)]
            settings.value_model = value_source(
                settings.value_model,
                reward_model=alike[0] if alike else None,
                backbone=settings.backbone,
                policy=self.backbone_config,
                trust_remote_code=settings.trust_remote_code,
            )

    def build_network(self) -> None:
        """Load policy and value model."""
        settings = self.hparams
        source: ModelSource = settings.value_model or settings.backbone
        if source == settings.backbone and self.estimator.uses_values and not isinstance(self.backbone, str):
            source = copy.deepcopy(self.backbone)  # before it gets adapters
        super().build_network()
        if self.estimator.uses_values and settings.value_model == SHARED:
            self.value = RewardHead(self.backbone_config.get_text_config().hidden_size)
            zero_last_layer(self.value)
        elif self.estimator.uses_values:
            self.value = ValueNetwork.from_pretrained(
                source,
                gradient_checkpointing=settings.gradient_checkpointing,
                **self.loading,
            )

    def configure_optimizers(self) -> dict[str, Any]:
        groups = [{"params": [parameter for parameter in self.policy.parameters() if parameter.requires_grad]}]
        if self.value is not None:
            groups.append({"params": list(self.value.parameters()), "lr": self.hparams.value_lr})
        return optimizer_and_schedule(self, groups=groups, steps_per_batch=self.steps_per_rollout)

    @property
    def steps_per_rollout(self) -> int:
        return self.hparams.num_ppo_epochs * self.hparams.num_mini_batches

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if isinstance(self.value, ValueNetwork):
            config = self.value.network.backbone.config
            head = "its own" if has_head_for_tokens(config) else "a new"
            log.info("value model: %s, with %s head", config.name_or_path or "its own", head)

    # ---- a rollout, and what it teaches

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Roll out, score, advantages, epochs of minibatches, log; then steer the KL coefficient."""
        numbers = self.learn(batch)
        if self.hparams.adaptive_kl_target is not None:
            responses = len(batch.index) * self.hparams.num_generations * self.trainer.world_size
            self.kl_control.update(numbers["kl"], responses)

    @torch.no_grad()
    def _learnable(self, experience: Experience) -> tuple[Targets, dict[str, float]]:
        """What a rollout teaches, and the numbers that say how it went, over all processes."""
        responses, scores, tokens, *_ = experience
        ended = responses.ended.to(self.device)
        shaped = self.shaped_scores(self.learned_scores(experience) - self.overlong_penalty(responses), ended)
        advantages, returns = self._advantages(experience, shaped)
        numbers = experience.numbers() | {"reward_with_kl": shaped - self.kl_penalty(experience, self.kl_coef)}
        out, said = left_out(self.hparams, shaped, ended)
        numbers |= said
        if (log_ratio := experience.engine_log_ratio()) is not None:
            numbers["engine_mismatch"] = log_ratio.abs()
            if (cap := self.hparams.engine_importance_cap) is not None:
                weights = log_ratio.exp().clamp(max=cap)
                advantages = advantages * scatter_to_mask(weights, tokens.mask)
                numbers["engine_weight"] = weights
        means = self.rollout_means(scores, numbers)
        if "engine_weight" in numbers:
            most = over_processes(self.trainer, numbers["engine_weight"].max(), "max")
            means["engine_weight_max"] = most.item()
        means["kl_coef"] = self.kl_coef
        if self.value is not None:
            explained = explained_variance(tokens.values, returns, tokens.mask, sum_over=self._sum)
            means["explained_variance"] = explained.item()
        self.rollout_log.samples(responses, scores, numbers["kl"])
        return Targets(advantages, returns, tokens.mask & ~out[:, None]), means

    def _advantages(self, experience: Experience, shaped: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages, whitened where the method has it so, and returns, [B, S] float32; `shaped` scores are [B]."""
        settings, estimator, tokens = self.hparams, self.estimator, experience.tokens
        # In float64: a large score must not round away the KL that is added to it.
        in_reward = 0.0 if estimator.kl_in_loss else self.kl_coef
        advantages, returns = estimator(
            shaped_rewards(shaped.double(), tokens.kl("k1"), tokens.mask, kl_coef=in_reward),
            tokens.values,
            tokens.mask,
            group_size=settings.num_generations,
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
            scale_rewards=settings.scale_rewards,
            sum_over=self._sum,
        )
        advantages = advantages.float()
        if estimator.whitened and (settings.whiten_advantages or not estimator.uses_values):
            advantages = masked_whiten(advantages, tokens.mask, sum_over=self._sum)
        return advantages, returns.float()

    def shaped_scores(self, scores: Tensor, ended: Tensor) -> Tensor:
        """Scores [B] with the penalty for missing ends, then normalized and clipped where the settings say so."""
        settings = self.hparams
        scores = scores - settings.missing_eos_penalty * (~ended).float()
        if settings.normalize_scores:
            count = self._sum(torch.tensor(float(len(scores)), device=self.device)).item()
            mean = self._sum(scores.double().sum()).item() / count
            squares = self._sum((scores.double() - mean).square().sum()).item()
            self.moments.update(count, mean, squares)
            scores = (scores - self.moments.mean) / self.moments.std
        return scores if settings.score_clip is None else scores.clamp(-settings.score_clip, settings.score_clip)

    @property
    def kl_coef(self) -> float:
        """The weight of the KL, as it is now."""
        return self.kl_control.value if self.hparams.kl_coef > 0 else 0.0

    @property
    def kl_weight(self) -> float:
        return self.hparams.kl_coef

    @property
    def loss_kl_coef(self) -> float:
        """The weight of the KL that is a term of the loss, as it is now."""
        return self.kl_coef if self.estimator.kl_in_loss else self.hparams.kl_loss_coef

    def kl_penalty(self, experience: Experience, kl_coef: float) -> Tensor:
        """What the KL of each response takes off its reward, [B]: of the sum of k1, and where it is in the loss, of the
        mean of k3 over the tokens."""
        tokens, in_loss = experience.tokens, self.hparams.kl_loss_coef
        penalty = torch.zeros_like(experience.scores)
        if self.estimator.kl_in_loss:
            in_loss = kl_coef
        else:
            penalty = super().kl_penalty(experience, kl_coef)
        return penalty + in_loss * (tokens.kl("k3").sum(dim=1) / tokens.mask.sum(dim=1))

    # ---- update

    def _update(self, experience: Experience, targets: Targets) -> dict[str, float]:
        """All passes over a rollout, one optimizer step per minibatch; means over their tokens."""
        settings = self.hparams
        steps: list[dict[str, float]] = []
        stopped = False
        for epoch in range(settings.num_ppo_epochs):
            parts = self.minibatches(len(experience.scores), epoch)
            made = [self._step(experience, targets, part) for part in parts]
            steps += made
            approximate = sum(numbers["approx_kl"] for numbers in made) / len(made)
            if settings.target_kl is not None and approximate > 1.5 * settings.target_kl:
                stopped = epoch + 1 < settings.num_ppo_epochs
                break
        means = {name: sum(numbers[name] for numbers in steps) / len(steps) for name in steps[0]}
        return means | {"steps": float(len(steps)), "stopped_early": float(stopped)}

    def _step(self, experience: Experience, targets: Targets, part: Sequence[int]) -> dict[str, float]:
        """One optimizer step on a minibatch of all processes: one mean over it, however it is divided."""
        self.optimizers().zero_grad()
        learned = targets.learned[part]
        # Where nothing is learned from, the step has no gradient.
        size, tokens = self._sum(torch.stack([self.policy_loss.size(learned), learned.sum()])).clamp(min=1)
        ordered = experience.responses.order(part)
        sums = self.step_gradients(
            ordered,
            lambda piece, counts: self._losses(experience, targets, piece, counts=counts),
            size=size,
            spare=ordered[0],
        )
        divisors = torch.stack([size if name in _LOSSES else tokens for name in _STEP_NUMBERS])
        numbers = dict(zip(_STEP_NUMBERS, (sums / divisors).tolist(), strict=True))
        if not self._checked_start:
            check_first_step(self.trainer, numbers, clipped=not self.policy_loss.clips_rounding)
            self._checked_start = True
        self.optimize()
        return numbers

    def _losses(
        self, experience: Experience, targets: Targets, piece: Sequence[int], *, counts: bool
    ) -> tuple[Tensor, Tensor]:
        """The summed loss of some responses, and sums of what is logged. Both 0 where the responses do not count."""
        settings, rollouts = self.hparams, self.rollouts
        responses = experience.responses.select(piece)
        width = int(responses.lengths.max())
        where = torch.tensor(piece, device=self.device)
        mask, old, reference, old_values, advantages, returns, learned = (
            tensor[where, :width] for tensor in (*experience.tokens, *targets)
        )
        with self.trainer.precision_plugin.forward_context():
            logprobs, values, entropies = rollouts.forward(
                rollouts.padded(responses), entropies=settings.entropy_coef > 0
            )
        logprobs = scatter_to_mask(logprobs.float(), mask)
        policy_losses = self.policy_loss(logprobs, old, advantages, mask)
        value_losses = torch.zeros_like(policy_losses)
        if values is not None:
            value_losses = ppo_value_loss(
                scatter_to_mask(values.float(), mask), old_values, returns, clip_range=settings.clip_range_value
            )
        kl_losses = torch.zeros_like(policy_losses)
        if self.loss_kl_coef > 0:
            kl_losses = self.loss_kl_coef * kl_estimate(logprobs, reference, estimator="k3")
        counting, weights = float(counts), self.policy_loss.weights(learned)
        losses = policy_losses + settings.vf_coef * value_losses + kl_losses
        entropy_losses = torch.zeros_like(policy_losses)
        if entropies is not None:
            entropy_losses = -settings.entropy_coef * scatter_to_mask(entropies.float(), mask)
            losses = losses + entropy_losses
        loss = counting * torch.where(learned, weights * losses, 0).sum()
        with torch.no_grad():
            ratio = self.policy_loss.ratio(logprobs, old, mask)
            logged = {
                "policy_loss": weights * policy_losses,
                "value_loss": weights * value_losses,
                "kl_loss": weights * kl_losses,
                "entropy_loss": weights * entropy_losses,
                "approx_kl": kl_estimate(old, logprobs, estimator="k3"),
                "clip_fraction": self.policy_loss.outside(ratio).float(),
                "ratio": ratio,
                "moved": (logprobs - old).abs(),
            }
            sums = torch.stack([torch.where(learned, logged[name], 0).double().sum() for name in _STEP_NUMBERS])
        check_finite_step(self.trainer, loss, key="kl_coef")
        return loss, counting * sums

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["ppo"] = {"kl_coef": self.kl_control.state_dict(), "moments": self.moments.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["ppo"]
        self.kl_control.load_state_dict(state["kl_coef"])
        self.moments.load_state_dict(state["moments"])


_LOSSES = ("policy_loss", "value_loss", "kl_loss", "entropy_loss")
"""Means over a minibatch, as `loss_aggregation` has them."""
_STEP_NUMBERS = (*_LOSSES, "approx_kl", "clip_fraction", "ratio", "moved")
"""Those, and means over the tokens of a minibatch that are learned from."""
