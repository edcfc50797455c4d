"""The command `judge`: judgements of pairs, what is measured of them, and the rows that a better judge learns from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt

from rlhf_lightning.commands.quiet import quieten
from rlhf_lightning.commands.rows import as_lines
from rlhf_lightning.commands.settings import parse_settings
from rlhf_lightning.data.examples import OnBadRows, PreferenceExample
from rlhf_lightning.data.preferences import load_preferences
from rlhf_lightning.data.sources import Source
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.evaluation.benchmarks.base import BenchmarkRow, score_rows
from rlhf_lightning.evaluation.estimates import Quantity
from rlhf_lightning.evaluation.ranks import Ranks, check_devices, device_of, run_together
from rlhf_lightning.evaluation.results import as_plain
from rlhf_lightning.evaluation.self_taught.contrast import uncontaminated
from rlhf_lightning.evaluation.self_taught.judgements import ORDERS, EarlyStop, Judging, Ordered
from rlhf_lightning.evaluation.self_taught.replies import Asking
from rlhf_lightning.evaluation.self_taught.selection import Keep, Selection
from rlhf_lightning.evaluation.self_taught.table import JudgeTable, agreement, judge_numbers
from rlhf_lightning.evaluation.settings import Dtype, TopP
from rlhf_lightning.files.disks import write_whole
from rlhf_lightning.report.pages import to_html, to_markdown
from rlhf_lightning.report.wording import with_interval
from rlhf_lightning.rewards.functions import reward_scorer
from rlhf_lightning.rewards.questions import read_template
from rlhf_lightning.rewards.writers import Sampling, load_writer
from rlhf_lightning.terminal import say

FILES = ("judgements.jsonl", "metrics.json", "report.md", "report.html", "sft.jsonl", "dpo.jsonl")

_USAGE = """rlhf-lightning judge --judge MODEL --pairs FILE --out DIRECTORY

