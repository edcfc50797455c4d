"""The command `doctor`: the settings of a run, or a source alone, and the findings on its data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from jsonargparse import Namespace

from rlhf_lightning.commands import fit as program
from rlhf_lightning.data import datamodules
from rlhf_lightning.data.datamodules import PreferenceDataModule
from rlhf_lightning.data.doctor import Diagnosis, diagnose
from rlhf_lightning.data.roles import Role
from rlhf_lightning.data.sources import has_split
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.files.disks import write_whole
from rlhf_lightning.report.doctor import html_page, print_diagnosis
from rlhf_lightning.terminal import Terminal, say, silenced

_USAGE = """rlhf-lightning doctor [SOURCE] [--config FILE.yaml] [--data.KEY VALUE ...] [--json FILE] [--html FILE]

What is in preference data: rows left out and why, columns that are not used, lengths and what max_length cuts, padding,
copies and contradictions, prompts on both sides, length bias, and examples as the model gets them.

SOURCE (a file, a directory or a hub name) is examined alone, with the settings of the configuration if there is one, or
against the pairs of --data.val; without SOURCE, the training and validation pairs of the configuration or of
--data.train. Exit code 0: every row can be used, 1: some would be left out, 2: the data or the settings cannot be used.
"""


class _Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"doctor: {message}")


def run(arguments: Sequence[str]) -> int:
    """Print the findings, write the files that are asked for, and return the exit code. Raises `UserError`."""
    arguments = list(arguments)
    source = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    parser = _Arguments(prog="rlhf-lightning doctor", usage=_USAGE, add_help=False, allow_abbrev=False)
    for name in ("--json", "--html"):
        parser.add_argument(name, type=_free_file)
    parser.add_argument("-h", "--help", action="store_true")
    own, settings = parser.parse_known_args(arguments)
    if own.help:
        print(_USAGE, end="")
        return 0
    given = _names(settings)
    if source is None and given.isdisjoint({"--config", "--data.train"}):
        raise ConfigurationError("doctor: give a SOURCE, --data.train, or the --config of a run")
    if source is not None and "--data.train" in given:
        raise ConfigurationError(f"doctor: {source} and --data.train are both given; leave one of them out")
    diagnosis = _diagnosis(source, settings)
    # The files first: a reader of the tables, such as `head`, may stop listening.
    if own.json:
        write_whole(own.json, json.dumps(asdict(diagnosis), indent=2) + "\n")
    if own.html:
        write_whole(own.html, html_page(diagnosis))
    print_diagnosis(diagnosis, Terminal(soft_wrap=False))
    for path in filter(None, (own.json, own.html)):
        say(f"written: {path}")
    return diagnosis.exit_code


def _diagnosis(source: str | None, settings: Sequence[str]) -> Diagnosis:
    given = _names(settings)
    if "--config" not in given:
        # The parser wants a model; the doctor looks at none.
        model = ["--model", "RewardModel", "--model.backbone", ""]
        settings = ["--seed_everything", "false", *model, "--data", "PreferenceDataModule", *settings]
    if source is not None:
        settings = [*settings, "--data.train", source]
    parsed = program.run(["fit", *settings], program=program.ParsedRun).settings
    keys = _data_keys(parsed)
    roles: tuple[Role, ...] = ("train", "val")
    if source is not None and "--data.val" not in given:
        alone = not has_split(source, "val")
        keys["val"], roles = (source, ("train",)) if alone else (None, roles)
    keys["tokenizer"] = keys["tokenizer"] or None
    accumulate = parsed.trainer.accumulate_grad_batches
    with silenced(datamodules.__name__):  # the findings say it all, but for the progress of reading
        return diagnose(PreferenceDataModule(**keys), roles=roles, accumulate=accumulate)


def _names(settings: Sequence[str]) -> set[str]:
    """The options that are given, without their values."""
    return {"--config" if name == "-c" else name for name in (argument.partition("=")[0] for argument in settings)}


def _free_file(name: str) -> Path:
    """A path that a file can be written to, refused before the work where it cannot."""
    path = Path(name)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{name} is a directory; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _data_keys(parsed: Namespace) -> dict:
    name = parsed.data.class_path.rpartition(".")[2]
    if name != PreferenceDataModule.__name__:
        raise ConfigurationError(f"data: doctor examines preference pairs (PreferenceDataModule), not {name}")
    return dict(parsed.data.init_args)
