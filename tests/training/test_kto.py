"""KTO's training: the loss of a coin at the start, one shift for an optimizer step, the step is a mean of its rows."""

from __future__ import annotations

import functools
import logging
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning import KTO
from rlhf_lightning.errors import ConfigurationError, TrainingError
from rlhf_lightning.functional import UNPAIRED_LOSSES, kto_shift
from rlhf_lightning.training.kto import _warn_of_weights
from tests.training.conftest import VAL_PAIRS, sgd, weights
from tests.training.test_dpo import LORA
from tests.training.test_reward_model import LossLog

COIN = {"kto": 0.5, "bco": math.log(2), "apo_zero_unpaired": 0.5}


def trained(build_kto, trainer, *, batch_size=2, accumulate=1, model=None, data=None, **settings):
    module, datamodule = build_kto(model=model, data={"batch_size": batch_size} | (data or {}))
    trainer(accumulate_grad_batches=accumulate, **settings).fit(module, datamodule)
    return module, datamodule


class Shifts(pl.Callback):
    """The shift after each training batch."""

    def __init__(self):
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(float(pl_module._shift))


@pytest.mark.parametrize("model", [{}, LORA], ids=["frozen", "adapter"])
@pytest.mark.parametrize("loss_type", UNPAIRED_LOSSES)
def test_the_first_loss_is_that_of_a_coin(build_kto, trainer, model, loss_type):
    log = LossLog()
    trained(
        build_kto, trainer, model=model | {"loss_type": loss_type}, callbacks=[log], max_steps=1, limit_val_batches=0
    )
    assert log.losses[0] == pytest.approx(COIN[loss_type], abs=1e-6)


def test_a_policy_that_is_not_its_reference_at_the_start_stops_the_run(build_kto, trainer):
    class Disturbed(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            with torch.no_grad():
                next(pl_module.policy.parameters()).mul_(1.5)

    module, datamodule = build_kto()
    with pytest.raises(TrainingError, match=r"step 0: a loss is .* but 0\.5000 is due"):
        trainer(callbacks=[Disturbed()]).fit(module, datamodule)


@pytest.mark.parametrize(
    "model",
    [
        {"desirable_weight": 1.3},
        {"loss_type": "bco", "beta": 1.0, "optimizer": sgd(0.005)},
        {"loss_type": "apo_zero_unpaired"},
        LORA,
    ],
    ids=["kto", "bco", "apo", "lora"],
)
def test_accumulation_gives_the_weights_of_one_large_batch(build_kto, trainer, model):
    """22 responses in steps of 4: the last step has 2."""
    shifts = [Shifts(), Shifts()]
    runs = [
        trained(
            build_kto, trainer, model=model, batch_size=size, accumulate=4 // size, limit_val_batches=0, callbacks=[own]
        )[0]
        for size, own in zip((4, 1), shifts, strict=True)
    ]
    start, _ = build_kto(model=model)
    start.configure_model()
    assert (weights(runs[0]) - weights(start)).abs().max() > 1e-3
    torch.testing.assert_close(weights(runs[1]), weights(runs[0]), rtol=0, atol=2e-5)
    assert shifts[1].seen[::4] == pytest.approx(shifts[0].seen, abs=1e-5)
    assert all(shifts[1].seen[i] == shifts[1].seen[i - i % 4] for i in range(20)), "one in a step"
    moved = runs[0].loss.shift is not None
    assert any(abs(shift) > 1e-3 for shift in shifts[0].seen) is moved


@torch.no_grad()
def test_the_shift_is_that_of_responses_to_other_prompts(build_kto, trainer):
    module, datamodule = trained(build_kto, trainer, max_epochs=2, limit_val_batches=0)
    (batch, *_) = datamodule.train_dataloader()
    own, its = module.mismatched_sums(batch)
    rows = batch.mismatched
    logits = module.policy.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask.long()).logits
    each = logits[:, :-1].log_softmax(-1).gather(-1, rows.input_ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(own, (each * rows.response_mask[:, 1:]).sum(1), rtol=0, atol=1e-3)
    assert (own - its).abs().min() > 1e-2
    module._begin_step(batch)
    assert module._shift == kto_shift(own, its, beta=0.1)
    assert not own.requires_grad


def test_left_and_right_padding_and_layouts_give_the_same_step(build_kto, trainer):
    runs = [
        trained(build_kto, trainer, model={"layout": layout}, batch_size=4, limit_val_batches=0)[0]
        for layout in ("padded", "packed", "shared")
    ]
    for other in runs[1:]:
        torch.testing.assert_close(weights(other), weights(runs[0]), rtol=0, atol=2e-5)
    module, datamodule = trained(build_kto, trainer, max_steps=1, limit_val_batches=0)
    (batch, *_) = datamodule.train_dataloader()
    module.double()
    rows = [batch.input_ids, batch.attention_mask, batch.response_mask]
    ends = batch.attention_mask.sum(1)
    left = [torch.stack([row.roll(len(row) - int(end)) for row, end in zip(x, ends, strict=True)]) for x in rows]
    with torch.no_grad():
        torch.testing.assert_close(module.policy(*left).sums, module(batch).sums, rtol=0, atol=1e-9)


# ---- what is logged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["kto", "bco"])
def test_any_evaluation_batch_size_gives_the_metrics_of_the_whole_split(build_kto, trainer, tmp_path, loss_type):
    save = ModelCheckpoint(tmp_path, filename="last")
    model = {"loss_type": loss_type, "desirable_weight": 1.2}
    trained(build_kto, trainer, model=model, max_epochs=2, callbacks=[save], enable_checkpointing=True)
    measured = []
    for size in (1, 3, 2 * VAL_PAIRS):
        module, datamodule = build_kto(model=model, data={"eval_batch_size": size})
        (metrics,) = trainer().validate(module, datamodule, ckpt_path=save.best_model_path, verbose=False)
        measured.append(metrics)
    (batch,) = datamodule.val_dataloader()
    with torch.no_grad():
        policy, reference = module(batch).sums.double(), module.reference_sums(batch).double()
        mismatched = [each.double() for each in module.mismatched_sums(batch)]
    good, rewards = batch.desirable, 0.1 * (policy - reference)
    shift = kto_shift(*mismatched, beta=0.1) if loss_type == "kto" else module.reward_shift.value
    assert abs(shift) > 1e-3
    losses = module.losses(policy, reference, good, shift)
    above = (rewards[good][:, None] > rewards[~good]).double().mean()
    expected = {
        "val/loss": losses.mean(),
        "val/auroc": above,
        "val/rewards/margins": rewards[good].mean() - rewards[~good].mean(),
        "val/rewards/chosen": rewards[good].mean(),
        "val/rewards/rejected": rewards[~good].mean(),
        "val/logps/chosen": policy[good].mean(),
        "val/logps/rejected": policy[~good].mean(),
        "val/lengths/chosen": batch.response_mask[good].sum(1).double().mean(),
        "val/lengths/rejected": batch.response_mask[~good].sum(1).double().mean(),
        "val/kl": (policy - reference).mean(),
        "val/responses": torch.tensor(2 * VAL_PAIRS),
    }
    for metrics in measured:
        assert metrics == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4, abs=1e-5)


