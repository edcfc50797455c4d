"""One pass over the longest rows before training begins: what does not fit fails now, not in the night."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.data.datamodules import ResponseDataModule
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.training.module import TrainedModule


class TrialStep(Callback):
    """Forward and backward over a batch of the longest training rows, on GPUs, before the first optimizer step.

    It leaves nothing behind: no gradient, no metric, and the random numbers as they were. Of the gradients only that of
    the first trained parameter is made, so that the whole graph is walked and no process waits for another.
    """

    def __init__(self, *, on_cpu: bool = False) -> None:
        self.on_cpu = on_cpu

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises `ConfigurationError` when the device's memory does not suffice."""
        device = pl_module.device
        if not (isinstance(pl_module, TrainedModule) and pl_module.learns_from_pairs):
            return
        if not isinstance(trainer.datamodule, ResponseDataModule) or (device.type == "cpu" and not self.on_cpu):
            return
        batch = trainer.strategy.batch_to_device(trainer.datamodule.longest_batch())
        first = next(parameter for parameter in pl_module.parameters() if parameter.requires_grad)
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                with trainer.precision_plugin.forward_context():
                    loss = pl_module.trial_loss(batch)
                torch.autograd.grad(loss, first)
        except torch.OutOfMemoryError as error:
            rows, tokens = batch.input_ids.shape
            raise ConfigurationError(
                f"data.batch_size: a batch of the longest rows ({rows} of {tokens} tokens) does not fit into the "
                f"memory of {device}; take a smaller data.batch_size and more trainer.accumulate_grad_batches, "
                "model.gradient_checkpointing true, or what `rlhf-lightning plan` says of these settings"
            ) from error
