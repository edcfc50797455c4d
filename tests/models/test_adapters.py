"""LoRA adapter directories, made by peft, as models: merged into the model that they belong to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from rlhf_lightning.data.tokenizer import has_tokenizer, load_tokenizer
from rlhf_lightning.errors import ModelError
from rlhf_lightning.files.adapters import hub_name
from rlhf_lightning.models.backbones import load_backbone
from rlhf_lightning.models.causal_lm import CausalLM, Lora
from rlhf_lightning.models.configuration import load_config
from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.rewards.scorers import RewardScorer, check_scores_rows

pytestmark = pytest.mark.filterwarnings(  # of peft, where these tests use it
    "ignore:.*is_gradient_checkpointing", "ignore:.*tie_word_embeddings", "ignore:.*tied", "ignore:.*save_embedding"
)
IDS = torch.arange(20)[None] + 5


def randomize(model: torch.nn.Module) -> None:
    """Give what adapters train loud weights: they begin without any effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def write_adapters(
    base: Path, directory: Path, *, auto_class: str = "AutoModelForCausalLM", vocabulary: int | None = None, **settings
) -> torch.Tensor:
    """Adapters of a base model, resized to a vocabulary, in a directory, as peft writes them.

    Returns their model's outputs on `IDS`, and of another vocabulary on its last ids.
    """
    import transformers
    from peft import LoraConfig, get_peft_model

    sizes = {"num_labels": 1} if "Classification" in auto_class else {}
    model = getattr(transformers, auto_class).from_pretrained(base, dtype=torch.float32, **sizes)
    if sizes:
        model.config.pad_token_id = 0
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary)
    settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]} | settings
    wrapped = get_peft_model(model, LoraConfig(**settings))
    randomize(wrapped)
    wrapped.save_pretrained(directory)
    with torch.no_grad():
        return wrapped.eval()(input_ids=IDS if vocabulary is None else last_ids(vocabulary))[0]


def last_ids(vocabulary: int) -> torch.Tensor:
    return torch.arange(vocabulary - 20, vocabulary)[None]


