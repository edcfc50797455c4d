"""What Lightning's loops get from the data, and when they validate: from the beginning, and after the last step."""

from __future__ import annotations

import itertools

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from rlhf_lightning import PreferenceDataModule, PromptDataModule
from rlhf_lightning.training.best import SavingOrder
from rlhf_lightning.training.resume import ProcessStates
from rlhf_lightning.training.validation import ValidateOnce
from tests.training.conftest import VAL_PAIRS


class Seen(pl.Callback):
    """The pairs of each epoch of training, of each validation, and of each test."""

    def __init__(self) -> None:
        self.train: list[list[list[int]]] = []
        self.val: list[list[list[int]]] = []
        self.test: list[list[list[int]]] = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.train.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.train:
            self.train.append([])  # a run that goes on inside an epoch does not begin it
        self.train[-1].append(batch.index.tolist())

    def on_validation_start(self, trainer, pl_module):
        self.val.append([])

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.val[-1].append(batch.index.tolist())

    def on_test_start(self, trainer, pl_module):
        self.test.append([])

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.test[-1].append(batch.index.tolist())


@pytest.fixture
def plain(pairs, tiny_qwen2):
    """A module that learns nothing, and its data: 6 training batches and 4 of validation, as pairs or as prompts."""

    class Nothing(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx):
            return self.weight**2

        def validation_step(self, batch, batch_idx):
            self.log("val/step", float(self.trainer.global_step), batch_size=1)

        test_step = validation_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def make(kind="pairs"):
        made = {"pairs": PreferenceDataModule, "prompts": PromptDataModule}[kind]
        return Nothing(), made(str(pairs), tokenizer=str(tiny_qwen2), batch_size=2, seed=3)

    return make


@pytest.mark.parametrize("kind", ["pairs", "prompts"])
@pytest.mark.parametrize("sanity", [0, 1, 2, 3, -1])
def test_sanity_batches_are_seen_again_by_the_first_validation(plain, trainer, kind, sanity):
    seen = Seen()
    trainer(num_sanity_val_steps=sanity, max_epochs=2, val_check_interval=0.5, callbacks=[seen]).fit(*plain(kind))
    validations = seen.val[1:] if sanity else seen.val
    assert len(validations) == 4
    assert all(validation == validations[0] for validation in validations)
    assert sorted(itertools.chain(*validations[0])) == list(range(VAL_PAIRS))


@pytest.mark.parametrize("limit", [1, 3, 0.5])
def test_a_limit_gives_the_same_slice_in_each_validation(plain, trainer, limit):
    seen = Seen()
    limits = {"limit_val_batches": limit, "limit_test_batches": limit}
    run = trainer(max_epochs=3, val_check_interval=0.5, num_sanity_val_steps=1, callbacks=[seen], **limits)
    module, data = plain()
    run.fit(module, data)
    run.validate(module, data)
    run.test(module, data)
    run.test(module, data)
    sanity, *validations = seen.val
    assert len(validations) == 7
    assert all(each == validations[0] for each in [*validations, *seen.test])
    assert len(validations[0]) == (2 if limit == 0.5 else limit)
    assert sanity == validations[0][:1]


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_trains_on_the_same_batches_in_each_epoch(plain, trainer):
    seen = Seen()
    trainer(overfit_batches=2, max_epochs=3, callbacks=[seen]).fit(*plain())
    assert [len(epoch) for epoch in seen.train] == [2, 2, 2]
    assert seen.train[0] == seen.train[1] == seen.train[2]
    assert seen.val[0] == seen.val[1] == seen.val[2]


def test_limited_training_epochs_begin_at_the_beginning(plain, trainer):
    seen, whole = Seen(), Seen()
    trainer(limit_train_batches=4, max_epochs=3, callbacks=[seen]).fit(*plain())
    trainer(max_epochs=3, callbacks=[whole]).fit(*plain())
    assert seen.train == [epoch[:4] for epoch in whole.train]


