"""Writing a model as a directory that is never half there, and telling a damaged one.

A model is made in `.NAME.xxxxxxxx.part/NAME` beside its place, and then the two directories change places, in one step
where the system can (`renameat2`). What a killed process leaves is undone by the next one that writes there.
"""

from __future__ import annotations

import copy
import ctypes
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.files.adapters import without_adapters
from rlhf_lightning.files.disks import writing_to
from rlhf_lightning.files.leftovers import held_directory, remove_abandoned
from rlhf_lightning.files.seals import MARK, seal

_MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json")
_OLD = "old"
"""What a model under way is to replace, where the system cannot exchange two directories in one step."""
_under_way: set[Path] = set()
"""Directories in which this process is making a model."""


def check_free(directory: str | Path) -> bool:
    """Refuse a directory that holds anything but a model that this package wrote. Raises `ConfigurationError`.

    Makes the directories above it, so that an impossible path fails now, and undoes what a killed process left there.
    Returns whether a model is there.
    """
    directory = Path(directory).expanduser()
    directory.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(directory.resolve())
    if not directory.exists():
        return False
    if not directory.is_dir():
        raise ConfigurationError(f"{directory}: is a file; give another directory to export to")
    is_model = any((directory / name).is_file() for name in ("config.json", "adapter_config.json", MARK))
    if any(directory.iterdir()) and not is_model:
        raise ConfigurationError(f"{directory}: holds files that are no model; give an empty or new directory")
    if is_model and not (directory / MARK).is_file():
        raise ConfigurationError(
            f"{directory}: holds a model that this program did not write, and it will not be replaced; give another "
            "directory, or remove it"
        )
    return is_model


def check_other(directory: str | Path, **models: str | None) -> None:
    """Refuse to write a model over one that it needs: `models` by the names of their keys.

    Raises `ConfigurationError`.
    """
    place = Path(directory).expanduser().resolve()
    for key, name in models.items():
        below = {name, without_adapters(name)} if name and Path(name).expanduser().exists() else {name}
        if place in {Path(each).expanduser().resolve() for each in below if each}:
            raise ConfigurationError(
                f"{directory}: is model.{key} of this run, without which its checkpoints are worth nothing; give "
                "another directory to export to"
            )


@contextmanager
def replaced_model(directory: str | Path, *, checkpoint: str | None = None) -> Iterator[Path]:
    """A new directory to save a model in, which then takes the place of `directory` as a whole.

    It is marked as exported from a `checkpoint`.

    What `directory` held besides a model stays. Saving over the directory that the model was loaded from is safe, and a
    process that is killed leaves the one model or the other. Within another `replaced_model`, its own directory.
    """
    directory = Path(directory).expanduser().resolve()  # the place that a link points to, so that the link stays
    if directory in _under_way:
        yield directory
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(directory)
    with held_directory(directory) as stage:
        made = stage / directory.name
        made.mkdir()
        _under_way.add(made)
        try:
            with writing_to(directory):
                yield made
                seal(made, checkpoint=checkpoint)
                _put_in_place(made, directory)
        finally:
            _under_way.discard(made)
            _put_back(stage, directory)


def _put_in_place(made: Path, directory: Path) -> None:
    """Let a new model take the place of a directory, with what that one holds besides a model."""
    if not directory.exists():
        made.rename(directory)
        return
    for kept in directory.iterdir():
        # An older model may have had other files: shards, or adapters, for which transformers looks first.
        if ".safetensors" not in kept.name and kept.name not in _MODEL_FILES and not (made / kept.name).exists():
            _link(kept, made / kept.name)
    made.chmod(directory.stat().st_mode)
    if _exchange(made, directory):
        return
    try:
        directory.rename(made.parent / _OLD)
    except OSError:  # another file system is mounted there
        _move_into(made, directory)
    else:
        made.rename(directory)


def _link(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        target.mkdir()
        for each in source.iterdir():
            _link(each, target / each.name)
        shutil.copystat(source, target)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places in one step. Returns False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _move_into(made: Path, directory: Path) -> None:
    """File by file. The mark comes first, so that a mixture of two models is refused by its hashes, and replaced."""
    shutil.move(made / MARK, directory / MARK)
    for stale in [*directory.glob("*.safetensors*"), *(directory / name for name in _MODEL_FILES)]:
        stale.unlink(missing_ok=True)
    for file in sorted(made.iterdir(), key=lambda file: file.name in _MODEL_FILES):  # these make the directory a model
        if not (directory / file.name).is_dir():
            shutil.move(file, directory / file.name)


def _clear_leftovers(directory: Path) -> None:
    """Undo what processes that were killed while they replaced a directory have left, and say so."""
    remove_abandoned(directory.parent, directory.name, lambda stage: _put_back(stage, directory))


def _put_back(stage: Path, directory: Path) -> None:
    """What a model made in `stage` was to replace is put back, if nothing has taken its place."""
    if (stage / _OLD).is_dir() and not directory.exists():
        with suppress(OSError):  # another process was faster
            (stage / _OLD).rename(directory)


@contextmanager
def edited_settings(file: Path) -> Iterator[dict[str, Any]]:
    """The settings in a JSON file of a model, written back when they were changed; of no file, none, and nowhere."""
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    before = copy.deepcopy(settings)
    yield settings
    if file.is_file() and settings != before:
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def end_at(directory: str | Path, eos_id: int) -> None:
    """Let `generate` end a response of the language model in a directory where training did, and where it did before.

    A base model's own settings may name another token, or none, and then it goes on past its last word. A directory
    without `generation_config.json` is no language model, and stays as it is.
    """
    with edited_settings(Path(directory) / "generation_config.json") as settings:
        known = settings.get("eos_token_id")
        known = known if isinstance(known, list) else [] if known is None else [known]
        if eos_id not in known:
            settings["eos_token_id"] = [eos_id, *known] if known else eos_id


def pad_with(directory: str | Path, pad_id: int) -> None:
    """Write the id that the tokenizer pads with into the settings of the model in a directory, where it has some.

    transformers' own classifiers find the last token of a row by it.
    """
    for name in ("config.json", "generation_config.json"):
        with edited_settings(Path(directory) / name) as settings:
            settings["pad_token_id"] = pad_id
