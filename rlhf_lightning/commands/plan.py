"""The command `plan`: will a run fit, before it runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from rich.table import Table

from rlhf_lightning.commands import fit as program
from rlhf_lightning.commands.settings import Arguments, spare_inputs
from rlhf_lightning.data import datamodules
from rlhf_lightning.errors import ConfigurationError, UserError
from rlhf_lightning.files.disks import free_bytes, write_whole
from rlhf_lightning.planning.memory import GPUS, Estimator, Footprint, Nearest, Run
from rlhf_lightning.planning.planning import Machine, Verdict, advice, disk, gb, judge, machine_of, run_of
from rlhf_lightning.planning.simulation import NotSimulated
from rlhf_lightning.terminal import Terminal, say, silenced
from rlhf_lightning.training.module import TrainedModule
from rlhf_lightning.training.online import OnlineModule

_DESCRIPTION = f"""Will the run of these settings fit, before anything is loaded or written: bytes on each device and
on the host, by what takes them and when; checkpoints on the disk; tokens and optimizer steps; and where it does not
fit, the nearest settings that do. Weights are not needed, only the model's config.json. Data that can be read here is
read for its lengths; else rows count as max_length tokens, the worst case.

Exit code 0: it fits, 1: it does not, or only just, 2: the settings cannot be used.

