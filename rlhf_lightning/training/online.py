"""Modules that learn from responses of their own policy, sampled and scored anew for each batch of prompts."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy
from torch import Tensor, nn

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.data.datamodules import chat_format_of
from rlhf_lightning.data.roles import Role
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.functional.advantages import normalized_within_groups, overlong_share
from rlhf_lightning.metrics import ResponseCount
from rlhf_lightning.models.generation import RolloutEngine, seed_of
from rlhf_lightning.models.objects import ModelSource
from rlhf_lightning.models.reward_network import RewardHead
from rlhf_lightning.models.slot_engine import SlotEngine
from rlhf_lightning.models.value_network import ValueNetwork
from rlhf_lightning.models.vllm_engine import VLLMEngine
from rlhf_lightning.rewards.source import Reward, RewardSource, plain_reward, reward_list
from rlhf_lightning.rollouts import Experience, Responses, Rollouts, spread_name
from rlhf_lightning.training.checks import check_tokens_fit
from rlhf_lightning.training.measures import Measured, means
from rlhf_lightning.training.policy_module import PolicyModule
from rlhf_lightning.training.processes import mean_over_processes, over_processes
from rlhf_lightning.training.references import Reference, held_dtype
from rlhf_lightning.training.rollout_log import RolloutLog
from rlhf_lightning.training.validation import validate

log = logging.getLogger(__name__)

TRANSFORMERS = "transformers"
"""The `engine` that is the policy itself."""


class OnlineModule(PolicyModule):
    """A `PolicyModule` that learns from prompts: it samples responses, scores them, and compares them to a reference.

    A class derived from it gives `training_step`, which calls `learn`, what that calls (`_learnable`, `_update`), and
    `kl_weight`. It makes its optimizer steps itself, of `minibatches` by `step_gradients` and `optimize`.

    Args:
        reward_model: Directory of a trained reward model, or directory or hub name of a sequence classifier with one
            label, of any tokenizer; or `module:function` of yours, which takes conversations and responses and gives
            floats; in Python the function itself; or `judge://MODEL`, a language model that rates. Or a list of them,
            `{source: ..., weight: 1, name: ..., chat_template: ..., reference: ...}` each, whose weighted sum is the
            reward; with a reference, rows of a prompt and a response, a judge compares.
        multi_objective_aggregation: Of several rewards: `sum_then_normalize`, their weighted sum is learned from; or
            `normalize_then_sum` (GDPO), the weighted sum of each reward's difference to the mean of its prompt's
            responses, in their standard deviations.
        ensemble_penalty: Standard deviations over the heads of a reward model with `num_heads` above 1 that are taken
            off its mean score: what its heads disagree on is worth less. Refused where a reward model has one head.
        reward_chat_template: The text that the reward model reads: `plain`, the words alone, a line for each turn;
            `pair`, prompt and response as its tokenizer's two texts; `transcript`, plain `Human: ... Assistant: ...`;
            or a Jinja file that writes the whole. When not given, its tokenizer's chat template, else the transcript.
        num_generations: Responses sampled to each prompt.
        max_new_tokens: Longest response.
        temperature: Sampling temperature; applied to all log-probs.
        generation_micro_batch_size: Responses sampled or scored at a time; changes no result.
        engine: What samples: `transformers`, the policy itself; or the URL of a vLLM server, which is given the weights
            before each rollout. The policy scores each response again; the server's log-probs are compared with that.
        engine_directory: Where the weights are written for a vLLM server, on a disk or memory that both see.
        num_mini_batches: Optimizer steps in each pass over a rollout; what each process has is divided at random.
        micro_batch_size: Responses, or pairs of them, in one forward and backward pass; changes no result.
        max_grad_norm: Gradients are clipped to it; 0 leaves them.
        missing_eos_penalty: Taken off the score of a response that did not end in `max_new_tokens` tokens.
        overlong_buffer: Last tokens of `max_new_tokens` over which that penalty grows linearly from 0, for responses
            that ended within them too (DAPO's soft overlong punishment); 0 leaves those without one.
        validate_at_start: Validate before the first step, in place of Lightning's sanity check: the "before" of a run,
            whose weights may be the best checkpoint. It costs one response to each held-out prompt, as every validation
            does; a resumed run does not repeat it.
        reference: `frozen`, a copy of the start; `adapter`, the policy without its adapters; or the directory or name
            of another model of the same architecture and tokenizer. `adapter` with LoRA and else `frozen` when not
            given.
    """

    objects = (*PolicyModule.objects, "reward_model")
    learns_from_pairs = False
    data_kinds = ("prompts",)
    shown = ("reward", "reward_with_kl", "kl")
    reference: Reference

    def __init__(
        self,
        backbone: ModelSource,
        reward_model: Reward,
        ensemble_penalty: NonNegativeFloat = 0.0,
        reward_chat_template: str | None = None,
        multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize",
        num_generations: PositiveInt = 1,
        max_new_tokens: PositiveInt = 128,
        temperature: PositiveFloat = 1.0,
        generation_micro_batch_size: PositiveInt = 64,
        engine: str = TRANSFORMERS,
        engine_directory: str = "runs/vllm_weights",
        num_mini_batches: PositiveInt = 1,
        micro_batch_size: PositiveInt = 8,
        max_grad_norm: NonNegativeFloat = 1.0,
        missing_eos_penalty: NonNegativeFloat = 1.0,
        overlong_buffer: NonNegativeInt = 0,
        validate_at_start: bool = True,
        reference: str | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(backbone, **shared)
        rewards = reward_list(reward_model, reward_chat_template)
        self.save_hyperparameters({"reward_model": plain_reward(reward_model)})  # which is what a checkpoint holds
        self.automatic_optimization = False
        _check_aggregation(multi_objective_aggregation, rewards=len(rewards), group_size=num_generations)
        if engine != TRANSFORMERS and not engine.startswith(("http://", "https://")):
            raise ConfigurationError(
                f"model.engine: {engine!r} is no engine; use {TRANSFORMERS}, or the http:// address of a vLLM server"
            )
        if self.lora is not None and self.lora.lora_dropout > 0:
            raise ConfigurationError(
                "model.lora.lora_dropout: above 0 the log-probs of a response are random numbers, and ratios of them "
                "mean nothing; set it to 0"
            )
        self.reference = Reference(reference, self, temperature=temperature)
        self.reward_source = reward_model
        self.rewards: RewardSource
        self.engine: RolloutEngine = SlotEngine(generation_micro_batch_size)
        if engine != TRANSFORMERS:
            self.engine = VLLMEngine(engine, engine_directory)
        self._engine_checked = False
        self.value: ValueNetwork | RewardHead | None = None
        self.rollouts_done = 0
        self.rollout_log = RolloutLog(self)
        several = [f"reward/{reward.name}" for reward in rewards] if len(rewards) > 1 else []
        self.val_metrics, self.test_metrics = _evaluation_metrics(*several), _evaluation_metrics(*several)

    def check_data(self, data: LightningDataModule | None) -> None:
        """Check that the data is prompts that fit the policy. Raises `ConfigurationError` when they do not."""
        settings, config = self.hparams, self.backbone_config.get_text_config()
        check_tokens_fit(data, config, settings.backbone, kinds=self.data_kinds, new_tokens=settings.max_new_tokens)
        if (chat_format := chat_format_of(data)) is not None:
            self.reference.check_tokenizer(chat_format.tokenizer)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        settings = self.hparams
        if settings.validate_at_start:
            self.trainer.num_sanity_val_steps = 0
        if "rewards" not in vars(self):
            self.rewards = RewardSource(
                self.reward_source,
                chat_template=settings.reward_chat_template,
                batch_size=settings.generation_micro_batch_size,
                trust_remote_code=settings.trust_remote_code,
                ensemble_penalty=settings.ensemble_penalty,
            )
        spreads = [spread_name(name, several=len(self.rewards.names) > 1) for name in self.rewards.ensembles]
        for metrics in (self.val_metrics, self.test_metrics):
            metrics.update({name: metric for name, metric in means(*spreads).items() if name not in metrics})

    def build_network(self) -> None:
        super().build_network()
        self.policy.temperature *= self.hparams.temperature

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._move_frozen()
        log.info("reward: %s; reference: %s", self.rewards.name, self.reference.source)
        strategy = self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy):
            strategy.deepspeed_engine.optimizer.clip_grad = float(self.hparams.max_grad_norm)

    def on_train_start(self) -> None:
        super().on_train_start()
        trainer = self.trainer
        anew = trainer.ckpt_path is None and trainer.global_step == 0 and not trainer.fast_dev_run
        if self.hparams.validate_at_start and trainer.enable_validation and anew:
            validate(trainer)

    def on_validation_start(self) -> None:
        self._move_frozen()
        self.synchronize()

    on_test_start = on_validation_start

    def _move_frozen(self) -> None:
        self.rewards.to(self.device, held_dtype(self.trainer))
        self.reference.match(self.policy)

    def synchronize(self) -> None:
        """Let the engine have the weights as they are now; call before a rollout."""
        if self.trainer.is_global_zero:
            self.engine.synchronize(self.policy)
        self.trainer.strategy.barrier()

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
            reference=self.reference,
            value=self.value,
            arithmetic=self._arithmetic,
        )

    def _arithmetic(self) -> AbstractContextManager:
        """Of passes without gradients: in a rollout as in its updates, so that ratios begin at 1; else float32."""
        if self.trainer.training:
            return self.trainer.precision_plugin.forward_context()
        return self.reference.float32(self.policy, *self.rewards.networks)

    def rollout(self, batch: PromptBatch, role: Role, *seed: object, samples: int, values: bool) -> Experience:
        """`samples` scored responses to each prompt, those to one prompt side by side.

        The seed of a response comes from the parts of `seed`, the position of its prompt and its number.
        """
        rollouts, data = self.rollouts, self.trainer.datamodule
        positions = [position for position in batch.index.tolist() for _ in range(samples)]
        prompts = [ids for ids in batch.input_ids for _ in range(samples)]
        seeds = [seed_of(data.seed, *seed, position, i % samples) for i, position in enumerate(positions)]
        responses = rollouts.sample(prompts, seeds, temperature=self.hparams.temperature)
        known = data.example_ids(role)
        conversations = [data.messages(role, position) for position in positions]
        rewards = rollouts.score(responses, conversations, [known[position] for position in positions])
        each = dict(zip(self.rewards.names, rewards.scores.unbind(dim=1), strict=True))
        tokens = rollouts.logprobs(responses, values=values)
        experience = Experience(responses, self.rewards.added(rewards.scores), tokens, each, rewards.spreads)
        self._check_engine(experience)
        return experience

    def _check_engine(self, experience: Experience) -> None:
        """At the first rollout of a process: an engine that is a server has the policy's weights and settings."""
        mismatch = experience.engine_mismatch()
        if isinstance(self.engine, VLLMEngine) and mismatch is not None and not self._engine_checked:
            half = "16" in str(self.trainer.precision)
            self.engine.check_mismatch(mismatch.mean().item(), half_precision=half)
            self._engine_checked = True

    def measure(self, batch: PromptBatch, stage: Role) -> Measured:
        """Of one response to each prompt, sampled as in training, always with the same seeds."""
        experience = self.rollout(batch, stage, "evaluation", samples=1, values=False)
        values = experience.numbers()
        # The same yardstick at every validation: without moving moments, and with the coefficient of the settings.
        penalties = self.hparams.missing_eos_penalty * values["missing_eos"]
        penalties += self.overlong_penalty(experience.responses) + self.kl_penalty(experience, self.kl_weight)
        return Measured(values | {"reward_with_kl": values["reward"] - penalties}, (experience.scores,))

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps that are made of each batch of prompts."""
        raise NotImplementedError

    @property
    def kl_weight(self) -> float:
        """Of the KL in `val/reward_with_kl`, per nat; the same throughout a run."""
        raise NotImplementedError

    def kl_penalty(self, experience: Experience, kl_coef: float) -> Tensor:
        """What the KL of each response takes off its reward, [B]; of the sum over its tokens when not overridden."""
        return kl_coef * experience.tokens.kl("k1").sum(dim=1)

    def learned_scores(self, experience: Experience) -> Tensor:
        """What is learned from, before penalties, [B]: the scores, or the sum of rewards normalized in their groups."""
        if self.hparams.multi_objective_aggregation == "sum_then_normalize":
            return experience.scores
        rewards, size = torch.stack(list(experience.rewards.values()), dim=1), self.hparams.num_generations
        return self.rewards.added(normalized_within_groups(rewards, group_size=size))

    def overlong_penalty(self, responses: Responses) -> Tensor:
        """What responses that ended lose for ending in the last `overlong_buffer` tokens, [B]."""
        settings, ended = self.hparams, responses.ended.to(self.device)
        if settings.overlong_buffer == 0:
            return torch.zeros_like(ended, dtype=torch.float32)
        lengths = responses.lengths.to(self.device)
        shares = overlong_share(lengths, max_new_tokens=settings.max_new_tokens, buffer=settings.overlong_buffer)
        return settings.missing_eos_penalty * shares * ended

    # ---- learning from a rollout

    def learn(self, batch: PromptBatch) -> dict[str, float]:
        """Roll out, learn from it, log; returns the means that were logged."""
        began = time.perf_counter()
        self.rollout_log.show(phase="rollout")
        self.synchronize()
        samples = self.hparams.num_generations
        experience = self.rollout(batch, "train", "rollout", self.rollouts_done, samples=samples, values=True)
        targets, numbers = self._learnable(experience)
        drawn = time.perf_counter()
        self.rollout_log.show(phase="update", **{name: numbers[name] for name in self.shown})
        numbers |= self._update(experience, targets)
        self.rollouts_done += 1
        numbers["seconds/rollout"] = drawn - began
        numbers["seconds/update"] = time.perf_counter() - drawn
        self.rollout_log.numbers(numbers)
        return numbers

    def _learnable(self, experience: Experience) -> tuple[Any, dict[str, float]]:
        """What a rollout teaches, and the numbers that say how it went, over all processes."""
        raise NotImplementedError

    def _update(self, experience: Experience, targets: Any) -> dict[str, float]:
        """Learn it, and return means over the optimizer steps."""
        raise NotImplementedError

    def rollout_means(self, scores: Tensor, numbers: dict[str, Tensor]) -> dict[str, float]:
        """Means over the responses of all processes, with the deviation of the scores and the root of the KL."""
        means = {name: mean_over_processes(self.trainer, x) for name, x in numbers.items()}
        variance = mean_over_processes(self.trainer, (scores - means["reward"]).square())
        means["reward_std"] = math.sqrt(max(variance, 0.0))
        means["sqrt_kl"] = math.sqrt(max(means["kl"], 0.0))
        return means

    def minibatches(self, count: int, number: int) -> list[list[int]]:
        """What a process has, `count` of it, in a random order that belongs to a pass over a rollout, divided."""
        fewest = int(over_processes(self.trainer, torch.tensor(count, device=self.device), "min"))
        seed = seed_of(self.trainer.datamodule.seed, "order", self.rollouts_done, number, self.global_rank)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        return [part.tolist() for part in np.array_split(order, min(self.hparams.num_mini_batches, fewest))]

    def step_gradients(
        self,
        ordered: Sequence[int],
        losses: Callable[[Sequence[int], bool], tuple[Tensor, Tensor]],
        *,
        size: Tensor,
        spare: int,
    ) -> Tensor:
        """Gradients of one step of all processes, from `micro_batch_size` of its parts at a time.

        `losses` takes some of the parts `ordered`, and whether they count, and gives their summed loss, [], and sums of
        what is logged; their sums over all parts of all processes are returned. `size` is what the summed loss is
        divided by. Where a process has too few parts, `spare` is computed, which does not count: some strategies
        exchange gradients in each pass, so there are as many in each process.
        """
        trainer = self.trainer
        passes = torch.tensor(math.ceil(len(ordered) / self.hparams.micro_batch_size), device=self.device)
        pieces = np.array_split(ordered, max(1, int(over_processes(trainer, passes, "max"))))
        sums = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1 or not isinstance(trainer.strategy, ParallelStrategy)
            with nullcontext() if last else trainer.strategy.block_backward_sync():
                loss, own = losses(piece.tolist() or [spare], bool(len(piece)))
                # Strategies take the mean over processes.
                self.manual_backward(loss * (trainer.world_size / size))
            sums = sums + own
        return self._sum(sums)

    def optimize(self) -> None:
        """Make an optimizer step, and one of the schedule."""
        self.optimizers().step()
        self.lr_schedulers().step()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.hparams.max_grad_norm > 0 and not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self.clip_gradients(optimizer, gradient_clip_val=self.hparams.max_grad_norm, gradient_clip_algorithm="norm")

    def _sum(self, x: Tensor) -> Tensor:
        """Sum over the processes."""
        return over_processes(self.trainer, x)

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["rollouts"] = {"done": self.rollouts_done, "path": self.rollout_log.state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.rollouts_done = checkpoint["rollouts"]["done"]
        self.rollout_log.restore(checkpoint["rollouts"]["path"])


def _check_aggregation(aggregation: str, *, rewards: int, group_size: int) -> None:
    if aggregation == "normalize_then_sum" and (rewards < 2 or group_size < 2):
        lacks = "model.num_generations of 2 or more" if group_size < 2 else "a list of rewards in model.reward_model"
        raise ConfigurationError(f"model.multi_objective_aggregation: normalize_then_sum needs {lacks}")


def _evaluation_metrics(*several: str) -> nn.ModuleDict:
    names = (*several, "reward", "reward_with_kl", "kl", "response_length", "missing_eos")
    return nn.ModuleDict(means(*names) | {"responses": ResponseCount()})
