"""Models and tokenizers that a script gives as objects: trained as those by name, exported, reloaded or refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rlhf_lightning import DPO, PPO, SFT, OnlineDPO, PreferenceDataModule, PromptDataModule, RewardModel
from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.training.callbacks import ExportBest
from tests.training.conftest import sgd, weights

REWARD = {"reward_model": lambda prompts, responses: [len(text) / 10 for text in responses], "max_new_tokens": 4}
KINDS = [(SFT, {}), (DPO, {}), (DPO, {"lora": {"r": 2}}), (RewardModel, {}), (PPO, REWARD), (OnlineDPO, REWARD)]
IDS = ["sft", "dpo", "adapters", "reward model", "ppo", "online dpo"]


class Mine(DPO):
    """A user's own."""


def model_at(directory, kind=DPO):
    auto = AutoModel if kind is RewardModel else AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype=torch.float32)


def nameless(model):
    """The same model, as if it had been made by hand."""
    model.config._name_or_path = model.name_or_path = ""
    return model


@pytest.fixture
def tokenizer(tiny_qwen2):
    """One that was made by hand, and so has no name."""
    made = AutoTokenizer.from_pretrained(tiny_qwen2)
    bare = PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, eos_token=made.eos_token)
    bare.chat_template = made.chat_template
    assert not bare.name_or_path
    return bare


def data_of(kind, pairs, tokenizer=None):
    prompts = kind in (PPO, OnlineDPO)
    options = {"batch_size": 2, "seed": 3, "tokenizer": tokenizer}
    return PromptDataModule(str(pairs), **options) if prompts else PreferenceDataModule(str(pairs), **options)


def fitted(trainer, kind, pairs, backbone, *, callbacks=(), **settings):
    torch.manual_seed(0)
    module = kind(backbone, optimizer=sgd(0.01), **settings)
    run = trainer(max_steps=2, limit_val_batches=0, callbacks=[*callbacks])
    run.fit(module, data_of(kind, pairs))
    return module, run


@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=IDS)
def test_a_model_object_is_trained_as_the_model_of_its_name(trainer, tiny_qwen2, pairs, tmp_path, kind, settings):
    by_name, _ = fitted(trainer, kind, pairs, str(tiny_qwen2), **settings)
    given = model_at(tiny_qwen2, kind)
    module, run = fitted(trainer, kind, pairs, given, **settings)
    assert module.hparams.backbone == str(tiny_qwen2)
    torch.testing.assert_close(weights(module), weights(by_name), rtol=0, atol=0)
    trained = {id(parameter) for parameter in module.parameters()}
    assert all(id(parameter) in trained for parameter in given.parameters()), "the object itself is trained"
    run.save_checkpoint(tmp_path / "run.ckpt")
    stored = torch.load(tmp_path / "run.ckpt", weights_only=False)
    assert stored["state_dict"].keys() == {name for name, _ in _saved(module)}
    again = kind.load_from_checkpoint(tmp_path / "run.ckpt")
    assert torch.equal(weights(again), weights(module))


def _saved(module):
    """What a checkpoint holds of a module: adapters alone where there are any."""
    names = module.state_dict().items()
    return [(name, w) for name, w in names if not module.lora or "lora_" in name]


@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=IDS)
def test_without_a_name_a_checkpoint_asks_for_the_object(
    trainer, tiny_qwen2, pairs, tokenizer, tmp_path, kind, settings
):
    settings = settings | {"tokenizer": tokenizer}
    module, run = fitted(trainer, kind, pairs, nameless(model_at(tiny_qwen2, kind)), **settings)
    run.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(
        ConfigurationError, match=rf"{kind.__name__}.load_from_checkpoint\(path, backbone=model\)"
    ) as no:
        kind.load_from_checkpoint(tmp_path / "run.ckpt")
    assert "\n" not in str(no.value)
    again = kind.load_from_checkpoint(tmp_path / "run.ckpt", backbone=nameless(model_at(tiny_qwen2, kind)))
    assert torch.equal(weights(again), weights(module))


