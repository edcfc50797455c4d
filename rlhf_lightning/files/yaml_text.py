"""YAML of users, held to a size before anything is made of it: a few lines with aliases can stand for terabytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jsonargparse
import yaml

from rlhf_lightning.errors import ConfigurationError, UserError

LARGEST, DEEPEST = 100_000, 100
"""Characters and values that aliases may expand a text to, where it is not that long itself; nesting of a text."""


def check_yaml(text: str, *, largest: int = LARGEST, deepest: int = DEEPEST) -> None:
    """Refuse a text that expands beyond `largest`, nests deeper than `deepest`, or holds itself.

    The text is read token by token, and nothing of it is built. Raises `ConfigurationError`, and `yaml.YAMLError` for
    what is no YAML.
    """
    sizes: dict[str, int | None] = {}
    """Of what has an anchor; None while it is still open."""
    open_sizes, anchors = [0], [None]
    limit = max(largest, len(text))
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(anchor, 0)
            if size is None:
                raise ConfigurationError(f"line {event.start_mark.line + 1}: *{anchor} holds itself; write it out")
        elif isinstance(event, yaml.ScalarEvent):
            size = max(1, len(event.value))
            sizes[anchor] = size
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes[anchor] = None
            open_sizes.append(1)
            anchors.append(anchor)
            if len(anchors) > deepest:
                raise ConfigurationError(f"line {event.start_mark.line + 1}: nested more than {deepest} deep")
            continue
        elif isinstance(event, yaml.CollectionEndEvent):
            size = sizes[anchors.pop()] = open_sizes.pop()
        else:
            continue
        open_sizes[-1] += size
        if open_sizes[-1] > limit:
            raise ConfigurationError(
                f"line {event.start_mark.line + 1}: aliases expand it to more than {limit:,} characters; write out "
                "what is meant"
            )


def bound_parsers() -> None:
    """Let every parser of the program check what it is given, files and values, before it is read."""
    load = jsonargparse.get_loader("yaml")
    if getattr(load, "bounded", False):
        return

    def bounded(text: str):
        check_yaml(text)
        return load(text)

    bounded.bounded = True
    jsonargparse.set_loader("yaml", bounded, exceptions=(yaml.YAMLError,))


def check_configurations(arguments: Sequence[str]) -> None:
    """Check the files after each `--config` of a command line. Raises `ConfigurationError`, which names the file."""
    for place, argument in enumerate(arguments):
        name, equals, file = argument.partition("=")
        if name not in ("-c", "--config"):
            continue
        path = Path(file if equals else (*arguments, "")[place + 1])
        if path.is_file():  # else the parser says that there is none
            try:
                check_yaml(path.read_text(encoding="utf-8"))
            except UserError as error:
                raise ConfigurationError(f"{path}: {error}") from error
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"{path}: is no YAML ({' '.join(str(error).split())})") from error
