"""Two responses and a label: the better one is chosen in each of the public layouts, and ties are counted."""

from __future__ import annotations

import csv
import json

import pytest

from rlhf_lightning.data import DataError, load_preferences, load_prompts
from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.sources import WeightedSource
from rlhf_lightning.data.tokenized import tokenize_source
from rlhf_lightning.data.tokenizer import load_tokenizer


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def safer(better, **more):
    """PKU-Alignment/PKU-SafeRLHF."""
    row = {"prompt": "Q", "response_0": "first", "response_1": "second"}
    safety = {"is_response_0_safe": True, "is_response_1_safe": False, "safer_response_id": 0}
    return row | safety | {"better_response_id": better} | more


def helpsteer(preference, **more):
    """nvidia/HelpSteer3."""
    row = {"domain": "stem", "language": "english", "context": [user("Q")], "response1": "first", "response2": "second"}
    return row | {"overall_preference": preference, "individual_preference": [{"score": preference}]} | more


def shp(label, **more):
    """stanfordnlp/SHP."""
    votes = {"score_A": 9, "score_B": 3} if label else {"score_A": 3, "score_B": 9}
    return {"history": "Q", "human_ref_A": "first", "human_ref_B": "second", "labels": label} | votes | more


def alpacafarm(preference, **more):
    """tatsu-lab/alpaca_farm, alpaca_human_preference."""
    row = {"instruction": "Q", "input": "", "output_1": "first", "output_2": "second", "preference": preference}
    return row | {"raw_preference": preference} | more


def arena(winner, **more):
    """lmsys/chatbot_arena_conversations, lmarena-ai/arena-human-preference-140k."""
    row = {"model_a": "m", "model_b": "n", "winner": winner, "turn": 1}
    return row | {"conversation_a": [user("Q"), says("first")], "conversation_b": [user("Q"), says("second")]} | more


def arena_lists(first, second, tie, **more):
    """lmsys/lmsys-arena-human-preference-55k: lists of texts as JSON inside strings."""
    row = {"id": 7, "model_a": "m", "prompt": '["Q"]', "response_a": '["first"]', "response_b": '["second"]'}
    return row | {"winner_model_a": first, "winner_model_b": second, "winner_tie": tie} | more


def arena_texts(winner, **more):
    """The same as plain texts with one column for the winner."""
    return {"prompt": "Q", "response_a": "first", "response_b": "second", "winner": winner} | more


def rated(first, second, third=5.0, **more):
    """openbmb/UltraFeedback: a list of responses, each with an overall score and ratings of its aspects."""

    def one(text, score):
        return {"model": "m", "response": text, "overall_score": score, "annotations": {"honesty": {"Rating": "3"}}}

    texts = (one("third", third), one("first", first), one("second", second))
    return {"source": "evol", "instruction": "Q", "models": ["m"], "completions": list(texts)} | more


def ranked(first, second, **more):
    """berkeley-nest/Nectar: a list of answers, each with a rank, 1 the best."""
    answers = [{"answer": text, "rank": rank} for text, rank in (("first", first), ("other", 3.0), ("second", second))]
    return {"prompt": "\n\nHuman: Q\n\nAssistant: ", "answers": answers, "num_responses": 3} | more


def strength(preference, **more):
    """nvidia/HelpSteer2, preferences."""
    row = {"split": "train", "prompt": "Q", "response_1": "first", "response_2": "second"}
    return row | {"preference_strength": preference, "preference_statement": "x"} | more


LAYOUTS = {
    # first is better, second is better, ties; columns not used
    "PKU-SafeRLHF": (safer(0), safer(1), [], ["is_response_0_safe", "is_response_1_safe", "safer_response_id"]),
    "HelpSteer3": (
        *(helpsteer(-1), helpsteer(3), [helpsteer(0)]),
        ["domain", "language", "individual_preference"],
    ),
    "SHP": (shp(1), shp(0), [], ["score_A", "score_B"]),
    "AlpacaFarm": (alpacafarm(1), alpacafarm(2), [alpacafarm(1.5), alpacafarm(0)], ["raw_preference"]),
    "Chatbot Arena": (
        *(arena("model_a"), arena("model_b"), [arena("tie"), arena("tie (bothbad)"), arena("both_bad")]),
        ["model_a", "model_b"],
    ),
    "LMArena, lists": (
        *(arena_lists(1, 0, 0), arena_lists(0, 1, 0), [arena_lists(0, 0, 1)]),
        ["model_a"],
    ),
    "HelpSteer2": (strength(-3), strength(1), [strength(0)], ["split", "preference_statement"]),
    "UltraFeedback": (rated(8.5, 2), rated(1, 7), [rated(5, 5)], ["models"]),
    "Nectar": (ranked(1.0, 7.0), ranked(5.0, 2.0), [ranked(3, 3)], ["num_responses"]),
    "LMArena, texts": (arena_texts("model_a"), arena_texts("model_b"), [arena_texts("tie")], []),
}


