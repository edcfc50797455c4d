"""What a reward model is shown: the scores that transformers itself gives of the text that is meant."""

from __future__ import annotations

import logging

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_lightning.data.chat_text import TRANSCRIPT
from rlhf_lightning.errors import ConfigurationError, DataError, ModelError
from rlhf_lightning.rewards.functions import check_text_of
from rlhf_lightning.rewards.scorers import RewardScorer
from tests.rewards.test_scorers import PROMPTS, RESPONSES, saved_classifier, values

ENDED = [True, False, False, True, True]
JINJA = (
    "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' }}[{{ m.role }}] {{ m.content | trim }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %} (over)<|im_end|>"
)


@pytest.fixture(scope="module")
def classifiers(tiny_qwen2, tiny_bert, tmp_path_factory):
    """A decoder of random weights that has a chat template, and an encoder that has none, each with a score."""
    directory = tmp_path_factory.mktemp("classifiers")
    made = {
        "decoder": saved_classifier(tiny_qwen2, directory / "decoder"),
        "encoder": saved_classifier(tiny_bert, directory / "encoder"),
    }
    put_between_pairs(made["encoder"])
    return made


def put_between_pairs(directory):
    """Let the tokenizer of an encoder take two texts, as BERT's own does."""
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(directory, model_input_names=names)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save_pretrained(directory)


def theirs(directory, *texts, special=True, **more):
    """Scores by transformers, row by row; a decoder's at its last token, as its own pooling has it without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    model.config.pad_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = []
    for row in zip(*texts, strict=True):
        batch = tokenizer(*row, return_tensors="pt", add_special_tokens=special, **more)
        batch = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            found.append(model(**batch).logits[0, 0].item())
    return torch.tensor(found, dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


WORDS = ["\n".join(message["content"] for message in prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_plain_is_the_words_as_the_tokenizer_takes_any_text(classifiers, kind, batch_size):
    scorer = RewardScorer(str(classifiers[kind]), chat_template="plain", batch_size=batch_size)
    expected = theirs(classifiers[kind], [f"{a}\n{b}" for a, b in zip(WORDS, RESPONSES, strict=True)])
    close(values(scorer(PROMPTS, RESPONSES)), expected)
    close(values(scorer(PROMPTS, RESPONSES, ENDED)), expected)
    assert (values(RewardScorer(str(classifiers[kind]))(PROMPTS, RESPONSES)) - expected).abs().max() > 0.01


def test_a_pair_is_the_tokenizers_two_texts_with_their_types(classifiers):
    directory = classifiers["encoder"]
    expected = theirs(directory, WORDS, RESPONSES, return_token_type_ids=True)
    close(values(RewardScorer(str(directory), chat_template="pair")(PROMPTS, RESPONSES, ENDED)), expected)
    untyped = theirs(directory, WORDS, RESPONSES, return_token_type_ids=False)
    assert (untyped - expected)[:4].abs().min() > 1e-3


def test_a_pair_of_which_nothing_parts_the_texts_is_refused(classifiers):
    with pytest.raises(ModelError, match="nothing between the two texts"):
        RewardScorer(str(classifiers["decoder"]), chat_template="pair")


def test_a_jinja_file_is_the_whole_text_and_no_token_more(classifiers, tmp_path):
    file = tmp_path / "reward.jinja"
    file.write_text(JINJA)
    directory = classifiers["decoder"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    scorer = RewardScorer(str(directory), chat_template=str(file))
    replies = ["(over)", " Yes (over)", "assistant", "[user] No", " "]
    chats = [[*p, {"role": "assistant", "content": r}] for p, r in zip(PROMPTS, replies, strict=True)]
    texts = [tokenizer.apply_chat_template(chat, chat_template=JINJA, tokenize=False) for chat in chats]
    close(values(scorer(PROMPTS, replies)), theirs(directory, texts, special=False))
    cut = [text if end else text.removesuffix(" (over)<|im_end|>") for text, end in zip(texts, ENDED, strict=True)]
    close(values(scorer(PROMPTS, replies, ENDED)), theirs(directory, cut, special=False))
    file.write_text("{{ raise_exception('no') }}")
    with pytest.raises(DataError, match=r"reward_chat_template: .*no"):
        RewardScorer(str(directory), chat_template=str(file))


@pytest.mark.parametrize(("kind", "template"), [("decoder", None), ("decoder", TRANSCRIPT), ("encoder", None)])
def test_a_response_without_an_end_is_scored_as_it_stands(classifiers, kind, template):
    """As the policy wrote it: a reward model that reads an EOS there scored it 0.4 higher. SEP ends any text."""
    scorer = RewardScorer(str(classifiers[kind]), chat_template=template)
    form = scorer.chat_format
    end = form.tokenizer.decode([form.eos_id])
    texts = [
        form.prompt_text(prompt) + form.response_text(response) + (end if complete else "")
        for prompt, response, complete in zip(PROMPTS, RESPONSES, ENDED, strict=True)
    ]
    if kind == "encoder":
        texts = ["[CLS]" + text.removesuffix(end) + end for text in texts]
    expected = theirs(classifiers[kind], texts, special=False)
    close(values(scorer(PROMPTS, RESPONSES, ENDED)), expected)
    whole = values(scorer(PROMPTS, RESPONSES))
    changed = (whole - expected).abs() > 1e-4
    assert changed.tolist() == [kind == "decoder" and not complete for complete in ENDED]


@pytest.mark.parametrize("template", ["plain", "pair"])
def test_a_row_that_is_too_long_keeps_the_first_special_tokens_and_the_response(classifiers, template):
    scorer = RewardScorer(str(classifiers["encoder"]), chat_template=template, max_length=20)
    whole = RewardScorer(str(classifiers["encoder"]), chat_template=template)
    cut, full = (each._rows(PROMPTS[1:2], ["Go on."], None)[0] for each in (scorer, whole))
    assert (cut.truncated, full.truncated) == (True, False)
    assert cut.response == full.response
    assert scorer.tokenizer.decode(full.response[:-1]).strip() == "Go on."
    ids = [*full.prompt, *full.response]
    assert [*cut.prompt, *cut.response] == [ids[0], *ids[-19:]]


@pytest.mark.parametrize(
    ("template", "words"), [(None, "<|im_start|>user\nPROMPT<|im_end|>"), ("plain", "PROMPT\nRESPONSE")]
)
def test_the_text_of_a_reward_model_is_said(classifiers, caplog, template, words):
    with caplog.at_level(logging.INFO):
        RewardScorer(str(classifiers["decoder"]), chat_template=template)
    (line,) = [record.getMessage() for record in caplog.records if "reads" in record.getMessage()]
    assert repr(words)[1:-1] in line


def test_templates_that_nothing_reads_are_refused(classifiers):
    with pytest.raises(ConfigurationError, match="nowhere"):
        RewardScorer(str(classifiers["decoder"]), chat_template="nowhere.jinja")
    for model in ("some.module:function", None):
        with pytest.raises(ConfigurationError, match="held_out"):
            check_text_of(model, "plain", "held_out")
    check_text_of(None, None)