def test_a_second_run_on_the_same_data_does_not_go_on_where_the_first_was_restored(plain, trainer, tmp_path):
    module, data = plain()
    callback = ModelCheckpoint(tmp_path, filename="middle", every_n_train_steps=4)
    trainer(max_epochs=2, max_steps=4, callbacks=[callback], enable_checkpointing=True).fit(module, data)
    restored, fresh, whole = Seen(), Seen(), Seen()
    trainer(max_epochs=2, callbacks=[whole]).fit(*plain())
    module, data = plain()
    trainer(max_epochs=2, callbacks=[restored]).fit(module, data, ckpt_path=tmp_path / "middle.ckpt")
    trainer(max_epochs=2, callbacks=[fresh]).fit(module, data)
    assert restored.train == [whole.train[0][4:], whole.train[1]]
    assert fresh.train == whole.train


class Validated(pl.Callback):
    """The optimizer steps at which there was a validation; ends the run after some step."""

    def __init__(self, stop_at: int = -1) -> None:
        self.steps: list[int] = []
        self.stop_at = stop_at

    def on_validation_end(self, trainer, pl_module):
        self.steps.append(trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop |= trainer.global_step == self.stop_at


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": 2}, [6, 12]),
        ({"max_steps": 4}, [4]),
        ({"max_steps": 6}, [6]),
        ({"max_steps": 9, "max_epochs": -1}, [6, 9]),
        ({"val_check_interval": 4}, [4, 6]),
        ({"val_check_interval": 0.5, "max_epochs": 2}, [3, 6, 9, 12]),
        ({"val_check_interval": 4, "max_steps": 5}, [4, 5]),
        ({"val_check_interval": 5, "accumulate_grad_batches": 2}, [2, 3]),
        ({"val_check_interval": 3, "accumulate_grad_batches": 4}, [0, 2]),
        ({"val_check_interval": 1, "accumulate_grad_batches": 4}, [0, 1, 2]),
        ({"check_val_every_n_epoch": 2, "max_epochs": 3}, [12, 18]),
        ({"check_val_every_n_epoch": 5, "max_epochs": 2}, [12]),
        ({"check_val_every_n_epoch": None, "val_check_interval": 4, "max_steps": 10, "max_epochs": -1}, [4, 8, 10]),
        ({"limit_train_batches": 4, "val_check_interval": 3}, [3, 4]),
        ({"limit_val_batches": 0, "max_steps": 4}, []),
        ({"stop_at": 4, "max_epochs": 2}, [4]),
        ({"stop_at": 4, "max_epochs": 2, "check_val_every_n_epoch": 2}, [4]),
    ],
)
def test_the_last_step_is_validated_once_however_the_run_ends(plain, trainer, settings, steps):
    validated = Validated(settings.pop("stop_at", -1))
    trainer(**settings, callbacks=[validated, ValidateOnce()]).fit(*plain())
    assert validated.steps == steps


SMALL_STEPS = {"val_check_interval": 1, "accumulate_grad_batches": 4, "max_epochs": 2}
"""Validations after each batch: at the optimizer steps 0, 0, 0, 1, 1, 2, and so on."""


def test_a_validation_in_an_accumulation_does_not_count_against_the_patience(plain, trainer):
    impatient = EarlyStopping("val/step", mode="max", patience=1)
    run = trainer(**SMALL_STEPS, callbacks=[impatient, SavingOrder(), ValidateOnce()])
    run.fit(*plain())
    assert (run.global_step, impatient.stopping_reason_message) == (4, None)


