"""Kinds of tokenizers with shapes of templates: ids are those of the whole text, and a reply's text is its own."""

from __future__ import annotations

import functools

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer

from rlhf_lightning.data.chat_export import save_tokenizer
from rlhf_lightning.data.chat_format import ChatFormat, load_chat_format
from rlhf_lightning.errors import DataError, ModelError
from rlhf_lightning.rewards.scorers import encode_rows
from rlhf_lightning.rollouts import Responses
from tests.data.chat_formats import CHATML, byte_tokenizer
from tests.data.families import KINDS, TEMPLATES, family
from tests.data.test_tokenization import example, tokenize

USER = {"role": "user", "content": "How do I boil an egg?"}
TALK = [USER, {"role": "assistant", "content": "  Slowly.\n"}, {"role": "user", "content": "    and then\n"}]
TEXTS = [
    "Bring water to a gentle boil.",
    " Bring",
    "  Indented code\n    more",
    "\n\nTwo lines",
    "\nOne",
    "1. One\n2. Two",
    "- a\n- b\n\n- c",
    "\tif x:\n\t\treturn 1",
    "é ü 中文 🙂",
    "'s fine",
    "...",
    "Trailing  ",
    "line\n",
    "a\u00a0b <b>bold</b> $$x^2$$",
]
THINKING = [text for thought in ("Let me see.", "a\n\nb") for text in (f"<think>\n{thought}\n</think>\n\nAn answer.",)]


@functools.cache
def chat_format(kind, template, special=True, **arguments):
    return ChatFormat(family(kind, template, special=special), chat_template_kwargs=arguments)


def encoded(form, messages, *responses):
    prompts = form.encode_turns([(messages, form.generation_text(messages))])
    (row,) = form.encode_responses(prompts, [responses])
    if isinstance(row, DataError):
        raise row
    return row


def whole_text(form, messages, response):
    """Up to the end of the turn, as transformers renders it."""
    if form.template is None:
        return form.prompt_text(messages) + ("" if response[:1].isspace() else " ") + response
    whole = [*messages, {"role": "assistant", "content": response}]
    text = form.tokenizer.apply_chat_template(whole, tokenize=False, **form.chat_template_kwargs)
    if form.end is None:
        return text.removesuffix("\n\n") if "###" in text else text
    return text[: text.rindex(form.end) + len(form.end)]


def ids_of(form, text):
    """As the tokenizer itself makes them, with one start token."""
    start = form.tokenizer("x")["input_ids"][:1] if form.start_ids else []
    ids = form.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if ids[: len(start)] == start else [*start, *ids]


MERGED = {"blank at the border": 10} | dict.fromkeys(("chatml", "blank before the end", "zephyr", "alpaca", "phi 3"), 2)
"""Rows of those below in which a token reaches over the border: a line break to the next, in byte-level BPE alone, or a
blank to its word."""


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_of_a_row_are_those_of_its_whole_text(kind, template):
    form, merged = chat_format(kind, template), 0
    for messages in ([USER], TALK):
        asked = ids_of(form, form.generation_text(messages))
        for response in TEXTS + (THINKING if template in READ_THOUGHTS else []):
            row = encoded(form, messages, response, "Another.")
            ids = [*row.prompt, *row.responses[0]]
            expected = ids_of(form, whole_text(form, messages, response))
            expected += [] if form.end else [form.eos_id]
            if ids == expected:
                assert row.prompt == (asked if template != "r1" else ids_of(form, form.prompt_text(messages)))
                continue
            merged += 1
            assert row.prompt == asked  # what a policy is asked with, which could sample no others
            assert expected[: len(asked)] != asked
            assert form.tokenizer.decode(ids) == form.tokenizer.decode(expected)
    sentencepiece = kind not in ("byte-level", "prefix blank")
    assert merged == (0 if sentencepiece and template != "blank at the border" else MERGED.get(template, 0))


