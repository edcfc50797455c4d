"""A reward model with `head: linear`: resumed, exported, evaluated, padded with a token that ends no row."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_lightning import RewardModel
from rlhf_lightning.commands.main import main
from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.rewards.scorers import RewardScorer
from tests.training.conftest import weights

LINEAR = {"head": "linear"}


def test_a_run_resumes_as_if_it_had_not_stopped(build, trainer, tmp_path):
    whole, datamodule = build(model=LINEAR)
    trainer(max_epochs=2).fit(whole, datamodule)
    half, datamodule = build(model=LINEAR)
    first = trainer(max_epochs=1)
    first.fit(half, datamodule)
    first.save_checkpoint(tmp_path / "a.ckpt")
    before = weights(half)
    resumed, datamodule = build(model=LINEAR)
    trainer(max_epochs=2).fit(resumed, datamodule, ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(weights(resumed), weights(whole))
    assert not torch.equal(weights(resumed), before)
    assert set(resumed.network.score.state_dict()) == {"weight"}
    other, datamodule = build()
    with pytest.raises(ConfigurationError, match=r"its run had model\.head linear, this one has mlp"):
        trainer(max_epochs=2).fit(other, datamodule, ckpt_path=tmp_path / "a.ckpt")


def test_what_is_exported_is_evaluated_with_the_numbers_of_the_run(build, trainer, tmp_path, pairs):
    module, datamodule = build(model=LINEAR)
    run = trainer()
    run.fit(module, datamodule)
    (measured,) = run.validate(module, datamodule, verbose=False)
    module.export(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--reward_model", str(tmp_path / "model"), "--pairs", str(pairs / "val.jsonl"), "--out", str(out)]
    assert main(["evaluate", *arguments]) == 0
    numbers = json.loads((out / "metrics.json").read_text())["metrics"]
    assert numbers["rm/accuracy"]["value"] == pytest.approx(measured["val/accuracy"], abs=1e-6)
    assert numbers["rm/auroc"]["value"] == pytest.approx(measured["val/auroc"], abs=1e-6)


def test_a_saved_network_keeps_its_head(build, trainer, tmp_path, caplog):
    module, _ = build(model=LINEAR)
    module.configure_model()
    module.export(tmp_path / "linear")
    again, datamodule = build(model={"backbone": str(tmp_path / "linear")})
    trainer().validate(again, datamodule, verbose=False)
    assert again.hparams.head == "linear"
    assert torch.equal(again.network.score.weight, module.network.score.weight)
    module, _ = build()
    module.configure_model()
    module.export(tmp_path / "mlp")
    again, _ = build(model={"backbone": str(tmp_path / "mlp"), **LINEAR})
    assert again.hparams.head == "mlp"
    assert "keeps its own, mlp, not linear" in caplog.text


@torch.no_grad()
def test_rows_are_padded_with_a_token_that_ends_none(build, trainer, tiny_llama, tmp_path):
    """Of a tokenizer that pads with its EOS token, as many are set up to; by it transformers finds the last token."""
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(source)
    settings = json.loads((source / "config.json").read_text()) | {"pad_token_id": tokenizer.eos_token_id}
    (source / "config.json").write_text(json.dumps(settings))
    module, datamodule = build(model={"backbone": str(source), **LINEAR}, data={"tokenizer": str(source)})
    trainer().validate(module, datamodule, verbose=False)
    module.export(tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.pad_token_id != loaded.eos_token_id
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.pad_token_id == loaded.pad_token_id
    prompts, responses = ["One?", "Another question, which is longer?"], ["Yes.", "No, and here is why: no."]
    talks = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a, b in zip(prompts, responses, strict=True)
    ]
    texts = loaded.apply_chat_template(talks, tokenize=False)
    theirs = model(**loaded(texts, padding=True, add_special_tokens=False, return_tensors="pt")).logits[:, 0]
    ours = RewardScorer(str(tmp_path / "model"))([talk[:1] for talk in talks], responses)
    torch.testing.assert_close(theirs, torch.tensor([each.score for each in ours]), rtol=0, atol=1e-5)


def test_a_tokenizer_without_such_a_token_is_refused_before_training(build, trainer, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_lightning.training.reward_model.padding_of_scored", lambda _: None)
    module, datamodule = build(model={"backbone": str(tiny_llama), **LINEAR}, data={"tokenizer": str(tiny_llama)})
    with pytest.raises(ConfigurationError, match=r"model\.head: linear .* no special token to pad with"):
        trainer().fit(module, datamodule)


def test_what_does_not_go_together_is_refused_at_once(tiny_bert, tiny_qwen2):
    with pytest.raises(ModelError, match="BertForSequenceClassification"):
        RewardModel(str(tiny_bert), head="linear")
    with pytest.raises(ConfigurationError, match=r"model\.pooling: mean goes with model\.head: mlp"):
        RewardModel(str(tiny_qwen2), head="linear", pooling="mean")
