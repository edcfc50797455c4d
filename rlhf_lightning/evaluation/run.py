"""An evaluation: checks the settings, reads the files, then measures one model after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from rlhf_lightning.data.sources import source_list
from rlhf_lightning.data.splits import prompt_hash
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.evaluation.answers import Answers
from rlhf_lightning.evaluation.benchmarks import BENCHMARKS
from rlhf_lightning.evaluation.benchmarks.base import Benchmark, BenchmarkRow, Result, score_rows
from rlhf_lightning.evaluation.inputs import Inputs, sources_of, takers
from rlhf_lightning.evaluation.judge import Judge, PolicyJudge
from rlhf_lightning.evaluation.provenance import provenance
from rlhf_lightning.evaluation.ranks import Ranks, check_devices, device_of
from rlhf_lightning.evaluation.results import EvaluationResults, JudgeResults, PairScores, ScorerResults
from rlhf_lightning.evaluation.reward_quality import RewardQuality, reward_quality
from rlhf_lightning.evaluation.session import Session, timed
from rlhf_lightning.evaluation.settings import REWARDBENCH_PROMPTS, EvaluationSettings
from rlhf_lightning.evaluation.text_classifier import read_labels
from rlhf_lightning.evaluation.toxicity import find_toxic_labels
from rlhf_lightning.models.causal_lm import load_causal_config
from rlhf_lightning.rewards.functions import check_text_of, is_judge
from rlhf_lightning.rewards.scorers import ImplicitScorer, Scorer, check_scores_rows
from rlhf_lightning.rewards.source import reward_list
from rlhf_lightning.user_code import load_function, name_of, names_function


def evaluate(settings: EvaluationSettings, ranks: Ranks | None = None) -> EvaluationResults:
    """All that the settings ask for. Files are read and checked before the first model is loaded.

    With several processes (see `launch`) each scores and samples a share, and all of them return the same; without
    `ranks` this process does all.

    Raises `ConfigurationError` when nothing is asked for or parts do not fit together, and what the parts raise.
    """
    check(settings)
    began = time.time()
    ranks = ranks or Ranks(device=device_of(settings.device))
    session = Session(settings, ranks.once(lambda: Inputs(settings)), ranks)
    scorers, judges, policies = measure_scorers(session), measure_judges(session), Answers(session).measured()
    return EvaluationResults(
        title=settings.title,
        scorers=scorers,
        judges=judges,
        policies=policies,
        runs=session.data.runs,
        notes=session.notes,
        provenance=provenance(settings, session.fingerprints, seconds=time.time() - began, ranks=ranks),
    )


def check(settings: EvaluationSettings) -> None:
    """Raise `ConfigurationError` for settings that measure nothing, or that need others."""
    if settings.reward_model is None and settings.policy is None and settings.judge is None:
        raise ConfigurationError("evaluate: nothing to evaluate; give reward_model, policy or judge")
    scored = "scorer" in takers(settings)
    if settings.prompts == REWARDBENCH_PROMPTS and settings.rewardbench is None:
        raise ConfigurationError("evaluate: prompts are those of RewardBench; give rewardbench as well")
    for name in ("pairs", "prompts"):
        given = getattr(settings, name)
        if given is not None and any(one.weight != 1 for one in source_list(given)):
            raise ConfigurationError(f"evaluate: {name}: weights are for training; leave weight out")
    if settings.pairs is not None and not scored:
        raise ConfigurationError("evaluate: pairs are scored by a reward_model, or by a policy with implicit_reward")
    for name, other in (("reference", "policy"), ("held_out_reward_model", "reward_model"), ("prompts", "policy")):
        if getattr(settings, name) is not None and getattr(settings, other) is None:
            raise ConfigurationError(f"evaluate: {name} without {other}; give both, or neither")
    if settings.implicit_reward and settings.policy is None:
        raise ConfigurationError("evaluate: implicit_reward without policy; give both, or neither")
    _check_benchmarks(settings)
    scored_on = settings.pairs, settings.prompts, *(of.source(settings) for of in BENCHMARKS)
    if scored and not any(scored_on):
        raise ConfigurationError("evaluate: there is nothing to score; give pairs, rewardbench, or policy and prompts")
    answers = settings.prompts is not None or settings.refusal_prompts is not None
    if settings.policy is not None and not settings.implicit_reward and not answers:
        raise ConfigurationError("evaluate: the policy has nothing to answer; give prompts or refusal_prompts")
    check_devices(device_of(settings.device), settings.devices)
    _check_rewards(settings)
    _check_models(settings)
    for name in ("toxicity_model", "lexicon"):
        if getattr(settings, name) is not None and (settings.policy is None or settings.prompts is None):
            raise ConfigurationError(f"evaluate: {name} reads responses of a policy; give policy and prompts")


def _check_rewards(settings: EvaluationSettings) -> None:
    """Raise `ConfigurationError` for what is no list of rewards, and for templates that nothing reads."""
    for name in ("reward", "held_out_reward"):
        given, template = getattr(settings, f"{name}_model"), getattr(settings, f"{name}_chat_template")
        if given is None:
            check_text_of(None, template, f"evaluate: {name}_chat_template")
            continue
        rewards = reward_list(given, template, key=f"evaluate: {name}_model")
        if not isinstance(given, str) and any(str(reward.source).endswith(".ckpt") for reward in rewards):
            raise ConfigurationError(
                f"evaluate: {name}_model: a checkpoint within a list; export it, and give its directory there"
            )


def _check_benchmarks(settings: EvaluationSettings) -> None:
    """Raise `ConfigurationError` for benchmarks that nothing is evaluated on, and for a judge without one."""
    known = [benchmark.name for benchmark in BENCHMARKS if type(benchmark).source is Benchmark.source]
    if unknown := [name for name in settings.benchmarks or () if name not in known]:
        raise ConfigurationError(
            f"evaluate: benchmarks: {unknown[0]} is not one of {known}; rewardbench, rewardbench2 and prior_sets are "
            "keys of their own"
        )
    asked = [benchmark for benchmark in BENCHMARKS if benchmark.source(settings)]
    if settings.judge is not None and not any(benchmark.taken_by == "judge" for benchmark in asked):
        raise ConfigurationError(
            "evaluate: judge without a benchmark to judge; give rewardbench, rewardbench2 or benchmarks.judgebench"
        )
    if asked and not takers(settings):
        raise ConfigurationError(
            f"evaluate: {asked[0].title} needs a reward_model, a judge, or a policy with implicit_reward"
        )


def _check_models(settings: EvaluationSettings) -> None:
    """Check each model by its configuration, hours before it is loaded; checkpoints are checked when exported."""
    trust = {"trust_remote_code": settings.trust_remote_code}
    for name in filter(None, (settings.policy, settings.reference, settings.judge)):
        if not name.endswith(".ckpt"):
            load_causal_config(name, **trust)
    given = [each for each in (settings.reward_model, settings.held_out_reward_model) if each is not None]
    for source in (reward.source for rewards in given for reward in reward_list(rewards)):
        if not isinstance(source, str) or names_function(source):
            load_function(name_of(source), "the directory of a reward model")
        elif not source.endswith(".ckpt") and not is_judge(source):
            check_scores_rows(source, **trust)
    if settings.toxicity_model is not None and settings.toxic_labels is None:
        find_toxic_labels(settings.toxicity_model, read_labels(settings.toxicity_model, **trust))
    if settings.refusal_classifier is not None:
        read_labels(settings.refusal_classifier, **trust)


def measure_scorers(session: Session) -> list[ScorerResults]:
    """The reward models, and the policy by its implicit reward, on pairs and benchmarks."""
    settings = session.settings
    found = [_scorer(session, model.title, model.load) for model in session.reward_models()]
    if settings.implicit_reward and settings.policy is not None:
        load = partial(ImplicitScorer, settings.policy, settings.reference, **session.scoring)
        found.append(_scorer(session, "implicit reward", load))
    return found


def _scorer(session: Session, title: str, load: Callable[..., Scorer]) -> ScorerResults:
    scorer = session.made(load)
    session.fingerprints[f"{title}: {scorer.name}"] = scorer.fingerprint
    file = session.kept / f"scores-{scorer.fingerprint[:16]}.jsonl"
    quality = scores = None
    if session.data.pairs:
        with timed(f"{title}: {len(session.data.pairs)} pairs"):
            quality, scores = _pairs(session, scorer, file)
    benchmarks = _benchmarks(session, title, "scorer", scorer, file)
    rounding = session.rounding(title, load, scorer, session.sample())
    return ScorerResults(title, scorer.name, quality, scores, benchmarks, rounding)


def _benchmarks(session: Session, title: str, kind: str, by: Scorer | Judge, file: Path) -> dict[str, Result]:
    """All benchmarks that are asked for, of those that a scorer, or a judge, takes."""
    found = {}
    for benchmark, rows in session.data.rows.items():
        if benchmark.taken_by == kind:
            with timed(f"{title}: {benchmark.title}"):
                found[benchmark.name] = benchmark.run(by, rows, session.settings, file=file, ranks=session.ranks)
            for sentence in benchmark.notes(rows):
                session.note(sentence)
    return found


def _pairs(session: Session, scorer: Scorer, file: Path) -> tuple[RewardQuality, PairScores]:
    pairs = session.data.pairs
    rows = [BenchmarkRow(p.example_id, "pairs", p.prompt, (p.chosen, p.rejected), 1, p.origin) for p in pairs]
    scored = score_rows(scorer, rows, file, ranks=session.ranks)
    chosen, rejected = np.array([row.scores for row in scored]).T
    heads = np.array([row.heads for row in scored]) if scored[0].heads else None
    tokens, sources = np.array([row.tokens for row in scored]), sources_of(pairs)
    quality = reward_quality(
        chosen,
        rejected,
        tokens=(tokens[:, 0], tokens[:, 1]),
        sources=sources,
        truncated=np.array([any(row.truncated) for row in scored]),
        prompts=[prompt_hash(pair.prompt) for pair in pairs],
        heads=None if heads is None else (heads[:, 0], heads[:, 1]),
        seed=session.settings.seed,
    )
    spreads = None if heads is None else heads.std(axis=2)
    return quality, PairScores([pair.example_id for pair in pairs], sources, chosen, rejected, spreads)


def measure_judges(session: Session) -> list[JudgeResults]:
    """A language model's verdicts on the benchmarks."""
    settings = session.settings
    if settings.judge is None:
        return []
    judge = session.made(
        PolicyJudge,
        settings.judge,
        max_new_tokens=settings.judge_max_new_tokens,
        batch_size=settings.batch_size,
        **session.loading,
    )
    session.fingerprints[f"judge: {judge.name}"] = judge.fingerprint
    file = session.kept / f"judge-{judge.fingerprint[:16]}.jsonl"
    return [JudgeResults(judge.name, _benchmarks(session, "judge", "judge", judge, file))]
