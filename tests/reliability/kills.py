"""Runs and commands that are killed, begun again, and compared to the last bit with unbroken ones."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import yaml

from rlhf_lightning.data import token_cache
from rlhf_lightning.evaluation import store
from rlhf_lightning.files import seals
from rlhf_lightning.models import storage
from rlhf_lightning.tiny import builtin_texts, make_tiny_model
from rlhf_lightning.training import reference_cache
from tests.programs import Ended, forked, run
from tests.reliability.table import Line, Trial
from tests.training.conftest import write_pairs
from tests.training.killer import count_lines, signal_at_line
from tests.training.test_resume import CURVES, LOGGED, curve, digest, killer, last_checkpoint, write_config

LAST = ("--ckpt_path", "last")
PRECOMPUTED = {"lora": None, "precompute_reference": True, "reference_cache": "cache"}


class Command(NamedTuple):
    """What is killed, what goes on with it, and what it leaves, in words and numbers that can be compared."""

    arguments: Callable[[], Sequence[str]]
    outcome: Callable[[Path], dict[str, object]]
    goes_on: Sequence[str] = ()
    processes: int = 1
    prepare: Callable[[Path], None] | None = None
    """Puts into the directory what the command needs."""
    files: Sequence[ModuleType] = ()
    """Modules among whose lines it is killed."""


class Blow(NamedTuple):
    """How a command is broken off."""

    arguments: Sequence[str] = ()
    prepare: Callable[[], Callable[[], None] | None] = lambda: None
    """Makes what its process does first."""
    meanwhile: Callable[[Path, BaseProcess], None] | None = None
    codes: frozenset[int] = frozenset({-signal.SIGKILL})
    sooner: Callable[[], Blow] | None = None
    """For when the command has come to its end before."""


# ---- what is killed


@functools.cache
def home() -> Path:
    """A directory with a tiny model and a few pairs, for as long as this process lives."""
    directory = Path(tempfile.mkdtemp(prefix="kills-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    make_tiny_model(directory / "tiny", builtin_texts(), architecture="qwen2", initializer_range=0.2)
    (directory / "pairs").mkdir()
    write_pairs(directory / "pairs")
    forked(os.getpid)  # the first one waits until all is imported, which is no part of a run's time
    return directory


def fit(kind: str, *arguments: str, processes: int = 1, files: Sequence[ModuleType] = (), **model: object) -> Command:
    """Two epochs of a run, whose best model is exported."""

    def given() -> list[str]:
        name = hashlib.sha256(repr((kind, model)).encode()).hexdigest()[:16]
        config = write_config(home() / f"{name}.yaml", kind, home() / "tiny", home() / "pairs", **model)
        settings = ["--trainer.max_epochs", "2", "--data.cache_dir", str(home() / "tokens"), *arguments]
        exported = ["--trainer.callbacks+=ExportBest", "--trainer.callbacks.directory", "model"]
        return ["fit", "--config", config, *settings, *exported]

    return Command(given, functools.partial(trained, kind), LAST, processes, files=files)


def trained(kind: str, directory: Path) -> dict[str, object]:
    """The last checkpoint, the exported model, the logged numbers, what was printed, and the names of all files.

    A run that was broken off before its first checkpoint is begun again as another version of its logger.
    """
    versions = directory / "runs" / "run"
    (whole,) = {path.parents[1] for path in versions.glob("*/checkpoints/*.ckpt")}
    for version in versions.iterdir():
        if version != whole:
            shutil.rmtree(version)
    whole.rename(versions / "version_0")
    return {
        "checkpoint": digest(last_checkpoint(directory)),
        "model": contents(directory / "model", of_any_version),
        "curves": {name: curve(directory, name) for name in CURVES.get(kind, LOGGED)},
        "printed": of_any_version((directory / "out.txt").read_bytes()).decode(),
        "files": names(directory),
    }


def contents(directory: Path, read: Callable[[bytes], bytes] = bytes) -> dict[str, str]:
    """SHA-256 of each file, read by `read`."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(read(file.read_bytes())).hexdigest() for file in files}


def of_any_version(content: bytes) -> bytes:
    """Without the number of the logger's version, which an export names with its checkpoint."""
    return re.sub(rb"version_\d+", b"version_0", content)


def names(directory: Path) -> set[str]:
    """All files, without the time in the names of TensorBoard's and the random names of a cache's parts."""
    found = {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()}
    found = {re.sub(r"events\.out\.tfevents\..*", "events", name) for name in found}
    return {re.sub(r"[0-9a-f]{16}\.part$", "of the cache", name) for name in found}


EVALUATION = (
    *("--reward_model", "reward", "--policy", "after", "--reference", "before", "--pairs", "pairs/val.jsonl"),
    *("--prompts", "pairs/val.jsonl", "--samples", "2", "--max_new_tokens", "6", "--batch_size", "2"),
    *("--max_prompts", "4", "--out", "report"),
)


