"""What a script gives as objects: rows and a tokenizer in memory; and data that takes the tokenizer of the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace

import datasets
import pytest
import torch

from rlhf_lightning import PreferenceDataModule, PromptDataModule, RewardModel
from rlhf_lightning.data import DataError, load_preferences, load_prompts
from rlhf_lightning.data.tokenizer import load_tokenizer
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.training.checkpoints import ORIGIN
from tests.training.conftest import TRAIN_PAIRS


@pytest.fixture(scope="module")
def rows(pairs) -> list[dict]:
    return [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]


@pytest.fixture(params=["list", "tuple", "datasets.Dataset", "selected"])
def given(request, rows) -> Sequence[dict]:
    """The same rows, as a script may have them."""
    data_set = datasets.Dataset.from_list([{"prompt": "-", "chosen": "x", "rejected": "y"}, *rows])
    return {
        "list": rows,
        "tuple": tuple(rows),
        "datasets.Dataset": datasets.Dataset.from_list(rows),
        "selected": data_set.select(range(1, len(data_set))),
    }[request.param]


def test_rows_in_memory_are_the_pairs_and_prompts_of_their_file(given, pairs):
    for load in (load_preferences, load_prompts):
        examples, report = load(given)
        expected, _ = load(pairs / "train.jsonl")
        assert [example.texts for example in examples] == [example.texts for example in expected]
        assert (report.source, report.rows_read) == (f"{TRAIN_PAIRS} rows in memory", TRAIN_PAIRS)
    assert examples[3].origin == f"{TRAIN_PAIRS} rows in memory, row 3"


def test_a_data_module_makes_the_same_batches_of_rows_in_memory(given, pairs, tiny_qwen2, tmp_path):
    options = {"tokenizer": str(tiny_qwen2), "batch_size": 3, "seed": 1, "cache_dir": str(tmp_path)}
    for kind in (PreferenceDataModule, PromptDataModule):
        made = []
        for train in (given, str(pairs / "train.jsonl")):
            data = kind(train=train, val=train, **options)
            data.setup("fit")
            made.append([*data.train_dataloader(), *data.val_dataloader()])
        for ours, expected in zip(*made, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.input_ids, expected.input_ids, strict=True))
            assert torch.equal(ours.index, expected.index)


def test_rows_that_change_are_tokenized_again(rows, tiny_qwen2, tmp_path):
    def first_ids(given):
        data = PreferenceDataModule(given, val=given, tokenizer=str(tiny_qwen2), cache_dir=str(tmp_path))
        data.setup("validate")
        return data.pairs["val"].segments(0)[1].tolist()

    assert first_ids(rows) == first_ids([dict(row) for row in rows])
    assert len(list(tmp_path.glob("*.lock"))) == 1
    assert first_ids([rows[0] | {"chosen": "Something else."}, *rows[1:]]) != first_ids(rows)


def test_rows_in_memory_are_weighted_beside_files_and_have_columns(rows, pairs, tiny_qwen2):
    renamed = [{"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in rows]
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    mixture = [{"source": renamed, "weight": 2, "columns": columns}, str(pairs / "val.jsonl")]
    data = PreferenceDataModule(mixture, val=rows, tokenizer=str(tiny_qwen2))
    data.setup("fit")
    assert [source.weight for source in data.sources["train"]] == [2, 1]
    assert data.pairs["train"].example_ids[:2] == ["memory:0", "memory:1"]
    named = [row | {"source": "a name"} for row in rows]  # a column of ours, and no name of a file
    assert {example.source for example in load_preferences(named)[0]} == {"a name"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "list of sources is empty"),
        (datasets.Dataset.from_list([]), "0 rows in memory"),
        ([{"prompt": "x", "chosen": "a", "rejected": "b"}, "y"], "2 rows in memory, row 1: holds a str"),
        ([{"question": "x", "good": "a", "bad": "b"}], "1 rows in memory: no column 'chosen'"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list([{"a": 1}])}), "DatasetDict with the keys train"),
        ([{"source": "a.jsonl", "wieght": 2}], "dict with the keys source, wieght"),
        (7, "a int is not a valid source"),
        (iter([]), "is not a valid source"),
    ],
)
def test_what_is_no_data_is_refused_in_a_line(given, words):
    with pytest.raises(DataError, match=words) as refused:
        load_preferences(given)
    assert "\n" not in str(refused.value)


def test_a_tokenizer_may_be_an_object(rows, tiny_qwen2, caplog):
    tokenizer = load_tokenizer(str(tiny_qwen2))
    ids = []
    for given in (tokenizer, str(tiny_qwen2)):
        data = PreferenceDataModule(rows, val=rows, tokenizer=given)
        data.setup("validate")
        ids.append([data.pairs["val"].segments(index)[0].tolist() for index in range(TRAIN_PAIRS)])
        assert data.tokenizer_source == str(tiny_qwen2)
    assert ids[0] == ids[1]
    with pytest.raises(ConfigurationError, match=r"data.tokenizer: a Tokenizer is no tokenizer of transformers"):
        PreferenceDataModule(rows, val=rows, tokenizer=tokenizer.backend_tokenizer).setup("validate")


def test_without_a_tokenizer_the_data_takes_that_of_the_model(build, rows, tiny_qwen2, trainer, tmp_path):
    module, expected = build(data={"train": rows, "val": rows})
    data = PreferenceDataModule(rows, val=rows, batch_size=2, seed=3)
    run = trainer(max_steps=2)
    run.fit(module, datamodule=data)
    assert data.tokenizer_source == str(tiny_qwen2)
    expected.setup("fit")
    assert data.chat_format.fingerprint() == expected.chat_format.fingerprint()
    run.save_checkpoint(tmp_path / "run.ckpt")
    stored = torch.load(tmp_path / "run.ckpt", weights_only=False)
    assert stored[ORIGIN]["tokenizer"] == str(tiny_qwen2)
    assert stored[ORIGIN]["training"]["data"] == [f"{TRAIN_PAIRS} rows in memory"]
    assert rows[0]["chosen"].encode() not in (tmp_path / "run.ckpt").read_bytes()


def test_without_a_tokenizer_and_a_model_there_is_none(rows):
    data = PreferenceDataModule(rows, val=rows)
    data.trainer = SimpleNamespace(lightning_module=None)
    with pytest.raises(ConfigurationError, match=r"data.tokenizer: give"):
        data.setup("validate")


def test_the_tokenizer_of_another_model_is_refused(rows, tiny_qwen2, trainer):
    other = load_tokenizer(str(tiny_qwen2))
    other.add_tokens([f"word{number}" for number in range(500)])
    data = PreferenceDataModule(rows, val=rows, tokenizer=other)
    with pytest.raises(ConfigurationError, match="give the tokenizer of this model"):
        trainer(max_steps=1).fit(RewardModel(str(tiny_qwen2)), datamodule=data)
