"""Scorers: the same number for any batch, padding and way of loading, and the number that a plain loop finds."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_lightning.batches import ModelInputs
from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.models.causal_lm import CausalLM, Lora
from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.rewards import scorers as scoring
from rlhf_lightning.rewards.scorers import ImplicitScorer, RewardScorer, encode_rows
from rlhf_lightning.tiny import builtin_texts, make_tiny_model

PROMPTS = [
    [{"role": "user", "content": "Hello?"}],
    [{"role": "user", "content": "Where is the station, please? I have been looking for it all the morning."}],
    [
        {"role": "user", "content": "Help"},
        {"role": "assistant", "content": "Gladly."},
        {"role": "user", "content": "With the dishes, I mean."},
    ],
    [{"role": "user", "content": "Help"}],
    [{"role": "user", "content": "Good evening"}],
]
RESPONSES = ["Good day.", "I do not know, and I shall not ask anybody for you.", "No", "Of course, gladly.", ""]


@pytest.fixture(scope="module")
def reward_network(tiny_llama, tmp_path_factory):
    """A saved reward network with its tokenizer."""
    torch.manual_seed(0)
    network = RewardNetwork.from_backbone(str(tiny_llama)).eval()
    saved = network.save_pretrained(tmp_path_factory.mktemp("reward") / "network")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(saved)
    return saved


def saved_classifier(source, directory, *, labels=1):
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=labels)
    if hasattr(model, "score"):
        torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def classifier(tiny_qwen2, tmp_path_factory):
    """A saved sequence classifier with one label, a decoder."""
    return saved_classifier(tiny_qwen2, tmp_path_factory.mktemp("reward") / "classifier")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A model like `tiny_qwen2` with other weights."""
    directory = tmp_path_factory.mktemp("models") / "reference"
    return make_tiny_model(directory, builtin_texts(), initializer_range=0.2, seed=1)


@pytest.fixture(params=["network", "classifier", "encoder", "implicit", "reference_free"])
def make_scorer(request, tmp_path):
    """A function that makes a scorer of each kind."""
    get = request.getfixturevalue
    match request.param:
        case "network":
            return lambda **options: RewardScorer(str(get("reward_network")), **options)
        case "classifier":
            return lambda **options: RewardScorer(str(get("classifier")), **options)
        case "encoder":
            saved = saved_classifier(get("tiny_bert"), tmp_path / "encoder")
            return lambda **options: RewardScorer(str(saved), **options)
        case "implicit":
            names = [str(get(name)) for name in ("tiny_qwen2", "reference")]
            return lambda **options: ImplicitScorer(*names, **options)
        case "reference_free":
            return lambda **options: ImplicitScorer(str(get("tiny_qwen2")), length_norm="average", **options)


def values(scored):
    return torch.tensor([each.score for each in scored], dtype=torch.float64)


def test_any_batch_size_gives_the_same_scores(make_scorer):
    alone = make_scorer(batch_size=1)(PROMPTS, RESPONSES)
    together = make_scorer(batch_size=8)(PROMPTS, RESPONSES)
    torch.testing.assert_close(values(together), values(alone), rtol=0, atol=1e-5)
    assert values(alone).std() > 1e-3
    assert [each[1:] for each in alone] == [each[1:] for each in together]


@pytest.mark.parametrize("make_scorer", ["network", "classifier", "implicit", "reference_free"], indirect=True)
def test_padding_on_the_left_gives_the_same_scores(make_scorer, monkeypatch):
    scorer = make_scorer(batch_size=8)
    right = scorer(PROMPTS, RESPONSES)
    own = scoring.padded

    def on_the_left(rows, pad_id):
        tensors = own(rows, pad_id)
        shifts = [int((~mask).sum()) for mask in tensors[1]]
        return ModelInputs(
            *(torch.stack([row.roll(n) for row, n in zip(t, shifts, strict=True)]) for t in tensors.text)
        )

    monkeypatch.setattr(scoring, "padded", on_the_left)
    torch.testing.assert_close(values(scorer(PROMPTS, RESPONSES)), values(right), rtol=0, atol=1e-5)


