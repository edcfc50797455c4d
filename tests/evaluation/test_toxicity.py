"""Toxicity: labels found or asked for, windows, failures, statistics against their definitions; and lists of words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, RobertaConfig
from transformers import RobertaForSequenceClassification as Roberta

from rlhf_lightning.errors import ConfigurationError, DataError, ModelError
from rlhf_lightning.evaluation.estimates import wilson
from rlhf_lightning.evaluation.text_classifier import TextClassifier
from rlhf_lightning.evaluation.toxicity import (
    Lexicon,
    ToxicityScorer,
    summarise_lexicon,
    summarise_toxicity,
    toxicity_change,
)

RUDE = ["you stupid oaf", "what a stupid idea, you oaf", "go away, oaf"]
KIND = ["good morning", "that is a lovely idea", "thank you, my friend"]
LONG = " ".join(["that is a lovely idea, my friend, and a good morning to you."] * 12)


@pytest.fixture(scope="module")
def make_classifier(tiny_bert, tmp_path_factory):
    """Trains a tiny classifier to tell RUDE from KIND, and saves it."""

    def make(labels, *, problem_type=None, positions=32, rude=(1,), kind="roberta"):
        tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
        tokenizer.model_max_length = 10**30
        sizes = {
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "pad_token_id": tokenizer.pad_token_id,
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": problem_type,
        }
        torch.manual_seed(0)
        if kind == "roberta":
            offset = tokenizer.pad_token_id + 1
            config = RobertaConfig(**sizes, max_position_embeddings=positions + offset, type_vocab_size=1)
            model = Roberta(config)
        else:
            model = BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=positions))
        batch = tokenizer([*RUDE, *KIND], padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        wanted = torch.zeros(6, len(labels))
        for place in range(6):
            wanted[place, list(rude) if place < 3 else [i for i in range(len(labels)) if i not in rude][:1]] = 1
        several = problem_type == "multi_label_classification" or len(labels) == 1
        if several:
            wanted[3:] = 0
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(40):
            logits = model.train()(**batch).logits
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)
            if not several:
                loss = torch.nn.functional.cross_entropy(logits, wanted)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        directory = tmp_path_factory.mktemp("classifier")
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return str(directory)

    return make


@pytest.fixture(scope="module")
def binary(make_classifier):
    return make_classifier(["neutral", "toxic"])


def own_probabilities(name, texts, activation):
    """Each text alone through the model, [texts, labels]."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    config = json.loads((Path(name) / "config.json").read_text())
    model = (Roberta if config["model_type"] == "roberta" else BertForSequenceClassification).from_pretrained(name)
    model.eval()
    rows = []
    for text in texts:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
        rows.append(logits.sigmoid() if activation == "sigmoid" else logits.softmax(-1))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("labels", "problem_type", "rude", "found", "activation"),
    [
        (["neutral", "toxic"], None, (1,), ["toxic"], "softmax"),
        (["nothate", "hate"], None, (1,), ["hate"], "softmax"),
        (["hate", "Not-Hate"], "single_label_classification", (0,), ["hate"], "softmax"),
        (["non-toxic", "toxic"], None, (1,), ["toxic"], "softmax"),
        (["LABEL_0", "LABEL_1"], None, (1,), ["LABEL_1"], "softmax"),
        (["insult", "toxic", "severe_toxic"], "multi_label_classification", (1, 2), ["toxic"], "sigmoid"),
        (["severe_toxicity", "insult"], "multi_label_classification", (0,), ["severe_toxicity"], "sigmoid"),
        (["toxicity"], None, (0,), ["toxicity"], "sigmoid"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value),
)
def test_labels_and_activation_are_found(make_classifier, labels, problem_type, rude, found, activation):
    name = make_classifier(labels, problem_type=problem_type, rude=rude)
    scorer = ToxicityScorer(name)
    assert (scorer.labels, scorer.activation) == (found, activation)
    scores = scorer([*RUDE, *KIND])
    expected = own_probabilities(name, [*RUDE, *KIND], activation)[:, labels.index(found[0])]
    assert scores == pytest.approx(expected.tolist(), abs=1e-6)
    assert min(scores[:3]) > 0.6
    assert max(scores[3:]) < 0.4


@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [
        (["negative", "positive"], None),
        (["neutral", "safe"], None),
        (["neutral", "hate", "offensive"], None),
        (["toxic", "hate", "neutral"], None),
        (["LABEL_0", "LABEL_1", "LABEL_2"], "multi_label_classification"),
        (["LABEL_0"], None),
    ],
    ids=str,
)
def test_labels_that_cannot_be_told_are_asked_for_in_one_line(make_classifier, labels, problem_type):
    name = make_classifier(labels, problem_type=problem_type, rude=(0,))
    with pytest.raises(ConfigurationError, match="name them with toxic_labels") as caught:
        ToxicityScorer(name)
    assert "\n" not in str(caught.value)
    assert labels[0] in str(caught.value)
    assert ToxicityScorer(name, toxic_labels=labels[:1]).labels == labels[:1]


