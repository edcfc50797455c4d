"""The reward model's training: the optimizer step is the mean over its pairs, and what is logged is what happened."""

from __future__ import annotations

import copy
import csv
import functools
import json
import logging
import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.metrics import roc_auc_score

from rlhf_lightning import RewardModel, RewardNetwork
from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.models.reward_network import pooled
from rlhf_lightning.training.callbacks import ExportBest, PredictionWriter
from rlhf_lightning.training.checkpoints import metrics_of, read_checkpoint
from rlhf_lightning.training.results import Results
from tests.training.conftest import TRAIN_PAIRS, VAL_PAIRS, sgd, weights


class LossLog(pl.Callback):
    """Keeps the loss of every batch."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def trained(build, trainer, *, batch_size=2, accumulate=1, model=None, data=None, **settings) -> torch.Tensor:
    module, datamodule = build(model=model, data={"batch_size": batch_size} | (data or {}))
    trainer(accumulate_grad_batches=accumulate, **settings).fit(module, datamodule)
    return weights(module)


def test_the_first_scores_are_those_of_the_chosen_rows(build, trainer):
    module, datamodule = build()
    trainer(max_steps=1).fit(module, datamodule)
    batch = next(iter(datamodule.val_dataloader()))
    chosen, rejected = module(batch)
    scores = module.network(batch.input_ids, batch.attention_mask)
    assert torch.equal(torch.cat([chosen, rejected]), scores)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 4), (2, 2)])
def test_accumulation_gives_the_weights_of_one_large_batch(build, trainer, batch_size, accumulate):
    """11 pairs in steps of 4: the last step has 3 pairs, and its gradient is their mean, not three quarters of it."""
    whole = trained(build, trainer, batch_size=4, accumulate=1, max_epochs=2)
    parts = trained(build, trainer, batch_size=batch_size, accumulate=accumulate, max_epochs=2)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_grouping_by_length_changes_no_weight(build, trainer):
    grouped = trained(build, trainer, batch_size=1, accumulate=4)
    plain = trained(build, trainer, batch_size=1, accumulate=4, data={"group_by_length": False})
    torch.testing.assert_close(grouped, plain, rtol=0, atol=1e-6)


def test_a_step_of_sgd_is_the_gradient_of_the_mean_loss_over_its_pairs(build, trainer):
    """By hand: 11 pairs in one step (4 + 4 + 3), weights' change = -lr * gradient of mean -log sigmoid(c - r)."""
    module, datamodule = build(data={"batch_size": 4, "shuffle": False})
    before = {}

    class Before(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            before["weights"] = weights(pl_module)
            rows = [pl_module(batch) for batch in datamodule.train_dataloader()]
            chosen, rejected = (torch.cat(side) for side in zip(*rows, strict=True))
            loss = F.softplus(rejected - chosen).mean()
            parameters = list(pl_module.network.parameters())
            gradients = torch.autograd.grad(loss, parameters)
            before["gradient"] = torch.cat([gradient.flatten() for gradient in gradients])

    trainer(accumulate_grad_batches=3, callbacks=[Before()], limit_val_batches=0).fit(module, datamodule)
    expected = before["weights"] - 0.05 * before["gradient"]
    assert before["gradient"].norm() > 0.1
    torch.testing.assert_close(weights(module), expected, rtol=0, atol=1e-6)


def test_one_seed_gives_one_loss_sequence_and_another_seed_another(build, trainer):
    def losses(seed):
        log = LossLog()
        module, datamodule = build(data={"seed": seed})
        trainer(callbacks=[log], max_epochs=2).fit(module, datamodule)
        return log.losses

    assert losses(3) == losses(3)
    assert losses(3) != losses(4)


def test_the_first_loss_of_equal_scores_is_ln_2(build, trainer):
    class EqualScores(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            torch.nn.init.zeros_(pl_module.network.score[-1].weight)

    log = LossLog()
    module, datamodule = build(data={"batch_size": 4})
    trainer(callbacks=[EqualScores(), log], max_steps=1).fit(module, datamodule)
    assert log.losses == [pytest.approx(math.log(2), abs=1e-6)]


@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        ({}, lambda c, r, m: F.softplus(r - c)),
        ({"use_margin": True}, lambda c, r, m: F.softplus(r - c + m)),
        ({"center_rewards_coefficient": 0.5}, lambda c, r, m: F.softplus(r - c) + 0.5 * (c + r) ** 2),
        ({"label_smoothing": 0.25}, lambda c, r, m: 0.75 * F.softplus(r - c) + 0.25 * F.softplus(c - r)),
    ],
)
def test_settings_of_the_loss_reach_it(build, trainer, settings, formula):
    module, datamodule = build(model=settings)
    trainer(max_steps=1).fit(module, datamodule)
    batch = next(iter(datamodule.train_dataloader()))
    assert batch.margin.max() > 0
    chosen, rejected = module(batch)
    torch.testing.assert_close(module.losses(batch, chosen, rejected), formula(chosen, rejected, batch.margin))