def point_at(directory: Path, base: str | None) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "lora_dropout": 0.5, "target_modules": "all-linear"},
        {"task_type": None},
        {"modules_to_save": ["norm"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"trainable_token_indices": [7, 8]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ],
    ids=[
        *("q and v", "DoRA", "rsLoRA, all linear", "no task", "norm whole", "tied lm_head", "both tied ends whole"),
        *("rows of tied ends", "PiSSA", "OLoRA"),
    ],
)
def test_adapters_are_merged_into_a_model_that_computes_what_peft_computes(tiny_qwen2, tmp_path, settings):
    expected = write_adapters(tiny_qwen2, tmp_path / "sft", **settings)
    policy = CausalLM.from_pretrained(str(tmp_path / "sft"))
    assert not policy.has_adapters
    assert all(each.requires_grad and each.dtype == torch.float32 for each in policy.parameters())
    with torch.no_grad():
        found = policy.model(input_ids=IDS).logits
        base = CausalLM.from_pretrained(str(tiny_qwen2)).model(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert (base - expected).abs().max() > 0.1, "the adapters are to do something"
    policy.save_pretrained(tmp_path / "whole")
    again = CausalLM.from_pretrained(str(tmp_path / "whole"))
    torch.testing.assert_close(again.model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-4)


WHOLE = {"modules_to_save": ["embed_tokens"]}


@pytest.fixture(scope="module")
def untied(tiny_llama, tmp_path_factory):
    """A Llama with an output layer of its own."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
    directory = tmp_path_factory.mktemp("untied")
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("base", ["untied", "tiny_qwen2"])
@pytest.mark.parametrize("difference", [3, -2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        WHOLE,
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        WHOLE | {"ensure_weight_tying": True},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        {"trainable_token_indices": [7, 8]},
    ],
    ids=["embeddings untrained", "embeddings whole", "both ends whole", "kept tied", "LoRA on both ends", "rows"],
)
def test_adapters_made_with_another_vocabulary_bring_it(request, tmp_path, base, difference, settings):
    start = request.getfixturevalue(base)
    vocabulary = load_config(str(start)).vocab_size + difference
    expected = write_adapters(start, tmp_path / "sft", vocabulary=vocabulary, **settings)
    assert load_config(str(tmp_path / "sft")).vocab_size == vocabulary
    policy = CausalLM.from_pretrained(str(tmp_path / "sft"))
    with torch.no_grad():
        found = policy.model(input_ids=last_ids(vocabulary)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert RewardNetwork.from_backbone(str(tmp_path / "sft")).backbone.config.vocab_size == vocabulary


def test_embeddings_that_adapters_bring_untrained_stay_tied(tiny_qwen2, tmp_path):
    vocabulary = load_config(str(tiny_qwen2)).vocab_size + 3
    write_adapters(tiny_qwen2, tmp_path, vocabulary=vocabulary)
    model = CausalLM.from_pretrained(str(tmp_path)).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_added_tokens_are_the_same_at_both_tied_ends_where_adapters_change_one(tiny_qwen2, tmp_path):
    vocabulary = load_config(str(tiny_qwen2)).vocab_size + 3
    expected = write_adapters(tiny_qwen2, tmp_path, vocabulary=vocabulary, target_modules=["q_proj", "embed_tokens"])
    with torch.no_grad():
        found = CausalLM.from_pretrained(str(tmp_path)).model(input_ids=last_ids(vocabulary)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_added_tokens_without_rows_of_the_output_layer_are_refused(untied, tmp_path):
    vocabulary = load_config(str(untied)).vocab_size + 3
    write_adapters(untied, tmp_path, vocabulary=vocabulary, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ModelError, match=r"3 tokens were added .* lm_head .*save_embedding_layers=True"):
        CausalLM.from_pretrained(str(tmp_path))


def test_a_base_of_the_hub_is_taken_from_its_cache_or_named(tiny_qwen2, tmp_path, monkeypatch):
    from huggingface_hub import constants

    expected = write_adapters(tiny_qwen2, tmp_path / "sft")
    point_at(tmp_path / "sft", "somebody/base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelError, match=r"sft: its base_model_name_or_path .* somebody/base: no such") as raised:
        CausalLM.from_pretrained(str(tmp_path / "sft"))
    assert "\n" not in str(raised.value)
    model = tmp_path / "hub" / "models--somebody--base"
    shutil.copytree(tiny_qwen2, model / "snapshots" / "0123")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123")
    policy = CausalLM.from_pretrained(str(tmp_path / "sft"))
    with torch.no_grad():
        torch.testing.assert_close(policy.model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-4)


def test_new_adapters_are_trained_on_the_merged_model_and_switching_them_off_gives_that_one(tiny_qwen2, tmp_path):
    expected = write_adapters(tiny_qwen2, tmp_path / "sft")
    policy = CausalLM.from_pretrained(str(tmp_path / "sft"), lora=Lora(r=2))
    randomize(policy)
    with torch.no_grad(), policy.adapters_off():
        torch.testing.assert_close(policy.model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        both = policy.model(input_ids=IDS).logits
    assert (both - expected).abs().max() > 0.1
    with pytest.raises(ModelError, match="itself adapters"):
        policy.save_pretrained(tmp_path / "second", merge=False)
    policy.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(
        CausalLM.from_pretrained(str(tmp_path / "whole")).model(input_ids=IDS).logits, both, rtol=1e-5, atol=1e-4
    )


def test_a_reward_model_begins_as_the_decoder_below_a_language_model_s_adapters(tiny_qwen2, tmp_path):
    write_adapters(tiny_qwen2, tmp_path / "sft")
    whole = CausalLM.from_pretrained(str(tmp_path / "sft")).save_pretrained(tmp_path / "whole")
    found, expected = (load_backbone(str(place)).state_dict() for place in (tmp_path / "sft", whole))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)
    network = RewardNetwork.from_backbone(str(tmp_path / "sft"))
    network.save_pretrained(tmp_path / "reward")
    published = json.loads((tiny_qwen2 / "config.json").read_text())
    saved = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert saved["use_cache"] == published["use_cache"]


# ---- classifiers --------------------------------------------------------------------------------------------


def test_adapters_of_a_classifier_with_one_label_are_a_reward_model_and_a_backbone(tiny_qwen2, tmp_path):
    logits = write_adapters(
        tiny_qwen2, tmp_path / "rm", auto_class="AutoModelForSequenceClassification", task_type="SEQ_CLS"
    )
    config = check_scores_rows(str(tmp_path / "rm"))
    assert (config.architectures, config.num_labels) == (["Qwen2ForSequenceClassification"], 1)
    scorer = RewardScorer(str(tmp_path / "rm"))
    mask = torch.ones_like(IDS, dtype=torch.bool)
    torch.testing.assert_close(scorer._scores(IDS, mask, mask), logits[:, 0], rtol=1e-5, atol=1e-5)
    assert load_backbone(str(tmp_path / "rm")).config.model_type == "qwen2"


def test_a_classifier_s_adapters_without_a_head_are_refused(tiny_qwen2, tmp_path):
    write_adapters(tiny_qwen2, tmp_path, auto_class="AutoModelForSequenceClassification", task_type=None)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"task_type": "SEQ_CLS"}))
    with pytest.raises(ModelError, match=r"score\.weight|2 labels"):
        RewardScorer(str(tmp_path))


def test_a_language_model_s_adapters_are_no_reward_model_and_a_classifier_s_no_policy(tiny_qwen2, tmp_path):
    write_adapters(tiny_qwen2, tmp_path / "sft")
    with pytest.raises(ModelError, match="without a reward head"):
        check_scores_rows(str(tmp_path / "sft"))
    write_adapters(tiny_qwen2, tmp_path / "rm", auto_class="AutoModelForSequenceClassification", task_type="SEQ_CLS")
    with pytest.raises(ModelError, match="task_type SEQ_CLS"):
        CausalLM.from_pretrained(str(tmp_path / "rm"))


# ---- what they name -----------------------------------------------------------------------------------------


def test_the_tokenizer_is_that_beside_the_adapters_and_else_their_base_s(tiny_qwen2, tmp_path):
    write_adapters(tiny_qwen2, tmp_path / "sft")
    assert has_tokenizer(str(tmp_path / "sft"))
    tokenizer = load_tokenizer(str(tmp_path / "sft"))
    assert tokenizer.get_vocab() == load_tokenizer(str(tiny_qwen2)).get_vocab()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "sft")
    assert load_tokenizer(str(tmp_path / "sft")).chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("base", "place"), [("base", "."), ("./base", "."), ("../base", "elsewhere")], ids=["here", "dot", "beside it"]
)
def test_a_relative_base_is_found_from_the_working_directory_and_beside_the_adapters(
    tiny_qwen2, tmp_path, monkeypatch, base, place
):
    expected = write_adapters(tiny_qwen2, tmp_path / "sft")
    shutil.copytree(tiny_qwen2, tmp_path / "base")
    point_at(tmp_path / "sft", base)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / place)
    adapters = os.path.relpath(tmp_path / "sft")
    torch.testing.assert_close(
        CausalLM.from_pretrained(adapters).model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-4
    )


def test_adapters_written_for_a_relative_path_load_from_another_working_directory(tiny_qwen2, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    shutil.copytree(tiny_qwen2, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    policy = CausalLM.from_pretrained("base", lora=Lora(r=2))
    randomize(policy)
    with torch.no_grad():
        expected = policy.eval().model(input_ids=IDS).logits
    policy.save_pretrained("out/adapters", merge=False)
    shutil.move("out/adapters", tmp_path / "moved")
    monkeypatch.chdir("/")
    for load in (AutoPeftModelForCausalLM.from_pretrained, lambda name: CausalLM.from_pretrained(name).model.eval()):
        with torch.no_grad():
            found = load(str(tmp_path / "moved"))(input_ids=IDS).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_card_names_a_model_of_the_hub_alone_also_below_adapters(tiny_qwen2, tmp_path):
    write_adapters(tiny_qwen2, tmp_path)
    assert [hub_name(each) for each in ("org/base", "builtin:tiny", str(tmp_path))] == ["org/base", None, None]
    point_at(tmp_path, "org/base")
    assert hub_name(str(tmp_path)) == "org/base"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "./nowhere"}, "which is not here"),
        ({"base_model_name_or_path": "."}, "its own directory"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "SEQ_2_SEQ_LM"),
    ],
    ids=["no base", "gone", "itself", "not LoRA", "other task"],
)
def test_adapters_of_nothing_here_are_refused_in_a_line(tiny_qwen2, tmp_path, monkeypatch, change, reason):
    write_adapters(tiny_qwen2, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | change))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=reason):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_adapters_whose_start_changed_the_weights_below_them_by_chance_or_data_are_refused(tiny_qwen2, tmp_path, start):
    """peft 0.21 loads PiSSA's of a randomized decomposition onto other weights than theirs, without a word."""
    write_adapters(tiny_qwen2, tmp_path / "sft", **({"init_lora_weights": start} if "pissa" in start else {}))
    file = tmp_path / "sft" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": start}))
    with pytest.raises(ModelError, match=f"began by {start}"):
        CausalLM.from_pretrained(str(tmp_path / "sft"))


@pytest.mark.parametrize("start", [False, "eva", "loftq", "pissa_niter_4"])
def test_a_start_that_is_another_model_or_needs_data_is_not_offered(start):
    with pytest.raises(ModelError, match=r"model\.lora\.init_lora_weights"):
        Lora(init_lora_weights=start)


def test_a_part_of_4_bit_weights_cannot_be_taken_off(tiny_qwen2):
    with pytest.raises(ModelError, match=r"model\.lora\.init_lora_weights: olora"):
        CausalLM.from_pretrained(str(tiny_qwen2), lora=Lora(init_lora_weights="olora"), load_in_4bit=True)


def test_adapters_below_four_bit_weights_are_refused(tiny_qwen2, tmp_path):
    write_adapters(tiny_qwen2, tmp_path)
    with pytest.raises(ModelError, match="load_in_4bit"):
        CausalLM.from_pretrained(str(tmp_path), lora=Lora(), load_in_4bit=True)


def test_a_merge_that_changes_the_outputs_is_refused(tiny_qwen2, tmp_path, monkeypatch):
    from peft import PeftModel

    write_adapters(tiny_qwen2, tmp_path)
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(ModelError, match="outputs differ"):
        CausalLM.from_pretrained(str(tmp_path))


def test_the_configuration_of_adapters_is_their_base_s(tiny_qwen2, tmp_path):
    write_adapters(tiny_qwen2, tmp_path)
    assert load_config(str(tmp_path)).to_dict() == load_config(str(tiny_qwen2)).to_dict()
