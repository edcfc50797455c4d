"""Command lines: a parser that refuses in one line, and one whose keys are the fields of a dataclass."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from rlhf_lightning.errors import ConfigurationError

Settings = TypeVar("Settings")


class Arguments(argparse.ArgumentParser):
    """The parser of a command: whole names only, and `ConfigurationError` in place of a page of usage."""

    def __init__(self, command: str, usage: str, description: str) -> None:
        self.command = command
        super().__init__(
            prog=f"rlhf-lightning {command}",
            usage=f"rlhf-lightning {command} {usage}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{self.command}: {message}; see {self.prog} --help")


def spare_inputs(command: str, written: Iterable[Path], read: Iterable[object]) -> None:
    """Raise `ConfigurationError` where a command would write over a file that it reads.

    Of what is `read`, the texts that name a file count, also behind the `=` of an argument and within lists and dicts.
    """
    named = [name for text in _texts(read) for name in (text, text.partition("=")[2])]
    files = [name for name in named if os.path.isfile(name)]
    for path in written:
        if path.is_file() and any(path.samefile(name) for name in files):
            raise ConfigurationError(f"{command}: {path} is read here, and would be overwritten; name another to write")


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Iterable):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


def parse_settings(kind: type[Settings], command: str, usage: str, arguments: Sequence[str]) -> Settings:
    """The settings of a command line; `--config` takes YAML files, several of which are layered.

    Raises SystemExit after `--help` and `--print_config`, which print, and `ConfigurationError` for an unknown key or a
    wrong value.
    """
    from jsonargparse import ActionConfigFile

    from rlhf_lightning.commands.refusals import OneLineParser, essence
    from rlhf_lightning.files.yaml_text import bound_parsers, check_configurations

    bound_parsers()
    check_configurations(arguments)
    parser = OneLineParser(prog=f"rlhf-lightning {command}", description=usage, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file with these keys; several are layered.")
    parser.add_class_arguments(kind, nested_key=None)
    try:
        parsed = parser.parse_args(list(arguments))
    except ConfigurationError as error:
        raise ConfigurationError(f"{command}: {error}") from error
    except Exception as error:
        raise ConfigurationError(f"{command}: {essence(str(error))[:400]}") from error
    parsed.pop("config", None)
    return kind(**parser.instantiate_classes(parsed).as_dict())
