"""The command itself: its arguments, the stages in their order, its exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from rlhf_lightning.commands.pipeline.board import Board
from rlhf_lightning.commands.pipeline.description import Pipeline, Stage, read_pipeline
from rlhf_lightning.commands.pipeline.inputs import inputs_of, own_code
from rlhf_lightning.commands.pipeline.processes import Terminated, server, terminated
from rlhf_lightning.commands.pipeline.settings import check_order, resolve
from rlhf_lightning.commands.pipeline.stage import run_stage
from rlhf_lightning.commands.pipeline.state import State
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.files.locks import alone
from rlhf_lightning.terminal import say

_USAGE = """rlhf-lightning pipeline --config FILE.yaml [--STAGE.KEY VALUE ...] [--again STAGE] [--only STAGE]

Runs the stages of a file after each other, each in a process of its own. A stage is a `fit` or an `evaluate` with its
configuration. A stage that was done is not run again while nothing that it was made from has changed: its settings,
the files and directories that they name (by content), this program, and while what it wrote is as it left it. A `fit`
that was broken off goes on from its last checkpoint.

--config        the file: `directory`, where state and logs are kept, and `stages`, in their order, each with its
                `command`, its `config` (a path relative to the file, or a list of them) and perhaps `set`, its keys
--STAGE.KEY     a key of one stage, as on its own command line: --ppo.model.kl_coef 0.1
--directory     another place for state and logs
--again STAGE   run it from its beginning, though nothing has changed; may be given several times
--only STAGE    run no other stage

Exit code 0: all stages are done, 2: the file or a setting cannot be used, 128 and the number of a signal (Ctrl-C: 130,
SIGTERM: 143): interrupted; the same command goes on. Else that of the stage which failed.
"""


def run(arguments: Sequence[str]) -> int:
    """Run the stages that have something to do, and return the exit code. Raises `UserError`."""
    parser = _Arguments(prog="rlhf-lightning pipeline", usage=_USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config")
    parser.add_argument("--directory")
    parser.add_argument("--again", action="append", default=[])
    parser.add_argument("--only")
    parser.add_argument("-h", "--help", action="store_true")
    own, rest = parser.parse_known_args(list(arguments))
    if own.help:
        print(_USAGE, end="")
        return 0
    if own.config is None:
        raise ConfigurationError("pipeline: give the --config of a pipeline, such as configs/quickstart.yaml")
    pipeline = read_pipeline(own.config, directory=own.directory, overrides=rest)
    names = [stage.name for stage in pipeline.stages]
    for flag, name in [("--again", name) for name in own.again] + [("--only", own.only)]:
        if name is not None and name not in names:
            raise ConfigurationError(f"pipeline: {flag} {name}: no such stage; the stages are {', '.join(names)}")
    with terminated():
        try:
            return _run(pipeline, again=own.again, only=own.only)
        except KeyboardInterrupt:
            code = 130
        except Terminated as terminated_by:
            code = 128 + terminated_by.number
    say("rlhf-lightning: interrupted; the same command goes on from here", file=sys.stderr)
    return code


def _run(pipeline: Pipeline, *, again: Sequence[str], only: str | None) -> int:
    code = own_code()  # as it is when the server imports it
    context = server()
    resolved = resolve(pipeline.stages, context)
    check_order(pipeline.stages, resolved)
    busy = f"{pipeline.directory}: another pipeline is running there; wait for its end, or give another --directory"
    with alone(pipeline.directory / "lock", busy):
        state = State(pipeline.directory / "state.json")
        stages = [stage for stage in pipeline.stages if only in (None, stage.name)]
        with Board(f"{pipeline.file}: {', '.join(stage.name for stage in stages)}", stages) as board:
            for stage in stages:
                board.show(stage.name, "looking")
                inputs = inputs_of(stage, resolved[stage.name], state.contents, code)
                ended = run_stage(
                    stage,
                    resolved[stage.name],
                    inputs,
                    state,
                    board,
                    context,
                    again=again,
                )
                if ended != 0:
                    return ended
        _print_results(stages, state, pipeline.directory)
    return 0


class _Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"pipeline: {message}; see rlhf-lightning pipeline --help")


def _print_results(stages: Iterable[Stage], state: State, directory: Path) -> None:
    """What each stage printed in the end, and where state and logs lie."""
    for stage in stages:
        say(f"\n== {stage.name}\n{state.records[stage.name].results.strip()}")
    say(f"\nlogs and state: {directory}")
