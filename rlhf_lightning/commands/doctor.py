"""The command `doctor`: the settings of a run, or a source alone, and the findings on its data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.commands.settings import Arguments, spare_inputs
from rlhf_lightning.errors import ConfigurationError, DataError
from rlhf_lightning.files.disks import write_whole
from rlhf_lightning.terminal import Terminal, say, silenced

if TYPE_CHECKING:
    from rlhf_lightning.data.doctor import Diagnosis
    from rlhf_lightning.data.roles import Role

_DESCRIPTION = """What is in preference pairs, rows for SFT or judged responses: a judgement, rows left out and why,
columns not used, lengths and what max_length cuts, padding, copies and contradictions, prompts on both sides, length
bias, how many responses are good, and examples as the model gets them.

SOURCE (a file, a directory or a hub name) is examined alone, with the settings of the configuration if there is one, or
against the pairs of --data.val; without SOURCE, the training and validation pairs of the configuration or of
--data.train. Exit code 0: every row can be used, 1: some would be left out, 2: the data or the settings cannot be used.
"""


def run(arguments: Sequence[str]) -> int:
    """Print the findings, write the files that are asked for, and return the exit code. Raises `UserError`."""
    arguments = list(arguments)
    source = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    parser = Arguments("doctor", "[SOURCE] [--config FILE.yaml] [--data.KEY VALUE ...]", _DESCRIPTION)
    parser.add_argument("--json", type=_free_file, metavar="FILE", help="write the findings to a file")
    parser.add_argument("--html", type=_free_file, metavar="FILE", help="write them as a page")
    own, settings = parser.parse_known_args(arguments)
    given = _names(settings)
    if source is None and given.isdisjoint({"--config", "--data.train"}):
        raise ConfigurationError("doctor: give a SOURCE, --data.train, or the --config of a run")
    if source is not None and "--data.train" in given:
        raise ConfigurationError(f"doctor: {source} and --data.train are both given; leave one of them out")
    spare_inputs("doctor", filter(None, (own.json, own.html)), (source, *settings))
    from rlhf_lightning.report.doctor import html_page, print_diagnosis

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
    from rlhf_lightning.commands import fit as program
    from rlhf_lightning.data import datamodules
    from rlhf_lightning.data.doctor import diagnose
    from rlhf_lightning.data.sft_datamodule import SFTDataModule
    from rlhf_lightning.data.sources import has_split
    from rlhf_lightning.data.unpaired_datamodule import UnpairedDataModule

    given = _names(settings)
    if "--config" not in given:
        # The parser wants a model; the doctor looks at none.
        model = ["--model", "RewardModel", "--model.backbone", ""]
        train = source if source is not None else _value(settings, "--data.train")
        kind = _data_module_for(train)
        settings = ["--seed_everything", "false", *model, "--data", kind, *settings]
    if source is not None:
        settings = [*settings, "--data.train", source]
    parsed = program.run(["fit", *settings], program=program.ParsedRun).settings
    name = parsed.data.class_path.rpartition(".")[2]
    modules = {each.__name__: each for each in (datamodules.PreferenceDataModule, SFTDataModule, UnpairedDataModule)}
    if name not in modules:
        raise ConfigurationError(f"data: doctor examines the rows of {', '.join(modules)}, not of {name}")
    keys = dict(parsed.data.init_args)
    roles: tuple[Role, ...] = ("train", "val")
    if source is not None and "--data.val" not in given:
        alone = not has_split(source, "val")
        keys["val"], roles = (source, ("train",)) if alone else (None, roles)
    keys["tokenizer"] = keys["tokenizer"] or None
    accumulate = parsed.trainer.accumulate_grad_batches
    with silenced(datamodules.__name__):  # the findings say it all, but for the progress of reading
        return diagnose(modules[name](**keys), roles=roles, accumulate=accumulate)


def _value(settings: Sequence[str], name: str) -> str:
    """What an option is given."""
    given = [argument.partition("=")[2] for argument in settings if argument.startswith(f"{name}=")]
    return given[-1] if given else settings[settings.index(name) + 1] if name in settings[:-1] else ""


def _data_module_for(source: str) -> str:
    """The data module that the first row of a source is for; what cannot be read is the reader's to say."""
    from rlhf_lightning.data.sft import is_sft_row
    from rlhf_lightning.data.sources import read_rows
    from rlhf_lightning.data.unpaired import is_labelled_row

    try:
        row = next(read_rows(source)).values
    except (DataError, StopIteration):
        return "PreferenceDataModule"
    if is_labelled_row(row):
        return "UnpairedDataModule"
    return "SFTDataModule" if is_sft_row(row) else "PreferenceDataModule"


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
