"""A few pairs in files, and a run of a few steps on them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from rlhf_lightning import DPO, KTO, SFT, PreferenceDataModule, RewardModel, UnpairedDataModule
from rlhf_lightning.data.courtesy.make import make_rows

TRAIN_PAIRS, VAL_PAIRS = 11, 7


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """A directory with train.jsonl (11 pairs) and val.jsonl (7): odd numbers, so that batches do not come out even."""
    directory = tmp_path_factory.mktemp("pairs")
    write_pairs(directory)
    return directory


def write_pairs(directory: Path) -> None:
    for split, count in (("train", TRAIN_PAIRS), ("val", VAL_PAIRS)):
        rows = make_rows(split)[:count]
        for number, row in enumerate(rows):
            row["margin"] = number / count
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def sgd(lr: float):
    """Plain SGD: unlike Adam it does not hide a gradient that is too small by a constant factor."""
    return functools.partial(torch.optim.SGD, lr=lr)


def builder(kind, directory, pairs, *, lr: float, data_kind=PreferenceDataModule):
    """A function that makes a module and a data module; its keyword arguments go where they belong."""

    def make(*, model=None, data=None):
        torch.manual_seed(0)
        settings = {
            "backbone": str(directory),
            "optimizer": sgd(lr),
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
        }
        module = kind(**settings | (model or {}))
        datamodule = data_kind(
            **{"train": str(pairs), "tokenizer": str(directory), "batch_size": 2, "seed": 3} | (data or {})
        )
        return module, datamodule

    return make


@pytest.fixture
def build(tiny_qwen2, pairs):
    """Make a reward model and its data."""
    return builder(RewardModel, tiny_qwen2, pairs, lr=0.05)


@pytest.fixture
def build_dpo(tiny_qwen2, pairs):
    """Make a DPO module and its data."""
    return builder(DPO, tiny_qwen2, pairs, lr=0.003)


@pytest.fixture
def build_kto(tiny_qwen2, pairs):
    """Make a KTO module and its data: of each pair a good and a bad response."""
    return builder(KTO, tiny_qwen2, pairs, lr=0.05, data_kind=UnpairedDataModule)


@pytest.fixture
def build_sft(tiny_qwen2, pairs):
    """Make an SFT module and its data."""
    return builder(SFT, tiny_qwen2, pairs, lr=0.05)


@pytest.fixture
def trainer(tmp_path):
    """A quiet CPU trainer; keyword arguments override."""

    def make(**settings) -> pl.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        plain = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "num_sanity_val_steps": 0}
        return pl.Trainer(**quiet | plain | {"default_root_dir": tmp_path, "enable_checkpointing": False} | settings)

    return make


def weights(module: pl.LightningModule) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
