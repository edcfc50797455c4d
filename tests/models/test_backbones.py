"""Loading of backbones: what is refused, and that nothing stays random without a word."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, RobertaConfig, T5Config

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.backbones import load_backbone
from rlhf_lightning.models.configuration import load_config, max_positions
from rlhf_lightning.models.states import hidden_states


def test_weights_load_as_float32_in_train_mode(tmp_path, tiny_qwen2):
    from transformers import AutoModel

    AutoModel.from_pretrained(tiny_qwen2, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    backbone = load_backbone(str(tmp_path / "half"))
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert backbone.training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "without a config.json, so no model"),
        (lambda path: None, "no directory here"),
        (lambda path: (path.mkdir(), (path / "adapter_config.json").write_text("{}")), "peft's kind None"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("{}")), "no model can be loaded"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("not json")), "no model can be loaded"),
        (lambda path: T5Config().save_pretrained(path), "an encoder-decoder model"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, make, message):
    path = tmp_path / "model"
    make(path)
    with pytest.raises(ModelError, match=message) as error:
        load_config(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_directory_without_weights_is_refused(tmp_path, tiny_qwen2):
    AutoConfig.from_pretrained(tiny_qwen2).save_pretrained(tmp_path / "empty")
    with pytest.raises(ModelError, match="its weights could not be loaded"):
        load_backbone(str(tmp_path / "empty"))


def test_missing_weights_are_refused_instead_of_left_random(tmp_path, tiny_qwen2):
    directory = shutil.copytree(tiny_qwen2, tmp_path / "deeper")
    config = json.loads((directory / "config.json").read_text())
    config["num_hidden_layers"] += 1
    config["layer_types"] = None
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"weights of a qwen2 model are not in its files.*layers\.2"):
        load_backbone(str(directory))


def test_positions_of_the_roberta_family_begin_after_the_padding_index():
    """Left and right padding must agree there too, where the library counts positions from `ids != pad`."""
    from transformers import AutoModel

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.5,
    )
    model = AutoModel.from_config(config, add_pooling_layer=False).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        plain = model(ids).last_hidden_state
        left = hidden_states(
            model, torch.cat([torch.full((1, 3), 9), ids], 1), torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).bool()
        )
    torch.testing.assert_close(left[:, 3:], plain, rtol=0, atol=1e-5)
    assert max_positions(config) == 18
