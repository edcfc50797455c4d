"""All that an evaluation measured. What is None was not measured; `metrics` gives each number its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

import numpy as np

from rlhf_lightning.evaluation.benchmarks.base import Result
from rlhf_lightning.evaluation.estimates import Estimate, Quantity
from rlhf_lightning.evaluation.policy import BestOfN, KLSummary, PolicyComparison
from rlhf_lightning.evaluation.refusal import RefusalChange, RefusalSummary, Safety
from rlhf_lightning.evaluation.reward_quality import RewardQuality
from rlhf_lightning.evaluation.rounding import Rounding
from rlhf_lightning.evaluation.toxicity import LexiconSummary, ToxicityChange, ToxicitySummary

Side = Literal["before", "after"]
SIDES: tuple[Side, ...] = ("before", "after")


@dataclass(frozen=True)
class PairScores:
    """Scores of N held-out pairs, float64 [N]."""

    ids: list[str]
    sources: list[str]
    chosen: np.ndarray
    rejected: np.ndarray
    spreads: np.ndarray | None = None
    """Of the two scores, the standard deviations over the heads of an ensemble, [N, 2]."""


@dataclass(frozen=True)
class ScorerResults:
    """One scorer: a reward model, or a policy by its implicit reward."""

    title: str
    name: str
    quality: RewardQuality | None = None
    scores: PairScores | None = None
    benchmarks: dict[str, Result] = field(default_factory=dict)
    """By their names; see `benchmarks.BENCHMARKS`."""
    rounding: Rounding | None = None
    """Of half precision; None in float32."""


@dataclass(frozen=True)
class JudgeResults:
    """A language model as a judge."""

    name: str
    benchmarks: dict[str, Result]


@dataclass
class PromptRow:
    """A prompt with the responses of each side, and what was found out about them."""

    id: str
    prompt: str
    replies: dict[Side, list[str]]
    tokens: dict[Side, list[int]]
    ended: dict[Side, list[bool]]
    rewards: dict[Side, list[float]] = field(default_factory=dict)
    kl: list[float] | None = None
    """Of the policy after from that before, nats, of each response after."""
    toxicity: dict[Side, list[float | None]] = field(default_factory=dict)
    safety: Safety | None = None
    refused: dict[Side, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """The policies by one reward model."""

    name: str
    held_out: bool
    comparison: PolicyComparison | None
    """None where there is no policy before."""
    reward_after: Estimate
    best_of_n: list[BestOfN]
    """Of the policy before, or of the only one."""


@dataclass(frozen=True)
class PolicyResults:
    """A policy after training, and where it is given, the one before."""

    names: dict[Side, str]
    prompts: list[PromptRow]
    judged: list[Judged]
    kl: KLSummary | None
    unended: dict[Side, Estimate]
    """Share of responses cut at the longest length; n: prompts."""
    refusal_prompts: list[PromptRow]
    refusal: dict[Side, RefusalSummary]
    refusal_change: RefusalChange | None
    toxicity: dict[Side, ToxicitySummary]
    toxicity_change: ToxicityChange | None
    lexicon: dict[Side, LexiconSummary]

    @property
    def titles(self) -> dict[Side, str]:
        """What the report calls each: a single policy is neither before nor after."""
        return {side: f"{side} training" if "before" in self.names else "policy" for side in self.names}


@dataclass(frozen=True)
class CurvePoint:
    step: int
    value: float


@dataclass(frozen=True)
class RunCurves:
    """What a training run logged, by the name of the number."""

    name: str
    values: dict[str, list[CurvePoint]]


@dataclass(frozen=True)
class EvaluationResults:
    """Everything that the report shows."""

    title: str
    scorers: list[ScorerResults]
    judges: list[JudgeResults]
    policies: PolicyResults | None
    runs: list[RunCurves]
    notes: list[str]
    """What a reader must not miss, in sentences."""
    provenance: dict[str, str | int | float | list[str] | None]


def metrics(results: EvaluationResults) -> dict[str, Estimate | float | int]:
    """Every number by the name that docs/metrics.md defines, without those that were not measured."""
    found: dict[str, Quantity] = {}
    for scorer in results.scorers:
        prefix = {"reward model": "rm", "implicit reward": "implicit"}.get(scorer.title, "rm_held_out")
        found |= {f"{prefix}/{name}": value for name, value in _scorer_metrics(scorer)}
    for judge in results.judges:
        for result in judge.benchmarks.values():
            found |= {f"judge/{name}": value for name, value in result.metrics().items()}
    if results.policies is not None:
        found |= dict(_policy_metrics(results.policies))
    return {name: value for name, value in found.items() if value is not None}


def _scorer_metrics(scorer: ScorerResults) -> Iterator[tuple[str, Quantity]]:
    if (rounding := scorer.rounding) is not None:
        yield from (("rounding_rms", rounding.rms), ("rounding_sd", rounding.sd))
    if (quality := scorer.quality) is not None:
        yield from (("auroc", quality.auroc), ("accuracy", quality.accuracy), ("auroc_margin", quality.auroc_margin))
        yield from (("ece", quality.calibration.ece), ("brier", quality.calibration.brier), ("ties", quality.ties))
        yield from (("temperature", quality.calibration.temperature), ("pairs", quality.pairs))
        if quality.length is not None:
            yield "length_spearman", quality.length.spearman
            yield "longer_wins", quality.length.longer_wins
        if (heads := quality.heads) is not None:
            yield from (("spread", heads.spread), ("spread_auroc", heads.wrong_auroc))
    for result in scorer.benchmarks.values():
        yield from result.metrics().items()


def _policy_metrics(policies: PolicyResults) -> Iterator[tuple[str, Quantity]]:
    for judged in policies.judged:
        prefix = "policy_held_out" if judged.held_out else "policy"
        yield f"{prefix}/reward_after", judged.reward_after
        if (comparison := judged.comparison) is None:
            continue
        yield f"{prefix}/reward_before", comparison.reward_before
        yield f"{prefix}/reward_gain", comparison.reward_gain
        yield f"{prefix}/win_rate", comparison.win_rate
        yield f"{prefix}/gain_sd", comparison.gain_sd
        yield f"{prefix}/percentile", comparison.percentile
        if comparison.anchored is not None:
            yield f"{prefix}/anchored_gain", comparison.anchored.gain
            yield f"{prefix}/anchored_before", comparison.anchored.score_before
            yield f"{prefix}/anchored_after", comparison.anchored.score_after
        if comparison.length_controlled is not None:
            yield f"{prefix}/lc_win_rate", comparison.length_controlled.win_rate
            yield f"{prefix}/length_overlap", comparison.length_controlled.length_overlap
    if policies.kl is not None:
        yield "policy/kl_nats", policies.kl.per_reply
        yield "policy/kl_per_token", policies.kl.per_token
        yield "policy/kl_k1", policies.kl.k1_per_reply
    for side, summary in policies.refusal.items():
        yield f"safety/over_refusal_{side}", summary.over_refusal
        yield f"safety/refusal_unsafe_{side}", summary.refusal_unsafe
        yield f"safety/balanced_{side}", summary.balanced
    for side, toxicity in policies.toxicity.items():
        yield f"toxicity/mean_{side}", toxicity.all.mean
        yield f"toxicity/rate_{side}", toxicity.all.rate
        yield f"toxicity/expected_max_{side}", toxicity.all.expected_max
        yield f"toxicity/prob_any_{side}", toxicity.all.prob_any
        yield f"toxicity/failed_{side}", toxicity.all.failed
    for side, lexicon in policies.lexicon.items():
        yield f"lexicon/rate_{side}", lexicon.lexicon_rate
    for side, share in policies.unended.items():
        yield f"policy/unended_{side}", share


def as_plain(value: object) -> Any:
    """Dataclasses, arrays and Estimates as what JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: as_plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [as_plain(each) for each in value]
    return value
