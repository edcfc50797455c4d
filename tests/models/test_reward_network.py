"""RewardNetwork and its head: the same score for any padding, float32 arithmetic, exact save and load."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.configuration import load_config
from rlhf_lightning.models.reward_network import RewardHead, RewardNetwork, pooling_of

VOCAB = 200


MODELS = ["tiny_qwen2", "tiny_llama", "tiny_bert"]


def built(request, pooling):
    torch.manual_seed(0)
    return RewardNetwork.from_backbone(str(request.getfixturevalue(request.param)), pooling=pooling).eval()


@pytest.fixture(params=MODELS)
def network(request):
    return built(request, "last")


@pytest.fixture(params=MODELS)
def averaging(request):
    return built(request, "mean")


@pytest.fixture(params=MODELS)
def layered(request):
    return built(request, "layers")


def rows(lengths=(5, 9, 1, 7)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCAB, (n,), generator=generator) for n in lengths]


def padded(sequences, *, left=0, right=0, pad_id=0):
    """Rows between `left` and `right` extra columns of padding; each row is put at the left end of its room."""
    width = max(map(len, sequences)) + left + right
    ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        ids[i, left : left + len(sequence)] = sequence
        mask[i, left : left + len(sequence)] = True
    return ids, mask


@torch.no_grad()
def one_by_one(network, sequences):
    return torch.cat([network(s[None], torch.ones(1, len(s), dtype=torch.bool)) for s in sequences])


@torch.no_grad()
@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 6), (4, 0), (3, 5)])
@pytest.mark.parametrize("pad_id", [0, 2, 7])
def test_padding_on_any_side_and_of_any_id_changes_no_score(network, left, right, pad_id):
    """Id 2 is the EOS token (or SEP), 7 an ordinary one: the mask alone says what is padding."""
    scores = network(*padded(rows(), left=left, right=right, pad_id=pad_id))
    torch.testing.assert_close(scores, one_by_one(network, rows()), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("left", "right"), [(0, 6), (4, 0), (3, 5)])
def test_a_mean_is_over_the_tokens_of_the_row_alone(averaging, left, right):
    scores = averaging(*padded(rows(), left=left, right=right, pad_id=7))
    for sequence, score in zip(rows(), scores, strict=True):
        hidden = averaging.backbone(sequence[None]).last_hidden_state[0].double().mean(dim=0)
        torch.testing.assert_close(score, averaging.score(hidden), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("left", "right"), [(0, 6), (4, 0), (3, 5)])
def test_the_means_of_the_embeddings_and_of_all_layers_stand_side_by_side(layered, left, right):
    scores = layered(*padded(rows(), left=left, right=right, pad_id=7))
    for sequence, score in zip(rows(), scores, strict=True):
        means = []
        for states in layered.backbone(sequence[None], output_hidden_states=True).hidden_states:
            found = states[0].double()
            found = found - found.mean(dim=1, keepdim=True)
            means.append((found / (found.var(dim=1, correction=0, keepdim=True) + 1e-5).sqrt()).mean(dim=0))
        assert len(means) == layered.backbone.config.num_hidden_layers + 1
        torch.testing.assert_close(score, layered.score(torch.cat(means)), rtol=0, atol=1e-5)


@torch.no_grad()
def test_how_a_network_pools_is_saved_with_it(averaging, layered, tmp_path):
    for network, pooling in ((averaging, "mean"), (layered, "layers")):
        loaded = RewardNetwork.from_pretrained(network.save_pretrained(tmp_path / pooling))
        assert loaded.pooling == pooling == pooling_of(loaded.backbone.config)
        assert torch.equal(loaded(*padded(rows())), network(*padded(rows())))


def test_other_models_pool_in_no_way_of_ours(tiny_qwen2):
    assert pooling_of(load_config(str(tiny_qwen2))) is None


@torch.no_grad()
def test_pad_and_eos_ids_inside_a_row_do_not_move_the_pooled_position(network):
    sequence = torch.tensor([8, 0, 2, 9, 0, 2])
    (score,) = network(*padded([sequence], right=4, pad_id=0))
    hidden = network.backbone(sequence[None]).last_hidden_state[0, -1]
    torch.testing.assert_close(score, network.score(hidden), rtol=0, atol=1e-5)


@torch.no_grad()
def test_appending_an_eos_token_changes_the_score(network):
    sequence = rows((6,))[0]
    longer = torch.cat([sequence, torch.tensor([2])])
    assert (one_by_one(network, [sequence]) - one_by_one(network, [longer])).abs().item() > 1e-3


@torch.no_grad()
def test_a_pair_in_one_forward_scores_as_in_two(network):
    a, b = rows((6, 9))
    torch.testing.assert_close(network(*padded([a, b])), one_by_one(network, [a, b]), rtol=0, atol=1e-5)


def test_a_row_without_tokens_is_refused(network):
    ids, mask = padded(rows())
    mask[1] = False
    with pytest.raises(ValueError, match="row"):
        network(ids, mask)


def test_two_forwards_in_train_mode_are_equal_because_dropout_is_off(tmp_path, tiny_bert):
    directory = shutil.copytree(tiny_bert, tmp_path / "bert")
    config = json.loads((directory / "config.json").read_text())
    assert config["hidden_dropout_prob"] == 0.1, "the fixture should come with dropout"
    network = RewardNetwork.from_backbone(str(directory)).train()
    batch = padded(rows())
    torch.testing.assert_close(network(*batch), network(*batch), rtol=0, atol=0)


def test_every_parameter_gets_a_gradient(network, layered):
    for each in (network, layered):
        each.train()(*padded(rows())).sum().backward()
        assert [name for name, parameter in each.named_parameters() if parameter.grad is None] == []


def test_head_is_the_documented_mlp():
    head = RewardHead(12, hidden_size=7)
    assert [type(layer).__name__ for layer in head] == ["Linear", "ReLU", "Linear"]
    assert [tuple(p.shape) for p in head.parameters()] == [(7, 12), (7,), (1, 7), (1,)]
    hidden = torch.randn(3, 12)
    first, last = head[0], head[2]
    by_hand = torch.stack(
        [last.weight[0] @ (first.weight @ row + first.bias).clamp(min=0) + last.bias[0] for row in hidden]
    )
    torch.testing.assert_close(head(hidden), by_hand)


@pytest.mark.parametrize("size", [16, 400])
def test_last_layer_begins_with_std_one_over_root_h_plus_one_and_zero_biases(size):
    torch.manual_seed(0)
    stacked = torch.cat([RewardHead(size)[-1].weight.flatten() for _ in range(200)])
    assert stacked.std().item() == pytest.approx((size + 1) ** -0.5, rel=0.05)
    head = RewardHead(size)
    assert head[0].bias.abs().max() == 0
    assert head[-1].bias.abs().max() == 0


def test_dropout_of_the_head_acts_in_train_mode_only():
    head = RewardHead(64, dropout=0.5)
    assert [type(layer).__name__ for layer in head] == ["Linear", "ReLU", "Dropout", "Linear"]
    hidden = torch.randn(5, 64)
    assert not torch.equal(head.train()(hidden), head(hidden))
    assert torch.equal(head.eval()(hidden), head(hidden))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_computes_in_float32_under_half_weights_and_autocast(dtype):
    """1 + 2^-12 survives float32 and is lost in either half type."""
    head = RewardHead(2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head[0].weight[:] = torch.eye(2)
        head[2].weight[:] = 1.0
    hidden = torch.tensor([[1.0, 2.0**-12]])
    expected = torch.tensor([1.0 + 2.0**-12])
    with torch.autocast("cpu", dtype):
        assert torch.equal(head(hidden), expected)
    scores = head.to(dtype)(hidden)
    assert head(hidden.to(dtype)).dtype == torch.float32, "half-precision hidden states, as under DeepSpeed"
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"hidden_size": 9, "activation": "tanh", "dropout": 0.25}])
@pytest.mark.parametrize("model", ["tiny_qwen2", "tiny_bert"])
def test_saved_and_loaded_scores_are_equal(request, tmp_path, model, settings):
    network = RewardNetwork.from_backbone(str(request.getfixturevalue(model)), **settings).eval()
    loaded = RewardNetwork.from_pretrained(network.save_pretrained(tmp_path / "saved"))
    batch = padded(rows())
    assert not loaded.training
    assert torch.equal(network(*batch), loaded(*batch))


def test_saved_directory_names_its_weights_as_a_sequence_classifier(tmp_path, tiny_qwen2):
    from safetensors import safe_open

    directory = RewardNetwork.from_backbone(str(tiny_qwen2)).save_pretrained(tmp_path / "saved")
    with safe_open(directory / "model.safetensors", framework="pt") as stored:
        names = set(stored.keys())
    assert {"score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"} <= names
    assert all(name.startswith(("model.", "score.")) for name in names)
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForRewardModel"]
    assert config["num_labels"] == 1


@torch.no_grad()
def test_saving_over_the_directory_loaded_from_is_safe(tmp_path, tiny_qwen2):
    network = RewardNetwork.from_backbone(str(tiny_qwen2)).eval()
    network.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "notes.txt").write_text("kept")
    again = RewardNetwork.from_pretrained(tmp_path / "saved")
    again.save_pretrained(tmp_path / "saved")
    batch = padded(rows())
    assert torch.equal(RewardNetwork.from_pretrained(tmp_path / "saved")(*batch), network(*batch))
    assert (tmp_path / "saved" / "notes.txt").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"], "nothing half-written is left beside it"


@torch.no_grad()
def test_the_backbone_of_a_saved_network_loads_with_transformers(tmp_path, tiny_qwen2):
    from transformers import AutoModel

    network = RewardNetwork.from_backbone(str(tiny_qwen2), head="linear").eval()
    backbone = AutoModel.from_pretrained(network.save_pretrained(tmp_path / "saved")).eval()
    ids = rows((7,))[0][None]
    assert torch.equal(backbone(ids).last_hidden_state, network.backbone(ids).last_hidden_state)


def test_a_model_without_a_head_is_no_reward_network(tiny_qwen2):
    with pytest.raises(ModelError, match=r"without a reward head.*train one"):
        RewardNetwork.from_pretrained(tiny_qwen2)


def test_a_saved_network_that_lost_its_head_weights_is_refused(tmp_path, tiny_qwen2):
    from safetensors.torch import load_file, save_file

    directory = RewardNetwork.from_backbone(str(tiny_qwen2)).save_pretrained(tmp_path / "saved")
    tensors = load_file(directory / "model.safetensors")
    (directory / "rlhf_lightning.json").unlink()  # as who changes the weights on purpose is told to do
    save_file(
        {k: v for k, v in tensors.items() if not k.startswith("score")},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ModelError, match=r"score\.\* weights do not make up the head"):
        RewardNetwork.from_pretrained(directory)
