"""RewardBench rows -> scores on disk -> a result: version 1 and Lite, the prior sets, and version 2.

A row is a prompt with its responses, the correct ones first; a pair is a row with two of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf_lightning.data.conversations import BadRow, check_prompt, prompt_messages
from rlhf_lightning.data.examples import Message
from rlhf_lightning.data.sources import Row, read_rows
from rlhf_lightning.errors import ConfigurationError, DataError, ModelError
from rlhf_lightning.evaluation.benchmarks.rewardbench import (
    LITE_NAME,
    LITE_SIZE,
    PRIOR_SETS,
    SECTIONS,
    SUBSETS,
    SUBSETS_2,
    TIES,
    RewardBench2Item,
    TiesFormula,
    best_of_score,
    coin_flip,
    is_right,
    lite_standard_error,
    lite_subset,
    official_section_scores,
    prior_sets_score,
    prompt_as_text,
    section_estimates,
    subset_estimates,
    ties_score,
    total_estimate,
    total_score,
)
from rlhf_lightning.evaluation.estimates import NORMAL_QUANTILE, Estimate, bootstrap, wilson
from rlhf_lightning.evaluation.ranks import ALONE, Ranks
from rlhf_lightning.evaluation.store import Ledger
from rlhf_lightning.files.disks import write_whole
from rlhf_lightning.rewards.scorers import ImplicitScorer, Scorer

log = logging.getLogger(__name__)

REWARDBENCH = "allenai/reward-bench:filtered"
REWARDBENCH_2 = "allenai/reward-bench-2:test"
PREFERENCE_TEST_SETS = "allenai/pref-test-sets"
"""Hub names of the data; a local copy serves as well."""

_ROWS_AT_A_TIME = 64
"""So many does each process score between two writes: what is lost when a run is cut off."""
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class BenchmarkRow:
    """A prompt and the responses to score."""

    id: str
    subset: str
    prompt: Sequence[Message]
    responses: Sequence[str]
    """The correct ones first; of a pair the chosen one."""
    num_correct: int
    origin: str
    """Where the row stands, for messages."""

    @property
    def key(self) -> str:
        """SHA-256 of all that is scored: the same texts are the same row, whatever its id."""
        parts = json.dumps([self.subset, prompt_as_text(self.prompt), *self.responses], ensure_ascii=False)
        return hashlib.sha256(parts.encode()).hexdigest()

    @property
    def pair(self) -> dict[str, Any]:
        """The columns that `lite_subset` reads."""
        chosen, rejected = self.responses
        return {"subset": self.subset, "prompt": self.prompt, "chosen": chosen, "rejected": rejected}


@dataclass(frozen=True, slots=True)
class RowScores:
    """What a scorer gave to the responses of a row, in their order."""

    id: str
    subset: str
    scores: list[float]
    tokens: list[int]
    """Of each response, terminator included."""
    truncated: list[bool]
    """Whether it, or rather the beginning of its prompt, was cut."""

    @property
    def margin(self) -> float:
        """Of a pair: chosen - rejected."""
        return self.scores[0] - self.scores[1]


@dataclass(frozen=True, slots=True)
class SectionTable:
    """Accuracies with their intervals, over pairs."""

    subsets: dict[str, Estimate]
    sections: dict[str, Estimate]
    """Sections of which some subset is present."""
    total: Estimate | None
    """Mean of the four sections; None while one is missing."""

    @classmethod
    def of(cls, subsets: dict[str, Estimate]) -> SectionTable:
        return cls(subsets, section_estimates(subsets), total_estimate(subsets))


@dataclass(frozen=True, slots=True)
class RewardBenchResult:
    """RewardBench, or RewardBench-Lite, of one scorer."""

    benchmark: str
    """`rewardbench` or `rewardbench-lite-v1`: numbers of the two are never to be compared."""
    scorer: str
    kind: str
    """RewardBench's `model_type`."""
    reference: str | None
    fingerprint: str
    table: SectionTable
    official_sections: dict[str, float]
    """As the official tool reports them: 0 for a section that is missing."""
    official_total: float
    accuracy: Estimate
    """Of all pairs alike, without weights: what the official command line calls accuracy."""
    lite_standard_error: float | None
    """Of the total as an estimate of that on all rows given; None when all were scored."""
    n_pairs: int
    n_ties: int
    """Pairs with equal scores; they count as wrong."""
    n_truncated: int
    """Pairs of which a row was too long."""
    available: dict[str, int]
    """Rows given of each subset, of which Lite takes some."""
    absent_subsets: list[str]
    short_subsets: dict[str, str]
    """Subsets with another number of rows than the benchmark's: `50 of 100`."""
    partial_sections: list[str]
    """Sections that lack a subset or rows."""
    baselines: dict[str, SectionTable]
    """The same pairs judged by length in characters, either way, and by a coin."""
    rows: list[RowScores]

    @property
    def complete(self) -> bool:
        """Whether the rows given are the whole benchmark."""
        return not self.partial_sections

    def coverage(self) -> str:
        """One line on what of the benchmark was there."""
        given, whole = sum(self.available.values()), sum(subset.pairs for subset in SUBSETS.values())
        text = f"{self.benchmark}: {self.n_pairs} pairs scored of {given} given"
        if self.complete:
            return text
        text += f", not the benchmark's {whole}: no RewardBench score; partial: {', '.join(self.partial_sections)}"
        if self.absent_subsets:
            text += f"; absent: {', '.join(self.absent_subsets)}"
        if self.short_subsets:
            text += f"; other counts: {', '.join(f'{name} {count}' for name, count in self.short_subsets.items())}"
        return text


