"""The processes of one evaluation: each computes a share of the rows, and all of them get all results.

A row belongs to one process, whatever their number, so that none is left out or counted twice; a
`DistributedSampler`, which fills the shares up with copies, is not used.
"""

from __future__ import annotations

import logging
import os
import pickle
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rlhf_lightning.errors import ConfigurationError, UserError
from rlhf_lightning.files.locks import alone

Item = TypeVar("Item")
Result = TypeVar("Result")


class FailedElsewhere(UserError):
    """Another process has failed, and process 0 says why."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of an evaluation. All of them call the methods alike, in the same order.

    Args:
        rank: Its number, from 0. Process 0 writes the files.
        size: How many there are.
        device: Where it computes.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def each(self, items: Sequence[Item], compute: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
        """`compute(items)`: this process passes it the items rank, rank + size, ... alone, unless there are none.

        Returns the results of all items, in their order. Raises what `compute` raises, in whichever process.
        """
        own = items[self.rank :: self.size]
        shares = self.everywhere(lambda: list(compute(own)) if own else [])
        found: list[Any] = [None] * len(items)
        for rank, share in enumerate(shares):
            for place, result in zip(range(rank, len(items), self.size), share, strict=True):
                found[place] = result
        return found

    def once(self, compute: Callable[[], Result]) -> Result:
        """`compute()` of process 0, for all. Raises what it raises."""
        first: list[Any] = self.everywhere(lambda: compute() if self.rank == 0 else None)
        return first[0]

    def everywhere(self, compute: Callable[[], Result]) -> list[Result]:
        """`compute()` of every process, by their ranks; what it returns must be such as can be pickled.

        When one fails, so do all: it raises its own error, process 0 that error or a copy of it, the others
        `FailedElsewhere`. When one was killed or hangs, process 0 raises `ConfigurationError`.
        """
        if self.size == 1:
            return [compute()]
        outcome, error = None, None
        try:
            outcome = compute()
        except Exception as raised:
            error = raised
        outcomes: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(outcomes, (outcome, None if error is None else _portable(error)))
        except RuntimeError as closed:  # gloo's, when another one has ended, or is silent for half an hour
            lost = "one of the processes was killed, or hangs; run the same command again to resume"
            raise (ConfigurationError if self.rank == 0 else FailedElsewhere)(f"evaluate: {lost}") from closed
        if error is not None and (self.rank == 0 or not isinstance(error, UserError)):
            raise error
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise failure if self.rank == 0 else FailedElsewhere(f"process {rank}: {failure}")
        return [outcome for outcome, _ in outcomes]


ALONE = Ranks()


def launch(device: str, devices: int) -> Ranks:
    """This process among `devices` processes on this machine; the others are started, with the same command line.

    Under `torchrun`, which has started them, `devices` is 1 or as many. Each process is on a device of its own, unless
    the device is the CPU, which they share. They talk by gloo, on the CPU. Raises `ConfigurationError`.
    """
    started = dist.is_torchelastic_launched()
    if devices == 1 and not started:
        return Ranks(device=device)
    if started and devices not in (1, int(os.environ["LOCAL_WORLD_SIZE"])):
        raise ConfigurationError(
            f"devices: {devices}, but torchrun has started {os.environ['LOCAL_WORLD_SIZE']} processes; leave it out"
        )
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they chose another level when they were imported
    fabric = Fabric(
        accelerator=torch.device(device).type,
        devices=int(os.environ["LOCAL_WORLD_SIZE"]) if started else devices,
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]) if started else 1,
        strategy=DDPStrategy(process_group_backend="gloo"),
    )
    fabric.launch()
    return Ranks(fabric.global_rank, fabric.world_size, str(fabric.device))


def run_together(device: str, devices: int, lock: Path, busy: str, work: Callable[[Ranks], None]) -> None:
    """Do `work` in the processes of `launch`, of which the first one holds a lock; `busy`: see `alone`.

    Raises what `work` raises; a process that stops because another one failed is silent.
    """
    ranks = launch(device, devices)
    with suppress(FailedElsewhere), ExitStack() as locks:  # process 0 says why
        ranks.once(lambda: locks.enter_context(alone(lock, busy)))
        work(ranks)


def device_of(given: str | None) -> str:
    """The device that is asked for, else a GPU where there is one."""
    return given or ("cuda" if torch.cuda.is_available() else "cpu")


def check_devices(device: str, devices: int) -> None:
    """Raise `ConfigurationError` for a device that does not exist, or when there are fewer than asked for."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigurationError(f"device: {device!r} is not a device; use cpu, cuda or cuda:1") from error
    if found.type == "cpu" and found.index:
        raise ConfigurationError(f"device: {device!r} is not a device; use cpu")
    if found.type == "cpu":
        return
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device: no CUDA device is available; use cpu")
    if devices > 1 and found.index is not None:
        raise ConfigurationError(f"devices: {devices} processes cannot share one device ({device}); use cuda")
    if found.type == "cuda" and devices > torch.cuda.device_count():
        raise ConfigurationError(f"devices: {devices}, but there are {torch.cuda.device_count()} CUDA devices")


def _portable(error: Exception) -> Exception:
    """The error as another process can get it, with the place where it was raised unless a user can mend it."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, UserError):
        copy.add_note("".join(traceback.format_exception(error)))
    return copy
