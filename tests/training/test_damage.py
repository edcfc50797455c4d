"""A flipped bit in a checkpoint is found by whatever reads it, before a number comes of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning import DPO
from rlhf_lightning.commands.evaluate import run as evaluate
from rlhf_lightning.commands.export import export_checkpoint
from rlhf_lightning.commands.main import main
from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.training.callbacks import ExportBest
from rlhf_lightning.training.checkpoints import WholeFileIO, read_checkpoint, restored_module
from tests.training.conftest import build, pairs, trainer  # noqa: F401 (fixtures)

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart" / "reward_model.yaml")


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flip_a_weight(path: Path) -> None:
    """In the middle, among the weights, of which a flipped bit makes another number and no error of torch."""
    before = torch.load(path, weights_only=True)["state_dict"]
    flip(path, path.stat().st_size // 3 * 8)
    after = torch.load(path, weights_only=True)["state_dict"]
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def checkpoint(build, trainer, tmp_path) -> Path:  # noqa: F811
    """Of a reward model after one step of plain SGD, so that nearly all of it is weights."""
    run = trainer(max_steps=1)
    run.fit(*build())
    run.save_checkpoint(tmp_path / "one.ckpt")
    return tmp_path / "one.ckpt"


def test_every_reader_refuses_a_checkpoint_with_a_flipped_bit(checkpoint, build, trainer, tmp_path, capsys):  # noqa: F811
    module = build()[0]
    restored_module(type(module), checkpoint)  # what was whole before is looked at again
    flip_a_weight(checkpoint)
    ours = trainer(plugins=[WholeFileIO()])
    readers = [
        lambda: read_checkpoint(checkpoint),
        lambda: restored_module(type(module), checkpoint),
        lambda: type(module).load_from_checkpoint(checkpoint),
        lambda: export_checkpoint(checkpoint, tmp_path / "exported"),
        lambda: evaluate(["--reward_model", str(checkpoint), "--pairs", "builtin:courtesy", "--out", str(tmp_path)]),
        lambda: ours.fit(*build(), ckpt_path=checkpoint),
        lambda: ours.validate(*build(), ckpt_path=checkpoint),
    ]
    for reader in readers:
        with pytest.raises(
            ConfigurationError, match=r"one\.ckpt is not whole \(one\.ckpt is damaged at archive/data/\d+\)"
        ):
            reader()
    for command in ("fit", "validate", "test", "predict"):
        assert main([command, "--config", QUICKSTART, "--ckpt_path", str(checkpoint)]) == 2
        assert "is damaged at archive/data/" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "exported").exists()


def test_the_best_checkpoint_is_not_exported_when_it_was_damaged_in_the_meantime(build, trainer, tmp_path):  # noqa: F811
    class Flipped(ModelCheckpoint):
        def on_train_end(self, *_) -> None:
            flip_a_weight(Path(self.best_model_path))

    save = Flipped(tmp_path / "checkpoints", save_weights_only=True)
    export = ExportBest(str(tmp_path / "exported"))
    trainer(callbacks=[save, export], enable_checkpointing=True).fit(*build())
    assert "is damaged at" in export.fault
    assert not export.exported
    assert not (tmp_path / "exported").exists()


def test_no_flipped_bit_changes_what_is_read(tmp_path):
    """Of the settings and counts, the names, the archive's own directory and the numbers."""
    path, draw = tmp_path / "small.ckpt", random.Random(0)
    whole = {"pytorch-lightning_version": "2.6", "global_step": 3, "hyper_parameters": {"lr": 0.1, "loss": "ipo"}}
    torch.save(whole | {"state_dict": {"weight": torch.arange(24.0)}}, path)
    refused = 0
    for bit in draw.sample(range(path.stat().st_size * 8), 250):
        flip(path, bit)
        try:
            stored = read_checkpoint(path)
        except ConfigurationError:
            refused += 1
        else:  # in what pads the archive
            assert torch.equal(stored.pop("state_dict")["weight"], torch.arange(24.0))
            assert stored == whole
        flip(path, bit)
    assert refused > 100


@pytest.mark.parametrize("name", ["best", "hpc"])
def test_a_name_that_stands_for_no_file_is_refused(name, capsys):
    assert main(["test", "--config", QUICKSTART, "--ckpt_path", name]) == 2
    assert f"ckpt_path: {name} names no checkpoint" in capsys.readouterr().err.splitlines()[-1]


def test_last_with_broken_checkpoints_alone_does_not_begin_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "runs" / "quickstart_reward_model" / "version_0" / "checkpoints"
    directory.mkdir(parents=True)
    (directory / "last-3.ckpt").write_bytes(b"PK cut")
    assert main(["fit", "--config", QUICKSTART, "--ckpt_path", "last"]) == 2
    assert "leave ckpt_path out to start over at step 0" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_whose_base_model_is_gone_names_it_in_one_line(tmp_path):
    """Of a checkpoint that the command line wrote the parser makes the module and wraps what its constructor raises."""
    settings = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": "rlhf_lightning.DPO"}
    content = {"hyper_parameters": settings | {"backbone": "nowhere/at/all"}, "state_dict": {}}
    torch.save(content | {"pytorch-lightning_version": "2.6.6"}, tmp_path / "one.ckpt")
    with pytest.raises(ModelError, match=r"^nowhere/at/all: ") as raised:
        DPO.load_from_checkpoint(tmp_path / "one.ckpt")
    assert "\n" not in str(raised.value)
