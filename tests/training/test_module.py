"""The interface that modules have for the rest of the package, and classes of a user's own that derive from it."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from rlhf_lightning import DPO
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.models.causal_lm import Lora
from rlhf_lightning.training.callbacks import ExportBest
from rlhf_lightning.training.module import TrainedModule
from rlhf_lightning.training.pair_loss import PairLogprobs
from rlhf_lightning.training.policy_module import PolicyModule
from tests.programs import run
from tests.training.conftest import builder, sgd, weights


class Scaled(DPO):
    """A user's own: another key, and a loss that is twice as large."""

    def __init__(self, scale: float = 2.0, **others: Any) -> None:
        super().__init__(**others)

    def losses(self, policy, reference):
        return self.hparams.scale * super().losses(policy, reference)


class Unfinished(PolicyModule):
    def training_step(self, batch, batch_idx):
        return self.policy(*batch).sums.mean()


def test_a_class_without_its_methods_is_refused_by_name(tiny_qwen2):
    with pytest.raises(ConfigurationError, match=r"^Unfinished: does not define trial_loss, measure, [^\n]*$"):
        Unfinished(str(tiny_qwen2))

    class Finished(Unfinished):
        learns_from_pairs = False

        def validation_step(self, batch, batch_idx):
            pass

    Finished(str(tiny_qwen2))
    with pytest.raises(ConfigurationError, match="define training_step, save_network, trial_loss, measure"):
        TrainedModule(str(tiny_qwen2))


def test_a_derived_class_has_its_own_keys_and_those_of_its_parents(tiny_qwen2, pairs, trainer, tmp_path):
    build = builder(Scaled, tiny_qwen2, pairs, lr=0.003)
    module, data = build(model={"scale": 3.0, "beta": 0.2, "lora": Lora(r=2)})
    keys = (
        "scale beta loss_type reference lora load_in_4bit lr_scheduler_type warmup_ratio attn_implementation backbone"
    )
    assert set(keys.split()) <= module.hparams.keys()
    assert "optimizer" not in module.hparams
    for kept in (module.hparams, module.hparams_initial):
        assert (kept["scale"], kept["beta"], kept["lora"]["r"]) == (3.0, 0.2, 2)
    run = trainer(max_steps=2, enable_checkpointing=True, limit_val_batches=0)
    run.fit(module, data)
    again = Scaled.load_from_checkpoint(run.checkpoint_callback.best_model_path)
    assert again.hparams == module.hparams
    assert torch.equal(weights(again), weights(module))


def test_a_derived_loss_is_the_one_that_is_trained(tiny_qwen2, pairs, trainer):
    ends = []
    for kind, lr in ((DPO, 0.004), (Scaled, 0.002)):
        module, data = builder(kind, tiny_qwen2, pairs, lr=lr)()
        trainer(max_steps=2, limit_val_batches=0).fit(module, data)
        ends.append(weights(module))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_the_interface_says_what_a_module_is(build_sft, build_dpo, build):
    lora = {"r": 2}
    assert (build_sft()[0].rows_per_pair, build_dpo()[0].rows_per_pair) == (1, 2)
    assert build_dpo(model={"lora": lora})[0].lora == Lora(**lora)
    assert build()[0].lora is None
    for given in ("frozen", None):
        assert build_dpo(model={"reference": given})[0].reference_kind == "copy"
        precomputed = build_dpo(model={"reference": given, "precompute_reference": True})[0]
        assert precomputed.reference_kind == "precomputed"
    assert build_dpo(model={"lora": lora})[0].reference_kind == "adapter"
    assert build_dpo(model={"lora": lora, "precompute_reference": True})[0].reference_kind == "none"
    assert build_sft()[0].reference_kind == "none"


def test_a_module_of_another_kind_has_no_export(trainer, tmp_path):
    with pytest.raises(ConfigurationError, match="a LightningModule has no export"):
        ExportBest(str(tmp_path / "model")).setup(trainer(), pl.LightningModule(), "fit")


