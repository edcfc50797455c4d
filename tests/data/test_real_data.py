"""The real and the damaged files of ../shared/data, where that directory stands beside the repository."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rlhf_lightning.data import DataError, load_preferences
from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.selection import TokenizedPairs
from rlhf_lightning.data.sources import WeightedSource
from rlhf_lightning.data.splits import prompt_hash
from rlhf_lightning.data.tokenized import tokenize_source
from rlhf_lightning.data.tokenizer import load_tokenizer

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="no directory ../shared/data beside the repository")


def manifest(folder):
    file = SHARED / folder / "manifest.json"
    return json.loads(file.read_text(encoding="utf-8"))["files"] if file.is_file() else []


def cases(folder):
    """The files of a manifest as parameters."""
    return [pytest.param(entry, id=entry["file"]) for entry in manifest(folder)]


@pytest.mark.parametrize("entry", cases("formats"))
def test_every_shape_loads_to_the_expected_rows(entry):
    lines = (SHARED / "formats" / entry["expected"]).read_text(encoding="utf-8").splitlines()
    examples, report = load_preferences(SHARED / "formats" / entry["file"], columns=entry["column_map"])
    got = [{"prompt": list(e.prompt), "chosen": e.chosen, "rejected": e.rejected} for e in examples]
    assert got == [json.loads(line) for line in lines]
    assert report.rows_dropped == 0


def outcome(path, policy):
    """Number of examples and no message, or the message of the refusal."""
    try:
        examples, report = load_preferences(path, on_bad_rows=policy)
    except DataError as error:
        return None, str(error)
    assert len(examples) == report.rows_kept
    return len(examples), report.summary()


MORE_ROWS = {
    # What the manifest leaves open: how many rows are kept where it allows more than one answer.
    "17_nan_margin_label.jsonl": 3,  # NaN and Infinity dropped; a negative margin and none are kept
    "28_identical_after_truncation.jsonl": 3,  # responses are never cut; the tokens decide
    "29_prompt_longer_than_max_length.jsonl": 3,
    "32_wrong_role_order.jsonl": 2,  # two user turns in a row: the chat template decides
}


@pytest.mark.parametrize("entry", cases("hostile"))
def test_every_damaged_file_behaves_as_its_manifest_says(entry):
    path = SHARED / "hostile" / entry["file"]
    expected = set(entry["expect"].split("_or_"))
    kept, message = outcome(path, "error")
    if kept is None:
        # `error` is the policy asked for, so a file that may be dropped from may be refused as well.
        assert expected & {"error", "drop"}
        assert entry["file"] in message
        assert "\n" not in message
        for part in entry["must_mention"]:
            assert part.lower() in message.lower()
    else:
        assert "ok" in expected
        assert kept == entry["rows_total"]
    kept, _ = outcome(path, "drop")
    if kept is None:
        assert "error" in expected
    else:
        assert expected & {"ok", "drop"} or entry["file"] == "17_nan_margin_label.jsonl"
        assert kept == MORE_ROWS.get(entry["file"], entry["rows_valid"])


def tokenized(file, chat_format, *, on_bad_rows="error", **options):
    store = tokenize_source(WeightedSource(str(file)), chat_format)
    store.report.enforce(on_bad_rows)
    return TokenizedPairs.fitting([store], [np.ones(len(store), dtype=bool)], **options)


GIANT_TEXTS = ["28_identical_after_truncation", "29_prompt_longer_than_max_length", "27_one_megabyte_response"]


@pytest.mark.parametrize("name", GIANT_TEXTS)
def test_giant_texts_end_as_whole_rows_or_counted(name, tiny_qwen2):
    chat_format = ChatFormat(load_tokenizer(str(tiny_qwen2)))
    pairs, report = tokenized(SHARED / "hostile" / f"{name}.jsonl", chat_format, max_length=512)
    assert len(pairs) + report.rows_dropped == 3
    assert set(report.bad_rows) <= {"too_long"}
    assert pairs.lengths.max() <= 512
    assert (len(pairs), len(report.rows_cut)) == ((3, 1) if name.startswith("29") else (2, 0))


def test_control_tokens_of_the_tokenizer_in_texts_are_refused_and_those_of_others_are_text(tiny_qwen2):
    chat_format = ChatFormat(load_tokenizer(str(tiny_qwen2)))
    file = SHARED / "hostile" / "31_special_tokens_in_text.jsonl"
    pairs, report = tokenized(file, chat_format, max_length=1024, on_bad_rows="drop")
    assert len(pairs) + len(report.bad_rows["special_tokens"]) == 5
    eos = chat_format.eos_id
    for index in range(len(pairs)):
        for side in pairs.segments(index)[1:]:
            assert (side == eos).nonzero()[0].tolist() == [len(side) - 1]


@pytest.mark.parametrize(("file", "rows"), [("alpaca_train", 20136), ("alpaca_val", 1255), ("alpaca_long", 300)])
def test_the_alpaca_pairs_load_whole(file, rows):
    examples, report = load_preferences(SHARED / "pairs" / f"{file}.parquet")
    assert (len(examples), report.rows_dropped) == (rows, 0)
    assert all(0 < example.margin <= 1 for example in examples)


def test_the_alpaca_sides_share_no_prompt():
    train, val = (load_preferences(SHARED / "pairs" / f"alpaca_{side}.parquet")[0] for side in ("train", "val"))
    assert {prompt_hash(pair.prompt) for pair in train}.isdisjoint(prompt_hash(pair.prompt) for pair in val)
    assert len({example.prompt[0]["content"] for example in val}) == 82


def test_the_hh_pairs_load_but_for_the_rows_that_their_readme_names():
    with pytest.raises(DataError, match="7 of 1400 rows cannot be used"):
        load_preferences(SHARED / "hh_harmless_base")
    examples, report = load_preferences(SHARED / "hh_harmless_base", on_bad_rows="drop")
    rows = {key: [int(origin.rpartition(" ")[2]) for origin in found] for key, found in report.bad_rows.items()}
    assert rows == {"prompts_differ": [745, 1009, 1164], "empty_response": [47, 291, 548, 653]}
    assert len(examples) == 1393
    assert len(load_preferences(SHARED / "hh_harmless_base", split="val")[0]) == 200
