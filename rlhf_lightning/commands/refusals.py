"""What the parser of a command line refuses, in one line: which key, what is wrong with it, and which key was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import NoReturn

from jsonargparse import ArgumentParser

from rlhf_lightning.errors import ConfigurationError

_OTHER_VALUES = {"fp16": "16-mixed", "float16": "16-mixed", "bfloat16": "bf16-mixed", "fp32": "32-true"}

_WORDS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "dict": "a mapping"}

_UNKNOWN = re.compile(
    r"Option '(?P<option>[^']+)' is not accepted|Subcommand '\w+' does not accept option '(?P<key>[^']+)'|"
    r"unrecognized arguments: --(?P<argument>[\w.-]+)|Key '(?P<name>[^']+)' is not expected"
)


class OneLineParser(ArgumentParser):
    """Raises `ConfigurationError` of one line where jsonargparse prints a page."""

    other_names: Mapping[str, str] = {}
    """As `other_names.OTHER_NAMES`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigurationError(essence(message) + meant(message, self._keys(), self.other_names)) from ex

    def _keys(self) -> list[str]:
        commands = self._subcommands_action.choices.values() if self._subcommands_action else ()
        options = [*self._option_string_actions, *(key for each in commands for key in each._option_string_actions)]
        return [key[2:] for key in options if key.startswith("--") and not key.endswith((".help", "+"))]


def meant(message: str, keys: Iterable[str], others: Mapping[str, str]) -> str:
    """`; did you mean KEY?` for the message of a parser with these keys that does not know some; else nothing."""
    if (found := _UNKNOWN.search(message)) is None or "did you mean" in message:
        return ""
    unknown = [next(filter(None, found.groups())).removesuffix(".class_path")]
    if found["argument"]:
        unknown = re.findall(r"--([\w.-]+)", message)
    close = [each for name in unknown if (each := _nearest(name, list(keys), others))]
    return f"; did you mean {', '.join(close)}?" if close else ""


def _nearest(unknown: str, keys: Iterable[str], others: Mapping[str, str]) -> str | None:
    known = {_plain(key): key for key in keys}
    last = {_plain(key.rpartition(".")[2]): key for key in keys}
    place, _, name = _plain(unknown).rpartition(".")
    if name in others and others[name] != unknown:
        return others[name]
    if close := difflib.get_close_matches(_plain(unknown), known, n=1, cutoff=0.75):
        return known[close[0]]
    return last.get(name) if place == "" else None


def _plain(key: str) -> str:
    """A key as it is looked for: `maxLength` and `max-length` are `max_length`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).replace("-", "_").lower()


def essence(message: str) -> str:
    """The parser's message without the frames that it puts around what is wrong.

    `Parser key "model": Does not validate against any of the Union subtypes ... Errors: - Option 'x' is not accepted
    - Expected a <class 'NoneType'> ...` becomes `model: Option 'x' is not accepted`; what is wrong deeper within has
    been through here before, and its key is put behind this one: `model.optimizer.lr: '5x' is not a number`.
    """
    frames = ("Does not validate against any", "Subtypes:", "Errors:", "Given value", "Problem with given class_path")
    keys: list[str] = []
    parts: list[str] = []
    for line in message.replace("Does not validate", "\nDoes not validate").splitlines():
        line = line.strip().removeprefix("-").strip()
        while key := re.match(r'Parser key "([^"]+)":\s*', line):
            keys.append(key[1])
            line = line[key.end() :]
        noise = line.startswith(frames) or "NoneType" in line or line.startswith("Expected a path")
        if line and not noise and line not in parts:
            parts.append(line)
    given = re.search(r"(?:Given value|Got value): (?!NestedArg)(.*)", message)
    text = "; ".join(part for part in parts if not part.startswith("Expected")) or _expected(parts, given)
    path = ".".join(keys)
    nested = re.match(r"[a-z]\w*(\.[\w\[\]]+)*: ", text) if keys else None
    if path == "trainer.callbacks" and "is not accepted" in text:
        text += " by the last callback of the list, which --trainer.callbacks.KEY goes to; give it before the next one"
    return f"{path}{'.' if nested else ': ' if path else ''}{text or message}"


def _expected(parts: list[str], given: re.Match[str] | None) -> str:
    """What a value should have been, out of the parser's lines that begin with `Expected`."""
    text = " ".join(parts)
    choices = [choice for each in re.findall(r"Literal\[([^\]]*)\]", text) for choice in each.split(", ")]
    words = [_WORDS.get(kind, f"a {kind}") for kind in re.findall(r"<class '(?:\w+\.)*(\w+)'>", text)]
    value = given[1].strip() if given else ""
    if "dot import path" in text and not words:
        name = text.rpartition(": ")[2]
        return f"no such class: {name}{_close(name, _class_names())}"
    if choices:
        words = [f"one of {', '.join(dict.fromkeys(choices))}"]
    if not words:
        return "; ".join(parts)
    close = _OTHER_VALUES.get(value.lower()) or value
    advice = _close(close, [choice.strip("'") for choice in choices])
    return f"expected {' or '.join(dict.fromkeys(words))}, not {value[:100]!r}{advice}"


def _close(name: str, names: Iterable[str]) -> str:
    lower = {each.lower(): each for each in names}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.75)
    return f"; did you mean {lower[close[0]]}?" if close else ""


def _class_names() -> list[str]:
    """Names that a class path may be: of what is imported, as the parser resolves bare names."""
    from lightning.pytorch import Callback, LightningDataModule, LightningModule
    from lightning.pytorch.loggers import Logger
    from torch.optim import Optimizer

    found: list[type] = []
    waiting: list[type] = [LightningModule, LightningDataModule, Callback, Logger, Optimizer]
    while waiting:
        below: list[type] = waiting.pop().__subclasses__()
        found += below
        waiting += below
    return [each.__name__ for each in found if not each.__name__.startswith("_")]
