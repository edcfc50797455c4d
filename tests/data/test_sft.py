"""Rows for SFT: what is read of each shape, and which tokens of a conversation are learned."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlhf_lightning import PreferenceDataModule, SFTDataModule
from rlhf_lightning.commands.main import main
from rlhf_lightning.data import DataError, load_sft
from rlhf_lightning.data.doctor import diagnose
from rlhf_lightning.data.tokenizer import load_tokenizer

U1, A1 = {"role": "user", "content": "one two"}, {"role": "assistant", "content": "yes"}
U2, A2 = {"role": "user", "content": "three"}, {"role": "assistant", "content": "no sir"}
SYSTEM = {"role": "system", "content": "Be brief."}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_LAST = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
) + CHATML.replace("{% else %}", "{% else %}{{ 'now: ' if loop.index0 == ns.last else '' }}", 1)
"""Writes something before the last question alone, as Mistral's did with the system message."""
THOUGHTLESS = CHATML.replace(
    "m['content'] + '<|im_end|>' }}{% endgen",
    "(m['content'] if loop.last else m['content'].split('</think>')[-1]) + '<|im_end|>' }}{% endgen",
)


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen2):
    return load_tokenizer(str(tiny_qwen2))


@pytest.fixture
def make(tiny_qwen2, tmp_path):
    """Makes a data module of some rows, read for training and validation."""

    def read(rows, *, template=None, **options):
        if template:
            (tmp_path / "template.jinja").write_text(template)
            options["chat_template"] = str(tmp_path / "template.jinja")
        settings = {"val": rows, "tokenizer": str(tiny_qwen2), "cache_dir": str(tmp_path / "cache"), "shuffle": False}
        data = SFTDataModule(rows, **settings | options)
        data.setup("fit")
        return data

    return read


def learned(data, index=0, role="train"):
    """Ids of a row, and the text of each stretch of it that is learned."""
    rows, form = data.rows[role], data.chat_format
    ids, mask = np.concatenate(rows.segments(index)), rows.response_mask(index)
    assert ids.shape == mask.shape
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]]))).reshape(-1, 2)
    return ids.tolist(), [form.tokenizer.decode(ids[start:stop]) for start, stop in edges]


SHAPES = {
    "prompt and response": {"prompt": "one two", "response": "yes"},
    "prompt and completion": {"prompt": "one two", "completion": "yes"},
    "messages on both sides": {"prompt": [U1], "completion": [A1]},
    "instruction": {"instruction": "one", "input": "", "output": "yes"},
    "messages": {"messages": [U1, A1]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "yes"}]},
    "a pair": {"prompt": "one two", "chosen": "yes", "rejected": "no"},
    "a pair of conversations": {"chosen": [U1, A1], "rejected": [U1, A2]},
    "a labelled pair": {"prompt": "one two", "response_0": "no", "response_1": "yes", "better_response_id": 1},
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_each_shape_gives_its_prompt_and_response(row):
    (example,), report = load_sft([row])
    assert list(example.prompt) == [U1 if "instruction" not in row else {"role": "user", "content": "one"}]
    assert (example.response, report.rows_kept) == ("yes", 1)
    assert example.every_turn == ("messages" in row or "conversations" in row)


def test_shapes_may_be_mixed_row_by_row_with_nulls_for_what_others_have():
    names = sorted(name for row in SHAPES.values() for name in row)
    rows = [dict.fromkeys(names) | row for row in SHAPES.values() if "response_0" not in row]
    examples, report = load_sft(rows)
    assert [example.response for example in examples] == ["yes"] * len(rows)
    assert report.columns_unused == ["better_response_id", "response_0", "response_1"]


def test_columns_are_mapped_and_what_stands_beside_is_taken():
    row = {"question": "one two", "answer": "yes", "system": "Be brief.", "history": [["a", "b"]], "id": 7, "x": 1}
    (example,), report = load_sft([row], columns={"prompt": "question", "response": "answer"})
    roles = [message["role"] for message in example.prompt]
    assert (roles, example.example_id) == (["system", "user", "assistant", "user"], "7")
    assert report.columns_unused == ["x"]
    (example,), _ = load_sft([{"chat": [U1, A1]}], columns={"messages": "chat"})
    assert example.response == "yes"
    with pytest.raises(DataError, match="'chat' for messages"):
        load_sft([{"messages": [U1, A1]}], columns={"messages": "chat"})