def test_logged_training_numbers_are_means_over_all_pairs_since_the_last_log(build, trainer, tmp_path):
    """Steps of 4, 4 and 3 pairs with a frozen model: each log is the mean over the pairs of its two or one steps."""
    module, datamodule = build(model={"optimizer": sgd(0.0)}, data={"batch_size": 2, "shuffle": False})
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer(logger=logger, log_every_n_steps=2, accumulate_grad_batches=2, max_epochs=2).fit(module, datamodule)
    with open(logger.experiment.metrics_file_path, newline="") as lines:
        logged = {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(lines) if row["train/loss"]}
    with torch.no_grad():
        each = torch.cat([module.losses(batch, *module(batch)) for batch in datamodule.train_dataloader()])
    assert sorted(logged) == [2, 4, 6]
    assert logged[2] == pytest.approx(each[:8].mean().item(), abs=1e-6)
    assert logged[4] == pytest.approx(torch.cat([each[8:], each[:4]]).mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        ("linear", [1 / 4, 2 / 4, 3 / 4, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", [1 / 4, 2 / 4, 3 / 4, 1, 1, *((1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3))]),
    ],
)
def test_learning_rate_rises_over_the_warm_up_and_then_follows_the_schedule(build, trainer, schedule, expected):
    """8 optimizer steps, 4 of warm-up; one step of the schedule per optimizer step, not per batch."""
    rates = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    settings = {"lr_scheduler_type": schedule, "warmup_ratio": 0.5, "optimizer": sgd(0.1)}
    module, datamodule = build(model=settings, data={"batch_size": 1})
    trainer(callbacks=[Rates()], accumulate_grad_batches=3, max_epochs=2, limit_val_batches=0).fit(module, datamodule)
    assert rates == pytest.approx([0.1 * factor for factor in expected])


def test_any_evaluation_batch_size_gives_the_metrics_of_the_whole_split(build, trainer):
    """Against sklearn and a plain count over all pairs at once."""
    measured = []
    for size in (1, 2, 3, VAL_PAIRS):
        module, datamodule = build(data={"eval_batch_size": size})
        (metrics,) = trainer().validate(module, datamodule, verbose=False)
        measured.append(metrics)
        assert metrics["val/pairs"] == VAL_PAIRS
    with torch.no_grad():
        rows = [module(batch) for batch in datamodule.val_dataloader()]
    chosen, rejected = (torch.cat(side).double() for side in zip(*rows, strict=True))
    labels = [1] * VAL_PAIRS + [0] * VAL_PAIRS
    margin = chosen - rejected
    expected = {
        "val/loss": F.softplus(-margin).mean().item(),
        "val/accuracy": (margin > 0).double().mean().item(),
        "val/auroc": roc_auc_score(labels, torch.cat([chosen, rejected])),
        "val/margin_auroc": roc_auc_score(labels, torch.cat([margin, -margin])),
        "val/margin": margin.mean().item(),
        "val/reward": ((chosen + rejected) / 2).mean().item(),
    }
    for metrics in measured:
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def fit_with_checkpoint(build, trainer, tmp_path, **settings):
    module, datamodule = build(**settings)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/auroc", mode="max")
    results, export = Results(), ExportBest(str(tmp_path / "exported"))
    callbacks = [results, checkpoint, export]
    run = trainer(enable_checkpointing=True, callbacks=callbacks, max_epochs=3)
    run.fit(module, datamodule)
    return run, results, checkpoint.best_model_path


def test_test_repeats_the_validation_numbers_of_the_best_checkpoint_exactly(build, trainer, tmp_path):
    _, _, path = fit_with_checkpoint(build, trainer, tmp_path)
    stored = metrics_of(read_checkpoint(path))
    assert set(stored) == {
        "loss",
        "accuracy",
        "auroc",
        "margin_auroc",
        "calibration_error",
        "margin",
        "reward",
        "pairs",
    }
    module, datamodule = build()
    (metrics,) = trainer().test(module, datamodule, ckpt_path=path, verbose=False)
    assert {name.removeprefix("test/"): value for name, value in metrics.items()} == stored


def test_the_exported_directory_scores_as_the_best_checkpoint_does(build, trainer, tmp_path):
    _, _, path = fit_with_checkpoint(build, trainer, tmp_path)
    exported = RewardNetwork.from_pretrained(tmp_path / "exported")
    module = RewardModel.load_from_checkpoint(path).eval()
    torch.testing.assert_close(torch.cat([p.flatten() for p in exported.parameters()]), weights(module), rtol=0, atol=0)
    module, datamodule = build(
        model={"backbone": str(tmp_path / "exported")}, data={"tokenizer": str(tmp_path / "exported")}
    )
    (from_directory,) = trainer().test(module, datamodule, verbose=False)
    (from_checkpoint,) = trainer().test(*build(), ckpt_path=path, verbose=False)
    assert from_directory == from_checkpoint, "the exported tokenizer and head are those of the run"


@pytest.mark.parametrize("held", ["a file", "files that are no model"])
def test_export_refuses_a_directory_that_holds_something_else_before_training(build, trainer, tmp_path, held):
    target = tmp_path / "taken"
    if held == "a file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "thesis.tex").write_text("mine")
    module, datamodule = build()
    with pytest.raises(ConfigurationError, match="taken"):
        trainer(callbacks=[ExportBest(str(target))]).fit(module, datamodule)


def test_predict_writes_the_scores_of_every_pair_in_the_order_of_the_data(build, trainer, tmp_path):
    module, datamodule = build(data={"eval_batch_size": 3})
    path = tmp_path / "scores.jsonl"
    trainer(callbacks=[PredictionWriter(str(path))]).predict(module, datamodule)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["example_id"] for row in rows] == [f"courtesy-val-{number}" for number in range(VAL_PAIRS)]
    with torch.no_grad():
        for batch in datamodule.predict_dataloader():
            for index, chosen, rejected in zip(batch.index, *module(batch), strict=True):
                row = rows[int(index)]
                assert row["chosen"] == pytest.approx(chosen.item(), abs=1e-6)
                assert row["rejected"] == pytest.approx(rejected.item(), abs=1e-6)
                assert row["margin"] == pytest.approx(row["chosen"] - row["rejected"], abs=1e-6)


