"""Whether a run fits the machine that it is meant for, and if not, what would."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning.data.datamodules import ResponseDataModule
from rlhf_lightning.data.prompt_datamodule import PromptDataModule
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.planning.memory import (
    GPUS,
    RESERVE,
    Estimator,
    Footprint,
    Nearest,
    Run,
    Strategy,
    host_temporary,
    optimizer_bytes,
)
from rlhf_lightning.planning.sampling import sampling_of
from rlhf_lightning.planning.simulation import NotSimulated, Shape, count_weights
from rlhf_lightning.training.callbacks import ExportBest
from rlhf_lightning.training.module import TrainedModule
from rlhf_lightning.training.online import OnlineModule
from rlhf_lightning.training.policy_module import PolicyModule
from rlhf_lightning.training.ppo import PPO
from rlhf_lightning.training.references import HALVES
from rlhf_lightning.training.reward_model import RewardModel
from rlhf_lightning.training.samples import Samples

log = logging.getLogger(__name__)

_STRATEGIES: dict[str, tuple[Strategy, bool]] = {
    "zero1": ("zero1", False),
    "zero2": ("zero2", False),
    "zero2_offload": ("zero2", True),
}


@dataclass(frozen=True)
class Machine:
    """Where a run is meant to run."""

    name: str
    devices: int
    """On each machine."""
    machines: int
    device_memory: float
    """Bytes of each device; of a CPU run, the host's memory over its processes."""
    host_memory: float
    """Bytes of the host, as far as this process may use it; infinite where another machine is meant."""
    on_cpu: bool


@dataclass(frozen=True)
class Verdict:
    """Whether a footprint fits a machine."""

    fits: bool
    tight: bool
    """It fits only into what `RESERVE` leaves free."""
    lines: tuple[str, ...]
    """What does not fit, or is tight."""


def machine_of(settings: Any, *, gpu: str | None = None) -> Machine:
    """The machine of the Trainer's settings: this one, or one with a GPU by name (`H200`, `4xA10`, `80GB`).

    Raises `ConfigurationError` for an unknown name, and where a GPU is asked for that is not here.
    """
    count, name = _parsed_gpu(gpu)
    given = settings.devices
    devices = len(given) if isinstance(given, list | tuple) else int(given) if str(given).isdigit() else None
    if count is not None and devices not in (None, count):
        raise ConfigurationError(
            f"--gpu {gpu}: trainer.devices is {devices}; set it to {count}, or name {devices}x{name}"
        )
    devices = count or devices
    machines = settings.num_nodes
    if name is not None:
        return Machine(name, devices or 1, machines, _bytes_of(name), float("inf"), on_cpu=False)
    here = torch.cuda.is_available()
    if settings.accelerator in ("gpu", "cuda") and not here:
        raise ConfigurationError(
            f"plan: trainer.accelerator is {settings.accelerator}, and there is no GPU here; name the one that is "
            f"meant with --gpu, such as --gpu A100-80GB or --gpu 4xA10"
        )
    if here and settings.accelerator in ("auto", "gpu", "cuda"):
        properties = torch.cuda.get_device_properties(0)
        number = devices or torch.cuda.device_count()
        return Machine(properties.name, number, machines, properties.total_memory, host_memory(), on_cpu=False)
    if settings.accelerator not in ("auto", "cpu"):
        raise ConfigurationError(f"plan: trainer.accelerator {settings.accelerator} is not known here; use gpu or cpu")
    number = devices or 1
    return Machine("CPU", number, machines, host_memory() / number, host_memory(), on_cpu=True)