A language model judges pairs, several times and in both orders. Judgements that agree with the pairs' labels become
rows that a judge learns from: sft.jsonl for `SFT`, dpo.jsonl for `DPO`. How often it is right, and how often its
verdict changes with the order, is in metrics.json and the report. A run that was killed resumes.
"""


@dataclass(frozen=True)
class JudgeSettings:
    """What is judged, by whom, and what is kept of it.

    Args:
        judge: A causal language model (directory, whole or LoRA adapters alone; hub name; GGUF file), the http://
            address of a server with OpenAI's routes, or `module:function` of yours, which takes conversations and seeds
            and gives a text for each.
        pairs: Preference pairs, such as those of `contrast`: a file, a directory or a hub data set.
        out: Directory of the rows and the report. The replies are kept there.
        held_out: Further pairs by the names under which they are reported, each a file, a directory or a hub data set:
            what the judge is measured on. One judgement of each order, the most likely one. Pairs with the same
            prompts, or 13 words in a row of one, make no rows.
        template: A text file with the question, in which `{conversation}` and `{answers}` are replaced, and `{choices}`
            by the letters; or `builtin:short`, which asks for a verdict alone. Use the same one wherever this judge is
            asked.
        num_judgements: Most judgements of a pair in each order.
        rate_judgements: So many judgements every question gets, and rates are of these alone.
        early_stop: Sample further judgements of a question until there is a `right` one, until there are `both`, a
            right and a wrong one, or `never` stop before num_judgements.
        keep: `right`, what agrees with the pair's label; `readable`, whatever the verdict.
        min_right: Least share of right judgements among the first of a question from which one is kept.
        max_wrong: A pair that is called wrong in more than this share of the first judgements, in both orders, makes
            no row and is listed in the report; 1 doubts none.
        keep_thinking: Rows hold a thinking block as well, not what follows it alone.
        reward_model: A reward model whose agreement with the judge is measured.
        temperature: Sampling temperature; 0 takes the most likely tokens.
        top_p: Sample from the fewest most likely tokens whose probabilities add up to this or more; 1 keeps all.
        max_new_tokens: Longest judgement, in tokens. A longer one is cut, and is no judgement.
        split: Which files of a directory or hub data set are judged; of held-out ones always `val`.
        max_pairs: The first so many pairs of each source.
        on_bad_rows: `error` refuses pairs with unusable rows and names them; `drop` leaves such rows out.
        batch_size: Judgements sampled at a time; changes no row, but for rounding.
        device: Such as `cpu` or `cuda`; a GPU where there is one when not given.
        devices: Processes on this machine, each with a device of its own and a share of the questions.
        dtype: Dtype of the weights and arithmetic.
        seed: Seed of the sampling. A judgement depends on the seed, its question and its number alone.
        trust_remote_code: Run code that comes with models.
    """

    judge: str
    pairs: Source
    out: str
    held_out: dict[str, str] | None = None
    template: str | None = None
    num_judgements: PositiveInt = 15
    rate_judgements: PositiveInt = 4
    early_stop: EarlyStop = "right"
    keep: Keep = "right"
    min_right: ClosedUnitInterval = 0.0
    max_wrong: ClosedUnitInterval = 0.9
    keep_thinking: bool = True
    reward_model: str | None = None
    temperature: NonNegativeFloat = 0.7
    top_p: TopP = 0.9
    max_new_tokens: PositiveInt = 1024
    split: Literal["train", "val", "test"] = "train"
    max_pairs: PositiveInt | None = None
    on_bad_rows: OnBadRows = "error"
    batch_size: PositiveInt = 16
    device: str | None = None
    devices: PositiveInt = 1
    dtype: Dtype = "float32"
    seed: NonNegativeInt = 0
    trust_remote_code: bool = False

    @property
    def rate(self) -> int:
        """Judgements that every question gets."""
        return min(self.rate_judgements, self.num_judgements)


def run(arguments: Sequence[str]) -> int:
    """Judge, write, say what was measured, and return the exit code. Raises `UserError`."""
    quieten()
    settings = parse(arguments)
    if settings.num_judgements > 1 and settings.temperature == 0:
        raise ConfigurationError("temperature: at 0 all judgements of a question are the same; set num_judgements to 1")
    device, out = device_of(settings.device), Path(settings.out)
    if out.exists() and not out.is_dir():
        raise ConfigurationError(f"out: {out} is not a directory; name one for the rows and the report")
    check_devices(device, settings.devices)
    busy = f"out: {out}: another process is writing there; wait for its end, or give another directory"
    run_together(device, settings.devices, out / "kept" / ".lock", busy, partial(_run, settings))
    return 0


def parse(arguments: Sequence[str]) -> JudgeSettings:
    """The settings of a command line. Raises `UserError`, and SystemExit after `--help` or `--print_config`."""
    return parse_settings(JudgeSettings, "judge", _USAGE, arguments)


def _run(settings: JudgeSettings, ranks: Ranks) -> None:
    out = Path(settings.out)
    loaded = _load(settings, settings.pairs, settings.split)
    held_out = {name: _load(settings, source, "val") for name, source in (settings.held_out or {}).items()}
    pairs = uncontaminated(loaded, [pair for own in held_out.values() for pair in own])
    if not pairs:
        raise ConfigurationError(f"judge: the prompts of all {len(loaded)} pairs are held out; give other pairs")
    judging = _judging(settings, ranks)
    ordered = judging.judge(pairs)
    greedy = replace(judging, writer=judging.writer.sampling(Sampling(settings.max_new_tokens)), samples=1, rate=1)
    doubted = judging.doubted(ordered)
    training = judge_numbers(ordered, settings.rate)
    if settings.reward_model is not None:
        training |= _agreement(settings, settings.reward_model, ordered, ranks)
    others = {name: judge_numbers(greedy.judge(own, name), 1) for name, own in held_out.items()}
    table = JudgeTable(
        judging.writer.name,
        training | {"doubted": len(doubted), "contaminated": len(loaded) - len(pairs)},
        others,
        [one for one in ordered if one.key in doubted and one.order == 0],
    )
    if ranks.rank == 0:
        for name in FILES:  # a run that is killed must not leave those of another one
            (out / name).unlink(missing_ok=True)
        write_whole(out / FILES[0], as_lines([row for one in ordered for row in _rows(one)]))
        _report(out, table)
        _write_rows(settings, out, table, ordered, doubted)


def _load(settings: JudgeSettings, source: Source, split: Literal["train", "val", "test"]) -> list[PreferenceExample]:
    return load_preferences(source, split=split, on_bad_rows=settings.on_bad_rows)[0][: settings.max_pairs]


def _judging(settings: JudgeSettings, ranks: Ranks) -> Judging:
    template = read_template(settings.template, "conversation", "answers")
    writer = load_writer(
        settings.judge,
        Sampling(settings.max_new_tokens, settings.temperature, settings.top_p),
        batch_size=settings.batch_size,
        device=ranks.device,
        dtype=getattr(torch, settings.dtype),
        trust_remote_code=settings.trust_remote_code,
    )
    asking = Asking(Path(settings.out) / "kept" / "replies.jsonl", settings.seed, 8 * settings.batch_size, ranks)
    return Judging(
        writer, asking, settings.num_judgements, settings.rate, settings.early_stop, settings.max_wrong, template
    )


def _agreement(settings: JudgeSettings, name: str, ordered: Sequence[Ordered], ranks: Ranks) -> dict[str, Quantity]:
    scorer = reward_scorer(name, batch_size=settings.batch_size, trust_remote_code=settings.trust_remote_code)
    pairs = {one.key: one.pair for one in ordered}
    rows = [
        BenchmarkRow(key, "pairs", pair.prompt, pair.responses, 1, pair.origin) for key, pair in sorted(pairs.items())
    ]
    scored = score_rows(scorer, rows, Path(settings.out) / "kept" / "scores.jsonl", ranks=ranks)
    return agreement(ordered, {row.id: row for row in scored}, settings.rate)


def _rows(one: Ordered) -> list[dict[str, object]]:
    about = {"key": one.key, "id": one.pair.example_id, "order": ORDERS[one.order]}
    return [about | asdict(judgement) for judgement in one.judgements]


def _report(out: Path, table: JudgeTable) -> None:
    document = table.document()
    numbers = {"judge": table.judge, "metrics": as_plain(table.metrics())}
    write_whole(out / "metrics.json", json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    write_whole(out / "report.md", to_markdown(document))
    write_whole(out / "report.html", to_html(document))


def _write_rows(
    settings: JudgeSettings, out: Path, table: JudgeTable, ordered: Sequence[Ordered], doubted: set[str]
) -> None:
    selection = Selection(settings.rate, settings.keep, settings.min_right, settings.keep_thinking, settings.seed)
    rows, letters = selection.sft(ordered, doubted)
    pairs = selection.dpo(ordered, doubted)
    write_whole(out / "sft.jsonl", as_lines(rows))
    write_whole(out / "dpo.jsonl", as_lines(pairs))
    counts: dict[str, Quantity] = {f"kept_{letter.lower()}": count for letter, count in sorted(letters.items())}
    counts |= {"sft_rows": len(rows), "dpo_rows": len(pairs)}
    whole = replace(table, training={**table.training, **counts})
    _report(out, whole)
    for name, numbers in {"training pairs": whole.training, **whole.held_out}.items():
        words = [f"{key} {with_interval(numbers[key])}" for key in ("accuracy", "consistency")]
        say(f"{name}: {', '.join(words)}")
    balance = ", ".join(f"{letter} {count}" for letter, count in sorted(letters.items()))
    say(f"{out / 'sft.jsonl'}: {len(rows)} rows ({balance} before balancing); {out / 'dpo.jsonl'}: {len(pairs)} pairs")
    say(f"report:  {out / 'report.html'}")
