"""Small commands of the program, what each must have made in the end, and how they are run and compared."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from rlhf_lightning.data.courtesy.make import make_rows
from tests.programs import fork_stages, forked
from tests.test_configs import ROOT

QUICKSTART = ROOT / "configs" / "quickstart"
PAIRS = ("--data.train", "pairs/train.jsonl", "--data.val", "pairs/val.jsonl")
LAST = ("--ckpt_path", "last")


class Command(NamedTuple):
    """A command of the program, in a directory with pairs, a rule that scores them, and a cache of its own."""

    arguments: tuple[str, ...]
    makes: tuple[str, ...]
    """Patterns of the files that it must have made."""
    after: Command | None = None
    """What was done before in its directory."""


def fit(name: str, *arguments: str, after: Command | None = None) -> Command:
    """A run of six steps with two validations, and checkpoints after both, the better of which is exported."""
    settings = (
        *("fit", "--config", str(QUICKSTART / f"{name}.yaml"), *PAIRS, "--data.batch_size", "4"),
        *("--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"),
        *("--trainer.check_val_every_n_epoch", "1", "--model.backbone", "builtin:tiny"),
        *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename", "newest-{step}"),
        *("--trainer.callbacks.auto_insert_metric_name", "false"),
    )
    return Command((*settings, *arguments), (f"models/quickstart_{name}/*.safetensors",), after)


REWARD_MODEL = fit("reward_model")
DPO = fit("dpo", "--model.precompute_reference", "true", "--model.reference_cache", "references")
PPO = fit(
    *("ppo", "--model.reward_model", "rules:length", "--model.max_new_tokens", "4", "--model.num_ppo_epochs", "1"),
    *("--model.num_mini_batches", "1", "--model.micro_batch_size", "8"),
)
CHECKPOINT = "runs/quickstart_reward_model/version_0/checkpoints/newest-6.ckpt"
ON_PAIRS = ("--config", str(QUICKSTART / "reward_model.yaml"), *PAIRS)
OF_CHECKPOINT = (
    *(*ON_PAIRS, "--data.test", "pairs/val.jsonl", "--model.backbone", "builtin:tiny"),
    *("--trainer.enable_progress_bar", "false", "--ckpt_path", CHECKPOINT),
)
EXPORT = Command(("export", "--ckpt_path", CHECKPOINT, "--out", "exported"), ("exported/*.safetensors",), REWARD_MODEL)
EVALUATE = Command(
    (
        *("evaluate", "--reward_model", CHECKPOINT, "--held_out_reward_model", "rules:length"),
        *("--pairs", "pairs/val.jsonl", "--out", "out"),
    ),
    ("out/metrics.json", "out/samples.jsonl", "out/scores.jsonl", "out/report.*"),
    REWARD_MODEL,
)
DOCTOR = Command(("doctor", *ON_PAIRS, "--json", "found.json", "--html", "found.html"), ("found.json", "found.html"))
PREDICT = Command(
    ("predict", *OF_CHECKPOINT), ("runs/quickstart_reward_model/version_*/predictions.jsonl",), REWARD_MODEL
)
TEST = Command(("test", *OF_CHECKPOINT), (), REWARD_MODEL)
PLAN = Command(("plan", *ON_PAIRS, "--model.backbone", "builtin:tiny", "--json", "plan.json"), ("plan.json",))
PIPELINE = Command(("pipeline", "--config", "pipeline.yaml"), (*REWARD_MODEL.makes, *EVALUATE.makes))
_STAGES = {
    "reward_model": {
        "command": "fit",
        "config": str(QUICKSTART / "reward_model.yaml"),
        "set": {
            **{"data.train": "pairs/train.jsonl", "data.val": "pairs/val.jsonl", "data.batch_size": 4},
            **{"trainer.max_epochs": 2, "trainer.log_every_n_steps": 1},
        },
    },
    "evaluation": {
        "command": "evaluate",
        "config": "evaluate.yaml",
        "set": {"reward_model": "models/quickstart_reward_model", "pairs": "pairs/val.jsonl", "out": "out"},
    },
}


class Ended(NamedTuple):
    code: int
    said: str
    """Standard output and error, in their order."""

    @property
    def refusals(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("rlhf-lightning: error: ")]

    @property
    def table(self) -> list[str]:
        """The rows of the results table."""
        return [line for line in self.said.splitlines() if line.startswith("│")]


# ---- in a process of the tests' server, in which nothing runs beside it


class Running(NamedTuple):
    process: BaseProcess
    output: int

    def ended(self) -> Ended:
        with open(self.output, encoding="utf-8", errors="replace") as said:
            text = said.read()
        self.process.join()
        return Ended(self.process.exitcode, text)


def start(directory: Path, arguments: tuple[str, ...], begin: Callable[[], object] = lambda: None) -> Running:
    """Start the program in a fork of this process, which calls `begin` first.

    Its output comes through a pipe, so that it is read where no file can be written.
    """
    reader, writer = os.pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_program, args=(directory, arguments, begin, writer, reader)
    )
    process.start()
    os.close(writer)
    return Running(process, reader)


def _program(
    directory: Path, arguments: tuple[str, ...], begin: Callable[[], object], writer: int, reader: int
) -> None:
    os.close(reader)
    for stream in (1, 2):
        os.dup2(writer, stream)
    os.close(writer)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.chdir(directory)
    os.environ["XDG_CACHE_HOME"] = str(directory / "cache")
    tempfile.tempdir = str(directory / "tmp")
    from rlhf_lightning.commands.main import main

    fork_stages()  # so that what `begin` did holds for them
    begin()
    sys.exit(main(list(arguments)))


def run(directory: Path, arguments: tuple[str, ...], begin: Callable[[], object] = lambda: None) -> Ended:
    """Start the program, and wait for its end."""
    return start(directory, arguments, begin).ended()


def made(directory: Path, command: Command) -> dict[str, set[tuple[str, str]]]:
    """Names and hashes of what a command has made, by pattern, without what tells when and where it was made."""
    hashes = {}
    for pattern in command.makes:
        hashes[pattern] = {(path.name, hashlib.sha256(_content(path)).hexdigest()) for path in directory.glob(pattern)}
        assert hashes[pattern], f"{pattern} was not made"
    return hashes


def _content(file: Path) -> bytes:
    if file.name == "metrics.json":
        stored = json.loads(file.read_bytes())
        return json.dumps([stored["metrics"], stored["verdicts"]]).encode()
    if file.name == "plan.json":
        stored = json.loads(file.read_bytes())
        del stored["disk_free"]  # which is of the moment
        return json.dumps(stored).encode()
    if file.name.startswith("report."):
        return bytes(file.read_text(encoding="utf-8").rstrip().endswith(("</html>", "|")))
    return file.read_bytes()


def leftovers(directory: Path) -> list[Path]:
    """Half-made files and directories, and temporary ones."""
    return [*directory.rglob(".*.part*"), *(directory / "tmp").iterdir()]


def _make_lone(place: Path, command: Command, earlier: Path | None) -> None:
    """In `place`, the directories `before` and `after` a command that nothing disturbs, and what it said."""
    before, after = place / "before", place / "after"
    if earlier is None:
        for name in ("pairs", "tmp"):
            (before / name).mkdir(parents=True)
        for split, count in (("train", 12), ("val", 6)):
            rows = "".join(json.dumps(row) + "\n" for row in make_rows(split)[:count])
            (before / "pairs" / f"{split}.jsonl").write_text(rows)
        (before / "rules.py").write_text(
            "def length(prompts, replies):\n    return [len(reply) for reply in replies]\n"
        )
        (before / "evaluate.yaml").write_text("{title: Reliability, held_out_reward_model: 'rules:length'}")
        (before / "pipeline.yaml").write_text(json.dumps({"directory": "state", "stages": _STAGES}))
    else:
        shutil.copytree(earlier, before, symlinks=True)
    shutil.copytree(before, after)
    ended = run(after, command.arguments)
    (place / "said.txt").write_text(ended.said)
    assert ended.code == 0, ended.said


# ---- in the process of the tests


def elsewhere(function: Callable[..., None], directory: Path, *arguments: object) -> None:
    """Call a function, with a directory, in a process of its own; raises AssertionError with what it raises."""
    trace = directory.with_name(f"{directory.name}.trace.txt")
    assert forked(_traced, trace, function, directory, *arguments) == 0, trace.read_text()


def _traced(trace: Path, function: Callable[..., None], *arguments: object) -> None:
    try:
        function(*arguments)
    except BaseException:
        trace.write_text(traceback.format_exc())
        raise


@functools.cache
def lone(command: Command) -> Path:
    """Where a command was run alone (see `_make_lone`), once."""
    place = Path(_places().name) / str(len(list(Path(_places().name).iterdir())))
    place.mkdir()
    elsewhere(_make_lone, place, command, lone(command.after) / "after" if command.after else None)
    return place


@functools.cache
def _places() -> tempfile.TemporaryDirectory:
    """Removed when the tests end."""
    return tempfile.TemporaryDirectory(prefix="reliability-")