@functools.cache
def models() -> Path:
    """A directory with a reward model, and a policy before and after its training."""
    directory = home() / "models"
    directory.mkdir()
    for name, command in (("reward", "reward model"), ("after", "DPO, frozen reference")):
        shutil.copytree(unbroken(command).directory / "model", directory / name)
    shutil.copytree(home() / "tiny", directory / "before")
    return directory


def lay_out(directory: Path) -> None:
    for name in ("reward", "before", "after"):
        (directory / name).symlink_to(models() / name)
    (directory / "pairs").symlink_to(home() / "pairs")


def judged(directory: Path) -> dict[str, object]:
    """Numbers, scores, replies and the names of the files of a report."""
    report = directory / "report"
    numbers = json.loads((report / "metrics.json").read_text())
    numbers["provenance"].pop("seconds")
    texts = {name: (report / name).read_text() for name in ("samples.jsonl", "scores.jsonl")}
    kept = {file.name: set(file.read_text().splitlines()) for file in (report / "kept").glob("*.jsonl")}
    return {"numbers": numbers, "kept": kept, "files": names(report), **texts}


def checkpoint_of(name: str) -> str:
    return str(last_checkpoint(unbroken(name).directory))


def exported(directory: Path) -> dict[str, object]:
    return {"model": contents(directory / "out"), "files": names(directory)}


def prove_in_a_fork() -> None:
    """The process that proves an export is forked from one that has imported transformers, which takes seconds."""
    from rlhf_lightning.commands import export
    from rlhf_lightning.models import probe

    def proved(command: list[str], **_) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, forked(probe.main, *command[3:]), stderr="")

    export.subprocess = type("Forked", (), {"run": staticmethod(proved)})


def write_pipeline(directory: Path) -> None:
    """A reward model, a policy by DPO, and an evaluation of both."""
    stages = {}
    for name, kind in (("reward_model", "RewardModel"), ("dpo", "DPO")):
        file = write_config(directory / f"{name}.yaml", kind, home() / "tiny", home() / "pairs")
        config = yaml.safe_load(Path(file).read_text())
        config["trainer"] |= {"max_epochs": 2}
        config["trainer"]["logger"]["init_args"]["name"] = name
        config["trainer"]["callbacks"].append({"class_path": "ExportBest", "init_args": {"directory": f"{name}_model"}})
        config["data"]["init_args"]["cache_dir"] = str(home() / "tokens")
        Path(file).write_text(yaml.safe_dump(config))
        stages[name] = {"command": "fit", "config": f"{name}.yaml"}
    evaluation = {key.removeprefix("--"): value for key, value in zip(EVALUATION[::2], EVALUATION[1::2], strict=True)}
    evaluation |= {"reward_model": "reward_model_model", "policy": "dpo_model", "reference": str(home() / "tiny")}
    evaluation |= {"pairs": str(home() / "pairs" / "val.jsonl"), "prompts": str(home() / "pairs" / "val.jsonl")}
    numbers = {key: int(value) if value.isdigit() else value for key, value in evaluation.items()}
    (directory / "evaluation.yaml").write_text(yaml.safe_dump(numbers))
    stages["evaluation"] = {"command": "evaluate", "config": "evaluation.yaml"}
    (directory / "pipeline.yaml").write_text(yaml.safe_dump({"directory": "state", "stages": stages}, sort_keys=False))


def piped(directory: Path) -> dict[str, object]:
    """Both models, the report, and that all is done."""
    stages = json.loads((directory / "state" / "state.json").read_text())["stages"]
    found = {name: contents(directory / name) for name in ("reward_model_model", "dpo_model")}
    return found | judged(directory) | {"states": {name: record["done"] for name, record in stages.items()}}


TOKENS, REFERENCE = "reward model, tokens of its own", "DPO, reference of its own"
TWO, SANITY = "reward model, two processes", "reward model, sanity check"
COMMANDS = {
    "reward model": fit("RewardModel"),
    "SFT": fit("SFT", files=(storage, seals)),
    "DPO, frozen reference": fit("DPO", lora=None, reference="frozen"),
    "DPO, adapters": fit("DPO"),
    "DPO, precomputed reference": fit("DPO", **PRECOMPUTED),
    "PPO": fit("PPO"),
    TWO: fit("RewardModel", "--trainer.strategy", "ddp", "--trainer.devices", "2", processes=2),
    TOKENS: fit("RewardModel", "--data.cache_dir", "tokens", files=[token_cache]),
    REFERENCE: fit("DPO", files=[reference_cache], **PRECOMPUTED),
    SANITY: fit("RewardModel", "--trainer.num_sanity_val_steps", "2"),
    "evaluate": Command(lambda: ["evaluate", *EVALUATION], judged, prepare=lay_out, files=[store]),
    "export": Command(
        lambda: ["export", "--ckpt_path", checkpoint_of("SFT"), "--out", "out"], exported, files=(storage, seals)
    ),
    "pipeline": Command(lambda: ["pipeline", "--config", "pipeline.yaml"], piped, prepare=write_pipeline),
}


