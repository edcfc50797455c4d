"""Said before the first step: what a checkpoint and an export will take on the disk."""

from __future__ import annotations

import logging

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning.files.disks import free_bytes, size
from rlhf_lightning.planning.memory import optimizer_bytes
from rlhf_lightning.training.callbacks import ExportBest, exported_bytes
from rlhf_lightning.training.module import TrainedModule

log = logging.getLogger(__name__)


class RoomOnDisk(Callback):
    """Says before the first step what a checkpoint and an export will take, where less than that is free."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        trained = [each.numel() for each in pl_module.parameters() if each.requires_grad]
        adapters = bool(pl_module.hparams.get("lora"))
        weights = [each.numel() * each.element_size() for each in pl_module.parameters()]
        ours = isinstance(pl_module, TrainedModule)
        states = optimizer_bytes(pl_module.optimizer_factory, foreach=False)[0] if ours else 8.0
        checkpoint = (4 * sum(trained) if adapters else sum(weights)) + states * sum(trained)
        needs = [
            (each.dirpath, checkpoint, "a checkpoint")
            for each in trainer.checkpoint_callbacks
            if isinstance(each, ModelCheckpoint) and each.save_top_k != 0 and each.dirpath
        ]
        needs += [
            (each.directory, exported_bytes(pl_module, merge=each.merge), "the exported model")
            for each in trainer.callbacks
            if isinstance(each, ExportBest)
        ]
        for place, needed, what in needs:
            if (free := free_bytes(place)) < needed:
                log.warning(
                    "%s: %s will take about %s, and %s are free there; make room before it is written",
                    *(place, what, size(needed), size(free)),
                )
