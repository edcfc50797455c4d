"""Proximal policy optimization: a policy that answers prompts, is scored, and learns from its own answers.

B replies of a process, S tokens of the longest reply, R replies of a forward pass.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.data.datamodules import PromptDataModule, chat_format_of
from rlhf_lightning.data.roles import Role
from rlhf_lightning.data.same_tokenizer import check_reference_tokenizer, different_tokens
from rlhf_lightning.errors import ConfigurationError, TrainingError
from rlhf_lightning.functional.advantages import explained_variance, shaped_rewards
from rlhf_lightning.functional.kl import AdaptiveKLController, kl_estimate
from rlhf_lightning.functional.losses import ppo_policy_loss, ppo_value_loss
from rlhf_lightning.functional.reductions import RunningMoments, masked_whiten, scatter_to_mask
from rlhf_lightning.metrics import ResponseCount
from rlhf_lightning.models.backbones import load_config, max_positions
from rlhf_lightning.models.causal_lm import CausalLM, FrozenCausalLM, load_causal_config
from rlhf_lightning.models.generation import RolloutEngine, TransformersEngine, seed_of
from rlhf_lightning.models.precision import float32_arithmetic
from rlhf_lightning.models.reward_network import RewardHead, is_reward_network
from rlhf_lightning.models.value_network import ValueNetwork, has_head_for_tokens, zero_last_layer
from rlhf_lightning.models.vllm_engine import VLLMEngine
from rlhf_lightning.rewards.functions import check_text_of
from rlhf_lightning.rewards.scorers import RewardScorer
from rlhf_lightning.rewards.source import RewardSource
from rlhf_lightning.rollouts import Experience, Rollouts, without_adapters
from rlhf_lightning.training.checkpoints import ORIGIN
from rlhf_lightning.training.checks import check_schedule, schedule_lead, start_tolerance
from rlhf_lightning.training.estimators import AdvantageName, find_estimator
from rlhf_lightning.training.last_validation import validate
from rlhf_lightning.training.module import Measured, PolicyModule
from rlhf_lightning.training.optimization import Fraction, optimizer_and_schedule
from rlhf_lightning.training.references import (
    ADAPTER,
    check_reference_config,
    check_same_reference,
    choose_reference,
)
from rlhf_lightning.training.rollout_log import RolloutLog
from rlhf_lightning.user_code import name_of

log = logging.getLogger(__name__)

TRANSFORMERS = "transformers"
"""The `engine` that is the policy itself."""

SHARED = "shared"
"""The `value_model` that is a head on the policy's own hidden states."""


class Targets(NamedTuple):
    """What is learned from a rollout, fixed for all passes over it; 0 outside the mask of its tokens."""

    advantages: Tensor
    """[B, S] float32, whitened where the method has it so."""
    returns: Tensor
    """[B, S] float32, what the value model is trained to; before whitening."""


