"""Two processes that write to one place."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from tests.reliability import commands
from tests.reliability.commands import LAST, Command, Ended, elsewhere, fit, leftovers, lone, made, start
from tests.reliability.table import Line, Trial

Delay = float | str
"""What the second of two processes waits for when the first begins: seconds, or files of a pattern."""
DELAYS = (0.0, 0.4)
CHECKPOINTS = "runs/*/version_0/checkpoints/*.ckpt"


def together(directory: Path, first: Command, second: Command, delay: Delay) -> list[Ended]:
    """What became of two commands that began at once, but for `delay`, in one directory."""
    barrier = multiprocessing.get_context("fork").Barrier(2)

    def later() -> None:
        barrier.wait()
        if isinstance(delay, float):
            time.sleep(delay)
        while isinstance(delay, str) and not any(directory.glob(delay)):
            time.sleep(0.01)

    running = [start(directory, first.arguments, barrier.wait), start(directory, second.arguments, later)]
    return [each.ended() for each in running]


def _survive(directory: Path, places: tuple[Path, Path], pair: tuple[Command, Command], delay: Delay) -> None:
    """Each command ends as if it had been alone, or is refused in a line; one of them at least is done."""
    shutil.copytree(places[0] / "before", directory, dirs_exist_ok=True)
    both = together(directory, *pair, delay)
    done = []
    for ended, command, place in zip(both, pair, places, strict=True):
        assert "Traceback" not in ended.said, ended.said
        if ended.code == 0:
            assert made(directory, command) == made(place / "after", command)
            done.append(command)
        else:
            assert ended.code == 2, ended.said
            assert len(ended.refusals) == 1, ended.said
            assert "another" in ended.refusals[0], ended.refusals
    assert done, [ended.said for ended in both]
    for file in (places[0] / "before").rglob("*.ckpt"):
        assert (directory / file.relative_to(places[0] / "before")).is_file(), f"{file} is gone"
    assert not leftovers(directory), leftovers(directory)


def trials(first: Command, second: Command | None = None, delays: Sequence[Delay] = DELAYS) -> list[Trial]:
    """Of two commands that find the same before them, or twice the same one."""
    pair = (first, second or first)

    def trial(delay: Delay) -> Trial:
        return lambda directory: elsewhere(_survive, directory, (lone(pair[0]), lone(pair[1])), pair, delay)

    return [trial(delay) for delay in delays]


def exported_to(directory: str, command: Command, monitor: str, mode: str) -> Command:
    """A run of the same name, whose export goes to another directory."""
    best = {"monitor": monitor, "mode": mode, "filename": "best-{step}", "auto_insert_metric_name": False}
    callbacks = [
        {"class_path": "ModelCheckpoint", "init_args": best},
        {"class_path": "ExportBest", "init_args": {"directory": directory}},
    ]
    arguments = (*command.arguments, "--trainer.callbacks", json.dumps(callbacks))
    return Command(arguments, (f"{directory}/*.safetensors",))


def fits() -> Sequence[Trial]:
    return [
        *trials(commands.REWARD_MODEL),
        *trials(commands.REWARD_MODEL, exported_to("models/another", commands.REWARD_MODEL, "val/auroc", "max")),
        *trials(commands.DPO, exported_to("models/another", commands.DPO, "val/loss", "min")),
        *trials(commands.REWARD_MODEL, commands.DPO),
        *trials(commands.REWARD_MODEL, fit("reward_model", *LAST), (0.0, CHECKPOINTS)),
        *trials(fit("reward_model", *LAST, after=commands.REWARD_MODEL)),
    ]


def others() -> Sequence[Trial]:
    return [
        *trials(commands.EXPORT),
        *trials(commands.EVALUATE),
        *trials(commands.PIPELINE),
        *trials(commands.DOCTOR, commands.REWARD_MODEL),
        *trials(commands.PREDICT),
    ]


LINES: list[Line] = [
    Line("race", "two fits: one name, one cache, one checkpoint", fits),
    Line("race", "two of export, evaluate, pipeline, predict; doctor and fit", others),
]
