"""A precomputed reference: the numbers of the reference itself, computed once, and never those of another."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_lightning.data.courtesy.make import make_rows
from rlhf_lightning.errors import ConfigurationError, TrainingError
from rlhf_lightning.tiny import builtin_texts, make_tiny_model
from rlhf_lightning.training import references
from rlhf_lightning.training.reference_cache import ReferenceCache, pair_hash
from tests.training.conftest import TRAIN_PAIRS, VAL_PAIRS, weights

LORA = {"lora": {"r": 4, "lora_alpha": 8.0}}


@pytest.fixture
def run(build_dpo, trainer, tmp_path):
    """Train with a reference; returns the module and the number of pairs that were added to the cache."""

    def fit(reference=None, *, precompute=True, model=None, data=None, **settings):
        settings = {"max_epochs": 2, "gradient_clip_val": 1.0} | settings
        cache = {"precompute_reference": True, "reference_cache": str(tmp_path / "cache")} if precompute else {}
        module, datamodule = build_dpo(model={"reference": reference} | cache | (model or {}), data=data)
        before = kept(tmp_path)
        trainer(**settings).fit(module, datamodule)
        return module, kept(tmp_path) - before

    return fit


def kept(directory) -> int:
    """Pairs in all caches below a directory."""
    return sum((file.stat().st_size - 4) // 24 for file in directory.rglob("*.part"))


@pytest.mark.parametrize(("model", "reference"), [({}, "frozen"), (LORA, "adapter")], ids=["frozen", "adapter"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_training_is_that_with_the_reference_in_memory(run, model, reference, loss_type):
    own, _ = run(reference, precompute=False, model=model | {"loss_type": loss_type})
    module, computed = run(model=model | {"loss_type": loss_type})
    assert computed == TRAIN_PAIRS + VAL_PAIRS
    # Rows padded to another length: float32 rounding.
    torch.testing.assert_close(weights(module), weights(own), rtol=0, atol=2e-6)
    for name, value in own.trainer.callback_metrics.items():
        if name == "train/rewards/accuracies":
            continue  # before the first step a margin is 0, a tie; with what was computed before, it is rounding
        assert module.trainer.callback_metrics[name] == pytest.approx(value.item(), abs=1e-4), name


def test_the_reference_is_not_kept_in_memory(run):
    module, _ = run()
    assert module.reference.network is None


def test_another_model_can_be_precomputed(run, tmp_path):
    other = make_tiny_model(tmp_path / "other", builtin_texts(), initializer_range=0.2, seed=7)
    own, _ = run(str(other), precompute=False, limit_val_batches=0)
    module, computed = run(str(other), limit_val_batches=0)
    assert computed == TRAIN_PAIRS + VAL_PAIRS
    torch.testing.assert_close(weights(module), weights(own), rtol=0, atol=2e-6)
    assert run()[1] == TRAIN_PAIRS + VAL_PAIRS


def test_what_is_known_is_not_computed_again_whatever_the_order_or_the_learning_rate(run):
    first, _ = run()
    again, computed = run(data={"batch_size": 4, "seed": 11, "eval_batch_size": 5}, model={"beta": 0.3})
    assert computed == 0
    assert again.reference._sums["train"].equal(first.reference._sums["train"])
    assert run(data={"limit": 3})[1] == 0
    assert run(max_epochs=1, accumulate_grad_batches=2, model={"loss_type": "ipo", "warmup_ratio": 0.5})[1] == 0


@pytest.mark.parametrize(
    "change",
    ["max_length", "truncation", "template", "tokenizer", "data", "weights", "precision"],
)
def test_whatever_could_change_a_log_prob_is_computed_again(run, change, tmp_path, tiny_qwen2, pairs):
    """No stale entry: each part of the key, alone."""
    data, model, settings, expected = {"max_length": 66}, {}, {}, TRAIN_PAIRS + VAL_PAIRS
    _, first = run(data=data)
    assert 0 < first < expected  # the longest are left out
    everything = True
    if change == "max_length":
        data, everything = {"max_length": 60}, False  # those that are cut elsewhere now
    elif change == "truncation":
        data, everything = {"max_length": 66, "truncation": "drop"}, None  # only whole ones stay: all are known
    elif change == "template":
        data = {"max_length": 80, "chat_template": "transcript"}
    elif change == "tokenizer":
        texts = [text[::-1] for text in builtin_texts()]
        made = make_tiny_model(tmp_path / "other", texts, initializer_range=0.2, vocab_size=900)
        shutil.copytree(tiny_qwen2, tmp_path / "model")
        shutil.copy(made / "tokenizer.json", tmp_path / "model" / "tokenizer.json")
        data, model = {"max_length": 200, "tokenizer": str(tmp_path / "model")}, {}
    elif change == "data":
        rows = [row | {"chosen": row["chosen"] + "!"} for row in make_rows("train")[:TRAIN_PAIRS]]
        (tmp_path / "pairs").mkdir()
        (tmp_path / "pairs" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shutil.copy(pairs / "val.jsonl", tmp_path / "pairs")
        data, everything = data | {"train": str(tmp_path / "pairs")}, False
    elif change == "weights":
        model = {"backbone": str(make_tiny_model(tmp_path / "other", builtin_texts(), initializer_range=0.2, seed=1))}
    elif change == "precision":
        settings = {"precision": "bf16-mixed"}
    module, computed = run(data=data, model=model, **settings)
    used = sum(map(len, module.reference._sums.values()))
    if everything is None:
        assert computed == 0 < used
    elif change == "precision":
        assert computed == len(module.reference._sums["train"]) < used, "validation is float32 in any"
    elif everything:
        assert computed == used > 0
    else:
        assert 0 < computed < used


def test_a_copy_of_the_model_elsewhere_and_a_copied_cache_serve_as_well(run, tmp_path, tiny_qwen2):
    run()
    shutil.copytree(tiny_qwen2, tmp_path / "copy")
    (tmp_path / "cache").rename(tmp_path / "moved")
    _, computed = run(
        model={"backbone": str(tmp_path / "copy"), "reference_cache": str(tmp_path / "moved")},
        data={"tokenizer": str(tmp_path / "copy")},
    )
    assert computed == 0


def test_a_run_that_was_killed_goes_on_where_it_was(run, monkeypatch, tmp_path):
    monkeypatch.setattr(references, "_SECONDS_OF_A_PART", -1)  # a part after every batch
    real, calls = ReferenceCache.add, []

    def add(self, *arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        real(self, *arguments)

    monkeypatch.setattr(ReferenceCache, "add", add)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run()
    assert kept(tmp_path) == 3 * 2
    monkeypatch.setattr(ReferenceCache, "add", real)
    module, computed = run()
    assert computed == TRAIN_PAIRS + VAL_PAIRS - 6
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "cache")
    torch.testing.assert_close(run()[0].reference._sums["train"], module.reference._sums["train"], rtol=0, atol=1e-4)


def test_a_damaged_part_is_computed_again(run, tmp_path, caplog):
    run()
    train_part = max(tmp_path.rglob("*.part"), key=lambda file: file.stat().st_size)
    content = bytearray(train_part.read_bytes())
    content[-1] ^= 1
    train_part.write_bytes(content)
    with caplog.at_level(logging.WARNING, "rlhf_lightning"):
        _, computed = run()
    assert "damaged, so its reference log-probs are computed again" in caplog.text
    assert computed == 0  # as many as were thrown away
    assert run()[1] == 0


def test_entries_that_are_whole_but_wrong_stop_the_run(run, tmp_path):
    run()
    for file in [*tmp_path.rglob("*.part")]:
        directory, records = file.parent, np.frombuffer(file.read_bytes()[4:], dtype="V16,<f4,<f4")
        file.unlink()
        cache = ReferenceCache((), cache_dir=tmp_path / "elsewhere")
        cache.directory = directory
        values = torch.tensor(np.stack([records["f1"] + 3, records["f2"]], axis=1))
        cache.add([bytes(pair) for pair in records["f0"]], values)
    with pytest.raises(TrainingError, match=r"its reference log-probs are not those that the reference gives now; re"):
        run()


def test_testing_and_validating_use_the_cache_too(build_dpo, trainer, tmp_path):
    cache = {"precompute_reference": True, "reference_cache": str(tmp_path / "cache")}
    (expected,) = trainer().validate(*build_dpo(), verbose=False)
    for stage in ("validate", "test"):
        module, datamodule = build_dpo(model=cache)
        (measured,) = getattr(trainer(), stage)(module, datamodule, verbose=False)
        assert measured[f"{stage[:3] if stage == 'validate' else stage}/loss"] == pytest.approx(expected["val/loss"])
    assert kept(tmp_path) == VAL_PAIRS
    module, datamodule = build_dpo(model=cache)
    trainer().predict(module, datamodule)
    assert kept(tmp_path) == VAL_PAIRS


def test_a_loss_without_a_reference_refuses_a_precomputed_one(build_dpo):
    with pytest.raises(ConfigurationError, match="the loss simpo has no reference"):
        build_dpo(model={"loss_type": "simpo", "gamma": 0.5, "beta": 2.0, "precompute_reference": True})


def test_hashes_tell_pairs_apart():
    segments = [np.array(part, dtype=np.int32) for part in ([1, 2], [3], [4])]
    same = [part.astype(np.int64) for part in segments]
    assert pair_hash(*segments) == pair_hash(*same)
    moved = [np.array(part, dtype=np.int32) for part in ([1], [2, 3], [4])]
    swapped = [segments[0], segments[2], segments[1]]
    assert len({pair_hash(*parts) for parts in (segments, moved, swapped)}) == 3


def test_adapters_of_any_kind_share_the_model_below_them(run):
    assert run()[1] == TRAIN_PAIRS + VAL_PAIRS
    assert run(model=LORA)[1] == 0
    assert run(model={"lora": {"r": 2, "modules_to_save": ["norm"]}}, max_epochs=1)[1] == 0


def test_processes_share_the_work_and_miss_what_they_cannot_see(build_dpo, trainer, tmp_path):
    module, datamodule = build_dpo(model=LORA)
    run = trainer()
    run.validate(module, datamodule, verbose=False)

    def share(rank, cache):
        strategy = SimpleNamespace(batch_to_device=lambda batch: batch, barrier=lambda: None)
        seen = {"global_rank": rank, "world_size": 2, "strategy": strategy, "precision": "32-true"}
        process = SimpleNamespace(**seen, precision_plugin=run.precision_plugin, datamodule=datamodule)
        own = SimpleNamespace(trainer=process, policy=module.policy)
        how = {"precision": "32-true", "arithmetic": nullcontext}
        return module.reference._precomputed_sums(own, "val", ReferenceCache(("key",), cache_dir=cache), **how)

    with pytest.raises(TrainingError, match=r"of other processes are not seen here; give model.reference_cache"):
        share(1, tmp_path / "a")
    assert kept(tmp_path / "a") == VAL_PAIRS // 2  # the odd positions
    values = share(0, tmp_path / "a")
    assert kept(tmp_path / "a") == VAL_PAIRS
    for batch in datamodule.val_dataloader():
        expected = torch.stack(module.reference_logprobs(batch)[:2], dim=1)
        torch.testing.assert_close(values[batch.index], expected, rtol=0, atol=1e-4)
