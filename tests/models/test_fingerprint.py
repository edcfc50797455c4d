"""Every byte of every weight counts, and the file or the name of a wrapper does not."""

from __future__ import annotations

import pytest
import torch

from rlhf_lightning.evaluation.judge import PolicyJudge
from rlhf_lightning.evaluation.text_classifier import TextClassifier
from rlhf_lightning.models.causal_lm import CausalLM, Lora
from rlhf_lightning.models.fingerprint import weights_fingerprint
from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.rewards.scorers import ImplicitScorer, RewardScorer


@pytest.fixture(scope="module")
def changed(tiny_qwen2, tmp_path_factory):
    """A model one number of which, in the middle of its embeddings, is another by one unit of its last place."""
    policy = CausalLM.from_pretrained(str(tiny_qwen2))
    row = policy.model.get_input_embeddings().weight.data[101]
    row[len(row) // 2 + 3] = torch.nextafter(row[len(row) // 2 + 3], torch.tensor(9.0))
    directory = tmp_path_factory.mktemp("changed") / "model"
    policy.save_pretrained(directory)
    for file in [*tiny_qwen2.glob("*token*"), *tiny_qwen2.glob("*.jinja")]:
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.mark.parametrize(
    "of",
    [
        lambda name: weights_fingerprint(CausalLM.from_pretrained(name).model),
        lambda name: CausalLM.from_pretrained(name, lora=Lora(r=2)).base_fingerprint,
        lambda name: ImplicitScorer(name).fingerprint,
        lambda name: PolicyJudge(name, max_new_tokens=4).fingerprint,
    ],
    ids=["reference", "base of adapters", "scorer", "judge"],
)
def test_a_weight_changed_in_its_last_place_is_seen_in_every_fingerprint(tiny_qwen2, changed, of):
    torch.manual_seed(0)
    first = of(str(tiny_qwen2))
    torch.manual_seed(1)  # new adapters are no part of their base
    assert of(str(tiny_qwen2)) == first != of(str(changed))


def test_classifiers_and_reward_models_are_told_apart_by_any_weight(tiny_bert, tiny_qwen2, tmp_path):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    network = RewardNetwork.from_backbone(str(tiny_qwen2))
    classifier = AutoModelForSequenceClassification.from_pretrained(str(tiny_bert), num_labels=2)
    seen = []
    for round_ in range(2):
        network.save_pretrained(tmp_path / f"network {round_}")
        classifier.save_pretrained(tmp_path / f"classifier {round_}")
        for made, source in (("network", tiny_qwen2), ("classifier", tiny_bert)):
            for file in source.glob("*token*"):
                (tmp_path / f"{made} {round_}" / file.name).write_bytes(file.read_bytes())
        text = TextClassifier(str(tmp_path / f"classifier {round_}"), labels=["LABEL_1"])
        seen += [weights_fingerprint(text.model), RewardScorer(str(tmp_path / f"network {round_}")).fingerprint]
        with torch.no_grad():
            network.backbone.get_input_embeddings().weight[50, 7] += 1e-6
            classifier.base_model.get_input_embeddings().weight[50, 7] += 1e-6
    assert len(set(seen)) == 4


def test_names_shapes_dtypes_and_bytes_count():
    layer = torch.nn.Linear(2, 2)
    first = weights_fingerprint(layer)
    with torch.no_grad():
        layer.weight[1, 1] += 1e-7
    assert weights_fingerprint(layer) != first
    assert weights_fingerprint(layer, ignore=("weight",)) != weights_fingerprint(layer)
    assert weights_fingerprint(layer.bfloat16()) != weights_fingerprint(layer.float())
    layer.bias.requires_grad_(False)
    frozen = weights_fingerprint(layer, frozen_alone=True)
    with torch.no_grad():
        layer.weight[1, 1] += 1
    assert weights_fingerprint(layer, frozen_alone=True) == frozen == weights_fingerprint(layer, ignore=("weight",))


def test_a_single_number_and_an_empty_tensor_are_hashed_too():
    module = torch.nn.ParameterDict({"scale": torch.tensor(2.0), "none": torch.zeros(0, 3)})
    first = weights_fingerprint(module)
    with torch.no_grad():
        module["scale"].add_(1e-6)
    assert weights_fingerprint(module) != first
