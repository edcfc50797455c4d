"""Pairs as token ids: one start token, one eos, the same rule for both sides, and responses never cut."""

from __future__ import annotations

import string
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.examples import LoadReport, PreferenceExample
from rlhf_lightning.data.selection import TokenizedPairs
from rlhf_lightning.data.tokenized import TokenStore, write_store
from rlhf_lightning.data.tokenizer import load_tokenizer
from rlhf_lightning.errors import DataError, ModelError
from tests.data.chat_formats import CHATML, FORMATS, LLAMA2, UNSTABLE, byte_tokenizer

QWEN = FORMATS["qwen"].chat_format


def example(prompt="Hi there", chosen="Well.", rejected="No!", row=0, margin=None):
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return PreferenceExample(messages, chosen, rejected, margin, f"id-{row}", f"pairs.jsonl, row {row}")


def tokenize(examples, chat_format=QWEN, *, max_length=1000, on_bad_rows="error", **options):
    with tempfile.TemporaryDirectory() as directory:  # the mapped file outlives its name
        write_store(Path(directory), examples, LoadReport("pairs.jsonl", rows_read=len(examples)), chat_format)
        store = TokenStore(directory)
    store.report.enforce(on_bad_rows)
    return TokenizedPairs.fitting([store], [np.ones(len(store), dtype=bool)], max_length=max_length, **options)


def text_of(chat_format, ids):
    return chat_format.tokenizer.backend_tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def texts_of(pairs, chat_format, index=0):
    return tuple(text_of(chat_format, ids) for ids in pairs.segments(index))


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def known(request):
    return request.param


def test_a_row_is_what_the_model_was_made_for(known):
    chat_format = known.chat_format
    pairs, _ = tokenize([example()], chat_format)
    rejected = known.response.replace("Well.", "No!")
    assert texts_of(pairs, chat_format) == (known.prompt, known.response, rejected)


def test_a_row_has_one_start_token_and_one_terminator_after_the_response(known):
    chat_format = known.chat_format
    pairs, _ = tokenize([example()], chat_format)
    prompt, *sides = pairs.segments(0)
    start = chat_format.tokenizer("x")["input_ids"][0]
    if start in chat_format.tokenizer.all_special_ids:
        assert [start] == [i for i in prompt if i == start]
        assert prompt[0] == start
    for ids in sides:
        assert ids[-1] == chat_format.eos_id
        assert np.count_nonzero(ids == chat_format.eos_id) == 1


def test_prompt_ids_are_a_prefix_of_the_ids_of_the_whole_row(known):
    chat_format = known.chat_format
    pairs, _ = tokenize([example()], chat_format)
    prompt, chosen, _ = pairs.segments(0)
    whole = chat_format.token_ids([known.prompt + known.response])[0]
    assert [*prompt, *chosen] == whole


def test_the_tiny_models_make_rows_of_their_kind(tiny_qwen2, tiny_bert, tiny_llama):
    for directory in (tiny_qwen2, tiny_llama):
        chat_format = ChatFormat(load_tokenizer(str(directory)))
        pairs, _ = tokenize([example()], chat_format)
        assert texts_of(pairs, chat_format)[:2] == (FORMATS["qwen"].prompt, FORMATS["qwen"].response)
    chat_format = ChatFormat(load_tokenizer(str(tiny_bert)))
    pairs, _ = tokenize([example()], chat_format)
    assert texts_of(pairs, chat_format)[:2] == (FORMATS["encoder"].prompt, FORMATS["encoder"].response)


def test_a_conversation_is_written_turn_by_turn():
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    pairs, _ = tokenize([example(prompt)])
    assert texts_of(pairs, QWEN)[0] == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = FORMATS["plain without bos"].chat_format
    pairs, _ = tokenize([example(prompt)], plain)
    assert texts_of(pairs, plain)[0] == "Be kind.\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:"


