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
    later = {"special_tokens", "template_refused", "too_long"}
    assert {reason for reason, _, _ in BAD.values()} == set(BAD_ROW_REASONS) - later


def test_the_first_ten_bad_rows_are_named_and_the_rest_counted(load):
    with pytest.raises(DataError, match=r"13 of 14 rows .*row 1: .*row 10: .*; and 3 more\. Mend them") as caught:
        load(GOOD, *[GOOD | {"chosen": ""}] * 13)
    assert "row 11" not in str(caught.value)


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_a_file_without_a_usable_row_is_refused_under_any_policy(load, policy):
    with pytest.raises(DataError, match=r"pairs.jsonl: none of its 2 rows can be used: .*row 0: chosen has no text"):
        load(GOOD | {"chosen": ""}, GOOD | {"chosen": ""}, on_bad_rows=policy)


def test_an_unknown_policy_is_refused(load):
    with pytest.raises(DataError, match="on_bad_rows: 'skip' is no policy; use one of error, drop"):
        load(GOOD, on_bad_rows="skip")


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