@dataclass(frozen=True, slots=True)
class PriorSetsResult:
    """The preference test sets that were there before RewardBench."""

    scorer: str
    kind: str
    reference: str | None
    fingerprint: str
    sets: dict[str, Estimate]
    score: float | None
    """Plain mean of those of anthropic_helpful, anthropic_hhh, shp and summarize that are there."""
    absent_sets: list[str]
    n_ties: int
    n_truncated: int
    rows: list[RowScores]


@dataclass(frozen=True, slots=True)
class RewardBench2Result:
    """RewardBench 2 of one scorer."""

    scorer: str
    kind: str
    reference: str | None
    fingerprint: str
    ties_formula: TiesFormula
    subsets: dict[str, Estimate]
    """Over prompts; of the ties over pairs of prompts, `ref` and `tied`, at most 1.01."""
    total: Estimate | None
    """Unweighted mean of the six; None while one is missing."""
    absent_subsets: list[str]
    short_subsets: dict[str, str]
    n_prompts: int
    n_shared_best: int
    """Prompts, ties aside, whose correct response shares the highest score with others."""
    n_truncated: int
    """Prompts of which a row was too long."""
    rows: list[RowScores]


# ---- rows


def load_rewardbench(source: str | Path = REWARDBENCH) -> list[BenchmarkRow]:
    """Rows of RewardBench out of a file, a directory or a hub data set: prompt, chosen, rejected, subset and id.

    `prompt` is a text or a list of messages; a row without `id` is named after its place. Raises `DataError` when the
    source cannot be read or is empty, lacks a column, names an unknown subset, or gives an id twice in a subset.
    """
    rows = [_pair(row, row.values["subset"]) for row in _read(source, ("prompt", "chosen", "rejected", "subset"))]
    return _checked(source, rows, SUBSETS)


def load_prior_set(name: str, source: str | Path | None = None) -> list[BenchmarkRow]:
    """One of `PRIOR_SETS`, of the hub's data set, or of a file with the columns prompt, chosen and rejected.

    Raises `DataError` as `load_rewardbench` does.
    """
    source = f"{PREFERENCE_TEST_SETS}:{name}" if source is None else source
    rows = [_pair(row, name) for row in _read(source, ("prompt", "chosen", "rejected"))]
    return _checked(source, rows, PRIOR_SETS)