class PPO(PolicyModule):
    """PPO: a causal language model tuned on the rewards of its own replies, held near a reference.

    Each batch of prompts is a rollout: replies are drawn, scored and turned into advantages, and the policy and the
    value model learn from them in `num_ppo_epochs` passes of `num_mini_batches` optimizer steps.

    Args:
        backbone: Policy to start from: hub name or directory of any causal language model, or `builtin:tiny`.
        reward_model: Directory of a trained reward model, or directory or hub name of a sequence classifier with one
            label, of any tokenizer; or `module:function` of yours, which takes conversations and responses and gives
            floats; in Python the function itself.
        reward_chat_template: The text that the reward model reads: `plain`, the words alone, a line for each turn;
            `pair`, prompt and reply as its tokenizer's two texts; `transcript`, plain `Human: ... Assistant: ...`; or a
            Jinja file that writes the whole. When not given, its tokenizer's chat template, else the transcript.
        advantage_estimator: `gae` with a value model (PPO); or without one `grpo` or `rloo`, against the other
            responses to the same prompt, or `reinforce++`, against the whole rollout. Or `module:function` of yours,
            which takes what the functions of `rlhf_lightning.functional.advantages.ADVANTAGES` take.
        value_model: Directory or hub name of what the value model begins as; `shared` is a head on the policy's hidden
            states. When not given, the reward model if it has the policy's tokenizer, else the policy's backbone.
        vf_coef: Weight of the value loss.
        value_lr: Learning rate of the value model, whose parameters are a group of their own.
        num_generations: Replies drawn to each prompt.
        max_new_tokens: Longest reply.
        temperature: Sampling temperature; applied to all log-probs.
        generation_micro_batch_size: Replies drawn or scored at a time; changes no result.
        engine: What draws the replies: `transformers`, the policy itself; or the URL of a vLLM server, which is given
            the weights before each rollout. Its log-probs are not learned from: the policy scores each reply again.
        engine_directory: Where the weights are written for a vLLM server, on a disk or memory that both see.
        num_ppo_epochs: Passes over a rollout.
        num_mini_batches: Optimizer steps in each pass; each process's replies are divided at random.
        micro_batch_size: Replies in one forward and backward pass; changes no result.
        clip_range: Of the ratio of probabilities.
        clip_range_value: How far a value may move, in units of reward.
        gamma: Discount per token.
        gae_lambda: Of the generalized advantages.
        whiten_advantages: Give them mean 0 and variance 1 over the rollout of all processes; for `gae`.
        kl_coef: Weight of the KL from the reference, per nat: in the reward of each token (`gae`, `reinforce++`), in
            that of the reply (`rloo`), or, for `grpo`, of its mean over the tokens, a term of the loss beside
            advantages that are in standard deviations of a group's scores.
        adaptive_kl_target: Nats per response that `kl_coef` is steered to (Ziegler et al. 2019); fixed when not given.
        kl_horizon: Responses over which it is steered there.
        target_kl: Skip a rollout's remaining passes once the approximate KL to the policy that sampled it, in nats per
            token, exceeds 1.5 times this; never when not given.
        missing_eos_penalty: Taken off the score of a reply that did not end in `max_new_tokens` tokens.
        normalize_scores: Divide scores by the standard deviation of all so far, after taking off their mean.
        score_clip: Largest size of a score, after that.
        max_grad_norm: Gradients are clipped to it; 0 leaves them.
        validate_at_start: Validate before the first step, in place of Lightning's sanity check: the "before" of a run,
            whose weights may be the best checkpoint. It costs one reply to each held-out prompt, as every validation
            does; a run that goes on from a checkpoint does not repeat it.
        reference: `frozen`, a copy of the start; `adapter`, the policy without its adapters; or the directory or name
            of another model of the same architecture and tokenizer. `adapter` with LoRA and else `frozen` when not
            given.
        optimizer: Any torch optimizer with its arguments, which has torch's defaults for the rest of them; Adam with
            learning rate 1e-6 when none is named. The learning rate is the policy's.
        warmup_ratio: Share of all optimizer steps in which the learning rate rises to its value.
    """

    learns_from_pairs = False
    shown = ("reward", "reward_with_kl", "kl")

    def __init__(
        self,
        backbone: str,
        reward_model: str | Callable[..., Any],
        reward_chat_template: str | None = None,
        advantage_estimator: AdvantageName = "gae",
        value_model: str | None = None,
        vf_coef: NonNegativeFloat = 0.1,
        value_lr: PositiveFloat = 1e-5,
        num_generations: PositiveInt = 1,
        max_new_tokens: PositiveInt = 128,
        temperature: PositiveFloat = 1.0,
        generation_micro_batch_size: PositiveInt = 64,
        engine: str = TRANSFORMERS,
        engine_directory: str = "runs/vllm_weights",
        num_ppo_epochs: PositiveInt = 4,
        num_mini_batches: PositiveInt = 1,
        micro_batch_size: PositiveInt = 8,
        clip_range: PositiveFloat = 0.2,
        clip_range_value: PositiveFloat = 0.2,
        gamma: ClosedUnitInterval = 1.0,
        gae_lambda: ClosedUnitInterval = 0.95,
        whiten_advantages: bool = True,
        kl_coef: NonNegativeFloat = 0.05,
        adaptive_kl_target: PositiveFloat | None = None,
        kl_horizon: PositiveFloat = 10000.0,
        target_kl: PositiveFloat | None = None,
        missing_eos_penalty: NonNegativeFloat = 1.0,
        normalize_scores: bool = False,
        score_clip: PositiveFloat | None = None,
        max_grad_norm: NonNegativeFloat = 1.0,
        validate_at_start: bool = True,
        reference: str | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-6),
        warmup_ratio: Fraction = 0.0,
        **shared: Any,
    ) -> None:
        reward_source, reward_model = reward_model, name_of(reward_model)  # which is what a checkpoint holds
        super().__init__(backbone, optimizer=optimizer, warmup_ratio=warmup_ratio, **shared)
        self.automatic_optimization = False
        self.reward_source = reward_source
        self.estimator = find_estimator(advantage_estimator)
        self._check_settings()
        self.reference_source = choose_reference(
            reference, backbone, adapters=self.lora is not None, load_in_4bit=self.hparams.load_in_4bit
        )
        if self.reference_source not in (ADAPTER, backbone):
            config = load_causal_config(self.reference_source, trust_remote_code=self.hparams.trust_remote_code)
            check_reference_config(self.reference_source, config, backbone, self.backbone_config)
        self.rewards: RewardSource | None = None
        self.engine: RolloutEngine = TransformersEngine(generation_micro_batch_size)
        if engine != TRANSFORMERS:
            self.engine = VLLMEngine(engine, engine_directory)
        self.kl_control = AdaptiveKLController(kl_coef or 1.0, adaptive_kl_target or 1.0, kl_horizon)
        self.moments = RunningMoments()
        self.rollouts_done = 0
        self.rollout_log = RolloutLog(self)
        self.value: ValueNetwork | RewardHead | None = None
        self._frozen: FrozenCausalLM | None = None
        self._reference_fingerprint: str | None = None
        self._checked_start = False
        self._schedule_lead = 0
        self.val_metrics = _evaluation_metrics()
        self.test_metrics = _evaluation_metrics()

    def _check_settings(self) -> None:
        settings = self.hparams
        check_text_of(settings.reward_model, settings.reward_chat_template, "model.reward_chat_template")
        if settings.adaptive_kl_target is not None and settings.kl_coef == 0:
            raise ConfigurationError(
                "model.adaptive_kl_target: the coefficient that it steers is model.kl_coef, which is 0 and stays so; "
                "give a start above 0"
            )
        if settings.engine != TRANSFORMERS and not settings.engine.startswith(("http://", "https://")):
            raise ConfigurationError(
                f"model.engine: {settings.engine!r} is no engine; use {TRANSFORMERS}, or the http:// address of a vLLM "
                "server"
            )
        if self.estimator.uses_groups and settings.num_generations < 2:
            raise ConfigurationError(
                f"model.advantage_estimator: {settings.advantage_estimator} compares replies to one prompt; set "
                "model.num_generations to 2 or more"
            )
        if settings.value_model is not None and not self.estimator.uses_values:
            raise ConfigurationError(
                f"model.value_model: {settings.advantage_estimator} has no value model; leave the key out"
            )
        if self.lora is not None and self.lora.lora_dropout > 0:
            raise ConfigurationError(
                "model.lora.lora_dropout: above 0 the log-probs of a reply are random numbers, and PPO's ratios of "
                "them mean nothing; set it to 0"
            )

    # ---- models

    def setup(self, stage: str) -> None:
        super().setup(stage)
        settings = self.hparams
        if settings.validate_at_start:
            self.trainer.num_sanity_val_steps = 0
        if self.rewards is None:
            self.rewards = RewardSource(
                self.reward_source,
                chat_template=settings.reward_chat_template,
                batch_size=settings.generation_micro_batch_size,
                trust_remote_code=settings.trust_remote_code,
            )
        if self.estimator.uses_values and settings.value_model != SHARED:
            settings.value_model = self._value_source()  # a checkpoint says what its value model was
        if self.reference_source != ADAPTER and self._frozen is None:
            network = CausalLM.from_pretrained(self.reference_source, **self.loading)
            network.temperature *= self.hparams.temperature
            self._frozen = FrozenCausalLM(network)
            self._reference_fingerprint = self._frozen.fingerprint

    def check_data(self, data: LightningDataModule | None) -> None:
        """Check that the data is prompts that fit the policy. Raises `ConfigurationError` when they do not."""
        if data is None:
            return
        if not isinstance(data, PromptDataModule):
            raise ConfigurationError(f"data: PPO learns from prompts; use PromptDataModule, not {type(data).__name__}")
        config, new = self.backbone_config.get_text_config(), self.hparams.max_new_tokens
        limit = max_positions(config)
        if limit is not None and data.max_prompt_length + new > limit:
            raise ConfigurationError(
                f"data.max_prompt_length: {data.max_prompt_length} and model.max_new_tokens {new} are more than the "
                f"{limit} positions of {self.hparams.backbone}; set max_prompt_length to {max(limit - new, 1)} or less"
            )
        if data.chat_format is None:
            return
        if len(data.chat_format.tokenizer) > config.vocab_size:
            raise ConfigurationError(
                f"the tokenizer {data.tokenizer_source} has {len(data.chat_format.tokenizer)} tokens, but "
                f"{self.hparams.backbone} knows {config.vocab_size}; give the tokenizer of this model"
            )
        if self.reference_source not in (ADAPTER, self.hparams.backbone):
            check_reference_tokenizer(self.reference_source, data.chat_format.tokenizer, key="model.reference")

    def configure_model(self) -> None:
        """Load policy and value model, once."""
        if self.policy is not None:
            return
        settings = self.hparams
        super().configure_model()
        self.policy.temperature *= settings.temperature
        if not self.estimator.uses_values:
            return
        if settings.value_model == SHARED:
            self.value = RewardHead(self.backbone_config.get_text_config().hidden_size)
            zero_last_layer(self.value)
        else:
            self.value = ValueNetwork.from_pretrained(
                settings.value_model or settings.backbone,
                gradient_checkpointing=settings.gradient_checkpointing,
                **self.loading,
            )

    def _value_source(self) -> str:
        """What the value model begins as. Raises `ConfigurationError` for a model of other token ids."""
        given, backbone = self.hparams.value_model, self.hparams.backbone
        size = self.backbone_config.get_text_config().vocab_size
        if given is not None:
            config = load_config(given, trust_remote_code=self.hparams.trust_remote_code)
            if config.get_text_config().vocab_size != size:
                raise ConfigurationError(
                    f"model.value_model: {given} knows {config.get_text_config().vocab_size} token ids, and the policy "
                    f"{size}; give a model of the policy's tokenizer"
                )
            return given
        scorer = self.rewards.scorer
        if not isinstance(scorer, RewardScorer):
            return backbone
        config = load_config(scorer.name, trust_remote_code=self.hparams.trust_remote_code)
        chat_format = chat_format_of(self.trainer.datamodule)
        same = chat_format is not None and not different_tokens(scorer.tokenizer, chat_format.tokenizer)
        decoder = hasattr(scorer.model, "backbone") and config.model_type == self.backbone_config.model_type
        return scorer.name if same and decoder and is_reward_network(config) else backbone

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if isinstance(self.value, ValueNetwork):
            config = self.value.network.backbone.config
            head = "its own" if has_head_for_tokens(config) else "a new"
            log.info("value model: %s, with %s head", config.name_or_path or "its own", head)
        strategy = self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy):
            strategy.deepspeed_engine.optimizer.clip_grad = float(self.hparams.max_grad_norm)
        self._move_frozen()
        log.info("reward: %s; reference: %s", self.rewards.name, self.reference_source)

    def on_train_start(self) -> None:
        self._schedule_lead = schedule_lead(self)
        trainer = self.trainer
        anew = trainer.ckpt_path is None and trainer.global_step == 0 and not trainer.fast_dev_run
        if self.hparams.validate_at_start and trainer.enable_validation and anew:
            validate(trainer)

    def _move_frozen(self) -> None:
        half = None
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):  # whose mixed precision holds the policy so, too
            half = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(str(self.trainer.precision))
        self.rewards.to(self.device, half)
        if self._frozen is not None:
            self._frozen.match(self.policy)

    def on_validation_start(self) -> None:
        self._move_frozen()
        self._synchronize()

    on_test_start = on_validation_start

    def configure_optimizers(self):
        groups = [{"params": [parameter for parameter in self.policy.parameters() if parameter.requires_grad]}]
        if self.value is not None:
            groups.append({"params": list(self.value.parameters()), "lr": self.hparams.value_lr})
        return optimizer_and_schedule(
            self,
            self.optimizer_factory,
            schedule=self.hparams.lr_scheduler_type,
            warmup_ratio=self.hparams.warmup_ratio,
            groups=groups,
            steps_per_batch=self.hparams.num_ppo_epochs * self.hparams.num_mini_batches,
        )

    # ---- rollout

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        began = time.perf_counter()
        self.rollout_log.show(phase="rollout")
        self._synchronize()
        samples = self.hparams.num_generations
        experience = self.rollout(batch, "train", "rollout", self.rollouts_done, samples=samples, values=True)
        targets, numbers = self._learnable(experience)
        drawn = time.perf_counter()
        self.rollout_log.show(phase="update", **{name: numbers[name] for name in ("reward", "reward_with_kl", "kl")})
        numbers |= self._update(experience, targets)
        if self.hparams.adaptive_kl_target is not None:
            self.kl_control.update(numbers["kl"], len(experience.scores) * self.trainer.world_size)
        self.rollouts_done += 1
        numbers["seconds/rollout"] = drawn - began
        numbers["seconds/update"] = time.perf_counter() - drawn
        self.rollout_log.numbers(numbers)

    def on_train_batch_end(self, outputs, batch: PromptBatch, batch_idx: int) -> None:
        check_schedule(self, self._schedule_lead)

    @property
    def kl_coef(self) -> float:
        """The weight of the KL, as it is now."""
        return self.kl_control.value if self.hparams.kl_coef > 0 else 0.0

    def _synchronize(self) -> None:
        """Let the engine have the weights as they are now."""
        if self.trainer.is_global_zero:
            self.engine.synchronize(self.policy)
        self.trainer.strategy.barrier()

    def _arithmetic(self) -> AbstractContextManager:
        """Of passes without gradients: in a rollout as in its updates, so that ratios begin at 1; else float32."""
        if self.trainer.training:
            return self.trainer.precision_plugin.forward_context()
        reference = None if self._frozen is None else self._frozen.network
        return float32_arithmetic(self.policy, reference, self.rewards.model)

    @property
    def rollouts(self) -> Rollouts:
        """What samples, scores and computes log-probs, by this module's models."""
        return Rollouts(
            self.policy,
            self.trainer.datamodule.chat_format,
            self.engine,
            max_new_tokens=self.hparams.max_new_tokens,
            micro_batch_size=self.hparams.generation_micro_batch_size,
            scorer=self.rewards,
            reference=self._frozen or without_adapters(self.policy),
            value=self.value,
            arithmetic=self._arithmetic,
        )

    def rollout(self, batch: PromptBatch, role: Role, *seed: object, samples: int, values: bool) -> Experience:
        """`samples` scored responses to each prompt, those to one prompt side by side.

        The seed of a response comes from the parts of `seed`, the position of its prompt and its number.
        """
        rollouts, data = self.rollouts, self.trainer.datamodule
        index = [position for position in batch.index.tolist() for _ in range(samples)]
        prompts = [ids for ids in batch.input_ids for _ in range(samples)]
        seeds = [seed_of(data.seed, *seed, position, i % samples) for i, position in enumerate(index)]
        responses = rollouts.sample(prompts, seeds, index=index, temperature=self.hparams.temperature)
        known = data.example_ids(role)
        conversations = [data.messages(role, position) for position in index]
        scores = rollouts.score(responses, conversations, [known[position] for position in index])
        return Experience(responses, scores, rollouts.logprobs(responses, values=values))

    @torch.no_grad()
    def _learnable(self, experience: Experience) -> tuple[Targets, dict[str, float]]:
        """What a rollout teaches, and the numbers that say how it went, over all processes."""
        settings, (responses, scores, tokens) = self.hparams, experience
        mask, ended = tokens.mask, responses.ended.to(self.device)
        kl, kl_k3 = (
            torch.where(mask, kl_estimate(tokens.logprobs, tokens.reference, estimator=name), 0)
            for name in ("k1", "k3")
        )
        shaped = self.shaped_scores(scores, ended)
        # In float64: a large score must not round the KL beside it away.
        in_reward = 0.0 if self.estimator.kl_in_loss else self.kl_coef
        rewards = shaped_rewards(shaped.double(), kl, mask, kl_coef=in_reward)
        advantages, returns = self.estimator(
            rewards,
            tokens.values,
            mask,
            group_size=settings.num_generations,
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
        )
        targets = Targets(advantages.float(), returns.float())
        if self.estimator.whitened and (settings.whiten_advantages or not self.estimator.uses_values):
            targets = targets._replace(advantages=masked_whiten(targets.advantages, mask, sum_over=self._sum))
        numbers = {
            "reward": scores,
            "kl": kl.sum(dim=1),
            "kl_k3": kl_k3.sum(dim=1),
            "reward_with_kl": shaped - self.kl_coef * self._penalized_kl(kl, kl_k3, mask),
            "response_length": responses.lengths.float().to(self.device),
            "missing_eos": (~ended).float(),
            "entropy": torch.where(mask, -tokens.logprobs, 0).sum(dim=1) / mask.sum(dim=1),
        }
        means = {name: self._mean(x) for name, x in numbers.items()}
        means["reward_std"] = math.sqrt(max(self._mean((scores - means["reward"]).square()), 0.0))
        means["sqrt_kl"] = math.sqrt(max(means["kl"], 0.0))
        means["kl_coef"] = self.kl_coef
        if responses.engine_logprobs is not None:
            given = scatter_to_mask(torch.cat(responses.engine_logprobs).to(self.device), mask)
            means["engine_mismatch"] = self._mean((given - tokens.logprobs)[mask].abs())
        if self.value is not None:
            explained = explained_variance(tokens.values, targets.returns, mask, sum_over=self._sum)
            means["explained_variance"] = explained.item()
        self.rollout_log.samples(responses, scores, kl.sum(dim=1))
        return targets, means

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

    def _penalized_kl(self, kl: Tensor, kl_k3: Tensor, mask: Tensor) -> Tensor:
        """The KL of each response that `kl_coef` weighs, [B]: of k1 [B, S] the sum, or where it is in the loss, of k3
        the mean over the tokens."""
        if self.estimator.kl_in_loss:
            return kl_k3.sum(dim=1) / mask.sum(dim=1)
        return kl.sum(dim=1)

    # ---- update

    def _update(self, experience: Experience, targets: Targets) -> dict[str, float]:
        """All passes over a rollout, one optimizer step per minibatch; means over their tokens."""
        settings, data = self.hparams, self.trainer.datamodule
        count = len(experience.scores)
        num_mini_batches = min(settings.num_mini_batches, self._least(count))
        totals: dict[str, float] = {}
        stopped = False
        steps = 0
        for epoch in range(settings.num_ppo_epochs):
            generator = torch.Generator().manual_seed(
                seed_of(data.seed, "order", self.rollouts_done, epoch, self.global_rank)
            )
            order = torch.randperm(count, generator=generator).tolist()
            approximate = []
            for part in parts(order, num_mini_batches):
                numbers = self._step(experience, targets, part)
                approximate.append(numbers["approx_kl"])
                steps += 1
                for name, value in numbers.items():
                    totals[name] = totals.get(name, 0.0) + value
            if settings.target_kl is not None and sum(approximate) / len(approximate) > 1.5 * settings.target_kl:
                stopped = epoch + 1 < settings.num_ppo_epochs
                break
        means = {name: value / steps for name, value in totals.items()}
        return means | {"steps": float(steps), "stopped_early": float(stopped)}

    def _step(self, experience: Experience, targets: Targets, part: Sequence[int]) -> dict[str, float]:
        """One optimizer step on a minibatch of all processes: the mean over its tokens, however it is divided."""
        settings = self.hparams
        optimizer = self.optimizers()
        optimizer.zero_grad()
        tokens = self._sum(experience.tokens.mask[part].sum())
        # As many passes in each process: some strategies exchange gradients in each.
        count = self._most(math.ceil(len(part) / settings.micro_batch_size))
        ordered = sorted(part, key=lambda i: len(experience.responses.rows[i]))
        sums = torch.zeros(len(_STEP_NUMBERS), dtype=torch.float64, device=self.device)
        pieces = parts(ordered, count)
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            with nullcontext() if last else self._no_exchange():
                loss, own = self._losses(experience, targets, piece or ordered[:1], counts=bool(piece))
                # Strategies take the mean over processes.
                self.manual_backward(loss * (self.trainer.world_size / tokens))
            sums += own
        means = dict(zip(_STEP_NUMBERS, (self._sum(sums) / tokens).tolist(), strict=True))
        self._check_start(means)
        optimizer.step()
        self.lr_schedulers().step()
        return means

    def _no_exchange(self) -> AbstractContextManager:
        """Inside, gradients are added up in each process."""
        block = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)  # one process has none
        return block()

    def _losses(
        self, experience: Experience, targets: Targets, piece: Sequence[int], *, counts: bool
    ) -> tuple[Tensor, Tensor]:
        """The summed loss of some responses, and sums of what is logged. Both 0 where the responses do not count."""
        settings, rollouts = self.hparams, self.rollouts
        responses = experience.responses.select(piece)
        width = int(responses.lengths.max())
        mask, old, reference, old_values, advantages, returns = (
            tensor[piece, :width] for tensor in (*experience.tokens, *targets)
        )
        with self.trainer.precision_plugin.forward_context():
            logprobs, values = rollouts.forward(rollouts.padded(responses))
        logprobs = scatter_to_mask(logprobs.float(), mask)
        policy_losses = ppo_policy_loss(logprobs, old, advantages, clip_range=settings.clip_range)
        value_losses = torch.zeros_like(policy_losses)
        if values is not None:
            value_losses = ppo_value_loss(
                scatter_to_mask(values.float(), mask), old_values, returns, clip_range=settings.clip_range_value
            )
        kl_losses = torch.zeros_like(policy_losses)
        if self.estimator.kl_in_loss and self.kl_coef > 0:
            kl_losses = self.kl_coef * kl_estimate(logprobs, reference, estimator="k3")
        weight = float(counts)
        loss = weight * torch.where(mask, policy_losses + settings.vf_coef * value_losses + kl_losses, 0).sum()
        with torch.no_grad():
            ratio = (logprobs - old).clamp(-20, 20).exp()
            logged = {
                "policy_loss": policy_losses,
                "value_loss": value_losses,
                "kl_loss": kl_losses,
                "approx_kl": kl_estimate(old, logprobs, estimator="k3"),
                "clip_fraction": ((ratio - 1).abs() > settings.clip_range).float(),
                "ratio": ratio,
                "moved": (logprobs - old).abs(),
            }
            sums = torch.stack([torch.where(mask, logged[name], 0).double().sum() for name in _STEP_NUMBERS])
        if not torch.isfinite(loss):
            raise TrainingError(
                f"step {self.trainer.global_step}: the loss of a minibatch is {loss.item()}; the weights were not "
                "changed by it. Lower the learning rate or raise model.kl_coef"
            )
        return loss, weight * sums

    def _check_start(self, numbers: dict[str, float]) -> None:
        """Before the first step of all, the policy is the one that drew the rollout. Raises `TrainingError`."""
        if self._checked_start:
            return
        self._checked_start = True
        tolerance = start_tolerance(str(self.trainer.precision))
        if numbers["moved"] > tolerance or numbers["clip_fraction"] > tolerance or numbers["approx_kl"] > tolerance:
            raise TrainingError(
                f"step {self.trainer.global_step}: before the first update the policy gives its own replies other "
                f"probabilities than when they were drawn (mean ratio {numbers['ratio']:.5f}, mean change "
                f"{numbers['moved']:.2g} nats a token, clipped {numbers['clip_fraction']:.1%}): something random "
                "(dropout) is in it, or its attention sees padding; try another model.attn_implementation"
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.hparams.max_grad_norm > 0 and not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self.clip_gradients(optimizer, gradient_clip_val=self.hparams.max_grad_norm, gradient_clip_algorithm="norm")

    # ---- evaluation

    def measure(self, batch: PromptBatch, stage: Role) -> Measured:
        """Of one response to each prompt, sampled as in training, always with the same seeds."""
        (responses, scores, tokens) = self.rollout(batch, stage, "evaluation", samples=1, values=False)
        mask, logprobs, reference, _ = tokens
        k1, k3 = (torch.where(mask, kl_estimate(logprobs, reference, estimator=name), 0) for name in ("k1", "k3"))
        missing_eos = (~responses.ended).float().to(self.device)
        # The same yardstick at every validation: without moving moments, and with the coefficient of the settings.
        penalties = self.hparams.missing_eos_penalty * missing_eos
        penalties += self.hparams.kl_coef * self._penalized_kl(k1, k3, mask)
        values = {
            "reward": scores,
            "reward_with_kl": scores - penalties,
            "kl": k1.sum(dim=1),
            "response_length": responses.lengths.float().to(self.device),
            "missing_eos": missing_eos,
        }
        return Measured(values, (scores,))

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[ORIGIN]["reference"] = self._reference_fingerprint
        checkpoint["ppo"] = {
            "kl_coef": self.kl_control.state_dict(),
            "moments": self.moments.state_dict(),
            "rollouts": self.rollouts_done,
            "path": self.rollout_log.state(),
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        check_same_reference(checkpoint[ORIGIN].get("reference"), self._reference_fingerprint, self.reference_source)
        state = checkpoint["ppo"]
        self.kl_control.load_state_dict(state["kl_coef"])
        self.moments.load_state_dict(state["moments"])
        self.rollouts_done = state["rollouts"]
        self.rollout_log.restore(state["path"])
        super().on_load_checkpoint(checkpoint)

    # ---- numbers over all processes

    def _sum(self, x: Tensor) -> Tensor:
        """Sum over the processes."""
        return x if self.trainer.world_size == 1 else self.trainer.strategy.reduce(x.clone(), reduce_op="sum")

    def _mean(self, x: Tensor) -> float:
        """Mean over the replies of all processes."""
        sums = torch.stack([x.double().sum(), torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)])
        total, count = self._sum(sums).tolist()
        return total / count

    def _extreme(self, number: int, which: Callable) -> int:
        if self.trainer.world_size == 1:
            return number
        gathered = self.all_gather(torch.tensor(number, device=self.device))
        return int(which(gathered.tolist()))

    def _least(self, number: int) -> int:
        return self._extreme(number, min)

    def _most(self, number: int) -> int:
        return self._extreme(number, max)


def parts(order: Sequence[int], count: int) -> list[list[int]]:
    """`order` in `count` parts of sizes that differ by one at most; some are empty when there are too few."""
    size, more = divmod(len(order), count)
    bounds = [i * size + min(i, more) for i in range(count + 1)]
    return [list(order[begin:end]) for begin, end in itertools.pairwise(bounds)]


_STEP_NUMBERS = ("policy_loss", "value_loss", "kl_loss", "approx_kl", "clip_fraction", "ratio", "moved")
"""Means over the tokens of a minibatch."""


def _evaluation_metrics() -> nn.ModuleDict:
    """Metrics of a whole split; each is defined in the README under its logged name."""
    metrics: dict[str, Metric] = {
        "reward": MeanMetric(nan_strategy="disable"),
        "reward_with_kl": MeanMetric(nan_strategy="disable"),
        "kl": MeanMetric(nan_strategy="disable"),
        "response_length": MeanMetric(nan_strategy="disable"),
        "missing_eos": MeanMetric(nan_strategy="disable"),
        "replies": ResponseCount(),
    }
    return nn.ModuleDict(metrics)