@pytest.mark.parametrize(
    ("name", "response", "expected"),
    [
        ("qwen", " Well.\n", " Well.\n<|im_end|>"),
        ("llama 3", " Well.\n", "Well.<|eot_id|>"),
        ("llama 2", "\nWell. ", " Well. </s>"),
        ("plain without bos", " Well.", " Well.<|endoftext|>"),
        ("plain without bos", "\nWell.", "\nWell.<|endoftext|>"),
    ],
)
def test_outer_blanks_of_a_response_are_treated_as_the_template_treats_them(name, response, expected):
    chat_format = FORMATS[name].chat_format
    pairs, _ = tokenize([example(chosen=response)], chat_format)
    assert texts_of(pairs, chat_format)[1] == expected


@pytest.mark.parametrize(
    ("name", "pad"), [("qwen", "<|endoftext|>"), ("pad is eos", "<|im_end|>"), ("no eos, no pad", "<|im_end|>")]
)
def test_padding_is_the_pad_token_or_the_terminator_where_there_is_none(name, pad):
    chat_format = FORMATS[name].chat_format
    assert chat_format.pad_id == chat_format.tokenizer.convert_tokens_to_ids(pad)


def test_a_row_is_the_same_whatever_rows_are_tokenized_with_it():
    examples = [example(f"Question {i}?", "A" * (i + 1), "B" * (9 - i), row=i) for i in range(5)]
    together, _ = tokenize(examples)
    for index, alone in enumerate(tokenize([one])[0] for one in examples):
        for a, b in zip(together.segments(index), alone.segments(0), strict=True):
            assert a.tolist() == b.tolist()


def test_pairs_carry_ids_margins_and_the_length_of_their_longer_row():
    pairs, _ = tokenize([example(margin=0.25, row=3), example("x", "a", "abcd", row=4)])
    assert pairs.example_ids == ["id-3", "id-4"]
    assert pairs.margin.tolist() == [0.25, 0.0]
    assert pairs.margin.dtype == np.float32
    assert len(pairs) == 2
    frame = len(QWEN.token_ids([FORMATS["qwen"].prompt.replace("Hi there", "")])[0])
    assert pairs.lengths.tolist() == [frame + 8 + 5 + 1, frame + 1 + 4 + 1]


def cut_prompt(format_name, max_length, prompt=string.ascii_lowercase):
    chat_format = FORMATS[format_name].chat_format
    pairs, report = tokenize([example(prompt)], chat_format, max_length=max_length)
    return texts_of(pairs, chat_format), pairs, report


def full_length(format_name, prompt=string.ascii_lowercase):
    chat_format = FORMATS[format_name].chat_format
    return int(tokenize([example(prompt)], chat_format)[0].lengths[0])


@pytest.mark.parametrize("name", FORMATS)
def test_a_long_prompt_is_cut_from_the_left_and_keeps_its_frame_and_the_response(name):
    for less in (1, 3, 25):
        (prompt, chosen, rejected), pairs, report = cut_prompt(name, full_length(name) - less)
        assert prompt == FORMATS[name].prompt.replace("Hi there", string.ascii_lowercase[less:])
        assert chosen == FORMATS[name].response
        assert rejected == FORMATS[name].response.replace("Well.", "No!")
        assert pairs.lengths[0] == full_length(name) - less
        assert len(report.rows_cut) == 1
        assert report.bad_rows == {}


@pytest.mark.parametrize("name", FORMATS)
def test_a_pair_of_whose_prompt_nothing_would_stay_is_dropped_and_counted(name):
    chat_format = FORMATS[name].chat_format
    long, short = example(string.ascii_lowercase), example("z", row=1)
    pairs, report = tokenize([long, short], chat_format, max_length=full_length(name) - 25)
    assert len(pairs) == 2
    long = example(string.ascii_lowercase, chosen="Well.!")
    pairs, report = tokenize([long, short], chat_format, max_length=full_length(name) - 25)
    assert pairs.example_ids == ["id-1"]
    assert report.bad_rows == {"too_long": ["pairs.jsonl, row 0"]}
    assert len(report.rows_cut) == 0


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_the_longer_response_decides_what_is_cut(longer):
    whole, _ = tokenize([example(string.ascii_lowercase, **{longer: "Longer."})])
    pairs, _ = tokenize([example(string.ascii_lowercase, **{longer: "Longer."})], max_length=int(whole.lengths[0]) - 1)
    assert pairs.lengths.tolist() == [whole.lengths[0] - 1]
    assert texts_of(pairs, QWEN)[0] == FORMATS["qwen"].prompt.replace("Hi there", string.ascii_lowercase[1:])