@pytest.fixture
def write(tmp_path):
    def make(*rows, name="rows.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    return make


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("order", [1, -1])
def test_the_label_chooses_in_every_row_and_ties_are_counted(write, name, order):
    first, second, ties, unused = LAYOUTS[name]
    rows = [first, *ties, second][::order]
    pairs, report = load_preferences(write(*rows))
    found = [(list(pair.prompt), pair.chosen, pair.rejected) for pair in pairs]
    assert found == [([user("Q")], "first", "second"), ([user("Q")], "second", "first")][::order]
    assert report.bad_rows.keys() == ({"tie"} if ties else set())
    assert [origin.rpartition(" ")[2] for origin in report.bad_rows.get("tie", [])] == [
        str(number) for number in range(1, 1 + len(ties))
    ]
    assert (report.rows_read, report.rows_kept) == (2 + len(ties), 2)
    assert report.columns_unused == unused
    assert report.label in first


@pytest.mark.parametrize("name", LAYOUTS)
def test_numbers_and_conversations_may_be_text_in_a_table(tmp_path, name):
    first, second, ties, _ = LAYOUTS[name]
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, first)
        writer.writeheader()
        for row in (first, *ties, second):
            writer.writerow({key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()})
    if name == "HelpSteer3":
        with pytest.raises(DataError, match="prompt holds a list of messages inside a string"):
            load_preferences(file)
        return
    pairs, report = load_preferences(file)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("first", "second"), ("second", "first")]
    assert len(report.bad_rows.get("tie", [])) == len(ties)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_prompts_are_read_whoever_wins(write, name):
    first, second, ties, _ = LAYOUTS[name]
    prompts, report = load_prompts(write(first, *ties, second), unique=False)
    assert [list(prompt.prompt) for prompt in prompts] == [[user("Q")]] * (2 + len(ties))
    assert report.label is None
    assert set(report.columns_unused) >= {name for name in first if name.startswith(("winner", "labels", "preference"))}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_mapping_that_overrules_the_label_is_refused(write, name):
    first, second, _, _ = LAYOUTS[name]
    sides = [key for key, value in first.items() if "first" in str(value) or "second" in str(value)] * 2
    for columns in ({"chosen": sides[0], "rejected": sides[1]}, {"chosen": sides[1], "rejected": sides[0]}):
        with pytest.raises(DataError, match="leave chosen and rejected out of columns"):
            load_preferences(write(first, second), columns=columns)


def test_the_strength_of_a_preference_is_its_margin(write):
    pairs, _ = load_preferences(write(helpsteer(-1), helpsteer(3), helpsteer("-2"), helpsteer(2, margin=0.5)))
    assert [pair.margin for pair in pairs] == [1, 3, 2, 0.5]
    (pair,), _ = load_preferences(write(alpacafarm(2)))
    assert pair.margin is None


def test_what_else_stands_in_a_labelled_row_is_taken_as_everywhere(write):
    (pair,), _ = load_preferences(write(alpacafarm(2, input="1, 2", system="Be brief.", id="x", source="web")))
    assert list(pair.prompt) == [{"role": "system", "content": "Be brief."}, user("Q\n\n1, 2")]
    assert (pair.example_id, pair.source) == ("x", "web")
    (pair,), _ = load_preferences(write(safer(1) | {"q": "R"}), columns={"prompt": "q"})
    assert list(pair.prompt) == [user("R")]
    (pair,), _ = load_preferences(write(helpsteer(1, context=[user("a"), says("b"), user("c")])))
    assert list(pair.prompt) == [user("a"), says("b"), user("c")]