def test_a_classifier_is_read_at_its_last_token_as_transformers_reads_a_row_alone(classifier):
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    form = ChatFormat(AutoTokenizer.from_pretrained(classifier))
    scored = RewardScorer(str(classifier))(PROMPTS, RESPONSES)
    for prompt, response, each in zip(PROMPTS, RESPONSES, scored, strict=True):
        text = form.prompt_text(prompt) + response + form.tokenizer.decode([form.eos_id])
        ids = torch.tensor([form.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            expected = model.score(model.model(ids).last_hidden_state)[0, -1, 0].item()
        assert each.score == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("length_norm", ["sum", "average"])
def test_the_implicit_reward_is_the_difference_of_log_probs_of_the_response_and_its_terminator(
    tiny_qwen2, reference, length_norm
):
    scored = ImplicitScorer(str(tiny_qwen2), str(reference), length_norm=length_norm)(PROMPTS, RESPONSES)
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    models = [
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64).eval() for name in (tiny_qwen2, reference)
    ]
    for prompt, response, each in zip(PROMPTS, RESPONSES, scored, strict=True):
        head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        tail = [*tokenizer(response)["input_ids"], tokenizer.eos_token_id] if response else [tokenizer.eos_token_id]
        ids = torch.tensor([head + tail])
        sums = []
        for model in models:
            with torch.no_grad():
                logprobs = F.log_softmax(model(ids).logits[0], dim=-1)
            places = range(len(head), len(head) + len(tail))
            sums.append(sum(logprobs[place - 1, ids[0, place]].item() for place in places))
        expected = (sums[0] - sums[1]) / (len(tail) if length_norm == "average" else 1)
        assert each.score == pytest.approx(expected, abs=2e-4)  # nats, float32 against float64
        assert each.tokens == len(tail)
        assert not each.truncated


def test_a_policy_is_worth_nothing_more_than_itself(tiny_qwen2):
    scorer = ImplicitScorer(str(tiny_qwen2), str(tiny_qwen2))
    assert {each.score for each in scorer(PROMPTS, RESPONSES)} == {0.0}


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_score_alike_merged_and_alone(tiny_qwen2, tmp_path, merge):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    policy = CausalLM.from_pretrained(str(tiny_qwen2), lora=Lora(r=4, lora_alpha=8.0)).eval()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    form = ChatFormat(AutoTokenizer.from_pretrained(tiny_qwen2))
    rows = scoring.padded(encode_rows(form, PROMPTS, RESPONSES, limit=None), form.pad_id)
    with torch.no_grad():
        expected = policy(*rows.text).sums
        with policy.adapters_off():
            expected -= policy(*rows.text).sums
    assert expected.abs().min() > 0.01
    saved = policy.save_pretrained(tmp_path / "saved", merge=merge)
    form.tokenizer.save_pretrained(saved)
    assert (saved / "config.json").is_file() == merge
    scored = ImplicitScorer(str(saved), str(tiny_qwen2))(PROMPTS, RESPONSES)
    torch.testing.assert_close(values(scored).float(), expected, rtol=0, atol=2e-4)


def test_a_row_that_is_too_long_loses_the_beginning_of_its_prompt_and_keeps_its_response(tiny_qwen2):
    form = ChatFormat(AutoTokenizer.from_pretrained(tiny_qwen2))
    whole = encode_rows(form, PROMPTS, RESPONSES, limit=None)
    limit = len(whole[2].prompt) + len(whole[2].response) - 1
    cut = encode_rows(form, PROMPTS, RESPONSES, limit=limit)
    assert [row.truncated for row in cut] == [len(row.prompt) + len(row.response) > limit for row in whole]
    assert [row.response for row in cut] == [row.response for row in whole]
    assert all(len(row.prompt) + len(row.response) <= limit for row in cut)
    last_turn = encode_rows(form, [PROMPTS[2][-1:]], ["x"], limit=None)[0].prompt
    assert cut[2].prompt == last_turn
    assert whole[1].prompt[-8:] == cut[1].prompt[-8:]


@pytest.mark.parametrize("limit", [2, 3, 7, 12])
def test_a_response_that_alone_is_too_long_keeps_its_end_and_one_token_before_it(tiny_qwen2, limit):
    form = ChatFormat(AutoTokenizer.from_pretrained(tiny_qwen2))
    whole = encode_rows(form, PROMPTS[1:2], [RESPONSES[1] * 3], limit=None)[0]
    row = encode_rows(form, PROMPTS[1:2], [RESPONSES[1] * 3], limit=limit)[0]
    assert row == ([whole.prompt[-1]], whole.response[-(limit - 1) :], True)


def test_truncated_rows_are_told_and_scored_as_the_rest_of_them(reward_network):
    long = [{"role": "user", "content": "Please help me with this, " * 30}]
    scorer = RewardScorer(str(reward_network), max_length=60)
    first, second = scorer([long, PROMPTS[0]], ["Gladly.", "Good day."])
    assert (first.truncated, second.truncated) == (True, False)
    row = encode_rows(scorer.chat_format, [long], ["Gladly."], limit=60)[0]
    ids = torch.tensor([row.prompt + row.response])
    assert ids.shape == (1, 60)
    expected = scorer.model(ids, torch.ones_like(ids, dtype=torch.bool)).item()
    assert first.score == pytest.approx(expected, abs=1e-5)


def test_scores_stay_float32_when_the_weights_are_bfloat16(classifier, reward_network):
    for name in (classifier, reward_network):
        scored = values(RewardScorer(str(name), dtype=torch.bfloat16)(PROMPTS, RESPONSES)).float()
        assert (scored != scored.bfloat16().float()).any()


def test_the_fingerprint_tells_what_decides_a_score_and_nothing_else(reward_network, tiny_qwen2, reference):
    first = RewardScorer(str(reward_network), batch_size=1)
    assert first.fingerprint == RewardScorer(str(reward_network), batch_size=8).fingerprint
    assert first.fingerprint != RewardScorer(str(reward_network), max_length=100).fingerprint
    policies = [
        ImplicitScorer(str(tiny_qwen2)),
        ImplicitScorer(str(reference)),
        ImplicitScorer(str(tiny_qwen2), str(reference)),
        ImplicitScorer(str(tiny_qwen2), str(tiny_qwen2)),
        ImplicitScorer(str(tiny_qwen2), length_norm="average"),
    ]
    assert len({each.fingerprint for each in policies}) == 5


def test_kinds_are_those_of_rewardbench(make_scorer, request):
    kinds = {
        "network": "Custom Classifier",
        "classifier": "Seq. Classifier",
        "encoder": "Seq. Classifier",
        "implicit": "DPO",
        "reference_free": "DPO Ref. Free",
    }
    assert make_scorer().kind == kinds[request.node.callspec.params["make_scorer"]]


def test_what_gives_no_score_is_refused(tiny_qwen2, tiny_bert, reward_network, tmp_path):
    with pytest.raises(ModelError, match="without a reward head"):
        RewardScorer(str(tiny_qwen2))
    with pytest.raises(ModelError, match="2 labels"):
        RewardScorer(str(saved_classifier(tiny_qwen2, tmp_path / "two", labels=2)))
    with pytest.raises(ModelError, match="reward network"):
        ImplicitScorer(str(reward_network))
    with pytest.raises(ConfigurationError, match="no room"):
        RewardScorer(str(reward_network), max_length=1)


def test_a_max_length_beyond_the_positions_is_set_to_them(tiny_qwen2, caplog):
    assert ImplicitScorer(str(tiny_qwen2), max_length=2048).limit == 2048
    assert "max_length" not in caplog.text
    assert ImplicitScorer(str(tiny_qwen2), max_length=4096).limit == 2048
    assert "max_length is 4096" in caplog.text


def test_a_reference_of_another_tokenizer_is_refused(tiny_qwen2, tmp_path):
    other = make_tiny_model(tmp_path / "other", ["an entirely different text, " * 9], vocab_size=300)
    with pytest.raises(ConfigurationError, match="other ids than that of"):
        ImplicitScorer(str(tiny_qwen2), str(other))


def test_adapters_whose_model_is_gone_are_refused_in_one_line(tiny_qwen2, tmp_path):
    pytest.importorskip("peft")
    policy = CausalLM.from_pretrained(str(tiny_qwen2), lora=Lora(r=4, lora_alpha=8.0))
    saved = policy.save_pretrained(tmp_path / "saved", merge=False)
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(saved)
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./nowhere"}))
    (saved / "rlhf_lightning.json").unlink()  # as somebody does who changes the files on purpose
    with pytest.raises(ModelError, match=r"\./nowhere, which is not here") as raised:
        ImplicitScorer(str(saved))
    assert "\n" not in str(raised.value)
