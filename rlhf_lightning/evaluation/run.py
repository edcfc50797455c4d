"""Measures what the settings ask for: loads the models one after the other, scores, draws, and sums up."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from rlhf_lightning.data.chat_format import ChatFormat, load_tokenizer
from rlhf_lightning.data.examples import Message, PreferenceExample, PromptExample
from rlhf_lightning.data.labels import layout_of
from rlhf_lightning.data.preferences import load_preferences
from rlhf_lightning.data.prompts import load_prompts
from rlhf_lightning.data.sources import read_rows, source_list
from rlhf_lightning.data.splits import prompt_hash
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.evaluation.benchmarks.judge import PolicyJudge, run_judge, run_judge2
from rlhf_lightning.evaluation.benchmarks.rewardbench import SECTIONS, SUBSETS
from rlhf_lightning.evaluation.benchmarks.rewardbench_run import (
    BenchmarkRow,
    lite_rows,
    load_prior_set,
    load_rewardbench,
    load_rewardbench2,
    run_prior_sets,
    run_rewardbench,
    run_rewardbench2,
    score_rows,
)
from rlhf_lightning.evaluation.curves import read_run
from rlhf_lightning.evaluation.estimates import mean_estimate, wilson
from rlhf_lightning.evaluation.generate import GeneratedReply, generate_replies, kl_of_replies
from rlhf_lightning.evaluation.policy import best_of_n, compare_policies, summarise_kl
from rlhf_lightning.evaluation.provenance import provenance
from rlhf_lightning.evaluation.ranks import Ranks, check_devices
from rlhf_lightning.evaluation.refusal import (
    BUILTIN_DETECTOR,
    RefusalClassifier,
    is_refusal,
    load_refusal_prompts,
    refusal_change,
    summarise_refusals,
)
from rlhf_lightning.evaluation.results import (
    SIDES,
    EvaluationResults,
    Judged,
    JudgeResults,
    PairScores,
    PolicyResults,
    PromptRow,
    ScorerResults,
    Side,
)
from rlhf_lightning.evaluation.reward_quality import reward_quality
from rlhf_lightning.evaluation.rounding import ROWS, Rounding, Row, measured_rounding, spread
from rlhf_lightning.evaluation.settings import REWARDBENCH_PROMPTS, EvaluationSettings
from rlhf_lightning.evaluation.text_classifier import read_labels
from rlhf_lightning.evaluation.toxicity import (
    Lexicon,
    ToxicityScorer,
    find_toxic_labels,
    summarise_lexicon,
    summarise_toxicity,
)
from rlhf_lightning.evaluation.toxicity import toxicity_change as change_of_toxicity
from rlhf_lightning.models.causal_lm import CausalLM, load_causal_config
from rlhf_lightning.models.fingerprint import weights_fingerprint
from rlhf_lightning.models.generation import TransformersEngine
from rlhf_lightning.models.precision import float32_arithmetic
from rlhf_lightning.rewards.functions import check_text_of, load_function, names_function, reward_scorer
from rlhf_lightning.rewards.scorers import (
    ImplicitScorer,
    Scorer,
    check_scores_rows,
    load_policy,
    move,
)

log = logging.getLogger(__name__)

Made = TypeVar("Made")


def evaluate(settings: EvaluationSettings, ranks: Ranks | None = None) -> EvaluationResults:
    """All that the settings ask for. Files are read and checked before the first model is loaded.

    With several processes (see `launch`) each scores and draws a share, and all of them return the same; without
    `ranks` this process does all.

    Raises `ConfigurationError` when nothing is asked for or parts do not fit together, and what the parts raise.
    """
    check(settings)
    began = time.time()
    ranks = ranks or Ranks(device=device_of(settings))
    data = ranks.once(lambda: _Data(settings))
    measuring = _Measuring(settings, data, ranks)
    scorers, judges, policies = measuring.scorers(), measuring.judges(), measuring.policies()
    return EvaluationResults(
        title=settings.title,
        scorers=scorers,
        judges=judges,
        policies=policies,
        runs=data.runs,
        notes=measuring.notes,
        provenance=provenance(settings, measuring.fingerprints, seconds=time.time() - began, ranks=ranks),
    )


def device_of(settings: EvaluationSettings) -> str:
    """Where it computes: as the settings say, or on a GPU where there is one."""
    return settings.device or ("cuda" if torch.cuda.is_available() else "cpu")


def check(settings: EvaluationSettings) -> None:
    """Raises `ConfigurationError` for settings that measure nothing, or that need others."""
    if settings.reward_model is None and settings.policy is None and settings.judge is None:
        raise ConfigurationError("evaluate: nothing to judge; give reward_model, policy or judge")
    scored = settings.reward_model is not None or settings.implicit_reward
    if settings.prompts == REWARDBENCH_PROMPTS and settings.rewardbench is None:
        raise ConfigurationError("evaluate: prompts are those of RewardBench, which is not given; give rewardbench")
    for name in ("pairs", "prompts"):
        given = getattr(settings, name)
        if given is not None and any(one.weight != 1 for one in source_list(given)):
            raise ConfigurationError(f"evaluate: {name}: a weight is for training; here each row counts once")
    if settings.pairs is not None and not scored:
        raise ConfigurationError("evaluate: pairs are scored by a reward_model, or by a policy with implicit_reward")
    for name, other in (("reference", "policy"), ("held_out_reward_model", "reward_model"), ("prompts", "policy")):
        if getattr(settings, name) is not None and getattr(settings, other) is None:
            raise ConfigurationError(f"evaluate: {name} without {other}; give both, or neither")
    if settings.implicit_reward and settings.policy is None:
        raise ConfigurationError("evaluate: implicit_reward is that of a policy; give one")
    if settings.judge is not None and settings.rewardbench is None and settings.rewardbench2 is None:
        raise ConfigurationError("evaluate: the judge judges RewardBench's pairs; give rewardbench or rewardbench2")
    benchmarks = settings.rewardbench or settings.rewardbench2 or settings.prior_sets
    if benchmarks and not scored and settings.judge is None:
        raise ConfigurationError(
            "evaluate: RewardBench needs a reward_model, a judge, or a policy with implicit_reward"
        )
    if scored and not benchmarks and settings.pairs is None and settings.prompts is None:
        raise ConfigurationError("evaluate: there is nothing to score; give pairs, rewardbench, or policy and prompts")
    answers = settings.prompts is not None or settings.refusal_prompts is not None
    if settings.policy is not None and not settings.implicit_reward and not answers:
        raise ConfigurationError("evaluate: the policy has nothing to answer; give prompts or refusal_prompts")
    check_devices(device_of(settings), settings.devices)
    _check_models(settings)
    for name in ("reward", "held_out_reward"):
        key = f"{name}_chat_template"
        check_text_of(getattr(settings, f"{name}_model"), getattr(settings, key), f"evaluate: {key}")
    for name in ("toxicity_model", "lexicon"):
        if getattr(settings, name) is not None and (settings.policy is None or settings.prompts is None):
            raise ConfigurationError(f"evaluate: {name} reads replies of a policy; give policy and prompts")


def _check_models(settings: EvaluationSettings) -> None:
    """What each model is, by its configuration: hours before it is its turn to be loaded. Checkpoints come later."""
    trust = {"trust_remote_code": settings.trust_remote_code}
    for name in filter(None, (settings.policy, settings.reference, settings.judge)):
        if not name.endswith(".ckpt") and not (Path(name).expanduser() / "adapter_config.json").is_file():
            load_causal_config(name, **trust)
    for name in filter(None, (settings.reward_model, settings.held_out_reward_model)):
        if names_function(name):
            load_function(name)
        elif not name.endswith(".ckpt"):
            check_scores_rows(name, **trust)
    if settings.toxicity_model is not None and settings.toxic_labels is None:
        find_toxic_labels(settings.toxicity_model, read_labels(settings.toxicity_model, **trust))
    if settings.refusal_classifier is not None:
        read_labels(settings.refusal_classifier, **trust)


class _Data:
    """What is read from files, before any model is loaded."""

    def __init__(self, settings: EvaluationSettings) -> None:
        self.pairs: list[PreferenceExample] = []
        if settings.pairs is not None:
            self.pairs, report = load_preferences(
                settings.pairs, split=settings.pairs_split, on_bad_rows=settings.on_bad_rows
            )
            log.info("%s", report.summary())
            _check_several("pairs", self.pairs)
        self.rewardbench = load_rewardbench(settings.rewardbench) if settings.rewardbench is not None else []
        self.rewardbench2 = load_rewardbench2(settings.rewardbench2) if settings.rewardbench2 is not None else []
        self.prior = [
            row for name, source in (settings.prior_sets or {}).items() for row in load_prior_set(name, source)
        ]
        self.prompts: list[PromptExample] = []
        self.anchors: dict[str, list[PreferenceExample]] = {}
        """Of each prompt its pairs, by the prompt's id."""
        if settings.prompts is not None:
            self._read_prompts(settings)
            _check_several("prompts", self.prompts)
        self.refusal = []
        if settings.policy is not None and settings.refusal_prompts is not None:
            self.refusal = load_refusal_prompts(settings.refusal_prompts)
        self.lexicon = None if settings.lexicon is None else Lexicon(settings.lexicon)
        self.runs = [read_run(directory) for directory in settings.runs or ()]

    def _read_prompts(self, settings: EvaluationSettings) -> None:
        source, split = settings.prompts, settings.prompts_split
        if source == REWARDBENCH_PROMPTS:
            self._take_benchmark_prompts(settings)
            return
        bad = settings.on_bad_rows
        prompts, report = load_prompts(source, split=split, on_bad_rows=bad)
        log.info("prompts: %s", report.summary())
        self.prompts = _told_apart(prompts[: settings.max_prompts])
        if not all(_has_pairs(one.source, split) for one in source_list(source)):
            return
        pairs, _ = load_preferences(source, split=split, on_bad_rows=bad)
        by_prompt: dict[Any, list[PreferenceExample]] = {}
        for pair in pairs:
            by_prompt.setdefault(prompt_hash(pair.prompt), []).append(pair)
        self.anchors = {prompt.example_id: by_prompt.get(prompt_hash(prompt.prompt), []) for prompt in self.prompts}

    def _take_benchmark_prompts(self, settings: EvaluationSettings) -> None:
        """The prompts of RewardBench, or of its Lite set, each once, with their pairs as anchors."""
        rows = self.rewardbench
        if settings.rewardbench_size != "full":
            rows = lite_rows(rows, settings.rewardbench_size)
        first: dict[int, str] = {}
        for row in rows:
            pair = PreferenceExample(row.prompt, *row.responses, None, f"{row.subset}/{row.id}", row.origin)
            name = first.setdefault(prompt_hash(row.prompt), pair.example_id)
            self.anchors.setdefault(name, []).append(pair)
            if name == pair.example_id:
                self.prompts.append(PromptExample(row.prompt, name, row.origin))
        self.prompts = self.prompts[: settings.max_prompts]


