"""What every LightningModule of the package logs in the same way: means over pairs, and metrics of a whole split."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from rlhf_lightning.metrics import TokensPerSecond
from rlhf_lightning.training.results import Results

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rlhf_lightning.training.module import TrainedModule

log = logging.getLogger(__name__)


def log_split(module: TrainedModule, stage: str, metrics: nn.ModuleDict, *, shown: tuple[str, ...]) -> None:
    """Log the metrics of a whole split as `stage/name`, some of them `shown` in the progress bar."""
    # Lightning's own step of a validation is one behind, or more; `Results` gives the loggers the right one.
    trainer = module.trainer
    ours = trainer.state.fn == TrainerFn.FITTING and any(isinstance(each, Results) for each in trainer.callbacks)
    for name, metric in metrics.items():
        module.log(
            f"{stage}/{name}",
            metric,
            on_step=False,
            on_epoch=True,
            prog_bar=name in shown,
            logger=False if ours else None,
        )


def begin_log(module: TrainedModule, metrics: nn.ModuleDict) -> None:
    """Forget what an earlier run of the module, or a search for a batch size or learning rate, has fed."""
    module.logged_step = 0
    for metric in metrics.values():
        metric.reset()


def log_training_means(
    module: TrainedModule,
    metrics: nn.ModuleDict,
    *,
    shown: dict[str, str],
    throughput: TokensPerSecond | None = None,
) -> dict[str, float] | None:
    """Every `log_every_n_steps` optimizer steps: means over all pairs, of all processes, since the last time.

    Logs `train/NAME` of the metrics, tokens per second where they were counted, peak memory on CUDA, and the learning
    rate, then begins anew. `shown` gives the metrics of a line in a log file, and their names in words. The module
    keeps `logged_step`, the step of its last log. Returns what was logged, or None when it is
    not the time, or there is nothing.
    """
    trainer = module.trainer
    step, every = trainer.global_step, trainer.log_every_n_steps
    if not metrics or every == 0 or step == module.logged_step or step % every:
        return None
    module.logged_step = step
    values = {f"train/{name}": metric.compute().item() for name, metric in metrics.items()}
    if throughput is not None and throughput.update_called:
        values["train/tokens_per_second"] = throughput.compute().item()
        values |= _peak_memory(module.device)
        throughput.reset()
    values["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
    let_monitor(module, values)
    for logger in module.loggers:
        logger.log_metrics(values, step=step)
    if "loss" in metrics:
        trainer.progress_bar_metrics.update({"loss": values["train/loss"]})
    if not sys.stderr.isatty():  # a log file shows no progress bar
        numbers = ", ".join(f"{words} {values[f'train/{name}']:.4f}" for name, words in shown.items())
        log.info("step %d/%d: %s", step, int(trainer.estimated_stepping_batches), numbers)
    for metric in metrics.values():
        metric.reset()
    return values


def let_monitor(module: TrainedModule, values: dict[str, float]) -> None:
    """Give numbers to the callbacks that monitor one, such as `EarlyStopping`, under their logged names."""
    module.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})


def let_monitor_means(module: TrainedModule, metrics: nn.ModuleDict) -> None:
    """The same of the means over all pairs since the last log; where there are none, those of the last log stay.

    For the times at which callbacks look: a validation, and the end of an epoch.
    """
    updated = {f"train/{name}": metric for name, metric in metrics.items() if metric.update_called}
    let_monitor(module, {name: metric.compute().item() for name, metric in updated.items()})


def log_parameters(model: nn.Module, config: PretrainedConfig, name: str) -> None:
    """Say what is trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
    log.info("model: %s (%s), %s parameters, %s trained", name, config.model_type, f"{total:,}", f"{trained:,}")


def _peak_memory(device: torch.device) -> dict[str, float]:
    """Most memory that tensors have had on a CUDA device, in GiB, under its logged name; nothing on a CPU."""
    return {"train/peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}
