"""A later file or key replaces a list whole, and a class with all of its arguments; keys of one class are merged."""

from __future__ import annotations

import pytest
import yaml

from rlhf_lightning.commands.fit import ParsedRun, run

MODEL = {"class_path": "RewardModel", "init_args": {"backbone": "builtin:tiny", "center_rewards_coefficient": 0.5}}
DATA = {"class_path": "PreferenceDataModule", "init_args": {"train": "builtin:courtesy"}}


def of(name: str, /, **arguments) -> dict:
    return {"class_path": name, "init_args": arguments}


BEST = of("ModelCheckpoint", monitor="val/auroc", mode="max", save_top_k=3)
STOP = of("EarlyStopping", monitor="val/auroc", mode="max", patience=6)
EXPORT = of("ExportBest", directory="models/a", merge=False)


@pytest.fixture
def settings(tmp_path):
    """The settings of a run with files of these contents, in their order, and these keys."""

    def parse(*contents: dict, keys: tuple[str, ...] = ()):
        arguments = []
        for number, content in enumerate(contents):
            base = {"model": MODEL, "data": DATA, "seed_everything": 1} if number == 0 else {}
            (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(base | content))
            arguments += ["--config", str(tmp_path / f"{number}.yaml")]
        return run(["fit", *arguments, *keys], program=ParsedRun).settings

    return parse


def given(classes) -> list[tuple[str, dict]]:
    """Names of classes, and what is not None or a default that says nothing of these tests."""
    told = (
        "monitor",
        "mode",
        "save_top_k",
        "patience",
        "directory",
        "merge",
        "every_n_train_steps",
        "save_dir",
        "name",
    )
    return [
        (each.class_path.rsplit(".")[-1], {k: v for k, v in each.init_args.items() if k in told and v is not None})
        for each in classes
    ]


LOSS = {"monitor": "val/loss", "mode": "min", "save_top_k": 1}


def test_a_later_list_of_classes_replaces_the_earlier_one_whatever_its_length(settings):
    first = {"trainer": {"callbacks": [BEST, STOP, EXPORT]}}
    equal = {
        "trainer": {"callbacks": [of("ModelCheckpoint", monitor="val/loss"), EXPORT, of("EarlyStopping", monitor="x")]}
    }
    expected = [("ModelCheckpoint", LOSS)]
    expected += [("ExportBest", {"directory": "models/a", "merge": False})]
    expected += [("EarlyStopping", {"monitor": "x", "mode": "min", "patience": 3})]
    assert given(settings(first, equal).trainer.callbacks) == expected
    shorter = {"trainer": {"callbacks": [of("ModelCheckpoint", every_n_train_steps=5)]}}
    every = ("ModelCheckpoint", {"mode": "min", "save_top_k": 1, "every_n_train_steps": 5})
    assert given(settings(first, equal, shorter).trainer.callbacks) == [every]
    assert given(settings(shorter, first, equal).trainer.callbacks) == expected
    text = "[{class_path: ModelCheckpoint, init_args: {monitor: val/loss}}]"
    for keys in (("--trainer.callbacks", text), (f"--trainer.callbacks={text}",)):
        assert given(settings(shorter, keys=keys).trainer.callbacks) == expected[:1]


@pytest.mark.parametrize("key", ["logger", "plugins"])
def test_so_do_the_other_lists_of_classes(settings, key):
    names = {
        "logger": ["TensorBoardLogger", "CSVLogger"],
        "plugins": ["lightning.fabric.plugins.TorchCheckpointIO"] * 2,
    }
    arguments = {"logger": {"save_dir": "runs", "name": "a"}, "plugins": {}}[key]
    earlier = {"trainer": {key: [of(name, **arguments) for name in names[key]]}}
    later = [of(name, **({"save_dir": "other"} if key == "logger" else {})) for name in names[key]]
    found = given(settings(earlier, {"trainer": {key: later}}).trainer[key])
    assert found == given(settings({"trainer": {key: later}}).trainer[key])
    assert all(each.get("name") != "a" for _, each in found)


