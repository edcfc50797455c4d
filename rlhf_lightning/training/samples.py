"""What a policy answers to a few fixed prompts, before and during its training."""

from __future__ import annotations

import logging

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.models.precision import float32_arithmetic
from rlhf_lightning.models.slot_engine import greedy_responses
from rlhf_lightning.training.media import log_table, taking_media
from rlhf_lightning.training.policy_module import PolicyModule

log = logging.getLogger(__name__)


class Samples(Callback):
    """Writes the policy's responses to fixed validation prompts to the loggers, as the table `samples`.

    Greedy responses, next to those of the policy that the run began with; a truncated one is marked. TensorBoard shows
    the table as a text, MLflow as an artifact `samples/step_N.md`, W&B (and a logger with its methods) as a table.
    Nothing is drawn at random, so the run is the same with and without it.

    Args:
        every_n_steps: Optimizer steps between two tables; there is one at the start and one at the end.
        prompts: How many, spread over the validation rows.
        max_new_tokens: Longest response.
    """

    def __init__(
        self, every_n_steps: PositiveInt = 200, prompts: PositiveInt = 4, max_new_tokens: PositiveInt = 128
    ) -> None:
        self.every_n_steps = every_n_steps
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self._first: list[str] = []
        self._step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that has no policy. Raises `ConfigurationError`."""
        if not isinstance(pl_module, PolicyModule):
            raise ConfigurationError(f"Samples: a {type(pl_module).__name__} has no policy that could answer")

    def state_dict(self) -> dict[str, list[str]]:
        return {"first": self._first}

    def load_state_dict(self, state_dict: dict[str, list[str]]) -> None:
        self._first = state_dict["first"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not taking_media(trainer.loggers) or not trainer.is_global_zero or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        rows, chat_format = trainer.datamodule.rows["val"], trainer.datamodule.chat_format
        positions = np.linspace(0, len(rows) - 1, min(self.prompts, len(rows))).astype(int)
        prompts = [torch.from_numpy(rows.segments(i)[0].astype(np.int64)).to(pl_module.device) for i in positions]
        with float32_arithmetic(pl_module.policy):
            replies = greedy_responses(
                pl_module.policy,
                prompts,
                max_new_tokens=self.max_new_tokens,
                eos_id=chat_format.eos_id,
                pad_id=chat_format.pad_id,
            )
        now = [
            chat_format.decode_after(prompt, reply) + ("" if reply[-1] == chat_format.eos_id else " [truncated]")
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        self._first = self._first or now
        texts = [chat_format.tokenizer.decode(prompt) for prompt in prompts]
        rows = list(zip(texts, self._first, now, strict=True))
        log_table(trainer.loggers, "samples", ("prompt", "at the start", "now"), rows, trainer.global_step)
