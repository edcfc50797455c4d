"""Verdicts of an evaluation, and the names of its numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlhf_lightning.evaluation.estimates import Estimate, mean_estimate
from rlhf_lightning.evaluation.policy import Anchors, compare_policies
from rlhf_lightning.evaluation.refusal import refusal_change, summarise_refusals
from rlhf_lightning.evaluation.results import EvaluationResults, Judged, PolicyResults, as_plain, metrics
from rlhf_lightning.evaluation.toxicity import summarise_toxicity, toxicity_change
from rlhf_lightning.evaluation.verdicts import verdicts

SAFETY = ["safe"] * 20 + ["unsafe"] * 20
FEW = {"resamples": 200}
NOTHING = EvaluationResults("t", [], [], None, [], [], {})


def policies(*, lift=1.0, noise=0.0, more_refusals=0, safer=0, toxicity_rise=0.0):
    """Policies whose rewards rise by `lift` of the anchors' gap, and that many refusals more of either kind."""
    rng = np.random.default_rng(0)
    before = rng.normal(0, 0.1, (30, 4))
    after = before + lift + noise * np.random.default_rng(1).normal(0, 1, (30, 1))
    comparison = compare_policies(before, after, anchors=Anchors(np.ones(30), np.full(30, 0.001)), **FEW)
    refused = np.zeros((40, 1), dtype=bool)
    refused[5:8] = refused[25:35] = True
    later = refused.copy()
    later[10 : 10 + more_refusals] = True
    later[35 : 35 + max(safer, 0)] = True
    later[25 : 25 + max(-safer, 0)] = False
    toxicity = rng.uniform(0.1, 0.4, (30, 4))
    return PolicyResults(
        names={"before": "b", "after": "a"},
        prompts=[],
        judged=[Judged("rm", False, comparison, mean_estimate(before.mean(axis=1)), [])],
        kl=None,
        unended={},
        refusal_prompts=[],
        refusal={side: summarise_refusals(of, SAFETY) for side, of in (("before", refused), ("after", later))},
        refusal_change=refusal_change(refused, later, SAFETY, **FEW),
        toxicity={side: summarise_toxicity(toxicity, method="m", **FEW) for side in ("before", "after")},
        toxicity_change=toxicity_change(toxicity, toxicity + toxicity_rise, **FEW),
        lexicon={},
    )


def outcomes(results: EvaluationResults) -> dict[str, str]:
    words = ("AUROC", "25 points", "win against", "refuse safe", "refuse unsafe", "toxic")
    found = {verdict.target: verdict.outcome for verdict in verdicts(results)}
    return {word: next(outcome for target, outcome in found.items() if word in target) for word in words}


def test_nothing_given_is_nothing_measured_and_every_line_says_why():
    assert set(outcomes(NOTHING).values()) == {"not measured"}
    assert all(verdict.reason and verdict.value is None for verdict in verdicts(NOTHING))
    assert metrics(NOTHING) == {}


@pytest.mark.parametrize(
    ("settings", "word", "outcome"),
    [
        ({"lift": 1.0}, "25 points", "met with confidence"),
        ({"lift": 0.26, "noise": 0.1}, "25 points", "met"),
        ({"lift": 0.2}, "25 points", "not met"),
        ({"lift": 1.0}, "win against", "met with confidence"),
        ({"lift": 0.02, "noise": 0.1}, "win against", "not met"),
        ({"lift": -1.0}, "win against", "not met"),
        ({}, "refuse safe", "met"),
        ({"more_refusals": 8}, "refuse safe", "not met"),
        ({}, "refuse unsafe", "met"),
        ({"safer": 1}, "refuse unsafe", "met"),
        ({"safer": 5}, "refuse unsafe", "met with confidence"),
        ({"safer": -5}, "refuse unsafe", "not met"),
        ({}, "toxic", "met"),
        ({"toxicity_rise": 0.1}, "toxic", "not met"),
        ({"toxicity_rise": -0.1}, "toxic", "met with confidence"),
    ],
)
def test_a_verdict_goes_by_its_number_and_its_confidence_by_the_interval(settings, word, outcome):
    assert outcomes(replace(NOTHING, policies=policies(**settings)))[word] == outcome


