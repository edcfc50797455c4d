"""Functions of a user's own, named `module:function` in a configuration."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf_lightning.errors import ConfigurationError, ModelError, reason_of
from rlhf_lightning.files.packages import PACKAGE
from rlhf_lightning.tiny import TINY

Value = TypeVar("Value")


def names_function(given: str) -> bool:
    """Whether a name has the form `module:function`, and is not that of a built-in model or of one in a package."""
    module, _, function = given.partition(":")
    return not given.startswith((TINY, PACKAGE)) and all(part.isidentifier() for part in (*module.split("."), function))


def load_function(given: str, otherwise: str) -> Callable[..., Any]:
    """The function of `module:function`, of a module in the working directory or of an installed package.

    `otherwise` ends the sentence of a refusal: what else could be given. Raises `ConfigurationError`.
    """
    module, _, function = given.partition(":")
    sys.path.insert(0, os.getcwd())  # a file beside the user's configuration
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module does when it is imported
        raise ConfigurationError(
            f"{given}: cannot be imported ({type(error).__name__}: {reason_of(error)}); give module:function of a "
            f"module in this directory or of an installed package, or {otherwise}"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ConfigurationError(f"{given}: names an object of type {type(found).__name__}, not a function")
    return found


def call(
    function: Callable[..., Any], name: str, rows: Sequence[Any], *others: Any, gives: Callable[[Any], Value]
) -> list[Value]:
    """What a user's function gives for rows, one value for each, made a `gives`.

    Raises `ModelError` when the function raises, or gives another number of values.
    """
    try:
        values = [gives(value) for value in function(rows, *others)]
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ModelError(
            f"{name}: raised {type(error).__name__} ({reason_of(error)}) at {place.filename}, line {place.lineno}"
        ) from error
    if len(values) != len(rows):
        raise ModelError(f"{name}: gave {len(values)} results for {len(rows)} rows")
    return values


def code_fingerprint(name: str) -> str:
    """A hash of a function's name and of the file of its module; what the module imports is not looked at."""
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    return hashlib.sha256(name.encode() + b"\0" + (Path(file).read_bytes() if file else b"")).hexdigest()


def named_entry(given: str | Callable[..., Any], table: Mapping[str, Any], key: str) -> Any:
    """The entry of a table by its name, or a user's own function, by `module:function` or, in Python, itself.

    Raises `ConfigurationError`, with the nearest names, for what is neither; `key` names the setting.
    """
    if not isinstance(given, str):
        return given
    if given in table:
        return table[given]
    if names_function(given):
        return load_function(given, f"one of {', '.join(table)}")
    near = difflib.get_close_matches(given, table)
    meant = f"did you mean {' or '.join(near)}? It is" if near else "use"
    raise ConfigurationError(f"{key}: {given!r} is unknown; {meant} one of {', '.join(table)}, or module:function")


def name_of(given: str | Callable[..., Any]) -> str:
    """A name as it is, or `module:function` of a function."""
    return (
        given
        if isinstance(given, str)
        else f"{given.__module__}:{getattr(given, '__qualname__', type(given).__name__)}"
    )


def find_in_working_directory() -> None:
    """Let classes of modules in the working directory be named, behind all that is installed."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
