"""The report shows the numbers of an evaluation in their places, and takes its samples by rule."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rlhf_lightning.evaluation.blocks import Bars, Beside, Block, Histogram, Lines, Note, Samples, Table
from rlhf_lightning.evaluation.estimates import Estimate, wilson
from rlhf_lightning.evaluation.policy import BestOfN, summarise_kl
from rlhf_lightning.evaluation.results import CurvePoint, PairScores, PromptRow, RunCurves, ScorerResults
from rlhf_lightning.evaluation.reward_quality import reward_quality
from rlhf_lightning.report.pages import to_html, to_markdown
from rlhf_lightning.report.sections import report
from tests.evaluation.test_results import FEW, NOTHING, policies


def row(number: int, before: float, after: float, **settings) -> PromptRow:
    return PromptRow(
        f"id-{number}",
        f"question {number}",
        {"before": [f"old {number}", "-"], "after": [f"new {number}", "-"]},
        {"before": [3, 3], "after": [4, 4]},
        {"before": [True, True], "after": [False, True]},
        rewards={"before": [before, before], "after": [after, after + 1]},
        kl=[2.5, 3.0],
        **settings,
    )


@pytest.fixture
def results():
    generator = np.random.default_rng(3)
    chosen, rejected = generator.normal(1, 1, 60), generator.normal(0, 1, 60)
    quality = reward_quality(chosen, rejected, prompts=list(range(60)), **FEW)
    scorer = ScorerResults(
        "reward model", "models/rm", quality, PairScores([str(i) for i in range(60)], ["web"] * 60, chosen, rejected)
    )
    found = policies(more_refusals=4, safer=3)
    judged = replace(
        found.judged[0],
        best_of_n=[BestOfN(n, math.log(n) - (n - 1) / n, Estimate(n, 0, n + 1, 30, "b")) for n in (1, 2)],
    )
    prompts = [row(0, 0.0, 1.0), row(1, 0.0, 3.0), row(2, 2.0, 0.0), row(3, 1.0, 0.5)]
    exact = np.full((30, 2), 4.0)
    refused = row(9, 0, 0, safety="safe", refused={"before": False, "after": True})
    both = replace(
        found,
        judged=[judged],
        prompts=prompts,
        kl=summarise_kl(exact, exact, np.full((30, 2), 8.0), **FEW),
        refusal_prompts=[refused, row(10, 0, 0, safety="unsafe", refused={"before": True, "after": True})],
    )
    values = {"train/reward": [0.1, 0.4, 0.6], "train/kl": [0.0, 1.0, 4.0], "val/reward": [0.2, 0.3, 0.5]}
    run = RunCurves("runs/ppo", {name: [CurvePoint(4 * i, v) for i, v in enumerate(of)] for name, of in values.items()})
    return replace(NOTHING, title="T", scorers=[scorer], policies=both, runs=[run], notes=["mind this"])


def blocks(results, kind) -> list[Block]:
    found = [block for section in report(results).sections for block in section.blocks]
    found = [each for block in found for each in (block.blocks if isinstance(block, Beside) else [block])]
    return [block for block in found if isinstance(block, kind)]


def table(results, words: str) -> dict[str, list]:
    (found,) = [block for block in blocks(results, Table) if words in block.caption]
    return {line[0]: list(line[1:]) for line in found.rows}


def test_the_reward_model_s_numbers_stand_beside_their_names(results):
    quality = results.scorers[0].quality
    rows = table(results, "order the pairs")
    assert rows["pooled AUROC"][0] == quality.auroc
    assert rows["pairwise accuracy"][0] == quality.accuracy
    assert rows["margin AUROC"][0] == quality.auroc_margin
    scores, margins = blocks(results, Histogram)[:2]
    assert [series.name for series in scores.series] == ["chosen", "rejected"]
    assert list(scores.series[0].values) == results.scorers[0].scores.chosen.tolist()
    assert list(margins.series[0].values) == pytest.approx(
        (results.scorers[0].scores.chosen - results.scorers[0].scores.rejected).tolist()
    )


def test_before_is_before_and_after_is_after(results):
    found = results.policies
    refusals = next(bars for bars in blocks(results, Bars) if bars.caption.startswith("Refusals"))
    for group, name in zip(refusals.groups, ("over_refusal", "refusal_unsafe"), strict=True):
        assert [bar.label for bar in group.bars] == ["before training", "after training"]
        assert [bar.value for bar in group.bars] == [getattr(found.refusal[side], name) for side in ("before", "after")]
    comparison = found.judged[0].comparison
    rows = table(results, "Before and after")
    assert rows["score before"][0] == comparison.anchored.score_before
    assert rows["score after"][0] == comparison.anchored.score_after
    assert rows["gain in points"][0] == comparison.anchored.gain
    rewards = table(results, "Rates and rewards")
    assert rewards["mean reward before"][0] == comparison.reward_before
    assert rewards["mean reward after"][0] == comparison.reward_after
    toxicity = table(results, "Toxicity of the responses")
    assert toxicity["before training"][0] == found.toxicity["before"].all.mean
    assert toxicity["change"][0] == found.toxicity_change.mean


def test_reward_is_drawn_over_the_root_of_the_kl(results):
    (plane,) = [block for block in blocks(results, Lines) if "distance" in block.caption]
    series = {each.name: each.points for each in plane.series}
    assert [point.x for point in series["best of n, policy before"]] == pytest.approx([0, math.sqrt(math.log(2) - 0.5)])
    comparison = results.policies.judged[0].comparison
    assert [(point.x, point.y) for point in series["measured here"]] == [
        (0.0, comparison.reward_before),
        (2.0, comparison.reward_after),
    ]
    assert [(p.x, p.y, p.label) for p in series["training, runs/ppo"]] == [
        (0.0, 0.1, "step 0"),
        (1.0, 0.4, "step 4"),
        (2.0, 0.6, "step 8"),
    ]


def test_learning_curves_are_drawn_by_step_with_training_and_validation_together(results):
    (curve,) = [block for block in blocks(results, Lines) if block.caption == "runs/ppo: reward"]
    assert {series.name: [(p.x, p.y) for p in series.points] for series in curve.series} == {
        "train/reward": [(0, 0.1), (4, 0.4), (8, 0.6)],
        "val/reward": [(0, 0.2), (4, 0.3), (8, 0.5)],
    }


def test_samples_are_all_by_hash_then_the_largest_gains_and_losses_and_refusals_of_safe_prompts(results):
    by_hash, gains, losses, refusals = blocks(results, Samples)
    assert {sample.title for sample in by_hash.rows} == {"id-0", "id-1", "id-2", "id-3"}
    assert [sample.title for sample in gains.rows] == ["id-1", "id-0"]
    assert [sample.title for sample in losses.rows] == ["id-2"]
    assert [sample.title for sample in refusals.rows] == ["id-9"]
    old, new = gains.rows[0].texts
    assert (old.text, new.text) == ("old 1", "new 1")
    assert dict(old.facts) == {"reward": 0.0, "mean of 2": 0.0, "tokens": 3}
    assert list(new.facts) == [("reward", 3.0), ("mean of 2", 3.5), ("tokens", 4), ("KL", 2.5), ("flag", "cut")]


def test_accuracies_of_the_largest_sources_are_drawn_and_the_others_together(results):
    scorer = results.scorers[0]

    def bars(sources):
        quality = replace(scorer.quality, accuracy_by_source=sources)
        drawn = blocks(replace(results, scorers=[replace(scorer, quality=quality)]), Bars)
        (found,) = [block for block in drawn if "accuracy by source" in block.caption] or [None]
        return found and {bar.label: bar.value for bar in found.groups[0].bars}

    many = {f"source {number:02}": wilson(number, 2 * number) for number in range(1, 21)}
    assert bars({"one": wilson(1, 2)}) is None
    few = dict(list(many.items())[:16])
    assert bars(few) == few
    drawn = bars(many)
    assert drawn.pop("5 other sources") == wilson(15, 30)
    assert drawn == dict(list(many.items())[5:])


def test_notes_stand_with_the_verdicts_and_a_score_above_the_chosen_is_noted(results):
    first = report(results).sections[0]
    assert "mind this" in [block.text for block in first.blocks if isinstance(block, Note)]
    above = replace(results, policies=replace(results.policies, judged=policies(lift=3.0).judged))
    assert not [note for note in blocks(results, Note) if "above 100" in note.text]
    assert [note for note in blocks(above, Note) if "above 100" in note.text]


def test_both_forms_can_be_made_of_it_and_of_nothing(results):
    for each in (results, NOTHING):
        document = report(each)
        assert "<h1" in to_html(document)
        assert "# " in to_markdown(document)