def load_rewardbench2(source: str | Path = REWARDBENCH_2) -> list[BenchmarkRow]:
    """Rows of RewardBench 2: prompt, chosen (list of texts), rejected (list of texts), num_correct, subset, id.

    Raises `DataError` as `load_rewardbench` does, and for a row with other numbers of responses than it says.
    """
    rows = []
    for row in _read(source, ("prompt", "chosen", "rejected", "num_correct", "subset", "id")):
        values = row.values
        chosen, rejected = (_texts(row, side) for side in ("chosen", "rejected"))
        several = values["subset"] == TIES
        if len(chosen) != values["num_correct"] or not rejected or not chosen or (len(chosen) > 1 and not several):
            raise DataError(
                f"{row.origin}: {len(chosen)} chosen and {len(rejected)} rejected responses, num_correct "
                f"{values['num_correct']}; each needs a rejected one, and one chosen (several in {TIES} alone)"
            )
        subset = _text(row, "subset")
        rows.append(
            BenchmarkRow(
                _id(row), subset, _messages(row), (*chosen, *rejected), num_correct=len(chosen), origin=row.origin
            )
        )
    return _checked(source, rows, SUBSETS_2)


def _read(source: str | Path, columns: Sequence[str]) -> Iterator[Row]:
    for row in read_rows(source, split="test"):
        if missing := [name for name in columns if name not in row.values]:
            raise DataError(
                f"{row.origin}: no column {', '.join(missing)}; it needs {', '.join(columns)}, and the columns found "
                f"are {', '.join(map(str, row.values))}"
            )
        yield row


def _pair(row: Row, subset: Any) -> BenchmarkRow:
    if not isinstance(subset, str):
        raise DataError(f"{row.origin}: subset is {subset!r}, not text")
    responses = tuple(_text(row, side) for side in ("chosen", "rejected"))
    return BenchmarkRow(_id(row), subset, _messages(row), responses, num_correct=1, origin=row.origin)


def _checked(source: str | Path, rows: list[BenchmarkRow], names: Mapping[str, Any]) -> list[BenchmarkRow]:
    """Refuse subsets that are none of `names`, and ids that stand twice in one subset."""
    if unknown := [row for row in rows if row.subset not in names]:
        raise DataError(
            f"{unknown[0].origin}: unknown subset {unknown[0].subset!r} ({len(unknown)} rows of {source} have one); "
            f"use one of {', '.join(names)}"
        )
    first: dict[tuple[str, str], BenchmarkRow] = {}
    for row in rows:
        if (other := first.setdefault((row.subset, row.id), row)) is not row:
            raise DataError(
                f"{row.origin}: the id {row.id!r} of {row.subset} stands already at {other.origin}; a pair counts once"
            )
    return rows


def _id(row: Row) -> str:
    own = row.values.get("id")
    return row.example_id if own is None or own == "" else str(own)


def _text(row: Row, column: str) -> str:
    value = row.values[column]
    if not isinstance(value, str):
        raise DataError(f"{row.origin}: {column} is {'null' if value is None else type(value).__name__}, not text")
    if _SURROGATE.search(value):
        raise DataError(f"{row.origin}: {column} holds half of a surrogate pair, which no tokenizer can read")
    return value


def _texts(row: Row, column: str) -> list[str]:
    value = row.values[column]
    if not (isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)):
        raise DataError(f"{row.origin}: {column} is no list of texts")
    return list(value)


def _messages(row: Row) -> list[Message]:
    """A text as one user's turn, whatever it looks like; a list as it is."""
    value = row.values["prompt"]
    if isinstance(value, str):
        return [{"role": "user", "content": _text(row, "prompt")}]
    try:
        messages = prompt_messages(value) if isinstance(value, list | tuple) else []
        if not messages:
            raise BadRow("wrong_type", "prompt is neither text nor a list of messages")
        check_prompt(messages)
    except BadRow as error:
        raise DataError(f"{row.origin}: {error}") from error
    return messages


