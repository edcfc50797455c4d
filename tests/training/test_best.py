"""Each checkpoint is judged by the validation of its own weights, and a run never ends without one."""

from __future__ import annotations

import copy
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file

from rlhf_lightning.commands.export import export_checkpoint
from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.training.best import SavingOrder, best_checkpoint
from rlhf_lightning.training.callbacks import ExportBest, print_results
from rlhf_lightning.training.checkpoints import metrics_of, read_checkpoint
from rlhf_lightning.training.checks import warn_of_divergence
from rlhf_lightning.training.results import Results
from tests.programs import run as run_program
from tests.training.conftest import build, build_dpo, build_sft, pairs, sgd, trainer  # noqa: F401 (fixtures)
from tests.training.test_dpo import LORA

pytestmark = [  # as the command line has it
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
JUDGED = {"monitor": "val/loss", "save_top_k": -1}


class Validations(pl.Callback):
    """Keeps the loss of each validation by its step."""

    def __init__(self):
        self.losses: dict[int, float] = {}

    def on_validation_end(self, run, pl_module):
        self.losses[run.global_step] = run.callback_metrics["val/loss"].item()


@pytest.fixture
def fit(trainer, tmp_path):  # noqa: F811
    """Train two epochs of six batches with the callbacks of the command line and those given; the trainer."""

    def run(built, *callbacks, ckpt_path=None, **settings) -> pl.Trainer:
        settings = {"max_epochs": 2, "val_check_interval": 3, "enable_checkpointing": True} | settings
        run = trainer(callbacks=[*callbacks, Results(), SavingOrder()], **settings)
        run.fit(*built, ckpt_path=ckpt_path)
        return run

    return run


def measured(trainer, built, path) -> float:  # noqa: F811
    """The validation loss of the weights of a checkpoint."""
    (metrics,) = trainer().validate(*built, ckpt_path=path, verbose=False)
    return metrics["val/loss"]


@pytest.mark.parametrize(
    ("settings", "interval", "steps"),
    [
        ({"every_n_train_steps": 3}, {}, [3, 6, 9, 12]),
        ({"every_n_train_steps": 5}, {}, [6, 12]),
        ({"every_n_train_steps": 4}, {"val_check_interval": 1.0}, [6, 12]),
        ({"train_time_interval": timedelta(0)}, {}, [3, 6, 9, 12]),
        ({"save_on_train_epoch_end": True}, {"val_check_interval": 4}, [4, 10]),
        ({"every_n_epochs": 2}, {}, [9, 12]),
    ],
)
def test_a_checkpoint_is_judged_by_the_validation_of_its_own_weights(
    build,  # noqa: F811
    fit,
    trainer,  # noqa: F811
    tmp_path,
    settings,
    interval,
    steps,
):
    saved = ModelCheckpoint(tmp_path, **JUDGED | settings)
    seen = Validations()
    run = fit(build(model={"optimizer": sgd(0.3)}), seen, saved, **interval)
    assert sorted(read_checkpoint(path)["global_step"] for path in saved.best_k_models) == steps
    for path, score in saved.best_k_models.items():
        stored = read_checkpoint(path)
        assert metrics_of(stored)["loss"] == float(score) == seen.losses[stored["global_step"]]
    best = best_checkpoint(run)
    assert best.monitor == "val/loss"
    at_those = [seen.losses[step] for step in steps]
    assert measured(trainer, build(), best.path) == pytest.approx(min(at_those), abs=1e-6)
    assert min(at_those) < max(at_those)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("save_top_k", [1, 2, -1])
def test_of_equal_values_the_latest_is_the_best(build, fit, trainer, tmp_path, mode, save_top_k):  # noqa: F811
    saved = ModelCheckpoint(tmp_path, monitor="val/loss", mode=mode, save_top_k=save_top_k)
    run = fit(build(model={"optimizer": sgd(0.0)}), saved)  # validated at 3, 6, 9, 12
    assert len(set(map(float, saved.best_k_models.values()))) == 1
    assert read_checkpoint(best_checkpoint(run).path)["global_step"] == 12
    kept = sorted(read_checkpoint(path)["global_step"] for path in saved.best_k_models)
    assert kept == [3, 6, 9, 12][-save_top_k if save_top_k > 0 else 0 :]


def test_the_numbers_shown_of_an_unmonitored_checkpoint_are_its_own(build, fit, trainer, tmp_path, capsys):  # noqa: F811
    newest = ModelCheckpoint(tmp_path, every_n_train_steps=4)
    run = fit(build(), newest, max_epochs=2)  # validated at 3, 6, 9, 12
    print_results(run)
    shown = capsys.readouterr().out
    assert "checkpoint (step 12)" in shown
    assert f"{measured(trainer, build(), newest.best_model_path):.4f}" in shown
    run = fit(build(), ModelCheckpoint(tmp_path / "other", every_n_train_steps=8))
    print_results(run)
    shown = capsys.readouterr().out
    assert "validation at step 12 (the checkpoint is of step 8)" in shown
    assert "(not validated)" in shown
    assert metrics_of(read_checkpoint(best_checkpoint(run).path)) == {}


def test_a_checkpoint_that_waits_for_its_validation_is_not_forgotten_when_the_run_goes_on(build, fit, tmp_path):  # noqa: F811
    for name, path in (("whole", None), ("rest", tmp_path / "newest" / "step=4.ckpt")):
        newest = ModelCheckpoint(tmp_path / "newest", filename="{step}", every_n_train_steps=4, save_top_k=-1)
        judged = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=4, **JUDGED)
        fit(build(), newest, judged, ckpt_path=path)
    names = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("whole", "rest")]
    assert names[0] == names[1] == ["step=12.ckpt", "step=6.ckpt", "step=9.ckpt"]