def test_labels_asked_for_add_up_under_softmax_and_the_highest_counts_under_sigmoid(make_classifier):
    labels = ["neutral", "hate", "insult"]
    name = make_classifier(labels, rude=(1,))
    expected = own_probabilities(name, RUDE, "softmax")[:, 1:].sum(1)
    assert ToxicityScorer(name, toxic_labels=["hate", "insult"])(RUDE) == pytest.approx(expected.tolist(), abs=1e-6)
    with pytest.raises(ConfigurationError, match="label 'rude' is not one of its labels, neutral, hate, insult"):
        ToxicityScorer(name, toxic_labels=["rude"])
    name = make_classifier(labels, rude=(1,), problem_type="multi_label_classification")
    expected = own_probabilities(name, RUDE, "sigmoid")[:, 1:].amax(1)
    assert ToxicityScorer(name, toxic_labels=["insult", "hate"])(RUDE) == pytest.approx(expected.tolist(), abs=1e-6)


def test_any_batch_size_gives_the_same_scores(binary):
    texts = [*RUDE, LONG, *KIND, "", LONG + RUDE[0]]
    whole = ToxicityScorer(binary)(texts)
    for size in (1, 2, 5):
        assert ToxicityScorer(binary, batch_size=size)(texts) == pytest.approx(whole, abs=1e-6)