class Unbroken(NamedTuple):
    directory: Path
    outcome: dict[str, object]
    seconds: float
    lines: int
    """Of the command's `files`, that were run."""


@functools.cache
def unbroken(name: str) -> Unbroken:
    """A command that ran to its end."""
    directory = home() / "unbroken" / re.sub(r"\W+", "_", name)
    directory.mkdir(parents=True)
    command = COMMANDS[name]
    if command.prepare is not None:
        command.prepare(directory)
    arguments = command.arguments()
    began = time.monotonic()
    counted = home() / "lines"
    counted.unlink(missing_ok=True)
    count = functools.partial(count_lines, paths_of(command), str(counted)) if command.files else None
    ended = begin(command, directory, arguments, Blow(prepare=lambda: count))
    assert ended.code == 0, ended.error[-3000:]
    lines = int(counted.read_text()) if command.files else 0
    return Unbroken(directory, command.outcome(directory), time.monotonic() - began, lines)


def paths_of(command: Command) -> list[str]:
    return [module.__file__ for module in command.files]


def begin(command: Command, directory: Path, arguments: Sequence[str], blow: Blow) -> Ended:
    return run(
        directory,
        *arguments,
        *blow.arguments,
        processes=command.processes,
        prepare=functools.partial(prepared, arguments[0], blow.prepare()),
        meanwhile=None if blow.meanwhile is None else functools.partial(blow.meanwhile, directory),
    )


