"""No weight is random, none is put on twice, and what is saved is configured as it was published."""

from __future__ import annotations

import fractions
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    Qwen2Config,
    XLNetConfig,
)

from rlhf_lightning.errors import ModelError
from rlhf_lightning.evaluation.judge import PolicyJudge
from rlhf_lightning.evaluation.text_classifier import TextClassifier
from rlhf_lightning.models.backbones import load_backbone
from rlhf_lightning.models.causal_lm import CausalLM, Lora
from rlhf_lightning.models.classifiers import load_classifier, token_head
from rlhf_lightning.models.configuration import load_config
from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.models.value_network import ValueNetwork
from rlhf_lightning.rewards.scorers import ImplicitScorer, RewardScorer

SIZE = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZE |= {"initializer_range": 0.3}


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(directory, *endings):
    """Take weights out of the files of a model."""
    file = next(directory.glob("*.safetensors"))
    weights = load_file(file)
    kept = {name: weight for name, weight in weights.items() if not name.endswith(endings)}
    assert len(kept) < len(weights)
    save_file(kept, file, metadata={"format": "pt"})


# ---- missing weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["tiny_qwen2", "tiny_bert"])
@pytest.mark.parametrize(
    "load",
    [RewardScorer, lambda name: TextClassifier(name, labels=["LABEL_0"])],
    ids=["reward", "text"],
)
def test_a_classifier_without_its_head_is_refused(request, tmp_path, source, load):
    source = request.getfixturevalue(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    load(str(tmp_path))
    without(tmp_path, "score.weight", "classifier.weight")
    with pytest.raises(ModelError, match=r"1 weights of a .* model are not in its files, the first (score|class)"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "load", [CausalLM.from_pretrained, load_backbone, ValueNetwork.from_pretrained, ImplicitScorer]
)
def test_a_model_without_its_embeddings_is_refused(tiny_qwen2, tmp_path, load):
    AutoModelForCausalLM.from_pretrained(tiny_qwen2).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(tmp_path)
    without(tmp_path, "embed_tokens.weight")
    with pytest.raises(ModelError, match=r"1 weights|2 weights of a qwen2 model are not in its files"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("lora", "missing"),
    [
        (Lora(r=2), "layers.1.self_attn.v_proj.lora_B.weight"),
        (Lora(r=2, modules_to_save=["norm"]), "model.norm.weight"),
    ],
    ids=["an adapter", "a layer trained whole"],
)
def test_adapters_that_lack_a_weight_or_have_one_too_many_are_refused(tiny_qwen2, tmp_path, lora, missing):
    policy = CausalLM.from_pretrained(str(tiny_qwen2), lora=lora)
    policy.save_pretrained(tmp_path, merge=False)
    CausalLM.from_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    (tmp_path / "rlhf_lightning.json").unlink()  # as who changes the weights on purpose is told to do
    save_file(weights | {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ModelError, match=r"in its file have no place in the model, the first .*lm_head"):
        CausalLM.from_pretrained(str(tmp_path))
    save_file({name: weight for name, weight in weights.items() if not name.endswith(missing)}, file)
    with pytest.raises(ModelError, match=f"not (in its file|be put on).*{missing.removesuffix('.weight')}"):
        CausalLM.from_pretrained(str(tmp_path))


def test_a_pickle_of_adapters_that_holds_more_than_tensors_is_refused_in_a_line(tiny_qwen2, tmp_path):
    CausalLM.from_pretrained(str(tiny_qwen2), lora=Lora(r=2)).save_pretrained(tmp_path, merge=False)
    (tmp_path / "rlhf_lightning.json").unlink()
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    file.unlink()
    torch.save(weights, tmp_path / "adapter_model.bin")
    CausalLM.from_pretrained(str(tmp_path))
    torch.save({"harmless": fractions.Fraction(1, 2)}, tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match="its adapters could not be read"):
        CausalLM.from_pretrained(str(tmp_path))


# ---- adapters beside weights -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tiny_qwen2, tmp_path_factory):
    """A merged model with the files of its adapters left beside it."""
    directory = tmp_path_factory.mktemp("both") / "model"
    torch.manual_seed(0)
    policy = CausalLM.from_pretrained(str(tiny_qwen2), lora=Lora(r=2))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    policy.save_pretrained(directory, merge=False)
    adapters = {file.name: file.read_bytes() for file in directory.glob("adapter*")}
    policy.save_pretrained(directory)
    for name, content in adapters.items():
        (directory / name).write_bytes(content)
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "load",
    [
        CausalLM.from_pretrained,
        load_backbone,
        ImplicitScorer,
        RewardScorer,
        lambda name: PolicyJudge(name, max_new_tokens=2),
    ],
    ids=["policy", "backbone", "implicit", "reward", "judge"],
)
def test_adapters_beside_whole_weights_are_refused(both, load):
    with pytest.raises(ModelError, match="holds whole weights and adapters, and"):
        load(str(both))


def test_adapters_beside_a_configuration_alone_are_put_on_their_base(tiny_qwen2, tmp_path):
    policy = CausalLM.from_pretrained(str(tiny_qwen2), lora=Lora(r=2))
    policy.save_pretrained(tmp_path, merge=False)
    (tmp_path / "config.json").write_bytes((tiny_qwen2 / "config.json").read_bytes())
    assert CausalLM.from_pretrained(str(tmp_path)).model.name_or_path == str(tmp_path)
    assert load_backbone(str(tmp_path)).config.model_type == "qwen2"


# ---- company ------------------------------------------------------------------------------------------------


def classifier(directory, config):
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    return str(directory), load_config(str(directory))


def test_a_classifier_that_reads_padding_is_refused(tmp_path):
    """XLNet's reads the last place of a row, which is padding in all rows but the longest."""
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "initializer_range": 0.3}
    name, config = classifier(tmp_path, XLNetConfig(vocab_size=60, num_labels=1, **sizes))
    with pytest.raises(ModelError, match=r"scores of a xlnet classifier .* change with its padding"):
        load_classifier(name, config)


