"""DPO's training: ln 2 at the start, a reference that nothing touches, the step is the mean over its pairs."""

from __future__ import annotations

import csv
import functools
import json
import logging
import math
import re
import shutil
import typing

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from rlhf_lightning import DPO
from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.errors import ConfigurationError, ModelError, TrainingError
from rlhf_lightning.functional.losses import PREFERENCE_LOSSES
from rlhf_lightning.models.causal_lm import CausalLM, Lora
from rlhf_lightning.tiny import builtin_texts, make_tiny_model
from rlhf_lightning.training.pair_loss import LossType, PairLogprobs
from rlhf_lightning.training.step_watch import StepWatch
from tests.training.conftest import VAL_PAIRS, sgd, weights
from tests.training.test_reward_model import LossLog

LORA = {"lora": {"r": 4, "lora_alpha": 8.0}}
PISSA = {"lora": {"r": 4, "lora_alpha": 8.0, "init_lora_weights": "pissa"}}
FREE = {"simpo": {"gamma": 0.5, "beta": 2.0}, "orpo": {}}
NEEDED = {**FREE, "r_dpo": {"alpha": 0.01}}
"""Settings that a loss cannot do without."""


def trained(build_dpo, trainer, *, batch_size=2, accumulate=1, model=None, data=None, **settings):
    module, datamodule = build_dpo(model=model, data={"batch_size": batch_size} | (data or {}))
    trainer(accumulate_grad_batches=accumulate, **settings).fit(module, datamodule)
    return module, datamodule


def ready(build_dpo, trainer, **settings) -> tuple[DPO, list[PreferenceBatch]]:
    """A module with its models loaded and nothing trained, and the validation batches."""
    module, datamodule = build_dpo(**settings)
    trainer().validate(module, datamodule, verbose=False)
    return module, list(datamodule.val_dataloader())


def swapped(batch: PreferenceBatch) -> PreferenceBatch:
    """Chosen and rejected exchanged."""
    rows = {
        name: getattr(batch, name).roll(batch.pairs, 0) for name in ("input_ids", "attention_mask", "response_mask")
    }
    return batch._replace(**rows)


