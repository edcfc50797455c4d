"""The first lines of a training: what is trained, and how much is computed for it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rlhf_lightning.data.datamodules import ResponseDataModule
from rlhf_lightning.data.statistics import layout_in_words

if TYPE_CHECKING:
    from rlhf_lightning.training.module import TrainedModule

log = logging.getLogger(__name__)


def say_what_is_trained(module: TrainedModule) -> None:
    """A line on the model, and one on the layout of its rows."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.trained_network.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
    name, kind = module.hparams.backbone, module.backbone_config.model_type
    log.info("model: %s (%s), %s parameters, %s trained", name, kind, f"{total:,}", f"{trained:,}")
    layout, trainer = module.layout, module.trainer
    data = trainer.datamodule
    if isinstance(data, ResponseDataModule) and "train" in data.rows:
        words = layout_in_words(layout, data.rows["train"], data.batch_size, trainer.accumulate_grad_batches)
    else:
        words = layout
    log.info("layout: %s", words)
