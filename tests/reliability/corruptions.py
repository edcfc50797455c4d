"""Files that were damaged: each is refused in a line, or mended with the same numbers.

Every file that the program writes and reads again later is damaged in a copy of a directory in which all of them lie,
and then read by the command that reads it. That is survived where the command refuses it in one line that names the
file, or ends with the same numbers, to the last bit, as with the file as it was.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import io
import itertools
import json
import random
import re
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import yaml

from rlhf_lightning import DPO, RewardModel
from rlhf_lightning.commands.main import main
from rlhf_lightning.data.courtesy.make import make_rows
from rlhf_lightning.errors import UserError
from rlhf_lightning.models import probe
from rlhf_lightning.models.causal_lm import CausalLM, Lora
from rlhf_lightning.models.storage import replaced_model
from rlhf_lightning.tiny import builtin_texts, make_tiny_model, resolve_model
from rlhf_lightning.training.checkpoints import read_checkpoint
from tests import programs
from tests.programs import Ended, forked
from tests.reliability.table import Line, Trial

Damage = Callable[[bytes], bytes]
ERROR = "rlhf-lightning: error: "


class Reading(NamedTuple):
    """A command in a directory, and the numbers that come of it."""

    run: Callable[[Path], Ended]
    numbers: Callable[[Path, Ended], object]
    said_is_enough: bool = False
    """Of what people edit and what ends anywhere when its writer is killed: it is read, and named in a line."""


# ---- damage


def flipped(place: float) -> Damage:
    """One bit, of the byte at this share of the file."""

    def flip(content: bytes) -> bytes:
        at = int(place * (len(content) - 1))
        bit = random.Random(f"{place} {len(content)}").randrange(8)
        return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]

    return flip


def cut(share: float) -> Damage:
    return lambda content: content[: min(int(share * len(content)), len(content) - 1)]


def zeros(content: bytes) -> bytes:
    return bytes(len(content))


def empty(_: bytes) -> bytes:
    return b""


def replaced(other: str) -> Damage:
    """Another file of the workshop in its place."""
    return lambda _: (workshop() / other).read_bytes()


def of_another_reference(content: bytes) -> bytes:
    """A part of the reference cache that is whole, with other log-probs in it."""
    records = np.frombuffer(content[4:], dtype="V16,<f4,<f4").copy()
    records["f1"] += 3
    return zlib.crc32(records.tobytes()).to_bytes(4, "little") + records.tobytes()


FLIPS = [flipped(place) for place in (0.0, 0.13, 0.37, 0.5, 0.71, 0.9, 1.0)]
OTHERS = [cut(0.5), cut(1.0), empty, zeros]


def damaged(files: Iterable[str], damages: Sequence[Damage], reading: Reading) -> Iterator[Trial]:
    """A trial of each file and damage."""
    for file, damage in itertools.product(files, damages):
        yield functools.partial(survives, file, damage, reading)


def survives(file: str, damage: Damage, reading: Reading, place: Path) -> None:
    shutil.copytree(workshop(), place, dirs_exist_ok=True)
    path = place / file
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    ended = reading.run(place)
    named = path.name in ended.error or f"{Path(file).parent}" in ended.error
    where = f"{file}: {ended.code}, {ended.error[-2000:]}"
    if ended.code == 2:
        assert ended.error.splitlines()[-1].startswith(ERROR), where
        assert named, where
    else:
        assert ended.code == 0, where
        assert (reading.said_is_enough and named) or reading.numbers(place, ended) == undamaged(reading), where


@functools.cache
def undamaged(reading: Reading) -> object:
    """The numbers of a command in the workshop as it is."""
    with tempfile.TemporaryDirectory(prefix="reliability-") as directory:
        place = Path(directory)
        shutil.copytree(workshop(), place, dirs_exist_ok=True)
        ended = reading.run(place)
        assert ended.code == 0, ended.error[-3000:]
        return reading.numbers(place, ended)


# ---- what is damaged


@functools.cache
def workshop() -> Path:
    """A directory with a model, runs of it with all that they write, an evaluation and a pipeline; made once."""
    directory = Path(tempfile.mkdtemp(prefix="reliability-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    for split, count in (("train", 6), ("val", 5), ("test", 4)):
        rows = "".join(json.dumps(row) + "\n" for row in make_rows(split if split != "test" else "val")[:count])
        (directory / "pairs").mkdir(exist_ok=True)
        (directory / "pairs" / f"{split}.jsonl").write_text(rows)
    (directory / "models").mkdir()
    for name, seed in (("base", 0), ("other", 1)):
        with replaced_model(directory / "models" / name) as made:
            make_tiny_model(made, builtin_texts(), hidden_size=16, layers=1, initializer_range=0.2, seed=seed)
    with replaced_model(directory / "models" / "adapters") as made:
        shutil.copy(directory / "models" / "base" / "tokenizer.json", made)
        CausalLM.from_pretrained(str(directory / "models" / "base"), lora=Lora(r=2)).save_pretrained(made, merge=False)
    for kind in ("RewardModel", "DPO", "PPO"):
        (directory / f"{kind}.yaml").write_text(yaml.safe_dump(settings(kind)))
    for kind in ("RewardModel", "DPO"):
        ended = program(directory, "fit", "--config", f"{kind}.yaml")
        assert ended.code == 0, ended.error
    ended = program(directory, *EVALUATE)
    assert ended.code == 0, ended.error
    return directory


def settings(kind: str) -> dict:
    """A run of two epochs of three steps, of which each epoch's checkpoint stays."""
    saved = {"filename": "{step}", "every_n_epochs": 1, "save_top_k": -1, "auto_insert_metric_name": False}
    saved |= {"enable_version_counter": False}
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    trainer["logger"] = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": kind}}
    trainer["callbacks"] = [{"class_path": "ModelCheckpoint", "init_args": saved}]
    trainer |= {"enable_progress_bar": False}
    model = {"backbone": "models/base", "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    data = {"train": "pairs", "batch_size": 2}
    if kind == "PPO":
        model |= {"reward_model": "models/RewardModel", "max_new_tokens": 3, "num_ppo_epochs": 1, "num_mini_batches": 1}
        del model["warmup_ratio"]
        trainer |= {"max_epochs": 1, "limit_train_batches": 1}
    else:
        export = {"class_path": "ExportBest", "init_args": {"directory": f"models/{kind}"}}
        trainer["callbacks"].append(export)
        data["cache_dir"] = "tokens"
    if kind == "DPO":
        model |= {"precompute_reference": True, "reference_cache": "references"}
    kind_of_data = "PromptDataModule" if kind == "PPO" else "PreferenceDataModule"
    run = {"seed_everything": 1, "trainer": trainer, "model": {"class_path": kind, "init_args": model}}
    return run | {"data": {"class_path": kind_of_data, "init_args": data}}


@functools.cache
def two_stages() -> Path:
    """A directory in which a pipeline has run; made once."""
    from tests.test_pipeline import write_two_stages

    directory = workshop() / "pipeline"
    directory.mkdir()
    with contextlib.chdir(directory):
        write_two_stages()
    ended = programs.run(directory, *PIPELINE)
    assert ended.code == 0, ended.error
    return directory


def below(directory: str, pattern: str = "*") -> list[str]:
    """Files of the workshop, but for locks."""
    files = sorted((workshop() / directory).rglob(pattern))
    return [str(file.relative_to(workshop())) for file in files if file.is_file() and not file.name.endswith("lock")]


# ---- what reads it


def program(place: Path, *arguments: str) -> Ended:
    """Run the program in a directory, in this process; what it raises is no line."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.chdir(place), contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), quick_proof():
        code = main(list(arguments))
    return Ended(code, out.getvalue(), error.getvalue())


def quick_proof() -> contextlib.AbstractContextManager:
    """The process that proves an exported directory is forked, from one that has imported what it needs."""
    really = subprocess.run

    def run(command: list[str], *arguments, **named) -> subprocess.CompletedProcess:
        if "rlhf_lightning.models.probe" not in command:
            return really(command, *arguments, **named)
        return subprocess.CompletedProcess(command, forked(probe.main, *command[3:]), stderr="")

    return mock.patch("subprocess.run", run)


def digest(weights: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        total.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def trained(place: Path, ended: Ended) -> tuple[str, str]:
    """The weights of the last checkpoint that was written, and the table of what they measure."""
    last = max((place / "runs").rglob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    return digest(read_checkpoint(last)["state_dict"]), ended.out


def fit(kind: str, *arguments: str, **named) -> Reading:
    return Reading(lambda place: program(place, "fit", "--config", f"{kind}.yaml", *arguments), trained, **named)


def printed(place: Path, ended: Ended) -> str:
    return ended.out


def predicted(place: Path, ended: Ended) -> bytes:
    return next((place / "runs").rglob("predictions.jsonl")).read_bytes()


def exported(place: Path, ended: Ended) -> dict[str, bytes]:
    files = (file for file in (place / "exported").iterdir() if file.name not in ("README.md", "rlhf_lightning.json"))
    return {file.name: file.read_bytes() for file in files}


def evaluated(place: Path, ended: Ended) -> list[object]:
    """All that an evaluation writes but for where its numbers come from, which says how long it took."""
    out = place / "report"
    numbers = json.loads((out / "metrics.json").read_text())
    del numbers["provenance"]
    return [numbers, (out / "scores.jsonl").read_bytes(), (out / "samples.jsonl").read_bytes()]


def staged(place: Path, ended: Ended) -> list[object]:
    """What the stages wrote, and what is said of them in the end."""
    models = [place / "pipeline" / "models" / name / "config.json" for name in ("first", "second")]
    said = re.sub(r"version_\d+", "version", ended.out[ended.out.index("== first") :])  # a stage that is run again
    return [said, *(model.read_bytes() for model in models)]


def loaded(kind: type) -> Reading:
    """From Python."""

    def run(place: Path) -> Ended:
        with contextlib.chdir(place):
            try:
                module = kind.load_from_checkpoint(FIRST[kind.__name__], map_location="cpu")
            except UserError as error:
                return Ended(2, "", f"{ERROR}{error}")
        return Ended(0, digest(module.state_dict()), "")

    return Reading(run, printed)


def resolved(place: Path) -> Ended:
    """The built-in model, from a cache in which it is damaged."""
    error = io.StringIO()
    with mock.patch.dict("os.environ", {"XDG_CACHE_HOME": str(place / "cache")}), contextlib.redirect_stderr(error):
        directory = Path(resolve_model("builtin:tiny"))
    return Ended(0, json.dumps({file.name: digest_of(file) for file in sorted(directory.iterdir())}), "")


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


FIRST, LAST = (
    {kind: f"runs/{kind}/version_0/checkpoints/{step}.ckpt" for kind in ("RewardModel", "DPO")} for step in (3, 6)
)
EVALUATE = ["evaluate", "--reward_model", "models/RewardModel", "--policy", "models/DPO", "--reference", "models/base"]
EVALUATE += ["--pairs", "pairs/val.jsonl", "--prompts", "pairs/val.jsonl", "--samples", "1", "--max_new_tokens", "3"]
EVALUATE += ["--device", "cpu", "--out", "report"]
PIPELINE = ["pipeline", "--config", "pipeline.yaml"]

GO_ON = fit("RewardModel", "--ckpt_path", FIRST["RewardModel"])
GO_ON_WITH_LAST = fit("RewardModel", "--ckpt_path", "last", "--trainer.max_epochs", "3")
ANEW, ANEW_DPO = fit("RewardModel"), fit("DPO")
WITH_REFERENCE = fit("DPO", "--model.reference", "models/other")
WITH_REWARD = fit("PPO")
TEST, PREDICT = (
    Reading(
        lambda place, command=command: program(
            place, command, "--config", "RewardModel.yaml", "--ckpt_path", FIRST["RewardModel"]
        ),
        numbers,
    )
    for command, numbers in (("test", printed), ("predict", predicted))
)
EXPORT = Reading(lambda place: program(place, "export", "--ckpt_path", FIRST["DPO"], "--out", "exported"), exported)
JUDGE = Reading(lambda place: program(place, *EVALUATE), evaluated)
JUDGE_ANEW = Reading(lambda place: shutil.rmtree(place / "report") or program(place, *EVALUATE), evaluated)
JUDGE_CHECKPOINT = Reading(lambda place: program(place, *EVALUATE, "--reward_model", FIRST["RewardModel"]), evaluated)
JUDGE_ADAPTERS = Reading(lambda place: program(place, *EVALUATE, "--policy", "models/adapters"), evaluated)
DRAW_CURVES = Reading(lambda place: program(place, *EVALUATE, "--runs", "[runs/DPO]"), evaluated, said_is_enough=True)
WITH_CONFIG = Reading(lambda place: program(place, "fit", "--config", CONFIG), trained, said_is_enough=True)
CONFIG = "runs/RewardModel/version_0/config.yaml"
STAGES = Reading(lambda place: programs.run(place / "pipeline", *PIPELINE), staged)
BUILTIN = Reading(resolved, printed)


# ---- the trials


def of_checkpoints() -> Iterator[Line]:
    first, last = FIRST["RewardModel"], LAST["RewardModel"]
    another_class = replaced(FIRST["DPO"])
    for what, file, damages, reading in (
        ("fit --ckpt_path FILE", first, [*FLIPS, *OTHERS, another_class], GO_ON),
        ("fit --ckpt_path last", last, [*FLIPS[2:5], *OTHERS], GO_ON_WITH_LAST),
        ("test", first, [*FLIPS[1:4], *OTHERS, another_class], TEST),
        ("predict", first, [*FLIPS[2:5], cut(0.5), empty], PREDICT),
        ("export", FIRST["DPO"], [*FLIPS[2:6], *OTHERS], EXPORT),
        ("evaluate", first, [*FLIPS[2:5], cut(0.5), zeros], JUDGE_CHECKPOINT),
        ("RewardModel.load_from_checkpoint", first, [*FLIPS[1:5], cut(0.5)], loaded(RewardModel)),
        ("DPO.load_from_checkpoint", FIRST["DPO"], [*FLIPS[3:6], cut(0.5)], loaded(DPO)),
    ):
        yield line(f"checkpoint, {what}", lambda f=file, d=damages, r=reading: damaged([f], d, r))


def of_models() -> Iterator[Line]:
    some = [flipped(0.4), flipped(0.8), cut(0.5), empty]
    for what, directory, damages, reading in (
        ("fit as backbone", "models/base", some, ANEW),
        ("fit as reference", "models/other", [flipped(0.6), zeros], WITH_REFERENCE),
        ("fit as reward model", "models/RewardModel", [flipped(0.3), cut(1.0)], WITH_REWARD),
        ("evaluate as reward model", "models/RewardModel", [flipped(0.7)], JUDGE_ANEW),
        ("evaluate as policy", "models/DPO", [flipped(0.2)], JUDGE_ANEW),
        ("evaluate as adapters", "models/adapters", [flipped(0.55), cut(0.5)], JUDGE_ADAPTERS),
        ("export", "models/base", [flipped(0.9)], EXPORT),
    ):
        yield line(f"model, {what}", lambda m=directory, d=damages, r=reading: damaged(files_of_model(m), d, r))
    exchanged = {
        "models/base": ANEW,
        "models/other": WITH_REFERENCE,
        "models/RewardModel": WITH_REWARD,
        "models/DPO": JUDGE_ANEW,
    }

    def of_another() -> Iterator[Trial]:
        for directory, reading in exchanged.items():
            other = "models/other" if directory != "models/other" else "models/base"
            for name in ("model.safetensors", "config.json", "rlhf_lightning.json"):
                if (workshop() / directory / name).read_bytes() != (workshop() / other / name).read_bytes():
                    yield from damaged([f"{directory}/{name}"], [replaced(f"{other}/{name}")], reading)

    yield line("model, a file of another one", of_another)


def files_of_model(directory: str) -> list[str]:
    return [file for file in below(directory) if not file.endswith("README.md")]


def of_caches() -> Iterator[Line]:
    yield line("token cache", lambda: damaged(below("tokens"), [flipped(0.1), flipped(0.6), cut(0.7)], ANEW))
    yield line("token cache, empty and zeros", lambda: damaged(below("tokens", "*.arrow"), [empty, zeros], ANEW_DPO))
    yield line("reference cache", lambda: damaged(below("references"), [flipped(0.0), flipped(0.5), *OTHERS], ANEW_DPO))
    yield line(
        "reference cache, of another reference",
        lambda: damaged(below("references", "*.part"), [of_another_reference], ANEW_DPO),
    )
    yield line("built-in model", lambda: damaged(files_of_builtin(), [flipped(0.5), cut(0.5)], BUILTIN))


def files_of_builtin() -> list[str]:
    with mock.patch.dict("os.environ", {"XDG_CACHE_HOME": str(workshop() / "cache")}):
        return below(str(Path(resolve_model("builtin:tiny")).relative_to(workshop())))


def of_evaluations() -> Iterator[Line]:
    yield line("kept by evaluate", lambda: damaged(below("report/kept"), [*FLIPS[1:4], *OTHERS], JUDGE))
    written = [f"report/{name}" for name in ("metrics.json", "scores.jsonl", "samples.jsonl", "report.html")]
    yield line("written by evaluate", lambda: damaged(written, [flipped(0.5), empty], JUDGE))


def of_pipelines() -> Iterator[Line]:
    state = ["pipeline/state/state.json"]
    yield line("state.json", lambda: two_stages() and damaged(state, [*FLIPS, *OTHERS], STAGES))
    models = [f"pipeline/models/{name}/config.json" for name in ("first", "second")]
    yield line("model of a stage", lambda: two_stages() and damaged(models, [flipped(0.5), empty], STAGES))


def of_runs() -> Iterator[Line]:
    more = [flipped(place / 97) for place in range(5, 97, 13)]
    yield line("config.yaml as --config", lambda: damaged([CONFIG], [*FLIPS, *more, *OTHERS], WITH_CONFIG))
    logs = functools.partial(below, "runs/DPO", "events*")
    yield line("TensorBoard, evaluate --runs", lambda: damaged(logs(), [*FLIPS[1:6], *OTHERS], DRAW_CURVES))
    own = functools.partial(below, "runs/RewardModel", "events*")
    yield line("TensorBoard, run that goes on", lambda: damaged(own(), [flipped(0.5), *OTHERS], GO_ON))


IN_SUITE = (
    "checkpoint, fit --ckpt_path last",
    "model, fit as backbone",
    "token cache",
    "reference cache",
    "state.json",
)
"""The lines of which the suite tries a trial: each takes seconds, and the tests of each kind of file try more."""


def line(what: str, trials: Callable[[], Iterable[Trial]]) -> Line:
    return Line("corruption", what, lambda: list(trials()), in_suite=what in IN_SUITE)


LINES: list[Line] = [
    *of_checkpoints(),
    *of_models(),
    *of_caches(),
    *of_evaluations(),
    *of_pipelines(),
    *of_runs(),
]