@pytest.mark.parametrize("batch", [3, 4, 5])
def test_a_resumed_run_validates_no_weights_that_were_validated_before(plain, trainer, tmp_path, batch):
    """Checkpoints of step 0 within its accumulation, of step 1 before its validation, and of step 1 after it."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch_, batch_idx):
            if batch_idx == batch - 1 and trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "at.ckpt")

    own = [ValidateOnce(), ProcessStates()]
    before = Validated()
    trainer(**SMALL_STEPS, callbacks=[before, *own, Save()]).fit(*plain())
    after = Validated()
    trainer(**SMALL_STEPS, callbacks=[after, *own]).fit(*plain(), ckpt_path=tmp_path / "at.ckpt")
    assert before.steps == [0, 1, 2, 3, 4]
    assert after.steps == ([2, 3, 4] if batch == 5 else [1, 2, 3, 4])


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 3}, {"check_val_every_n_epoch": 2}])
def test_the_checkpoint_of_the_last_step_is_judged_by_its_own_validation(plain, trainer, tmp_path, settings):
    save = ModelCheckpoint(tmp_path, monitor="val/step", mode="max", filename="{step}")
    run = trainer(max_steps=10, max_epochs=3, callbacks=[save, ValidateOnce()], enable_checkpointing=True, **settings)
    run.fit(*plain())
    assert (save.best_model_path, float(save.best_model_score)) == (str(tmp_path / "step=10.ckpt"), 10.0)


def test_the_last_validation_leaves_a_checkpoint_from_which_a_longer_run_goes_on(plain, trainer, tmp_path):
    """It ended inside an epoch, whose last two batches are still to come."""
    save = ModelCheckpoint(tmp_path, monitor="val/step", mode="max", filename="{step}")
    settings = {"callbacks": [save, ValidateOnce()], "enable_checkpointing": True, "val_check_interval": 3}
    trainer(max_steps=4, max_epochs=-1, **settings).fit(*plain())
    longer, whole = Seen(), Seen()
    trainer(max_epochs=2, callbacks=[whole]).fit(*plain())
    trainer(max_epochs=2, callbacks=[longer]).fit(*plain(), ckpt_path=save.best_model_path)
    assert longer.train == [whole.train[0][4:], whole.train[1]]


class Monitored(EarlyStopping):
    """Keeps what it looked at, and never stops."""

    def __init__(self, monitor: str, **settings) -> None:
        super().__init__(monitor, patience=99, **settings)
        self.seen: list[float] = []

    def _evaluate_stopping_criteria(self, current):
        self.seen.append(current.item())
        return super()._evaluate_stopping_criteria(current)


@pytest.mark.parametrize("kind", ["build", "build_dpo", "build_sft"])
@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"log_every_n_steps": 50}, [(0, 6), (0, 12)]),
        ({"log_every_n_steps": 0}, [(0, 6), (0, 12)]),
        ({"log_every_n_steps": 3}, [(3, 6), (9, 12)]),
        ({"log_every_n_steps": 5, "val_check_interval": 0.5}, [(0, 3), (5, 6), (5, 9), (10, 12)]),
        ({"log_every_n_steps": 50, "limit_val_batches": 0}, [(0, 6), (0, 12)]),
    ],
)
def test_callbacks_that_monitor_the_training_loss_see_it(request, trainer, kind, settings, parts):
    """The mean over the pairs of the batches since the last log: 2 pairs a batch, and 1 in the last of an epoch."""
    losses, seen = [], Monitored("train/loss")

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append((outputs["loss"].item() / batch.weight.item(), batch.pairs))

    module, data = request.getfixturevalue(kind)()
    trainer(max_epochs=2, callbacks=[Losses(), seen], **settings).fit(module, data)
    expected = [sum(x * n for x, n in losses[a:b]) / sum(n for _, n in losses[a:b]) for a, b in parts]
    assert seen.seen == pytest.approx(expected, rel=1e-5)


def test_checkpoints_are_chosen_by_the_training_loss(build, trainer, tmp_path):
    save, seen = ModelCheckpoint(tmp_path, monitor="train/loss", save_top_k=2), Monitored("train/loss")
    trainer(max_epochs=3, callbacks=[save, seen], enable_checkpointing=True).fit(*build())
    assert sorted(float(score) for score in save.best_k_models.values()) == pytest.approx(sorted(seen.seen)[:2])