def test_predict_gives_the_rewards(build_kto, trainer):
    module, datamodule = trained(build_kto, trainer)
    (first, *_) = trainer().predict(module, datamodule)
    batch = next(iter(datamodule.predict_dataloader()))
    with torch.no_grad():
        expected = 0.1 * (module(batch).sums - module.reference_sums(batch))
    assert torch.equal(first.index, batch.index)
    torch.testing.assert_close(first.reward, expected)


# ---- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "given", "warned"),
    [
        ((100, 100), (1.0, 1.0), False),
        ((400, 300), (1.0, 1.0), False),
        ((300, 400), (1.0, 1.0), True),
        ((300, 400), (1.34, 1.0), False),
        ((500, 100), (1.0, 4.0), False),
        ((500, 100), (1.0, 1.0), True),
    ],
)
def test_weights_outside_of_the_recommended_ratio_are_warned_of(caplog, counts, given, warned):
    with caplog.at_level(logging.WARNING, logger="rlhf_lightning"):
        _warn_of_weights(*given, desirable=counts[0], others=counts[1])
    assert ("model.desirable_weight" in caplog.text) is warned
    if counts == (500, 100) and warned:
        assert "desirable_weight to 0.2 to 0.267, or undesirable_weight to 3.75 to 5" in caplog.text


def test_a_run_warns_of_its_own_responses(build_kto, trainer, caplog):
    with caplog.at_level(logging.WARNING, logger="rlhf_lightning"):
        trained(build_kto, trainer, model={"desirable_weight": 2.0}, max_steps=1, limit_val_batches=0)
        assert "model.desirable_weight: 11 good responses of weight 2 and 11 bad ones" in caplog.text
        caplog.clear()
        settings = {"desirable_weight": 2.0, "loss_type": "bco"}
        trained(build_kto, trainer, model=settings, max_steps=1, limit_val_batches=0)
    assert "model.desirable_weight" not in caplog.text


def test_pairs_and_unknown_losses_are_refused(build_kto, build_dpo, trainer):
    (module, _), (_, pairs) = build_kto(), build_dpo()
    with pytest.raises(ConfigurationError, match="learns from responses; use UnpairedDataModule, not Pref"):
        trainer().fit(module, pairs)
    with pytest.raises(ConfigurationError, match="kto"):
        build_kto(model={"loss_type": "kta"})


# ---- checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["kto", "bco"])
@pytest.mark.parametrize("stop", [2, 7])
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(build_kto, trainer, tmp_path, loss_type, stop):
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    model = LORA | {"optimizer": adam, "reference": "frozen", "loss_type": loss_type}
    settings = {"max_epochs": 2, "limit_val_batches": 0, "accumulate": 2}
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    unbroken, _ = trained(build_kto, trainer, model=model, **settings, callbacks=[save], enable_checkpointing=True)
    resumed, datamodule = build_kto(model=model)
    run = trainer(accumulate_grad_batches=2, max_epochs=2, limit_val_batches=0)
    run.fit(resumed, datamodule, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert torch.equal(weights(resumed), weights(unbroken))
    assert resumed.reward_shift.state_dict() == unbroken.reward_shift.state_dict()
    loaded = KTO.load_from_checkpoint(tmp_path / f"step={stop}.ckpt")
    assert loaded.lora == unbroken.lora


def test_adapters_that_do_not_move_stop_the_run(build_kto, trainer):
    class Deaf(torch.optim.SGD):
        def step(self, closure=None):
            return closure()

    module, datamodule = build_kto(model=LORA | {"optimizer": functools.partial(Deaf, lr=0.1)})
    with pytest.raises(TrainingError, match=r"step 1: .* no adapter moved"):
        trainer().fit(module, datamodule)


def test_one_response_in_a_batch_trains(build_kto, trainer):
    """The step has a shift, though no batch of it could have one of its own."""
    shifts = Shifts()
    trained(
        build_kto,
        trainer,
        batch_size=1,
        accumulate=4,
        model={"optimizer": sgd(0.05)},
        callbacks=[shifts],
        limit_val_batches=0,
    )
    assert max(shifts.seen) > 1e-3