POOLED = [BertConfig(**SIZE, num_labels=1), Qwen2Config(**SIZE, num_key_value_heads=2, num_labels=3)]


@pytest.mark.parametrize("config", POOLED)
def test_classifiers_that_do_not_are_loaded(tmp_path, config):
    name, config = classifier(tmp_path, config)
    model = load_classifier(name, config)
    assert (token_head(model) is None) is (config.model_type == "bert")
    assert not model.training


# ---- what is saved ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["policy", "reward network"])
def test_what_is_saved_has_the_dropout_and_the_cache_of_its_source(tiny_qwen2, tmp_path, kind):
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(tiny_qwen2).save_pretrained(source)
    edit(source / "config.json", attention_dropout=0.25, use_cache=True)
    make = CausalLM.from_pretrained if kind == "policy" else RewardNetwork.from_backbone
    model = make(str(source))
    inner = model.model if kind == "policy" else model.backbone
    assert (inner.config.attention_dropout, inner.config.use_cache) == (0.0, False)
    saved = model.save_pretrained(tmp_path / "saved")
    again = make(str(saved)).save_pretrained(tmp_path / "again")
    for directory in (saved, again):
        config = AutoConfig.from_pretrained(directory)
        assert (config.attention_dropout, config.use_cache) == (0.25, True)
    assert json.loads((saved / "config.json").read_text())["hidden_size"] == inner.config.hidden_size


def test_dropout_in_a_part_of_a_configuration_is_switched_off_and_saved_too(tmp_path):
    config = AutoConfig.for_model(
        "dbrx",
        vocab_size=60,
        d_model=32,
        n_layers=1,
        n_heads=4,
        max_seq_len=64,
        attn_config={"attn_pdrop": 0.5, "kv_n_heads": 2, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
    )
    config.save_pretrained(tmp_path)
    loaded = load_config(str(tmp_path))
    assert loaded.attn_config.attn_pdrop == 0.0
