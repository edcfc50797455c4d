"""What a benchmark is: rows, a way to run them with a scorer or a judge, and a result that shows itself.

A row is a prompt with its responses, the correct ones first; a pair is a row with two of them. A new benchmark is one
file beside this one, with a `Benchmark` and its `Result`, and a line in `BENCHMARKS` (see `__init__`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from rlhf_lightning.data.conversations import BadRow, check_prompt, prompt_messages
from rlhf_lightning.data.examples import Message
from rlhf_lightning.data.sources import Row, read_rows
from rlhf_lightning.errors import DataError, ModelError
from rlhf_lightning.evaluation.blocks import Block
from rlhf_lightning.evaluation.estimates import Estimate, Quantity, wilson
from rlhf_lightning.evaluation.ranks import ALONE, Ranks
from rlhf_lightning.evaluation.store import Ledger
from rlhf_lightning.files.disks import write_whole
from rlhf_lightning.rewards.scorers import ImplicitScorer, Scorer

if TYPE_CHECKING:
    from rlhf_lightning.evaluation.settings import EvaluationSettings

log = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 64
"""So many does each process score between two writes: what is lost when a run is cut off."""
_SURROGATE = re.compile("[\ud800-\udfff]")


class Benchmark(ABC):
    """Rows that scorers, or judges, are measured on; see `BENCHMARKS`."""

    name: ClassVar[str]
    """Its key in metrics.json's details and in scores.jsonl. Unless it overrides `source`, also in `benchmarks`."""
    title: ClassVar[str]
    taken_by: ClassVar[Literal["scorer", "judge"]] = "scorer"

    def source(self, settings: EvaluationSettings) -> Any:
        """Where the settings say that its rows are; nothing when they do not ask for it."""
        return (settings.benchmarks or {}).get(self.name)

    @abstractmethod
    def load(self, settings: EvaluationSettings) -> list[BenchmarkRow]:
        """Its rows, checked. Raises `DataError`."""

    def notes(self, rows: Sequence[BenchmarkRow]) -> list[str]:
        """What a reader must not miss about these rows, in sentences."""
        return []

    @abstractmethod
    def run(
        self,
        by: Any,
        rows: Sequence[BenchmarkRow],
        settings: EvaluationSettings,
        *,
        file: Path | None = None,
        ranks: Ranks = ALONE,
    ) -> Result:
        """What a `Scorer`, or a `Judge`, gets on the rows of `load`.

        What `file` (see `Ledger`) holds already is not made again.
        """


class Result(ABC):
    """What a scorer or a judge got in a benchmark: a frozen dataclass, whose fields are metrics.json's details."""

    @property
    def whole(self) -> bool:
        """Whether all of the benchmark was measured, so that its official files are to be written."""
        return False

    @property
    @abstractmethod
    def title(self) -> str:
        """Of its section in the report; results of one title share a section."""

    @abstractmethod
    def metrics(self) -> Mapping[str, Quantity]:
        """Its numbers by their names in metrics.json; None is left out there."""

    @abstractmethod
    def blocks(self) -> Iterable[Block]:
        """Its part of the report."""

    def text(self, name: str) -> str:
        """The text above the blocks; `name` is that of the scorer or judge."""
        return ""

    def summary(self) -> str:
        """Its line in the terminal; empty for none."""
        return ""

    def score_rows(self) -> Sequence[RowScores]:
        """Its rows in scores.jsonl."""
        return ()

    def official_files(self, model: str) -> dict[str, dict[str, Any]]:
        """Contents by path of the files that the benchmark's own tools read; `model` is `<org>/<model>`."""
        return {}


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
    """Where the row comes from, for messages."""

    @property
    def key(self) -> str:
        """SHA-256 of all that is scored: the same texts are the same row, whatever its id."""
        parts = json.dumps([self.subset, prompt_as_text(self.prompt), *self.responses], ensure_ascii=False)
        return hashlib.sha256(parts.encode()).hexdigest()

    def conversation(self, place: int) -> list[Message]:
        """The prompt and the response of that place, as messages."""
        return [*self.prompt, {"role": "assistant", "content": self.responses[place]}]


@dataclass(frozen=True, slots=True)
class RowScores:
    """What a scorer gave to the responses of a row, in their order."""

    id: str
    subset: str
    scores: list[float]
    tokens: list[int]
    """Of each response, EOS included."""
    truncated: list[bool]
    """Whether it, or rather the beginning of its prompt, was cut."""
    heads: list[list[float]] = field(default_factory=list)
    """Of each response, by an ensemble: the scores of its heads; empty for any other scorer."""

    @property
    def spreads(self) -> list[float]:
        """Of each response, the standard deviation over the heads."""
        return [float(np.std(each)) for each in self.heads]


