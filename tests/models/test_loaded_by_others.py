"""What transformers makes of a saved reward network: the same score, or an error, and never a random head."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    pipeline,
)

from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.models import linear_head
from rlhf_lightning.models.configuration import load_config
from rlhf_lightning.models.modeling_reward import STOP
from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.training.model_card import reward_usage

TRUST = {"mlp": {"trust_remote_code": True}, "linear": {}}


@pytest.fixture(autouse=True)
def own_module_cache(tmp_path_factory, monkeypatch):
    """Where transformers puts the code of a model before it runs it; not the user's own cache."""
    cache = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.syspath_prepend(cache)


def saved(source, directory, **head):
    """A reward network of loud weights with its tokenizer, and where it lies."""
    torch.manual_seed(3)
    network = RewardNetwork.from_backbone(str(source), **head).eval()
    for weight in network.score.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    network.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return network


def batch(side, pad_id, lengths=(9, 4, 6)):
    """Ids and mask [3, 9] of rows of ordinary tokens, padded on a side."""
    draw = torch.Generator().manual_seed(5)
    ids, mask = torch.full((3, max(lengths)), pad_id), torch.zeros(3, max(lengths), dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(length) if side == "right" else slice(-length, None)
        ids[row, place] = torch.randint(5, 900, (length,), generator=draw)
        mask[row, place] = True
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("architecture", ["tiny_llama", "tiny_qwen2"])
def test_transformers_gives_our_score(request, tmp_path, architecture, head, side):
    network = saved(request.getfixturevalue(architecture), tmp_path, head=head)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, **TRUST[head])
    ids, mask = batch(side, AutoTokenizer.from_pretrained(tmp_path).pad_token_id)
    ours, theirs = network(ids, mask), model(input_ids=ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(theirs, ours[:, None], rtol=0, atol=1e-5)
    assert ours.std() > 0.1
    assert torch.equal(RewardNetwork.from_pretrained(tmp_path)(ids, mask), ours)


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "head",
    [
        {"pooling": "mean", "activation": "tanh", "hidden_size": 9},
        {"pooling": "layers", "activation": "silu", "dropout": 0.3},
        {"pooling": "last", "activation": "gelu"},
    ],
    ids=lambda head: head["pooling"],
)
@pytest.mark.parametrize("architecture", ["tiny_bert", "tiny_llama"])
def test_every_mlp_is_loaded_with_trust(request, tmp_path, architecture, head, side):
    network = saved(request.getfixturevalue(architecture), tmp_path, **head)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    ids, mask = batch(side, 0)
    theirs = model(input_ids=ids, attention_mask=mask.long(), token_type_ids=torch.ones_like(ids)).logits
    torch.testing.assert_close(theirs, network(ids, mask)[:, None], rtol=0, atol=1e-5)
    alone = model(input_ids=ids[:1]).logits
    torch.testing.assert_close(alone, theirs[:1], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="attention_mask"):
        model(input_ids=ids)


@pytest.mark.parametrize(
    "load",
    [
        AutoModelForSequenceClassification.from_pretrained,
        LlamaForSequenceClassification.from_pretrained,
        AutoModelForTokenClassification.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        lambda directory: pipeline("text-classification", str(directory)),
    ],
    ids=["auto", "llama", "token", "causal", "pipeline"],
)
def test_an_mlp_does_not_load_with_a_random_head(tmp_path, tiny_llama, load):
    saved(tiny_llama, tmp_path)
    with pytest.raises(ValueError, match=r"trust_remote_code=True"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft 0.21 asks by the old name
def test_peft_puts_adapters_on_an_mlp_and_trains_its_head(tmp_path, tiny_llama):
    from peft import LoraConfig, get_peft_model

    network = saved(tiny_llama, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    ids, mask = batch("right", 0)
    found = model(input_ids=ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(found[:, 0], network(ids, mask), rtol=0, atol=1e-5)
    found.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    for part in ("score", "lora_B"):
        assert any(part in name for name in trained)


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_a_pipeline_gives_the_score_as_it_is(tmp_path, tiny_qwen2, head):
    network = saved(tiny_qwen2, tmp_path, head=head)
    texts = ["What is a name?", "Say it, please, with a few more words."]
    classify = pipeline("text-classification", str(tmp_path), **TRUST[head])
    inputs = classify.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        ours = network(inputs["input_ids"], inputs["attention_mask"].bool())
    for options in ({}, {"function_to_apply": "none"}):
        found = torch.tensor([each["score"] for each in classify(texts, batch_size=2, **options)])
        torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)
    assert (ours < 0).any(), "no sigmoid gives that"


@torch.no_grad()
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_what_transformers_saves_again_is_a_reward_network_as_before(tmp_path, tiny_llama, head):
    network = saved(tiny_llama, tmp_path / "ours", head=head)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", **TRUST[head]).save_pretrained(
        tmp_path / "theirs"
    )
    rows = batch("right", 0)
    assert torch.equal(RewardNetwork.from_pretrained(tmp_path / "theirs")(*rows), network(*rows))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "theirs", **TRUST[head])
    theirs = again(input_ids=rows[0], attention_mask=rows[1].long()).logits[:, 0]
    torch.testing.assert_close(theirs, network(*rows), rtol=0, atol=1e-5)
    if head == "mlp":
        with pytest.raises(ValueError, match="trust_remote_code"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "theirs")