GPUs: {", ".join(GPUS)}
"""


class _Planned(program.ParsedRun):
    """The module and the data module of a run, without its Trainer."""

    def instantiate_classes(self) -> None:
        trainer = self.config[self.subcommand].trainer
        self.trainer_settings = trainer.clone()
        trainer.logger = False
        if not isinstance(trainer.strategy, str):
            trainer.strategy = "auto"  # what it says is kept above; building it may need a package or a GPU
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self.callbacks = self._get(self.config_init, "trainer").callbacks or []


@dataclass(frozen=True)
class Steps:
    """How long a run is, as far as the data could be read."""

    kind: str
    """`pairs`, `conversations`, `responses` or `prompts`, each of which gets its responses."""
    pairs: int
    """How many of them."""
    longest: int
    tokens_per_pair: float
    per_step: int
    """Pairs of one optimizer step, or prompts of one rollout, over all processes."""
    steps: int | None
    """Optimizer steps of the whole run; None without an end."""


@dataclass(frozen=True)
class Plan:
    """All that `plan` prints."""

    machine: Machine
    run: Run
    footprint: Footprint
    verdict: Verdict
    other_activations: float
    """With gradient checkpointing where the run has none, and the other way round."""
    nearest: Nearest | None
    """The nearest run that fits; None when there is none, or none is needed."""
    disk: float
    disk_free: float | None
    """None where another machine is meant."""
    steps: Steps | None
    unread: str | None
    """Why the data was not read."""


def run(arguments: Sequence[str]) -> int:
    """Print the plan and return the exit code. Raises `UserError`."""
    parser = Arguments("plan", "--config FILE.yaml [--config OVERLAY.yaml] [--KEY VALUE ...]", _DESCRIPTION)
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="the GPU that is meant, when it is not this machine's: by name, or a size such as 48GB; 4xA10 is four of "
        "them in one machine",
    )
    parser.add_argument("--no_data", action="store_true", help="leave the data unread")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to a file, in bytes")
    own, settings = parser.parse_known_args(list(arguments))
    if not settings:
        raise ConfigurationError("plan: give the --config of a run")
    spare_inputs("plan", filter(None, [own.json]), settings)
    made = plan(settings, gpu=own.gpu, read_data=not own.no_data)
    if own.json:
        own.json.parent.mkdir(parents=True, exist_ok=True)
        numbers = replace(made, run=replace(made.run, sampling=None))  # without the configurations of other models
        write_whole(own.json, json.dumps(_plain(asdict(numbers)), indent=2) + "\n")
    _print(made, Terminal(soft_wrap=False))
    return 0 if _fits(made.verdict) else 1


def plan(settings: Sequence[str], *, gpu: str | None = None, read_data: bool = True) -> Plan:
    """Work the plan of a run out, from the arguments that `fit` would get. Raises `UserError`."""
    planned = program.run(["fit", *settings], program=_Planned)
    trainer, module, data = planned.trainer_settings, planned.model, planned.datamodule
    if not isinstance(module, TrainedModule):
        raise ConfigurationError(f"plan: counts this package's classes, and {type(module).__name__} is none of them")
    machine = machine_of(trainer, gpu=gpu)
    module.check_data(data)
    unread = _unread(data) if read_data else "--no_data"
    module.check_data(data)
    described = run_of(module, data, trainer, planned.callbacks, machine)
    estimator = Estimator(module.backbone_config)
    try:
        footprint = estimator.footprint(described)
        other = estimator.other_checkpointing(described)
        verdict = judge(footprint, machine)
        nearest = None
        if not _fits(verdict):
            nearest = estimator.nearest(described, lambda other: _fits(judge(other, machine)))
    except NotSimulated as error:
        raise ConfigurationError(
            f"plan: a {module.backbone_config.model_type} model cannot be run on tensors without contents ({error}), "
            "so that its memory cannot be counted beforehand; mixtures of experts are such"
        ) from error
    kept = disk(footprint, planned.callbacks)
    free = free_bytes(trainer.default_root_dir or ".") if gpu is None else None
    steps = None if unread else _steps(module, data, described, trainer)
    return Plan(machine, described, footprint, verdict, other, nearest, kept, free, steps, unread)


def _fits(verdict: Verdict) -> bool:
    """With room to spare."""
    return verdict.fits and not verdict.tight


def _unread(data: LightningDataModule) -> str | None:
    """Read the data; why that could not be done, or None."""
    try:
        with silenced(datamodules.__name__):
            data.setup("fit")
    except UserError as error:
        return " ".join(str(error).split())[:200]
    return None


def _steps(module: TrainedModule, data: Any, described: Run, trainer: Any) -> Steps:
    pairs = data.rows["train"]
    plan = data.training_plan(accumulate=described.accumulate, world_size=described.processes)
    if isinstance(module, OnlineModule):
        responses, new = module.hparams.num_generations, module.hparams.max_new_tokens
        per_step, tokens = data.batch_size * described.processes, responses * (float(pairs.lengths.mean()) + new)
        per_epoch = len(plan) * module.steps_per_rollout
    else:
        segments = pairs.segment_lengths
        rows = [segments[:, 0] + side for side in segments.T[1:]][: described.rows_per_pair]
        tokens, per_epoch = float(sum(row.mean() for row in rows)), math.ceil(len(plan) / described.accumulate)
        per_step = plan.step_rows if data.tokens_per_batch is None else math.ceil(plan.epoch_rows / per_epoch)
    ends = [trainer.max_epochs * per_epoch] if trainer.max_epochs not in (None, -1) else []
    ends += [trainer.max_steps] if trainer.max_steps != -1 else []
    return Steps(
        kind=pairs.kind,
        pairs=len(pairs),
        longest=int(pairs.lengths.max()),
        tokens_per_pair=tokens,
        per_step=per_step,
        steps=min(ends) if ends else None,
    )


def _print(made: Plan, console: Terminal) -> None:
    run, machine, footprint = made.run, made.machine, made.footprint
    weights = footprint.weights
    processes = f"{machine.devices} x {machine.name}"
    if machine.machines > 1:
        processes += f" in each of {machine.machines} machines"
    where = "process" if run.on_cpu else "device"
    say(f"model:       {weights.total:,} parameters, {weights.trained:,} of them trained")
    say(f"machine:     {processes}; {gb(machine.device_memory)} for each {where}")
    batch = f"{run.shape.rows} rows of {run.shape.tokens} tokens"
    known = "the longest of the training data" if made.steps else f"max_length; {made.unread}"
    say(f"batch:       {batch} ({known})")
    table = Table(title=f"memory of each {where}", title_justify="left")
    table.add_column("what")
    table.add_column("size", justify="right")
    for name, size in footprint.device.items():
        if size:
            table.add_row(name + _note(name, made), gb(size))
    table.add_section()
    for name, size in footprint.phases.items():
        table.add_row(f"in all, at the {name}" if name != "samples" else "in all, while samples are made", gb(size))
    context = "Python and torch" if run.on_cpu else "CUDA context and workspaces"
    table.add_row(f"{context} (assumed)", gb(footprint.context))
    console.print(table)
    processes_in_words = "" if machine.devices == 1 else f", for {machine.devices} processes"
    for name, size in footprint.host.items():
        say(f"host:        {gb(size)} {name}{processes_in_words}")
    free = "" if made.disk_free is None else f"; {gb(made.disk_free)} free"
    say(f"disk:        {gb(footprint.checkpoint)} a checkpoint, up to {gb(made.disk)} in all{free}")
    if made.steps:
        s = made.steps
        unit = "step" if run.sampling is None else "rollout"
        count = "without an end" if s.steps is None else f"{s.steps:,} optimizer steps"
        say(
            f"steps:       {s.pairs:,} {s.kind}, {s.per_step} a {unit}, {count}; "
            f"{s.per_step * s.tokens_per_pair:,.0f} tokens a {unit} {'on average' if unit == 'step' else 'at most'}"
        )
    for line in verdict_lines(made):
        say(line)


def verdict_lines(made: Plan) -> list[str]:
    """The verdict, and what to do."""
    verdict = made.verdict
    if _fits(verdict):
        host = made.footprint.host_peak
        given = f", given {gb(host)} of host memory" if host and math.isinf(made.machine.host_memory) else ""
        lines = [f"verdict:     fits{given}"]
    else:
        head = "fits, only just" if verdict.fits else "cannot" if made.nearest is None else "does not fit"
        lines = [f"verdict:     {head}: {'; '.join(verdict.lines)}"]
        lines.append(f"advice:      {advice(made.nearest)}")
    if made.disk_free is not None and made.disk > made.disk_free:
        lines.append(f"disk:        {gb(made.disk)} are needed and {gb(made.disk_free)} free; keep fewer checkpoints")
    return lines


def _note(name: str, made: Plan) -> str:
    if name != "activations":
        return ""
    other = "without" if made.run.shape.gradient_checkpointing else "with"
    return f" ({other} gradient checkpointing {gb(made.other_activations)})"


def _plain(value: Any) -> Any:
    """Values that JSON has: no infinity."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isinf(value) else value