def test_a_gain_that_the_held_out_reward_model_does_not_see_is_said():
    found = policies()
    seen = found.judged[0].comparison
    unseen = policies(lift=0.0).judged[0].comparison
    held_out = Judged("other", True, unseen, found.judged[0].reward_after, [])
    results = replace(NOTHING, policies=replace(found, judged=[*found.judged, held_out]))
    claim = next(verdict for verdict in verdicts(results) if "25 points" in verdict.target)
    assert claim.value == seen.anchored.gain
    assert claim.outcome == "over-optimized"
    assert "the held-out judge other sees +0.0 of +100.1" in claim.reason
    alone = next(v for v in verdicts(replace(NOTHING, policies=found)) if "25 points" in v.target)
    assert "no held-out reward model was given" in alone.reason
    assert metrics(results)["policy_held_out/win_rate"].value == 0.5


@pytest.mark.parametrize(
    ("held_out", "gain", "win"),
    [
        (1.0, "met with confidence", "met with confidence"),
        (0.6, "over-optimized", "met with confidence"),
        (0.1, "over-optimized", "met with confidence"),
        (-1.0, "over-optimized", "over-optimized"),
    ],
)
def test_where_a_held_out_judge_clearly_sees_less_the_policy_is_over_optimized(held_out, gain, win):
    found = policies()
    other = replace(policies(lift=held_out).judged[0], name="other", held_out=True)
    results = replace(NOTHING, policies=replace(found, judged=[*found.judged, other]))
    told = outcomes(results)
    assert (told["25 points"], told["win against"]) == (gain, win)
    claim = next(verdict for verdict in verdicts(results) if "25 points" in verdict.target)
    seen = other.comparison.anchored.gain.value
    assert (f"the held-out judge other sees {seen:+.1f} of +100.1" in claim.reason) == (gain == "over-optimized")
    below = replace(NOTHING, policies=replace(policies(lift=0.2), judged=[policies(lift=0.2).judged[0], other]))
    assert outcomes(below)["25 points"] == "not met", "what is not met is not over-optimized"


def test_what_a_blind_reward_model_says_of_the_policies_is_no_verdict():
    found = policies()
    comparison = found.judged[0].comparison
    blind = replace(comparison, anchored=replace(comparison.anchored, gain=None, refused="it is blind"))
    results = replace(NOTHING, policies=replace(found, judged=[replace(found.judged[0], comparison=blind)]))
    assert outcomes(results)["win against"] == "not measured"
    assert "it is blind" in next(verdict.reason for verdict in verdicts(results) if "win against" in verdict.target)


def test_where_no_unsafe_prompt_was_ever_refused_nothing_could_be_lost():
    found = policies()
    none = np.zeros((40, 1), dtype=bool)
    summaries = {side: summarise_refusals(none, SAFETY) for side in ("before", "after")}
    changed = replace(found, refusal=summaries, refusal_change=refusal_change(none, none, SAFETY, **FEW))
    assert outcomes(replace(NOTHING, policies=changed))["refuse unsafe"] == "not measured"
    assert outcomes(replace(NOTHING, policies=changed))["refuse safe"] == "met"


def test_numbers_stand_under_their_names_and_what_is_missing_under_none():
    found = metrics(replace(NOTHING, policies=policies(more_refusals=4)))
    assert found["safety/over_refusal_before"].value == pytest.approx(3 / 20)
    assert found["safety/over_refusal_after"].value == pytest.approx(7 / 20)
    assert found["policy/anchored_gain"].value == pytest.approx(100 / 0.999)
    assert not [name for name in found if name.startswith(("rm/", "policy/kl", "lexicon"))]
    assert all(isinstance(value, Estimate | float | int) for value in found.values())


def test_results_become_plain_values():
    plain = as_plain({"a": np.array([1.5]), "b": [Estimate(1.0, 0.5, 1.5, 3, "wilson")], 3: None})
    assert plain == {
        "a": [1.5],
        "b": [{"value": 1.0, "low": 0.5, "high": 1.5, "n": 3, "method": "wilson"}],
        "3": None,
    }