BAD = {
    "no_response": [{"messages": [U1]}, {"messages": [SYSTEM, U1]}, {"messages": "\n\nHuman: x"}],
    "empty_response": [
        {"prompt": "x", "response": " "},
        {"messages": [U1, {"role": "assistant", "content": ""}]},
        {"messages": [U1, {"role": "assistant", "content": " "}, U2, A2]},
    ],
    "empty_prompt": [{"prompt": "", "response": "x"}, {"messages": [A1]}],
    "bad_messages": [
        {"messages": [U1, A1, A2]},
        {"messages": [U1, {"role": "narrator", "content": "x"}, A1]},
        {"messages": json.dumps([U1, A1])},
    ],
    "missing_key": [{"prompt": "x", "response": None}, {"text": "x"}],
    "no_place": [
        {"messages": [U1, A1 | {"reasoning_content": "hm"}, U2, A2]},
        {"messages": [U1, A1], "tools": [{}, "x"]},
        {"messages": [U1, A1 | {"weight": 0}, U2, A2 | {"weight": 1}]},
    ],
}


@pytest.mark.parametrize(("reason", "row"), [(reason, row) for reason, rows in BAD.items() for row in rows])
def test_a_row_that_cannot_be_learned_from_is_refused_with_its_reason(reason, row):
    examples, report = load_sft([row, SHAPES["messages"]], on_bad_rows="drop")
    assert (len(examples), list(report.bad_rows)) == (1, [reason])
    with pytest.raises(DataError, match="row 0: "):
        load_sft([row, SHAPES["messages"]])


def test_pairs_are_not_made_of_rows_for_sft(tiny_qwen2):
    with pytest.raises(DataError, match="--data SFTDataModule"):
        PreferenceDataModule([SHAPES["messages"]], tokenizer=str(tiny_qwen2)).setup("fit")


@pytest.mark.parametrize("template", [None, CHATML], ids=["its own", "with generation marks"])
def test_every_assistant_turn_is_learned_with_its_eos_and_nothing_else(make, template):
    data = make([{"messages": [SYSTEM, U1, A1, U2, A2, U1]}], template=template)
    _, texts = learned(data)
    assert texts == ["yes<|im_end|>", "no sir<|im_end|>"]
    data = make([{"prompt": [SYSTEM, U1, A1, U2], "response": "no sir"}], template=template)
    assert learned(data)[1] == ["no sir<|im_end|>"]


def test_ids_and_mask_are_those_of_transformers_for_a_template_with_generation_marks(make, tokenizer):
    messages = [SYSTEM, U1, A1, U2, A2, U1, {"role": "assistant", "content": "maybe so, or not\nat all"}]
    data = make([{"messages": messages}], template=CHATML)
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=CHATML, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = learned(data)[0], data.rows["train"].response_mask(0)
    assert theirs["input_ids"][: len(ids)] == ids
    assert theirs["assistant_masks"][: len(ids)] == mask.astype(int).tolist()
    assert sum(theirs["assistant_masks"][len(ids) :]) == 0


def test_a_format_without_an_end_of_earlier_turns_has_their_words_alone(make, tokenizer):
    data = make([{"messages": [U1, A1, U2, A2]}], chat_template="transcript")
    assert learned(data)[1] == [" yes", f" no sir{tokenizer.eos_token}"]


@pytest.mark.parametrize(
    ("template", "messages", "why"),
    [
        (MARKED_LAST, [U1, A1, U2, A2], "writes the beginning"),
        (THOUGHTLESS, [U1, {"role": "assistant", "content": "<think>a</think>b"}, U2, A2], "changes the words"),
    ],
    ids=["marks the last question", "leaves out a thought"],
)
def test_a_template_that_writes_earlier_turns_otherwise_is_refused(make, template, messages, why):
    with pytest.raises(DataError, match=rf"row 0: the chat template {why}.*rows of one prompt and one response"):
        make([{"messages": messages}, {"messages": [U1, A1]}], template=template)
    data = make([{"messages": messages}, {"messages": [U1, A1]}], template=template, on_bad_rows="drop")
    assert list(data.reports["train"].bad_rows) == ["template_refused"]