NO_END = ("alpaca", "glm", "transcript")
"""Nothing ends an assistant turn that another follows."""


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_earlier_assistant_turn_has_the_ids_that_a_policy_would_have_sampled(kind, template):
    form = chat_format(kind, template)
    for words in ("Slowly.", "1. One\n2. Two", "é ü 中文 🙂"):
        messages = [USER, {"role": "assistant", "content": words}, {"role": "user", "content": "and then?"}]
        (prompt,) = form.encode_turns([(messages, form.generation_text(messages))])
        ((start, stop),) = form.assistant_turns(prompt)
        found, alone = prompt.ids[start:stop], encoded(form, [USER], words).responses[0]
        if template in NO_END:
            assert form.eos_id not in found
            alone = alone[:-1]
        else:
            assert found[-1] == form.eos_id
        if template == "blank at the border":  # the token of the first word begins in the header
            assert words.endswith(form.tokenizer.decode(found[:-1]).strip())
        elif template.startswith(("qwen 3", "r1", "glm")):  # the last turn has a thought, if an empty one
            assert alone[-len(found) :] == found
            assert words in form.tokenizer.decode(found)
        else:
            assert found == alone


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_is_the_text_whose_ids_it_has(kind, template):
    form = chat_format(kind, template)
    stripped = "trim" in (form.template or "") or "strip()" in (form.template or "")
    for response in TEXTS + (THINKING if template in (*READ_THOUGHTS, "r1") else []):
        row = encoded(form, TALK, response)
        if row.prompt != ids_of(form, form.generation_text(TALK)):
            assert template == "r1" and "</think>" not in response  # noqa: PT018
            continue
        for end in (None, -1) if not form.response_trail else (None,):  # ended, and not
            text = form.reply_text(row.prompt, row.responses[0][:end])
            assert encoded(form, TALK, text) == row, response
            if end is None and template != "glm":  # that one has its own blanks around a thought
                wanted = response.strip() if stripped else response
                same = text == wanted or (template in ("cohere", "transcript") and text.lstrip() == wanted.lstrip())
                assert same, (text, wanted)  # there, texts that differ in their first blank have one row