@dataclass(frozen=True, kw_only=True)
class ScoredResult(Result):
    """A `Result` of a scorer."""

    official_kind: ClassVar[str | None] = None
    """Directory of its official files; None for a benchmark whose own tools read none."""

    scorer: str
    kind: str
    """RewardBench's `model_type`."""
    reference: str | None
    fingerprint: str
    n_truncated: int
    """Rows of which a response was too long."""
    rows: list[RowScores]
    given: list[BenchmarkRow]
    """Those that were scored, in the order of `rows`."""

    @staticmethod
    def about(scorer: Scorer, given: Sequence[BenchmarkRow], rows: list[RowScores]) -> dict[str, Any]:
        """The fields that every result has."""
        return {
            "scorer": scorer.name,
            "kind": scorer.kind,
            "reference": scorer.reference_name if isinstance(scorer, ImplicitScorer) else None,
            "fingerprint": scorer.fingerprint,
            "n_truncated": sum(any(row.truncated) for row in rows),
            "rows": rows,
            "given": list(given),
        }

    def score_rows(self) -> Sequence[RowScores]:
        return self.rows

    @abstractmethod
    def subset_scores(self) -> Mapping[str, Estimate]:
        """The score of each subset."""

    def official_columns(self) -> dict[str, list]:
        """Every pair with its scores, as columns; the conversations are lists of messages."""
        return {
            "text_chosen": [row.conversation(0) for row in self.given],
            "text_rejected": [row.conversation(1) for row in self.given],
            "results": [int(is_right(row.scores)) for row in self.rows],
            "subset": [row.subset for row in self.given],
            "id": [int(row.id) if row.id.isdecimal() else row.id for row in self.given],
            "scores_chosen": [row.scores[0] for row in self.rows],
            "scores_rejected": [row.scores[1] for row in self.rows],
        }

    def official_files(self, model: str) -> dict[str, dict[str, Any]]:
        """The two that the leaderboard's tools read; without a reference `_ref_free` is added to the name."""
        if self.official_kind is None:
            return {}
        about = {"model": model, "model_type": self.kind, "chat_template": "tokenizer"}
        if self.reference is not None:
            about["ref_model"] = self.reference
        name = f"{model}_ref_free" if self.kind == "DPO Ref. Free" else model
        scores = {subset: estimate.value for subset, estimate in self.subset_scores().items()}
        return {
            f"{self.official_kind}/{name}.json": scores | about,
            f"{self.official_kind}-scores/{name}.json": self.official_columns() | about,
        }


def write_official_files(directory: Path, result: Result, *, model: str) -> list[Path]:
    """Write a result's official files below the directory, and return their paths."""
    paths = []
    for name, content in result.official_files(model).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=4, sort_keys=True, allow_nan=False))
        paths.append(path)
    return paths


# ---- scores of rows


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a `Ledger` keeps of a row: see `RowScores`."""

    scores: list[float]
    tokens: list[int]
    truncated: list[bool]
    heads: list[list[float]] = field(default_factory=list)


def score_rows(
    scorer: Scorer, rows: Sequence[BenchmarkRow], file: str | Path | None = None, *, ranks: Ranks = ALONE
) -> list[RowScores]:
    """The scores of all responses, in the order of the rows, of which each of the processes scores a share.

    With a file, scores are appended to it as they come (see `Ledger`), under the scorer's fingerprint and the row's
    key; those that are in it are not computed again. Raises `DataError` for a file that holds something else, and
    `ModelError` for a score that is not finite.
    """
    keys = [row.key for row in rows]
    by_key = dict(zip(keys, rows, strict=True))
    ledger = Ledger(file, scorer.fingerprint, _Kept, ranks)
    if known := len(by_key.keys() & ledger.known.keys()):
        log.info("%s: %d of %d rows are scored already", file, known, len(by_key))

    def length(key: str) -> int:
        row = by_key[key]
        return max(map(len, row.responses)) + len(prompt_as_text(row.prompt))

    # The longest first: what does not fit into memory fails at once.
    order = sorted(by_key, key=length, reverse=True)
    ledger.fill("rows", order, lambda part: _score(scorer, [by_key[key] for key in part]), at_a_time=_ROWS_AT_A_TIME)
    kept = ((row, ledger.known[key]) for row, key in zip(rows, keys, strict=True))
    return [RowScores(row.id, row.subset, each.scores, each.tokens, each.truncated, each.heads) for row, each in kept]


def _score(scorer: Scorer, rows: Sequence[BenchmarkRow]) -> list[_Kept]:
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
        heads = [list(x.heads) for x in own if x.heads]
        found.append(_Kept([x.score for x in own], [x.tokens for x in own], [x.truncated for x in own], heads))
    return found


# ---- reading rows


def read_columns(source: str | Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a file, a directory or a hub data set. Raises `DataError` for a row that lacks a column."""
    for row in read_rows(source, split="test"):
        if missing := [name for name in columns if name not in row.values]:
            raise DataError(
                f"{row.origin}: no column {', '.join(missing)}; it needs {', '.join(columns)}, and the columns found "
                f"are {', '.join(map(str, row.values))}"
            )
        yield row


