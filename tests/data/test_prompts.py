"""Rows of every shape become the same prompt, and each prompt the ids that the model was made for."""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_lightning.data import BAD_ROW_REASONS, DataError, load_preferences, load_prompts
from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.examples import LoadReport, PromptExample
from rlhf_lightning.data.selection import TokenizedPairs, TokenizedPrompts
from rlhf_lightning.data.sources import WeightedSource
from rlhf_lightning.data.tokenized import TokenStore, tokenize_source, write_store
from rlhf_lightning.data.tokenizer import load_tokenizer
from tests.data.chat_formats import CHATML, FORMATS, byte_tokenizer
from tests.data.test_preferences import GOOD, HH, PROMPT, USER, say
from tests.data.test_preferences import SHAPES as PAIRS
from tests.data.test_real_data import SHARED

QWEN = FORMATS["qwen"].chat_format


@pytest.fixture
def load(tmp_path):
    """Load rows through a file."""

    def load_rows(*rows, **options):
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return load_prompts(file, **options)

    return load_rows


REPLIED = [USER, say("Well.")]
SHAREGPT = [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Well."}]
SHAPES = {
    "a text": {"prompt": "Hi there"},
    "a transcript": {"prompt": HH},
    "a transcript without its end": {"prompt": "Human: Hi there"},
    "a transcript with its reply": {"prompt": HH + " Well."},
    "messages as prompt": {"prompt": PROMPT},
    "messages as prompt, with a reply": {"prompt": REPLIED},
    "a message as prompt": {"prompt": USER},
    "messages": {"messages": PROMPT},
    "messages with a reply": {"messages": REPLIED},
    "messages with more keys": {"messages": [USER | {"name": "Ann"}], "model": "x"},
    "ShareGPT": {"conversations": SHAREGPT[:1]},
    "ShareGPT with a reply": {"conversations": SHAREGPT},
    "ShareGPT as messages": {"messages": SHAREGPT},
    "Alpaca": {"instruction": "Hi there", "input": "", "output": "Well."},
    "prompt before the others": {"prompt": "Hi there", "messages": [say("x")], "instruction": "y"},
    "a prompt and a response": {"prompt": "Hi there", "response": "Well."},
    "messages beside responses of text": {"messages": PROMPT, "chosen": "Well.", "rejected": "No!"},
    "messages beside one response": {"messages": PROMPT, "chosen": "Well."},
    "responses before messages": PAIRS["implicit conversations"] | {"messages": [{"role": "user", "content": "x"}]},
    "a prompt beside one response": {"prompt": "Hi there", "chosen": "Well."},
}


@pytest.mark.parametrize("row", [*SHAPES.values(), *PAIRS.values()], ids=[*SHAPES, *(f"pair: {n}" for n in PAIRS)])
def test_every_shape_of_a_row_gives_the_same_prompt(load, row):
    (example,), report = load(row)
    assert list(example.prompt) == PROMPT
    assert example.example_id == "prompts.jsonl:0"
    assert example.origin.endswith("prompts.jsonl, row 0")
    assert example.texts == ["Hi there"]
    assert (report.rows_read, report.rows_kept, report.bad_rows, report.rows_repeated) == (1, 1, {}, [])


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS.keys())
def test_the_prompt_of_a_pair_is_the_one_that_the_pair_has(load, tmp_path, row):
    (prompt,), _ = load(row)
    (pair,), _ = load_preferences(tmp_path / "prompts.jsonl")
    assert (prompt.prompt, prompt.example_id, prompt.origin) == (pair.prompt, pair.example_id, pair.origin)


def test_a_conversation_is_kept_up_to_the_last_user_turn(load):
    turns = [{"role": "system", "content": "Be kind."}, USER, say("Yes?"), {"role": "user", "content": "Bye"}]
    for row in ({"messages": turns}, {"messages": [*turns, say("Bye!")]}, {"prompt": turns}):
        assert list(load(row)[0][0].prompt) == turns
    (example,), _ = load({"prompt": "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D"})
    assert [turn["content"] for turn in example.prompt] == ["A", "B", "C"]