def test_a_row_with_chosen_and_rejected_is_no_labelled_one(write):
    pairs, report = load_preferences(write(safer(1) | {"chosen": "good", "rejected": "bad"}))
    assert (pairs[0].chosen, pairs[0].rejected, report.label) == ("good", "bad", None)
    assert {"better_response_id", "response_0", "response_1"} <= set(report.columns_unused)


def test_conversations_of_the_arena(write):
    parts = [{"type": "text", "text": "Q", "image": None, "mimeType": None}]
    row = arena("model_b", conversation_a=[{"role": "user", "content": parts}, says("first")])
    (pair,), _ = load_preferences(write(row))
    assert (list(pair.prompt), pair.chosen) == ([user("Q")], "second")
    picture = [{"type": "text", "text": "Q", "image": "x.png"}]
    with pytest.raises(DataError, match=r"row 0: .* a part of image"):
        load_preferences(write(row | {"conversation_a": [{"role": "user", "content": picture}, says("first")]}))
    longer = {
        f"conversation_{side}": [user("Q"), says(text), user("More"), says(text * 2)]
        for side, text in (("a", "first"), ("b", "second"))
    }
    (pair,), _ = load_preferences(write(arena("model_a", **longer)))  # `turn` 1 was judged
    assert (list(pair.prompt), pair.chosen, pair.rejected) == ([user("Q")], "first", "second")
    with pytest.raises(DataError, match="row 0: chosen and rejected differ before the last"):
        load_preferences(write(arena("model_a", **longer, turn=2)))


def test_lists_of_texts_inside_strings_are_exchanges(write):
    row = arena_lists(
        *(0, 1, 0),
        prompt='["Q", "R\\nS"]',
        response_a='["same \\"x\\"", null]',
        response_b='["same \\"x\\"", "second"]',
    )
    good = arena_lists(1, 0, 0)
    with pytest.raises(DataError, match="row 0: rejected has no text"):
        load_preferences(write(row, good))
    pairs, _ = load_preferences(write(row | {"response_a": '["same \\"x\\"", "first"]'}))
    assert list(pairs[0].prompt) == [user("Q"), says('same "x"'), user("R\nS")]
    assert (pairs[0].chosen, pairs[0].rejected) == ("second", "first")
    for wrong in ({"prompt": "Q"}, {"response_a": '["first", "more"]'}, {"response_b": "[1]"}):
        with pytest.raises(DataError, match=r"row 1: prompt, response_a and response_b are"):
            load_preferences(write(good, good | wrong))


def test_the_best_and_the_worst_of_a_list_make_the_pair_and_their_scores_the_margin(write):
    (pair,), _ = load_preferences(write(rated(8, 2.5, 5)))
    assert (pair.chosen, pair.rejected, pair.margin, pair.source) == ("first", "second", 5.5, "evol")
    (pair,), _ = load_preferences(write(ranked(2, 6)))
    assert (pair.chosen, pair.rejected, pair.margin) == ("first", "second", None)


def test_ratings_stand_in_for_an_overall_score_that_is_missing(write):
    row = rated(None, None, None)
    for item, ratings in zip(row["completions"], (("3", "N/A"), ("5", "4"), ("1", "2")), strict=True):
        item["annotations"] = {str(number): {"Rating": rating} for number, rating in enumerate(ratings)}
    (pair,), _ = load_preferences(write(row))
    assert (pair.chosen, pair.rejected, pair.margin) == ("first", "second", 3.0)


def test_parts_of_text_are_one_text_and_a_developer_is_a_system_message(write):
    parts = [{"type": "text", "text": "Is 7 "}, {"type": "text", "text": "odd?"}]
    prompt = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    (pair,), _ = load_preferences(write({"prompt": prompt, "chosen": [says([parts[1]])], "rejected": "No."}))
    assert list(pair.prompt) == [{"role": "system", "content": "Be brief."}, user("Is 7 odd?")]
    assert pair.chosen == "odd?"


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, "text", None])
def test_a_part_that_is_no_text_is_a_reason_of_refusal(write, part):
    content = [{"type": "text", "text": "What is this?"}, part]
    row = {"prompt": [{"role": "user", "content": content}], "chosen": "a", "rejected": "b"}
    _, report = load_preferences(
        write(row, strength(1), {"prompt": "Q", "chosen": "a", "rejected": "b"}), on_bad_rows="drop"
    )
    assert report.bad_rows["no_place"] == [f"{report.source}, row 0"]


