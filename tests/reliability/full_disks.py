"""Commands whose disk is full: a line that names the path, what stood before untouched, and a second try that works."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import pkgutil
import resource
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.programs import forked
from tests.reliability import commands
from tests.reliability.commands import LAST, Command, elsewhere, fit, leftovers, lone, made, run
from tests.reliability.table import Line, Trial

REASONS = ("larger than is allowed here", "no space is left on the disk", "are free there; make room")
STANDING = ("models/**/*", "exported/**/*", "runs/**/*.ckpt", "runs/**/config.yaml", "out/kept/**/*", "cache/**/*")
"""What a command with a full disk must leave as it was; more may be appended."""


class Full(NamedTuple):
    """When the disk is full: from the beginning, or from the `call`th call of `function` on.

    No file may then grow beyond `size` bytes, or beyond one byte less than the `rank`th largest of those that the
    command writes; any user can set such a limit.
    """

    rank: int = 0
    size: int | None = None
    function: str | None = None
    call: int = 1


class Small(NamedTuple):
    """A disk that holds a part of what the command writes."""

    part: float


def limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def limit_at(function: str, call: int, size: int) -> None:
    """Set the limit when a function, `package.module.Class.name`, is called for the `call`th time."""
    place, _, name = function.rpartition(".")
    owner = pkgutil.resolve_name(place)
    wrapped, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(wrapped)
    def limited(*arguments, **named):
        if next(calls) == call:
            limit(size)
        return wrapped(*arguments, **named)

    setattr(owner, name, limited)


def mount(directory: Path, size: int, *, again: bool = False) -> None:
    """Put a file system of so many bytes at a directory, which this process and its children alone see.

    With `again` it gets another size. Raises `OSError` where the system does not let this user do it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    nosuid, nodev, remount, private, recursive = 2, 4, 32, 1 << 18, 1 << 14
    new_namespace, new_user = 0x00020000, 0x10000000
    user, group = os.getuid(), os.getgid()
    calls: list[tuple[Callable, tuple]] = []
    if not again:
        calls = [
            (libc.unshare, (new_namespace | new_user,)),
            (libc.mount, (b"none", b"/", None, recursive | private, None)),
        ]
    flags = nosuid | nodev | (remount if again else 0)
    calls.append((libc.mount, (b"none", os.fsencode(directory), b"tmpfs", flags, f"size={size}".encode())))
    for function, arguments in calls:
        if function(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "mount is not permitted")
        if function is libc.unshare:
            for file, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
                Path("/proc/self", file).write_text(text)


@functools.cache
def mounting_is_permitted() -> bool:
    return forked(mount, Path("/mnt"), 1 << 20) == 0


def written(place: Path) -> list[int]:
    """The sizes of the files that a lone command wrote, the largest first, each size once."""
    written_at = {path.relative_to(place / "before"): path.stat().st_mtime_ns for path in (place / "before").rglob("*")}
    files = [path for path in (place / "after").rglob("*") if path.is_file()]
    new = [path for path in files if written_at.get(path.relative_to(place / "after")) != path.stat().st_mtime_ns]
    return sorted({file.stat().st_size for file in new}, reverse=True)


