"""A full disk is one line with the path, in every command, and what is there stays; by limits that any user can set."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import Namespace

from rlhf_lightning.commands.fit import SaveConfig
from rlhf_lightning.commands.main import main
from rlhf_lightning.commands.pipeline.processes import run_program
from rlhf_lightning.commands.quiet import quieten
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.files import disks
from rlhf_lightning.files.disks import check_room, full_disk, named_full_disk, size, write_whole, writing_to
from tests.programs import fork_stages, forked
from tests.test_configs import ROOT

FIT = [
    *("fit", "--config", str(ROOT / "configs" / "quickstart" / "reward_model.yaml")),
    *("--data.limit", "16", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
]


def wrapped(error: Exception) -> Exception:
    outer = RuntimeError("saving failed")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota"),
        (OSError(errno.EFBIG, "File too large"), "larger"),
        (wrapped(OSError(errno.ENOSPC, "x")), "no space"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "no space"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 27648 vs 27542"), "no space"),
        (OSError(errno.EACCES, "Permission denied"), None),
        (RuntimeError("CUDA out of memory"), None),
        (ConfigurationError("No space left on device"), None),
        (None, None),
    ],
)
def test_a_full_disk_is_told_from_other_errors(error, reason):
    found = full_disk(error)
    assert found is None if reason is None else reason in found


def test_the_error_of_a_library_gets_the_path_and_any_other_stays(tmp_path):
    with (
        pytest.raises(ConfigurationError, match=f"^{tmp_path}/model: .*no space is left"),
        writing_to(f"{tmp_path}/model"),
    ):
        raise wrapped(OSError(errno.ENOSPC, "x"))
    with pytest.raises(KeyError), writing_to(tmp_path):
        raise KeyError("name")
    assert named_full_disk(KeyError("name"), [tmp_path]) is None
    assert str(named_full_disk(OSError(errno.ENOSPC, "x", "a/file"), [tmp_path])).startswith("a/file: ")


def test_without_a_file_name_the_fullest_of_the_places_is_named(monkeypatch):
    free = {"/a": 10.0, "/b": 5.0}
    monkeypatch.setattr(disks, "free_bytes", lambda path: free.get(str(path), 1e9))
    assert str(named_full_disk(OSError(errno.ENOSPC, "x"), ["/a", "/b"])).startswith("/b: ")


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "numbers.json"
    write_whole(file, "before")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigurationError, match=f"^{file}: "):
        write_whole(file, "afterwards")
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_the_settings_of_a_run_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """A run that goes on writes them over those of before."""
    parser = SimpleNamespace(dump=lambda *_, **__: "seed_everything: 2\n")
    save = SaveConfig(parser, Namespace())
    trainer = SimpleNamespace(log_dir=str(tmp_path / "run"), is_global_zero=True)
    save.on_train_start(trainer, None)
    file = tmp_path / "run" / "config.yaml"
    before = file.read_text()
    assert before.endswith("seed_everything: 2\n")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    parser.dump = lambda *_, **__: "seed_everything: 3\n"
    with pytest.raises(ConfigurationError, match=f"^{file}: "):
        save.on_train_start(trainer, None)
    assert [path.read_text() for path in file.parent.iterdir()] == [before]


def test_a_thread_that_finds_the_disk_full_leaves_the_error_to_whom_it_writes_for(monkeypatch):
    def fail(error):
        raise error

    said = []
    monkeypatch.setattr(threading, "excepthook", lambda ended: said.append(ended.exc_value))
    quieten()
    errors = [OSError(errno.ENOSPC, "full"), KeyError("name")]
    for error in errors:
        thread = threading.Thread(target=fail, args=(error,))
        thread.start()
        thread.join()
    assert said == errors[1:]


def _stage_without_room(log: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    fork_stages()
    ended = run_program(["nothing"], log, append=False, tell=lambda _: None)
    assert ended.code == 2
    assert ended.complaint.startswith("unknown command 'nothing'")
    assert log.stat().st_size == 50


def test_the_complaint_of_a_stage_is_known_where_its_log_had_no_room(tmp_path):
    assert forked(_stage_without_room, tmp_path / "stage.log") == 0


def test_what_is_needed_is_said_beside_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(disks, "free_bytes", lambda _: 1_500_000.0)
    check_room(tmp_path, 1_500_000, "the model")
    with pytest.raises(ConfigurationError, match=r"the model takes 2\.0 GB, and 1\.5 MB are free"):
        check_room(tmp_path, 2e9, "the model")
    assert [size(count) for count in (0, 999, 1000, 12_345_678, 5e12)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "12.3 MB",
        "5000.0 GB",
    ]


# ---- commands


def _limited(directory: str, limit: int, arguments: list[str]) -> None:
    """In a process of its own: the program, in which no file may grow beyond `limit` bytes."""
    os.chdir(directory)
    os.environ["XDG_CACHE_HOME"] = os.path.join(directory, "cache")
    with open("said.txt", "w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = main(arguments)
    sys.exit(code)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with pairs, a rule that scores them, and a run that has a checkpoint and had no room to export."""
    directory = tmp_path_factory.mktemp("trained")
    pairs = [{"prompt": f"p{i}", "chosen": "good " * (i + 1), "rejected": f"bad {i}"} for i in range(40)]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (directory / "rules.py").write_text("def long(prompts, responses):\n    return [len(text) for text in responses]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        assert main(["doctor", "pairs.jsonl"]) == 0  # so that its tokens are in the cache
        patch.setattr(disks, "free_bytes", lambda _: 5000.0)
        patch.setattr("rlhf_lightning.planning.room_on_disk.free_bytes", lambda _: 5000.0)
        said = directory / "said.txt"
        with said.open("w") as out, contextlib.redirect_stderr(out):
            code = main(FIT)
    (checkpoint,) = directory.rglob("best*.ckpt")
    return directory, checkpoint, code, said.read_text()


def test_fit_says_beforehand_what_it_will_take_and_keeps_the_checkpoint_that_it_cannot_export(trained):
    directory, checkpoint, code, said = trained
    assert code == 2
    lines = said.splitlines()
    sizes = [line for line in lines if "are free there" in line]
    weights = sum(each.numel() for each in torch.load(checkpoint, weights_only=True)["state_dict"].values())
    assert f"a checkpoint will take about {size(12 * weights)}, and 5.0 kB are free" in sizes[0]
    assert f"the exported model will take about {size(4 * weights)}" in sizes[1]
    assert "nothing was exported" in lines[-1]
    assert checkpoint.name in lines[-1]
    assert not (directory / "models" / "quickstart_reward_model").exists()


@pytest.mark.parametrize(
    ("limit", "arguments", "named"),
    [
        (100_000, ["export", "--ckpt_path", "CHECKPOINT", "--out", "made"], "made"),
        (3_000, ["evaluate", "--reward_model", "rules:long", "--pairs", "pairs.jsonl", "--out", "out"], "scores-"),
        (9_000, ["evaluate", "--reward_model", "rules:long", "--pairs", "pairs.jsonl", "--out", "out"], "report.html"),
        (2_000, ["doctor", "pairs.jsonl", "--json", "found.json"], "found.json"),
        (400_000, [*FIT, "--trainer.logger.init_args.save_dir", "other"], "best-2.ckpt"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_every_command_says_it_in_one_line_and_leaves_nothing_half_written(trained, tmp_path, limit, arguments, named):
    directory, checkpoint, *_ = trained
    for name in ("pairs.jsonl", "rules.py", "cache"):
        (tmp_path / name).symlink_to(directory / name)
    arguments = [str(checkpoint) if each == "CHECKPOINT" else each for each in arguments]
    assert forked(_limited, str(tmp_path), limit, arguments) == 2
    said = (tmp_path / "said.txt").read_text()
    assert "Traceback" not in said
    line = said.splitlines()[-1]
    assert line.startswith("rlhf-lightning: error: ")
    assert named in line.split(": ")[2], line
    assert "larger than is allowed" in line or "no space" in line
    assert not [path for path in tmp_path.rglob("*.part*") if path.is_relative_to(tmp_path)]