WRONG = {
    "the best by score is the worst by its ratings": rated(10, 2)
    | {
        "completions": [
            {"response": "first", "overall_score": 10, "fine-grained_score": 1.5},
            {"response": "second", "overall_score": 7, "fine-grained_score": 4.0},
        ]
    },
    "one response with a score": rated(1, 2) | {"completions": [{"response": "first", "overall_score": 8}, {}]},
    "answers without ranks": ranked(1, 2) | {"answers": [{"answer": "first"}, {"answer": "second"}]},
    "an id of no response": safer(2),
    "no number": safer("left"),
    "a strength beyond the scale": helpsteer(4),
    "a label of no response": shp(2),
    "a label against the votes": shp(1) | {"score_A": 2, "score_B": 5},
    "neither 1 nor 2": alpacafarm(3),
    "an unknown winner": arena("gpt-4"),
    "two winners": arena_lists(1, 1, 0),
    "no winner": arena_lists(0, 0, 0),
}


@pytest.mark.parametrize("row", WRONG.values(), ids=WRONG)
def test_a_label_without_a_meaning_is_refused(write, row):
    good = next(first for first, *_ in LAYOUTS.values() if first.keys() == row.keys())
    with pytest.raises(DataError, match="row 1: "):
        load_preferences(write(good, row))
    pairs, report = load_preferences(write(good, row), on_bad_rows="drop")
    assert (len(pairs), list(report.bad_rows)) == (1, ["bad_label"])


def test_a_missing_label_or_response_is_a_bad_row_not_another_shape(write):
    for gone in ("better_response_id", "response_1", "prompt"):
        for row in (safer(1) | {gone: None}, {key: value for key, value in safer(1).items() if key != gone}):
            _, report = load_preferences(write(safer(0), row), on_bad_rows="drop")
            assert list(report.bad_rows) == ["missing_key"], (gone, row)


def test_ties_alone_are_refused(write):
    with pytest.raises(DataError, match="none of its 2 rows can be used: every one is a tie"):
        load_preferences(write(helpsteer(0), helpsteer(0)))


def test_a_tie_is_not_named_among_the_faults(write):
    with pytest.raises(DataError, match="1 of 3 rows cannot be used") as caught:
        load_preferences(write(helpsteer(0), helpsteer(1), helpsteer(1, response1="")))
    assert "row 0" not in str(caught.value)
    pairs, report = load_preferences(write(helpsteer(0), helpsteer(1), helpsteer(1, response1="")), on_bad_rows="drop")
    assert (len(pairs), report.rows_dropped) == (1, 2)
    assert "2 dropped (empty_response 1, tie 1)" in report.summary()
    assert "chosen by overall_preference" in report.summary()


UNKNOWN = {
    "winner": {"prompt": "Q", "answer_1": "a", "answer_2": "b", "winner": "answer_1"},
    "preferred": {"prompt": "Q", "a": "a", "b": "b", "preferred": "a"},
    "label": {"prompt": "Q", "completion": "a", "label": True},
    "better": {"prompt": "Q", "left": "a", "right": "b", "better": 1},
    "rank": {"prompt": "Q", "answers": ["a", "b"], "rank": [2, 1]},
    "chosen_id": {"prompt": "Q", "a": "a", "b": "b", "chosen_id": 0},
    "score_b": {"prompt": "Q", "a": "a", "b": "b", "score_b": "0.5"},
    "isBetterRating": {"prompt": "Q", "a": "a", "b": "b", "isBetterRating": 1},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_mapping_is_advised_beside_a_label(write, name):
    with pytest.raises(DataError, match=f"{name}.* may say which response is better") as caught:
        load_preferences(write(UNKNOWN[name]))
    assert "COLUMN" not in str(caught.value)


def test_the_report_comes_out_of_the_token_cache_whole(write, tiny_qwen2, tmp_path):
    chat_format = ChatFormat(load_tokenizer(str(tiny_qwen2)))
    file = write(helpsteer(0), helpsteer(1), helpsteer(-2))
    for _ in range(2):
        store = tokenize_source(WeightedSource(str(file)), chat_format, cache_dir=tmp_path / "cache")
        assert (store.report.label, len(store.report.bad_rows["tie"])) == ("overall_preference", 1)
        assert store.report.columns_unused == ["domain", "language", "individual_preference"]
        store.report.enforce("error")
