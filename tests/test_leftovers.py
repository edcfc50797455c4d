"""What a killed process left is removed, and said, by the next one; what a living one is writing stays."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from rlhf_lightning import tiny
from rlhf_lightning.files import leftovers
from rlhf_lightning.files.leftovers import (
    held_directory,
    remove_abandoned,
    remove_temporary_leftovers,
    temporary_directory,
)
from rlhf_lightning.training.reference_cache import ReferenceCache
from tests.patience import PATIENCE


def ended(function, *arguments) -> int:
    """The exit code of a process of its own that calls a function."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(PATIENCE)
    return process.exitcode


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _make_temporary(die_then: bool) -> None:
    temporary_directory.cache_clear()
    (temporary_directory() / "file").write_text("some")
    if os.fork() == 0:  # a copy that ends first removes nothing
        raise SystemExit
    os.wait()
    assert (temporary_directory() / "file").exists()
    if die_then:
        die()


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """Where this test's temporary directories are."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_temporary_directory_ends_with_its_process_or_is_removed_by_the_next(temporary, caplog):
    assert ended(_make_temporary, False) == 0
    assert list(temporary.iterdir()) == []
    assert ended(_make_temporary, True) == -signal.SIGKILL
    (left,) = temporary.iterdir()
    with held_directory(temporary / "rlhf_lightning") as living, caplog.at_level(logging.INFO):
        remove_temporary_leftovers()
        assert living.is_dir()
        assert not left.exists()
    assert caplog.text.count("removed") == caplog.text.count(str(left)) == 1


def test_only_what_was_made_as_a_leftover_is_removed(tmp_path):
    others = [".name.short.part", ".name.abcdefgh.part.txt", "name.abcdefgh.part", ".other.abcdefgh.part"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".name.12345678.part").write_text("a file")
    (tmp_path / ".name.abcdefgh.part").mkdir()
    remove_abandoned(tmp_path, "name")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, ".name.12345678.part"])


def test_what_is_removed_before_it_is_held_is_made_again(tmp_path, monkeypatch):
    """By another process that takes it for abandoned, between its making and its holding."""
    lock, times = leftovers.fcntl.flock, []

    def late(descriptor, kind):
        if kind == leftovers.fcntl.LOCK_SH and not times:
            times.append(1)
            remove_abandoned(tmp_path)
        lock(descriptor, kind)

    monkeypatch.setattr(leftovers.fcntl, "flock", late)
    with held_directory(tmp_path / "name") as made:
        assert made.is_dir()
    assert times == [1]
    assert list(tmp_path.iterdir()) == []


def test_the_tiny_model_of_a_killed_process_is_cleared_away(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiny, "make_tiny_model", die)
    assert ended(tiny.resolve_model, "builtin:tiny") == -signal.SIGKILL
    cache = tmp_path / "rlhf_lightning"
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(tiny, "make_tiny_model", lambda directory, _: (directory / "config.json").write_text("{}"))
    made = tiny.resolve_model("builtin:tiny")
    assert [str(path) for path in cache.iterdir()] == [made]


def test_with_a_cache_that_cannot_be_written_one_tiny_model_is_made_for_the_process(temporary, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(temporary / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # of another user; root may write anywhere
    monkeypatch.setattr(tiny, "make_tiny_model", lambda directory, _: (directory / "config.json").write_text("{}"))
    temporary_directory.cache_clear()
    made = [tiny.resolve_model("builtin:tiny") for _ in range(2)]
    assert made[0] == made[1]
    assert Path(made[0]).parent == temporary_directory()
    temporary_directory.cache_clear()


def _die_while_adding(directory: Path) -> None:
    cache = ReferenceCache(["key"], cache_dir=directory)
    os.fsync = die
    cache.add([b"0" * 16], torch.zeros(1, 2))


def test_a_part_of_reference_log_probs_that_was_not_written_to_its_end_is_removed(tmp_path):
    assert ended(_die_while_adding, tmp_path) == -signal.SIGKILL
    assert len(list(tmp_path.glob("*/.*"))) == 1
    cache = ReferenceCache(["key"], cache_dir=tmp_path)
    assert [path.name for path in cache.directory.iterdir()] == ["key.json"]
    assert not cache.find([b"0" * 16])[1].any()
