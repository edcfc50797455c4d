"""Supervised fine-tuning: a policy that learns the chosen responses by heart, the usual start of DPO and PPO.

B pairs, T padded tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.data.roles import Role
from rlhf_lightning.metrics import PairCount, Perplexity, TokensPerSecond
from rlhf_lightning.models.causal_lm import ResponseLogprobs
from rlhf_lightning.models.objects import ModelSource
from rlhf_lightning.models.precision import float32_arithmetic
from rlhf_lightning.training.callbacks import PairScores
from rlhf_lightning.training.checks import check_finite
from rlhf_lightning.training.module import Measured, PolicyModule, means
from rlhf_lightning.training.optimization import Schedule


class SFT(PolicyModule):
    """SFT: a causal language model trained with cross-entropy on the chosen response of each preference pair.

    The loss is the mean over pairs of the mean negative log-likelihood per token of the chosen response, EOS token
    included, prompt excluded: every response counts the same, whatever its length and its batch. Rejected responses are
    read by `predict` alone.

    Args:
        backbone: Model to start from: hub name or directory of any causal language model, or `builtin:tiny`.
        optimizer: Any torch optimizer with its arguments, which has torch's defaults for the rest of them; Adam with
            learning rate 1e-5 when none is named.
        lr_scheduler_type: Learning rate after the warm-up.
    """

    rows_per_pair = 1
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

    def forward(self, batch: PreferenceBatch) -> ResponseLogprobs:
        """Log-probabilities of the B chosen responses."""
        return self.policy(*_chosen_rows(batch))

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        responses = self(batch)
        losses = -responses.averages
        check_finite(self, batch, losses)
        measured = Measured({"loss": losses.detach(), "lengths/chosen": responses.lengths.float()})
        measured.feed(self.train_metrics)
        return batch.weight * losses.mean()

    def trial_loss(self, batch: PreferenceBatch) -> Tensor:
        """The mean loss of a batch, of which nothing is logged."""
        return -self(batch).averages.mean()

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> PairScores:
        """Log-probabilities of both responses of each pair."""
        with float32_arithmetic(self.policy):
            responses = self.policy(batch.input_ids, batch.attention_mask, batch.response_mask)
        return PairScores(batch.index, *responses.sums.chunk(2))

    def measure(self, batch: PreferenceBatch, stage: Role) -> Measured:
        with float32_arithmetic(self.policy):
            states = self.policy.states(*_chosen_rows(batch))
            responses = self.policy.logprobs(states)
            most_likely = self.policy.most_likely(states)
        values: dict[str, Tensor | tuple[Tensor, ...]] = {
            "loss": -responses.averages,
            "token_accuracy": (most_likely == states.targets).float(),
            "lengths/chosen": responses.lengths.float(),
            "perplexity": (-responses.sums, responses.lengths),
        }
        return Measured(values, (responses.sums, responses.sums))


def _chosen_rows(batch: PreferenceBatch) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and response mask of the chosen rows, [B, T] each."""
    pairs = batch.pairs
    return batch.input_ids[:pairs], batch.attention_mask[:pairs], batch.response_mask[:pairs]


def _evaluation_metrics() -> nn.ModuleDict:
    ours = {"perplexity": Perplexity(), "pairs": PairCount()}
    return nn.ModuleDict(means("loss", "token_accuracy", "lengths/chosen") | ours)