def _told_apart(prompts: Sequence[PromptExample]) -> list[PromptExample]:
    """Prompts of which those that share an id, being rows of files of the same name, are called after their place."""
    counts = Counter(prompt.example_id for prompt in prompts)
    return [
        prompt if counts[prompt.example_id] == 1 else replace(prompt, example_id=prompt.origin) for prompt in prompts
    ]


def _check_several(name: str, examples: Sequence[PreferenceExample | PromptExample]) -> None:
    """What would be refused after hours: a single unit has no interval."""
    if len(examples) < 2:
        raise ConfigurationError(
            f"{name}: {len(examples)} of them has no interval, so nothing could be said of it; give at least 2"
        )


def _has_pairs(source: str, split: str) -> bool:
    first = next(iter(read_rows(source, split=split)), None)
    return first is not None and ({"chosen", "rejected"} <= set(first.values) or layout_of(first.values) is not None)


class _Measuring:
    """One evaluation: where its models compute, what it keeps, and what it has to say about it."""

    def __init__(self, settings: EvaluationSettings, data: _Data, ranks: Ranks) -> None:
        self.settings, self.data, self.ranks = settings, data, ranks
        self.dtype = getattr(torch, settings.dtype)
        self.notes: list[str] = []
        self.fingerprints: dict[str, str] = {}
        self.kept = Path(settings.out) / "kept"
        self.kept.mkdir(parents=True, exist_ok=True)

    @property
    def loading(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "batch_size": settings.batch_size,
            "max_length": settings.max_length,
            "device": self.ranks.device,
            "dtype": self.dtype,
            "trust_remote_code": settings.trust_remote_code,
        }

    def _made(self, make: Callable[..., Made], *arguments: Any, **named: Any) -> Made:
        """A model, loaded in every process; when one cannot, all of them stop."""
        made: list[Made] = []
        self.ranks.everywhere(lambda: made.append(make(*arguments, **named)))
        return made[0]

    # ---- scorers

    def scorers(self) -> list[ScorerResults]:
        """The reward models, and the policy by its implicit reward, on pairs and benchmarks."""
        settings, found = self.settings, []
        for title, name, text in (
            ("reward model", settings.reward_model, settings.reward_chat_template),
            ("held-out", settings.held_out_reward_model, settings.held_out_reward_chat_template),
        ):
            if name is not None:
                make = partial(reward_scorer, name, chat_template=text, **self.loading)
                found.append(self._scorer(title, make))
        if settings.implicit_reward:
            make = partial(ImplicitScorer, settings.policy, settings.reference, **self.loading)
            found.append(self._scorer("implicit reward", make))
        return found

    def _scorer(self, title: str, make: Callable[..., Scorer]) -> ScorerResults:
        scorer = self._made(make)
        data, settings, ranks = self.data, self.settings, self.ranks
        self.fingerprints[f"{title}: {scorer.name}"] = scorer.fingerprint
        file = self.kept / f"scores-{scorer.fingerprint[:16]}.jsonl"
        quality = scores = bench = bench2 = prior = None
        if data.pairs:
            with _timed(f"{title}: {len(data.pairs)} pairs"):
                quality, scores = self._pairs(scorer, file)
        if data.rewardbench:
            with _timed(f"{title}: RewardBench"):
                size = settings.rewardbench_size
                bench = run_rewardbench(scorer, data.rewardbench, size=size, scores_file=file, ranks=ranks)
            self._note(_partial(bench.available), bench.complete)
        if data.rewardbench2:
            with _timed(f"{title}: RewardBench 2"):
                bench2 = run_rewardbench2(scorer, data.rewardbench2, scores_file=file, ranks=ranks)
            if bench2.absent_subsets:
                self._note(f"RewardBench 2: absent: {', '.join(bench2.absent_subsets)}; no total", complete=False)
        if data.prior:
            with _timed(f"{title}: prior sets"):
                prior = run_prior_sets(scorer, data.prior, scores_file=file, ranks=ranks)
        rounding = self._rounding(title, make, scorer, self._sample())
        return ScorerResults(title, scorer.name, quality, scores, bench, bench2, prior, rounding)

    def _rounding(
        self, title: str, make: Callable[..., Scorer], scorer: Scorer, rows: Sequence[Row]
    ) -> Rounding | None:
        """The error of the scores of a model in half precision, which a note says; None in float32."""
        dtype = self.settings.dtype
        if dtype == "float32" or not rows or names_function(scorer.name):
            return None
        with _timed(f"{title}: the error of {dtype}"):
            found = self._made(partial(measured_rounding, make, scorer, rows, dtype=dtype))
        self.notes.append(found.sentence(f"{title} {scorer.name}"))
        return found

    def _sample(self) -> list[Row]:
        """Rows of all that is scored, in pairs: of the pairs, or else of a benchmark."""
        data = self.data
        pairs = [(pair.prompt, (pair.chosen, pair.rejected)) for pair in data.pairs]
        pairs = pairs or [(row.prompt, row.responses) for row in data.rewardbench or data.rewardbench2 or data.prior]
        return [(prompt, text) for prompt, texts in spread(pairs, ROWS // 2) for text in texts[:2]]

    def _note(self, sentence: str, complete: bool) -> None:
        if not complete and sentence not in self.notes:
            self.notes.append(sentence)

    def _pairs(self, scorer: Scorer, file: Path):
        pairs = self.data.pairs
        rows = [BenchmarkRow(p.example_id, "pairs", p.prompt, (p.chosen, p.rejected), 1, p.origin) for p in pairs]
        scored = score_rows(scorer, rows, file, ranks=self.ranks)
        chosen, rejected = (np.array([row.scores[side] for row in scored]) for side in (0, 1))
        tokens = [np.array([row.tokens[side] for row in scored]) for side in (0, 1)]
        sources = _sources(pairs)
        quality = reward_quality(
            chosen,
            rejected,
            tokens_chosen=tokens[0],
            tokens_rejected=tokens[1],
            sources=sources,
            truncated=np.array([any(row.truncated) for row in scored]),
            prompts=[prompt_hash(pair.prompt) for pair in pairs],
            seed=self.settings.seed,
        )
        return quality, PairScores([pair.example_id for pair in pairs], sources, chosen, rejected)

    def judges(self) -> list[JudgeResults]:
        """A language model's verdicts on RewardBench."""
        settings, data, ranks = self.settings, self.data, self.ranks
        if settings.judge is None:
            return []
        loading = {name: value for name, value in self.loading.items() if name != "max_length"}
        judge = self._made(PolicyJudge, settings.judge, max_new_tokens=settings.judge_max_new_tokens, **loading)
        self.fingerprints[f"judge: {judge.name}"] = judge.fingerprint
        file = self.kept / f"judge-{judge.fingerprint[:16]}.jsonl"
        bench = bench2 = None
        if data.rewardbench:
            rows = data.rewardbench
            if settings.rewardbench_size != "full":
                rows = lite_rows(rows, settings.rewardbench_size)
            self._note(_partial(_counted(data.rewardbench)), _complete(data.rewardbench))
            with _timed(f"judge: {len(rows)} pairs"):
                bench = run_judge(judge, rows, name=judge.name, replies_file=file, ranks=ranks)
        if data.rewardbench2:
            with _timed("judge: RewardBench 2"):
                bench2 = run_judge2(judge, data.rewardbench2, name=judge.name, replies_file=file, ranks=ranks)
        return [JudgeResults(judge.name, bench, bench2)]

    # ---- policies

    def policies(self) -> PolicyResults | None:
        """Replies of the policies to all prompts, and what reward models, detectors and classifiers say of them."""
        settings, data = self.settings, self.data
        if settings.policy is None or not (data.prompts or data.refusal):
            return None
        names: dict[Side, str] = {"after": settings.policy}
        if settings.reference is not None:
            names = {"before": settings.reference, "after": settings.policy}
        replies: dict[Side, list[GeneratedReply]] = {}
        refusals: dict[Side, list[GeneratedReply]] = {}
        loaded: dict[Side, tuple[CausalLM, ChatFormat]] = {}
        for side, name in names.items():
            loaded[side] = self._made(self._load, name)
            self.fingerprints[f"policy {side}: {name}"] = weights_fingerprint(loaded[side][0])
            if data.prompts:
                replies[side] = self._draw(side, *loaded[side], data.prompts, settings.samples, settings.temperature)
            if data.refusal:
                prompts = [each.prompt for each in data.refusal]
                refusals[side] = self._draw(f"{side}-refusal", *loaded[side], prompts, 1, 0.0)
        rows = self._prompt_rows(data.prompts, replies)
        kl = self._kl(loaded, replies, rows) if len(names) == 2 and data.prompts else None
        del loaded
        judged = self._judged(rows)
        toxicity, toxicity_change = self._toxicity(rows)
        refusal_rows, refusal, change = self._refusal(refusals)
        lexicon = {}
        if data.lexicon is not None:
            for side in replies:
                found = [data.lexicon(row.replies[side]) for row in rows]
                lexicon[side] = summarise_lexicon(np.array(found), lexicon=data.lexicon)
        unended = {side: _unended([row.ended[side] for row in rows]) for side in replies}
        return PolicyResults(
            names, rows, judged, kl, unended, refusal_rows, refusal, change, toxicity, toxicity_change, lexicon
        )

    def _load(self, name: str) -> tuple[CausalLM, ChatFormat]:
        policy = load_policy(name, trust_remote_code=self.settings.trust_remote_code)
        move(policy.eval().requires_grad_(False), torch.device(self.ranks.device), self.dtype)
        return policy, ChatFormat(load_tokenizer(name, trust_remote_code=self.settings.trust_remote_code))

    def _draw(
        self,
        label: str,
        policy: CausalLM,
        chat_format: ChatFormat,
        prompts: Sequence[PromptExample],
        samples: int,
        temperature: float,
    ) -> list[GeneratedReply]:
        model = weights_fingerprint(policy)
        with _timed(f"replies {label}: {len(prompts)} x {samples}"):
            return generate_replies(
                policy,
                chat_format,
                prompts,
                samples=samples,
                temperature=temperature,
                max_new_tokens=self.settings.max_new_tokens,
                seed=self.settings.seed,
                engine=TransformersEngine(self.settings.batch_size),
                model=model,
                file=self.kept / f"replies-{label}-{model[:16]}.jsonl",
                keep_every=4 * self.settings.batch_size,
                ranks=self.ranks,
            )

    def _prompt_rows(
        self, prompts: Sequence[PromptExample], replies: dict[Side, list[GeneratedReply]]
    ) -> list[PromptRow]:
        rows = []
        for place, prompt in enumerate(prompts):
            own = {
                side: of_side[place * self._each(of_side, prompts) :][: self._each(of_side, prompts)]
                for side, of_side in replies.items()
            }
            rows.append(
                PromptRow(
                    prompt.example_id,
                    "\n\n".join(prompt.texts),
                    {side: [reply.text for reply in few] for side, few in own.items()},
                    {side: [reply.tokens for reply in few] for side, few in own.items()},
                    {side: [reply.ended for reply in few] for side, few in own.items()},
                )
            )
        return rows

    @staticmethod
    def _each(replies: Sequence[GeneratedReply], prompts: Sequence[PromptExample]) -> int:
        return len(replies) // len(prompts)

    def _kl(self, loaded, replies, rows: list[PromptRow]):
        """KL of the policy after from that before, along its own replies; also into the rows."""
        settings = self.settings
        if settings.temperature != 1:
            self.notes.append(
                f"KL: not measured, it needs replies drawn at temperature 1, not {settings.temperature:g}"
            )
            return None
        (before, _), (after, chat_format) = loaded["before"], loaded["after"]
        if before.config.get_text_config().vocab_size != after.config.get_text_config().vocab_size:
            self.notes.append("KL: not measured, the policies have different vocabularies")
            return None
        with _timed("KL"):
            measured = partial(
                kl_of_replies, after, before, chat_format, self.data.prompts, batch_size=settings.batch_size
            )
            with float32_arithmetic(after, before):
                found = self.ranks.each(replies["after"], measured)
        if settings.dtype != "float32":
            self.notes.append(
                f"KL: computed in float32 of policies with weights rounded to {settings.dtype}, in which they answered"
            )
        shape = (len(rows), settings.samples)
        exact, k1, tokens = (
            np.array([getattr(each, name) for each in found], dtype=np.float64).reshape(shape)
            for name in ("exact", "k1", "tokens")
        )
        for place, row in enumerate(rows):
            rows[place] = replace(row, kl=exact[place].tolist())
        return summarise_kl(np.maximum(exact, 0.0), k1, tokens, seed=settings.seed)  # float32 rounds below 0

    def _judged(self, rows: list[PromptRow]) -> list[Judged]:
        """The policies by each reward model. The first one's rewards go into the rows."""
        settings, found = self.settings, []
        if not rows:
            return found
        for name, text in (
            (settings.reward_model, settings.reward_chat_template),
            (settings.held_out_reward_model, settings.held_out_reward_chat_template),
        ):
            if name is None:
                continue
            with _timed(f"rewards of the replies by {name}"):
                make = partial(reward_scorer, name, chat_template=text, **self.loading)
                scorer = self._made(make)
                rewards = {side: self._rewards(scorer, rows, side) for side in rows[0].replies}
                anchors = self._anchor_rewards(scorer)
            if not self._sample():  # else it was measured where the scorer was judged
                replies = [(prompt.prompt, text) for prompt, row in self._with(rows) for text in row.replies["after"]]
                self._rounding("rewards of", make, scorer, spread(replies, ROWS))
            if not found:
                for place, row in enumerate(rows):
                    rows[place] = replace(row, rewards={side: of[place].tolist() for side, of in rewards.items()})
            tokens = {side: np.array([row.tokens[side] for row in rows], dtype=np.float64) for side in rewards}
            comparison = None
            if "before" in rewards:
                sides = {"tokens_before": tokens["before"], "tokens_after": tokens["after"]}
                both = rewards["before"], rewards["after"]
                comparison = compare_policies(*both, **anchors, **sides, seed=settings.seed)
            curve = best_of_n(rewards.get("before", rewards["after"]), seed=settings.seed)
            after = mean_estimate(rewards["after"].mean(axis=1), seed=settings.seed)
            found.append(Judged(name, name == settings.held_out_reward_model, comparison, after, curve))
        return found

    def _rewards(self, scorer: Scorer, rows: Sequence[PromptRow], side: Side) -> np.ndarray:
        replies = [
            (prompt.prompt, text, ended)
            for prompt, row in self._with(rows)
            for text, ended in zip(row.replies[side], row.ended[side], strict=True)
        ]
        return np.array(self._scores(scorer, replies), dtype=np.float64).reshape(len(rows), -1)

    def _scores(self, scorer: Scorer, rows: Sequence[tuple[Sequence[Message], str, bool]]) -> list[float]:
        """Of prompts and responses, in their order, with whether they have ended."""
        return [each.score for each in self.ranks.each(rows, lambda own: scorer(*zip(*own, strict=True)))]

    def _anchor_rewards(self, scorer: Scorer) -> dict[str, np.ndarray]:
        """Mean reward of the chosen and of the rejected responses of each prompt, [P]; nothing where some lack them."""
        pairs = [self.data.anchors.get(prompt.example_id, []) for prompt in self.data.prompts]
        if not all(pairs):
            return {}
        found = {}
        for side in ("chosen", "rejected"):
            flat = [(prompt.prompt, getattr(pair, side), True) for prompt, own in self._with(pairs) for pair in own]
            scores = iter(self._scores(scorer, flat))
            found[side] = np.array([np.mean([next(scores) for _ in own]) for own in pairs])
        return found

    def _with(self, others):
        return zip(self.data.prompts, others, strict=True)

    def _toxicity(self, rows: list[PromptRow]):
        settings = self.settings
        if settings.toxicity_model is None or not rows:
            return {}, None
        scorer = self._made(
            ToxicityScorer,
            settings.toxicity_model,
            toxic_labels=settings.toxic_labels or "auto",
            batch_size=settings.batch_size,
            device=self.ranks.device,
            trust_remote_code=settings.trust_remote_code,
        )
        scores: dict[Side, np.ndarray] = {}
        for side in rows[0].replies:
            with _timed(f"toxicity {side}"):
                flat = self.ranks.each([text for row in rows for text in row.replies[side]], scorer)
            scores[side] = np.array(flat, dtype=np.float64).reshape(len(rows), -1)
        for place, row in enumerate(rows):
            own = {side: [None if math.isnan(x) else x for x in of[place].tolist()] for side, of in scores.items()}
            rows[place] = replace(row, toxicity=own)
        summaries = {
            side: summarise_toxicity(of, method=scorer.method, threshold=scorer.threshold, seed=settings.seed)
            for side, of in scores.items()
        }
        both = [scores[side] for side in SIDES if side in scores]
        change = change_of_toxicity(*both, threshold=scorer.threshold, seed=settings.seed) if len(both) == 2 else None
        return summaries, change

    def _refusal(self, replies: dict[Side, list[GeneratedReply]]):
        settings, prompts = self.settings, self.data.refusal
        if not replies:
            return [], {}, None
        examples, safety = [each.prompt for each in prompts], [each.safety for each in prompts]
        rows = self._prompt_rows(examples, replies)
        method, refused = BUILTIN_DETECTOR, {}
        classifier = None
        if settings.refusal_classifier is not None:
            classifier = self._made(
                RefusalClassifier,
                settings.refusal_classifier,
                refusal_label=settings.refusal_label,
                batch_size=settings.batch_size,
                device=self.ranks.device,
                trust_remote_code=settings.trust_remote_code,
            )
            method = classifier.method
        for side in replies:
            texts = [row.replies[side][0] for row in rows]
            if classifier is None:
                refused[side] = [is_refusal(text) for text in texts]
            else:
                asked = [(row.prompt, text) for row, text in zip(rows, texts, strict=True)]
                found = self.ranks.each(asked, lambda own: classifier(*zip(*own, strict=True)))
                failed = sum(each is None for each in found)
                if failed:
                    self.notes.append(
                        f"refusal {side}: {failed} replies could not be classified; the detector told them"
                    )
                refused[side] = [
                    is_refusal(text) if each is None else each for each, text in zip(found, texts, strict=True)
                ]
        rows = [
            replace(row, safety=safety[place], refused={side: of[place] for side, of in refused.items()})
            for place, row in enumerate(rows)
        ]
        arrays = {side: np.array(of)[:, None] for side, of in refused.items()}
        summaries = {side: summarise_refusals(of, safety, method=method) for side, of in arrays.items()}
        change = None
        if len(arrays) == 2:
            change = refusal_change(arrays["before"], arrays["after"], safety, seed=settings.seed)
        return rows, summaries, change


def _counted(rows: Sequence[BenchmarkRow]) -> dict[str, int]:
    return dict(Counter(row.subset for row in rows))


def _complete(rows: Sequence[BenchmarkRow]) -> bool:
    return _counted(rows) == {name: subset.pairs for name, subset in SUBSETS.items()}


def _partial(available: Mapping[str, int]) -> str:
    whole = sum(subset.pairs for subset in SUBSETS.values())
    short = {subset.section for name, subset in SUBSETS.items() if available.get(name, 0) != subset.pairs}
    return (
        f"RewardBench: {sum(available.values()):,} of the benchmark's {whole:,} rows were given, so these are no "
        f"RewardBench scores; partial: {', '.join(name for name in SECTIONS if name in short)}."
    )


def _unended(ended: Sequence[Sequence[bool]]):
    shares = [1 - sum(few) / len(few) for few in ended]
    return wilson(min(math.fsum(shares), len(shares)), len(shares))


def _sources(pairs: Sequence[PreferenceExample]) -> list[str]:
    """What each pair says of its source, else the file of `file, row 17`: its name, or its path where names repeat."""
    files = [pair.origin.rpartition(", row ")[0] or pair.origin for pair in pairs]
    names = Counter(Path(file).name for file in set(files))
    return [
        pair.source or (Path(file).name if names[Path(file).name] == 1 else file)
        for pair, file in zip(pairs, files, strict=True)
    ]


@contextmanager
def _timed(what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    log.info("%s: %.1f s", what, time.perf_counter() - began)