def lite_rows(rows: Sequence[BenchmarkRow], size: int = LITE_SIZE) -> list[BenchmarkRow]:
    """The rows of RewardBench-Lite, in their order (see `lite_subset`)."""
    return [pair["row"] for pair in lite_subset([row.pair | {"row": row} for row in rows], size)]


# ---- scores


def score_rows(
    scorer: Scorer, rows: Sequence[BenchmarkRow], scores_file: str | Path | None = None, *, ranks: Ranks = ALONE
) -> list[RowScores]:
    """The scores of all responses, in the order of the rows, of which each of the processes scores a share.

    With a file, scores are appended to it as they come (see `Ledger`), under the scorer's fingerprint and the row's
    key; those that are in it are not computed again. Raises `DataError` for a file that holds something else, and
    `ModelError` for a score that is not finite.
    """
    keys = [row.key for row in rows]
    ledger = Ledger(scores_file, scorer.fingerprint, ("scores", "tokens", "truncated"), ranks)
    missing = list({key: place for place, key in enumerate(keys) if key not in ledger.known}.values())
    if len(missing) < len(set(keys)):
        log.info("%s: %d of %d rows are scored already", scores_file, len(set(keys)) - len(missing), len(set(keys)))
    # The longest first: what does not fit into memory fails at once.
    missing.sort(key=lambda place: -max(map(len, rows[place].responses)) - len(prompt_as_text(rows[place].prompt)))
    at_a_time = _ROWS_AT_A_TIME * ranks.size
    for start in range(0, len(missing), at_a_time):
        part = missing[start : start + at_a_time]
        scored = ranks.each(part, lambda places: _score(scorer, [rows[place] for place in places]))
        ledger.add({keys[place]: entry for place, entry in zip(part, scored, strict=True)})
    return [RowScores(row.id, row.subset, **ledger.known[key]) for row, key in zip(rows, keys, strict=True)]


def _score(scorer: Scorer, rows: Sequence[BenchmarkRow]) -> list[dict[str, list]]:
    """Scores, tokens and truncations of each row, in one call of the scorer."""
    prompts = [row.prompt for row in rows for _ in row.responses]
    scored = iter(scorer(prompts, [response for row in rows for response in row.responses]))
    found = []
    for row in rows:
        own = [next(scored) for _ in row.responses]
        if not all(math.isfinite(each.score) for each in own):
            raise ModelError(
                f"{scorer.name}: its scores of {row.origin} are {', '.join(str(each.score) for each in own)}, not "
                "finite; the model is damaged, or its dtype too narrow"
            )
        scores, tokens, truncated = (list(column) for column in zip(*own, strict=True))
        found.append({"scores": scores, "tokens": tokens, "truncated": truncated})
    return found


# ---- results