def test_gradient_checkpointing_changes_no_weight(build, trainer):
    plain = trained(build, trainer)
    recomputed = trained(build, trainer, model={"gradient_checkpointing": True})
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("pooling", ["last", "layers"])
def test_a_frozen_backbone_stays_and_the_head_learns_what_it_learns_on_its_states(build, trainer, pooling, epochs):
    """The twin: the head alone on states that were computed beforehand, in the order of the training.

    The backbone sees each pair once in the fit: 11 and 7 in batches of 2.
    """
    own, datamodule = build(model={"freeze_backbone": True, "pooling": pooling})
    own.configure_model()
    before = {name: value.clone() for name, value in own.network.named_parameters()}
    batches = []
    own.on_train_batch_start = lambda batch, batch_idx: batches.append(batch)
    passes = []
    own.network.backbone.register_forward_hook(lambda *_: passes.append(1))
    run = trainer(max_epochs=epochs)
    run.fit(own, datamodule=datamodule)
    assert (len(passes), len(batches)) == (6 + 4, 6 * epochs)
    assert own.frozen_states.find("train", batches[0]) is None  # let go of
    trained = [group["params"] for group in run.optimizers[0].param_groups]
    assert sum(map(len, trained)) == len(list(own.network.score.parameters()))

    head = copy.deepcopy(own.network.score)
    head.load_state_dict({name.removeprefix("score."): v for name, v in before.items() if name.startswith("score.")})
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05)
    for batch in batches:
        with torch.no_grad():
            states = pooled(own.network.backbone, batch.input_ids, batch.attention_mask, pooling)
        chosen, rejected = head(states).chunk(2)
        optimizer.zero_grad()
        torch.nn.functional.softplus(rejected - chosen).mean().backward()
        optimizer.step()
    for name, value in own.network.named_parameters():
        expected = before[name] if name.startswith("backbone.") else head.get_parameter(name.removeprefix("score."))
        torch.testing.assert_close(value, expected, rtol=0, atol=0 if name.startswith("backbone.") else 1e-6, msg=name)
    assert not torch.equal(own.network.score[0].weight, before["score.0.weight"])


