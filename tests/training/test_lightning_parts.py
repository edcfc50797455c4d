"""Lightning's own callbacks and loggers either work with the command line, or are refused in one line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, Logger

from rlhf_lightning.commands.main import main
from rlhf_lightning.commands.trainer_checks import refuse_callbacks
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.training.zero import ZeroStrategy

HERE = "tests.training.test_lightning_parts"
RUN = ["fit", "--model", "RewardModel", "--model.backbone", "builtin:tiny", "--data", "PreferenceDataModule"]
RUN += ["--data.train", "builtin:courtesy", "--trainer.accelerator", "cpu", "--trainer.max_steps", "1"]
RUN += [
    "--trainer.limit_val_batches",
    "1",
    "--trainer.default_root_dir",
    "runs",
    "--trainer.enable_progress_bar",
    "false",
]
RUN += ["--seed_everything", "1", "--model.warmup_ratio", "0", "--trainer.num_sanity_val_steps", "0"]


class InADatabase(Logger):
    """A logger that has no directory, as MLFlowLogger with a database or a server."""

    name, version = "one", "run"

    def log_metrics(self, metrics, step=None) -> None:
        pass

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        pass


class NotInstalled(CSVLogger):
    """A logger whose library is missing, as WandbLogger."""

    def __init__(self) -> None:
        raise ModuleNotFoundError("Requirement 'wandb>=0.12.10' not met")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "callback",
    [
        LearningRateFinder(),
        BatchSizeFinder(),
        StochasticWeightAveraging(swa_lrs=0.1),
        BackboneFinetuning(),
        ModelPruning("l1_unstructured"),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_that_do_not_go_with_the_modules_are_refused_by_name(callback):
    with pytest.raises(ConfigurationError, match=rf"^trainer.callbacks: {type(callback).__name__} is not supported: "):
        refuse_callbacks(SimpleNamespace(callbacks=[callback], strategy=None))


def test_an_average_is_refused_under_deepspeed_alone():
    callback = EMAWeightAveraging()
    refuse_callbacks(SimpleNamespace(callbacks=[callback], strategy=None))
    with pytest.raises(ConfigurationError, match="EMAWeightAveraging is not supported under DeepSpeed"):
        refuse_callbacks(SimpleNamespace(callbacks=[callback], strategy=ZeroStrategy.__new__(ZeroStrategy)))


def test_a_timer_runs_and_the_configuration_lies_beside_the_checkpoints_without_a_log_directory(tmp_path, capsys):
    timer = ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration", "00:01:00:00"]
    assert main([*RUN, *timer, "--trainer.logger", f"{HERE}.InADatabase"]) == 0, capsys.readouterr().err
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    written = yaml.safe_load((checkpoint.parents[1] / "config.yaml").read_text())
    (timer,) = [c for c in written["trainer"]["callbacks"] if c["class_path"].endswith("Timer")]
    assert timer["init_args"]["interval"] == "step"


def test_a_constructor_s_refusal_is_one_line(capsys):
    assert main([*RUN, "--trainer.logger", f"{HERE}.NotInstalled"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == ("rlhf-lightning: error: Requirement 'wandb>=0.12.10' not met")


def test_last_asks_where_the_checkpoints_are_of_a_logger_without_versions(capsys):
    assert main([*RUN, "--trainer.logger", "MLFlowLogger", "--ckpt_path", "last"]) == 2
    assert "last needs to know where the checkpoints are" in capsys.readouterr().err
