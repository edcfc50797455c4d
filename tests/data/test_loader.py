"""Which pairs go together, in which order and with which weight, and the tensors made of them."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.data.batching import BatchLoader, EvaluationPlan, MicroBatch, TrainingPlan, collate_pairs
from rlhf_lightning.data.examples import LoadReport
from rlhf_lightning.data.selection import TokenizedPairs
from rlhf_lightning.data.tokenized import PAIR_SCHEMA, TokenStore
from rlhf_lightning.errors import ConfigurationError

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=90).map(np.array)
batch_sizes = st.integers(1, 5)
accumulations = st.sampled_from([1, 3, 8])
world_sizes = st.sampled_from([1, 2, 3])
quick = settings(max_examples=150)


def epochs_of(plan_class, lengths, *, world_size, epoch=0, **options):
    """The batches of each process in one epoch."""
    return [
        list(plan_class(lengths, rank=rank, world_size=world_size, **options).epoch(epoch))
        for rank in range(world_size)
    ]


def optimizer_steps(processes, accumulate):
    """Micro-batches of all processes, optimizer step by optimizer step, as Lightning counts them."""
    batches = len(processes[0])
    return [
        [batch for process in processes for batch in process[start : start + accumulate]]
        for start in range(0, batches, accumulate)
    ]


def pairs_of(step):
    return sorted(int(index) for batch in step for index in batch.indices)


@quick
@given(lengths, batch_sizes, accumulations, world_sizes, st.booleans(), st.booleans())
def test_each_training_pair_comes_once_per_epoch_in_equally_many_batches(
    lengths, batch_size, accumulate, world_size, shuffle, group
):
    assume(len(lengths) >= world_size)
    options = {"batch_size": batch_size, "accumulate": accumulate, "shuffle": shuffle, "group_by_length": group}
    processes = epochs_of(TrainingPlan, lengths, world_size=world_size, **options)
    assert pairs_of(batch for process in processes for batch in process) == list(range(len(lengths)))
    plan = TrainingPlan(lengths, world_size=world_size, **options)
    assert {len(process) for process in processes} == {len(plan)}
    sizes = [len(batch.indices) for process in processes for batch in process]
    assert min(sizes) >= 1
    assert max(sizes) <= batch_size + (world_size > 1)


@quick
@given(
    st.lists(st.tuples(st.integers(1, 20), st.sampled_from([0.3, 1.0, 2.0, 2.5])), min_size=1, max_size=3),
    batch_sizes,
    accumulations,
    world_sizes,
    st.booleans(),
)
def test_each_source_of_a_mixture_comes_as_often_as_its_weight_says(mixture, batch_size, accumulate, world, shuffle):
    sizes, weights = zip(*mixture, strict=True)
    source = np.repeat(np.arange(len(sizes)), sizes)
    assume(sum(round(size * weight) for size, weight in mixture) >= world)
    options = {"batch_size": batch_size, "accumulate": accumulate, "shuffle": shuffle, "weights": weights}
    processes = epochs_of(TrainingPlan, np.ones(len(source)), world_size=world, source=source, **options)
    counts = np.bincount(pairs_of(batch for process in processes for batch in process), minlength=len(source))
    for number, (size, weight) in enumerate(mixture):
        own = counts[source == number]
        assert own.sum() == round(size * weight)
        assert own.max() - own.min() <= 1
    for step in optimizer_steps(processes, accumulate):
        assert sum(batch.weight for batch in step) == pytest.approx(accumulate * world)


@quick
@given(lengths, batch_sizes, accumulations, world_sizes)
def test_each_pair_of_an_optimizer_step_has_the_same_weight(lengths, batch_size, accumulate, world_size):
    assume(len(lengths) >= world_size)
    processes = epochs_of(TrainingPlan, lengths, world_size=world_size, batch_size=batch_size, accumulate=accumulate)
    for step in optimizer_steps(processes, accumulate):
        pairs = len(pairs_of(step))
        for batch in step:
            # The loss is a batch mean; Lightning divides it by `accumulate` and averages gradients over processes.
            weight_of_a_pair = batch.weight / accumulate / world_size / len(batch.indices)
            assert weight_of_a_pair * pairs == pytest.approx(1, rel=1e-12)


@quick
@given(lengths, batch_sizes, accumulations, world_sizes)
def test_all_optimizer_steps_but_the_last_are_full(lengths, batch_size, accumulate, world_size):
    assume(len(lengths) >= world_size)
    processes = epochs_of(TrainingPlan, lengths, world_size=world_size, batch_size=batch_size, accumulate=accumulate)
    *full, last = [len(pairs_of(step)) for step in optimizer_steps(processes, accumulate)]
    step_pairs = batch_size * accumulate * world_size
    assert full == [step_pairs] * len(full)
    assert world_size <= last < step_pairs + world_size


@quick
@given(lengths, st.integers(1, 3), accumulations, st.integers(0, 3))
def test_the_pairs_of_a_step_depend_neither_on_grouping_nor_on_the_number_of_processes(
    lengths, scale, accumulate, epoch
):
    step_pairs = 6 * scale * accumulate
    assume(len(lengths) % step_pairs >= 3 or (len(lengths) % step_pairs == 0))

    def steps(world_size, group):
        processes = epochs_of(
            TrainingPlan,
            lengths,
            world_size=world_size,
            batch_size=6 * scale // world_size,
            accumulate=accumulate,
            group_by_length=group,
            epoch=epoch,
        )
        return [pairs_of(step) for step in optimizer_steps(processes, accumulate)]

    assert steps(1, True) == steps(1, False) == steps(2, True) == steps(3, True) == steps(3, False)


def order_of(lengths=None, epoch=0, **options):
    plan = TrainingPlan(np.ones(40, dtype=int) if lengths is None else lengths, batch_size=4, **options)
    return [int(index) for batch in plan.epoch(epoch) for index in batch.indices]


def test_the_same_seed_gives_the_same_order_and_another_seed_or_epoch_another():
    assert order_of(seed=1) == order_of(seed=1)
    assert order_of(seed=1) != order_of(seed=2)
    assert order_of(seed=1, epoch=0) != order_of(seed=1, epoch=1)
    assert order_of(seed=1, epoch=3) == order_of(seed=1, epoch=3)
    assert order_of(seed=0) != list(range(40))


def test_without_shuffling_every_epoch_has_the_order_of_the_file():
    lengths = np.arange(40) % 7
    assert order_of(lengths, shuffle=False) == order_of(lengths, shuffle=False, epoch=5) == list(range(40))


def test_pairs_of_like_length_are_grouped_within_an_optimizer_step_longest_first():
    lengths = np.array([5, 1, 4, 2, 3, 6, 8, 7])
    plan = TrainingPlan(lengths, batch_size=2, accumulate=2, seed=3)
    batches = [lengths[batch.indices].tolist() for batch in plan.epoch(0)]
    for first, second in (batches[:2], batches[2:]):
        assert first + second == sorted(first + second, reverse=True)
    plain = TrainingPlan(lengths, batch_size=2, accumulate=2, seed=3, group_by_length=False)
    assert [lengths[batch.indices].tolist() for batch in plain.epoch(0)] != batches


def test_the_processes_share_neighbours_of_a_grouped_step():
    lengths = np.arange(8)
    first, second = epochs_of(TrainingPlan, lengths, world_size=2, batch_size=2, accumulate=2)
    assert [lengths[batch.indices].tolist() for batch in first] == [[7, 6], [3, 2]]
    assert [lengths[batch.indices].tolist() for batch in second] == [[5, 4], [1, 0]]


@quick
@given(lengths, batch_sizes, world_sizes)
def test_each_evaluation_pair_comes_once_over_all_processes_in_equally_many_batches(lengths, batch_size, world_size):
    assume(len(lengths) >= world_size)
    processes = epochs_of(EvaluationPlan, lengths, world_size=world_size, batch_size=batch_size)
    assert pairs_of(batch for process in processes for batch in process) == list(range(len(lengths)))
    plan = EvaluationPlan(lengths, batch_size=batch_size, world_size=world_size)
    assert {len(process) for process in processes} == {len(plan)}
    sizes = [len(batch.indices) for process in processes for batch in process]
    assert min(sizes) >= 1
    assert max(sizes) <= batch_size + (world_size > 1)
    assert {batch.weight for process in processes for batch in process} == {1.0}


def test_evaluation_begins_with_the_longest_pairs():
    lengths = np.array([3, 9, 1, 5])
    plan = EvaluationPlan(lengths, batch_size=3)
    assert [batch.indices.tolist() for batch in plan.epoch(0)] == [[1, 3], [0, 2]]


@quick
@given(lengths, batch_sizes, world_sizes, st.one_of(st.integers(0, 40), st.floats(0, 1)))
def test_with_a_limit_each_evaluation_pair_comes_once_in_batches_of_the_same_sizes(
    lengths, batch_size, world_size, limit
):
    assume(len(lengths) >= world_size)
    settings = {"lengths": lengths, "world_size": world_size, "batch_size": batch_size}
    whole, limited = (epochs_of(EvaluationPlan, **settings | own) for own in ({}, {"limit": limit}))
    assert pairs_of(batch for process in limited for batch in process) == list(range(len(lengths)))
    assert [[len(batch.indices) for batch in process] for process in limited] == [
        [len(batch.indices) for batch in process] for process in whole
    ]


def test_the_batches_up_to_a_limit_are_a_fair_sample_not_the_longest_pairs():
    """1000 pairs of 1 to 1000 tokens: the mean of 100 drawn ones is 500.5 with a standard error of 27."""
    lengths = np.random.default_rng(3).permutation(np.arange(1, 1001))
    for limit in (10, 0.1):
        plan = EvaluationPlan(lengths, batch_size=10, limit=limit)
        seen = [batch.indices for batch in plan.epoch(0)][:10]
        assert abs(lengths[np.concatenate(seen)].mean() - 500.5) < 4 * 27
        assert (np.diff(lengths[np.concatenate(seen)]) < 0).all(), "longest first, to pad little"
        assert len(plan) == 100
    for limit in (100, 1000, 1.0):
        batches = EvaluationPlan(lengths, batch_size=10, limit=limit).epoch(0)
        assert lengths[np.concatenate([batch.indices for batch in batches])].tolist() == list(range(1000, 0, -1))


def test_a_plan_that_repeats_has_the_first_epoch_in_every_epoch():
    settings = {"lengths": np.arange(1, 12), "batch_size": 2, "source": np.arange(11) % 2, "weights": (1.0, 0.5)}
    repeated, plain = TrainingPlan(**settings, repeat=True), TrainingPlan(**settings)
    first, *others = ([batch.indices.tolist() for batch in repeated.epoch(epoch)] for epoch in range(3))
    assert others == [first, first]
    assert first == [batch.indices.tolist() for batch in plain.epoch(0)]
    assert first != [batch.indices.tolist() for batch in plain.epoch(1)]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (TrainingPlan, "2 training rows cannot be shared by 3 processes"),
        (EvaluationPlan, "2 evaluation rows cannot be shared by 3 processes"),
    ],
)
def test_fewer_pairs_than_processes_are_refused(plan, message):
    with pytest.raises(ConfigurationError, match=message):
        plan(np.array([1, 1]), batch_size=1, world_size=3)
    plan(np.array([1, 1, 1]), batch_size=1, world_size=3)


def tokenized(rows, margins=None, batches=1):
    """`TokenizedPairs` of (prompt, chosen, rejected) lists of ids, in so many record batches."""
    blank = {"turns": [0]} | {
        field.name: field.type.to_pandas_dtype()() for field in PAIR_SCHEMA if not pa.types.is_list(field.type)
    }
    margins = margins or [0.0] * len(rows)
    records = [
        blank | {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin, "example_id": str(number)}
        for number, ((prompt, chosen, rejected), margin) in enumerate(zip(rows, margins, strict=True))
    ]
    for record in records:
        record["origin"] = f"row {record['example_id']}"
    with tempfile.TemporaryDirectory() as directory:  # the mapped file outlives its name
        with pa.OSFile(f"{directory}/rows.arrow", "wb") as file, pa.ipc.new_file(file, PAIR_SCHEMA) as writer:
            for part in np.array_split(np.arange(len(records)), batches):
                writer.write_batch(pa.RecordBatch.from_pylist([records[i] for i in part], schema=PAIR_SCHEMA))
        details = {"report": asdict(LoadReport("rows", len(rows))), "tail_length": 0}
        Path(directory, "report.json").write_text(json.dumps(details))
        store = TokenStore(directory)
    return TokenizedPairs([store], [np.arange(len(rows))], max_length=10**6)


def plain_batch(rows, indices, pad):
    """Ids, attention mask and response mask as lists, one token at a time."""
    sides = [(rows[i][0], rows[i][side]) for side in (1, 2) for i in indices]
    width = max(len(prompt) + len(response) for prompt, response in sides)
    ids, attention, answers = [], [], []
    for prompt, response in sides:
        rest = width - len(prompt) - len(response)
        ids.append(list(prompt) + list(response) + [pad] * rest)
        attention.append([True] * (width - rest) + [False] * rest)
        answers.append([False] * len(prompt) + [True] * len(response) + [False] * rest)
    return ids, attention, answers


tokens = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@quick
@given(st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=6), st.data())
def test_a_batch_equals_its_plain_twin(rows, data):
    # The pad id 0 occurs inside the texts as well: the masks must come from the lengths.
    indices = data.draw(st.permutations(range(len(rows))))[: data.draw(st.integers(1, len(rows)))]
    margins = [index / 4 for index in range(len(rows))]
    batch = collate_pairs(MicroBatch(np.array(indices), 0.5), tokenized(rows, margins, batches=2), pad_id=0)
    ids, attention, answers = plain_batch(rows, indices, pad=0)
    assert batch.input_ids.tolist() == ids
    assert batch.attention_mask.tolist() == attention
    assert batch.response_mask.tolist() == answers
    assert batch.margin.tolist() == [index / 4 for index in indices]
    assert batch.index.tolist() == list(indices)
    assert batch.weight.item() == 0.5
    assert batch.pairs == len(indices)


def test_the_tensors_of_a_batch_have_the_promised_types():
    batch = collate_pairs(MicroBatch(np.array([0]), 1.0), tokenized([([1], [2], [3])]), pad_id=0)
    assert [tensor.dtype for tensor in batch] == [
        *(torch.int64, torch.bool, torch.bool),
        *(torch.float32, torch.int64, torch.float32),
    ]
    assert batch.weight.shape == ()


ROWS = [([1] * (i + 1), [2] * (i % 3 + 1), [3]) for i in range(11)]


def loaded(num_workers=0, epochs=(0,), plan=None):
    pairs = tokenized(ROWS)
    plan = plan or TrainingPlan(pairs.lengths, batch_size=2, accumulate=2, seed=5)
    loader = BatchLoader(functools.partial(collate_pairs, pairs=pairs, pad_id=0), plan, num_workers=num_workers)
    batches = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        batches.append(list(loader))
        assert len(batches[-1]) == len(loader)
    return batches


def same(a: PreferenceBatch, b: PreferenceBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_loader_gives_the_collated_batches_of_its_plan_epoch_by_epoch():
    pairs = tokenized(ROWS)
    plan = TrainingPlan(pairs.lengths, batch_size=2, accumulate=2, seed=5)
    for epoch, batches in enumerate(loaded(epochs=(0, 1))):
        expected = [collate_pairs(micro_batch, pairs, pad_id=0) for micro_batch in plan.epoch(epoch)]
        assert all(same(a, b) for a, b in zip(batches, expected, strict=True))


def test_worker_processes_change_no_batch():
    for alone, helped in zip(loaded()[0], loaded(num_workers=1)[0], strict=True):
        assert same(alone, helped)


def test_loading_draws_nothing_from_the_global_random_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loaded()
    assert torch.equal(before, torch.get_rng_state())


def test_a_loader_begins_with_epoch_zero_also_where_nobody_sets_it():
    pairs = tokenized(ROWS)
    plan = TrainingPlan(pairs.lengths, batch_size=2, accumulate=2, seed=5)
    loader = BatchLoader(functools.partial(collate_pairs, pairs=pairs, pad_id=0), plan)
    assert loader.state_dict() == {"epoch": 0, "batches": 0}
    assert all(same(a, b) for a, b in zip(loader, loaded()[0], strict=True))
    assert loader.state_dict() == {"epoch": 0, "batches": len(loader)}


@pytest.mark.parametrize("begun", [0, 1, 3])
def test_a_loader_goes_on_after_the_last_batch_handed_out(begun):
    pairs = tokenized(ROWS)
    plan = TrainingPlan(pairs.lengths, batch_size=2, accumulate=2, seed=5)
    loader, resumed = (BatchLoader(functools.partial(collate_pairs, pairs=pairs, pad_id=0), plan) for _ in range(2))
    loader.set_epoch(1)
    whole = list(loader)
    resumed.load_state_dict({"epoch": 1, "batches": begun})
    resumed.set_epoch(1)
    rest = list(resumed)
    assert len(rest) == len(whole) - begun
    assert all(same(a, b) for a, b in zip(whole[begun:], rest, strict=True))
    resumed.set_epoch(2)
    assert len(list(resumed)) == len(whole)


def test_every_pass_begins_at_the_beginning():
    pairs = tokenized(ROWS)
    loader = BatchLoader(
        functools.partial(collate_pairs, pairs=pairs, pad_id=0), EvaluationPlan(pairs.lengths, batch_size=2)
    )
    first, second, third = (next(iter(loader)) for _ in range(3))
    assert same(first, second)
    assert same(first, third)
    assert [batch.pairs for batch in loader] == [batch.pairs for batch in loader] == [2, 2, 2, 2, 2, 1]


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_restored_position_is_gone_on_from_once(epoch):
    """Also where the first pass is over another epoch than the position."""
    pairs = tokenized(ROWS)
    plan = TrainingPlan(pairs.lengths, batch_size=2, seed=5)
    loader = BatchLoader(functools.partial(collate_pairs, pairs=pairs, pad_id=0), plan)
    position = {"epoch": 1, "batches": 4}
    loader.load_state_dict(position)
    loader.set_epoch(epoch)
    assert loader.state_dict() == loader.restored_position == position
    assert len(list(loader)) == (2 if epoch == 1 else 6)
    assert loader.restored_position is None
    loader.set_epoch(1)
    assert len(list(loader)) == 6
    assert loader.state_dict() == {"epoch": 1, "batches": 6}