@pytest.mark.parametrize("template", ["chatml", "llama 2", "zephyr", "vicuna", "qwen 3", "r1", "transcript"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scored", [False, True], ids=["asked", "scored"])
def test_an_exported_tokenizer_has_the_ids_of_the_training(kind, template, scored, tmp_path):
    form = chat_format(kind, template)
    save_tokenizer(form, tmp_path, scored=scored)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    again = ChatFormat(tokenizer)
    for messages in ([USER], TALK):
        prompts = form.encode_turns([(messages, form.generation_text(messages))])
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert asked == prompts[0].ids
        assert len(form.start_ids) <= 1
        assert asked[1:].count(1) == asked.count(1) - (asked[0] == 1)
        for response in (TEXTS[0], TEXTS[1], TEXTS[5]):
            row = encoded(form, messages, response)
            whole = [*messages, {"role": "assistant", "content": response}]
            written = tokenizer.apply_chat_template(whole, return_dict=False)
            assert written[: None if scored else len(row.prompt) + len(row.responses[0])] == [
                *row.prompt,
                *row.responses[0],
            ]
            assert encoded(again, messages, response) == row
            if scored:
                pair = [
                    {**turn, "role": role} for turn, role in zip([USER, whole[-1]], ("query", "document"), strict=True)
                ]
                alone = tokenizer.apply_chat_template([USER, whole[-1]], return_dict=False)
                assert tokenizer.apply_chat_template(pair, return_dict=False) == alone
    if scored:
        assert tokenizer.pad_token_id not in (None, form.eos_id)


@pytest.mark.parametrize(
    ("kind", "template"),
    [
        ("prepend", "chatml"),
        ("first", "zephyr"),
        ("llama", "llama 2"),
        ("byte-level", "qwen 3"),
        ("always", "transcript"),
    ],
)
def test_a_pair_is_encoded_as_its_responses_are_scored(kind, template):
    form = chat_format(kind, template)
    texts = [text for text in TEXTS if text.strip() != TEXTS[0]]
    pairs, _ = tokenize([example(TALK, TEXTS[0], text, row) for row, text in enumerate(texts)], form)
    for row, text in enumerate(texts):
        prompt, *sides = (part.tolist() for part in pairs.segments(row))
        scored = encode_rows(form, [TALK, TALK], [TEXTS[0], text], limit=None)
        assert [(each.prompt, each.response) for each in scored] == [(prompt, side) for side in sides]


def test_ids_that_no_text_has_are_read_as_their_text():
    form = chat_format("first", "zephyr")  # after the header a policy may begin with a blank, which no data has
    prompt = ids_of(form, form.generation_text([USER]))
    own, other = (form.tokenizer.convert_tokens_to_ids(token) for token in ("B", "▁a"))
    assert form.reply_text(prompt, [own]) == "B"
    assert form.reply_text(prompt, [other, other, form.eos_id]) == " a a"
    assert form.reply_text(prompt, []) == form.reply_text(prompt, [form.eos_id]) == ""
    start = form.tokenizer.bos_token_id
    assert form.reply_text(prompt, [other, start, own]) == " aB"  # control tokens are no text


def test_the_reward_model_reads_the_indent_of_a_reply():
    form = chat_format("prepend", "llama 2")
    prompt = ids_of(form, form.generation_text([USER]))
    ids = encoded(form, [USER], "x\n  def f():\n    pass").responses[0][3:-1]  # without `▁x` and the line break
    row = torch.tensor([*prompt, *ids, form.eos_id])
    responses = Responses([row], [len(prompt)], torch.tensor([True]))
    assert responses.texts(form) == [" def f():\n    pass"]  # one blank is the template's


# ---- where a turn ends ---------------------------------------------------------------------------------------

ENDS = {
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama 3": "<|eot_id|>",
    "phi 3": "<|end|>",  # EOS follows the last turn alone
    "cohere": "<|end|>",  # the second of two tokens
    "llama 2": "</s>",
    "vicuna": "</s>",
    "alpaca": "</s>",  # where the template writes none
    "transcript": "</s>",
}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(("template", "end"), ENDS.items())
def test_a_turn_ends_as_the_template_ends_it(template, end, special):
    form = chat_format("byte-level", template, special)
    assert form.tokenizer.convert_ids_to_tokens(form.eos_id) == end
    assert encoded(form, [USER], "Bring water.").responses[0][-1] == form.eos_id


def test_a_turn_that_ends_with_no_token_is_refused():
    tokenizer = byte_tokenizer("<|endoftext|>", CHATML, eos_token="<|endoftext|>")
    with pytest.raises(ModelError, match=r"ends a response with '<\|im_end\|>', which is no token"):
        ChatFormat(tokenizer)
    tokenizer = family("prepend", "alpaca")
    tokenizer.add_tokens(["<|im_end|>"])  # found in normalized text alone, where it has a blank before it
    tokenizer.chat_template = CHATML
    with pytest.raises(ModelError, match=r"ends a response with '<\|im_end\|>', which is no token"):
        ChatFormat(tokenizer)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("template", "marks"),
    {
        "chatml": ["<|im_end|>", "<|im_start|>"],
        "gemma": ["<end_of_turn>", "<start_of_turn>"],
        "cohere": ["<|response|>", "<|turn|>"],
        "zephyr": ["<|user|>", "<|assistant|>"],  # plain text to its tokenizer
        "llama 2": ["[INST]", "[/INST]"],
        "qwen 3": ["<|im_end|>"],
    }.items(),
)
def test_what_the_template_writes_around_turns_is_refused_within_them(template, marks, special):
    form = chat_format("byte-level", template, special)
    for mark in marks:
        assert form.control_token_in(["", f"So.{mark}\nObey."]) == mark
        with pytest.raises(DataError, match="control token"):
            tokenize([example(chosen=f"So.{mark}\nObey.")], form)
    assert form.control_token_in(["<think>\nSo.\n</think>", "user assistant <b> [x]"]) is None


def test_marks_that_are_merely_added_tokens_are_no_text_of_a_reply():
    marks = "<turn:user> <turn:assistant> <turn:end>"  # of no well-known model
    template = (
        "{% for m in messages %}{{ '<turn:' + m.role + '>' + m.content + '<turn:end>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<turn:assistant>' }}{% endif %}"
    )
    tokenizer = byte_tokenizer("</s>", template, eos_token="</s>")
    tokenizer.add_tokens(
        [AddedToken(mark, special=False, normalized=False) for mark in (*marks.split(), "user", "<b>")]
    )
    form = ChatFormat(tokenizer)
    for mark in marks.split():
        assert form.control_token_in([f"So.{mark}"]) == mark
    assert form.control_token_in(["user <b> <turn:> turn:end"]) is None
    prompt = ids_of(form, form.generation_text([USER]))
    reply = tokenizer("So.<turn:user>Go <b>on", add_special_tokens=False)["input_ids"]
    assert form.reply_text(prompt, [*reply, form.eos_id]) == "So.Go <b>on"


@pytest.mark.parametrize(
    ("template", "said"),
    [("blank at the border", "' ', which the tokenizer joins"), ("r1", "begins a thought, '<think>"), ("qwen 3", None)],
)
def test_a_prompt_that_is_asked_otherwise_than_it_is_learned_is_said(template, said, tmp_path, caplog):
    family("first", template).save_pretrained(tmp_path)
    load_chat_format(str(tmp_path))
    assert [record.levelname for record in caplog.records] == (["WARNING"] if said else [])
    assert said is None or said in caplog.text


# ---- thoughts ------------------------------------------------------------------------------------------------

READ_THOUGHTS = ("qwen 3", "qwen 3, opened", "glm")
THOUGHT = "<think>\nLet me see.\n</think>\n\nAn answer."


def decoded(form, *responses):
    row = encoded(form, [USER], *responses)
    head = form.tokenizer.decode(ids_of(form, form.prompt_text([USER])))
    prompt = form.tokenizer.decode(row.prompt)
    assert prompt.startswith(head)
    return [prompt.removeprefix(head), *map(form.tokenizer.decode, row.responses)]


def test_a_response_with_a_thought_of_its_own_has_no_empty_one_before_it():
    for arguments in ({}, {"enable_thinking": True}):
        form = chat_format("byte-level", "qwen 3", **arguments)
        empty = "<think>\n\n</think>\n\nPlain.<|im_end|>"
        assert decoded(form, "Plain.", THOUGHT) == ["", empty, THOUGHT + "<|im_end|>"]
        assert form.opening == ""  # so that a policy can think
    form = chat_format("byte-level", "qwen 3", enable_thinking=False)
    assert decoded(form, "Plain.", "Other.") == ["<think>\n\n</think>\n\n", "Plain.<|im_end|>", "Other.<|im_end|>"]
    assert decoded(form, "Plain.", THOUGHT) == ["", empty, THOUGHT + "<|im_end|>"]  # one prompt for both
    assert form.generation_text([USER]).endswith("assistant\n<think>\n\n</think>\n\n")


def test_a_template_that_opens_a_thought_asks_for_one():
    form = chat_format("byte-level", "r1")
    assert form.generation_text([USER]).endswith("<|Assistant|><think>\n")
    rest = "Let me see.\n</think>\n\nAn answer."
    expected = ["<think>\n", rest + "</s>", "So.\n</think>\n\nYes.</s>"]
    assert decoded(form, THOUGHT, "<think>So.\n</think>\n\nYes.") == expected  # the line break is the prompt's
    assert decoded(form, rest, "So.\n</think>\n\nYes.") == expected  # data as a policy wrote them
    assert decoded(form, "Plain.", THOUGHT) == ["", "Plain.</s>", THOUGHT + "</s>"]
    prompt = ids_of(form, form.generation_text([USER]))
    reply = form.tokenizer(rest, add_special_tokens=False)["input_ids"]
    assert form.reply_text(prompt, [*reply, form.eos_id]) == THOUGHT
    assert form.reply_text(prompt, reply[:4]).startswith("<think>\nLet")


def test_a_template_that_would_write_a_second_thought_is_not_given_the_first():
    form = ChatFormat(byte_tokenizer("<|im_start|> <|im_end|>", ALWAYS_EMPTY, eos_token="<|im_end|>"))
    assert decoded(form, "Plain.", "Other.")[1] == "<think>\n\n</think>\n\nPlain.<|im_end|>"
    with pytest.raises(DataError, match="empty thought before a response that has one"):
        encoded(form, [USER], THOUGHT)
    scored = encode_rows(form, [[USER]], [THOUGHT], limit=None)  # what is to be scored is written as it stands
    assert form.tokenizer.decode(scored[0].response) == THOUGHT + "<|im_end|>"


ALWAYS_EMPTY = CHATML.replace(
    "m.content +", "('<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' else '') + m.content +"
)


def test_a_response_whose_words_the_template_changes_is_refused():
    form = chat_format("byte-level", "qwen 3")
    with pytest.raises(DataError, match="changes the words"):
        encoded(form, [USER], "Before <think>a</think> b")  # the template leaves out what is before a thought
    form = ChatFormat(
        byte_tokenizer(
            "<|im_end|>", CHATML.replace("m.content +", "m.content | replace('x', 'y') +"), eos_token="<|im_end|>"
        )
    )
    with pytest.raises(DataError, match="changes the words"):
        tokenize([example(chosen="x")], form)


@pytest.mark.parametrize("value", [True, False])
def test_an_exported_template_writes_an_empty_thought_once(value, tmp_path):
    form = chat_format("byte-level", "qwen 3", enable_thinking=value)
    save_tokenizer(form, tmp_path)
    text = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [USER], tokenize=False, add_generation_prompt=True
    )
    assert text == form.generation_text([USER])
    assert text.count("<think>") == (not value)
