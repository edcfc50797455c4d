"""Batches by a number of tokens: what they hold, how much each pair counts, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.data.token_budget import TokenPlan, tokens_of
from rlhf_lightning.errors import ConfigurationError
from tests.data.test_loader import epochs_of, optimizer_steps, pairs_of

lengths = st.lists(st.integers(1, 50), min_size=3, max_size=400).map(np.array)


def smallest_budget(tokens, batches):
    longest = int(tokens.max())
    return 3 * (longest + -(-longest // batches))


@settings(max_examples=150, deadline=None)
@given(lengths, st.sampled_from([1, 2, 5]), st.sampled_from([1, 2, 3]), st.booleans(), st.integers(0, 300))
def test_batches_keep_the_budget_and_every_pair_counts_once_and_the_same(tokens, accumulate, world_size, shuffle, more):
    budget = smallest_budget(tokens, accumulate * world_size) + more
    options = {"tokens_per_batch": budget, "accumulate": accumulate, "shuffle": shuffle, "seed": 1}
    for epoch in (0, 1):
        processes = epochs_of(TokenPlan, tokens, world_size=world_size, epoch=epoch, **options)
        plan = TokenPlan(tokens, world_size=world_size, **options)
        assert {len(process) for process in processes} == {len(plan)}
        batches = [batch for process in processes for batch in process]
        assert sorted(int(index) for batch in batches for index in batch.indices) == list(range(len(tokens)))
        assert min(len(batch.indices) for batch in batches) >= 1
        assert max(int(tokens[batch.indices].sum()) for batch in batches) <= budget
        for step in optimizer_steps(processes, accumulate):
            # Lightning divides by the accumulation, strategies by the processes; the loss of a batch is a mean.
            counts = {batch.weight / len(batch.indices) / (accumulate * world_size) for batch in step}
            np.testing.assert_allclose(list(counts), 1 / len(pairs_of(step)), rtol=1e-12)


def test_batches_and_steps_are_of_nearly_equal_tokens():
    tokens = np.random.default_rng(0).lognormal(4, 0.8, 5000).clip(2, 600).astype(int)
    processes = epochs_of(TokenPlan, tokens, world_size=2, tokens_per_batch=8000, accumulate=4, seed=0)
    sums = np.array([[tokens[batch.indices].sum() for batch in process] for process in processes])
    assert sums.max() <= 8000
    assert sums.max() - sums.min() <= 400  # the average is above 6,000
    assert sums.mean() > 6000
    pairs = {len(pairs_of(step)) for step in optimizer_steps(processes, 4)}
    assert len(pairs) > 1


def test_rows_of_a_mixture_keep_the_budget_in_every_epoch():
    tokens = np.array([10] * 60 + [40] * 31)
    source = np.array([0] * 60 + [1] * 31)
    options = {"tokens_per_batch": 250, "source": source, "weights": (1.0, 1.5), "seed": 0}
    sizes = set()
    for epoch in range(6):
        (batches,) = epochs_of(TokenPlan, tokens, world_size=1, epoch=epoch, **options)
        sizes.add(len(batches))
        assert max(tokens[batch.indices].sum() for batch in batches) <= 250
        assert sum(len(batch.indices) for batch in batches) == 60 + 46
    assert sizes == {len(TokenPlan(tokens, **options))}


def test_a_budget_that_one_pair_takes_is_refused():
    with pytest.raises(ConfigurationError, match=r"data.tokens_per_batch: 200 .* at least 600"):
        TokenPlan(np.array([100, 5]), tokens_per_batch=200)
    TokenPlan(np.array([100, 5]), tokens_per_batch=600)


def test_a_shared_prompt_counts_once():
    segments = np.array([[10, 3, 4], [1, 2, 2]])
    assert tokens_of(segments, "shared").tolist() == [17, 5]
    assert tokens_of(segments, "packed").tolist() == [27, 6]
    with pytest.raises(ConfigurationError, match="padded"):
        tokens_of(segments, "padded")
