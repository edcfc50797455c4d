"""Arguments of a constructor, looked at as the command line looks at the keys of a configuration."""

from __future__ import annotations

import difflib
import inspect
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, Union

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.other_names import OTHER_NAMES


class CheckedArguments:
    """A class whose constructor refuses in Python the names and values that the command line refuses.

    Raises `ConfigurationError` for a keyword that no constructor of the class takes, for one that is not among the
    words that its type lists, for a number out of its bounds, and for another type than a number or truth value.
    Parameters of other types are left to the constructor, and those in `objects`.
    """

    objects: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *positional: Any, **named: Any) -> Self:
        hints = _hints(cls)
        if hints is not None and (unknown := [name for name in named if name not in hints]):
            raise ConfigurationError(f"{cls.__name__}: no argument {unknown[0]}{_meant(unknown[0], hints)}")
        order = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        for name, value in {**dict(zip(order, positional, strict=False)), **named}.items():
            if hints is not None and name not in cls.objects and (why := _refusal(hints.get(name), value)):
                raise ConfigurationError(f"{cls.__name__}: {name}={value!r} {why}")
        return super().__new__(cls)


def _hints(cls: type) -> dict[str, Any] | None:
    """What the constructors of a class take, by name: its own, and its parents' as far as it hands arguments on.

    None where one of them takes anything.
    """
    found: dict[str, Any] = {}
    for each in cls.__mro__:
        if (constructor := vars(each).get("__init__")) is None:
            continue
        parameters = inspect.signature(constructor).parameters.values()
        for parameter in list(parameters)[1:]:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(parameter.name, _evaluated(parameter.annotation, constructor))
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            return found
        if each.__module__.partition(".")[0] in ("lightning", "torch"):
            return None
    return None


def _evaluated(annotation: Any, constructor: Any) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, constructor.__globals__)
    except Exception:  # names that are imported for type checkers alone
        return None


def _refusal(hint: Any, value: Any) -> str | None:
    """Why a value is not of a type, in words; None where it is, or where the type is not one of those known here."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    reasons = [_reason(option, value) for option in options]
    return None if None in reasons else ", and ".join(dict.fromkeys(filter(None, reasons)))


def _reason(option: Any, value: Any) -> str | None:
    if option in (None, type(None)):
        return None if value is None or option is None else ""
    if typing.get_origin(option) is Literal:
        words = typing.get_args(option)
        near = difflib.get_close_matches(str(value), map(str, words), n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        return None if value in words else f"is none of {', '.join(map(repr, words))}{meant}"
    if option is bool:
        return None if isinstance(value, bool) else "is neither True nor False"
    if isinstance(option, type) and issubclass(option, int | float):
        kind = numbers.Integral if issubclass(option, int) else numbers.Real
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"is not {'an integer' if issubclass(option, int) else 'a number'}"
        try:
            option(value)  # type: ignore[call-overload]  # a number
        except ValueError:
            return f"is not {getattr(option, '_expression', 'possible').replace('v', '')}"
        return None
    return None


def _meant(unknown: str, known: Mapping[str, Any]) -> str:
    if unknown in OTHER_NAMES:
        return f"; did you mean {OTHER_NAMES[unknown]}?"
    near = difflib.get_close_matches(unknown, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; it takes {', '.join(sorted(known))}"