def rows_of_batch(data: ResponseDataModule, tokens: int, rows_per_pair: int) -> int:
    """Rows of `tokens` tokens that take at least as much as a training batch."""
    if data.tokens_per_batch is None:
        return data.batch_size * rows_per_pair
    return rows_per_pair * -(-data.tokens_per_batch // (tokens * rows_per_pair))


def _rows_of(module: TrainedModule, data: ResponseDataModule | PromptDataModule) -> tuple[int, int, int]:
    """Rows of a pass that trains and of one that does not, and their tokens; before data is read, the most it may have.

    A run that samples learns from `micro_batch_size` responses at a time; a pair of them is two rows.
    """
    read, hparams = data.rows.get("train"), module.hparams
    longest = None if read is None else int(read.lengths.max())
    if isinstance(module, OnlineModule):
        tokens = (data.max_prompt_length if longest is None else longest) + hparams.max_new_tokens
        each = 1 if isinstance(module, PPO) else 2
        return each * hparams.micro_batch_size, hparams.generation_micro_batch_size, tokens
    tokens, each = data.max_length if longest is None else longest, module.rows_per_pair
    return rows_of_batch(data, tokens, each), data.eval_batch_size * each, tokens


def run_of(
    module: TrainedModule,
    data: ResponseDataModule | PromptDataModule,
    settings: Any,
    callbacks: Sequence[Any],
    machine: Machine,
) -> Run:
    """What the memory of a run depends on, from its module, its data module and the Trainer's settings.

    Rows are as long as the longest of the training data once it is read, and as long as they may be before.
    Raises `ConfigurationError` for strategies whose copies of the weights are not known here.
    """
    hparams, online = module.hparams, isinstance(module, OnlineModule)
    strategy, offload = _strategy(settings.strategy, machine.devices * machine.machines)
    rows, eval_rows, tokens = _rows_of(module, data)
    states, temporary = optimizer_bytes(module.optimizer_factory, foreach=not machine.on_cpu)
    samples = [callback.max_new_tokens for callback in callbacks if isinstance(callback, Samples)]
    return Run(
        shape=Shape(
            policy=isinstance(module, PolicyModule),
            rows=rows,
            tokens=tokens,
            lora=module.lora,
            packed=hparams.layout in ("packed", "shared"),
            gradient_checkpointing=hparams.gradient_checkpointing and not hparams.get("freeze_backbone", False),
            trust_remote_code=hparams.trust_remote_code,
            head=module.head_settings if isinstance(module, RewardModel) else {},
            freeze_backbone=hparams.get("freeze_backbone", False),
        ),
        eval_rows=eval_rows,
        reference="none" if online else module.reference_kind,
        strategy=strategy,
        offload=offload,
        half=settings.precision in ("16-mixed", "bf16-mixed"),
        processes=machine.devices * machine.machines,
        processes_per_machine=machine.devices,
        accumulate=settings.accumulate_grad_batches,
        rows_per_pair=1 if online else module.rows_per_pair,
        on_cpu=machine.on_cpu,
        sample_tokens=tokens + max(samples) if samples else 0,
        optimizer_bytes=states,
        optimizer_temporary=temporary,
        host_temporary=host_temporary(module.optimizer_factory),
        float32_gradients=settings.precision == "bf16-mixed" and strategy == "zero2" and not offload,
        stored_as_halves=module.backbone_config.dtype == HALVES.get(settings.precision, torch.float32) != torch.float32,
        quantized=hparams.get("load_in_4bit", False),
        stores_reference=hparams.get("reference_update_steps") is not None,
        sampling=sampling_of(module) if isinstance(module, OnlineModule) else None,
    )


def refuse_what_cannot_fit(
    module: TrainedModule, data: LightningDataModule, settings: Any, callbacks: Sequence[Any]
) -> None:
    """Raise `ConfigurationError`, with the nearest settings that fit, for a run that cannot fit this machine.

    What cannot be counted is let pass with a line in the log, and at once what is small compared with a CPU's memory.
    """
    if not module.learns_from_pairs:
        return
    if not isinstance(data, ResponseDataModule):
        log.info("memory: not counted beforehand (the rows of a %s are not known)", type(data).__name__)
        return
    try:
        machine = machine_of(settings)
        run = run_of(module, data, settings, callbacks, machine)
        estimator = Estimator(module.backbone_config)
        if machine.on_cpu and _rough(module, run) + run.context < 0.25 * machine.device_memory:
            return
        verdict = judge(estimator.footprint(run), machine)
        if verdict.fits:
            return
        found = estimator.nearest(run, lambda other: judge(other, machine).fits)
    except (NotSimulated, ConfigurationError) as error:
        log.info("memory: not counted beforehand (%s)", error)
        return
    raise ConfigurationError(
        f"this run cannot fit: {'; '.join(verdict.lines)}; {advice(found)}, or --force to try all the same"
    )


def advice(found: Nearest | None) -> str:
    """The nearest settings that fit, in words."""
    if found is None:
        return "no change of settings was found that fits; take a larger device, or more of them"
    keys = " ".join(f"--{key} {value}" for key, value in found.keys.items())
    what = ", which trains adapters instead of all weights" if any("lora" in key for key in found.keys) else ""
    host = f", with {gb(found.footprint.host_peak)} of host memory" if found.footprint.host_peak else ""
    return f"it fits with {keys}{what}{host}"


def judge(footprint: Footprint, machine: Machine) -> Verdict:
    """Hold a footprint against a machine."""
    lines, fits, tight = [], True, False
    phase = max(footprint.phases, key=footprint.phases.__getitem__)
    needed, there = footprint.peak + footprint.context, machine.device_memory
    what = f"the {phase} needs {gb(needed)} of {gb(there)} on each {'process' if machine.on_cpu else 'device'}"
    if needed > there:
        fits = False
        lines.append(what)
    elif needed > (1 - RESERVE) * there:
        tight = True
        lines.append(f"{what}, which leaves less than {RESERVE:.0%} free")
    if footprint.host_peak > machine.host_memory:
        fits = False
        what = max(footprint.host, key=footprint.host.__getitem__)
        lines.append(f"the host needs {gb(footprint.host_peak)} of {gb(machine.host_memory)} ({what})")
    return Verdict(fits, tight, tuple(lines))


def disk(footprint: Footprint, callbacks: Sequence[Any]) -> float:
    """Bytes of checkpoints and exports that a run keeps; of a ModelCheckpoint that keeps all, one checkpoint.

    A checkpoint is written beside its predecessor before that goes.
    """
    kept = [callback.save_top_k for callback in callbacks if isinstance(callback, ModelCheckpoint)] or [1]
    exports = sum(isinstance(callback, ExportBest) for callback in callbacks)
    return (sum(map(abs, kept)) + 1) * footprint.checkpoint + exports * footprint.exported


def host_memory() -> float:
    """Bytes that this process may use: the machine's, or its container's."""
    there = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            there = min(there, float(Path(file).read_text()))
        except (OSError, ValueError):  # no such limit, or the word max
            continue
    return there


def gb(size: float) -> str:
    """A size in words, in units of 1e9 bytes."""
    if size >= 99.95e9:
        return f"{size / 1e9:.0f} GB"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _parsed_gpu(text: str | None) -> tuple[int | None, str | None]:
    """`4xA10` is four of them."""
    if text is None:
        return None, None
    number, x, name = text.partition("x")
    if x and number.isdigit():
        if int(number) < 1:
            raise ConfigurationError(f"--gpu {text}: no GPU at all; give a number of 1 or more")
        return int(number), name
    return None, text


def _bytes_of(name: str) -> float:
    if name in GPUS:
        return GPUS[name] * 2**30
    number = name.removesuffix("GB")
    try:
        size = float(number)
    except ValueError:
        size = 0.0
    if number == name or not 0 < size < float("inf"):
        raise ConfigurationError(f"--gpu {name}: not known; use one of {', '.join(GPUS)}, or a size such as 48GB")
    return size * 1e9


def _strategy(given: Any, processes: int) -> tuple[Strategy, bool]:
    name = given
    if isinstance(given, Mapping) or hasattr(given, "class_path"):
        path, arguments = given["class_path"].rpartition(".")[2], given.get("init_args") or {}
        if path == "ZeroStrategy":
            return "zero1" if arguments.get("stage", 2) == 1 else "zero2", bool(arguments.get("offload_optimizer"))
        name = {"DDPStrategy": "ddp", "SingleDeviceStrategy": "auto"}.get(path, path)
    if name in _STRATEGIES:
        return _STRATEGIES[name]
    if name in ("auto", "single_device") or str(name).startswith("ddp"):
        return ("ddp" if processes > 1 else "single"), False
    raise ConfigurationError(
        f"plan: trainer.strategy {name} is not known here; it knows auto, ddp, zero1, zero2 and zero2_offload"
    )


def _rough(module: TrainedModule, run: Run) -> float:
    """A generous guess at a run's bytes, without simulating it."""
    config = module.backbone_config.get_text_config()
    weights = count_weights(module.backbone_config, run.shape).total
    rows = max(run.shape.rows, run.eval_rows)
    per_token = 60 * config.hidden_size * (getattr(config, "num_hidden_layers", None) or 12) * 4
    attention = rows * run.shape.tokens**2 * 4
    return 24 * weights + rows * run.shape.tokens * per_token + attention + 3 * 1024 * config.vocab_size * 4