def run_rewardbench(
    scorer: Scorer,
    rows: Sequence[BenchmarkRow],
    *,
    size: int | Literal["full"] = "full",
    scores_file: str | Path | None = None,
    ranks: Ranks = ALONE,
) -> RewardBenchResult:
    """RewardBench, or with a `size` the Lite set of so many rows (see `lite_subset`). The rest: see `score_rows`.

    Raises what `score_rows` and `lite_subset` raise.
    """
    available = _counts(row.subset for row in rows)
    taken = list(rows)
    if size != "full":
        taken = lite_rows(rows, size)
    scored = score_rows(scorer, taken, scores_file, ranks=ranks)
    right = _right([(row.subset, *row.scores) for row in scored])
    subsets = subset_estimates(right)
    values = {name: estimate.value for name, estimate in subsets.items()}
    absent = [name for name in SUBSETS if name not in available]
    short = _short(available, {name: subset.pairs for name, subset in SUBSETS.items()})
    lengths = [(row.subset, *map(len, row.responses)) for row in taken]
    return RewardBenchResult(
        benchmark="rewardbench" if size == "full" else LITE_NAME,
        **_named(scorer),
        table=SectionTable.of(subsets),
        official_sections=official_section_scores(values),
        official_total=total_score(official_section_scores(values)),
        accuracy=wilson(sum(map(sum, right.values())), len(scored)),
        lite_standard_error=None if size == "full" else lite_standard_error(subsets, available),
        n_pairs=len(scored),
        n_ties=_ties(scored),
        n_truncated=_truncated(scored),
        available=available,
        absent_subsets=absent,
        short_subsets=short,
        partial_sections=[section for section, names in SECTIONS.items() if not {*absent, *short}.isdisjoint(names)],
        baselines={
            "longer wins": SectionTable.of(subset_estimates(_right(lengths))),
            "shorter wins": SectionTable.of(subset_estimates(_right([(name, -a, -b) for name, a, b in lengths]))),
            "coin flip": SectionTable.of(coin_flip({name: len(pairs) for name, pairs in right.items()})),
        },
        rows=scored,
    )


def total_difference(first: RewardBenchResult, second: RewardBenchResult) -> Estimate:
    """Total of the second less that of the first, over the same pairs: paired, so that their common luck cancels.

    Standard error sqrt(sum w^2 var(d) / n) over the subsets, d the difference of right and wrong of a pair.
    Raises `ConfigurationError` for results of other pairs, and for results without a total.
    """
    if [(row.id, row.subset) for row in first.rows] != [(row.id, row.subset) for row in second.rows]:
        raise ConfigurationError(f"{first.scorer} and {second.scorer} were not scored on the same pairs")
    if first.table.total is None or second.table.total is None:
        raise ConfigurationError(f"{first.benchmark}: a section is missing, so there is no total to compare")
    variance = 0.0
    for names in SECTIONS.values():
        present = [name for name in names if name in first.table.subsets]
        weights = sum(SUBSETS[name].weight for name in present)
        for name in present:
            pairs = zip(first.rows, second.rows, strict=True)
            change = [is_right(*b.scores) - is_right(*a.scores) for a, b in pairs if a.subset == name]
            variance += (SUBSETS[name].weight / weights / len(SECTIONS)) ** 2 * np.var(change) / len(change)
    value = second.table.total.value - first.table.total.value
    half = NORMAL_QUANTILE * math.sqrt(variance)
    return Estimate(value, value - half, value + half, first.n_pairs, method="paired standard error")


def run_prior_sets(
    scorer: Scorer, rows: Sequence[BenchmarkRow], *, scores_file: str | Path | None = None, ranks: Ranks = ALONE
) -> PriorSetsResult:
    """The prior sets, of `load_prior_set`, one after the other. Raises what `score_rows` raises."""
    scored = score_rows(scorer, rows, scores_file, ranks=ranks)
    sets = subset_estimates(_right([(row.subset, *row.scores) for row in scored]))
    return PriorSetsResult(
        **_named(scorer),
        sets=sets,
        score=prior_sets_score({name: estimate.value for name, estimate in sets.items()}),
        absent_sets=[name for name in PRIOR_SETS if name not in sets],
        n_ties=_ties(scored),
        n_truncated=_truncated(scored),
        rows=scored,
    )


