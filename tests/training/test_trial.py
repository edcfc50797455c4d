"""The pass over the longest rows before training."""

from __future__ import annotations

import pytest
import torch

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.training.trial import TrialStep

BUILDERS = ["build", "build_dpo", "build_sft"]


def trained(request, builder, trainer, *callbacks, **model):
    module, data = request.getfixturevalue(builder)(model=model)
    fitter = trainer(max_steps=2, limit_val_batches=0, callbacks=list(callbacks))
    fitter.fit(module, data)
    return module, fitter


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trial_changes_nothing_of_the_run(request, trainer, builder, checkpointing):
    plain, _ = trained(request, builder, trainer, gradient_checkpointing=checkpointing)
    tried, fitter = trained(request, builder, trainer, TrialStep(on_cpu=True), gradient_checkpointing=checkpointing)
    for (name, one), other in zip(plain.named_parameters(), tried.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert plain.trainer.logged_metrics == fitter.logged_metrics


@pytest.mark.parametrize("builder", BUILDERS)
def test_the_trial_walks_the_whole_graph_over_the_longest_rows(request, trainer, builder, monkeypatch):
    seen = []

    class Watched(TrialStep):
        def on_train_start(self, trainer, pl_module):
            original = torch.autograd.grad

            def grad(loss, inputs):
                gradient = original(loss, inputs)
                seen.append(gradient[0].abs().sum().item())
                return gradient

            monkeypatch.setattr(torch.autograd, "grad", grad)
            super().on_train_start(trainer, pl_module)
            assert all(parameter.grad is None for parameter in pl_module.parameters())

    _module, fitter = trained(request, builder, trainer, Watched(on_cpu=True))
    assert len(seen) == 1
    assert seen[0] > 0
    lengths = fitter.datamodule.pairs["train"].lengths
    assert fitter.datamodule.longest_batch().input_ids.shape[1] == lengths.max()


def test_too_little_memory_is_one_line_with_what_to_do(build, trainer, monkeypatch):
    module, data = build()

    def exhausted(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "trial_loss", exhausted)
    with pytest.raises(ConfigurationError, match=r"longest rows .* smaller data.batch_size .*gradient_checkpointing"):
        trainer(callbacks=[TrialStep(on_cpu=True)]).fit(module, data)


def test_on_a_cpu_there_is_no_trial(build, trainer, monkeypatch):
    module, data = build()
    monkeypatch.setattr(module, "trial_loss", lambda batch: pytest.fail("a trial"))
    trainer(max_steps=1, callbacks=[TrialStep()]).fit(module, data)