@torch.no_grad()
@pytest.mark.parametrize("trust", [True, False])
def test_our_own_loading_neither_runs_nor_needs_the_module_in_the_directory(tmp_path, tiny_llama, trust):
    network = saved(tiny_llama, tmp_path)
    (tmp_path / "rlhf_lightning.json").unlink()  # as who changes files on purpose is told to do
    (tmp_path / "modeling_reward.py").write_text("raise SystemExit('was run')")
    rows = batch("right", 0)
    assert torch.equal(RewardNetwork.from_pretrained(tmp_path, trust_remote_code=trust)(*rows), network(*rows))
    (tmp_path / "modeling_reward.py").unlink()
    assert torch.equal(RewardNetwork.from_pretrained(tmp_path, trust_remote_code=trust)(*rows), network(*rows))


@torch.no_grad()
def test_a_directory_of_before_there_were_two_heads_is_loaded(tmp_path, tiny_qwen2):
    network = saved(tiny_qwen2, tmp_path)
    (tmp_path / "rlhf_lightning.json").unlink()
    (tmp_path / "modeling_reward.py").unlink()
    written = json.loads((tmp_path / "config.json").read_text())
    for key in ("auto_map", "transformers_weights", "reward_rows", "problem_type", "sentence_transformers"):
        del written[key]
    assert written["reward_head"].keys() == {"hidden_size", "activation", "dropout", "pooling"}
    (tmp_path / "config.json").write_text(json.dumps(written))
    rows = batch("right", 0)
    assert torch.equal(RewardNetwork.from_pretrained(tmp_path)(*rows), network(*rows))


_OWN_BACKBONE = """
from transformers import LlamaConfig, LlamaModel
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineModel(LlamaModel):
    config_class = MineConfig
"""


@torch.no_grad()
def test_a_backbone_that_comes_with_code_of_its_own_is_loaded_by_this_package_alone(tmp_path, tiny_llama):
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    (source / "mine.py").write_text(_OWN_BACKBONE)
    settings = json.loads((source / "config.json").read_text()) | {"model_type": "mine"}
    settings["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModel": "mine.MineModel"}
    (source / "config.json").write_text(json.dumps(settings))
    network = RewardNetwork.from_backbone(str(source), trust_remote_code=True).eval()
    network.save_pretrained(tmp_path / "saved")
    rows = batch("left", 0)
    assert torch.equal(RewardNetwork.from_pretrained(tmp_path / "saved", trust_remote_code=True)(*rows), network(*rows))
    for trust in (True, False):
        with pytest.raises(ValueError, match=r"Unrecognized configuration class|trust_remote_code"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", trust_remote_code=trust)


def test_a_linear_head_is_a_classifier_of_transformers(tmp_path, tiny_qwen2):
    saved(tiny_qwen2, tmp_path, head="linear")
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["architectures"], written["num_labels"]) == (["Qwen2ForSequenceClassification"], 1)
    assert not {"auto_map", "transformers_weights", "reward_rows"} & written.keys()
    weights = load_file(tmp_path / "model.safetensors")
    assert [name for name in weights if name.startswith("score")] == ["score.weight"]
    assert weights["score.weight"].shape == (1, written["hidden_size"])
    assert not (tmp_path / "modeling_reward.py").exists()


