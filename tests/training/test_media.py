"""Tables and pictures: in TensorBoard, in a logger with W&B's methods, in MLflow's where it is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_lightning.commands.main import main
from rlhf_lightning.training.media import log_picture, log_table, taking_media
from tests.test_configs import ROOT

COLUMNS, ROWS = ("prompt", "now"), [("a | b", "<i>"), ("c", "d")]
PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


class Tracking(CSVLogger):
    """Takes tables and pictures as W&B's logger does."""

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir)
        self.tables, self.pictures = [], []

    def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
        self.tables.append((key, columns, data, step))

    def log_image(self, key, images, step=None):
        self.pictures.append((key, images, step))


def test_a_logger_takes_what_it_can(tmp_path):
    board, tracking = TensorBoardLogger(tmp_path), Tracking(str(tmp_path / "t"))
    loggers = [board, tracking, CSVLogger(tmp_path / "csv")]
    assert taking_media(loggers) == [board, tracking]
    log_table(loggers, "samples", COLUMNS, ROWS, 3)
    log_picture(loggers, "curve", PICTURE, 4)
    assert tracking.tables == [("samples", ["prompt", "now"], [["a | b", "<i>"], ["c", "d"]], 3)]
    ((key, (picture,), step),) = tracking.pictures
    assert (key, step) == ("curve", 4)
    assert np.array_equal(picture, PICTURE)
    board.experiment.flush()
    events = EventAccumulator(board.log_dir)
    events.Reload()
    (text,) = events.Tensors("samples/text_summary")
    assert text.step == 3
    content = text.tensor_proto.string_val[0].decode()
    assert content == "| prompt | now |\n|---|---|\n| a \\| b | &lt;i&gt; |\n| c | d |"
    (image,) = events.Images("curve")
    assert (image.step, image.height, image.width) == (4, 4, 6)


@pytest.mark.filterwarnings("default")  # of its own libraries
def test_mlflow_takes_both_and_a_run_goes_through(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    quickstart = str(ROOT / "configs" / "quickstart" / "dpo.yaml")
    logger = {"class_path": "MLFlowLogger", "init_args": {"tracking_uri": "sqlite:///runs.db"}}
    Path("mlflow.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    few = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--model.backbone=builtin:tiny"]
    assert main(["fit", "--config", quickstart, "--config", "mlflow.yaml", *few, "--trainer.callbacks+=Samples"]) == 0
    (table,) = Path().rglob("samples/step_000002.md")
    assert table.read_text().startswith("| prompt | at the start | now |")


def test_hyperparameters_are_compared_by_the_best_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quickstart = str(ROOT / "configs" / "quickstart" / "reward_model.yaml")
    assert main(["fit", "--config", quickstart, "--trainer.max_steps=2", "--trainer.val_check_interval=1"]) == 0
    (directory,) = {path.parent for path in Path("runs").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(directory))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert "hp_metric" not in scalars
    (best,) = events.Scalars("best/val/auroc")
    assert best.value == max(each.value for each in events.Scalars("val/auroc"))