def test_an_input_belongs_to_its_instruction(load):
    (example,), _ = load({"instruction": "Add up.", "input": "1, 2", "output": "3"})
    assert example.prompt[0]["content"] == "Add up.\n\n1, 2"


def test_texts_are_kept_as_they_are(load):
    assert load({"prompt": " Wéll\u2028 \x00\n"})[0][0].prompt[0]["content"] == " Wéll\u2028 \x00\n"


def test_columns_are_found_under_the_names_given(load):
    row = {"q": "Hi there", "key": 7, "prompt": "another"}
    (example,), _ = load(row, columns={"prompt": "q", "id": "key"})
    assert (list(example.prompt), example.example_id) == (PROMPT, "7")
    (example,), _ = load({"a": HH + " x", "b": HH + " y"}, columns={"chosen": "a", "rejected": "b"})
    assert list(example.prompt) == PROMPT
    (example,), _ = load({"chosen": REPLIED}, columns={"prompt": "chosen"})
    assert list(example.prompt) == PROMPT


NO_PAIRS = {
    "an empty response": GOOD | {"chosen": ""},
    "a missing response": GOOD | {"rejected": None},
    "the same text twice": GOOD | {"rejected": "Well."},
    "a bad margin": GOOD | {"margin": "much"},
    "a response of a wrong type": GOOD | {"chosen": 3},
    "a response that repeats another prompt": GOOD | {"chosen": [say("x"), say("Well.")]},
    "half of a surrogate pair in a response": GOOD | {"chosen": "\ud83d"},
    "a prompt that ends with a reply": GOOD | {"prompt": REPLIED},
    "an empty response within": {"chosen": HH + " a", "rejected": HH},
    "the same text twice within": {"chosen": HH + " a", "rejected": HH + " a"},
    "a bad margin within": PAIRS["hh transcripts"] | {"margin": "much"},
}


@pytest.mark.parametrize("row", NO_PAIRS.values(), ids=NO_PAIRS.keys())
def test_a_row_that_makes_no_pair_makes_a_prompt_when_that_is_fine(load, tmp_path, row):
    (example,), _ = load(row)
    assert list(example.prompt) == PROMPT
    with pytest.raises(DataError, match="none of its 1 rows can be used"):
        load_preferences(tmp_path / "prompts.jsonl")


PLAIN = {"prompt": "fine"}
BAD = {
    "prompt is null": ("missing_key", "prompt absent or null", {"prompt": None}),
    "nothing is there": ("missing_key", "prompt absent or null", {"answer": "x"}),
    "messages are null": ("missing_key", "prompt absent or null", {"messages": None}),
    "one side alone": ("missing_key", "rejected absent or null", {"chosen": HH + " a"}),
    "prompt is a number": ("wrong_type", "prompt of type int, not text", {"prompt": 3}),
    "two kinds": ("wrong_type", "not of one kind", {"chosen": HH + " a", "rejected": REPLIED}),
    "half of a surrogate pair": ("bad_unicode", "half of a surrogate pair", {"prompt": "a \ud83d b"}),
    "a conversation inside a string": ("bad_messages", "inside a string; decode it", {"messages": json.dumps(PROMPT)}),
    "an empty conversation": ("bad_messages", "prompt is an empty conversation", {"messages": []}),
    "a list of strings": ("bad_messages", "a turn that is no {role, content}", {"prompt": ["Hi"]}),
    "an unknown role": ("bad_messages", "the role 'tool'", {"messages": [USER, {"role": "tool", "content": "x"}]}),
    "two replies at the end": ("bad_messages", "does not end with the user's turn", {"messages": [*REPLIED, say("b")]}),
    "a system message at the end": (
        *("bad_messages", "does not end with the user's turn"),
        {"messages": [USER, {"role": "system", "content": "x"}]},
    ),
    "two replies within": (
        *("bad_messages", "does not end with the user's turn"),
        {"chosen": [*REPLIED, say("b")], "rejected": [*REPLIED, say("c")]},
    ),
    "an empty prompt": ("empty_prompt", "the prompt has no text", {"prompt": " \n"}),
    "tools": ("no_place", "the column tools has no place", {"prompt": "Hi", "tools": [{"name": "f"}]}),
    "a reply alone": ("empty_prompt", "the prompt has no text", {"messages": [say("Well.")]}),
    "another prompt": (
        *("prompts_differ", "differ before the last assistant's reply"),
        {"chosen": HH + " a", "rejected": HH.replace("Hi", "Ho") + " b"},
    ),
}