def test_an_optimizer_with_impossible_arguments_is_refused(tiny_qwen2):
    with pytest.raises(ConfigurationError, match=r"model\.optimizer: Invalid learning rate"):
        DPO(str(tiny_qwen2), optimizer=sgd(-1.0))


# ---- losses of a user's own --------------------------------------------------------------------------------

MYLOSS = """
import torch.nn.functional as F

from rlhf_lightning import DPO


def logistic(policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, beta):
    return -F.logsigmoid(beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)))


def free(policy_chosen, policy_rejected, *, beta, chosen_lengths, rejected_lengths, gamma):
    return -beta * (policy_chosen / chosen_lengths - policy_rejected / rejected_lengths) + gamma


def mean(policy_chosen, policy_rejected, *, beta):
    return (policy_rejected - policy_chosen).mean()


def broken(policy_chosen, policy_rejected, *, beta):
    raise RuntimeError("first line\\nsecond line")


class SquaredDPO(DPO):
    def losses(self, policy, reference):
        return super().losses(policy, reference) ** 2
"""


@pytest.fixture
def myloss(tmp_path, monkeypatch):
    (tmp_path / "myloss.py").write_text(MYLOSS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "myloss", raising=False)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])


def test_a_loss_of_a_users_own_trains_as_the_same_formula_of_the_table(myloss, build_dpo, trainer):
    ends = []
    for name in ("sigmoid", "myloss:logistic"):
        module, data = build_dpo(model={"loss_type": name, "beta": 0.3})
        trainer(max_steps=3, limit_val_batches=0).fit(module, data)
        ends.append(weights(module))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-7)


def test_a_loss_of_a_users_own_is_asked_what_it_takes_by_the_names_of_its_parameters(myloss, build_dpo):
    module, _ = build_dpo(model={"loss_type": "myloss:free", "gamma": 0.5})
    assert module.reference is None
    policy = PairLogprobs(torch.tensor([-8.0]), torch.tensor([-12.0]), torch.tensor([2]), torch.tensor([4]))
    assert module.losses(policy, None).tolist() == [pytest.approx(-0.1 * (-4 + 3) + 0.5)]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"loss_type": "simgoid"}, r"model\.loss_type: .*'simgoid'.* sigmoid\b"),
        ({"loss_type": "myloss:absent"}, "myloss:absent: cannot be imported"),
        ({"loss_type": "myloss:mean"}, r"myloss:mean gives \[\], not"),
        ({"loss_type": "myloss:broken"}, "myloss:broken refuses .*first line"),
        ({"loss_type": "myloss:free"}, r"model\.gamma: the loss myloss:free needs it"),
        ({"loss_type": "myloss:logistic", "alpha": 1.0}, r"model\.alpha: .*r_dpo"),
        ({"loss_type": "myloss:free", "gamma": 0.0, "reference": "frozen"}, r"model\.reference: .* no reference"),
    ],
)
def test_what_is_no_loss_is_refused_in_a_line(myloss, build_dpo, model, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        build_dpo(model=model)
    assert "\n" not in str(error.value)


def test_the_command_line_finds_losses_and_classes_in_the_working_directory(myloss, tmp_path, pairs):
    data = ["--data", "PreferenceDataModule", "--data.train", str(pairs), "--data.max_length", "512"]
    rest = ["--model.backbone", "builtin:tiny", *data, "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    done = run(tmp_path, "fit", "--model", "myloss.SquaredDPO", "--model.loss_type", "myloss:logistic", *rest)
    assert (done.code, "loss: myloss:logistic" in done.error) == (0, True), done.error
    done = run(tmp_path, "fit", "--model", "DPO", "--model.loss_type", "simgoid", *rest)
    line = done.error.splitlines()[-1]
    assert done.code == 2
    assert all(word in line for word in ("model.loss_type", "simgoid", "sigmoid", "r_dpo"))
