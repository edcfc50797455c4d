"""Numbers over all processes of a run."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor


def over_processes(trainer: Trainer, x: Tensor, how: Literal["sum", "min", "max"] = "sum") -> Tensor:
    """The sum, or the extreme, of a tensor over the processes, in each of them."""
    return x if trainer.world_size == 1 else trainer.strategy.reduce(x.clone(), reduce_op=how)


def mean_over_processes(trainer: Trainer, x: Tensor) -> float:
    """Mean of the entries of all processes, which need not have as many, in float64."""
    sums = torch.stack([x.double().sum(), torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)])
    total, count = over_processes(trainer, sums).tolist()
    return total / count


def gathered(trainer: Trainer, own: Any) -> list[Any]:
    """What each process has, in the order of the processes."""
    parts = [own] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(parts, own)
    return parts
