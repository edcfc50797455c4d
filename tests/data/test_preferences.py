"""Rows of every shape become the same examples, and each bad row is named with its reason."""

from __future__ import annotations

import json

import pytest

from rlhf_lightning.data import BAD_ROW_REASONS, DataError, LoadReport, load_preferences
from rlhf_lightning.data.examples import Refusal
from rlhf_lightning.data.sources import WeightedSource

USER = {"role": "user", "content": "Hi there"}
PROMPT = [USER]


def say(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def load(tmp_path):
    """Load rows through a file."""

    def load_rows(*rows, **options):
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return load_preferences(file, **options)

    return load_rows


GOOD = {"prompt": "Hi there", "chosen": "Well.", "rejected": "No!"}
HH = "\n\nHuman: Hi there\n\nAssistant:"
SHAPES = {
    "explicit prompt": GOOD,
    "explicit conversations": {"prompt": PROMPT, "chosen": [say("Well.")], "rejected": [say("No!")]},
    "prompt as messages, responses as text": {"prompt": PROMPT, "chosen": "Well.", "rejected": "No!"},
    "prompt as text, conversations that repeat it": GOOD
    | {"chosen": [USER, say("Well.")], "rejected": [USER, say("No!")]},
    "implicit conversations": {"chosen": [USER, say("Well.")], "rejected": [USER, say("No!")]},
    "hh transcripts": {"chosen": HH + " Well.", "rejected": HH + " No!"},
    "hh transcript as prompt": {"prompt": HH, "chosen": "Well.", "rejected": "No!"},
    "hh transcript as prompt without its end": {"prompt": "Human: Hi there", "chosen": "Well.", "rejected": "No!"},
    "hh transcripts beside a prompt": GOOD | {"chosen": HH + " Well.", "rejected": HH + " No!"},
    "strings with a common beginning": {"chosen": "Hi there Well.", "rejected": "Hi there No!"},
    "messages with more keys": {
        "prompt": [USER | {"name": "Ann"}],
        "chosen": [say("Well.") | {"score": 3}],
        "rejected": [say("No!")],
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Hi there"}],
        "chosen": {"from": "gpt", "value": "Well."},
        "rejected": {"from": "gpt", "value": "No!"},
    },
    "ShareGPT conversations": {
        "chosen": [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Well."}],
        "rejected": [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "No!"}],
    },
    "Alpaca": {"instruction": "Hi there", "input": "", "chosen": "Well.", "rejected": "No!"},
    "single messages": {"prompt": USER, "chosen": say("Well."), "rejected": say("No!")},
    "more columns": GOOD | {"score": [1, {"x": None}]},
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape_of_a_row_gives_the_same_example(load, row):
    (example,), report = load(row)
    assert (list(example.prompt), example.chosen, example.rejected) == (PROMPT, "Well.", "No!")
    assert (example.margin, example.example_id) == (None, "pairs.jsonl:0")
    assert example.origin.endswith("pairs.jsonl, row 0")
    assert (report.rows_read, report.rows_kept, report.bad_rows) == (1, 1, {})


SYSTEM = {"role": "system", "content": "Be kind."}
EARLIER = [{"role": "user", "content": "One?"}, say("Two.")]
IN_CONTEXT = {
    "explicit prompt": GOOD,
    "implicit conversations": SHAPES["implicit conversations"],
    "hh transcripts": SHAPES["hh transcripts"],
    "ShareGPT": SHAPES["ShareGPT"],
    "Alpaca": SHAPES["Alpaca"],
    "prompt as text, conversations that repeat it": SHAPES["prompt as text, conversations that repeat it"],
}


@pytest.mark.parametrize("row", IN_CONTEXT.values(), ids=IN_CONTEXT.keys())
@pytest.mark.parametrize(
    "history", [[["One?", "Two."]], EARLIER, '[["One?", "Two."]]', "Human: One?\n\nAssistant: Two."]
)
def test_a_system_message_and_earlier_turns_may_stand_in_columns_of_their_own(load, row, history):
    (example,), report = load(row | {"system": "Be kind.", "history": history})
    assert list(example.prompt) == [SYSTEM, *EARLIER, USER]
    assert (example.chosen, example.rejected, report.columns_unused) == ("Well.", "No!", [])
    for nothing in ({"system": "", "history": []}, {"system": None, "history": None}, {"history": "[]"}):
        assert list(load(row | nothing)[0][0].prompt) == PROMPT


def test_a_system_message_has_names_of_its_own(load):
    assert list(load(GOOD | {"system_prompt": "Be kind."})[0][0].prompt) == [SYSTEM, USER]
    (example,), report = load(GOOD | {"rules": "Be kind.", "system": "x"}, columns={"system": "rules"})
    assert (list(example.prompt), report.columns_unused) == ([SYSTEM, USER], ["system"])
    row = {"prompt": [SYSTEM, USER], "chosen": "Well.", "rejected": "No!", "system": "Be kind."}
    assert list(load(row)[0][0].prompt) == [SYSTEM, USER]
    assert list(load(row | {"history": EARLIER})[0][0].prompt) == [SYSTEM, *EARLIER, USER]
    with pytest.raises(DataError, match="row 1: the system column and the prompt's own system message differ"):
        load(row, row | {"system": "Be rude."})
    (example,), _ = load({"history": "Hi there", "chosen": "Well.", "rejected": "No!"}, columns={"prompt": "history"})
    assert list(example.prompt) == PROMPT


@pytest.mark.parametrize("history", ["Earlier words.", [["One?"]], [["One?", 2]], {"a": 1}, 7])
def test_a_history_that_is_no_list_of_turns_is_refused(load, history):
    with pytest.raises(DataError, match=r"row 1: .*history"):
        load(GOOD, GOOD | {"history": history})


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("name", "row"),
    {
        "tools": GOOD | {"tools": [{"name": "f"}]},
        "tools ": GOOD | {"tools": '[{"name": "f"}]'},
        "chat_template_kwargs": GOOD | {"chat_template_kwargs": {"enable_thinking": False}},
        "tool_calls": GOOD | {"chosen": [say("Well.") | {"tool_calls": [CALL]}]},
        "tool_calls ": {
            "prompt": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
            "chosen": "Well.",
            "rejected": "No!",
        },
        "reasoning_content ": GOOD | {"prompt": [USER, say("a") | {"reasoning_content": "Hm."}, USER]},
    }.items(),
)
def test_what_has_no_place_in_a_pair_is_refused_by_its_name(load, name, row):
    with pytest.raises(DataError, match=f"row 1: .*{name.strip()}"):
        load(GOOD, row)
    _, report = load(GOOD, row, on_bad_rows="drop")
    assert list(report.bad_rows) == ["no_place"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_the_reasoning_of_a_response_stands_before_its_text(load, key):
    row = GOOD | {"chosen": [USER, say("\nWell.") | {key: "\nHm.\n"}], "rejected": say("No!") | {key: None}}
    for prompt in ({}, {"prompt": PROMPT}):
        (example,), report = load(row | prompt)
        assert example.chosen == "<think>\nHm.\n</think>\n\nWell."
        assert (example.rejected, example.has_reasoning, report.columns_unused) == ("No!", True, [])
    (example,), _ = load(GOOD | {"chosen": say("A") | {key: "x"}, "rejected": say("A") | {key: "y"}})
    assert example.rejected == "<think>\ny\n</think>\n\nA"
    assert not load(GOOD)[0][0].has_reasoning
    for wrong in (say("<think>a</think>b") | {key: "x"}, say("b") | {key: ["x"]}):
        with pytest.raises(DataError, match="row 1: chosen holds reasoning that is no text, or"):
            load(GOOD, GOOD | {"chosen": wrong})


def test_what_would_have_no_place_but_says_nothing_is_no_fault(load):
    empty = {"tools": "[]", "chat_template_kwargs": {"enable_thinking": None}}
    turn = say("Well.") | {"tool_calls": [], "reasoning_content": ""}
    (example,), _ = load(GOOD | empty | {"chosen": [turn]})
    assert (list(example.prompt), example.chosen) == (PROMPT, "Well.")


def test_turns_of_several_kinds_in_one_table_have_nulls(load):
    blank = {"role": None, "content": None}
    row = {
        "conversations": [{"from": "human", "value": "Hi there"} | blank],
        "chosen": say("Well.") | {"from": None, "value": None},
        "rejected": {"from": "gpt", "value": "No!"} | blank,
    }
    (example,), _ = load(row)
    assert (list(example.prompt), example.chosen, example.rejected) == (PROMPT, "Well.", "No!")


def test_every_column_that_is_not_used_is_named(load):
    used = GOOD | {"margin": 1, "id": "a", "source": "b", "system": "S", "history": []}
    _, report = load(used)
    assert report.columns_unused == []
    turn = say("Well.") | {"weight": 0.5, "name": None}
    _, report = load(GOOD, used | {"category": None, "chosen": [turn], "score": 3}, SHAPES["Alpaca"])
    assert report.columns_unused == ["category", "score", "chosen[].weight"]
    assert report.summary().endswith("; not used: category, score, chosen[].weight")
    _, report = load(SHAPES["Alpaca"] | {"prompt": "Hi there"})
    assert report.columns_unused == ["instruction", "input"]


def test_columns_not_used_are_joined_over_the_sources(tmp_path):
    for name, row in (("a", GOOD | {"x": 1, "y": 2}), ("b", GOOD | {"y": 3, "z": 4})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    _, report = load_preferences([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert report.columns_unused == ["x", "y", "z"]


ANSWERS = {"chosen": "The capital of France is Paris.", "rejected": "The capital of France is Lyon."}


@pytest.mark.parametrize(
    "others",
    [
        {"question": "What is the capital of France?"},
        {"input": "What is the capital of France?"},
        {"messages": PROMPT},
        {"messages": USER},
        {"turns": ["What is the capital of France?"]},
        {"system": "Be kind.", "question": "What is it?"},
        {"id": 3, "margin": 1, "source": "x", "text": "What is it?"},
    ],
    ids=lambda others: " ".join(others),
)
def test_a_prompt_is_not_guessed_beside_a_column_that_may_be_it(load, others):
    name = list(others)[-1]
    for rows in ([ANSWERS | others], [ANSWERS, ANSWERS | others], [ANSWERS | {name: None}, ANSWERS | others]):
        for policy in ("error", "drop"):
            with pytest.raises(DataError, match=rf"may stand in .*{name}.*; say which it is .*prompt: COL") as caught:
                load(*rows, on_bad_rows=policy)
            assert "\n" not in str(caught.value)
    (example,), _ = load(ANSWERS | others, columns={"prompt": name}) if name != "turns" else ([None], None)
    assert example is None or example.chosen == ANSWERS["chosen"]


def test_replies_alone_ask_for_the_column_of_their_prompt(load):
    row = {"messages": PROMPT, "chosen": say("Well."), "rejected": [say("No!")]}
    with pytest.raises(DataError, match=r"if it is in messages, .*columns: \{prompt: COLUMN\}"):
        load(row)
    (example,), _ = load(row, columns={"prompt": "messages"})
    assert (list(example.prompt), example.chosen, example.rejected) == (PROMPT, "Well.", "No!")


def test_a_prompt_is_still_guessed_where_nothing_else_may_be_it(load):
    others = {"score": 1, "rank": "2", "id": "x", "source": "web", "prompt_id": "ab12", "tags": [], "note": " "}
    (example,), report = load(ANSWERS | others)
    assert example.prompt[0]["content"] == "The capital of France is"
    assert report.columns_unused == ["score", "rank", "prompt_id", "tags", "note"]


@pytest.mark.parametrize(
    "names",
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
        ("reward_chosen", "reward_rejected"),
    ],
)
def test_scores_that_prefer_the_rejected_response_are_refused(load, names):
    scores = dict(zip(names, (1.0, 9.0), strict=True))
    with pytest.raises(DataError, match=rf"row 1: {names[0]} is 1, below {names[1]}, 9"):
        load(GOOD, GOOD | scores)
    assert len(load(GOOD, GOOD | dict(zip(names, ("9", "1"), strict=True)), GOOD | dict.fromkeys(names, 5))[0]) == 3


@pytest.mark.parametrize("margin", [1e30, -1e7, "1e30"])
def test_a_margin_that_no_reward_can_reach_is_refused(load, margin):
    with pytest.raises(DataError, match=r"row 1: margin is .*, beyond 1e\+06"):
        load(GOOD | {"margin": 1e6}, GOOD | {"margin": margin})


@pytest.mark.parametrize("chosen", ["cafe\u0301", "caf\u00e9\u200b", "ca\u00adf\u00e9", "\ufeffcaf\u00e9"])
def test_responses_that_look_the_same_are_the_same(load, chosen):
    with pytest.raises(DataError, match="row 1: chosen and rejected are the same text"):
        load(GOOD, GOOD | {"chosen": chosen, "rejected": "caf\u00e9"})
    joined, apart = "\U0001f468\u200d\U0001f469", "\U0001f468\U0001f469"  # a zero-width joiner is seen
    assert load(GOOD | {"chosen": joined, "rejected": apart})[0][0].chosen == joined


TALK = [USER, say("Well.")]


@pytest.mark.parametrize(
    "written",
    [
        repr(TALK),
        repr(TALK[1]),
        json.dumps(TALK[1]),
        json.dumps([{"content": "It's", "role": "user"}]),
        repr([{"content": "It's", "role": "user"}]),
        repr([{"from": "human", "value": "x"}]),
        "[{'content': 'Hi', 'role': 'user'}\n {'content': 'Ho', 'role': 'assistant'}]",  # NumPy's
    ],
)
def test_a_conversation_written_out_as_text_is_refused(load, written):
    for name in ("prompt", "chosen"):
        with pytest.raises(DataError, match=f"row 1: {name} holds a list of messages inside a string; decode it"):
            load(GOOD, GOOD | {name: written})


@pytest.mark.parametrize(
    "text",
    [
        '{"messages": [{"role": "user", "content": "Hi"}], "model": "m"}',
        '{"role": "admin", "content": "x"}',
        "[{'role': 'user'}] is no whole message",
        "{'role': 'user', 'age': 3}",
        "[[1, 2], {'a': 'user'}]",
        "{" * 5000 + "'user'",
    ],
)
def test_code_about_messages_is_a_text(load, text):
    assert load(GOOD | {"chosen": text})[0][0].chosen == text


def test_an_input_belongs_to_its_instruction(load):
    row = {"instruction": "Add up.", "input": "1, 2", "chosen": "3", "rejected": "4"}
    for options in ({}, {"columns": {"prompt": "instruction"}}):
        (example,), _ = load(row, **options)
        assert example.prompt[0]["content"] == "Add up.\n\n1, 2"
    (example,), _ = load(row | {"prompt": "Add."})
    assert example.prompt[0]["content"] == "Add."


def test_a_list_of_sources_is_read_in_order_each_with_its_columns(tmp_path):
    for name, row in (("a", GOOD), ("b", {"q": "Hi there", "chosen": "Well.", "rejected": "No!"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"chosen": ""}) + "\n")
    other = WeightedSource(str(tmp_path / "b.jsonl"), columns={"prompt": "q"})
    examples, report = load_preferences([str(tmp_path / "a.jsonl"), other], on_bad_rows="drop")
    assert [example.example_id for example in examples] == ["a.jsonl:0", "b.jsonl:0"]
    assert (report.rows_read, report.rows_kept, len(report.bad_rows["empty_response"])) == (4, 2, 2)
    assert report.source.count(".jsonl") == 2
    with pytest.raises(DataError, match=r"a.jsonl: 1 of 2 rows cannot be used"):
        load_preferences([str(tmp_path / "a.jsonl"), other])
    with pytest.raises(DataError, match="the list of sources is empty"):
        load_preferences([])


def test_turns_of_a_conversation_are_kept_in_order(load):
    hh = "\n\nHuman: One \n\nAssistant: Two\n\ntwo\n\nHuman: Three: Human: x\n\nAssistant:"
    (example,), _ = load({"chosen": hh + " yes\n\nno", "rejected": hh + " no"})
    assert list(example.prompt) == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two\n\ntwo"},
        {"role": "user", "content": "Three: Human: x"},
    ]
    assert (example.chosen, example.rejected) == ("yes\n\nno", "no")


def test_a_system_message_is_kept_and_need_not_be_repeated(load):
    system = {"role": "system", "content": "Be kind."}
    repeated = {"prompt": [system, USER], "chosen": [USER, say("Well.")], "rejected": [system, USER, say("No!")]}
    (example,), _ = load(repeated)
    assert list(example.prompt) == [system, USER]
    assert (example.chosen, example.rejected) == ("Well.", "No!")


def test_texts_are_kept_as_they_are(load):
    row = {"prompt": " a\n", "chosen": " Wéll\u2028 \x00", "rejected": "\tNo\r\n"}
    (example,), _ = load(row)
    assert (example.prompt[0]["content"], example.chosen, example.rejected) == tuple(row.values())


def test_a_text_about_messages_is_a_text(load):
    for chosen in ('[{"role": "user"}]', '["role", "content"]', '[{"role": "user", "content": "x"}] is a list', "[1]"):
        assert load(GOOD | {"chosen": chosen})[0][0].chosen == chosen


def test_a_common_beginning_ends_with_a_whole_word(load):
    (example,), _ = load({"chosen": "The sky is bluish.", "rejected": "The sky is black."})
    assert (example.prompt[0]["content"], example.chosen, example.rejected) == ("The sky is", "bluish.", "black.")
    (example,), _ = load({"chosen": "The sky is", "rejected": "The sky is black."})
    assert (example.prompt[0]["content"], example.chosen, example.rejected) == ("The sky", "is", "is black.")


def test_columns_are_found_under_the_names_given(load):
    row = {"q": "Hi there", "j": "Well.", "k": "No!", "gap": "0.5", "key": 7, "prompt": "another"}
    columns = {"prompt": "q", "chosen": "j", "rejected": "k", "margin": "gap", "id": "key"}
    (example,), _ = load(row, columns=columns)
    assert (list(example.prompt), example.chosen, example.rejected) == (PROMPT, "Well.", "No!")
    assert (example.margin, example.example_id) == (0.5, "7")


def test_ids_of_the_rows_are_kept_even_when_they_repeat(load):
    examples, _ = load(GOOD | {"id": "a"}, GOOD | {"id": "a"}, GOOD | {"id": None}, GOOD)
    assert [e.example_id for e in examples] == ["a", "a", "pairs.jsonl:2", "pairs.jsonl:3"]


@pytest.mark.parametrize(
    ("value", "margin"), [(0.5, 0.5), (-2, -2.0), ("0.25", 0.25), (None, None), ("", None), (0, 0.0)]
)
def test_a_margin_is_a_number_or_absent(load, value, margin):
    (example,), _ = load(GOOD | {"margin": value})
    assert example.margin == margin
    assert (example.margin is None) == (margin is None)


BAD = {
    "chosen is absent": ("missing_key", "chosen absent or null", {"prompt": "a", "rejected": "b"}),
    "chosen is null": ("missing_key", "chosen absent or null", GOOD | {"chosen": None}),
    "rejected is null": ("missing_key", "rejected absent or null", GOOD | {"rejected": None}),
    "both are null": ("missing_key", "chosen, rejected absent", GOOD | {"chosen": None, "rejected": None}),
    "prompt is null": ("missing_key", "prompt absent or null", GOOD | {"prompt": None}),
    "prompt is absent": ("missing_key", "prompt absent or null", {"chosen": "a b", "rejected": "a c"}),
    "chosen is a number": ("wrong_type", "chosen of type int, not text", GOOD | {"chosen": 3}),
    "prompt is an object": (
        "bad_messages",
        r"prompt holds a turn that is no {role, content} with text",
        GOOD | {"prompt": {"a": "b"}},
    ),
    "two kinds": ("wrong_type", "not of one kind", {"chosen": HH + " a", "rejected": [USER, say("b")]}),
    "an empty conversation": ("bad_messages", "chosen is an empty conversation", GOOD | {"chosen": []}),
    "a list of strings": ("bad_messages", "chosen holds a turn that is no {role, content}", GOOD | {"chosen": ["a"]}),
    "a conversation inside a string": (
        *("bad_messages", "chosen holds a list of messages inside a string; decode it"),
        GOOD | {"chosen": json.dumps([USER, say("Well.")])},
    ),
    "a turn without content": ("bad_messages", "that is no {role, content}", GOOD | {"chosen": [{"role": "user"}]}),
    "an unknown role": (
        *("bad_messages", "rejected holds the role 'function'; use system, user, assistant"),
        GOOD | {"rejected": [{"role": "function", "content": "x"}]},
    ),
    "no reply at the end": ("bad_messages", "chosen does not end with an assistant", GOOD | {"chosen": [USER]}),
    "no reply at the end, implicit": (
        *("bad_messages", "rejected does not end with an assistant"),
        {"chosen": [USER, say("a")], "rejected": [USER]},
    ),
    "the prompt ends with a reply": ("bad_messages", "the prompt does not end", GOOD | {"prompt": [USER, say("a")]}),
    "the implicit prompt ends with a reply": (
        *("bad_messages", "the prompt does not end with the user's turn"),
        {"chosen": [USER, say("a"), say("b")], "rejected": [USER, say("a"), say("c")]},
    ),
    "an open transcript as prompt": ("bad_messages", "the prompt does not end", GOOD | {"prompt": HH + " So"}),
    "an empty prompt": ("empty_prompt", "the prompt has no text", GOOD | {"prompt": " \n"}),
    "no common beginning": ("empty_prompt", "the prompt has no text", {"chosen": HH + " a", "rejected": "Sure b"}),
    "only a system message": (
        *("empty_prompt", "the prompt has no text"),
        {
            "chosen": [{"role": "system", "content": "x"}, {"role": "user", "content": ""}, say("a")],
            "rejected": [{"role": "system", "content": "x"}, {"role": "user", "content": ""}, say("b")],
        },
    ),
    "chosen is blank": ("empty_response", "chosen has no text", GOOD | {"chosen": " \u3000\u00a0"}),
    "rejected is empty": ("empty_response", "rejected has no text", GOOD | {"rejected": ""}),
    "an empty last turn": ("empty_response", "rejected has no text", {"chosen": HH + " a", "rejected": HH}),
    "the same text": (
        "identical_pair",
        "the same text, so the pair states no preference",
        GOOD | {"rejected": "Well."},
    ),
    "the same but for invisible ends": ("identical_pair", "the same text", GOOD | {"rejected": " Well.\n\u200b"}),
    "the same implicit text": ("identical_pair", "the same text", {"chosen": HH + " a", "rejected": HH + " a "}),
    "another prompt": (
        *("prompts_differ", "chosen and rejected differ before the last assistant's reply"),
        {"chosen": HH + " a", "rejected": HH.replace("Hi", "Ho") + " b"},
    ),
    "a prompt not repeated": ("prompts_differ", "another prompt", GOOD | {"chosen": [say("x"), say("Well.")]}),
    "a margin that is no number": ("bad_margin", "margin is 'much', not a finite number", GOOD | {"margin": "much"}),
    "a margin that is not finite": ("bad_margin", "margin is nan", GOOD | {"margin": float("nan")}),
    "a margin beyond float32": ("bad_margin", "margin is 1e[+]39", GOOD | {"margin": 1e39}),
    "a margin beyond float64": ("bad_margin", "not a finite number", GOOD | {"margin": 10**400}),
    "a margin that is a truth value": ("bad_margin", "margin is True", GOOD | {"margin": True}),
    "a label against the scores": (
        *("bad_label", "score_chosen is 1, below"),
        GOOD | {"score_chosen": 1, "score_rejected": 2},
    ),
    "tools": ("no_place", "the column tools has no place", GOOD | {"tools": [{"name": "f"}]}),
    "half of a surrogate pair": ("bad_unicode", "half of a surrogate pair", GOOD | {"chosen": "a \ud83d b"}),
    "half of a surrogate pair in the id": ("bad_unicode", "surrogate", GOOD | {"id": "\udc00"}),
    "half of a surrogate pair in the prompt": ("bad_unicode", "surrogate", GOOD | {"prompt": "a \udc00"}),
}


def beside(row):
    """A good row for the same file; with a prompt, unless the prompt of the bad row is guessed."""
    return {"chosen": HH + " x", "rejected": HH + " y"} if row.get("rejected") == "Sure b" else GOOD


@pytest.mark.parametrize(("reason", "message", "row"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_refuses_the_file_with_row_and_reason(load, reason, message, row):
    with pytest.raises(DataError, match=rf"1 of 2 rows .*row 1: .*{message}.* on_bad_rows: drop") as caught:
        load(beside(row), row)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("reason", "message", "row"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_dropped_and_counted_under_its_reason(load, reason, message, row):
    examples, report = load(beside(row), row, beside(row), on_bad_rows="drop")
    assert [e.example_id for e in examples] == ["pairs.jsonl:0", "pairs.jsonl:2"]
    assert {key: [origin.split(", ")[-1] for origin in rows] for key, rows in report.bad_rows.items()} == {
        reason: ["row 1"]
    }
    assert (report.rows_read, report.rows_kept, report.rows_dropped) == (3, 2, 1)


def test_every_reason_of_this_stage_is_tested():
    later = {"special_tokens", "template_refused", "too_long", "no_response"} | {"tie"}  # of labelled rows alone
    assert {reason for reason, _, _ in BAD.values()} == set(BAD_ROW_REASONS) - later


def test_the_first_ten_bad_rows_are_named_and_the_rest_counted(load):
    with pytest.raises(DataError, match=r"13 of 14 rows .*row 1: .*row 10: .*; and 3 more\. Correct them") as caught:
        load(GOOD, *[GOOD | {"chosen": ""}] * 13)
    assert "row 11" not in str(caught.value)


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_a_file_without_a_usable_row_is_refused_under_any_policy(load, policy):
    with pytest.raises(DataError, match=r"pairs.jsonl: none of its 2 rows can be used: .*row 0: chosen has no text"):
        load(GOOD | {"chosen": ""}, GOOD | {"chosen": ""}, on_bad_rows=policy)


def test_a_missing_column_is_named_with_the_columns_found_and_the_remedy(load):
    message = (
        r"pairs.jsonl: no column 'rejected' for rejected; the columns found are prompt, chosen\. "
        r"Map them with columns: \{rejected: COLUMN\}"
    )
    for policy in ("error", "drop"):
        with pytest.raises(DataError, match=message):
            load({"prompt": "a", "chosen": "b"}, on_bad_rows=policy)


def test_all_missing_columns_are_named_at_once(load):
    row = {"question": "a", "response_j": "b", "response_k": "c"}
    with pytest.raises(DataError, match=r"'chosen' for chosen, 'rejected' for rejected; .*prompt: COLUMN, chosen: COL"):
        load(row)


@pytest.mark.parametrize("name", ["prompt", "margin", "id", "source"])
def test_a_column_that_was_asked_for_by_name_must_be_there(load, name):
    with pytest.raises(DataError, match=rf"no column 'x' for {name}"):
        load(GOOD, columns={name: "x"})


def test_a_column_that_we_do_not_know_is_refused(load):
    with pytest.raises(DataError, match=r"columns: unknown name 'answer'; it maps .*margin, id, source "):
        load(GOOD, columns={"answer": "x"})


def test_a_pair_keeps_the_name_of_its_source(load):
    named = [GOOD | {"source": value} for value in (" web ", 7, " ", None, {"url": "x"}, ["x"], 0.5)]
    assert [pair.source for pair in load(*named, GOOD)[0]] == ["web", "7", None, None, None, None, "0.5", None]
    (pair,), _ = load(GOOD | {"source": "web", "dataset": "shop"}, columns={"source": "dataset"})
    assert pair.source == "shop"
    with pytest.raises(DataError, match=r"row 0: source is \['x'\], not a name"):
        load(GOOD | {"dataset": ["x"]}, columns={"source": "dataset"})


def test_a_prompt_asked_for_by_name_is_never_guessed(load):
    with pytest.raises(DataError, match="row 1: prompt absent or null"):
        load(GOOD | {"q": "Hi"}, {"chosen": HH + " a", "rejected": HH + " b"}, columns={"prompt": "q"})


def test_a_prompt_is_not_guessed_in_a_source_that_has_prompts(load):
    guessed = {"chosen": "The sky is blue", "rejected": "The sky is black"}
    with pytest.raises(DataError, match="row 1: prompt absent or null"):
        load(GOOD, guessed)
    with pytest.raises(DataError, match=r"row 1: has a prompt, but .*row 0 has none: give every row a prompt"):
        load(guessed, GOOD, on_bad_rows="drop")
    assert len(load(GOOD, SHAPES["hh transcripts"], SHAPES["implicit conversations"])[0]) == 3


def test_the_report_sums_up_in_one_line():
    report = LoadReport("train.jsonl", rows_read=1400)
    assert report.summary() == "train.jsonl: 1400 rows read"
    for row in range(5):
        report.refuse(Refusal("prompts_differ" if row < 3 else "empty_response", f"row {row}: x", f"row {row}"))
    assert report.summary() == ("train.jsonl: 1400 rows read, 5 dropped (empty_response 2, prompts_differ 3)")
    assert report.bad_rows == {"prompts_differ": ["row 0", "row 1", "row 2"], "empty_response": ["row 3", "row 4"]}


def test_a_message_stays_short_and_on_one_line_whatever_the_row_holds(load):
    long = "long\n" * 1000
    for row in (GOOD | {"margin": long}, GOOD | {"chosen": [{"role": long, "content": "x"}]}, {"a\nb": "x"}):
        with pytest.raises(DataError) as caught:
            load(row)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


def test_zero_width_blanks_alone_are_a_text_as_the_model_reads_them(load):
    """Real data has such responses; a tokenizer makes tokens of them."""
    (example,), _ = load({"prompt": "\u200b", "chosen": "Well.", "rejected": "\u200b"})
    assert (example.prompt[0]["content"], example.rejected) == ("\u200b", "\u200b")
