"""What modules share whose network is a causal language model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.datamodules import chat_format_of
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.models.causal_lm import CausalLM, Lora, decoder, load_causal_config
from rlhf_lightning.models.four_bits import check_four_bits
from rlhf_lightning.models.objects import ModelSource
from rlhf_lightning.models.precision import halve_frozen
from rlhf_lightning.models.states import counts_from_padding
from rlhf_lightning.models.storage import pad_with
from rlhf_lightning.training.checkpoints import complete_adapters, store_adapters_alone
from rlhf_lightning.training.module import TrainedModule
from rlhf_lightning.training.references import HALVES, Reference, ReferenceKind


class PolicyModule(TrainedModule):
    """A `TrainedModule` whose network is a causal language model, all of it or its adapters trained.

    A class derived from it gives `training_step`, `trial_loss` and `measure`.

    Args:
        lora: Train low-rank adapters alone: `{r: 16, lora_alpha: 32, lora_dropout: 0, target_modules: all-linear}`.
        load_in_4bit: Hold the weights below the adapters in NF4 (QLoRA); needs bitsandbytes.
    """

    read_config = staticmethod(load_causal_config)

    policy: CausalLM
    """There once `configure_model` has run."""
    reference: Reference | None = None
    """What the policy is compared with, where its class has it so."""

    def __init__(
        self, backbone: ModelSource, lora: Lora | None = None, load_in_4bit: bool = False, **shared: Any
    ) -> None:
        super().__init__(backbone, **shared)
        if isinstance(lora, Lora):  # a checkpoint holds plain values
            self.save_hyperparameters({"lora": asdict(lora)})
        if not isinstance(lora, Lora | Mapping | None):
            raise ConfigurationError(f"model.lora: a {type(lora).__name__}; give Lora(r=16), or a dict of its keys")
        self.lora = None if lora is None else Lora(**self.hparams.lora)
        check_four_bits(backbone, load_in_4bit)
        self._batch_began = 0.0

    @property
    def trained_network(self) -> CausalLM:
        return self.policy

    @property
    def reference_kind(self) -> ReferenceKind:
        return "none" if self.reference is None else self.reference.kind

    def check_data(self, data: LightningDataModule | None) -> None:
        """Check the data's tokens against policy and reference. Raises `ConfigurationError` when they do not fit."""
        super().check_data(data)
        chat_format = chat_format_of(data)
        if chat_format is not None and self.reference is not None:
            self.reference.check_tokenizer(chat_format.tokenizer)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.reference is not None:
            self.reference.load(self.loading, self.trainer)

    def build_network(self) -> None:
        settings = self.hparams
        if self.reference is not None and not isinstance(self.backbone, str):
            self.reference.load(self.loading)  # before the object is trained, or gets adapters
        self.policy = CausalLM.from_pretrained(
            self.backbone,
            lora=self.lora,
            load_in_4bit=settings.load_in_4bit,
            gradient_checkpointing=settings.gradient_checkpointing,
            **self.loading,
        )
        if self._trainer is not None:
            halve_frozen(self.policy, HALVES.get(str(self.trainer.precision)))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._batch_began = time.perf_counter()
        if self.reference is not None:
            self.reference.follow(self.policy, self.trainer.global_step)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.throughput is not None:
            tokens = batch.attention_mask[: self.rows_per_pair * len(batch.index)].sum()
            self.throughput.update(tokens, time.perf_counter() - self._batch_began)
        self.log_numbers()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        store_adapters_alone(self, checkpoint)
        if self.reference is not None:
            self.reference.store(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.reference is not None:
            self.reference.restore(checkpoint)
        super().on_load_checkpoint(checkpoint)
        complete_adapters(self, checkpoint)

    def save_network(self, directory: Path, *, merge: bool) -> None:
        self.policy.save_pretrained(directory, merge=merge)

    def save_chat_format(self, chat_format: ChatFormat, directory: Path) -> None:
        super().save_chat_format(chat_format, directory)
        if not counts_from_padding(decoder(self.policy.model)):
            pad_with(directory, chat_format.pad_id)
