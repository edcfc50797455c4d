"""The learning rate over a run, and over one that goes on; and what is said of both."""

from __future__ import annotations

import functools
import logging
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner

from rlhf_lightning.training.optimization import learning_rate_factor
from rlhf_lightning.training.resume import ProcessStates
from tests.training.conftest import sgd, weights


@pytest.mark.parametrize(
    ("schedule", "rest"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]),
    ],
)
@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 5])
def test_the_factor_rises_from_one_part_and_then_follows_the_schedule(schedule, rest, warmup_steps):
    settings = {"schedule": schedule, "warmup_steps": warmup_steps, "total_steps": warmup_steps + 4}
    factors = [learning_rate_factor(step, **settings) for step in range(warmup_steps + 4)]
    assert factors[:warmup_steps] == [(step + 1) / warmup_steps for step in range(warmup_steps)]
    assert factors[warmup_steps:] == pytest.approx(rest, abs=1e-15)
    assert min(factors) > 0
    assert learning_rate_factor(warmup_steps + 9, **settings) == (1 if schedule == "constant" else 0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_one_step_or_two_changes_the_weights_in_each(build, trainer, schedule, steps):
    module, data = build(model={"lr_scheduler_type": schedule, "warmup_ratio": 0.1, "optimizer": sgd(0.1)})
    module.configure_model()
    seen = [weights(module)]
    module.on_before_zero_grad = lambda optimizer: seen.append(weights(module))
    trainer(max_steps=steps, limit_val_batches=0).fit(module, data)
    seen.append(weights(module))
    assert len({tuple(each.tolist()) for each in seen}) == steps + 1


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"accumulate_grad_batches": 16}, "1 optimizer step in all (6 batches an epoch, 16 to a step)"),
        ({"max_epochs": 1}, "6 optimizer steps in all (6 batches an epoch, 1 to a step)"),
        ({"max_epochs": 2}, None),
        ({"max_steps": 3, "max_epochs": 9}, "3 optimizer steps in all"),
        ({"fast_dev_run": True}, None),
    ],
)
def test_a_run_of_few_steps_is_warned_of(build, trainer, caplog, settings, warned):
    with caplog.at_level(logging.WARNING, logger="rlhf_lightning"):
        trainer(limit_val_batches=0, **settings).fit(*build())
    said = [record.message for record in caplog.records if "optimizer step" in record.message]
    assert len(said) == (warned is not None)
    assert all(warned in line for line in said)


@pytest.mark.parametrize(
    ("schedule", "epochs", "lr", "expected"),
    [
        ("linear", 2, 0.1, ["at step 6 the learning rate goes from 0 to 0.05"]),
        ("constant", 2, 0.1, []),
        ("constant", 2, 0.3, ["lr 0.1, not 0.3"]),
        ("cosine", 3, 0.1, ["at step 6 the learning rate goes from 0 to 0.075"]),
    ],
)
def test_a_longer_run_from_a_checkpoint_says_what_becomes_of_the_learning_rate(
    build, trainer, tmp_path, caplog, schedule, epochs, lr, expected
):
    def run(epochs, lr, **path):
        module, data = build(
            model={"lr_scheduler_type": schedule, "optimizer": functools.partial(torch.optim.SGD, lr=lr)}
        )
        fitted = trainer(max_epochs=epochs, limit_val_batches=0, callbacks=[ProcessStates()])
        fitted.fit(module, data, **path)
        return fitted

    run(1, 0.1).save_checkpoint(tmp_path / "end.ckpt")
    with caplog.at_level(logging.WARNING, logger="rlhf_lightning"):
        run(epochs, lr, ckpt_path=tmp_path / "end.ckpt")
    said = [record.message for record in caplog.records if record.message.startswith("ckpt_path")]
    assert len(said) == len(expected)
    assert all(words in line for words, line in zip(expected, said, strict=True)), said


class Fits(pl.Callback):
    """The learning rates of all optimizer steps, and how many pairs each batch had."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.pairs: list[int] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.pairs.append(batch.pairs)


@pytest.mark.parametrize("kind", ["build", "build_dpo", "build_sft"])
def test_lightning_s_tuner_finds_a_batch_size_and_a_learning_rate_and_the_run_begins_with_them(request, trainer, kind):
    module, data = request.getfixturevalue(kind)(model={"lr_scheduler_type": "linear"})
    module.configure_model()
    start = weights(module)
    fits = Fits()
    fitted = trainer(max_epochs=2, limit_val_batches=0, callbacks=[fits])
    tuner = Tuner(fitted)
    assert tuner.scale_batch_size(module, datamodule=data, init_val=1, max_trials=3, steps_per_trial=1) == 4
    found = tuner.lr_find(module, datamodule=data, num_training=9, min_lr=1e-7, max_lr=1e-2)
    rate = found.suggestion(skip_begin=1)
    module.lr = rate
    assert torch.equal(weights(module), start)
    fitted.fit(module, data)
    assert fits.pairs == [4, 4, 3, 4, 4, 3]
    assert fits.rates == pytest.approx([rate * (6 - step) / 6 for step in range(6)])
    whole, again = request.getfixturevalue(kind)(model={"lr_scheduler_type": "linear", "optimizer": sgd(rate)})
    again.batch_size = 4
    trainer(max_epochs=2, limit_val_batches=0).fit(whole, again)
    assert torch.equal(weights(module), weights(whole))
    means = [each.train_metrics["loss"].compute().item() for each in (module, whole)]
    assert means[0] == means[1]


def test_a_learning_rate_found_by_a_callback_is_that_of_the_schedule(build, trainer):
    module, data = build(model={"lr_scheduler_type": "linear"}, data={"batch_size": 1})
    finder, fits = LearningRateFinder(num_training_steps=20, min_lr=1e-7, max_lr=1e-2), Fits()
    trainer(max_epochs=2, limit_val_batches=0, callbacks=[finder, fits]).fit(module, data)
    assert finder.optimal_lr.suggestion() == module.lr > 0
    assert fits.rates == pytest.approx([module.lr * (22 - step) / 22 for step in range(22)])


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_for_a_fused_optimizer_as_for_another(build, trainer, precision, algorithm):
    """It takes the loss scale, 65536, off the gradients by itself, after they are clipped."""
    ends = {}
    for fused, limit in ((False, 0.01), (True, 0.01), (True, None)):
        module, data = build(model={"optimizer": functools.partial(torch.optim.SGD, lr=0.1, fused=fused)})
        settings = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm, "max_steps": 3}
        plugin = MixedPrecision(precision, "cpu")  # the Trainer would make bfloat16 of float16 on a CPU
        trainer(plugins=plugin, limit_val_batches=0, **settings).fit(module, data)
        ends[fused, limit] = weights(module)
    torch.testing.assert_close(ends[True, 0.01], ends[False, 0.01], rtol=0, atol=1e-6)
    assert (ends[True, 0.01] - ends[True, None]).abs().max() > 1e-3