@pytest.mark.parametrize("first", ["judged", "newest"])
def test_the_judged_checkpoint_is_exported_wherever_it_stands_in_the_list(build, fit, tmp_path, first):  # noqa: F811
    judged = ModelCheckpoint(tmp_path / "judged", monitor="val/loss", mode="max")
    newest = ModelCheckpoint(tmp_path / "newest", every_n_train_steps=4)
    order = [judged, newest] if first == "judged" else [newest, judged]
    run = fit(build(), *order, ExportBest(str(tmp_path / "exported")))
    best = best_checkpoint(run)
    assert (str(best.path), best.monitor) == (judged.best_model_path, "val/loss")
    stored = read_checkpoint(best.path)
    assert stored["global_step"] == 3, "the highest loss is the first"
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert torch.equal(exported["score.0.weight"], stored["state_dict"]["network.score.0.weight"])


def test_a_run_without_its_metric_keeps_its_final_weights(build, fit, tmp_path, caplog):  # noqa: F811
    export = ExportBest(str(tmp_path / "exported"))
    module, datamodule = build()
    run = fit((module, datamodule), ModelCheckpoint(tmp_path, monitor="val/loss"), export, max_steps=2)
    best = best_checkpoint(run)
    assert (best.path, best.monitor) == (tmp_path / "final-2.ckpt", None)
    assert (
        "final-2.ckpt: the final weights, step 2; no other checkpoint, since val/loss was not measured" in caplog.text
    )
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert torch.equal(exported["score.0.weight"], module.network.score[0].weight)
    again = fit(build(), ModelCheckpoint(tmp_path, monitor="val/loss"), max_epochs=1, limit_val_batches=0)
    assert best_checkpoint(again).path == tmp_path / "final-6.ckpt"
    again = fit(build(), ModelCheckpoint(tmp_path, monitor="val/loss"), max_steps=2)
    assert best_checkpoint(again).path == tmp_path / "final-2-v1.ckpt", "what another run left is not overwritten"


