"""A reference that follows its policy: what an update makes of it, when it comes, and how a resumed run goes on."""

from __future__ import annotations

import functools
import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning import DPO
from rlhf_lightning.errors import ConfigurationError
from tests.training.conftest import sgd, weights
from tests.training.test_dpo import LORA

SOFT = {"reference_update_steps": 2, "reference_update_alpha": 0.25}


class Seen(pl.Callback):
    """Policy and reference before each training batch, by the optimizer steps done."""

    def __init__(self):
        self.policy, self.reference = {}, {}

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.policy[trainer.global_step] = torch.cat([w.flatten() for w in merged(pl_module).values()])

    def on_before_zero_grad(self, trainer, pl_module, *_):  # comes after the module's own start of the batch
        self.reference[trainer.global_step] = weights(pl_module.reference.network)


def merged(module):
    named = {name for name, _ in module.reference.network.model.named_parameters()}
    return {name: weight.clone() for name, weight in module.policy.merged_weights() if name in named}


def trained(build, trainer, *, model, **settings):
    module, datamodule = build(model={"optimizer": sgd(0.05)} | model)
    trainer(**{"limit_val_batches": 0, "max_epochs": 2, "accumulate_grad_batches": 2} | settings).fit(
        module, datamodule
    )
    return module


@pytest.mark.parametrize("model", [{}, LORA | {"reference": "frozen"}], ids=["whole", "lora"])
@pytest.mark.parametrize("alpha", [0.25, None])
def test_an_update_goes_part_of_the_way_to_the_policy(build_dpo, trainer, model, alpha):
    """6 steps: before batches after steps 2 and 4 there is an update, once each."""
    seen = Seen()
    module = trained(build_dpo, trainer, model=model | SOFT | {"reference_update_alpha": alpha}, callbacks=[seen])
    alpha = alpha or 1.0
    expected = seen.policy[0]
    assert torch.equal(seen.reference[0], expected)
    for step in range(6):
        if step in (2, 4):
            assert (seen.policy[step] - expected).abs().max() > 1e-4
            expected = expected + alpha * (seen.policy[step] - expected)
        torch.testing.assert_close(seen.reference[step], expected, rtol=0, atol=1e-6, msg=f"step {step}")
    assert all(not p.requires_grad for p in module.reference.network.parameters())
    assert not module.reference.network.training


@pytest.mark.parametrize("build", ["build_dpo", "build_kto"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_goes_on_with_the_reference_that_it_had(request, build, trainer, tmp_path, stop):
    """Also where its checkpoint was written at a step after which an update is due, or had been made before."""
    build = request.getfixturevalue(build)
    model = LORA | {"reference": "frozen", "optimizer": functools.partial(torch.optim.Adam, lr=1e-2)} | SOFT
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    unbroken = trained(build, trainer, model=model, callbacks=[save], enable_checkpointing=True)
    resumed, datamodule = build(model=model)
    run = trainer(accumulate_grad_batches=2, max_epochs=2, limit_val_batches=0)
    run.fit(resumed, datamodule, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert torch.equal(weights(resumed), weights(unbroken))
    assert torch.equal(weights(resumed.reference.network), weights(unbroken.reference.network))
    start, _ = build(model=model)
    assert (weights(resumed.reference.network) - weights_of_start(start)).abs().max() > 1e-3


def weights_of_start(module):
    module.configure_model()
    return torch.cat([w.flatten() for name, w in module.policy.merged_weights() if name != "lm_head.weight"])


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_is_tested_against_the_reference_that_it_was_validated_with(
    build_dpo, trainer, tmp_path, weights_only
):
    save = ModelCheckpoint(tmp_path, filename="last", save_weights_only=weights_only)
    model = SOFT | {"optimizer": sgd(0.05)}
    run = trained(
        build_dpo, trainer, model=model, callbacks=[save], enable_checkpointing=True, limit_val_batches=1.0
    ).trainer
    measured = {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("val/")}
    module, datamodule = build_dpo(model=model)
    (metrics,) = trainer().validate(module, datamodule, ckpt_path=save.best_model_path, verbose=False)
    assert metrics == measured
    assert DPO.load_from_checkpoint(save.best_model_path).hparams.reference_update_steps == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"reference_update_alpha": 0.5}, r"reference_update_alpha: nothing is updated"),
        (SOFT | {"reference_update_alpha": 1.5}, r"reference_update_alpha is 1\.5"),
        (SOFT | LORA, r"reference_update_steps: reference adapter .* give model\.reference frozen"),
        (SOFT | {"precompute_reference": True}, r"reference_update_steps: precomputed"),
        (SOFT | {"loss_type": "orpo"}, r"the loss orpo has no reference.*reference_update_steps"),
    ],
)
def test_settings_under_which_nothing_could_move_are_refused(build_dpo, model, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        build_dpo(model=model)
    assert "\n" not in str(error.value)


def test_a_loss_that_updates_set_back_is_warned_of_as_a_monitor(build_dpo, trainer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="rlhf_lightning"):
        for monitor in ("val/rewards/accuracies", "val/loss"):
            assert "relative to a reference that moves" not in caplog.text
            save = ModelCheckpoint(tmp_path / monitor, monitor=monitor)
            settings = {"max_epochs": 1, "limit_val_batches": 1, "enable_checkpointing": True}
            trained(build_dpo, trainer, model=SOFT, callbacks=[save], **settings)
    assert "val/loss is relative to a reference that moves" in caplog.text
