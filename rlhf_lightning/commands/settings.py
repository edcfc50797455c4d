"""The command line of a command whose keys are the fields of a dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from jsonargparse import ActionConfigFile, ArgumentParser

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.files.yaml_text import bound_parsers, check_configurations

Settings = TypeVar("Settings")


def parse_settings(kind: type[Settings], command: str, usage: str, arguments: Sequence[str]) -> Settings:
    """The settings of a command line; `--config` takes YAML files, several of which are layered.

    Raises SystemExit after `--help` and `--print_config`, which print, and `ConfigurationError` for an unknown key or a
    wrong value.
    """
    bound_parsers()
    check_configurations(arguments)
    parser = ArgumentParser(prog=f"rlhf-lightning {command}", description=usage, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file with these keys; several are layered.")
    parser.add_class_arguments(kind, nested_key=None)
    try:
        parsed = parser.parse_args(list(arguments))
    except Exception as error:
        if isinstance(error, SystemExit):
            raise
        raise ConfigurationError(f"{command}: {' '.join(str(error).split())[:400]}") from error
    parsed.pop("config", None)
    return kind(**parser.instantiate_classes(parsed).as_dict())