@pytest.mark.parametrize("truncation", ["left", "drop"])
def test_truncation_takes_the_oldest_turns_and_what_was_learned_of_them(make, truncation):
    long = {"role": "user", "content": "word " * 40}
    data = make(
        [{"messages": [SYSTEM, long, A1, U2, A2, U1, A1]}, {"messages": [U1, A1]}], max_length=60, truncation=truncation
    )
    if truncation == "drop":
        assert data.reports["train"].bad_rows.keys() == {"too_long"}
        return
    ids, texts = learned(data)
    assert len(ids) <= 60
    assert texts == ["no sir<|im_end|>", "yes<|im_end|>"]
    assert "Be brief." in data.chat_format.tokenizer.decode(ids)


def test_a_batch_holds_the_rows_and_their_masks(make):
    rows = [{"messages": [U1, A1, U2, A2]}, {"prompt": "x", "response": "yes"}, SHAPES["a pair"]]
    data = make(rows, batch_size=3)
    (batch,) = list(data.train_dataloader())
    for row, index in enumerate(batch.index.tolist()):
        ids, mask = learned(data, index)[0], data.rows["train"].response_mask(index)
        assert batch.input_ids[row][batch.attention_mask[row]].tolist() == ids
        assert batch.response_mask[row].nonzero().flatten().tolist() == np.flatnonzero(mask).tolist()
    assert batch.response_mask.sum() < batch.attention_mask.sum()


def test_the_ids_of_a_row_do_not_depend_on_its_shape(make):
    whole = learned(make([{"messages": [U1, A1, U2, A2]}]))[0]
    assert learned(make([{"prompt": [U1, A1, U2], "response": "no sir"}]))[0] == whole
    pairs = [{"prompt": [U1, A1, U2], "chosen": "no sir", "rejected": "x"}]
    assert learned(make(pairs))[0] == whole
    preferences = PreferenceDataModule(pairs, val=pairs, tokenizer=make(pairs).chat_format.tokenizer)
    preferences.setup("fit")
    assert np.concatenate(preferences.pairs["train"].segments(0)[:2]).tolist() == whole


def test_the_doctor_knows_conversations(make, tiny_qwen2):
    rows = [{"messages": [U1, A1, U2, A2]}, SHAPES["messages"], SHAPES["messages"], {"messages": [U1]}]
    data = SFTDataModule(rows, val=[SHAPES["messages"]], tokenizer=str(tiny_qwen2), max_length=64)
    train, val = diagnose(data).roles
    assert (train.rows_read, train.pairs, list(train.bad_rows)) == (4, 3, ["no_response"])
    assert len(train.duplicates) == len(val.shared_prompts) == 1
    assert (train.longer_chosen, train.contradictions) == (None, [])
    assert set(train.quantiles) == {"prompt", "response", "row"}
    (pieces,) = train.samples[0].sides.values()
    assert "".join(piece.text for piece in pieces if piece.in_response) == "yes<|im_end|>no sir<|im_end|>"
    (words,) = diagnose(SFTDataModule(rows), roles=("train",)).roles
    assert [piece.text for piece in words.samples[1].sides["response"]] == ["[user] one two\n\n[assistant] ", "yes"]


def test_the_doctor_command_sees_by_the_first_row_what_it_is_given(tmp_path, capsys):
    (tmp_path / "sft.jsonl").write_text(json.dumps(SHAPES["messages"]) + "\n" + json.dumps({"messages": [U1]}) + "\n")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(SHAPES["a pair"]) + "\n")
    assert main(["doctor", str(tmp_path / "sft.jsonl")]) == 1
    assert "no_response" in capsys.readouterr().out
    assert (
        main(["doctor", "--data.train", str(tmp_path / "sft.jsonl"), "--data.val", str(tmp_path / "pairs.jsonl")]) == 1
    )
    assert "longer is chosen" not in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "pairs.jsonl")]) == 0
    assert "longer is chosen" in capsys.readouterr().out
