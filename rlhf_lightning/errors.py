"""Errors that a user can mend. Each message is one line: where, what, why, and what to do instead."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Base of the errors that the command line prints as one line, with exit code 2 and without a traceback."""


class DataError(UserError):
    """A data source or row cannot be used."""


class ModelError(UserError):
    """A model or tokenizer cannot be loaded, or does not fit what is asked of it."""


class ConfigurationError(UserError):
    """The settings are impossible, or contradict each other."""


class TrainingError(UserError):
    """A run cannot go on: what it computes is no number, or not what it should be."""


def with_causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and then what it was raised for or while handling, the nearest first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Inside, a `UserError` of a constructor stays what it is: the parser wraps it in a ValueError of many lines."""
    try:
        yield
    except ValueError as error:
        cause = next((each for each in with_causes(error) if isinstance(each, UserError)), error)
        if cause is error:
            raise
        raise cause from error


def reason_of(error: BaseException, *, whole: bool = False) -> str:
    """The first line of an error (with `whole` all on one line), or what it is where it says nothing, for another one.

    A library's first line says what is wrong; a chat template's own words may go over several.
    """
    said = str(error).strip()
    line = " ".join(said.split()) if whole else said.partition("\n")[0]
    return line[:200] or ("not enough memory" if isinstance(error, MemoryError) else type(error).__name__)