@pytest.mark.parametrize("settings", [{"save_top_k": 0}, {"every_n_train_steps": 2}, {"save_last": True}])
def test_final_weights_are_saved_only_where_nothing_else_was_and_something_was_to_be(build, fit, tmp_path, settings):  # noqa: F811
    fit(build(), ModelCheckpoint(tmp_path, **settings), max_steps=2)
    assert not list(tmp_path.glob("final*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_no_number_makes_no_best_checkpoint(build_sft, fit, tmp_path, value):  # noqa: F811
    class Broken(pl.Callback):
        def on_validation_batch_end(self, run, pl_module, *_):
            pl_module.val_metrics["loss"].update(torch.tensor(value))

    export = ExportBest(str(tmp_path / "exported"))
    run = fit(build_sft(), Broken(), ModelCheckpoint(tmp_path, monitor="val/loss"), export)
    assert best_checkpoint(run).monitor is None
    assert f"validation loss is {value}" in export.fault
    assert not (tmp_path / "exported").exists()


def test_a_file_name_with_a_metric_that_is_not_known_yet_is_refused(build, fit, tmp_path):  # noqa: F811
    saved = ModelCheckpoint(tmp_path, filename="{step}-{val/loss:.2f}", every_n_train_steps=2)
    with pytest.raises(ConfigurationError, match=r"names a validation metric, but the checkpoint is saved between"):
        fit(build(), saved)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
def test_the_average_that_was_validated_is_saved_and_exported(
    build_dpo,  # noqa: F811
    fit,
    trainer,  # noqa: F811
    tmp_path,
    weights_only,
    adapters,
):
    settings = {"model": LORA | {"optimizer": sgd(0.3)} if adapters else {"optimizer": sgd(0.03)}}
    saved = ModelCheckpoint(tmp_path, save_weights_only=weights_only, **JUDGED)
    export = ExportBest(str(tmp_path / "exported"), merge=False)
    module, datamodule = build_dpo(**settings)
    run = fit((module, datamodule), EMAWeightAveraging(decay=0.7), saved, export)
    assert len(saved.best_k_models) == 4
    path, score = list(saved.best_k_models.items())[1]
    assert metrics_of(read_checkpoint(path))["loss"] == float(score)
    assert measured(trainer, build_dpo(**settings), path) == pytest.approx(float(score), abs=1e-6)
    best = read_checkpoint(best_checkpoint(run).path)
    assert ("current_model_state" in best) is not weights_only
    if adapters:
        held = best["state_dict"].keys() | best.get("current_model_state", {}).keys()
        assert all("lora_" in name for name in held), "not the weights below them"
    assert export.exported


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_an_average_is_made_under_the_command_line(tmp_path, tiny_qwen2, pairs, kind):  # noqa: F811
    """What the command line makes of an optimizer holds locks, which nothing can copy."""
    data = {"DPO": "PreferenceDataModule", "KTO": "UnpairedDataModule"}[kind]
    average = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay", "0.7"]
    settings = ["--model", kind, "--model.backbone", str(tiny_qwen2), "--model.optimizer", "SGD"]
    settings += ["--model.optimizer.lr", "0.01", "--data", data, "--data.train", str(pairs)]
    short = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    code, _, error = run_program(tmp_path, "fit", *average, *settings, *short)
    assert code == 0, error[-2000:]


def test_a_copy_of_a_module_has_the_same_reference(build_dpo):  # noqa: F811
    module, _ = build_dpo()
    assert copy.deepcopy(module).reference is module.reference


def test_a_run_with_an_average_of_adapters_goes_on_as_if_it_had_not_stopped(build_dpo, fit, tmp_path):  # noqa: F811
    ends = []
    for name, path in (("whole", None), ("rest", tmp_path / "whole" / "6.ckpt")):
        saved = ModelCheckpoint(tmp_path / name, filename="{step}", auto_insert_metric_name=False, **JUDGED)
        built = build_dpo(model=LORA | {"optimizer": sgd(0.3)})
        fit(built, EMAWeightAveraging(decay=0.7), saved, ckpt_path=path)
        ends.append(read_checkpoint(tmp_path / name / "12.ckpt"))
    for key in ("state_dict", "current_model_state"):
        first, second = (end[key] for end in ends)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), key


@pytest.mark.parametrize("adapters", [False, True])
def test_a_model_that_no_step_has_changed_is_not_exported(build_dpo, fit, tmp_path, adapters):  # noqa: F811
    export = ExportBest(str(tmp_path / "exported"))
    model = (LORA if adapters else {}) | {"optimizer": sgd(0.0)}
    run = fit(build_dpo(model=model), ModelCheckpoint(tmp_path, monitor="val/loss"), export, max_steps=3)
    assert "step 3 has changed no weight" in export.fault
    with pytest.raises(ModelError, match="step 3 has changed no weight"):
        export_checkpoint(best_checkpoint(run).path, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_reward_model_that_no_step_has_changed_is_not_exported(build, fit, tmp_path):  # noqa: F811
    """Its head is random at the start, and is not in the files of the backbone."""
    for lr, changed in ((0.0, False), (1e-4, True)):
        export = ExportBest(str(tmp_path / f"exported-{lr}"))
        settings = {"model": {"optimizer": sgd(lr), "freeze_backbone": True, "pooling": "layers"}}
        fit(build(**settings), ModelCheckpoint(tmp_path / str(lr), monitor="val/loss"), export, max_steps=3)
        assert export.exported is changed


def test_weights_that_are_not_finite_are_not_exported(build, fit, tmp_path):  # noqa: F811
    run = fit(build(), ModelCheckpoint(tmp_path), max_steps=3)
    stored = torch.load(best_checkpoint(run).path, weights_only=True)
    stored["state_dict"]["network.score.0.weight"][0, 0] = float("inf")
    torch.save(stored, tmp_path / "broken.ckpt")
    with pytest.raises(ModelError, match=r"score\.0\.weight: not finite, so the training diverged"):
        export_checkpoint(tmp_path / "broken.ckpt", tmp_path / "exported")


def test_a_loss_far_above_that_of_the_start_is_called_diverged(build_dpo, fit, tmp_path, caplog):  # noqa: F811
    saved = ModelCheckpoint(tmp_path, monitor="val/loss")
    export = ExportBest(str(tmp_path / "exported"))
    fit(build_dpo(model={"optimizer": sgd(30.0), "beta": 1.0}), saved, export, max_steps=3)
    assert "and the training began with 0.6931: it diverged" in caplog.text
    caplog.clear()
    origin = {"measured": {"metrics": {"loss": 0.8}, "first_loss": 0.69}}
    warn_of_divergence({"rlhf_lightning": origin, "global_step": 3})
    assert not caplog.text
