"""The command itself: its arguments, the stages in their order, its exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_lightning.commands.pipeline.iterations import write_report
from rlhf_lightning.commands.pipeline.parsing import (
    Settings,
    parse_layers,
    read_stages,
    refuse_duplicates,
    remember,
    split_arguments,
)
from rlhf_lightning.commands.pipeline.processes import Terminated, terminated
from rlhf_lightning.commands.pipeline.runs import StageFailed, State, run_stage
from rlhf_lightning.commands.pipeline.stages import Stage, check_order
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.files.locks import alone
from rlhf_lightning.terminal import Terminal, say

_USAGE = """rlhf-lightning pipeline --config FILE.yaml [--config OVERLAY.yaml ...] [--STAGE.KEY VALUE ...]
       [--again STAGE] [--only STAGE]

Runs the stages of a file after each other, each in a process of its own. A stage that was done is not run again while
nothing that it was made from has changed: its settings, the files and directories that they name (by content), this
program, and while what it wrote is as it left it. An interrupted `fit` resumes from its last checkpoint.
--STAGE.KEY is a key of one stage, as on its own command line: --ppo.model.kl_coef 0.1
A further --config changes or adds stages: {stages: {ppo: {set: {model.kl_coef: 0.1}}}}

With `iterations: k` the stages that are `iterated: true` are repeated, as STAGE_1 to STAGE_k. In their keys,
`{iteration}` is its number, `{policy}` the policy that the `fit` of the iteration before exported, the first being that
of the key `policy`, which is `{start}` in all. iterations.html in the directory has a row for each.

Exit code 0: all stages are done, 2: the file or a setting cannot be used, 128 and the number of a signal (Ctrl-C: 130,
SIGTERM: 143): interrupted; the same command resumes. Else that of the stage which failed.
"""


def run(arguments: Sequence[str]) -> int:
    """Run the stages that have something to do, and return the exit code. Raises `UserError`."""
    own, of_stages = split_arguments(arguments)
    settings = parse_layers(_USAGE, own)
    refuse_duplicates(own)
    try:
        with terminated():
            _run(settings, read_stages(settings, of_stages))
    except Terminated as termination:
        say("rlhf-lightning: interrupted; the same command resumes from here", file=sys.stderr)
        return 128 + termination.number
    except StageFailed as failure:
        say(f"rlhf-lightning: error: {failure}", file=sys.stderr)
        return failure.code
    return 0


def _run(settings: Settings, stages: Sequence[Stage]) -> None:
    names = [stage.name for stage in stages]
    again = [settings.again] if isinstance(settings.again, str) else settings.again
    for name in again if settings.only is None else [*again, settings.only]:
        if name not in names:
            raise ConfigurationError(f"pipeline: no stage is named {name}; the stages are {', '.join(names)}")
    check_order(stages)
    home = Path(settings.directory).expanduser()
    busy = f"{home}: another pipeline is running there; wait for its end, or give another --directory"
    with alone(home / "lock", busy):
        state = State(home / "state.json")
        remember(stages, home)
        chosen = [stage for stage in stages if settings.only in (None, stage.name)]
        with Terminal().status("", refresh_per_second=1) as status:
            for stage in chosen:
                run_stage(stage, state, status, again=stage.name in again)
    for stage in chosen:
        say(f"\n== {stage.name}\n{state.records[stage.name].results}")
    if any(stage.iteration for stage in stages):
        rows = write_report(home, stages, {name: record.numbers for name, record in state.records.items()})
        say("\n".join(["\n== iterations", *rows]))
    say(f"\nlogs and state: {home}")
