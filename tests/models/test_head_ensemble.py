"""Several reward heads on one backbone: their mean as one head, what is written of them, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.head_ensemble import FILE, HeadEnsemble
from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.training.model_card import reward_usage
from tests.models.test_loaded_by_others import TRUST, batch, own_module_cache, saved  # noqa: F401

HEADS = [
    {"head": "linear"},
    {"head": "mlp", "hidden_size": 9, "activation": "tanh", "pooling": "mean"},
    {"head": "mlp", "dropout": 0.2, "pooling": "layers"},
]


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.get("pooling", "linear"))
def test_what_is_saved_is_loaded_with_all_heads_and_by_transformers_as_their_mean(tmp_path, tiny_qwen2, head):
    network = saved(tiny_qwen2, tmp_path, num_heads=3, **head)
    ids, mask = batch("right", 0)
    each = network.each(ids, mask)
    assert each.std(dim=1).min() > 0.1, "each has a start of its own"
    again = RewardNetwork.from_pretrained(tmp_path)
    assert torch.equal(again.each(ids, mask), each)
    torch.testing.assert_close(again(ids, mask), each.double().mean(dim=1).float(), rtol=0, atol=1e-6)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, **TRUST[head["head"]])
    theirs = model.eval()(input_ids=ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(theirs, each.mean(dim=1, keepdim=True), rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_head_writes_what_it_always_wrote_also_over_an_ensemble(tmp_path, tiny_qwen2):
    network = saved(tiny_qwen2, tmp_path, num_heads=2)
    assert (tmp_path / FILE).is_file()
    network = saved(tiny_qwen2, tmp_path)
    assert not (tmp_path / FILE).exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["reward_head"]) == {"hidden_size", "activation", "dropout", "pooling"}
    stored = {name for name in load_file(tmp_path / "model.safetensors") if name.startswith("score.")}
    assert stored == {f"score.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    ids, mask = batch("right", 0)
    assert torch.equal(network.each(ids, mask)[:, 0], network(ids, mask))


def test_saving_draws_no_random_numbers(tmp_path, tiny_qwen2):
    network = RewardNetwork.from_backbone(str(tiny_qwen2), num_heads=2)
    before = torch.get_rng_state()
    network.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_vllm_is_promised_the_mean_where_it_knows_the_head(tmp_path, tiny_qwen2):
    """An MLP as wide as the backbone is the one that it computes; it reads every file that ends in .safetensors."""
    saved(tiny_qwen2, tmp_path, num_heads=2, head="linear")
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert "4 heads" in reward_usage("here", config | {"reward_head": config["reward_head"] | {"num_heads": 4}})
    width = config["hidden_size"]
    for hidden, architecture in ((width // 2, "Qwen2ForRewardModel"), (width, "RewardModelForSequenceClassification")):
        saved(tiny_qwen2, tmp_path, num_heads=2, hidden_size=hidden)
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [architecture]


@pytest.mark.parametrize("kind", ["gone", "others", "fewer", "mean trained on"])
def test_heads_that_do_not_belong_to_the_weights_are_refused(tmp_path, tiny_qwen2, kind):
    saved(tiny_qwen2, tmp_path, num_heads=3, hidden_size=4)
    (tmp_path / "rlhf_lightning.json").unlink()
    heads = load_file(tmp_path / FILE)
    if kind == "gone":
        (tmp_path / FILE).unlink()
    elif kind == "others":
        save_file({name: tensor + 0.1 for name, tensor in heads.items()}, tmp_path / FILE)
    elif kind == "fewer":
        save_file({name: tensor for name, tensor in heads.items() if not name.startswith("2.")}, tmp_path / FILE)
    else:
        weights = load_file(tmp_path / "model.safetensors")
        weights["score.2.weight"] += 0.01
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="num_heads"):
        RewardNetwork.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["reward_head"]["num_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not isinstance(RewardNetwork.from_pretrained(tmp_path).score, HeadEnsemble)
