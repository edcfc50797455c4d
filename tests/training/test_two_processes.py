"""Two processes (gloo), run as a user runs them, do what one does: same weights, same metrics, every pair once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.programs import run, start
from tests.training.conftest import TRAIN_PAIRS, VAL_PAIRS

DATA = {"RewardModel": "PreferenceDataModule", "KTO": "UnpairedDataModule"}
ROWS = {"RewardModel": 1, "KTO": 2}
"""Rows of a pair."""


def run_program(directory: Path, command: str, processes: int, *arguments: str, forked: bool = True) -> None:
    """Run the program with steps of 4 pairs, whatever the number of its processes; not forked, it starts the second."""
    settings = ["--config", str(directory.parent / "run.yaml"), "--trainer.devices", str(processes)]
    settings += ["--trainer.accumulate_grad_batches", str(4 // processes)]
    settings += ["--trainer.strategy", "ddp"] if processes > 1 else []
    if forked:
        code, _, error = run(directory, command, *settings, *arguments, processes=processes)
    else:
        code, _, error = start(directory, command, *settings, *arguments)
    assert code == 0, error[-3000:]


@pytest.fixture(scope="module", params=["RewardModel", "KTO"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_qwen2, pairs, kind):
    """Directory of the run with one process and of that with two: 11 training and 7 validation pairs.

    KTO has two responses of each.
    """
    root = tmp_path_factory.mktemp("runs")
    checkpoint = {"monitor": "val/auroc", "mode": "max", "dirpath": "checkpoints", "filename": "best"}
    config = {
        "seed_everything": 5,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 2,
            "enable_progress_bar": False,
            "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "run"}},
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": checkpoint}],
        },
        "model": {
            "class_path": kind,
            "init_args": {
                "backbone": str(tiny_qwen2),
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
                "lr_scheduler_type": "constant",
                "warmup_ratio": 0.0,
            },
        },
        "data": {"class_path": DATA[kind], "init_args": {"train": str(pairs), "batch_size": 1}},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    directories = {}
    for processes in (1, 2):
        directories[processes] = root / f"{processes}"
        directories[processes].mkdir()
        run_program(directories[processes], "fit", processes, forked=processes == 1)
    return directories


def stored(directory: Path) -> dict:
    return torch.load(directory / "checkpoints" / "best.ckpt", weights_only=True)


def test_two_processes_train_the_weights_of_one(runs):
    """Steps of 4, 4 and 3 pairs: the last is divided 1 + 1 and 1 between the processes."""
    one, two = stored(runs[1]), stored(runs[2])
    assert one["global_step"] == two["global_step"]
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], tensor, rtol=0, atol=2e-6, msg=name)


def test_two_processes_validate_to_the_numbers_of_one(runs, kind):
    metrics = []
    for directory in runs.values():
        (state,) = (s for name, s in stored(directory)["callbacks"].items() if name.startswith("Results"))
        metrics.append(state["metrics"])
    count = "pairs" if kind == "RewardModel" else "responses"
    assert metrics[0][count] == metrics[1][count] == VAL_PAIRS * ROWS[kind]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("name", ["loss", "shift"])
def test_two_processes_log_the_training_numbers_of_one(runs, kind, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if (kind, name) == ("RewardModel", "shift"):
        pytest.skip("it has none")
    curves = []
    for directory in runs.values():
        (log,) = (directory / "runs" / "run").iterdir()
        events = EventAccumulator(str(log)).Reload()
        curves.append({e.step: e.value for e in events.Scalars(f"train/{name}")})
    steps = 2 * -(-TRAIN_PAIRS * ROWS[kind] // 4)
    assert list(curves[0]) == [*range(2, steps + 1, 2)]
    assert max(map(abs, curves[0].values())) > 1e-4
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)


def test_two_processes_predict_every_pair_once_in_the_order_of_the_data(runs, kind):
    rows = {}
    for processes, directory in runs.items():
        path = directory / "scores.jsonl"
        callback = ["--trainer.callbacks+=PredictionWriter", "--trainer.callbacks.path", str(path)]
        run_program(
            directory, "predict", processes, "--ckpt_path", str(runs[1] / "checkpoints" / "best.ckpt"), *callback
        )
        rows[processes] = [json.loads(line) for line in path.read_text().splitlines()]
    names = [f"courtesy-val-{number}" for number in range(VAL_PAIRS)]
    sides = {"RewardModel": [""], "KTO": [":chosen", ":rejected"]}[kind]
    assert [row["example_id"] for row in rows[1]] == [name + side for name in names for side in sides]
    for one, two in zip(rows[1], rows[2], strict=True):
        assert two == pytest.approx(one, abs=1e-5)
