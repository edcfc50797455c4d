"""The command `evaluate`: judges models that are there, without training, and writes the report."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_lightning.commands.quiet import quieten
from rlhf_lightning.commands.settings import parse_settings, spare_inputs
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.evaluation.benchmarks import BENCHMARKS
from rlhf_lightning.evaluation.benchmarks.base import write_official_files
from rlhf_lightning.evaluation.ranks import Ranks, device_of, run_together
from rlhf_lightning.evaluation.results import EvaluationResults, as_plain, metrics
from rlhf_lightning.evaluation.run import check, evaluate
from rlhf_lightning.evaluation.settings import EvaluationSettings
from rlhf_lightning.evaluation.verdicts import verdicts
from rlhf_lightning.files.disks import write_whole
from rlhf_lightning.report.console import print_summary
from rlhf_lightning.report.pages import to_html, to_markdown
from rlhf_lightning.report.sections import report
from rlhf_lightning.terminal import say

log = logging.getLogger(__name__)

FORMAT = 1
"""Of metrics.json; goes up when a name changes its meaning."""

FILES = ("metrics.json", "samples.jsonl", "scores.jsonl", "report.md", "report.html")
MODEL_KEYS = ("reward_model", "held_out_reward_model", "policy", "reference", "judge")

_USAGE = """rlhf-lightning evaluate --config FILE.yaml [--config OVERLAY.yaml] [--KEY VALUE ...]

Judges a reward model, a policy before and after training, or both, and writes metrics.json, samples.jsonl,
scores.jsonl, report.md, report.html and RewardBench's own result files into --out. What is not given is not measured.
A model is a directory, a hub name, or a checkpoint (.ckpt), which is exported first. An evaluation that was killed
resumes where it was.
"""


def run(arguments: Sequence[str]) -> int:
    """Evaluate, write, print the verdicts, and return the exit code. Raises `UserError`."""
    quieten()
    settings = parse(arguments)
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise ConfigurationError(f"out: {out} is a file; name a directory")
    if settings.out in ("", "null"):
        raise ConfigurationError("out: a report needs a directory; name one")
    spare_inputs("evaluate", (out / name for name in FILES), vars(settings).values())
    check(settings)
    busy = f"out: {out}: another evaluation is writing there; wait for its end, or give another directory"
    lock = out / "kept" / ".lock"
    run_together(device_of(settings.device), settings.devices, lock, busy, partial(_run, settings, out))
    return 0


def _run(given: EvaluationSettings, out: Path, ranks: Ranks) -> None:
    """In each of the processes, of which the first one writes and prints."""
    settings = ranks.once(lambda: _prepared(given, out))
    results = evaluate(settings, ranks)
    if ranks.rank == 0:
        if exported := [key for key in MODEL_KEYS if getattr(given, key) != getattr(settings, key)]:
            results.provenance["checkpoints"] = [f"{key}: {getattr(given, key)}" for key in exported]
        write(results, settings)
        print_summary(results)
        say(f"report:  {out / 'report.html'}")
        say(f"numbers: {out / 'metrics.json'}")


def parse(arguments: Sequence[str]) -> EvaluationSettings:
    """The settings of a command line. Raises `UserError`, and SystemExit after `--help` or `--print_config`."""
    return parse_settings(EvaluationSettings, "evaluate", _USAGE, arguments)


def _prepared(settings: EvaluationSettings, out: Path) -> EvaluationSettings:
    for name in FILES:  # an evaluation that is killed must not leave those of another one
        (out / name).unlink(missing_ok=True)
    return _exported(settings, out)


def _exported(settings: EvaluationSettings, out: Path) -> EvaluationSettings:
    """Checkpoints replaced by directories that they were exported to."""
    for key in MODEL_KEYS:
        name = getattr(settings, key)
        if isinstance(name, str) and name.endswith(".ckpt"):
            from rlhf_lightning.commands.export import run as export  # imports Lightning, seconds for one checkpoint

            directory = str(out / "exported" / key)
            export(["--ckpt_path", name, "--out", directory])
            changed: dict[str, Any] = {key: directory}
            settings = replace(settings, **changed)
    return settings


def write(results: EvaluationResults, settings: EvaluationSettings) -> None:
    """All files of a report, each put in its place when it is whole."""
    out = Path(settings.out)
    document = report(results)
    numbers = {
        "format": FORMAT,
        "metrics": as_plain(metrics(results)),
        "verdicts": as_plain(verdicts(results)),
        "notes": results.notes,
        "provenance": results.provenance,
        "details": _details(results),
    }
    rows = [] if results.policies is None else [*results.policies.prompts, *results.policies.refusal_prompts]
    contents = (
        json.dumps(numbers, indent=2, allow_nan=False) + "\n",
        "".join(json.dumps(as_plain(row), allow_nan=False) + "\n" for row in rows),
        "".join(json.dumps(row, allow_nan=False) + "\n" for row in _score_rows(results)),
        to_markdown(document),
        to_html(document),
    )
    for name, content in zip(FILES, contents, strict=True):
        write_whole(out / name, content)
    _official(results, out)


def _score_rows(results: EvaluationResults) -> Iterator[dict[str, Any]]:
    """Every pair and every row of a benchmark with the scores of its responses, the correct ones first.

    Of an ensemble with their `spreads`, the standard deviations over the heads.
    """
    for scorer in results.scorers:
        if (of := scorer.scores) is not None:
            none: list[list[float]] = [[]] * len(of.ids)
            spreads = none if of.spreads is None else of.spreads.tolist()
            columns = (of.ids, of.sources, of.chosen.tolist(), of.rejected.tolist(), spreads)
            for name, source, chosen, rejected, own in zip(*columns, strict=True):
                found = {"id": name, "source": source, "scores": [chosen, rejected]}
                yield {"scorer": scorer.title, "data": "pairs", **found} | ({"spreads": own} if own else {})
        for data, result in scorer.benchmarks.items():
            for row in result.score_rows():
                found = {"id": row.id, "source": row.subset, "scores": row.scores}
                yield {"scorer": scorer.title, "data": data, **found} | ({"spreads": row.spreads} if row.heads else {})


def _details(results: EvaluationResults) -> dict[str, Any]:
    """The results without what other files hold: rows, responses and curves."""
    plain = {"scorers": as_plain(results.scorers), "judges": as_plain(results.judges)}
    for kind, group in (("scorer", plain["scorers"]), ("judge", plain["judges"])):
        for found in group:
            found.pop("scores", None)
            measured = found.pop("benchmarks")
            for benchmark in BENCHMARKS:
                if benchmark.taken_by == kind:
                    found[benchmark.name] = one = measured.get(benchmark.name)
                    for rows in ("rows", "given") if one is not None else ():
                        one.pop(rows, None)
    if results.policies is not None:
        plain["policies"] = as_plain(results.policies)
        plain["policies"].pop("prompts")
        plain["policies"].pop("refusal_prompts")
    return plain


def _official(results: EvaluationResults, out: Path) -> None:
    """The benchmarks' own result files, of whole benchmarks."""
    for scorer in results.scorers:
        for result in scorer.benchmarks.values():
            if result.whole:
                write_official_files(out, result, model=_official_name(scorer.name))


def _official_name(name: str) -> str:
    """`org/model` of a hub name or of a directory."""
    parts = [re.sub(r"[^\w.-]", "-", part).lstrip(".") for part in Path(name).expanduser().parts]
    parts = [part for part in parts if part]
    return "/".join(parts[-2:]) if len(parts) > 1 else f"local/{parts[0]}"