def test_a_conversation_loses_whole_turns_before_its_last_question_is_cut():
    turns = [("user", "A" * 9), ("assistant", "B" * 9), ("user", "C" * 9), ("assistant", "D" * 9), ("user", "E" * 9)]
    prompt = [{"role": role, "content": content} for role, content in turns]
    whole = int(tokenize([example(prompt)])[0].lengths[0])
    rest = {start: tokenize([example(prompt[start:])])[0] for start in (2, 4)}
    for less in range(1, whole - int(rest[4].lengths[0]) + 9):
        pairs, report = tokenize([example(prompt)], max_length=whole - less)
        text = texts_of(pairs, QWEN)[0]
        fitting = next((p for p in rest.values() if p.lengths[0] <= whole - less), None)
        expected = QWEN.prompt_text([{"role": "user", "content": "E" * (9 - less + whole - int(rest[4].lengths[0]))}])
        assert text == (expected if fitting is None else texts_of(fitting, QWEN)[0])
        assert pairs.lengths[0] == len(QWEN.token_ids([text])[0]) + 6
        assert report.rows_cut == ["pairs.jsonl, row 0"]


def test_a_row_of_exactly_max_length_is_not_cut():
    _, _, report = cut_prompt("qwen", full_length("qwen"))
    assert (len(report.rows_cut), report.rows_dropped) == (0, 0)


def test_truncation_drop_leaves_a_long_pair_out_and_says_how_long_it_is():
    pairs, report = tokenize([example("long" * 9), example("x", row=1)], max_length=60, truncation="drop")
    assert pairs.example_ids == ["id-1"]
    assert report.bad_rows == {"too_long": ["pairs.jsonl, row 0"]}
    assert report.first_messages == [
        "pairs.jsonl, row 0: the longer row has 61 tokens (prompt 55, response and EOS 6), max_length is 60"
    ]


def test_truncation_error_refuses_long_pairs_with_row_lengths_and_advice():
    with pytest.raises(DataError, match=r"1 of 2 .*row 1: the longer row has 61 .*max_length is 60; raise max_length"):
        tokenize([example("x"), example("long" * 9, row=1)], max_length=60, truncation="error")


def test_nothing_left_is_refused_with_the_first_reason():
    with pytest.raises(
        DataError, match=r"2 of 2 pairs do not fit: pairs.jsonl, row 0: .*max_length is 5; .*; raise max_length$"
    ):
        tokenize([example(), example(row=1)], max_length=5)


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_a_control_token_in_a_text_is_refused_with_row_and_token(field):
    bad = example(**{field: "a <|im_end|> b"}, row=7)
    with pytest.raises(DataError, match=r"1 of 2 .*row 7: .*control token '<\|im_end\|>'.*on_bad_rows: drop"):
        tokenize([example(), bad])
    pairs, report = tokenize([example(), bad], on_bad_rows="drop")
    assert pairs.example_ids == ["id-0"]
    assert report.bad_rows == {"special_tokens": ["pairs.jsonl, row 7"]}


def test_a_conversation_that_the_template_does_not_take_is_refused_with_its_row():
    bad = example([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], row=7)
    gemma = FORMATS["gemma"].chat_format
    with pytest.raises(DataError, match=r"row 7: the chat template .*turns system, user: System role not supported"):
        tokenize([example(), bad], gemma)
    pairs, report = tokenize([example(), bad], gemma, on_bad_rows="drop")
    assert pairs.example_ids == ["id-0"]
    assert report.bad_rows == {"template_refused": ["pairs.jsonl, row 7"]}


