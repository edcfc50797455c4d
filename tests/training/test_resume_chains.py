"""Runs that are broken off several times, each time going on from the newest checkpoint: the curve of an unbroken one.

In one process, so that many places can be tried; test_resume.py kills for real.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import random
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning import (
    DPO,
    KTO,
    PPO,
    SFT,
    OnlineDPO,
    PreferenceDataModule,
    PromptDataModule,
    RewardModel,
    UnpairedDataModule,
)
from rlhf_lightning.training.callbacks import Results
from rlhf_lightning.training.checkpoints import WholeFileIO, read_checkpoint
from rlhf_lightning.training.online import OnlineModule
from rlhf_lightning.training.resume import ProcessStates
from rlhf_lightning.training.signals import SaveAtSignal
from rlhf_lightning.training.validation import ValidateOnce

LORA = {"lora": {"r": 2, "lora_alpha": 4.0, "lora_dropout": 0.2, "target_modules": "all-linear"}}
ONLINE = {"reward_model": "tests.training.test_ppo:length", "max_new_tokens": 4, "num_mini_batches": 2}
KINDS = {
    "RewardModel": (RewardModel, {"dropout": 0.2}),
    "SFT": (SFT, LORA),
    "DPO frozen": (DPO, {"reference": "frozen"}),
    "DPO adapter": (DPO, LORA),
    "DPO precomputed": (DPO, {"precompute_reference": True}),
    "KTO": (KTO, LORA),
    "BCO": (KTO, {"loss_type": "bco", "beta": 1.0}),
    "PPO": (PPO, ONLINE | {"num_ppo_epochs": 2}),
    "OnlineDPO": (OnlineDPO, ONLINE | {"num_epochs": 2}),
}
# Six batches an epoch. Epochs end after a checkpoint, inside an accumulation, before a validation that is not due.
SCHEDULES = [
    {"max_epochs": 3, "accumulate_grad_batches": 2, "every": 3},
    {"max_epochs": 3, "accumulate_grad_batches": 2, "every": 1, "val_check_interval": 0.5},
    {"max_epochs": 3, "every": 2, "val_check_interval": 4, "check_val_every_n_epoch": None},
    {"max_epochs": 3, "every": 3, "check_val_every_n_epoch": 2},
    {"max_epochs": -1, "max_steps": 7, "accumulate_grad_batches": 2, "every": 3},
    {
        "max_epochs": 2,
        "accumulate_grad_batches": 3,
        "every": 1,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
    },
    {"max_epochs": 2, "accumulate_grad_batches": 3, "every": 2, "val_check_interval": 0.5},
    {"max_epochs": 3, "every": 6},
    {"max_epochs": 3, "every": 4},
]


class BrokenOff(Exception):
    pass


class Breaker(pl.Callback):
    """Breaks off before a training batch, the first being 1, and keeps what the run measured and counted.

    With `signals` it sends SIGTERM instead, and counts validation batches, too.
    """

    def __init__(self, at: int | None, signals: bool = False) -> None:
        self.at, self.batches, self.signals = at, itertools.count(1), signals
        self.seen: dict[tuple, object] = {}

    def on_train_batch_start(self, trainer, *_):
        if next(self.batches) == self.at:
            if not self.signals:
                raise BrokenOff
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_batch_start(self, trainer, *_):
        if self.signals and next(self.batches) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_end(self, trainer, module):
        name = "val/reward" if isinstance(module, OnlineModule) else "val/loss"
        self.seen["val", trainer.global_step] = float(trainer.callback_metrics[name])

    def on_save_checkpoint(self, trainer, module, checkpoint):
        counts = {name: n for name, n in checkpoint["loops"]["fit_loop"].items() if "val_loop" not in name}
        batches, epochs = counts["epoch_loop.batch_progress"]["total"], counts["epoch_progress"]["total"]
        self.seen["counts", batches["ready"], batches["completed"], epochs["processed"]] = counts


@pytest.fixture
def chain(tmp_path, tiny_qwen2, pairs):
    """Run a kind on a schedule, broken off before the given batches of its attempts; weights and what was seen."""
    numbers = itertools.count()

    def run(kind: str, schedule: dict, breaks: list[int], *, signals: bool = False) -> tuple[str, dict]:
        directory = tmp_path / str(next(numbers))
        make, settings = KINDS[kind]
        trainer_settings = dict(schedule)
        keeps_newest = trainer_settings.pop("keeps_newest", True)
        every, monitor = trainer_settings.pop("every"), {"monitor": "val/loss", "mode": "min"}
        data_class = UnpairedDataModule if make is KTO else PreferenceDataModule
        if issubclass(make, OnlineModule):
            every, monitor, data_class = every * 4, {"monitor": "val/reward", "mode": "max"}, PromptDataModule
        seen: dict = {}
        ended_at = 0
        for at in [*breaks, None]:
            pl.seed_everything(7, verbose=False)
            module = make(str(tiny_qwen2), optimizer=functools.partial(torch.optim.AdamW, lr=0.01), **settings)
            data = data_class(str(pairs), tokenizer=str(tiny_qwen2), batch_size=2)
            breaker, states = Breaker(at, signals), ProcessStates(replace=signals)
            plain = {"dirpath": directory, "enable_version_counter": False}
            writers = [
                ModelCheckpoint(filename="best-{step}", **monitor, **plain),
                ModelCheckpoint(filename="last-{step}", every_n_train_steps=every, **plain),
            ]
            writers = writers if keeps_newest else writers[:1]
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                plugins=[WholeFileIO()],
                callbacks=[*writers, Results(), ValidateOnce(), states, breaker],
                **trainer_settings,
            )
            trainer.callbacks.append(watch := SaveAtSignal(states))
            newest = max(directory.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)
            if signals and newest is not None:
                assert read_checkpoint(newest)["global_step"] == ended_at, "nothing is lost"
            with contextlib.suppress(BrokenOff, SystemExit), watch.listening(trainer):
                trainer.fit(module, data, ckpt_path=None if newest is None else str(newest))
            watch.close()
            ended_at = trainer.global_step
            for name, value in breaker.seen.items():
                assert seen.setdefault(name, value) == value, name
            if not trainer.interrupted:  # it came to its end before
                break
        seen["best"] = Path(writers[0].best_model_path).name
        weights = b"".join(p.detach().numpy().tobytes() for p in module.parameters() if p.requires_grad)
        return hashlib.sha256(weights).hexdigest(), seen

    return run


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning: the directory is not empty, PPO steps by itself
@pytest.mark.parametrize(("kind", "schedule"), list(zip(KINDS, SCHEDULES, strict=True)), ids=list(KINDS))
def test_a_run_that_is_broken_off_again_and_again_ends_as_an_unbroken_one(chain, kind, schedule):
    whole, seen = chain(kind, schedule, [])
    draw = random.Random(kind)
    breaks = [7, 7, draw.randint(2, 12)]  # twice after an epoch's last batch, then anywhere
    weights, again = chain(kind, schedule, breaks)
    assert weights == whole, breaks
    assert again.keys() == seen.keys(), breaks
    for place, numbers in seen.items():
        assert again[place] == numbers, (breaks, place)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("keeps_newest", [True, False])
@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        ("RewardModel", {"max_epochs": 3, "accumulate_grad_batches": 2, "every": 100, "val_check_interval": 0.5}),
        ("DPO adapter", {"max_epochs": 3, "every": 100, "val_check_interval": 4, "check_val_every_n_epoch": None}),
        ("PPO", {"max_epochs": 2, "every": 100}),
    ],
)
def test_a_run_that_is_told_to_end_again_and_again_loses_nothing(chain, kind, schedule, keeps_newest):
    schedule = schedule | {"keeps_newest": keeps_newest}
    whole, seen = chain(kind, schedule, [])
    draw = random.Random(f"{kind} {keeps_newest}")
    breaks = [draw.randint(3, 16) for _ in range(3)]
    weights, again = chain(kind, schedule, breaks, signals=True)
    assert weights == whole, breaks
    validations = [{place: value for place, value in each.items() if place[0] == "val"} for each in (seen, again)]
    assert validations[0] == validations[1], breaks
