"""RewardBench's arithmetic against known answers, the definitions written again, and simulation."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.evaluation.benchmarks.base import BenchmarkRow, is_right, prompt_as_text, rates
from rlhf_lightning.evaluation.benchmarks.prior_sets import PRIOR_SETS
from rlhf_lightning.evaluation.benchmarks.rewardbench import (
    SECTIONS,
    SUBSETS,
    SectionTable,
    lite_allocation,
    lite_key,
    lite_rows,
    lite_standard_error,
    section_scores,
    standard_error,
)
from rlhf_lightning.evaluation.benchmarks.rewardbench2 import SUBSETS_2
from rlhf_lightning.evaluation.estimates import Estimate, wilson
from tests.conftest import SHARED_DATA

REWARDBENCH = SHARED_DATA / "rewardbench"
OFFICIAL_PAIRS = {name: subset.pairs for name, subset in SUBSETS.items()}
TOY_REWARDS = {
    "length": lambda prompt, response: len(response),
    "negative length": lambda prompt, response: -len(response),
    "overlap": lambda prompt, response: len(set(response.lower().split()) & set(prompt.lower().split())),
}


def accuracies(value=0.5, **others):
    return dict.fromkeys(SUBSETS, value) | others


# ---- names and weights


def test_the_benchmark_has_23_subsets_of_2985_pairs_in_four_sections():
    assert len(SUBSETS) == 23
    assert sum(OFFICIAL_PAIRS.values()) == 2985
    sections = {name: sum(OFFICIAL_PAIRS[subset] for subset in subsets) for name, subsets in SECTIONS.items()}
    assert sections == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1431}
    assert {name for name, subset in SUBSETS.items() if subset.weight != subset.pairs} == {"math-prm"}
    assert SUBSETS["math-prm"].weight == 6 * SUBSETS["hep-cpp"].weight == 984
    assert sum(SUBSETS_2.values()) == 1865
    assert sum(PRIOR_SETS.values()) == 25175


@pytest.mark.skipif(not REWARDBENCH.is_dir(), reason="no directory ../shared/data beside the repository")
@pytest.mark.parametrize("toy", TOY_REWARDS)
def test_three_toy_rewards_get_their_known_scores_on_real_rows(toy):
    import pyarrow.parquet

    expected = json.loads((REWARDBENCH / "expected.json").read_text(encoding="utf-8"))
    assert expected["example_counts"] == {name: subset.weight for name, subset in SUBSETS.items()}
    assert {name: tuple(subsets) for name, subsets in expected["section_mapping"].items()} == SECTIONS
    rows = pyarrow.parquet.read_table(REWARDBENCH / "filtered.parquet").to_pylist()
    reward = TOY_REWARDS[toy]
    scores = [(row["subset"], [reward(row["prompt"], row[side]) for side in ("chosen", "rejected")]) for row in rows]
    table = SectionTable.of(rates((subset, is_right(both)) for subset, both in scores))
    subsets = {name: estimate.value for name, estimate in table.subsets.items()}
    answer = next(answer for name, answer in expected["known_answers"].items() if name.partition(" (")[0] == toy)
    assert subsets == pytest.approx(answer["per_subset"], abs=1e-6)
    assert section_scores(subsets) == pytest.approx(answer["section_official_counts"], abs=1e-6)
    assert table.total.value == pytest.approx(answer["score_official_counts"], abs=1e-6)
    micro = np.mean([is_right(both) for _, both in scores])
    assert micro == pytest.approx(answer["micro_accuracy"], abs=1e-6)


def test_maths_counts_as_much_as_the_six_languages_of_code():
    subsets = dict.fromkeys(SECTIONS["Reasoning"], 0.0) | {"math-prm": 1.0}
    assert section_scores(subsets) == {"Reasoning": pytest.approx(0.5, abs=1e-12)}


def test_weights_are_over_the_subsets_present():
    subsets = {"alpacaeval-easy": 1.0, "mt-bench-med": 0.0}
    assert section_scores(subsets) == {"Chat": pytest.approx(100 / 140, abs=1e-12)}


def test_a_section_that_was_not_measured_is_no_score():
    subsets = {name: 1.0 for name in SUBSETS if name not in SECTIONS["Safety"]}
    assert "Safety" not in section_scores(subsets)


def test_a_tie_is_wrong():
    assert [is_right(scores) for scores in ([1.0, 1.0], [1.5, 1.0], [1.0, 1.5])] == [False, True, False]


# ---- errors


def mean_of_four(values):
    return sum(section_scores(values).values()) / 4


def drawn_subsets(generator, counts, probability):
    """Estimates of each subset from binomial draws."""
    return {name: wilson(int(generator.binomial(count, probability[name])), count) for name, count in counts.items()}


def test_standard_errors_are_the_spread_of_simulated_benchmarks():
    generator = np.random.default_rng(0)
    probability = dict(zip(SUBSETS, generator.uniform(0.4, 0.95, 23), strict=True))
    exact = {name: Estimate(probability[name], 0, 1, OFFICIAL_PAIRS[name], "exact") for name in SUBSETS}
    runs = [drawn_subsets(generator, OFFICIAL_PAIRS, probability) for _ in range(2000)]
    values = [{name: estimate.value for name, estimate in run.items()} for run in runs]
    totals = np.std([mean_of_four(value) for value in values])
    assert standard_error(exact) == pytest.approx(totals, rel=0.06)
    for section in SECTIONS:
        spread = np.std([section_scores(value)[section] for value in values])
        assert standard_error(exact, section=section) == pytest.approx(spread, rel=0.06)
    covered = [
        estimate.low <= mean_of_four(probability) <= estimate.high
        for estimate in (SectionTable.of(run).total for run in runs)
    ]
    assert 0.93 < np.mean(covered) < 0.97


def test_estimates_hold_the_scores_and_their_pairs():
    subsets = {name: wilson(count // 2, count) for name, count in OFFICIAL_PAIRS.items()}
    sections, total = SectionTable.of(subsets).sections, SectionTable.of(subsets).total
    scores = section_scores({name: estimate.value for name, estimate in subsets.items()})
    assert {name: estimate.value for name, estimate in sections.items()} == pytest.approx(scores, abs=1e-12)
    assert {name: estimate.n for name, estimate in sections.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 1431,
    }
    assert (total.value, total.n) == (pytest.approx(sum(scores.values()) / 4, abs=1e-12), 2985)
    # 0.9 points, at accuracies of one half 1.06
    assert (total.high - total.low) / 2 / 1.96 == pytest.approx(0.0106, abs=1e-4)
    assert SectionTable.of({"hep-go": wilson(1, 2)}).total is None


# ---- Lite


def pair(subset, prompt, chosen, rejected, id="0"):
    return BenchmarkRow(id, subset, [{"role": "user", "content": prompt}], (chosen, rejected), 1, "here")


def rows_of(counts, seed=0):
    """Rows of distinct texts, shuffled."""
    rows = [pair(name, f"{name} {i}", f"good {i}", f"bad {i}") for name, count in counts.items() for i in range(count)]
    random.Random(seed).shuffle(rows)
    return rows


def test_lite_takes_of_each_subset_the_first_rows_by_hash_whatever_their_order_and_ids():
    rows = rows_of(OFFICIAL_PAIRS)
    selected = lite_rows(rows)
    assert len(selected) == 400
    allocation = lite_allocation(OFFICIAL_PAIRS)
    for name in SUBSETS:

        def key(row):
            parts = ("rewardbench-lite-v1", row.subset, row.prompt[0]["content"], *row.responses)
            return hashlib.sha256(b"\x1f".join(part.encode() for part in parts)).digest()

        own = sorted((row for row in rows if row.subset == name), key=key)[: allocation[name]]
        assert sorted(row.responses for row in own) == sorted(row.responses for row in selected if row.subset == name)
    again = [replace(row, id="1") for row in rows_of(OFFICIAL_PAIRS, seed=1)]
    assert {row.key for row in lite_rows(again)} == {row.key for row in selected}
    positions = [rows.index(row) for row in selected]
    assert positions == sorted(positions)


def test_the_key_of_a_row_is_that_of_sha256sum():
    # printf 'rewardbench-lite-v1\037hep-go\037p\037c\037r' | sha256sum
    row = pair("hep-go", "p", "c", "r")
    assert lite_key(row) == "16ff0e408ea6ec48b64620adfb38d98654ab76e9c8cdf4aeadf8e13179a63a7b"


def test_a_prompt_has_one_text_however_it_is_written():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert prompt_as_text(turns[:1]) == "a"
    assert prompt_as_text(turns) == "user\x1fa\x1eassistant\x1fb\x1euser\x1fc"
    assert prompt_as_text([{"role": "system", "content": "a"}]) != "a"


def variance(allocation, counts):
    """Of the total, at accuracies of one half, in floats."""
    shares = {
        name: SUBSETS[name].weight / sum(SUBSETS[other].weight for other in SECTIONS[SUBSETS[name].section]) / 4
        for name in counts
    }
    return sum(shares[name] ** 2 / 4 / n for name, n in allocation.items())


@pytest.mark.parametrize("size", [200, 400, 600])
def test_no_row_could_be_moved_to_a_subset_where_it_would_tell_more(size):
    allocation = lite_allocation(OFFICIAL_PAIRS, size)
    assert sum(allocation.values()) == size
    assert min(allocation.values()) >= 8
    for giver, taker in itertools.permutations(SUBSETS, 2):
        if allocation[giver] > 8 and allocation[taker] < OFFICIAL_PAIRS[taker]:
            moved = allocation | {giver: allocation[giver] - 1, taker: allocation[taker] + 1}
            assert variance(moved, OFFICIAL_PAIRS) >= variance(allocation, OFFICIAL_PAIRS) - 1e-15


def test_lite_of_parts_takes_what_there_is():
    counts = {"hep-go": 3, "alpacaeval-easy": 30, "donotanswer": 9}
    assert lite_allocation(counts, 400) == counts
    assert lite_allocation(counts, 30)["hep-go"] == 3
    with pytest.raises(ConfigurationError, match="at least 19"):
        lite_allocation(counts, 18)


@pytest.mark.parametrize(
    ("size", "points"), [(300, 2.4), (400, 2.0), (600, 1.5), (1000, 1.0), (1500, 0.6), (2985, 0.0)]
)
def test_the_error_of_lite_against_the_whole_is_as_published_in_its_definition(size, points):
    subsets = {name: Estimate(0.75, 0, 1, n, "exact") for name, n in lite_allocation(OFFICIAL_PAIRS, size).items()}
    assert 100 * lite_standard_error(subsets, OFFICIAL_PAIRS) == pytest.approx(points, abs=0.051)


def test_the_error_of_lite_is_the_spread_of_random_draws_from_one_benchmark():
    generator = np.random.default_rng(0)
    whole = {name: generator.random(count) < 0.75 for name, count in OFFICIAL_PAIRS.items()}
    allocation = lite_allocation(OFFICIAL_PAIRS)
    totals, errors = [], []
    for _ in range(1500):
        subsets = {
            name: wilson(int(generator.choice(whole[name], allocation[name], replace=False).sum()), allocation[name])
            for name in SUBSETS
        }
        totals.append(mean_of_four({name: each.value for name, each in subsets.items()}))
        errors.append(lite_standard_error(subsets, OFFICIAL_PAIRS))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(totals), rel=0.05)
    truth = mean_of_four({name: right.mean() for name, right in whole.items()})
    assert np.mean(totals) == pytest.approx(truth, abs=0.002)