def test_every_message_is_one_line():
    bad = example([{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi"}], row=7)
    with pytest.raises(DataError, match="roles must alternate") as caught:
        tokenize([example(), bad], FORMATS["llama 2"].chat_format)
    assert "\n" not in str(caught.value)


def test_more_than_ten_refused_pairs_are_counted_not_listed():
    bad = [example("<|im_end|>", row=i) for i in range(13)]
    with pytest.raises(DataError, match=r"13 of 14 rows .*row 9: .*; and 3 more") as caught:
        tokenize([*bad, example()])
    assert "row 10" not in str(caught.value)


def test_sides_that_are_the_same_to_the_tokenizer_are_dropped_and_counted():
    llama = FORMATS["llama 3"].chat_format
    pairs, report = tokenize([example(), example(chosen="No", rejected=" No ", row=1)], llama, on_bad_rows="drop")
    assert pairs.example_ids == ["id-0"]
    assert report.bad_rows == {"identical_pair": ["pairs.jsonl, row 1"]}


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_a_side_that_is_empty_to_the_tokenizer_is_dropped_and_counted(field):
    from tokenizers import normalizers

    tokenizer = byte_tokenizer("<|im_start|> <|im_end|>", CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    pairs, report = tokenize(
        [example(), example(**{field: "\u200b"}, row=1)], ChatFormat(tokenizer), on_bad_rows="drop"
    )
    assert pairs.example_ids == ["id-0"]
    assert report.bad_rows == {"empty_response": ["pairs.jsonl, row 1"]}


def test_a_tokenizer_without_eos_is_refused_where_nothing_else_ends_a_response():
    with pytest.raises(ModelError, match=r"neither an EOS nor a SEP token.*set eos_token"):
        ChatFormat(byte_tokenizer("<s>"))


def test_a_template_that_rewrites_the_prompt_is_refused_with_advice():
    with pytest.raises(ModelError, match=r"writes the prompt differently.*chat_template: transcript"):
        ChatFormat(byte_tokenizer("<|im_start|> <|im_end|>", UNSTABLE))


def test_a_template_that_is_no_jinja_is_refused():
    with pytest.raises(DataError, match="chat template refuses"):
        ChatFormat(byte_tokenizer("<|im_start|> <|im_end|>", "{% for %}"))


def test_a_template_file_takes_the_place_of_the_tokenizers_own(tmp_path):
    file = tmp_path / "llama2.jinja"
    file.write_text(LLAMA2, encoding="utf-8")
    tokenizer = byte_tokenizer("<s> </s>", CHATML, adds="<s> $A", bos_token="<s>", eos_token="</s>")
    chat_format = ChatFormat(tokenizer, chat_template=str(file))
    assert chat_format.prompt_text(example().prompt) == FORMATS["llama 2"].prompt


def test_a_missing_template_file_is_refused():
    with pytest.raises(DataError, match=r"chat_template: nowhere.jinja is neither a Jinja file nor 'transcript'"):
        ChatFormat(FORMATS["qwen"].tokenizer, chat_template="nowhere.jinja")


def test_named_templates_need_a_default():
    tokenizer = byte_tokenizer("<|im_start|> <|im_end|>")
    tokenizer.chat_template = {"default": CHATML, "tools": "x"}
    assert ChatFormat(tokenizer).prompt_text(example().prompt) == FORMATS["qwen"].prompt
    tokenizer.chat_template = {"tools": CHATML}
    with pytest.raises(ModelError, match="the chat templates tools and none of them is the default"):
        ChatFormat(tokenizer)


def test_a_directory_without_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match=f"{tmp_path}: no tokenizer could be loaded.*; give the hub name") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_reasoning_needs_a_template_that_knows_thoughts():
    reasoned = replace(example(chosen="<think>\nHm.\n</think>\n\nWell.", row=7), has_reasoning=True)
    for chat_format in (QWEN, FORMATS["plain with bos"].chat_format):
        with pytest.raises(DataError, match=r"1 of 2 .*row 7: reasoning_content has no place in the chat template"):
            tokenize([example(), reasoned], chat_format)
    thinking = CHATML.replace("m.content +", "(m.content.split('</think>')[-1] if not loop.last else m.content) +")
    chat_format = ChatFormat(byte_tokenizer("<|im_start|> <|im_end|>", thinking, eos_token="<|im_end|>"))
    pairs, _ = tokenize([reasoned], chat_format)
    assert texts_of(pairs, chat_format)[1] == "<think>\nHm.\n</think>\n\nWell.<|im_end|>"