def prepared(command: str, prepare: Callable[[], None] | None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and a run rightly leaves it so
    if command == "export":
        prove_in_a_fork()
    if prepare is not None:
        prepare()


def survive(name: str, blows: Sequence[Blow], directory: Path) -> None:
    """Break a command off, again and again, then let it go on, and compare it with the unbroken one."""
    command, whole = COMMANDS[name], unbroken(name)
    if command.prepare is not None:
        command.prepare(directory)
    arguments, broken = list(command.arguments()), 0
    for blow in blows:
        ended = begin(command, directory, arguments, blow)
        if ended.code == 0:  # it was faster
            break
        assert ended.code in blow.codes, (ended.code, ended.error[-3000:])
        assert -signal.SIGKILL in blow.codes or "Traceback" not in ended.error, ended.error[-3000:]
        broken += 1
        if command.goes_on and broken == 1:
            arguments += command.goes_on
    if not broken:
        assert blows[0].sooner is not None, "it was not broken off"
        shutil.rmtree(directory)
        directory.mkdir()
        survive(name, [blows[0].sooner(), *blows[1:]], directory)
        return
    ended = begin(command, directory, arguments, Blow())
    assert ended.code == 0, ended.error[-3000:]
    found = command.outcome(directory)
    different = [key for key in whole.outcome if found[key] != whole.outcome[key]]
    assert found == whole.outcome, [(key, found[key], whole.outcome[key]) for key in different]


# ---- how it is killed


def at(moment: str, count: int) -> Blow:
    """At a training or validation batch, or half-way in a checkpoint file."""
    return Blow(killer(moment, count))


def in_file(name: str, part: float, number: int = signal.SIGKILL) -> Blow:
    """After a part of the lines that the unbroken one runs of the command's `files`."""
    code = -number if number == signal.SIGKILL else 128 + number

    def prepare() -> Callable[[], None]:
        line = 1 + int(part * unbroken(name).lines)
        return functools.partial(signal_at_line, paths_of(COMMANDS[name]), line, number)

    return Blow(prepare=prepare, codes=frozenset({code}))


Whom = Callable[[Path, int], Iterable[int]]
"""The processes that get a signal, of a command's directory and its first process."""


def itself(_: Path, process: int) -> list[int]:
    return [process]


def everyone(directory: Path, process: int) -> list[int]:
    """As the system does when a machine is shut down."""
    others = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and Path(os.readlink(entry / "cwd")) == directory.resolve():
                others.append(int(entry.name))
    return sorted({process, *others})


def its_stage(directory: Path, process: int) -> list[int]:
    """That of a pipeline, as the system does when it is short of memory; the pipeline where there is none."""
    return [each for each in everyone(directory, process) if each != process][:1] or [process]


def later(name: str, part: float, number: int = signal.SIGKILL, whom: Whom = everyone) -> Blow:
    """After a part of the time that the unbroken one takes, from outside."""

    def strike(directory: Path, process: BaseProcess) -> None:
        process.join(timeout=part * unbroken(name).seconds)
        for each in whom(directory, process.pid) if process.exitcode is None else ():
            with contextlib.suppress(ProcessLookupError):  # it has come to its end
                os.kill(each, number)

    sooner = functools.partial(later, name, part / 2, number, whom) if part > 0.01 else None
    return Blow(meanwhile=strike, codes=frozenset({-number, 128 + number}), sooner=sooner)


def trials(name: str, *chains: Sequence[Blow]) -> Callable[[], list[Trial]]:
    return lambda: [functools.partial(survive, name, chain) for chain in chains]


def drawn(name: str, count: int, of: Callable[[random.Random], Blow], length: int = 1) -> list[list[Blow]]:
    """Chains of blows, the same ones in every process."""
    draw = random.Random(f"{name} {count} {length}")
    return [[of(draw) for _ in range(length)] for _ in range(count)]


def anywhere(name: str, batches: int) -> Callable[[random.Random], Blow]:
    """Of a run: a training batch, a validation batch, a checkpoint, or any moment."""

    def draw(random_: random.Random) -> Blow:
        moment = random_.choice(["batch", "validation", "checkpoint", "any"])
        if moment == "any":
            return later(name, random_.uniform(0.1, 0.8))
        return at(
            moment, random_.randint(1, {"batch": batches, "validation": min(batches, 8), "checkpoint": 3}[moment])
        )

    return draw


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def told(name: str, count: int) -> list[list[Blow]]:
    """Signals to a run or command at any moment."""
    draw = random.Random(f"told {name}")
    return [[later(name, draw.uniform(0.1, 0.8), SIGNALS[number % 4], itself)] for number in range(count)]


def told_early(of: Callable[[signal.Signals], Sequence[str]], count: int = 4) -> list[list[Blow]]:
    """Signals before the first training batch."""
    return [[Blow(of(number), codes=frozenset({128 + number}))] for number in SIGNALS[:count]]


def at_validation(number: signal.Signals) -> list[str]:
    return [*killer(number.name, 1), "--trainer.callbacks.validating", "true"]


def line(what: str, name: str, *chains: Sequence[Blow]) -> Line:
    return Line("kill", what, trials(name, *chains), in_suite=what in IN_SUITE)


def told_while(name: str, part: float) -> list[list[Blow]]:
    """Signals within the command's `files`."""
    return [[in_file(name, part, number)] for number in SIGNALS]


def any_line(name: str) -> Callable[[random.Random], Blow]:
    return lambda draw: in_file(name, draw.uniform(0.0, 0.95))


def any_time(name: str, whom: Whom = everyone) -> Callable[[random.Random], Blow]:
    return lambda draw: later(name, draw.uniform(0.05, 0.85), whom=whom)


IN_SUITE = ("fit, reward model", "fit, while tokens are cached", "fit, told to end at any moment")
"""Of a trial's 3 to 6 s on one core; tests/training/test_resume.py kills the other kinds, too."""
FITS = ("reward model", "SFT", "DPO, frozen reference", "DPO, adapters", "DPO, precomputed reference", "PPO")

LINES: list[Line] = [
    *(line(f"fit, {name}", name, *drawn(name, 8, anywhere(name, 12))) for name in FITS),
    *(line(f"fit, {name}, up to three times", name, *drawn(name, 3, anywhere(name, 8), length=3)) for name in FITS),
    line("fit in two processes", TWO, *drawn(TWO, 4, anywhere(TWO, 5))),
    line("fit, while tokens are cached", TOKENS, *drawn(TOKENS, 8, any_line(TOKENS))),
    line("fit, while reference log-probs are computed", REFERENCE, *drawn(REFERENCE, 10, any_line(REFERENCE))),
    line("fit, while its model is exported", "SFT", *drawn("export", 10, any_line("SFT"))),
    line("fit, told to end at any moment", "reward model", *told("reward model", 12)),
    line("fit, told to end in the sanity check", SANITY, *told_early(at_validation)),
    line("fit, told to end in PPO's first validation", "PPO", *told_early(at_validation)),
    line("fit, told to end while reference log-probs are computed", REFERENCE, *told_while(REFERENCE, 0.5)),
    line("evaluate", "evaluate", *drawn("evaluate", 10, any_time("evaluate"))),
    line("evaluate, while it keeps what it has", "evaluate", *drawn("store", 8, any_line("evaluate"))),
    line("evaluate, told to end", "evaluate", *told("evaluate", 3)),
    line("export", "export", *drawn("export", 6, any_line("export"))),
    line("pipeline, all its processes", "pipeline", *drawn("all", 6, any_time("pipeline"))),
    line("pipeline, its own process", "pipeline", *drawn("own", 6, any_time("pipeline", itself))),
    line("pipeline, its stage", "pipeline", *drawn("stage", 6, any_time("pipeline", its_stage))),
    line("pipeline, told to end", "pipeline", *told("pipeline", 4)),
]