def test_a_long_text_is_as_toxic_as_its_worst_window(binary):
    scorer = ToxicityScorer(binary)
    tokenizer, worst = scorer.tokenizer, []
    for text in (f"{LONG} {RUDE[0]}", f"{RUDE[1]} {LONG}", f"{LONG} {RUDE[2]} {LONG}"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        room = 32 - 2
        starts = range(0, len(ids) - 4, room - 4)
        parts = [[1, *ids[start : start + room], 2] for start in starts]
        assert len(parts) > 4
        with torch.no_grad():
            each = [scorer.model(torch.tensor([part])).logits.softmax(-1)[0, 1].item() for part in parts]
        assert scorer([text]) == pytest.approx([max(each)], abs=1e-6)
        assert max(each) - min(each) > 0.05
        worst.append(each.index(max(each)))
    assert max(worst) > 0


def test_a_text_that_cannot_be_scored_is_none_and_spoils_no_other(binary):
    scorer = ToxicityScorer(binary)
    scores = scorer([RUDE[0], "half a pair \ud800", KIND[0]])
    assert scores[1] is None
    assert [scores[0], scores[2]] == pytest.approx(scorer([RUDE[0], KIND[0]]), abs=1e-6)
    with torch.no_grad():
        scorer.model.classifier.out_proj.bias[0] = math.nan
    assert scorer([RUDE[0], KIND[0]]) == [None, None]


def test_what_is_no_classifier_is_refused_in_one_line(tiny_bert, tiny_qwen2, make_classifier):
    for name in (tiny_bert, tiny_qwen2):
        with pytest.raises(ModelError, match="without a classification head"):
            ToxicityScorer(str(name))
    with pytest.raises(ModelError, match="a regression, whose output is no probability"):
        ToxicityScorer(make_classifier(["toxic"], problem_type="regression", rude=(0,)))


def test_a_pair_is_read_with_both_of_its_sides(make_classifier):
    name = make_classifier(["NORMAL", "REJECTION"], kind="bert")
    classifier = TextClassifier(name, labels=["REJECTION"])
    prompts, texts = ["good morning", "you oaf"], ["go away", "my friend"]
    model, tokenizer = classifier.model, classifier.tokenizer
    expected = []
    for prompt, text in zip(prompts, texts, strict=True):
        encoded = tokenizer(prompt, text, return_tensors="pt", return_token_type_ids=True)
        with torch.no_grad():
            expected.append(model(encoded["input_ids"]).logits.softmax(-1)[0, 1].item())
    assert classifier(texts, prompts=prompts) == pytest.approx(expected, abs=1e-6)
    assert classifier(texts) != pytest.approx(expected, abs=1e-4)
    assert classifier([LONG], prompts=[LONG])[0] is not None


NAN = math.nan
SCORES = np.array(
    [[0.1, 0.9, 0.2, 0.5], [0.0, 0.1, 0.05, 0.3], [0.6, 0.7, 0.8, 0.95], [0.2, 0.49, 0.0, 0.1], [0.3, 0.3, 0.6, 0.2]]
)


def test_statistics_are_those_of_their_definitions():
    found = summarise_toxicity(SCORES, method="m", resamples=200).all
    assert (found.prompts, found.replies, found.failed) == (5, 4, 0)
    assert found.mean.value == pytest.approx(SCORES.mean(), abs=1e-12)
    assert found.rate.value == pytest.approx(7 / 20, abs=1e-12)
    assert found.expected_max.value == pytest.approx((0.9 + 0.3 + 0.95 + 0.49 + 0.6) / 5, abs=1e-12)
    assert found.prob_any == wilson(3, 5)
    assert found.p95.value == pytest.approx(np.sort(SCORES.ravel())[18] * 0.95 + 0.95 * 0.05, abs=1e-12)
    for estimate in (found.mean, found.rate, found.p95, found.expected_max, found.prob_any):
        assert estimate.low < estimate.value < estimate.high
        assert estimate.n == 5


def test_a_failure_is_counted_and_never_zero():
    scores = SCORES.copy()
    scores[0, 1] = scores[1] = NAN
    found = summarise_toxicity(scores, method="m", resamples=100).all
    assert (found.prompts, found.failed) == (5, 5)
    assert found.mean.value == pytest.approx(np.mean([np.mean([0.1, 0.2, 0.5]), *SCORES[2:].mean(1)]), abs=1e-12)
    assert found.mean.n == 4
    assert found.expected_max.value == pytest.approx((0.95 + 0.49 + 0.6) / 3, abs=1e-12)
    assert found.expected_max.n == found.prob_any.n == 3
    assert found.p95.value == pytest.approx(np.percentile([0.1, 0.2, 0.5, *SCORES[2:].ravel()], 95), abs=1e-12)


def test_where_nothing_could_be_scored_toxicity_is_not_measured():
    with pytest.raises(ConfigurationError, match="fewer than two have a response"):
        summarise_toxicity(np.full((3, 2), NAN), method="m")
    few = np.array([[0.5, NAN], [0.2, NAN], [NAN, 0.1]])
    found = summarise_toxicity(few, method="m", resamples=50).all
    assert (found.expected_max, found.prob_any) == (None, None)


def test_the_change_is_paired():
    generator = np.random.default_rng(0)
    before = generator.beta(0.5, 2, size=(60, 1)) * np.ones((1, 4))
    after = np.clip(before - 0.05, 0, 1)
    found = toxicity_change(before, after, resamples=500)
    apart = [summarise_toxicity(scores, method="m", resamples=500).all for scores in (before, after)]
    assert found.mean.value == pytest.approx(apart[1].mean.value - apart[0].mean.value, abs=1e-12)
    assert found.expected_max.value == pytest.approx((after.max(1) - before.max(1)).mean(), abs=1e-12)
    assert found.prob_any.value == pytest.approx(apart[1].prob_any.value - apart[0].prob_any.value, abs=1e-12)
    assert found.rate.value == pytest.approx(apart[1].rate.value - apart[0].rate.value, abs=1e-12)
    assert found.p95.value == pytest.approx(apart[1].p95.value - apart[0].p95.value, abs=1e-12)
    assert (found.p95.low, found.p95.high) == pytest.approx((-0.05, -0.05), abs=1e-12)
    assert found.mean.high < 0
    assert apart[1].mean.high > apart[0].mean.low


def test_the_change_is_over_the_prompts_that_both_have_scores_for():
    before, after = SCORES.copy(), SCORES - 0.0
    before[0], after[1], after[2, 0] = NAN, NAN, NAN
    found = toxicity_change(before, after, resamples=50)
    assert (found.prompts, found.expected_max.n) == (3, 2)
    with pytest.raises(ConfigurationError, match="fewer than two prompts"):
        toxicity_change(SCORES[:2], np.full((2, 4), NAN))


@pytest.fixture
def lexicon(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("# mild ones\nOaf\n\nnaïve twit\nstraße\n", encoding="utf-8")
    return Lexicon(file)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("You OAF!", True),
        ("you (oaf)", True),
        ("ｏａｆ in wide letters", True),
        ("o\u0301af with an accent", True),
        ("a loaf of bread, for oafs", False),
        ("oaf_2", False),
        ("what a naive  TWIT", True),
        ("naïve\ntwit", True),
        ("naïve", False),
        ("STRASSE", True),
        ("mild ones", False),
        ("", False),
    ],
)
def test_words_are_found_whole_whatever_their_case_and_accents(lexicon, text, found):
    assert lexicon([text]) == [found]


def test_the_rate_of_listed_words_stands_under_its_own_name(lexicon):
    found = summarise_lexicon(np.array([[True, False], [False, False], [True, True]]), lexicon=lexicon)
    assert found.lexicon_rate == wilson(1.5, 3)
    assert (found.lexicon, found.words) == ("words.txt", 3)


def test_a_list_without_words_is_refused(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n\n")
    with pytest.raises(DataError, match=r"empty\.txt: the list holds no word"):
        Lexicon(empty)
    with pytest.raises(DataError, match="cannot be read"):
        Lexicon(tmp_path / "absent.txt")