@pytest.mark.parametrize("kind", [SFT, Mine, RewardModel])
def test_export_writes_a_tokenizer_that_has_no_name(trainer, tiny_qwen2, pairs, tokenizer, tmp_path, kind):
    module, run = fitted(trainer, kind, pairs, model_at(tiny_qwen2, kind), tokenizer=tokenizer)
    module.export(tmp_path / "model")
    written = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert written.get_vocab() == tokenizer.get_vocab()
    chat = [{"role": "user", "content": "Hello"}]
    asked = {"tokenize": False, "add_generation_prompt": True}
    assert written.apply_chat_template(chat, **asked) == tokenizer.apply_chat_template(chat, **asked)
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = kind.load_from_checkpoint(tmp_path / "run.ckpt", tokenizer=tokenizer)
    again.export(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_text() == (tmp_path / "model" / "tokenizer.json").read_text()
    kind.load_from_checkpoint(tmp_path / "run.ckpt").export(tmp_path / "bare")
    assert not (tmp_path / "bare" / "tokenizer.json").exists(), "another one than that of the training is not made up"


def test_without_any_data_the_tokenizer_is_that_of_the_backbone(tiny_qwen2, tmp_path):
    module = Mine(str(tiny_qwen2))
    module.configure_model()
    module.export(tmp_path / "model")
    written = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert written.get_vocab() == AutoTokenizer.from_pretrained(tiny_qwen2).get_vocab()


def test_a_backbone_without_a_tokenizer_is_exported_without_one(tiny_qwen2, tmp_path, caplog):
    AutoModelForCausalLM.from_pretrained(tiny_qwen2).save_pretrained(tmp_path / "bare")
    module = SFT(str(tmp_path / "bare"))
    module.configure_model()
    module.export(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    assert "without a tokenizer" in caplog.text


def test_the_best_checkpoint_of_a_derived_class_is_exported_with_its_nameless_tokenizer(
    trainer, tiny_qwen2, pairs, tokenizer, tmp_path
):
    export = ExportBest(str(tmp_path / "best"))
    module = Mine(model_at(tiny_qwen2), optimizer=sgd(0.01), tokenizer=tokenizer)
    run = trainer(max_steps=2, limit_val_batches=0, callbacks=[export], enable_checkpointing=True)
    run.fit(module, data_of(Mine, pairs))
    assert export.fault is None
    assert AutoTokenizer.from_pretrained(tmp_path / "best").get_vocab() == tokenizer.get_vocab()
    unnamed = Mine(nameless(model_at(tiny_qwen2)), tokenizer=tokenizer)
    with pytest.raises(ConfigurationError, match=r"ExportBest: .*save_pretrained"):
        trainer(callbacks=[export]).fit(unnamed, data_of(Mine, pairs))


def test_the_reference_is_the_object_as_it_was(trainer, tiny_qwen2, pairs, tmp_path):
    """Also where the module's weights are those of a checkpoint before its reference is asked for."""
    start = weights(model_at(tiny_qwen2))
    module, run = fitted(trainer, DPO, pairs, model_at(tiny_qwen2))
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = DPO.load_from_checkpoint(tmp_path / "run.ckpt", backbone=model_at(tiny_qwen2))
    trainer().validate(again, data_of(DPO, pairs), verbose=False)
    for each in (module, again):
        assert torch.equal(weights(each.reference.network), start)
        assert not torch.equal(weights(each.policy), start)
    with pytest.raises(ConfigurationError, match="precompute_reference"):
        DPO(model_at(tiny_qwen2), precompute_reference=True)


def test_dropout_of_an_object_is_off_in_training_and_comes_back_in_its_export(tiny_qwen2, tmp_path):
    given = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32, attention_dropout=0.4)
    module = SFT(given, layout="packed")
    module.configure_model()
    assert given.model.layers[0].self_attn.attention_dropout == 0
    assert given.config._attn_implementation == "packed_rows"
    module.export(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["attention_dropout"] == 0.4


@pytest.mark.parametrize(
    ("kind", "made", "words"),
    [
        (DPO, lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16), r"dtype=torch\.float32"),
        (SFT, lambda path: torch.nn.Linear(2, 2), "a Linear is no model of transformers"),
        (SFT, lambda path: AutoModel.from_pretrained(path, dtype=torch.float32), "AutoModelForCausalLM"),
    ],
)
def test_what_cannot_be_trained_is_refused(tiny_qwen2, kind, made, words):
    with pytest.raises(ModelError, match=words) as refused:
        kind(made(tiny_qwen2)).configure_model()
    assert "\n" not in str(refused.value)
