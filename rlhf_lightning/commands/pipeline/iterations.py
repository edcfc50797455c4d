"""Stages that are repeated, each time on the policy that the time before made: their order and their report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rlhf_lightning.commands.pipeline.stages import Stage
from rlhf_lightning.commands.rows import NUMBERS, kept
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.files.disks import write_whole

_SHOWN = {
    *("accuracy", "consistency", "right", "wrong", "unreadable", "cut", "sft_rows", "dpo_rows"),
    *("rows", "reward", "best_of_n", "response_length"),
    *("val/loss", "val/rewards/accuracies", "val/kl", "val/reward", "val/reward_with_kl", "val/auroc", "val/accuracy"),
    *(f"policy/{name}" for name in ("reward_after", "reward_gain", "anchored_gain", "win_rate", "kl_nats")),
}
"""What the table shows of the numbers of a stage; the JSON file holds all."""
_SHOWN_OF_SETS = ("/accuracy", "/consistency")
"""Of a judge, on each of the sets that it is measured on."""

REPORT = ("iterations.json", "iterations.md", "iterations.html")


def planned(iterated: Mapping[str, bool], iterations: int) -> Iterator[tuple[str, int | None]]:
    """The stages in the order in which they run, each with its iteration, from 1, or None.

    `iterated` says of each stage whether it is repeated. Raises `ConfigurationError` where no stage is, or one between
    them is not.
    """
    names = list(iterated)
    loop = [number for number, name in enumerate(names) if iterated[name]]
    if not loop:
        if iterations > 1:
            raise ConfigurationError("pipeline: iterations: no stage is repeated; give some of them `iterated: true`")
        yield from ((name, None) for name in names)
        return
    first, last = loop[0], loop[-1]
    if apart := [name for name in names[first:last] if not iterated[name]]:
        raise ConfigurationError(
            f"pipeline: stage {apart[0]} stands between stages that are iterated, and is not; move it, or give it "
            "`iterated: true`"
        )
    yield from ((name, None) for name in names[:first])
    yield from ((name, number) for number in range(1, iterations + 1) for name in names[first : last + 1])
    yield from ((name, None) for name in names[last + 1 :])


def filled(argument: str, stage: str, *, iteration: int | None, start: str | None, policy: str | None) -> str:
    """An argument with `{policy}`, `{start}` and `{iteration}` replaced. `ConfigurationError` where there is none."""
    values = {"policy": policy, "start": start, "iteration": iteration}
    for name, value in values.items():
        if f"{{{name}}}" in argument and value is None:
            why = "is for stages that are iterated" if name == "iteration" else "needs the pipeline's key `policy`"
            raise ConfigurationError(f"pipeline: stage {stage}: {{{name}}} in {argument!r} {why}")
        argument = argument.replace(f"{{{name}}}", str(value))
    return argument


def policy_of(stage: Stage) -> str | None:
    """The directory of the policy that a stage exports; None for other commands, and for a reward model."""
    trained = str(stage.settings.get("model.class_path")).rpartition(".")[2]
    return stage.outputs[-1] if stage.command == "fit" and stage.outputs and trained != "RewardModel" else None


def numbers_of(stage: Stage, results: str) -> dict[str, float]:
    """What a stage that is done measured, by name; `results` is what it printed."""
    if stage.command in ("generate", "contrast"):
        return json.loads((kept(Path(stage.outputs[0])) / NUMBERS).read_text(encoding="utf-8"))
    if stage.command in ("evaluate", "judge"):
        found = json.loads((Path(stage.outputs[0]) / "metrics.json").read_text(encoding="utf-8"))["metrics"]
        values = {name: each["value"] if isinstance(each, dict) else each for name, each in found.items()}
        return {name: float(value) for name, value in values.items() if value is not None}
    checkpoint = re.search(r"^checkpoint: +(\S.*)$", results, re.MULTILINE)
    if checkpoint is None:
        return {}
    from rlhf_lightning.training.checkpoints import metrics_of, read_checkpoint

    measured = metrics_of(read_checkpoint(checkpoint[1], weights=False))
    return {f"val/{name}": float(value) for name, value in measured.items()}


def write_report(home: Path, stages: Sequence[Stage], numbers: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Write `iterations.json`, `.md` and `.html`, a row for each iteration; returns them as lines.

    `numbers` are those of the stages by their names; what an iteration has not run yet is left out.
    """
    from rlhf_lightning.evaluation.blocks import Column, Document, Section, Table
    from rlhf_lightning.report.pages import to_html, to_markdown

    rows: dict[int, dict[str, float]] = {}
    policies: dict[int, str] = {}
    for stage in stages:
        if stage.iteration is not None:
            row = rows.setdefault(stage.iteration, {})
            row |= {f"{stage.base}: {name}": value for name, value in numbers.get(stage.name, {}).items()}
            policies[stage.iteration] = policy_of(stage) or policies.get(stage.iteration, "")
    measured = dict.fromkeys(name for row in rows.values() for name in row)
    columns = [name for name in measured if name.partition(": ")[2] in _SHOWN or name.endswith(_SHOWN_OF_SETS)]
    table = Table(
        ["iteration", *(Column(name, ".4g") for name in columns), "policy"],
        [[str(number), *(row.get(name) for name in columns), policies[number]] for number, row in rows.items()],
        "generate and judge: of the policy that the iteration began with; fit and evaluate: of the one that it made",
    )
    document = Document("Iterations", [Section("What each iteration measured", [table])])
    found = [{"iteration": number, "policy": policies[number], "numbers": row} for number, row in rows.items()]
    contents = (json.dumps(found, indent=1) + "\n", to_markdown(document), to_html(document))
    for name, content in zip(REPORT, contents, strict=True):
        write_whole(home / name, content)
    shown = {i: ", ".join(f"{name} {row[name]:.4g}" for name in columns if name in row) for i, row in rows.items()}
    lines = [f"{number}: {words or 'no numbers'}; {policies[number]}" for number, words in shown.items()]
    return [*lines, f"report:  {home / REPORT[-1]}"]