def test_a_frozen_run_that_goes_on_ends_as_one_that_was_not_stopped(build, trainer, tmp_path):
    """To the bit, though its states are computed again: in batches that go by the data alone."""
    frozen = {"freeze_backbone": True, "pooling": "layers"}
    ends = []
    for first in (3, 1):
        module, datamodule = build(model=frozen)
        run = trainer(max_epochs=first)
        run.fit(module, datamodule)
        if first == 1:
            run.save_checkpoint(tmp_path / "a.ckpt")
            module, datamodule = build(model=frozen)
            trainer(max_epochs=3).fit(module, datamodule, ckpt_path=tmp_path / "a.ckpt")
        ends.append(weights(module))
    assert torch.equal(*ends)


def test_a_frozen_run_does_not_go_on_with_all_weights_and_a_saved_network_keeps_its_pooling(
    build, trainer, tmp_path, caplog
):
    frozen = {"freeze_backbone": True, "pooling": "layers"}
    module, datamodule = build(model=frozen)
    run = trainer(max_epochs=1)
    run.fit(module, datamodule)
    run.save_checkpoint(tmp_path / "a.ckpt")
    module.export(tmp_path / "model")
    other, datamodule = build(model=frozen | {"freeze_backbone": False})
    with pytest.raises(ConfigurationError, match=r"its run had model\.freeze_backbone True, this one has False"):
        trainer(max_epochs=2).fit(other, datamodule, ckpt_path=tmp_path / "a.ckpt")
    trainer().test(other, datamodule, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    other, datamodule = build(model={"pooling": "mean"})
    with pytest.raises(ConfigurationError, match=r"its run had model\.pooling layers, this one has mean"):
        trainer().test(other, datamodule, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    going_on, datamodule = build(model={"backbone": str(tmp_path / "model"), "pooling": "mean"})
    assert going_on.hparams.pooling == "layers"
    assert "keeps its own, layers, not mean" in caplog.text
    with caplog.at_level("INFO", logger="rlhf_lightning"):
        trainer(max_epochs=1).fit(going_on, datamodule)
    assert "reward: its own mlp head, pooling layers" in caplog.messages


def test_every_training_pair_is_seen_once_an_epoch(build, trainer):
    seen = []

    class Seen(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(batch.index)

    module, datamodule = build()
    trainer(callbacks=[Seen()], max_epochs=2, accumulate_grad_batches=2).fit(module, datamodule)
    order = torch.cat(seen).tolist()
    assert sorted(order[:TRAIN_PAIRS]) == sorted(order[TRAIN_PAIRS:]) == list(range(TRAIN_PAIRS))
    assert order[:TRAIN_PAIRS] != order[TRAIN_PAIRS:]


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(build, trainer, tmp_path, stop):
    """3 optimizer steps an epoch, 2 epochs; stopped within the first, at its end, and within the second."""
    settings = {"batch_size": 2, "accumulate": 2, "max_epochs": 2, "enable_checkpointing": True}
    adam = {"optimizer": functools.partial(torch.optim.Adam, lr=1e-3), "lr_scheduler_type": "linear"}
    unbroken = trained(build, trainer, model=adam, **settings)
    save = ModelCheckpoint(tmp_path / "all", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trained(build, trainer, model=adam, callbacks=[save], **settings)
    resumed, datamodule = build(model=adam, data={"batch_size": 2})
    run = trainer(accumulate_grad_batches=2, max_epochs=2)
    run.fit(resumed, datamodule, ckpt_path=tmp_path / "all" / f"step={stop}.ckpt")
    assert run.global_step == 6
    assert torch.equal(weights(resumed), unbroken)


def test_an_encoder_backbone_trains(build, trainer, tiny_bert):
    settings = {"model": {"backbone": str(tiny_bert)}, "data": {"tokenizer": str(tiny_bert)}}
    before, _ = build(**settings)
    before.configure_model()
    after = trained(build, trainer, **settings)
    assert not torch.equal(weights(before), after)


def test_a_max_length_beyond_the_backbones_positions_is_lowered_to_them_in_one_line(build, trainer, pairs, caplog):
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
    rows[0]["prompt"] = "x " * 5000
    module, datamodule = build(data={"train": rows, "val": rows, "max_length": 4096, "batch_size": 1})
    with caplog.at_level(logging.WARNING, "rlhf_lightning"):
        trainer(max_steps=1, limit_val_batches=1).fit(module, datamodule)
    lines = [record.getMessage() for record in caplog.records if "max_length is 4096" in record.getMessage()]
    assert len(lines) == 1
    assert "2048" in lines[0]
    assert datamodule.max_length == datamodule.pairs["train"].lengths.max() == 2048
    assert len(datamodule.reports["train"].rows_cut) == 1


def test_rows_read_beforehand_are_cut_to_the_positions_as_well(build, trainer, pairs):
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
    rows[0]["prompt"] = "x " * 5000
    module, datamodule = build(data={"train": rows, "val": rows, "max_length": 4096, "batch_size": 1})
    datamodule.setup("fit")
    assert datamodule.pairs["train"].lengths.max() == 4096
    trainer(max_steps=1, limit_val_batches=1).fit(module, datamodule)
    assert {int(rows.lengths.max()) for rows in datamodule.pairs.values()} == {2048}


def test_a_tokenizer_of_a_larger_model_is_refused(build, trainer, tiny_qwen2, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "larger")
    module, datamodule = build(data={"tokenizer": str(tmp_path / "larger")})
    with pytest.raises(ConfigurationError, match="give the tokenizer of this model"):
        trainer().fit(module, datamodule)


def test_a_directory_that_is_no_model_is_refused_at_once(tmp_path):
    with pytest.raises(ModelError, match=r"without a config\.json"):
        RewardModel(str(tmp_path))


def test_a_changing_accumulation_is_refused(build, trainer):
    module, datamodule = build()
    with pytest.raises(ConfigurationError, match="GradientAccumulationScheduler"):
        trainer(callbacks=[GradientAccumulationScheduler({0: 1, 1: 2})]).fit(module, datamodule)


def test_a_run_without_an_end_is_refused(build, trainer):
    module, datamodule = build()
    with pytest.raises(ConfigurationError, match="set max_epochs or max_steps"):
        trainer(max_epochs=-1).fit(module, datamodule)