def on_disk(tree: Path) -> int:
    """Bytes that a tree takes in a file system of pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in tree.rglob("*") if path.is_file())


def _survive(directory: Path, place: Path, command: Command, again: tuple[str, ...], full: Full | Small) -> None:
    """Run a command while the disk is full, and once more, with the arguments `again` added, when it is not."""
    before, begin = place / "before", lambda: None
    if isinstance(full, Small):
        taken = on_disk(before)
        mount(directory, taken + int(full.part * (on_disk(place / "after") - taken)))
    else:
        size = written(place)[full.rank] - 1 if full.size is None else full.size
        begin = functools.partial(limit, size)
        if full.function is not None:
            begin = functools.partial(limit_at, full.function, full.call, size)
    shutil.copytree(before, directory, dirs_exist_ok=True)
    disturbed = run(directory, command.arguments, begin)
    check_refused(disturbed, directory, command.arguments)
    check_untouched(before, directory)
    if isinstance(full, Small):
        mount(directory, 1 << 30, again=True)
    ended = run(directory, (*command.arguments, *again))
    assert ended.code == 0, ended.said
    assert made(directory, command) == made(place / "after", command)
    if not command.makes:
        assert ended.table == commands.Ended(0, (place / "said.txt").read_text()).table
    assert not leftovers(directory), leftovers(directory)


def check_refused(ended: commands.Ended, directory: Path, given: Sequence[str]) -> None:
    """One line says that the disk is full, or that there is too little room, and names what could not be written."""
    assert ended.code > 0, f"exit code {ended.code}: {ended.said}"
    assert "Traceback" not in ended.said, ended.said
    assert len(ended.refusals) == 1, ended.said
    (line,) = ended.refusals
    assert line == ended.said.splitlines()[-1], ended.said
    assert any(reason in line for reason in REASONS), line
    parts = [part for part in line.removeprefix("rlhf-lightning: error: ").split(": ") if " " not in part]
    assert any("/" in part or part in given or (directory / part).exists() for part in parts), line


def check_untouched(before: Path, directory: Path) -> None:
    for pattern in STANDING:
        for file in before.glob(pattern):
            now = directory / file.relative_to(before)
            if file.is_file():
                assert now.is_file(), f"{now} is gone"
                assert now.read_bytes().startswith(file.read_bytes()), f"{now} was changed"


def trial(command: Command, full: Full | Small, *again: str) -> Trial:
    return lambda directory: elsewhere(_survive, directory, lone(command), command, again, full)


def trials(command: Command, *fulls: Full | Small) -> list[Trial]:
    """Of one command; those of small disks where they can be mounted."""
    return [trial(command, full) for full in fulls if isinstance(full, Full) or mounting_is_permitted()]


SAVE = "rlhf_lightning.training.checkpoints.WholeFileIO.save_checkpoint"
EXPORT_BEST = "rlhf_lightning.training.callbacks.replaced_model"
ADD = "rlhf_lightning.training.reference_cache.ReferenceCache.add"
TOKENIZE = "rlhf_lightning.data.tokenized.write_store"
PUT = "rlhf_lightning.commands.pipeline.runs.State.put"
STAGE = "rlhf_lightning.commands.main.end_with_pipeline"
LOG = "lightning.pytorch.loggers.tensorboard.TensorBoardLogger.log_metrics"
OTHER = ("--seed_everything", "7")


def fits() -> Sequence[Trial]:
    over = fit("reward_model", *OTHER, after=commands.REWARD_MODEL)
    return [
        *trials(commands.REWARD_MODEL, *map(Full, range(7)), Full(size=0), Full(size=0, function=TOKENIZE)),
        *trials(over, Full(), Full(size=0, function=EXPORT_BEST), Full(size=60_000, function=EXPORT_BEST)),
        *(trial(commands.REWARD_MODEL, Full(size=100_000, function=SAVE, call=call), *LAST) for call in (2, 3)),
        *trials(commands.REWARD_MODEL, Full(size=0, function=LOG, call=3)),
        *trials(commands.DPO, Full(), Full(size=0, function=ADD), Full(size=0, function=ADD, call=2)),
        *trials(commands.DPO, Full(size=1000, function=TOKENIZE, call=2), Full(size=0, function=EXPORT_BEST)),
        *trials(commands.PPO, Full(), Full(1), Full(size=0, function=SAVE, call=3), Full(size=0, function=EXPORT_BEST)),
        *trials(commands.REWARD_MODEL, *map(Small, (0.03, 0.2, 0.5, 0.8, 0.97))),
        *trials(over, Small(0.9)),
        *trials(commands.DPO, Small(0.4), Small(0.97)),
        *trials(commands.PPO, Small(0.3), Small(0.9)),
    ]


def others() -> Sequence[Trial]:
    over = commands.EXPORT._replace(after=commands.EXPORT)
    later = commands.EVALUATE._replace(arguments=(*commands.EVALUATE.arguments, "--pairs", "pairs/train.jsonl"))
    return [
        *trials(commands.EXPORT, Full(), Full(1), Full(2), Full(size=0), Small(0.5)),
        *trials(over, Full(size=100_000), Full(size=2000), Small(0.5)),
        *trials(commands.EVALUATE, *map(Full, range(6)), Full(size=0), *map(Small, (0.3, 0.9, 0.99))),
        *trials(later._replace(after=commands.EVALUATE), Full(1), Full(3), Full(4), Small(0.5)),
        *trials(commands.DOCTOR, *map(Full, range(4)), Full(size=0), Small(0.9), Small(0.98)),
        *trials(commands.PREDICT, Full(), Full(size=0), Small(0.5)),
        *trials(commands.TEST, Full(), Full(size=0)),
        *trials(commands.PLAN, Full(), Full(1), Full(size=0)),
    ]


def pipelines() -> Sequence[Trial]:
    fulls = [Full(), Full(1), Full(2), Full(3), *(Full(size=0, function=PUT, call=call) for call in (1, 2, 3, 4))]
    fulls += [Full(size=size, function=STAGE) for size in (0, 1000)]
    return trials(commands.PIPELINE, *fulls, *map(Small, (0.1, 0.5, 0.9, 0.99)))


LINES: list[Line] = [
    Line("full disk", "fit of a reward model, of DPO and of PPO", fits),
    Line("full disk", "export, evaluate, doctor, predict, test, plan", others),
    Line("full disk", "pipeline", pipelines, in_suite=False),
]
