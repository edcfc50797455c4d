"""The command `configs`, and `--config builtin:NAME`: the configurations that come with the program."""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from rlhf_lightning.commands.settings import Arguments
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.terminal import say

BUILTIN = "builtin:"

_PACKAGE = Path(__file__).parents[1]
DIRECTORY = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())
"""Within the package where it was installed from a wheel, beside it in a clone."""

_DESCRIPTION = """Without an action, lists the configurations that come with the program, by name. Each runs as it is,
as --config builtin:NAME (builtin:quickstart, builtin:hardware/cpu), or is copied and changed:

  rlhf-lightning configs copy reward_model mine.yaml

With a pipeline's file, the files of its stages are copied too, to where it names them. Nothing is overwritten.
"""


def run(arguments: Sequence[str]) -> int:
    """List or copy, and return the exit code. Raises `ConfigurationError`."""
    parser = Arguments("configs", "[copy NAME FILE]", _DESCRIPTION)
    parser.add_argument("copy", nargs="*", metavar="copy NAME FILE", help="write a configuration to FILE, to change it")
    given = parser.parse_args(list(arguments)).copy
    if not given:
        width = max(map(len, names()))
        for name in names():
            say(f"{name:{width}}  {_summary(path_of(name))}")
    elif len(given) == 3 and given[0] == "copy":
        _copy(path_of(given[1]), Path(given[2]).expanduser())
    else:
        raise ConfigurationError(f"configs: {' '.join(given)}: not an action; use: configs copy NAME FILE")
    return 0


def names() -> list[str]:
    """Of all configurations, as `builtin:` takes them."""
    found = [path.relative_to(DIRECTORY).with_suffix("").as_posix() for path in DIRECTORY.rglob("*.yaml")]
    return sorted(found, key=lambda name: (name.count("/"), name))


def path_of(name: str) -> Path:
    """The file of a configuration. Raises `ConfigurationError` for a name that is none."""
    plain = name.removeprefix(BUILTIN).removeprefix("configs/").removesuffix(".yaml")
    if plain not in names():
        close = difflib.get_close_matches(plain, names(), n=1, cutoff=0.6)
        advice = f"did you mean {close[0]}?" if close else "`rlhf-lightning configs` lists them"
        raise ConfigurationError(f"{name}: no such configuration comes with the program; {advice}")
    return DIRECTORY / f"{plain}.yaml"


def with_paths(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command whose `--config builtin:NAME` are replaced by paths. Raises `ConfigurationError`."""
    replaced = list(arguments)
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in ("-c", "--config") and value.startswith(BUILTIN):
            replaced[place] = f"{option}{equals}{path_of(value)}"
        elif argument.startswith(BUILTIN) and place and arguments[place - 1] in ("-c", "--config"):
            replaced[place] = str(path_of(argument))
        elif place and arguments[place - 1] in ("-c", "--config") and _is_absent(argument):
            raise ConfigurationError(
                f"{argument}: no such file; `rlhf-lightning configs` lists those that come with the program"
            )
    return replaced


def _is_absent(file: str) -> bool:
    return file.endswith((".yaml", ".yml")) and not Path(file).expanduser().exists()


def _summary(path: Path) -> str:
    """The first sentence of its header."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = " ".join(line[1:].strip() for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")])
    return re.split(r"(?<=[^0-9])[.;](?=\s)|  | rlhf-lightning ", header)[0].removeprefix("Overlay: ").strip()


def _copy(source: Path, target: Path) -> None:
    stages = yaml.safe_load(source.read_text(encoding="utf-8")).get("stages", {}).values()
    named = [
        file
        for stage in stages
        for file in ([stage["config"]] if isinstance(stage["config"], str) else stage["config"])
    ]
    pairs = [(source, target), *((source.parent / file, target.parent / file) for file in named)]
    if present := [str(to) for _, to in pairs if to.exists()]:
        raise ConfigurationError(f"configs: {present[0]} exists; give another FILE, or move it away")
    for place, to in pairs:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place, to)
        say(f"wrote {to}")
