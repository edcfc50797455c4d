"""Going on with a run that was killed, as if it had not been: where it was, and every number that it held in memory."""

from __future__ import annotations

import logging
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from torchmetrics import Metric

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.training.checkpoints import fault_of, read_checkpoint

log = logging.getLogger(__name__)

LAST = "last"
"""The `ckpt_path` that stands for the newest whole checkpoint of a run."""

_KEY = "processes"


class ProcessStates(Callback):
    """Keeps in each checkpoint what each process holds beside weights and optimizer: the states of its random-number
    generators, and the numbers that have gone into the next line of the training log."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        own = {"random": _random_states(), "metrics": _training_states(pl_module)}
        own["logged_step"] = getattr(pl_module, "logged_step", 0)
        states = [own]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        checkpoint[_KEY] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get(_KEY)
        if states is not None and len(states) == trainer.world_size:
            self._loaded = states[trainer.global_rank]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As late as can be, so that nothing is drawn in between."""
        if self._loaded is None:
            return
        for name, states in self._loaded["metrics"].items():
            metric = pl_module.get_submodule(name)
            for state, value in states.items():
                setattr(metric, state, value.to(metric.device))
            metric._update_count = 1  # else compute() warns that nothing has been fed
        pl_module.logged_step = self._loaded["logged_step"]
        _set_random_states(self._loaded["random"])
        self._loaded = None


def _training_states(module: LightningModule) -> dict[str, dict[str, torch.Tensor]]:
    """States of this process's metrics that outlive a training step: all but those of whole splits."""
    return {
        name: {state: value.detach().cpu() for state, value in metric.metric_state.items()}
        for name, metric in module.named_modules()
        if isinstance(metric, Metric) and not name.startswith(("val_", "test_")) and metric.update_called
    }


def _random_states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if len(states["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def resolve_last(config: Namespace) -> None:
    """Put the newest whole checkpoint of a run in the place of `ckpt_path: last`; the run goes on in its directory.

    `config` holds the settings of a subcommand. Without any checkpoint the run begins anew. One that is not whole is
    named, and the one before it taken.
    """
    candidates = [path for directory in _directories(config) for path in directory.glob("*.ckpt")]
    found: list[tuple[int, float, Path]] = []
    for path in candidates:
        try:
            stored = read_checkpoint(path, weights=False)
        except ConfigurationError:
            log.warning("%s: is not whole (cannot be read); looking for the one before it", path)
            continue
        found.append((stored["global_step"], path.stat().st_mtime, path))
    config.ckpt_path = None
    for step, _, path in sorted(found, reverse=True):
        if (fault := fault_of(path)) is not None:
            log.warning("%s: is not whole (%s); looking for the one before it", path, fault)
            continue
        log.info("going on from %s (step %d)", path, step)
        config.ckpt_path = str(path)
        _go_on_in(config, path)
        return
    log.warning("ckpt_path: last: no checkpoint of this run yet; beginning at step 0")


def _directories(config: Namespace) -> list[Path]:
    """Where the checkpoints of a run lie: where its callbacks say, or in the newest version of its log that has any."""
    callbacks = config.trainer.callbacks or []
    arguments = [c.get("init_args") or {} for c in callbacks if str(c.get("class_path")).endswith("ModelCheckpoint")]
    if given := {a["dirpath"] for a in arguments if a.get("dirpath")}:
        return [Path(path) for path in sorted(given)]
    if (parent := _log_directory(config)) is None:
        raise ConfigurationError(
            "ckpt_path: last needs to know where the checkpoints are; give trainer.logger a save_dir and a name, or "
            "ModelCheckpoint a dirpath"
        )
    numbers = [
        int(match[1]) for path in parent.glob("version_*") if (match := re.fullmatch(r"version_(\d+)", path.name))
    ]
    for number in sorted(numbers, reverse=True):
        directory = parent / f"version_{number}" / "checkpoints"
        if any(directory.glob("*.ckpt")):
            return [directory]
    return []


def _log_directory(config: Namespace) -> Path | None:
    logger = config.trainer.logger
    arguments = logger.get("init_args") if isinstance(logger, Namespace) else None
    if not arguments or arguments.get("save_dir") is None:
        return None
    return Path(arguments["save_dir"]) / (arguments.get("name") or "")


def _go_on_in(config: Namespace, checkpoint: Path) -> None:
    """Let the logger write on in the directory of a checkpoint, so that it is one curve, and one best checkpoint."""
    match = re.fullmatch(r"version_(\d+)", checkpoint.parent.parent.name)
    parent = _log_directory(config)
    if match and parent is not None and checkpoint.parent.parent.parent == parent:
        config.trainer.logger.init_args["version"] = int(match[1])