def test_a_later_list_of_sources_replaces_the_earlier_one(settings):
    def data(*sources) -> dict:
        return {"data": {"init_args": {"train": list(sources)}}}

    first = data({"source": "builtin:courtesy", "weight": 0.5}, {"source": "builtin:courtesy", "weight": 2.0})
    merged = settings({}, first, data({"source": "builtin:courtesy"}, {"source": "b.jsonl"}))
    alone = settings({}, data({"source": "builtin:courtesy"}, {"source": "b.jsonl"}))
    assert str(merged.data.init_args.train) == str(alone.data.init_args.train)
    assert "0.5" not in str(merged.data.init_args.train)


def test_keys_still_append_to_a_list_and_set_one_argument_of_its_last_class(settings):
    first = {"trainer": {"callbacks": [BEST, STOP]}}
    keys = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/loss")
    appended = ("EarlyStopping", {"monitor": "val/loss", "mode": "min", "patience": 3})
    both = [(each["class_path"], each["init_args"]) for each in (BEST, STOP)]
    assert given(settings(first, keys=keys).trainer.callbacks) == [*both, appended]
    changed = ("EarlyStopping", STOP["init_args"] | {"patience": 9})
    assert given(settings(first, keys=("--trainer.callbacks.patience=9",)).trainer.callbacks) == [both[0], changed]
    more = {"trainer": {"callbacks+": [of("EarlyStopping", monitor="val/loss")]}}
    assert given(settings(first, more).trainer.callbacks) == [*both, appended]


def optimizer(name: str, **arguments) -> dict:
    return {"model": {"init_args": {"optimizer": of(name, **arguments)}}}


ADAMW = optimizer("torch.optim.AdamW", lr=0.5, weight_decay=0.3)


@pytest.mark.parametrize(
    ("contents", "keys", "name", "expected"),
    [
        ([ADAMW, optimizer("torch.optim.SGD")], [], "SGD", {"lr": 1e-3, "weight_decay": 0.0}),
        ([ADAMW, optimizer("torch.optim.SGD", lr=2.0)], [], "SGD", {"lr": 2.0, "weight_decay": 0.0}),
        ([ADAMW], ["--model.optimizer", "SGD", "--model.optimizer.lr", "2"], "SGD", {"lr": 2.0, "weight_decay": 0.0}),
        ([optimizer("torch.optim.SGD")], [], "SGD", {"lr": 1e-3, "weight_decay": 0.0}),
        ([], ["--model.optimizer", "SGD"], "SGD", {"lr": 1e-3, "weight_decay": 0.0}),
        ([ADAMW, optimizer("torch.optim.AdamW", eps=1e-5)], [], "AdamW", {"lr": 0.5, "weight_decay": 0.3, "eps": 1e-5}),
        ([ADAMW, optimizer("AdamW", eps=1e-5)], [], "AdamW", {"lr": 0.5, "weight_decay": 0.3, "eps": 1e-5}),
        ([ADAMW], ["--model.optimizer.lr", "2"], "AdamW", {"lr": 2.0, "weight_decay": 0.3}),
    ],
)
def test_another_class_takes_no_argument_of_the_earlier_one_and_the_same_class_all(
    settings, contents, keys, name, expected
):
    found = settings({}, *contents, keys=tuple(keys)).model.init_args.optimizer
    assert found.class_path == f"torch.optim.{name}"
    assert {key: found.init_args[key] for key in expected} == expected


def test_the_model_and_the_logger_too(settings):
    first = {"trainer": {"logger": of("TensorBoardLogger", save_dir="runs", name="a")}}
    second = {"trainer": {"logger": of("CSVLogger", save_dir="other")}, "model": of("SFT", backbone="builtin:tiny")}
    found = settings(first, second)
    assert given([found.trainer.logger]) == [("CSVLogger", {"save_dir": "other", "name": "lightning_logs"})]
    assert (found.model.class_path.rsplit(".")[-1], found.model.init_args.backbone) == ("SFT", "builtin:tiny")
    assert "center_rewards_coefficient" not in found.model.init_args
