"""YAML of users, held to a size before anything is made of it: a few lines with aliases can stand for terabytes."""

from __future__ import annotations

import functools
import logging
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import jsonargparse
import yaml

from rlhf_lightning.errors import ConfigurationError, UserError
from rlhf_lightning.files.disks import write_whole

log = logging.getLogger(__name__)

LARGEST, DEEPEST = 100_000, 100
"""Characters and values that aliases may expand a text to, where it is not that long itself; nesting of a text."""

_SEAL = "# Written by a run of rlhf_lightning, CRC-32 "


def write_configuration(file: Path, text: str) -> None:
    """Write settings under a checksum, by which `check_configurations` tells that they were changed.

    What was there before stays where the disk is full; raises `ConfigurationError` then.
    """
    write_whole(file, f"{_SEAL}{zlib.crc32(text.encode()):08x}\n{text}")


def _name_change(path: Path, text: str) -> None:
    """Say where what a run wrote has been changed: a flipped bit in a number makes another one that is as good."""
    seal, _, rest = text.partition("\n")
    if seal.startswith(_SEAL) and seal != f"{_SEAL}{zlib.crc32(rest.encode()):08x}":
        log.warning("%s: is not as its run wrote it, edited or damaged; if you edited it, remove its first line", path)


def check_yaml(text: str, *, largest: int = LARGEST, deepest: int = DEEPEST) -> None:
    """Refuse a text that expands beyond `largest`, nests deeper than `deepest`, or holds itself.

    The text is read token by token, and nothing of it is built. Raises `ConfigurationError`, and `yaml.YAMLError` for
    what is no YAML.
    """
    sizes: dict[str | None, int | None] = {}
    """Of what has an anchor; None while it is still open."""
    open_sizes: list[int] = [0]
    anchors: list[str | None] = [None]
    limit = max(largest, len(text))
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            sizes[anchor] = None
            open_sizes.append(1)
            anchors.append(anchor)
            if len(anchors) > deepest:
                raise ConfigurationError(f"line {event.start_mark.line + 1}: nested more than {deepest} deep")
            continue
        size: int | None
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(anchor, 0)
        elif isinstance(event, yaml.ScalarEvent):
            size = sizes[anchor] = max(1, len(event.value))
        elif isinstance(event, yaml.CollectionEndEvent):
            size = sizes[anchors.pop()] = open_sizes.pop()
        else:
            continue
        if size is None:
            raise ConfigurationError(f"line {event.start_mark.line + 1}: *{anchor} holds itself; write it out")
        open_sizes[-1] += size
        if open_sizes[-1] > limit:
            raise ConfigurationError(
                f"line {event.start_mark.line + 1}: aliases expand it to more than {limit:,} characters; write out "
                "what is meant"
            )


@functools.cache
def bound_parsers() -> None:
    """Let every parser of the program check what it is given, files and values, before it is read."""
    load = jsonargparse.get_loader("yaml")

    def bounded(text: str) -> object:
        check_yaml(text)
        return load(text)

    jsonargparse.set_loader("yaml", bounded, exceptions=(yaml.YAMLError,))


def check_configurations(arguments: Sequence[str]) -> None:
    """Check the files after each `--config` of a command line, and name those that a run wrote and that were changed.

    Raises `ConfigurationError`, which names the file.
    """
    for place, argument in enumerate(arguments):
        name, equals, file = argument.partition("=")
        if name not in ("-c", "--config"):
            continue
        path = Path(file if equals else (*arguments, "")[place + 1])
        if path.is_file():  # else the parser says that there is none
            try:
                text = path.read_bytes().decode("utf-8")
                _name_change(path, text)
                check_yaml(text)
                if not re.search(r"^\s*[^#\s]", text, re.MULTILINE):
                    raise ConfigurationError("is empty; give another file, or leave it out")
            except UserError as error:
                raise ConfigurationError(f"{path}: {error}") from error
            except UnicodeDecodeError as error:
                raise ConfigurationError(f"{path}: not YAML, since it is not text in UTF-8 ({error})") from error
            except yaml.YAMLError as error:
                mark = getattr(error, "problem_mark", None)
                where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
                problem = getattr(error, "problem", None) or " ".join(str(error).split())
                raise ConfigurationError(f"{path}: not valid YAML: {where}{problem}") from error