def run_rewardbench2(
    scorer: Scorer,
    rows: Sequence[BenchmarkRow],
    *,
    ties_formula: TiesFormula = "0.1.5",
    scores_file: str | Path | None = None,
    ranks: Ranks = ALONE,
) -> RewardBench2Result:
    """RewardBench 2. Raises what `score_rows` and `ties_score` raise."""
    scored = score_rows(scorer, rows, scores_file, ranks=ranks)
    items = rewardbench2_items(rows, scored)
    subsets = rewardbench2_estimates(items, ties_formula)
    available = _counts(row.subset for row in rows)
    return RewardBench2Result(
        **_named(scorer),
        ties_formula=ties_formula,
        subsets=subsets,
        total=rewardbench2_total(subsets),
        absent_subsets=[name for name in SUBSETS_2 if name not in available],
        short_subsets=_short(available, SUBSETS_2),
        n_prompts=len(rows),
        n_shared_best=sum(0 < best_of_score(item["scores"]) < 1 for item in items if item["subset"] != TIES),
        n_truncated=_truncated(scored),
        rows=scored,
    )


def rewardbench2_items(rows: Sequence[BenchmarkRow], scored: Sequence[RowScores]) -> list[RewardBench2Item]:
    """Rows and their scores as `rewardbench2_scores` takes them."""
    return [
        {"id": row.id, "subset": row.subset, "scores": own.scores, "num_correct": row.num_correct}
        for row, own in zip(rows, scored, strict=True)
    ]


def rewardbench2_estimates(items: Sequence[RewardBench2Item], ties_formula: TiesFormula) -> dict[str, Estimate]:
    """Score of each subset present; Wilson's interval, and for the ties a bootstrap over numbers."""
    found = {}
    for name in SUBSETS_2:
        own = [item for item in items if item["subset"] == name]
        if own and name == TIES:
            found[name] = _ties_estimate(own, ties_formula)
        elif own:
            found[name] = wilson(sum(best_of_score(item["scores"]) for item in own), len(own))
    return found


def rewardbench2_total(subsets: Mapping[str, Estimate]) -> Estimate | None:
    """Unweighted mean of the six, its interval from theirs; None while one is missing."""
    if any(name not in subsets for name in SUBSETS_2):
        return None
    value = sum(estimate.value for estimate in subsets.values()) / len(subsets)
    widths = [(estimate.high - estimate.low) / 2 for estimate in subsets.values()]
    half = math.sqrt(sum(width**2 for width in widths)) / len(subsets)
    return Estimate(value, value - half, value + half, sum(each.n for each in subsets.values()), "standard error")


def _ties_estimate(items: Sequence[RewardBench2Item], formula: TiesFormula) -> Estimate:
    """The unit is a number, with its `ref` and its `tied` form."""
    value = ties_score(items, formula=formula)
    forms: dict[str, list[RewardBench2Item]] = {}
    for item in items:
        forms.setdefault(item["id"].partition(":")[2], []).append(item)
    units = list(forms.values())
    if len(units) == 1:
        return Estimate(value, 0.0, 1.01, 1, method="one prompt: no interval")

    def score(drawn: np.ndarray) -> float:
        renamed = [
            {**item, "id": f"{item['id'].partition(':')[0]}:{copy}"}
            for copy, unit in enumerate(drawn)
            for item in units[unit]
        ]
        try:
            return ties_score(renamed, formula=formula)
        except DataError:  # no number with both forms was drawn
            return math.nan

    return bootstrap(score, units, resamples=1000)


def _named(scorer: Scorer) -> dict[str, str | None]:
    reference = scorer.reference_name if isinstance(scorer, ImplicitScorer) else None
    return {"scorer": scorer.name, "kind": scorer.kind, "reference": reference, "fingerprint": scorer.fingerprint}


def _right(scores: Sequence[tuple[str, float, float]]) -> dict[str, list[bool]]:
    """Right and wrong pairs of each subset."""
    found: dict[str, list[bool]] = {}
    for subset, chosen, rejected in scores:
        found.setdefault(subset, []).append(is_right(chosen, rejected))
    return found


