"""What an evaluation reads from files, before any model is loaded."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_lightning.data.examples import PreferenceExample, PromptExample
from rlhf_lightning.data.labels import layout_of
from rlhf_lightning.data.preferences import load_preferences
from rlhf_lightning.data.prompts import load_prompts
from rlhf_lightning.data.sources import RowsInMemory, Source, Split, read_rows, source_list
from rlhf_lightning.data.splits import prompt_hash
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.evaluation.benchmarks import BENCHMARKS
from rlhf_lightning.evaluation.benchmarks.rewardbench import RewardBench, selected_rows
from rlhf_lightning.evaluation.curves import read_run
from rlhf_lightning.evaluation.refusal import RefusalPrompt, load_refusal_prompts
from rlhf_lightning.evaluation.settings import REWARDBENCH_PROMPTS, EvaluationSettings
from rlhf_lightning.evaluation.toxicity import Lexicon

log = logging.getLogger(__name__)


class Inputs:
    """What is read from files, before any model is loaded."""

    def __init__(self, settings: EvaluationSettings) -> None:
        self.pairs: list[PreferenceExample] = []
        if settings.pairs is not None:
            self.pairs, report = load_preferences(
                settings.pairs, split=settings.pairs_split, on_bad_rows=settings.on_bad_rows
            )
            log.info("%s", report.summary())
            _check_several("pairs", self.pairs)
        self.rows = {
            benchmark: benchmark.load(settings)
            for benchmark in BENCHMARKS
            if benchmark.source(settings) and benchmark.taken_by in takers(settings)
        }
        """Of each benchmark that is asked for."""
        self.prompts: list[PromptExample] = []
        self.anchors: dict[str, list[PreferenceExample]] = {}
        """Of each prompt its pairs, by the prompt's id."""
        if settings.prompts is not None:
            self._read_prompts(settings, settings.prompts)
            _check_several("prompts", self.prompts)
        self.refusal: list[RefusalPrompt] = []
        if settings.policy is not None and settings.refusal_prompts is not None:
            self.refusal = load_refusal_prompts(settings.refusal_prompts)
        self.lexicon = None if settings.lexicon is None else Lexicon(settings.lexicon)
        self.runs = [read_run(directory) for directory in settings.runs or ()]

    def _read_prompts(self, settings: EvaluationSettings, source: Source) -> None:
        split, bad = settings.prompts_split, settings.on_bad_rows
        if source == REWARDBENCH_PROMPTS:
            self._read_benchmark_prompts(settings)
            return
        prompts, report = load_prompts(source, split=split, on_bad_rows=bad)
        log.info("prompts: %s", report.summary())
        self.prompts = _with_unique_ids(prompts[: settings.max_prompts])
        if not all(_has_pairs(one.source, split) for one in source_list(source)):
            return
        pairs, _ = load_preferences(source, split=split, on_bad_rows=bad)
        by_prompt: dict[Any, list[PreferenceExample]] = {}
        for pair in pairs:
            by_prompt.setdefault(prompt_hash(pair.prompt), []).append(pair)
        self.anchors = {prompt.example_id: by_prompt.get(prompt_hash(prompt.prompt), []) for prompt in self.prompts}

    def _read_benchmark_prompts(self, settings: EvaluationSettings) -> None:
        """The prompts of RewardBench, or of its Lite set, each once, with their pairs as anchors."""
        rows = selected_rows(RewardBench().load(settings), settings.rewardbench_size)
        first: dict[int, str] = {}
        for row in rows:
            chosen, rejected = row.responses
            pair = PreferenceExample(row.prompt, chosen, rejected, None, f"{row.subset}/{row.id}", row.origin)
            name = first.setdefault(prompt_hash(row.prompt), pair.example_id)
            self.anchors.setdefault(name, []).append(pair)
            if name == pair.example_id:
                self.prompts.append(PromptExample(row.prompt, name, row.origin))
        self.prompts = self.prompts[: settings.max_prompts]


def _with_unique_ids(prompts: Sequence[PromptExample]) -> list[PromptExample]:
    """Prompts of which those that share an id, being rows of files of the same name, are called after their place."""
    counts = Counter(prompt.example_id for prompt in prompts)
    return [
        prompt if counts[prompt.example_id] == 1 else replace(prompt, example_id=prompt.origin) for prompt in prompts
    ]


def _check_several(name: str, examples: Sequence[PreferenceExample | PromptExample]) -> None:
    """Refuse here, and not hours later, what has no interval: a single unit."""
    if len(examples) < 2:
        raise ConfigurationError(f"{name}: {len(examples)} given, but an interval needs at least 2")


def _has_pairs(source: str | RowsInMemory, split: Split) -> bool:
    first = next(iter(read_rows(source, split=split)), None)
    return first is not None and ({"chosen", "rejected"} <= set(first.values) or layout_of(first.values) is not None)


def sources_of(pairs: Sequence[PreferenceExample]) -> list[str]:
    """What each pair says of its source, else the file of `file, row 17`: its name, or its path where names repeat."""
    files = [pair.origin.rpartition(", row ")[0] or pair.origin for pair in pairs]
    names = Counter(Path(file).name for file in set(files))
    return [
        pair.source or (Path(file).name if names[Path(file).name] == 1 else file)
        for pair, file in zip(pairs, files, strict=True)
    ]


def takers(settings: EvaluationSettings) -> set[str]:
    """Who is measured on benchmarks: `scorer`, `judge`, both or none."""
    found = {"scorer"} if settings.reward_model is not None or settings.implicit_reward else set()
    return found | ({"judge"} if settings.judge is not None else set())
