"""Constructors in Python refuse what the command line refuses, in a line."""

from __future__ import annotations

import copy

import pytest
import torch

from rlhf_lightning import DPO, PPO, SFT, PreferenceDataModule, PromptDataModule, RewardModel
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.functional.losses import dpo_loss

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
REFUSED = [
    (RewardModel, {"pooling": "cls"}, "pooling='cls' is none of 'last', 'mean', 'layers'"),
    (RewardModel, {"head": "lin"}, "did you mean 'linear'"),
    (RewardModel, {"warmup_ratio": 7}, "warmup_ratio=7 is not"),
    (RewardModel, {"learning_rate": 1e-3}, "no argument learning_rate; did you mean model.optimizer.lr"),
    (RewardModel, {"optimizer": 1e-3}, "model.optimizer: a float"),
    (RewardModel, {"freeze_backbone": "no"}, "freeze_backbone='no' is neither True nor False"),
    (DPO, {"sft_weight": -3}, "sft_weight=-3 is not"),
    (DPO, {"layout": "packd"}, "did you mean 'packed'"),
    (DPO, {"beta": "0.1"}, "beta='0.1' is not a number"),
    (DPO, {"lora": 8}, "model.lora: a int"),
    (SFT, {"lr_scheduler_type": "cosin"}, "did you mean 'cosine'"),
    (PPO, {"reward_model": len, "num_generations": 0}, "num_generations=0 is not"),
]
REFUSED_DATA = [
    (PreferenceDataModule, {"batch_size": 0}, "batch_size=0 is not"),
    (PreferenceDataModule, {"batch_size": 2.5}, "batch_size=2.5 is not an integer"),
    (PreferenceDataModule, {"truncation": "right"}, "is none of 'left', 'drop', 'error'"),
    (PreferenceDataModule, {"on_bad_rows": "skip"}, "on_bad_rows='skip' is none of"),
    (PromptDataModule, {"max_prompt_lenght": 8}, "did you mean max_prompt_length"),
]


@pytest.mark.parametrize(("kind", "given", "words"), REFUSED)
def test_a_module_refuses_it(kind, given, words):
    with pytest.raises(ConfigurationError) as refusal:
        kind("builtin:tiny", **given)
    assert words in str(refusal.value)


@pytest.mark.parametrize(("kind", "given", "words"), REFUSED_DATA)
def test_a_data_module_refuses_it(kind, given, words):
    with pytest.raises(ConfigurationError) as refusal:
        kind([PAIR], **given)
    assert words in str(refusal.value)


def test_whole_numbers_for_fractions_none_and_objects_pass():
    module = DPO("builtin:tiny", beta=1, gamma=None, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1))
    assert copy.deepcopy(module).hparams.beta == 1
    data = PreferenceDataModule([PAIR], val=[PAIR], batch_size=torch.tensor(4).item(), limit=None)
    assert data.batch_size == 4


def test_a_class_of_a_user_may_take_more():
    class Mine(RewardModel):
        def __init__(self, backbone: str, extra: int = 1, **shared) -> None:
            super().__init__(backbone, **shared)
            self.extra = extra

    assert Mine("builtin:tiny", extra=3, pooling="mean").extra == 3
    with pytest.raises(ConfigurationError, match="no argument pool;"):
        Mine("builtin:tiny", pool="mean")


def test_a_loss_may_be_the_function_itself():
    def mine(chosen, rejected, reference_chosen, reference_rejected, *, beta):
        return dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=2 * beta)

    module = DPO("builtin:tiny", loss_type=mine)
    logprobs = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.5]), torch.zeros(2), torch.zeros(2)
    assert torch.equal(module.loss.loss.function(*logprobs, beta=0.1), dpo_loss(*logprobs, beta=0.2))
    assert module.hparams.loss_type.endswith("mine")


def test_precisions_that_spoil_numbers_are_refused_in_python(tmp_path):
    import lightning.pytorch as pl

    trainer = pl.Trainer(accelerator="cpu", precision="bf16-true", max_steps=1, default_root_dir=tmp_path, logger=False)
    with pytest.raises(ConfigurationError, match=r"trainer.precision: bf16-true"):
        trainer.fit(SFT("builtin:tiny"), PreferenceDataModule([PAIR] * 4, val=[PAIR]))