def _counts(subsets: Iterator[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for subset in subsets:
        found[subset] = found.get(subset, 0) + 1
    return found


def _short(available: Mapping[str, int], official: Mapping[str, int]) -> dict[str, str]:
    return {
        name: f"{available[name]} of {count}" for name, count in official.items() if available.get(name, count) != count
    }


def _ties(scored: Sequence[RowScores]) -> int:
    return sum(row.scores[0] == row.scores[1] for row in scored)


def _truncated(scored: Sequence[RowScores]) -> int:
    return sum(any(row.truncated) for row in scored)


# ---- official files


def write_official_files(
    directory: str | Path,
    result: RewardBenchResult | PriorSetsResult | RewardBench2Result,
    rows: Sequence[BenchmarkRow],
    *,
    model: str,
) -> tuple[Path, Path]:
    """Write the two files that the leaderboard's tools read, and return their paths. `rows` are those scored.

    `eval-set/<org>/<model>.json`, or `pref-sets/...`: the score of each subset, by its name.
    `eval-set-scores/<org>/<model>.json`: every pair or prompt with its scores, as columns; the conversations are lists
    of messages. Version 2 has the same names, so give it another directory. `model` is `<org>/<model>`; without a
    reference `_ref_free` is added. Raises `ConfigurationError` for another name, for Lite, and for other rows.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise ConfigurationError(f"model: {model!r} is no name of the form org/model")
    if isinstance(result, RewardBenchResult) and result.benchmark == LITE_NAME:
        raise ConfigurationError(f"{LITE_NAME}: no official result; write those of the whole benchmark alone")
    if [(row.id, row.subset) for row in rows] != [(row.id, row.subset) for row in result.rows]:
        raise ConfigurationError(f"{model}: the rows given are not those that were scored")
    about = {"model": model, "model_type": result.kind, "chat_template": "tokenizer"}
    if result.reference is not None:
        about["ref_model"] = result.reference
    name = f"{model}_ref_free" if result.kind == "DPO Ref. Free" else model
    kind = "pref-sets" if isinstance(result, PriorSetsResult) else "eval-set"
    columns = _columns_2(rows, result) if isinstance(result, RewardBench2Result) else _columns(rows, result)
    files = {kind: _official_scores(result) | about, f"{kind}-scores": columns | about}
    paths = []
    for folder, content in files.items():
        path = Path(directory) / folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=4, sort_keys=True, allow_nan=False))
        paths.append(path)
    return paths[0], paths[1]


def _official_scores(result: RewardBenchResult | PriorSetsResult | RewardBench2Result) -> dict[str, float]:
    match result:
        case RewardBenchResult():
            estimates = result.table.subsets
        case PriorSetsResult():
            estimates = result.sets
        case RewardBench2Result():
            estimates = result.subsets
    return {name: estimate.value for name, estimate in estimates.items()}


def _columns(rows: Sequence[BenchmarkRow], result: RewardBenchResult | PriorSetsResult) -> dict[str, list]:
    return {
        "text_chosen": [_conversation(row, 0) for row in rows],
        "text_rejected": [_conversation(row, 1) for row in rows],
        "results": [int(is_right(*row.scores)) for row in result.rows],
        "subset": [row.subset for row in rows],
        "id": [int(row.id) if row.id.isdecimal() else row.id for row in rows],
        "scores_chosen": [row.scores[0] for row in result.rows],
        "scores_rejected": [row.scores[1] for row in result.rows],
    }


def _columns_2(rows: Sequence[BenchmarkRow], result: RewardBench2Result) -> dict[str, list]:
    """A tie has no result of its own: its score is that of all of them together."""
    return {
        "text": [[_conversation(row, place) for place in range(len(row.responses))] for row in rows],
        "results": [None if row.subset == TIES else best_of_score(row.scores) for row in result.rows],
        "subset": [row.subset for row in rows],
        "id": [row.id for row in rows],
        "scores": [row.scores for row in result.rows],
        "num_correct": [row.num_correct for row in rows],
    }


def _conversation(row: BenchmarkRow, place: int) -> list[Message]:
    return [*row.prompt, {"role": "assistant", "content": row.responses[place]}]
