"""Supervised fine-tuning: a policy that learns responses by heart, the usual start of DPO and PPO.

B conversations, T padded tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from rlhf_lightning.batches import PreferenceBatch, SFTBatch
from rlhf_lightning.data.roles import Role
from rlhf_lightning.metrics import PairCount, Perplexity, TokensPerSecond
from rlhf_lightning.models.causal_lm import ResponseLogprobs
from rlhf_lightning.models.objects import ModelSource
from rlhf_lightning.models.precision import float32_arithmetic
from rlhf_lightning.training.callbacks import PairScores, ResponseScores
from rlhf_lightning.training.checks import check_finite
from rlhf_lightning.training.measures import Measured, means
from rlhf_lightning.training.optimization import Schedule
from rlhf_lightning.training.policy_module import PolicyModule


class SFT(PolicyModule):
    """SFT: a causal language model trained with cross-entropy on the assistant's turns of conversations.

    The loss is the mean over conversations of the mean negative log-likelihood per learned token (see `SFTDataModule`),
    EOS tokens included, all other turns excluded: every conversation counts the same, whatever its length and its
    batch. Of preference pairs the chosen response is learned; rejected ones are read by `predict` alone.

    Args:
        backbone: Model to start from: hub name, directory (whole, or LoRA adapters, which are merged) or GGUF file of
            any causal language model, or `builtin:tiny`.
        optimizer: Any torch optimizer with its arguments, which has torch's defaults for the rest of them; Adam with
            learning rate 1e-5 when none is named.
        lr_scheduler_type: Learning rate after the warm-up.
    """

    rows_per_pair = 1
    data_kinds = ("pairs", "conversations")
    shown = ("loss", "token_accuracy")

    def __init__(
        self,
        backbone: ModelSource,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-5),
        lr_scheduler_type: Schedule = "cosine",
        **shared: Any,
    ) -> None:
        super().__init__(backbone, optimizer=optimizer, lr_scheduler_type=lr_scheduler_type, **shared)
        self.train_metrics = nn.ModuleDict(means("loss", "lengths/chosen"))
        self.val_metrics, self.test_metrics = _evaluation_metrics(), _evaluation_metrics()
        self.throughput = TokensPerSecond()

    def forward(self, batch: PreferenceBatch | SFTBatch) -> ResponseLogprobs:
        """Log-probabilities of what is learned of B conversations."""
        return self.policy(*batch.chosen)

    def training_step(self, batch: PreferenceBatch | SFTBatch, batch_idx: int) -> Tensor:
        responses = self(batch)
        losses = -responses.averages
        check_finite(self, batch, losses)
        measured = Measured({"loss": losses.detach(), "lengths/chosen": responses.lengths.float()})
        measured.feed(self.train_metrics)
        return batch.weight * losses.mean()

    def trial_loss(self, batch: PreferenceBatch | SFTBatch) -> Tensor:
        """The mean loss of a batch, of which nothing is logged."""
        return -self(batch).averages.mean()

    def predict_step(self, batch: PreferenceBatch | SFTBatch, batch_idx: int) -> PairScores | ResponseScores:
        """Log-probabilities of both responses of each pair, or of what is learned of each conversation."""
        with float32_arithmetic(self.policy):
            responses = self.policy(batch.input_ids, batch.attention_mask, batch.response_mask)
        if isinstance(batch, SFTBatch):
            return ResponseScores(batch.index, responses.sums)
        return PairScores(batch.index, *responses.sums.chunk(2))

    def measure(self, batch: PreferenceBatch | SFTBatch, stage: Role) -> Measured:
        with float32_arithmetic(self.policy):
            states = self.policy.states(*batch.chosen)
            responses = self.policy.logprobs(states)
            most_likely = self.policy.most_likely(states)
        values: dict[str, Tensor | tuple[Tensor, ...]] = {
            "loss": -responses.averages,
            "token_accuracy": (most_likely == states.targets).float(),
            "lengths/chosen": responses.lengths.float(),
            "perplexity": (-responses.sums, responses.lengths),
        }
        return Measured(values, (responses.sums, responses.sums))


def _evaluation_metrics() -> nn.ModuleDict:
    ours = {"perplexity": Perplexity(), "conversations": PairCount()}
    return nn.ModuleDict(means("loss", "token_accuracy", "lengths/chosen") | ours)
