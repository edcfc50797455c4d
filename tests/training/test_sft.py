"""SFT's training: the loss of the chosen responses, and what is logged is what happened."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning import SFT
from rlhf_lightning.errors import TrainingError
from tests.training.conftest import VAL_PAIRS, weights
from tests.training.test_dpo import LORA
from tests.training.test_reward_model import LossLog


def trained(build_sft, trainer, *, batch_size=2, accumulate=1, model=None, data=None, **settings):
    module, datamodule = build_sft(model=model, data={"batch_size": batch_size} | (data or {}))
    trainer(accumulate_grad_batches=accumulate, **settings).fit(module, datamodule)
    return module, datamodule


@torch.no_grad()
def nlls(module: SFT, batch) -> list[torch.Tensor]:
    """Negative log-likelihood of each token of each chosen response, from full logits."""
    logits = module.policy.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    each = -logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    return [each[row][batch.response_mask[row, 1:]] for row in range(batch.pairs)]


@torch.no_grad()
def hits(module: SFT, batch) -> torch.Tensor:
    logits = module.policy.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    right = logits[:, :-1].argmax(-1) == batch.input_ids[:, 1:]
    return right[: batch.pairs][batch.response_mask[: batch.pairs, 1:]]


def test_the_loss_is_that_of_the_chosen_responses_and_counts_each_the_same(build_sft, trainer):
    module, datamodule = build_sft(data={"batch_size": 4})
    log = LossLog()
    trainer(max_steps=1, limit_val_batches=0, callbacks=[log]).fit(module, datamodule)
    start, _ = build_sft()
    start.configure_model()
    batch = next(iter(datamodule.train_dataloader()))
    expected = torch.stack([nll.mean() for nll in nlls(start, batch)]).mean()
    assert log.losses == [pytest.approx(expected.item(), abs=1e-5)]


@pytest.mark.parametrize("model", [{}, LORA], ids=["whole", "lora"])
def test_accumulation_gives_the_weights_of_one_large_batch(build_sft, trainer, model):
    whole, _ = trained(build_sft, trainer, model=model, batch_size=4, limit_val_batches=0)
    parts, _ = trained(build_sft, trainer, model=model, batch_size=1, accumulate=4, limit_val_batches=0)
    start, _ = build_sft(model=model)
    start.configure_model()
    assert (weights(whole) - weights(start)).abs().max() > 1e-3
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-5)


def test_training_lowers_the_perplexity(build_sft, trainer):
    (before,) = trainer().validate(*build_sft(), verbose=False)
    module, _ = trained(build_sft, trainer, max_epochs=4)
    assert module.trainer.callback_metrics["val/perplexity"] < 0.8 * before["val/perplexity"]


def test_any_evaluation_batch_size_gives_the_metrics_of_the_whole_split(build_sft, trainer):
    measured = []
    for size in (1, 2, 3, VAL_PAIRS):
        module, datamodule = build_sft(data={"eval_batch_size": size})
        (metrics,) = trainer().validate(module, datamodule, verbose=False)
        measured.append(metrics)
    batches = list(datamodule.val_dataloader())
    responses = [nll.double() for batch in batches for nll in nlls(module, batch)]
    lengths = torch.tensor([len(nll) for nll in responses]).double()
    expected = {
        "val/loss": torch.stack([nll.mean() for nll in responses]).mean().item(),
        "val/perplexity": torch.cat(responses).mean().exp().item(),
        "val/token_accuracy": torch.cat([hits(module, batch) for batch in batches]).double().mean().item(),
        "val/lengths/chosen": lengths.mean().item(),
        "val/pairs": VAL_PAIRS,
    }
    assert lengths.unique().numel() > 1
    for metrics in measured:
        assert metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model", [{}, LORA], ids=["whole", "lora"])
def test_a_loaded_checkpoint_gives_the_same_numbers(build_sft, trainer, tmp_path, model):
    save = ModelCheckpoint(tmp_path, filename="last")
    run, _ = trained(build_sft, trainer, model=model, callbacks=[save], enable_checkpointing=True)
    measured = {name: value.item() for name, value in run.trainer.callback_metrics.items() if name.startswith("val/")}
    (metrics,) = trainer().test(*build_sft(model=model), ckpt_path=save.best_model_path, verbose=False)
    assert {name.replace("test/", "val/"): value for name, value in metrics.items()} == measured
    loaded = SFT.load_from_checkpoint(save.best_model_path)
    assert torch.equal(weights(loaded), weights(run))


def test_predict_gives_the_log_probabilities_of_both_responses(build_sft, trainer):
    module, datamodule = build_sft()
    trainer().validate(module, datamodule, verbose=False)
    batch = next(iter(datamodule.val_dataloader()))
    with torch.no_grad():
        scores = module.predict_step(batch, 0)
    sums = torch.stack([-nll.sum() for nll in nlls(module, batch)])
    torch.testing.assert_close(scores.chosen, sums, rtol=0, atol=1e-3)  # sums of some 50 tokens in float32
    assert not torch.equal(scores.chosen, scores.rejected)


def test_a_loss_that_is_no_number_stops_the_run(build_sft, trainer):
    module, datamodule = build_sft()
    module.configure_model()
    with torch.no_grad():
        next(module.policy.parameters()).fill_(math.nan)
    with pytest.raises(TrainingError, match=r"step 0: the loss is nan for the examples courtesy-train-.*no checkpoint"):
        trainer().fit(module, datamodule)
