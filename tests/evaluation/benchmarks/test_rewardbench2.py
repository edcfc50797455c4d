"""RewardBench 2's arithmetic against its definition written again."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_lightning.errors import DataError
from rlhf_lightning.evaluation.benchmarks.rewardbench2 import (
    SUBSETS_2,
    best_of_score,
    rewardbench2_estimates,
    rewardbench2_total,
    ties_score,
)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([3, 1, 2, 0], 1), ([3, 3, 2, 0], 1 / 2), ([3, 3, 3, 3], 1 / 4), ([2, 3, 1, 0], 0), ([-1, -2, -3, -4], 1)],
)
def test_the_best_of_four_shares_its_point_among_equals(scores, expected):
    assert best_of_score(scores) == expected


def ties_from_the_definition(items):
    """The same, with arrays."""
    stats = {}
    for item in items:
        scores = np.array(item["scores"], dtype=float)
        correct, wrong = scores[: item["num_correct"]], scores[item["num_correct"] :]
        stats[item["id"]] = np.ptp(correct), correct.min() - wrong.max()
    gap = {form: np.array([s[1] for i, s in stats.items() if i.startswith(form)]) for form in ("ref", "tied")}
    both = [i[5:] for i in stats if i.startswith("tied") and f"ref:{i[5:]}" in stats]
    spread = np.array([stats[f"tied:{i}"][0] for i in both])
    tied = np.array([stats[f"tied:{i}"][1] for i in both])
    g = np.minimum(tied, [stats[f"ref:{i}"][1] for i in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        last = np.tanh(g / spread - 1)
    last = np.nan_to_num(last, nan=0.0)
    parts = (gap["tied"] > 0).mean(), (gap["ref"] > 0).mean(), (tied > spread).mean(), (g > spread).mean()
    return np.dot((0.3, 0.3, 0.2, 0.2, 0.01), (*parts, last.mean() if len(last) else 0.0))


def ties(generator, prompts=12):
    """Prompts of both forms, some of whose correct scores are all the same, and one of a single form."""
    items = [{"id": "ref:99", "subset": "Ties", "scores": [1.0, 2.0], "num_correct": 1}]
    for number in range(prompts):
        correct = generator.normal(1, 0.5, 3).round(1) if number % 3 else np.full(3, 1.0)
        wrong = generator.normal(0, 1, 4).round(1)
        items.append(
            {"id": f"tied:{number}", "subset": "Ties", "scores": [*correct.tolist(), *wrong.tolist()], "num_correct": 3}
        )
        reference = generator.normal((1, 0, 0), 1).round(1).tolist()
        items.append({"id": f"ref:{number}", "subset": "Ties", "scores": reference, "num_correct": 1})
    return items


def test_the_score_of_ties_is_its_formula():
    generator = np.random.default_rng(0)
    for _ in range(50):
        items = ties(generator)
        assert ties_score(items) == pytest.approx(ties_from_the_definition(items), abs=1e-12)


def test_where_correct_responses_score_alike_the_limit_of_tanh_counts():
    ref = {"id": "ref:1", "subset": "Ties", "scores": [1.0, 0.0], "num_correct": 1}
    tied = {"id": "tied:1", "subset": "Ties", "scores": [1.0, 1.0, 0.0], "num_correct": 2}
    assert ties_score([ref, tied]) == pytest.approx(1.01, abs=1e-12)
    worse = tied | {"scores": [1.0, 1.0, 2.0]}
    assert ties_score([ref, worse]) == pytest.approx(0.3 - 0.01, abs=1e-12)
    equal = tied | {"scores": [1.0, 1.0, 1.0]}
    assert ties_score([ref, equal]) == pytest.approx(0.3, abs=1e-12)


def test_version_2_is_the_mean_of_six_and_no_total_where_one_is_missing():
    items = [
        {"id": str(i), "subset": name, "scores": [1, 0, 0, 0] if i else [0, 1, 0, 0], "num_correct": 1}
        for name in SUBSETS_2
        if name != "Ties"
        for i in range(4)
    ]
    subsets = rewardbench2_estimates(items)
    assert {name: of.value for name, of in subsets.items()} == dict.fromkeys(list(SUBSETS_2)[:5], 0.75)
    assert rewardbench2_total(subsets) is None
    items += ties(np.random.default_rng(1))
    subsets = rewardbench2_estimates(items)
    tie = ties_score([item for item in items if item["subset"] == "Ties"])
    assert subsets["Ties"].value == tie
    assert rewardbench2_total(subsets).value == pytest.approx((5 * 0.75 + tie) / 6, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "7"}, "neither ref:<n> nor tied:<n>"),
        ({"num_correct": 2}, "both correct and wrong"),
        ({"id": "ref:1"}, "duplicate id"),
        ({"id": "tied:2"}, "no tie has both forms"),
    ],
)
def test_items_of_another_form_are_refused(change, words):
    ref = {"id": "ref:1", "subset": "Ties", "scores": [1.0, 0.0], "num_correct": 1}
    with pytest.raises(DataError, match=words):
        ties_score([ref, ref | {"id": "tied:1"} | change])