@pytest.mark.parametrize(("reason", "message", "row"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_named_or_dropped_and_counted(load, reason, message, row):
    with pytest.raises(DataError, match=rf"1 of 2 rows .*row 1: .*{message}.* on_bad_rows: drop") as caught:
        load(PLAIN, row)
    assert "\n" not in str(caught.value)
    examples, report = load(PLAIN, row, {"prompt": "fine too"}, on_bad_rows="drop")
    assert [e.example_id for e in examples] == ["prompts.jsonl:0", "prompts.jsonl:2"]
    assert {key: [origin.split(", ")[-1] for origin in rows] for key, rows in report.bad_rows.items()} == {
        reason: ["row 1"]
    }
    assert (report.rows_read, report.rows_kept, report.rows_dropped) == (3, 2, 1)


def test_a_prompt_that_cannot_be_guessed_is_refused(load):
    with pytest.raises(DataError, match="row 0: chosen and rejected are the same text"):
        load({"chosen": "a", "rejected": "a"})


def test_every_reason_that_a_prompt_can_be_refused_for_is_tested():
    later = {"special_tokens", "template_refused", "too_long"}
    of_responses = {"no_response", "empty_response", "identical_pair", "bad_margin", "bad_label", "tie"}
    assert {reason for reason, _, _ in BAD.values()} == set(BAD_ROW_REASONS) - later - of_responses


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_a_file_without_prompts_is_refused_with_the_columns_found(load, policy):
    with pytest.raises(
        DataError, match=r"no column prompt, messages, .*; the columns found are question, id\. Map one with columns: "
    ):
        load({"question": "Hi", "id": 1}, on_bad_rows=policy)
    with pytest.raises(DataError, match=r"prompts.jsonl: no column 'q' for prompt"):
        load({"question": "Hi"}, columns={"prompt": "q"}, on_bad_rows=policy)
    with pytest.raises(DataError, match=r"columns: unknown name 'answer'; it maps .*margin, id, source "):
        load({"prompt": "Hi"}, columns={"answer": "x"}, on_bad_rows=policy)
    with pytest.raises(DataError, match=r"none of its 1 rows can be used: .*row 0: the prompt has no text"):
        load({"prompt": ""}, on_bad_rows=policy)


def test_a_guessed_prompt_is_not_mixed_with_a_given_one(load):
    guessed = {"chosen": "The sky is blue", "rejected": "The sky is black"}
    assert load(guessed)[0][0].texts == ["The sky is"]
    with pytest.raises(DataError, match=r"row 1: has a prompt, but .*row 0 has none"):
        load(guessed, PLAIN)
    with pytest.raises(DataError, match="row 1: prompt absent or null"):
        load(PLAIN, guessed)


def test_a_prompt_that_stands_more_than_once_is_taken_once_and_the_rest_counted(load):
    rows = [{"prompt": p} for p in ("a b", "c", "A  b ", "a b c", "c")]
    examples, report = load(*rows)
    assert [e.texts[0] for e in examples] == ["a b", "c", "a b c"]
    assert [origin.split(", ")[-1] for origin in report.rows_repeated] == ["row 2", "row 4"]
    assert (report.rows_read, report.rows_kept, report.rows_dropped) == (5, 3, 0)
    assert report.summary().endswith("5 rows read, 2 duplicate prompts left out")
    assert len(load(*rows, unique=False)[0]) == 5


def test_a_list_of_sources_is_read_in_order_each_with_its_columns(tmp_path):
    for name, rows in (("a", [{"prompt": "x"}, {"prompt": ""}]), ("b", [{"q": "X"}, {"q": "y"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [str(tmp_path / "a.jsonl"), WeightedSource(str(tmp_path / "b.jsonl"), columns={"prompt": "q"})]
    examples, report = load_prompts(sources, on_bad_rows="drop")
    assert [example.example_id for example in examples] == ["a.jsonl:0", "b.jsonl:1"]
    assert (report.rows_read, report.rows_dropped, len(report.rows_repeated)) == (4, 1, 1)
    with pytest.raises(DataError, match=r"a.jsonl: 1 of 2 rows cannot be used"):
        load_prompts(sources)


def example(prompt="Hi there", row=0):
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return PromptExample(messages, f"id-{row}", f"prompts.jsonl, row {row}")


def select_prompts(stores, masks, *, unique=True, truncation="drop", **options):
    prompts, report = TokenizedPrompts.fitting(stores, masks, truncation=truncation, **options)
    if unique:
        prompts, report.rows_repeated = prompts.once()
    return prompts, report


def tokenize(examples, chat_format=QWEN, *, max_length=1000, on_bad_rows="error", **options):
    with tempfile.TemporaryDirectory() as directory:  # the mapped file outlives its name
        report = LoadReport("prompts.jsonl", rows_read=len(examples))
        write_store(Path(directory), examples, report, chat_format, kind="prompts")
        store = TokenStore(directory)
    store.report.enforce(on_bad_rows)
    return select_prompts([store], [np.ones(len(store), dtype=bool)], max_length=max_length, **options)


def text_of(chat_format, ids):
    return chat_format.tokenizer.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("name", FORMATS)
def test_ids_are_what_the_model_was_made_for_with_one_start_token(name):
    chat_format = FORMATS[name].chat_format
    prompts, _ = tokenize([example()], chat_format)
    ids = prompts.ids(0)
    assert text_of(chat_format, ids) == FORMATS[name].prompt
    assert prompts.lengths.tolist() == [len(ids)]
    if chat_format.start_ids:
        assert ids.tolist().count(chat_format.start_ids[0]) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_long_prompt_is_cut_from_the_left_and_keeps_its_frame(name):
    chat_format = FORMATS[name].chat_format
    whole = int(tokenize([example(string.ascii_lowercase)], chat_format)[0].lengths[0])
    for less in (0, 1, 25):
        prompts, report = tokenize(
            [example(string.ascii_lowercase)], chat_format, max_length=whole - less, truncation="left"
        )
        expected = FORMATS[name].prompt.replace("Hi there", string.ascii_lowercase[less:])
        assert text_of(chat_format, prompts.ids(0)) == expected
        assert prompts.lengths.tolist() == [whole - less]
        assert len(report.rows_cut) == (less > 0)
        assert prompts.messages(0) == [{"role": "user", "content": string.ascii_lowercase}]
    rows = [example(string.ascii_lowercase + "0"), example("z", row=1)]
    prompts, report = tokenize(rows, chat_format, max_length=whole - 25, truncation="left")
    assert len(prompts) == 2, "one id of the messages is enough"
    with pytest.raises(DataError, match=r"1 of 1 prompts do not fit: .*row 0: .*; raise max_prompt_length$"):
        tokenize(rows[:1], chat_format, max_length=whole - 26, truncation="left")


@pytest.mark.parametrize("name", FORMATS)
def test_the_messages_of_a_cut_prompt_are_what_its_ids_say(name):
    """Else a reward model would read turns that the policy never saw."""
    chat_format = FORMATS[name].chat_format
    talk = [USER, say("Earlier."), {"role": "user", "content": "Über more: é?"}, say("And."), USER]
    for messages in (talk, [{"role": "system", "content": "Be kind."}, *talk], talk[4:]):
        rows = [example(messages), example("x", row=1)]  # where the first does not fit, there is another
        whole, _ = tokenize(rows, chat_format, on_bad_rows="drop")
        if len(whole) == 1:
            assert messages[0]["role"] == "system", "this template takes no system message"
            continue
        everything = [np.ones(2, dtype=bool)]
        longest, shortest = whole.lengths.tolist()
        seen = set()
        for max_length in range(longest, shortest - 1, -1):
            prompts, _ = select_prompts(whole.stores, everything, max_length=max_length, truncation="left")
            if prompts.example_ids[0] == "id-0":
                read = prompts.messages_as_cut(0, chat_format)
                (again,) = chat_format.encode_prompts([chat_format.prompt_text(read)])
                # A template may trim, or put a blank before, the words that a cut left.
                texts = [text_of(chat_format, ids).split() for ids in (np.array(again), prompts.ids(0))]
                assert "".join(texts[0]) == "".join(texts[1])
                seen.add(len(read))
        assert len(seen) == (3 if len(messages) > 1 else 1)


def test_a_conversation_whose_turns_cannot_be_told_apart_is_left_out_rather_than_cut():
    numbered = CHATML.replace("m.role + '", "m.role + (loop.index | string if m.role == 'user' else '') + '")
    chat_format = ChatFormat(byte_tokenizer("<|im_start|> <|im_end|>", numbered, eos_token="<|im_end|>"))
    system = {"role": "system", "content": "Be kind."}
    rows = [example("x" * 60), example([USER, say("a"), USER, say("b"), USER], row=1)]
    rows.append(example([system, system, USER], row=2))
    prompts, report = tokenize(rows, chat_format, max_length=44, truncation="left")
    assert prompts.example_ids == ["id-0"]
    assert report.bad_rows == {"too_long": ["prompts.jsonl, row 1", "prompts.jsonl, row 2"]}
    assert "cannot be told apart" in report.first_messages[0]
    assert len(tokenize(rows, chat_format, max_length=200, truncation="left")[0]) == 3


def test_a_long_prompt_is_dropped_and_counted_by_default_or_refused():
    rows = [example("x"), example("long" * 9, row=1)]
    prompts, report = tokenize(rows, max_length=54)
    assert prompts.example_ids == ["id-0"]
    assert report.bad_rows == {"too_long": ["prompts.jsonl, row 1"]}
    assert report.first_messages == ["prompts.jsonl, row 1: the prompt has 55 tokens, max_prompt_length is 54"]
    assert len(tokenize(rows, max_length=55)[0]) == 2
    with pytest.raises(
        DataError, match=r"1 of 2 prompts do not fit: .*row 1: .*; raise max_prompt_length, or set truncation: left or"
    ) as caught:
        tokenize(rows, max_length=54, truncation="error")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"2 of 2 prompts do not fit: .*; raise max_prompt_length, or set truncation: "):
        tokenize(rows, max_length=5)


def test_a_control_token_in_a_prompt_is_refused_with_row_and_token():
    rows = [example(), example("a <|im_end|> b", row=7)]
    with pytest.raises(DataError, match=r"1 of 2 .*row 7: .*control token '<\|im_end\|>'.*on_bad_rows: drop"):
        tokenize(rows)
    prompts, report = tokenize(rows, on_bad_rows="drop")
    assert prompts.example_ids == ["id-0"]
    assert report.bad_rows == {"special_tokens": ["prompts.jsonl, row 7"]}


def test_a_conversation_that_the_template_does_not_take_is_refused_with_its_row():
    rows = [example(), example([{"role": "system", "content": "Be kind."}, USER], row=7)]
    with pytest.raises(DataError, match=r"row 7: the chat template .*System role not supported"):
        tokenize(rows, FORMATS["gemma"].chat_format)
    report = tokenize(rows, FORMATS["gemma"].chat_format, on_bad_rows="drop")[1]
    assert report.bad_rows == {"template_refused": ["prompts.jsonl, row 7"]}


def test_repeated_prompts_are_found_among_those_that_fit():
    rows = [example("a" + " " * 50 + "b"), example("a b", row=1), example("A b", row=2)]
    prompts, report = tokenize(rows, max_length=50)
    assert prompts.example_ids == ["id-1"]
    assert (report.rows_repeated, list(report.bad_rows)) == (["prompts.jsonl, row 2"], ["too_long"])
    assert tokenize(rows, max_length=50, unique=False)[0].example_ids == ["id-1", "id-2"]


turns = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=12), min_size=1, max_size=3)
quick = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(st.lists(turns, min_size=1, max_size=6), st.sampled_from(sorted(FORMATS)))
def test_ids_equal_the_prompt_part_of_the_pairs_of_the_same_file(conversations, name):
    chat_format = FORMATS[name].chat_format
    rows = []
    for number, contents in enumerate(conversations):
        roles = [("user", "assistant")[i % 2] for i in range(2 * len(contents) - 1)]
        texts = [f"{number} {text}" for text in contents for _ in (0, 1)]
        prompt = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        rows.append({"prompt": prompt, "chosen": "Well.", "rejected": "No!"})
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "rows.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        stores = [
            tokenize_source(WeightedSource(str(file)), chat_format, kind=kind, cache_dir=Path(directory, "cache"))
            for kind in ("prompts", "pairs")
        ]
        masks = [[np.ones(len(store), dtype=bool)] for store in stores]
        prompts, report = select_prompts([stores[0]], masks[0], max_length=10**6)
        pairs, _ = TokenizedPairs.fitting([stores[1]], masks[1], max_length=10**6)
    assert report.bad_rows == {}
    assert prompts.example_ids == pairs.example_ids
    assert np.array_equal(prompts.numbers("prompt_hash"), pairs.numbers("prompt_hash"))
    for index, row in enumerate(rows):
        assert prompts.ids(index).tolist() == pairs.segments(index)[0].tolist()
        assert prompts.messages(index) == row["prompt"]


real = pytest.mark.skipif(not SHARED.is_dir(), reason="no directory ../shared/data beside the repository")


@real
@pytest.mark.parametrize(
    ("source", "rows", "repeated"),
    [
        *(("prompts/ppo_prompts.jsonl", 500, 0), ("prompts/eval_prompts.jsonl", 78, 0)),
        *(("prompts/xstest_prompts.jsonl", 234, 0), ("pairs/alpaca_val.parquet", 1255, 1173)),
    ],
)
def test_real_prompts_load_whole(source, rows, repeated):
    examples, report = load_prompts(SHARED / source)
    assert (report.rows_read, report.rows_dropped, len(report.rows_repeated)) == (rows, 0, repeated)
    assert len(examples) == rows - repeated


@real
def test_the_hh_pairs_give_a_prompt_also_where_a_response_is_empty():
    with pytest.raises(DataError, match="3 of 1400 rows cannot be used"):
        load_prompts(SHARED / "hh_harmless_base")
    examples, report = load_prompts(SHARED / "hh_harmless_base", on_bad_rows="drop")
    assert {key: len(rows) for key, rows in report.bad_rows.items()} == {"prompts_differ": 3}
    assert (len(examples), len(report.rows_repeated)) == (1396, 1)


@real
def test_real_prompts_tokenize_whole(tiny_qwen2, tmp_path):
    chat_format = ChatFormat(load_tokenizer(str(tiny_qwen2)))
    source = WeightedSource(str(SHARED / "prompts" / "ppo_prompts.jsonl"))
    store = tokenize_source(source, chat_format, kind="prompts", cache_dir=tmp_path)
    prompts, _ = select_prompts([store], [np.ones(len(store), dtype=bool)], max_length=2048)
    examples, _ = load_prompts(SHARED / "prompts" / "ppo_prompts.jsonl")
    assert [prompts.messages(index) for index in range(len(prompts))] == [list(e.prompt) for e in examples]
    for index in (0, 250, 499):
        assert text_of(chat_format, prompts.ids(index)) == chat_format.prompt_text(examples[index].prompt)


@real
@pytest.mark.parametrize("file", sorted(p.name for p in (SHARED / "hostile").glob("*")) if SHARED.is_dir() else [])
def test_a_damaged_file_gives_prompts_or_one_line(file):
    outcome = []
    try:
        outcome = load_prompts(SHARED / "hostile" / file, on_bad_rows="drop")[0]
    except DataError as error:
        message = str(error)
    if not outcome:
        assert file in message
        assert "\n" not in message
