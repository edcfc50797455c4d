"""Pair metrics."""

import json
import math
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.functional.classification import binary_auroc

import rlhf_lightning.metrics
from rlhf_lightning.errors import ConfigurationError, UserError
from rlhf_lightning.metrics import (
    MarginAUROC,
    PairCount,
    PairwiseAccuracy,
    PairwiseCalibrationError,
    Perplexity,
    PooledAUROC,
    TokensPerSecond,
)
from tests.patience import PATIENCE
from tests.programs import forked

VALUES = (PairwiseAccuracy, PooledAUROC, MarginAUROC, PairwiseCalibrationError)
GATHERED = (PooledAUROC, MarginAUROC, PairwiseCalibrationError)
EVERY = (PairCount, *VALUES)


def rewards(n, *, seed=0, dtype=torch.float64):
    """n pairs on a grid of tenths: some c = r, some equal margins, some responses equal across pairs."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(-12, 20, (n,), generator=generator) / 10
    rejected = torch.randint(-18, 14, (n,), generator=generator) / 10
    return chosen.to(dtype), rejected.to(dtype)


def measure(metric, chosen, rejected, batch_size=None):
    for c, r in zip(chosen.split(batch_size or len(chosen)), rejected.split(batch_size or len(rejected)), strict=True):
        metric.update(c, r)
    return metric.compute().item()


# Slow twins, written from the definitions.


def win_share(first, second):
    """Mean over all couples of [a > b] + [a = b] / 2, O(n^2)."""
    points = sum((a > b) + 0.5 * (a == b) for a in first for b in second)
    return points / (len(first) * len(second))


def top_label_calibration_error(margins, bins):
    """Confidence max(p, 1 - p) against agreement, ties one half, `bins` bins on [0.5, 1]."""
    entries = [[] for _ in range(bins)]
    for d in margins:
        confidence = 1 / (1 + math.exp(-abs(d))) if abs(d) < 700 else 1.0
        agreement = 0.5 if d == 0 else float(d > 0)
        entries[min(int((confidence - 0.5) * 2 * bins), bins - 1)].append((confidence, agreement))
    gap = sum(abs(sum(c - a for c, a in entry)) for entry in entries)
    return gap / len(margins)


def twin(metric_class, chosen, rejected):
    c, r = chosen.tolist(), rejected.tolist()
    d = [a - b for a, b in zip(c, r, strict=True)]
    if metric_class is PairwiseAccuracy:
        return sum((x > 0) + 0.5 * (x == 0) for x in d) / len(d)
    if metric_class is PooledAUROC:
        return win_share(c, r)
    if metric_class is MarginAUROC:
        return win_share(d, [-x for x in d])
    return top_label_calibration_error(d, 10)


def sklearn_auroc(positive, negative):
    from sklearn.metrics import roc_auc_score  # here: the ranks of the two-process tests do without

    return roc_auc_score([1] * len(positive) + [0] * len(negative), positive.tolist() + negative.tolist())


# Values.


@pytest.mark.parametrize(
    ("metric_class", "expected"),
    [
        (PairCount, 3),
        (PairwiseAccuracy, 1.5 / 3),  # 2 > 1, 1 = 1, 1 < 3
        (PooledAUROC, 4 / 9),  # 2 beats 1 and 1; each 1 ties with 1 and 1
        (MarginAUROC, 3.5 / 9),  # d = 1, 0, -2: of the nine sums three are positive and one is 0
    ],
)
def test_a_split_of_three_pairs_has_the_value_computed_by_hand(metric_class, expected):
    chosen, rejected = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 3.0])
    assert measure(metric_class(), chosen, rejected) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("right", "expected"), [(4, 0.25), (3, 0.0), (2, 0.25), (0, 0.75)])
def test_margins_of_log_three_are_calibrated_when_three_pairs_in_four_are_right(right, expected):
    chosen = math.log(3) * torch.tensor([1.0] * right + [-1.0] * (4 - right), dtype=torch.float64)
    metric = PairwiseCalibrationError(n_bins=10)
    assert measure(metric, chosen, torch.zeros(4, dtype=torch.float64)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, None])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("offset", [0.0, 20.0, 1000.0])
@pytest.mark.parametrize("metric_class", VALUES)
def test_the_value_is_the_slow_twins_for_any_offset_scale_and_batch_size(metric_class, offset, scale, batch_size):
    chosen, rejected = (x * scale + offset for x in rewards(23, dtype=torch.float32))
    expected = twin(metric_class, chosen, rejected)
    assert measure(metric_class(), chosen, rejected, batch_size) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("metric_class", VALUES)
def test_rewards_of_every_float_dtype_are_compared_exactly(metric_class, dtype):
    chosen, rejected = rewards(23, seed=1, dtype=dtype)
    chosen[:2], rejected[:2] = torch.tensor([1.0, 1.0]), torch.tensor([0.001, 0.0])  # d = 1 twice in bfloat16
    expected = twin(metric_class, chosen, rejected)
    assert measure(metric_class(), chosen, rejected) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_both_aurocs_are_those_of_sklearn(seed):
    chosen, rejected = rewards(101, seed=seed)
    margin = chosen - rejected
    assert measure(PooledAUROC(), chosen, rejected) == pytest.approx(sklearn_auroc(chosen, rejected), abs=1e-12)
    assert measure(MarginAUROC(), chosen, rejected) == pytest.approx(sklearn_auroc(margin, -margin), abs=1e-12)


def test_perfectly_ordered_rewards_of_20_to_23_have_auroc_one_where_stock_torchmetrics_says_one_half():
    rejected, chosen = torch.tensor([20.0, 21.0]), torch.tensor([22.0, 23.0])
    assert binary_auroc(torch.cat([rejected, chosen]), torch.tensor([0, 0, 1, 1])) == 0.5
    assert measure(PooledAUROC(), chosen, rejected) == 1.0
    assert measure(MarginAUROC(), chosen, rejected) == 1.0


@pytest.mark.parametrize("metric_class", [PairwiseAccuracy, PooledAUROC, MarginAUROC])
def test_float64_rewards_a_microstep_apart_at_an_offset_of_a_million_lose_no_pair(metric_class):
    rejected = 1e6 + 1e-6 * torch.arange(0, 20, 2, dtype=torch.float64)
    assert measure(metric_class(), rejected + 3e-5, rejected) == pytest.approx(1, abs=1e-12)


def test_equal_rewards_of_all_responses_give_one_half():
    for metric_class in (PairwiseAccuracy, PooledAUROC, MarginAUROC):
        assert measure(metric_class(), torch.full((5,), 7.0), torch.full((5,), 7.0), 2) == 0.5


def test_an_offset_for_each_prompt_lowers_only_the_pooled_auroc():
    chosen, rejected = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0])
    offset = torch.tensor([0.0, 10.0, 20.0])
    assert measure(PooledAUROC(), chosen, rejected) == 1.0
    assert measure(PooledAUROC(), chosen + offset, rejected + offset) == pytest.approx(6 / 9, abs=1e-12)
    for metric_class in (PairwiseAccuracy, MarginAUROC):
        assert measure(metric_class(), chosen + offset, rejected + offset) == 1.0


grid_rewards = st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=1, max_size=30)


@settings(max_examples=60)
@given(
    pairs=grid_rewards,
    transform=st.sampled_from([torch.exp, torch.atan, lambda x: x**3, lambda x: 1e3 + x / 7, torch.sinh]),
)
def test_a_strictly_increasing_transform_of_all_rewards_leaves_pooled_auroc_and_accuracy_alone(pairs, transform):
    chosen, rejected = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    # One table, because vectorized and scalar sinh differ in the last bit, which would part equal rewards.
    table = transform(torch.arange(-50, 51, dtype=torch.float64))
    for metric_class in (PooledAUROC, PairwiseAccuracy):
        before = measure(metric_class(), chosen, rejected)
        assert measure(metric_class(), table[chosen.long() + 50], table[rejected.long() + 50]) == before


@settings(max_examples=40)
@given(pairs=grid_rewards)
def test_swapping_chosen_and_rejected_mirrors_the_accuracy_and_both_aurocs(pairs):
    chosen, rejected = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    for metric_class in (PairwiseAccuracy, PooledAUROC, MarginAUROC):
        value = measure(metric_class(), chosen, rejected)
        assert measure(metric_class(), rejected, chosen) == pytest.approx(1 - value, abs=1e-12)


def test_batches_and_their_order_do_not_change_the_auroc_by_one_bit():
    chosen, rejected = rewards(37, seed=3)
    shuffle = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    for metric_class in (PairwiseAccuracy, PooledAUROC, MarginAUROC):
        whole = measure(metric_class(), chosen, rejected)
        for batch_size in (1, 2, 5, 36):
            assert measure(metric_class(), chosen[shuffle], rejected[shuffle], batch_size) == whole


@pytest.mark.parametrize("n_bins", [2, 8, 20, 30])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e3])
def test_an_even_number_of_bins_equals_the_top_label_form_with_half_as_many_on_the_upper_half(n_bins, scale):
    generator = torch.Generator().manual_seed(n_bins)
    margin = scale * (torch.randn(61, generator=generator, dtype=torch.float64) + 0.3)
    value = measure(PairwiseCalibrationError(n_bins=n_bins), margin, torch.zeros(61))
    expected = top_label_calibration_error(margin.tolist(), n_bins // 2)
    assert value == pytest.approx(expected, abs=1e-12)


def test_a_saturated_pair_shares_the_last_bin_with_its_neighbours():
    # sigmoid(40) = 1.0 is wrong, sigmoid(4) = 0.982 right: |1.982 - 1| / 2 in one bin; 0.5 if 1.0 sat alone.
    chosen = torch.tensor([-40.0, 4.0], dtype=torch.float64)
    confidence = 1 / (1 + math.exp(-4))
    assert measure(PairwiseCalibrationError(n_bins=20), chosen, torch.zeros(2)) == pytest.approx(
        confidence / 2, abs=1e-12
    )


def test_an_odd_number_of_bins_is_blind_to_the_pairs_of_its_middle_bin():
    chosen = torch.full((10,), 0.1)  # p = 0.525, all ten right
    assert measure(PairwiseCalibrationError(n_bins=15), chosen, torch.zeros(10)) == pytest.approx(0, abs=1e-12)
    assert measure(PairwiseCalibrationError(n_bins=14), chosen, torch.zeros(10)) == pytest.approx(0.475, abs=1e-4)


def test_the_pair_count_of_an_uneven_split_is_exact():
    assert measure(PairCount(), *rewards(23), batch_size=7) == 23


# Refusals and empty sets.


@pytest.mark.parametrize("metric_class", EVERY)
@pytest.mark.parametrize(
    ("chosen_shape", "rejected_shape"),
    [((4, 1), (4,)), ((4,), (3,)), ((4,), (1,)), ((2, 2), (2, 2)), ((), ())],
)
def test_a_shape_that_is_not_one_reward_a_pair_is_refused(metric_class, chosen_shape, rejected_shape):
    with pytest.raises(ValueError, match=r"expected the shapes chosen \[B\], rejected \[B\]"):
        metric_class().update(torch.zeros(chosen_shape), torch.zeros(rejected_shape))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("metric_class", VALUES)
def test_a_reward_that_is_not_finite_is_refused_in_one_line_that_counts_the_pairs(metric_class, side, bad):
    pair = rewards(9, dtype=torch.float32)
    pair[side][[2, 5]] = bad
    metric = metric_class()
    with pytest.raises(UserError, match=f"{metric_class.__name__}: 2 of 9 pairs") as error:
        measure(metric, *pair, batch_size=4)
    assert "\n" not in str(error.value)
    metric.reset()
    assert measure(metric, *rewards(9)) == measure(metric_class(), *rewards(9))


@pytest.mark.parametrize("metric_class", EVERY)
def test_update_never_reads_a_value_on_the_host(metric_class):
    metric = metric_class().to("meta")  # a meta tensor has no values: reading one raises
    metric.update(torch.empty(4, device="meta"), torch.empty(4, device="meta"))
    assert metric.update_count == 1


@pytest.mark.parametrize("n_bins", [1, 0, -3, 2.5, None])
def test_fewer_than_two_bins_are_refused(n_bins):
    with pytest.raises(ConfigurationError, match=r"n_bins is .* at least 2"):
        PairwiseCalibrationError(n_bins=n_bins)


@pytest.mark.parametrize("metric_class", EVERY)
def test_without_any_pair_the_value_is_nan_and_the_count_zero(metric_class):
    expected = 0 if metric_class is PairCount else math.nan
    metric = metric_class()
    with pytest.warns(UserWarning, match="called before the ``update`` method"):  # torchmetrics' own warning
        assert metric.compute().item() == pytest.approx(expected, nan_ok=True)
    assert measure(metric, torch.zeros(0), torch.zeros(0)) == pytest.approx(expected, nan_ok=True)
    assert measure(metric, *rewards(5)) == measure(metric_class(), *rewards(5))


# State.


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.float()],
    ids=["half", "bfloat16", "to_bfloat16", "float"],
)
@pytest.mark.parametrize("metric_class", EVERY)
def test_a_cast_of_the_module_around_it_rounds_neither_the_state_nor_the_cached_value(metric_class, cast):
    chosen, rejected = rewards(23)
    chosen, rejected = chosen * 1.001 + 1e4, rejected * 1.001 + 1e4
    expected = measure(metric_class(), chosen, rejected)
    module = nn.ModuleDict({"metric": metric_class(), "layer": nn.Linear(2, 2)})
    cast(module)
    measure(module["metric"], chosen[:11], rejected[:11])
    cast(module)
    assert measure(module["metric"], chosen[11:], rejected[11:]) == expected
    cast(module)
    assert module["metric"].compute().item() == expected
    cast(module["metric"])
    assert module["metric"].compute().item() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_default_dtype_neither_rounds_the_auroc_nor_is_changed_by_it(dtype):
    chosen, rejected = rewards(101)
    expected = sklearn_auroc(chosen, rejected)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        value = measure(PooledAUROC(), chosen, rejected)
        after = torch.get_default_dtype()
    finally:
        torch.set_default_dtype(before)
    assert value == pytest.approx(expected, abs=1e-12)
    assert after == dtype


def test_the_default_dtype_is_restored_when_torchmetrics_raises(monkeypatch):
    def fail(*_):
        raise RuntimeError("torchmetrics failed")

    monkeypatch.setattr(rlhf_lightning.metrics, "binary_auroc", fail)
    with pytest.raises(RuntimeError, match="torchmetrics failed"):
        measure(PooledAUROC(), *rewards(3))
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("metric_class", EVERY)
def test_the_state_moves_with_the_module(metric_class):
    module = nn.ModuleDict({"metric": metric_class()})
    module["metric"].update(*rewards(4))
    module.to("meta")
    states = module["metric"].metric_state.values()
    tensors = [x for state in states for x in (state if isinstance(state, list) else [state])]
    assert tensors
    assert {x.device.type for x in tensors} == {"meta"}
    assert module["metric"].device.type == "meta"


def test_rewards_on_mps_are_kept_on_the_cpu_because_mps_has_no_float64():
    moves = []
    x = SimpleNamespace(device=torch.device("mps"), detach=lambda: x, to=lambda *to, **_: moves.append(to))
    rlhf_lightning.metrics._float64_copy(x)
    assert moves == [(torch.device("cpu"), torch.float64)]


@pytest.mark.parametrize("metric_class", GATHERED)
def test_the_state_takes_sixteen_bytes_a_pair_and_reset_frees_them(metric_class):
    metric = metric_class()
    scores = torch.randn(100, 64)  # a view of it would keep all 25.6 kB alive
    metric.update(scores[:, 0], scores[:, 1])
    kept = [*metric.chosen, *metric.rejected]
    assert sum(x.untyped_storage().nbytes() for x in kept) == 16 * 100
    watched = [weakref.ref(x) for x in kept]
    del kept
    metric.compute()
    metric.reset()
    assert [w() for w in watched] == [None, None]


@pytest.mark.parametrize("metric_class", VALUES)
def test_rewards_changed_in_place_or_backpropagated_after_the_update_do_not_reach_the_metric(metric_class):
    chosen, rejected = rewards(9)
    metric = metric_class()
    metric(chosen.clone().requires_grad_(), rejected)  # a call, unlike update, runs with gradients enabled
    rejected += 100
    assert metric.compute().item() == measure(metric_class(), *rewards(9))
    assert not any(x.requires_grad for x in (*getattr(metric, "chosen", ()), metric.compute()))


@pytest.mark.parametrize("metric_class", EVERY)
def test_a_reset_under_inference_mode_allows_updates_outside_of_it(metric_class):
    metric = metric_class()
    with torch.inference_mode():
        metric.update(*rewards(4))
        metric.reset()
        metric.update(*rewards(9))
    metric.update(*rewards(4, seed=5))
    both = [torch.cat(x) for x in zip(rewards(9), rewards(4, seed=5), strict=True)]
    assert metric.compute().item() == measure(metric_class(), *both)


@pytest.mark.parametrize("metric_class", EVERY)
def test_calling_the_metric_gives_the_batch_and_still_collects_the_split(metric_class):
    chosen, rejected = rewards(9)
    metric = metric_class()
    for c, r in zip(chosen.split(4), rejected.split(4), strict=True):
        assert metric(c, r).item() == measure(metric_class(), c, r)
    assert metric.compute().item() == measure(metric_class(), chosen, rejected)


def test_in_a_collection_the_gathered_metrics_share_one_state_and_keep_their_values():
    chosen, rejected = rewards(23)
    collection = MetricCollection([metric_class() for metric_class in EVERY])
    for c, r in zip(chosen.split(7), rejected.split(7), strict=True):
        collection.update(c, r)
    values = collection.compute()
    assert {k: v.item() for k, v in values.items()} == {
        metric_class.__name__: measure(metric_class(), chosen, rejected) for metric_class in EVERY
    }
    assert sorted(x.__name__ for x in GATHERED) in [sorted(x) for x in collection.compute_groups.values()]


# Lightning.


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")
def test_lightning_logs_the_whole_split_and_starts_each_epoch_afresh(tmp_path):
    import lightning as L  # here: the ranks of the two-process tests do without

    chosen, rejected = rewards(11, dtype=torch.float32)
    seen = []

    class Judge(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.metrics = nn.ModuleDict({metric_class.__name__: metric_class() for metric_class in EVERY})

        def training_step(self, batch):
            return self.scale

        def validation_step(self, batch):
            c, r = batch
            for name, metric in self.metrics.items():
                metric.update(c + self.current_epoch * r, r)  # other rewards in the second epoch
                self.log(f"val/{name}", metric)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Collect(L.Callback):
        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    batches = list(zip(chosen.split(3), rejected.split(3), strict=True))  # 3, 3, 3, 2
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[Collect()],
    )
    trainer.fit(
        Judge(),
        torch.utils.data.DataLoader([0.0]),
        torch.utils.data.DataLoader(batches, batch_size=None),
    )
    for epoch in range(2):
        for metric_class in EVERY:
            expected = measure(metric_class(), chosen + epoch * rejected, rejected)
            assert seen[epoch][f"val/{metric_class.__name__}"] == pytest.approx(expected, abs=1e-12)


# Two processes (gloo). Pairs of rank 0 and of rank 1; the last three splits leave a rank without any.

SPLITS = [(4, 3), (1, 12), (6, 6), (7, 0), (0, 5), (0, 0)]


def two_rank_values(rank):
    """What one rank computes on its share of each split: a list over SPLITS of {metric: value}."""
    values = []
    for sizes in SPLITS:
        share = [side.split(list(sizes))[rank] for side in rewards(sum(sizes))]
        values.append({})
        for metric_class in EVERY:
            module = nn.ModuleDict({"metric": metric_class()}).to(torch.bfloat16)  # as in bf16-true
            for c, r in zip(share[0].split(2), share[1].split(2), strict=True):
                if len(c):  # no update at all on a rank without pairs
                    module["metric"].update(c, r)
            values[-1][metric_class.__name__] = module["metric"].compute().item()
    return values


def two_rank_refusals(rank):
    """The errors of one rank when only the pairs of rank 1 hold a NaN."""
    messages = []
    for metric_class in VALUES:
        metric = metric_class()
        metric.update(torch.tensor([1.0, math.nan if rank else 2.0]), torch.zeros(2))
        try:
            metric.compute()
        except ValueError as error:
            messages.append(str(error))
    return messages


def one_rank(rank, folder):
    """Write the answers of one of two processes."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE)
    )
    answers = {"values": two_rank_values(rank), "refusals": two_rank_refusals(rank)}
    Path(folder, f"{rank}.json").write_text(json.dumps(answers))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The answers of both ranks; one start of two processes serves every test below."""
    folder = tmp_path_factory.mktemp("gloo")
    with ThreadPoolExecutor(2) as both:
        assert list(both.map(lambda rank: forked(one_rank, rank, folder), (0, 1))) == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("split", range(len(SPLITS)), ids=[f"{a}+{b}" for a, b in SPLITS])
@pytest.mark.parametrize("metric_class", EVERY)
@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_two_ranks_compute_the_value_of_one_for_uneven_and_empty_shares(two_ranks, metric_class, split):
    expected = measure(metric_class(), *rewards(sum(SPLITS[split])))
    for rank in two_ranks:
        value = rank["values"][split][metric_class.__name__]
        assert value == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_a_nan_on_one_rank_is_refused_on_both(two_ranks):
    for rank in two_ranks:
        assert [m.split(" pairs")[0] for m in rank["refusals"]] == [f"{c.__name__}: 1 of 4" for c in VALUES]


def test_perplexity_counts_each_token_the_same_whatever_the_batches():
    nll, tokens = torch.tensor([3.0, 10.0, 0.5]), torch.tensor([3, 4, 1])
    whole, parts = Perplexity(), Perplexity()
    whole.update(nll, tokens)
    for row in range(3):
        parts.update(nll[row : row + 1], tokens[row : row + 1])
    assert whole.compute().item() == parts.compute().item() == pytest.approx(math.exp(13.5 / 8), abs=1e-12)


def test_tokens_per_second_is_all_tokens_over_all_seconds():
    metric = TokensPerSecond()
    metric.update(torch.tensor(100), 0.5)
    metric.update(torch.tensor(300), 1.5)
    assert metric.compute().item() == 200