def test_a_head_takes_the_place_of_the_other_in_a_directory(tmp_path, tiny_qwen2):
    saved(tiny_qwen2, tmp_path / "mlp")
    RewardNetwork.from_backbone(str(tmp_path / "mlp"), head="linear").save_pretrained(tmp_path / "linear")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "linear")
    assert type(model).__name__ == "Qwen2ForSequenceClassification"
    assert "AutoModelForSequenceClassification" not in model.config.to_dict().get("auto_map", {})


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ({}, "Qwen2ForRewardModel"),
        ({"activation": "tanh"}, "RewardModelForSequenceClassification"),
        ({"hidden_size": 32}, "RewardModelForSequenceClassification"),
        ({"dropout": 0.1}, "RewardModelForSequenceClassification"),
        ({"pooling": "mean"}, "RewardModelForSequenceClassification"),
    ],
    ids=str,
)
def test_vllms_name_is_for_the_head_that_vllm_computes(tmp_path, tiny_qwen2, head, name):
    """vLLM's Qwen2ForRewardModel is Linear(H, H), ReLU, Linear(H, 1) on the last token, whatever config.json says."""
    saved(tiny_qwen2, tmp_path, **head)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [name]
    if name == "Qwen2ForRewardModel":
        names = {name for name in load_file(tmp_path / "model.safetensors") if name.startswith("score")}
        assert names == {"score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"}


@pytest.mark.parametrize(
    ("base", "head", "route"),
    [
        ("tiny_llama", "linear", "`/classify`"),
        ("tiny_qwen2", "linear", "`/classify`"),
        ("tiny_qwen2", "mlp", '`/pooling` `{"messages": [...], "task": "token_classify"}`'),
        ("tiny_llama", "mlp", None),
    ],
)
def test_a_card_says_how_vllm_is_asked_where_it_knows_the_model(request, tmp_path, base, head, route):
    saved(request.getfixturevalue(base), tmp_path, head=head)
    usage = reward_usage("models/reward", json.loads((tmp_path / "config.json").read_text()))
    (line,) = (line for line in usage.splitlines() if line.startswith("| vLLM |"))
    assert ("vllm serve models/reward --runner pooling" in line) == (route is not None)
    assert route is None or route in line


def test_the_sentence_that_stops_others_is_in_the_configuration_alone(tmp_path, tiny_qwen2):
    saved(tiny_qwen2, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["transformers_weights"] == STOP
    assert load_config(str(tmp_path)).transformers_weights is None


@pytest.mark.parametrize(("eos", "pad"), [(2, None), ([2, 5], None), (3, 2)])
def test_a_padding_id_that_ends_rows_is_left_out(tmp_path, tiny_llama, eos, pad):
    network = RewardNetwork.from_backbone(str(tiny_llama), head="linear")
    network.backbone.config.update({"pad_token_id": 2, "eos_token_id": eos})
    network.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == pad


def test_an_encoder_has_no_linear_head(tiny_bert):
    with pytest.raises(ModelError, match=r"BertForSequenceClassification .*classifier\.weight.*head: mlp"):
        RewardNetwork.from_backbone(str(tiny_bert), head="linear")


@pytest.mark.parametrize("setting", [{"pooling": "mean"}, {"hidden_size": 8}, {"dropout": 0.5}, {"activation": "silu"}])
def test_a_linear_head_has_no_keys_of_the_mlp(tiny_llama, setting):
    with pytest.raises(ConfigurationError, match=rf"model\.{next(iter(setting))}: .* goes with model.head: mlp"):
        RewardNetwork.from_backbone(str(tiny_llama), head="linear", **setting)


def test_a_class_that_gives_another_score_is_refused(tiny_llama, monkeypatch):
    class FirstToken(LlamaForSequenceClassification):
        def forward(self, input_ids):
            return super().forward(input_ids[:, :1])

    monkeypatch.setattr(
        linear_head,
        "classifier_without_weights",
        lambda config: FirstToken(load_config(str(tiny_llama))),
    )
    with pytest.raises(ModelError, match="FirstToken of transformers gives a row another score"):
        RewardNetwork.from_backbone(str(tiny_llama), head="linear")
