"""Command lines: a parser that refuses in one line, and one whose keys are the fields of a dataclass."""

from __future__ import annotations

import argparse
import os
import re
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
    from jsonargparse import ActionConfigFile, ArgumentParser

    from rlhf_lightning.files.yaml_text import bound_parsers, check_configurations

    bound_parsers()
    check_configurations(arguments)
    parser = ArgumentParser(prog=f"rlhf-lightning {command}", description=usage, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file with these keys; several are layered.")
    parser.add_class_arguments(kind, nested_key=None)
    try:
        parsed = parser.parse_args(list(arguments))
    except Exception as error:
        raise ConfigurationError(f"{command}: {essence(str(error))[:400]}") from error
    parsed.pop("config", None)
    return kind(**parser.instantiate_classes(parsed).as_dict())


def essence(message: str) -> str:
    """The parser's message without the frames that it puts around what is wrong.

    `Parser key "model": Does not validate against any of the Union subtypes ... Errors: - Option 'x' is not accepted
    - Expected a <class 'NoneType'> ...` becomes `model: Option 'x' is not accepted`.
    """
    frames = ("Does not validate against any", "Subtypes:", "Errors:", "Given value", "Problem with given class_path")
    parts: list[str] = []
    for line in message.replace("Does not validate", "\nDoes not validate").splitlines():
        line = re.sub(r'Parser key "([^"]+)":', r"\1:", line.strip().removeprefix("-")).strip()
        line = re.sub(r"<class '(\w+)'>", r"\1", line).replace("a typing.Literal", "one of ")
        line = line.replace("Expected a dot import path string:", "no such class:")
        noise = line.startswith(frames) or "NoneType" in line or "Expected a path" in line
        if line and not noise and line not in parts:
            parts.append(line)
    given = re.search(r"Given value: (?!NestedArg)(.*)", message)
    if given and parts and parts[-1].startswith("Expected"):
        parts.append(f"given {given[1]!r}")
    text = ""
    for part in parts:
        text += ("" if not text else " " if text.endswith(":") else "; ") + part
    return text or message