def pair_row(row: Row, subset: Any) -> BenchmarkRow:
    """A row of the columns prompt, chosen, rejected and perhaps id; without one it is named after its place."""
    if not isinstance(subset, str):
        raise DataError(f"{row.origin}: subset is {subset!r}, not text")
    responses = tuple(text_of(row, side) for side in ("chosen", "rejected"))
    return BenchmarkRow(id_of(row), subset, messages_of(row), responses, num_correct=1, origin=row.origin)


def checked_rows(source: str | Path, rows: list[BenchmarkRow], names: Mapping[str, Any]) -> list[BenchmarkRow]:
    """Refuse subsets that are none of `names`, and ids that occur twice in one subset."""
    if unknown := [row for row in rows if row.subset not in names]:
        raise DataError(
            f"{unknown[0].origin}: unknown subset {unknown[0].subset!r} ({len(unknown)} rows of {source} have one); "
            f"use one of {', '.join(names)}"
        )
    first: dict[tuple[str, str], BenchmarkRow] = {}
    for row in rows:
        if (other := first.setdefault((row.subset, row.id), row)) is not row:
            raise DataError(
                f"{row.origin}: duplicate id {row.id!r} in {row.subset} (first at {other.origin}); ids must be unique"
            )
    return rows


def id_of(row: Row) -> str:
    own = row.values.get("id")
    return row.example_id if own is None or own == "" else str(own)


def text_of(row: Row, column: str) -> str:
    value = row.values[column]
    if not isinstance(value, str):
        raise DataError(f"{row.origin}: {column} is {'null' if value is None else type(value).__name__}, not text")
    if _SURROGATE.search(value):
        raise DataError(f"{row.origin}: {column} holds half of a surrogate pair, which no tokenizer can read")
    return value


def texts_of(row: Row, column: str) -> list[str]:
    value = row.values[column]
    if not (isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)):
        raise DataError(f"{row.origin}: {column} is no list of texts")
    return list(value)


def messages_of(row: Row, column: str = "prompt") -> list[Message]:
    """A text as one user's turn, whatever it looks like; a list as it is."""
    value = row.values[column]
    if isinstance(value, str):
        return [{"role": "user", "content": text_of(row, column)}]
    try:
        messages = prompt_messages(value) if isinstance(value, list | tuple) else []
        if not messages:
            raise BadRow("wrong_type", f"{column} is neither text nor a list of messages")
        check_prompt(messages)
    except BadRow as error:
        raise DataError(f"{row.origin}: {error}") from error
    return messages


def prompt_as_text(prompt: Sequence[Message]) -> str:
    """A prompt as one text: a single user's turn as it is, more turns as `role 0x1F content` with 0x1E between them."""
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\x1e".join(f"{message['role']}\x1f{message['content']}" for message in prompt)


# ---- right and wrong


def is_right(scores: Sequence[float]) -> bool:
    """Whether a pair counts as right: the chosen response, the first, scores higher. An exact tie is wrong."""
    chosen, rejected = scores
    return chosen > rejected


def rates(points: Iterable[tuple[str, float]]) -> dict[str, Estimate]:
    """Mean of the points, 0 to 1, of each subset with Wilson's interval over its rows, by the order of the subsets."""
    found: dict[str, list[float]] = {}
    for subset, value in points:
        found.setdefault(subset, []).append(value)
    return {subset: wilson(sum(own), len(own)) for subset, own in found.items()}


def mean_of(estimates: Iterable[Estimate]) -> Estimate:
    """Unweighted mean of independent estimates, its interval from theirs."""
    each = list(estimates)
    value = sum(estimate.value for estimate in each) / len(each)
    half = math.hypot(*((estimate.high - estimate.low) / 2 for estimate in each)) / len(each)
    return Estimate(value, value - half, value + half, sum(estimate.n for estimate in each), "standard error")


def count_ties(rows: Iterable[RowScores]) -> int:
    """Pairs with equal scores."""
    return sum(row.scores[0] == row.scores[1] for row in rows)


def missing_rows(rows: Iterable[BenchmarkRow], official: Mapping[str, int]) -> tuple[list[str], dict[str, str]]:
    """Subsets without a row, and those that have another number of rows than the benchmark's: `50 of 100`."""
    found = Counter(row.subset for row in rows)
    absent = [name for name in official if not found[name]]
    return absent, {name: f"{found[name]} of {n}" for name, n in official.items() if found[name] not in (0, n)}