# ---- the start ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [{}, LORA, LORA | {"reference": "frozen"}, PISSA | {"reference": "frozen"}],
    ids=["frozen", "adapter", "both", "PiSSA"],
)
@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "dpop", "sigmoid_norm"])
def test_the_first_loss_is_ln_2(build_dpo, trainer, model, loss_type):
    log = LossLog()
    trained(
        build_dpo,
        trainer,
        model=model | {"loss_type": loss_type},
        callbacks=[log],
        max_steps=1,
        limit_val_batches=0,
    )
    # What PiSSA takes off a weight and adds to it again is rounded, for which dpop has a penalty.
    assert log.losses[0] == pytest.approx(math.log(2), abs=1e-4 if model.get("lora") == PISSA["lora"] else 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("model", [{}, LORA], ids=["frozen", "adapter"])
def test_policy_and_reference_are_equal_bit_for_bit_at_the_start_and_ties_count_one_half(build_dpo, trainer, model):
    module, batches = ready(build_dpo, trainer, model=model)
    module.train()
    for batch in batches:
        for own, its in zip(module(batch), module.reference_logprobs(batch), strict=True):
            assert torch.equal(own, its)
    (metrics,) = trainer().validate(*build_dpo(model=model), verbose=False)
    assert metrics["val/rewards/accuracies"] == 0.5
    assert metrics["val/rewards/margins"] == metrics["val/kl"] == 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_policy_that_is_not_its_reference_at_the_start_stops_the_run(build_dpo, trainer, precision):
    class Disturbed(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            with torch.no_grad():
                next(pl_module.policy.parameters()).mul_(1.5)

    module, datamodule = build_dpo()
    with pytest.raises(TrainingError, match=r"step 0: a loss is .* but 0\.6931 is due.*dropout") as error:
        trainer(callbacks=[Disturbed()], precision=precision).fit(module, datamodule)
    assert "\n" not in str(error.value)


def test_the_first_loss_of_bf16_is_ln_2_too(build_dpo, trainer):
    log = LossLog()
    trained(build_dpo, trainer, callbacks=[log], max_steps=1, limit_val_batches=0, precision="bf16-mixed")
    assert log.losses[0] == pytest.approx(math.log(2), abs=1e-6), "the two forwards are the same arithmetic"


def test_a_reference_of_its_own_starts_from_another_loss(build_dpo, trainer, tmp_path, tiny_qwen2):
    other = make_tiny_model(tmp_path / "other", builtin_texts(), initializer_range=0.2, seed=1)
    log = LossLog()
    module, _ = trained(
        build_dpo, trainer, model={"reference": str(other)}, callbacks=[log], max_steps=1, limit_val_batches=0
    )
    assert module.reference.network is not None
    assert abs(log.losses[0] - math.log(2)) > 0.01


# ---- the loss ----------------------------------------------------------------------------------------------


def test_loss_types_are_those_of_the_table():
    names, _ = typing.get_args(LossType)
    assert typing.get_args(names) == tuple(PREFERENCE_LOSSES)


FORMULAS = {
    "sigmoid": lambda c, r, nc, nr, b: F.softplus(-b * (c - r)),
    "robust": lambda c, r, nc, nr, b: F.softplus(-b * (c - r)),
    "ipo": lambda c, r, nc, nr, b: (c / nc - r / nr - 1 / (2 * b)) ** 2,
    "hinge": lambda c, r, nc, nr, b: (1 - b * (c - r)).clamp(min=0),
    "sigmoid_norm": lambda c, r, nc, nr, b: F.softplus(-b * (c / nc - r / nr)),
    "simpo": lambda c, r, nc, nr, b: F.softplus(-b * (c / nc - r / nr) + 0.5),
    "orpo": lambda c, r, nc, nr, b: -c / nc + b * F.softplus(-(log_odds(c / nc) - log_odds(r / nr))),
    "apo_zero": lambda c, r, nc, nr, b: torch.sigmoid(-b * c) + torch.sigmoid(b * r),
    "apo_down": lambda c, r, nc, nr, b: torch.sigmoid(b * c) + torch.sigmoid(-b * (c - r)),
    "exo_pair": lambda c, r, nc, nr, b: exo(b * (c - r), 1e-3),
    "nca_pair": lambda c, r, nc, nr, b: F.softplus(-b * c) + 0.5 * F.softplus(b * c) + 0.5 * F.softplus(b * r),
    "bco_pair": lambda c, r, nc, nr, b: F.softplus(-b * c) + F.softplus(b * r),
    "sppo_hard": lambda c, r, nc, nr, b: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "dpop": lambda c, r, nc, nr, b: F.softplus(-b * (c - r - 50 * (-c).clamp(min=0))),
    "r_dpo": lambda c, r, nc, nr, b: F.softplus(-b * (c - r) - 0.01 * (nc - nr)),
}
"""Each loss of the log-ratios c and r (without a reference: log-probs) and lengths nc and nr, written again."""


def log_odds(x):
    return x - torch.log1p(-x.exp())


def exo(x, e):
    p = torch.sigmoid(x)
    return p * (p / (1 - e)).log() + (1 - p) * ((1 - p) / e).log()


@torch.no_grad()
@pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
def test_each_loss_gets_the_log_probs_that_it_is_defined_on(build_dpo, trainer, loss_type):
    """Sums or averages, with or without reference and lengths, chosen before rejected."""
    module, _ = build_dpo(model={"loss_type": loss_type, **NEEDED.get(loss_type, {})})
    module.double()
    policy = PairLogprobs(*torch.tensor([[-8.0, -30], [-12, -9]]).double(), *torch.tensor([[3, 9], [5, 2]]))
    reference = PairLogprobs(*torch.tensor([[-9.0, -28], [-11, -14]]).double(), *policy[2:])
    free = loss_type in FREE
    ratios = policy[:2] if free else [own - its for own, its in zip(policy[:2], reference[:2], strict=True)]
    expected = FORMULAS[loss_type](*ratios, *policy[2:], module.hparams.beta)
    result = module.losses(policy, None if free else reference)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_swapping_chosen_and_rejected_maps_the_loss_at_x_to_that_at_minus_x(build_dpo, trainer):
    module, _ = trained(build_dpo, trainer, max_epochs=2, limit_val_batches=0)
    batch = next(iter(module.trainer.datamodule.train_dataloader()))
    there = module.losses(module(batch), module.reference_logprobs(batch))
    back = module.losses(module(swapped(batch)), module.reference_logprobs(swapped(batch)))
    x = module.loss.rewards(module(batch), module.reference_logprobs(batch))
    margin = x[0] - x[1]
    assert margin.abs().min() > 0.05
    torch.testing.assert_close(there, F.softplus(-margin), rtol=0, atol=1e-5)
    torch.testing.assert_close(back, F.softplus(margin), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_pair_in_one_forward_is_two_forwards(build_dpo, trainer):
    module, batches = ready(build_dpo, trainer)
    module.double()
    for batch in batches:
        chosen, rejected = (
            module.policy(*(rows[side] for rows in (batch.input_ids, batch.attention_mask, batch.response_mask)))
            for side in (slice(batch.pairs), slice(batch.pairs, None))
        )
        together = module(batch)
        torch.testing.assert_close(together.chosen, chosen.sums, rtol=0, atol=1e-11)  # sums of some 200 tokens
        torch.testing.assert_close(together.rejected, rejected.sums, rtol=0, atol=1e-11)


@torch.no_grad()
def test_the_sft_weight_adds_the_chosen_responses_loss_per_token(build_dpo, trainer):
    module, (batch, *_) = ready(build_dpo, trainer, model={"sft_weight": 0.3})
    policy = module(batch)
    nll = -module.policy(batch.input_ids, batch.attention_mask, batch.response_mask).averages[: batch.pairs]
    torch.testing.assert_close(module.losses(policy, policy), math.log(2) + 0.3 * nll)


# ---- the optimizer step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [{"sft_weight": 0.5}, LORA, {"loss_type": "orpo"}], ids=["sft", "lora", "orpo"])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 4), (2, 2)])
def test_accumulation_gives_the_weights_of_one_large_batch(build_dpo, trainer, model, batch_size, accumulate):
    """11 pairs in steps of 4: the last step has 3 pairs, and its gradient is their mean."""
    run = functools.partial(trained, build_dpo, trainer, model=model, limit_val_batches=0)
    whole, _ = run(batch_size=4, accumulate=1)
    parts, _ = run(batch_size=batch_size, accumulate=accumulate)
    start, _ = build_dpo(model=model)
    start.configure_model()
    assert (weights(whole) - weights(start)).abs().max() > 1e-3
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=2e-5)  # float32 runs of three steps


def test_a_step_of_sgd_is_the_gradient_of_the_mean_loss_over_its_pairs(build_dpo, trainer):
    """By hand, from full logits: -lr times the gradient of the mean of -log sigmoid(beta (margin - margin))."""
    before = {}

    class Before(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            before["weights"] = weights(pl_module)
            losses = []
            for batch in trainer.datamodule.train_dataloader():
                logits = pl_module.policy.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long())
                each = logits.logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
                chosen, rejected = (each * batch.response_mask[:, 1:]).sum(1).chunk(2)
                margin = chosen - rejected
                losses.append(F.softplus(-0.1 * (margin - margin.detach())))
            gradients = torch.autograd.grad(torch.cat(losses).mean(), list(pl_module.parameters()))
            before["gradient"] = torch.cat([gradient.flatten() for gradient in gradients])

    module, _ = trained(
        build_dpo,
        trainer,
        data={"shuffle": False},
        batch_size=4,
        accumulate=3,
        callbacks=[Before()],
        limit_val_batches=0,
    )
    assert before["gradient"].norm() > 0.1
    torch.testing.assert_close(weights(module), before["weights"] - 0.003 * before["gradient"], rtol=0, atol=1e-6)


def test_gradient_checkpointing_changes_no_weight(build_dpo, trainer):
    plain, _ = trained(build_dpo, trainer, limit_val_batches=0)
    recomputed, _ = trained(build_dpo, trainer, model={"gradient_checkpointing": True}, limit_val_batches=0)
    torch.testing.assert_close(weights(recomputed), weights(plain), rtol=0, atol=1e-6)


def test_packed_rows_change_no_weight(build_dpo, trainer):
    plain, _ = trained(build_dpo, trainer, limit_val_batches=0)
    packed, _ = trained(build_dpo, trainer, model={"layout": "packed"}, limit_val_batches=0)
    torch.testing.assert_close(weights(packed), weights(plain), rtol=0, atol=1e-6)


# ---- the reference -----------------------------------------------------------------------------------------


def test_a_frozen_reference_is_out_of_reach_of_training(build_dpo, trainer, tmp_path):
    save = ModelCheckpoint(tmp_path, filename="last", save_last=False)
    module, _ = trained(build_dpo, trainer, max_epochs=3, callbacks=[save], enable_checkpointing=True)
    reference = module.reference.network
    start, _ = build_dpo()
    start.configure_model()
    assert torch.equal(weights(reference), weights(start))
    assert (weights(module) - weights(start)).abs().max() > 1e-2, "the policy itself has moved"
    assert not reference.training
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in reference.parameters())
    own = {parameter.data_ptr() for parameter in module.parameters()}
    optimized = {p.data_ptr() for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    theirs = {parameter.data_ptr() for parameter in reference.parameters()}
    assert not theirs & (own | optimized)
    stored = torch.load(save.best_model_path, weights_only=True)["state_dict"]
    assert all(name.startswith("policy.") for name in stored)
    assert sum(tensor.numel() for tensor in stored.values()) < 2 * len(weights(start))


def test_with_adapters_the_base_is_the_reference_and_does_not_change(build_dpo, trainer):
    module, datamodule = trained(build_dpo, trainer, model=LORA, max_epochs=3)
    base, _ = build_dpo()
    base.configure_model()
    assert module.reference.network is None, "no second model is loaded"
    optimized = [p for group in module.trainer.optimizers[0].param_groups for p in group["params"]]
    assert sum(p.numel() for p in optimized) == sum(p.numel() for p in module.parameters() if p.requires_grad)
    with torch.no_grad():
        for batch in datamodule.val_dataloader():
            assert torch.equal(module.reference_logprobs(batch).chosen, base(batch).chosen)
            assert (module(batch).chosen - base(batch).chosen).abs().min() > 1e-3


@pytest.mark.parametrize("loss_type", FREE)
def test_losses_without_a_reference_load_none(build_dpo, trainer, loss_type):
    module, _ = trained(build_dpo, trainer, model={"loss_type": loss_type, **FREE[loss_type]})
    assert module.reference is None
    assert module.reference_logprobs(None) is None
    assert "val/kl" not in module.trainer.callback_metrics


def test_a_reference_without_a_tokenizer_beside_it_is_taken(build_dpo, trainer, tmp_path, tiny_qwen2, caplog):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_qwen2).save_pretrained(tmp_path / "bare")
    with caplog.at_level(logging.INFO, logger="rlhf_lightning"):
        ready(build_dpo, trainer, model={"reference": str(tmp_path / "bare")})
    assert "it has no tokenizer" in caplog.text


# ---- what is logged ----------------------------------------------------------------------------------------


def test_any_evaluation_batch_size_gives_the_metrics_of_the_whole_split(build_dpo, trainer, tmp_path):
    save = ModelCheckpoint(tmp_path, filename="last")
    trained(build_dpo, trainer, max_epochs=2, callbacks=[save], enable_checkpointing=True)
    measured = []
    for size in (1, 2, 3, VAL_PAIRS):
        module, datamodule = build_dpo(data={"eval_batch_size": size})
        (metrics,) = trainer().validate(module, datamodule, ckpt_path=save.best_model_path, verbose=False)
        measured.append(metrics)
        assert metrics["val/pairs"] == VAL_PAIRS
    with torch.no_grad():
        batches = list(datamodule.val_dataloader())
        own = [torch.cat(parts).double() for parts in zip(*map(module, batches), strict=True)]
        its = [torch.cat(parts).double() for parts in zip(*map(module.reference_logprobs, batches), strict=True)]
    chosen, rejected = (0.1 * (own[side] - its[side]) for side in (0, 1))
    expected = {
        "val/loss": F.softplus(rejected - chosen).mean(),
        "val/rewards/chosen": chosen.mean(),
        "val/rewards/rejected": rejected.mean(),
        "val/rewards/margins": (chosen - rejected).mean(),
        "val/rewards/accuracies": (chosen > rejected).double().mean(),
        "val/logps/chosen": own[0].mean(),
        "val/logps/rejected": own[1].mean(),
        "val/kl": (own[0] - its[0] + own[1] - its[1]).mean() / 2,
        "val/lengths/chosen": own[2].mean(),
        "val/lengths/rejected": own[3].mean(),
    }
    for metrics in measured:
        assert set(metrics) == {*expected, "val/pairs"}
        assert {name: metrics[name] for name in expected} == pytest.approx(
            {name: value.item() for name, value in expected.items()}, rel=1e-5, abs=1e-5
        )


def test_logged_training_numbers_are_means_over_all_pairs_since_the_last_log(build_dpo, trainer, tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    model = {"optimizer": sgd(0.0), "sft_weight": 1.0}
    module, datamodule = trained(
        build_dpo, trainer, model=model, data={"shuffle": False}, accumulate=2, logger=logger, log_every_n_steps=2
    )
    with open(logger.experiment.metrics_file_path, newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["train/loss"]]
    assert [row["step"] for row in rows] == ["2"]
    logged = {name: float(value) for name, value in rows[0].items() if value}
    with torch.no_grad():
        each = torch.cat([module.losses(module(batch), module(batch)) for batch in datamodule.train_dataloader()])
    assert logged["train/loss"] == pytest.approx(each[:8].mean().item(), abs=1e-5)
    assert logged["train/tokens_per_second"] > 0
    assert "train/peak_memory_gib" not in logged
    assert logged["train/lr"] == 0


def test_predict_gives_the_rewards(build_dpo, trainer):
    module, batches = ready(build_dpo, trainer, model={"loss_type": "orpo"})
    with torch.no_grad():
        scores = module.predict_step(batches[0], 0)
        averages = module.policy(batches[0].input_ids, batches[0].attention_mask, batches[0].response_mask).averages
    assert torch.equal(scores.index, batches[0].index)
    torch.testing.assert_close(torch.cat(scores[1:]), 0.1 * averages)


# ---- checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [{}, LORA], ids=["whole", "lora"])
def test_a_loaded_checkpoint_gives_the_same_numbers(build_dpo, trainer, tmp_path, model):
    save = ModelCheckpoint(tmp_path, filename="last")
    run, _ = trained(build_dpo, trainer, model=model, callbacks=[save], enable_checkpointing=True)
    measured = {name: value.item() for name, value in run.trainer.callback_metrics.items() if name.startswith("val/")}
    module, datamodule = build_dpo(model=model)
    (metrics,) = trainer().test(module, datamodule, ckpt_path=save.best_model_path, verbose=False)
    assert {name.replace("test/", "val/"): value for name, value in metrics.items()} == measured
    loaded = DPO.load_from_checkpoint(save.best_model_path)
    assert torch.equal(weights(loaded), weights(module))
    assert loaded.lora == module.lora == (Lora(r=4, lora_alpha=8.0) if model else None)


def test_a_checkpoint_knows_its_reference_and_refuses_another(build_dpo, trainer, tmp_path, tiny_qwen2, caplog):
    save = ModelCheckpoint(tmp_path, filename="last")
    trained(build_dpo, trainer, callbacks=[save], enable_checkpointing=True)
    other = make_tiny_model(tmp_path / "other", builtin_texts(), initializer_range=0.2, seed=1)
    for model in ({"backbone": str(other)}, {"reference": str(other)}):
        with pytest.raises(ConfigurationError, match=r"the reference of its run had other weights than .*other"):
            trainer().test(*build_dpo(model=model), ckpt_path=save.best_model_path)
    with caplog.at_level(logging.WARNING, logger="rlhf_lightning"):
        trainer().test(*build_dpo(model={"beta": 0.5}), ckpt_path=save.best_model_path)
    assert "its run had other settings: beta 0.1 -> 0.5" in caplog.text


def test_a_checkpoint_of_adapters_holds_them_alone_and_refuses_other_weights_below(
    build_dpo, trainer, tmp_path, tiny_qwen2
):
    save = ModelCheckpoint(tmp_path, filename="last")
    run, _ = trained(build_dpo, trainer, model=LORA, callbacks=[save], enable_checkpointing=True)
    stored = torch.load(save.best_model_path, weights_only=True)["state_dict"]
    assert set(stored) == {name for name, parameter in run.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in stored)
    other = make_tiny_model(tmp_path / "other", builtin_texts(), initializer_range=0.2, seed=1)
    with pytest.raises(ConfigurationError, match=r"belong to other weights than those of .*other"):
        trainer().test(*build_dpo(model=LORA | {"backbone": str(other)}), ckpt_path=save.best_model_path)
    with pytest.raises(ConfigurationError, match=r"give the model\.lora of its run"):
        trainer().test(*build_dpo(model={"lora": {"target_modules": ["q_proj"]}}), ckpt_path=save.best_model_path)


@pytest.mark.parametrize(("stop", "lora"), [(2, LORA), (4, LORA), (4, PISSA)], ids=["2", "4", "PiSSA"])
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(build_dpo, trainer, tmp_path, stop, lora):
    """The reference of the second half is the start, not the checkpoint."""
    model = lora | {"optimizer": functools.partial(torch.optim.Adam, lr=1e-2), "reference": "frozen"}
    settings = {"model": model, "accumulate": 2, "max_epochs": 2, "limit_val_batches": 0}
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    unbroken, _ = trained(build_dpo, trainer, **settings, callbacks=[save], enable_checkpointing=True)
    resumed, datamodule = build_dpo(model=model)
    run = trainer(accumulate_grad_batches=2, max_epochs=2, limit_val_batches=0)
    run.fit(resumed, datamodule, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert run.global_step == 6
    assert torch.equal(weights(resumed), weights(unbroken))


@torch.no_grad()
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_changed_the_weights_below_are_exported_with_the_numbers_of_the_run(
    build_dpo, trainer, tmp_path, start
):
    """Merged, and by themselves: the change is made again on the weights that they name."""
    settings = {"lora": PISSA["lora"] | {"init_lora_weights": start}, "reference": "frozen"}
    module, datamodule = trained(build_dpo, trainer, model=settings, max_epochs=2)
    (batch, *_) = datamodule.val_dataloader()
    rows = (batch.input_ids, batch.attention_mask, batch.response_mask)
    expected = module.policy.eval()(*rows).sums
    for merge in (False, True):  # merging is for good
        module.export(tmp_path / str(merge), merge=merge)
        found = CausalLM.from_pretrained(str(tmp_path / str(merge))).eval()(*rows).sums
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    assert (expected - module.reference(module.policy, *rows).sums).abs().max() > 0.05


# ---- what stops a run --------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_before_the_weights_and_names_the_examples(build_dpo, trainer, tmp_path):
    class Poison(pl.Callback):
        """From the fifth batch on, one pair of the batch has a NaN loss."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 4:
                self.weights, self.batch = weights(pl_module), batch
                losses = pl_module.losses
                spoiled = torch.tensor([0.0, math.nan])
                pl_module.losses = lambda policy, reference: losses(policy, reference) + spoiled

    poison, save = Poison(), ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="{step}")
    module, datamodule = build_dpo()
    run = trainer(callbacks=[poison, save], enable_checkpointing=True, limit_val_batches=0)
    with pytest.raises(TrainingError, match="step 4: the loss is nan for the examples courtesy-train-") as error:
        run.fit(module, datamodule)
    message = str(error.value)
    named = datamodule.pairs["train"].example_ids[int(poison.batch.index[1])]
    assert f"examples {named};" in message
    assert message.endswith(f"the last good checkpoint is {tmp_path / 'step=4.ckpt'}")
    assert "\n" not in message
    assert torch.equal(weights(module), poison.weights), "the weights are those of before"
    stored = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in stored["state_dict"].values())


def test_adapters_that_do_not_move_stop_the_run(build_dpo, trainer):
    class Deaf(torch.optim.SGD):
        def step(self, closure=None):
            return closure()

    module, datamodule = build_dpo(model=LORA | {"optimizer": functools.partial(Deaf, lr=0.1)})
    with pytest.raises(TrainingError, match=r"step 1: .* no adapter moved"):
        trainer().fit(module, datamodule)


def test_a_learning_rate_of_0_is_no_reason_to_stop(build_dpo, trainer):
    module, _ = trained(build_dpo, trainer, model=LORA | {"optimizer": sgd(0.0)}, limit_val_batches=0)
    assert not module._adapters.moved


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_chosen_responses_that_fall_with_the_rejected_ones_are_warned_of_once(
    build_dpo, trainer, caplog, monkeypatch, loss_type
):
    """In nats of a whole response, also where the loss counts per token."""
    monkeypatch.setattr("rlhf_lightning.training.dpo._PAIRS_BEFORE_ALARM", 4)

    class Worse(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 1:
                with torch.no_grad():
                    next(pl_module.policy.parameters()).mul_(2)

    with caplog.at_level(logging.WARNING, logger="rlhf_lightning"):
        settings = {"callbacks": [Worse()], "log_every_n_steps": 1, "limit_val_batches": 0}
        trained(build_dpo, trainer, model={"loss_type": loss_type, "optimizer": sgd(1e-6)}, **settings)
    (record,) = (record for record in caplog.records if "became less likely together" in record.message)
    assert min(map(float, re.findall(r"[\d.]+(?= (?:and|nats))", record.message))) > 20
    assert "add model.sft_weight" in record.message
    assert "dpop" in record.message


@pytest.mark.parametrize(("pairs_seen", "warned"), [(11, True), (12, False)])
def test_a_few_pairs_are_no_reason_for_the_alarm(build_dpo, trainer, caplog, monkeypatch, pairs_seen, warned):
    """11 pairs, then 11 more of them, in two epochs: the numbers are looked at when there are enough, not before."""
    monkeypatch.setattr("rlhf_lightning.training.dpo._PAIRS_BEFORE_ALARM", pairs_seen)
    monkeypatch.setattr("rlhf_lightning.training.checks._FALLEN", 1e9)
    monkeypatch.setattr("rlhf_lightning.training.dpo.warn_of_falling_chosen", lambda **means: seen.append(means))
    seen: list[dict] = []
    trained(build_dpo, trainer, limit_val_batches=0, log_every_n_steps=1)
    assert bool(seen) is warned


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"gamma": 0.5}, r"model\.gamma: the loss sigmoid takes none; .*simpo"),
        ({"alpha": 0.5}, r"model\.alpha: .*r_dpo"),
        ({"dpop_lambda": 5.0}, r"model\.dpop_lambda: .*dpop"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, r"model\.label_smoothing: the loss ipo takes none"),
        ({"loss_type": "simpo"}, r"model\.gamma: the loss simpo needs it"),
        ({"loss_type": "r_dpo"}, r"model\.alpha: the loss r_dpo needs it"),
        ({"loss_type": "exo_pair", "label_smoothing": 0.0}, r"model\.loss_type: exo_pair refuses .*label_smoothing"),
        ({"loss_type": "orpo", "reference": "frozen"}, "the loss orpo has no reference"),
        ({"reference": "adapter"}, r"give model\.lora"),
        (LORA | {"load_in_4bit": True, "reference": "frozen"}, "use reference: adapter"),
        (PISSA, r"model\.lora\.init_lora_weights: pissa .*reference: frozen"),
        (PISSA | {"reference": "adapter"}, r"model\.lora\.init_lora_weights: pissa .*reference: frozen"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(build_dpo, model, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        build_dpo(model=model)
    assert "\n" not in str(error.value)


def test_settings_of_the_loss_reach_it(build_dpo):
    for name, value in {"label_smoothing": 0.2, "gamma": 0.7, "alpha": 0.3, "dpop_lambda": 3.0}.items():
        takers = [n for n, loss in PREFERENCE_LOSSES.items() if name in loss.parameters]
        assert takers
        for loss_type in takers:
            module, _ = build_dpo(model={"loss_type": loss_type, **NEEDED.get(loss_type, {}), name: value})
            assert module.loss.settings[name] == value


@pytest.mark.parametrize("directory", ["absent/model", "./absent"])
def test_a_reference_that_is_no_model_is_refused_at_once(build_dpo, directory):
    with pytest.raises(ModelError, match="absent"):
        build_dpo(model={"reference": directory})


def test_a_misspelt_kind_of_reference_is_refused_with_the_kinds(build_dpo):
    with pytest.raises(ConfigurationError, match="froezen is neither frozen nor adapter nor a model"):
        build_dpo(model={"reference": "froezen"})


def test_a_reference_of_another_architecture_is_refused(build_dpo, tiny_llama):
    with pytest.raises(ConfigurationError, match=r"has model_type llama, but .* has qwen2"):
        build_dpo(model={"reference": str(tiny_llama)})


def test_a_reference_of_another_vocabulary_is_refused(build_dpo, tmp_path):
    other = make_tiny_model(tmp_path / "other", builtin_texts(), vocab_size=500)
    with pytest.raises(ConfigurationError, match=r"has vocab_size 500, but .* has 973"):
        build_dpo(model={"reference": str(other)})


def test_a_reference_of_another_tokenizer_is_refused_before_anything_is_loaded(
    build_dpo, trainer, tmp_path, tiny_qwen2
):
    other = shutil.copytree(tiny_qwen2, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["he"], ids["in"] = ids["in"], ids["he"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    module, datamodule = build_dpo(model={"reference": str(other)})
    with pytest.raises(
        ConfigurationError, match=r"gives other ids than that of the policy \(2 tokens differ, the first .he"
    ):
        trainer().fit(module, datamodule)
    assert module.reference.network is None


def test_a_schedule_that_does_not_step_with_the_optimizer_stops_the_run(build_dpo, trainer):
    class Skipping(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                pl_module.lr_schedulers().step()

    with pytest.raises(TrainingError, match=r"step 3: the learning-rate schedule has gone 4 steps, not 3"):
        trained(build_dpo, trainer, callbacks=[StepWatch(), Skipping()])
