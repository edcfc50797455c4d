"""From a source to batches: which pairs serve which role, and what is said about the rest."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from rlhf_lightning.data import DataError
from rlhf_lightning.data.datamodules import PreferenceDataModule
from rlhf_lightning.data.sources import WeightedSource
from rlhf_lightning.data.token_cache import content_key as real_key
from rlhf_lightning.data.tokenizer import load_tokenizer
from rlhf_lightning.errors import ConfigurationError, ModelError


def write(path, *prompts, **extra):
    rows = [{"prompt": prompt, "chosen": f"yes {prompt}", "rejected": "no", **extra} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(name, count):
    return [f"{name} {number}" for number in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen2):
    return str(tiny_qwen2)


@pytest.fixture
def make(tokenizer):
    """A data module attached to what it asks of a trainer."""

    def module(train, *, accumulate=1, rank=0, world_size=1, callbacks=(), **options):
        data = PreferenceDataModule(train, **{"tokenizer": tokenizer, "batch_size": 4, **options})
        data.trainer = SimpleNamespace(
            accumulate_grad_batches=accumulate,
            overfit_batches=0,
            limit_val_batches=1.0,
            limit_test_batches=1.0,
            limit_predict_batches=1.0,
            global_rank=rank,
            world_size=world_size,
            callbacks=list(callbacks),
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        return data

    return module


def ids_of(data, role):
    return data.pairs[role].example_ids


def files_of(data, role):
    """Names of the files that the pairs of a role come from."""
    return {example_id.partition(":")[0] for example_id in ids_of(data, role)}


def test_fit_reads_training_and_validation_and_nothing_else(make, tmp_path):
    train, val = write(tmp_path / "a.jsonl", "x", "y"), write(tmp_path / "b.jsonl", "z")
    data = make(train, val=val, test=str(tmp_path / "missing.jsonl"))
    data.setup("fit")
    assert ids_of(data, "train") == ["a.jsonl:0", "a.jsonl:1"]
    assert ids_of(data, "val") == ["b.jsonl:0"]
    with pytest.raises(DataError, match=r"missing.jsonl: no such file"):
        data.setup("test")


def test_validate_reads_no_training_data_where_validation_has_its_own(make, tmp_path):
    data = make(str(tmp_path / "missing.jsonl"), val=write(tmp_path / "b.jsonl", "z"))
    data.setup("validate")
    assert list(data.pairs) == ["val"]


def test_without_validation_data_a_part_of_the_prompts_is_held_out(make, tmp_path):
    train = write(tmp_path / "a.jsonl", *numbered("prompt", 60), *numbered("prompt", 60))
    data = make(train, val_fraction=0.3)
    data.setup("fit")
    sides = [{int(i.partition(":")[2]) % 60 for i in ids_of(data, role)} for role in ("train", "val")]
    assert sides[0].isdisjoint(sides[1])
    assert sides[0] | sides[1] == set(range(60))
    assert len(data.pairs["train"]) + len(data.pairs["val"]) == 120
    again = make(train, val_fraction=0.3)
    again.setup("validate")
    assert ids_of(again, "val") == ids_of(data, "val")


def test_test_pairs_are_the_test_source_with_or_without_a_validation_source(make, tmp_path):
    train, other = write(tmp_path / "a.jsonl", *numbered("prompt", 60)), write(tmp_path / "b.jsonl", "z")
    for options in ({}, {"val": write(tmp_path / "c.jsonl", "v")}):
        data = make(train, test=other, **options)
        data.setup("test")
        assert ids_of(data, "test") == ["b.jsonl:0"]


def test_without_test_pairs_the_validation_pairs_are_tested(make, tmp_path):
    train = write(tmp_path / "a.jsonl", *numbered("prompt", 60))
    for options, file in (({}, "a.jsonl"), ({"val": write(tmp_path / "b.jsonl", "v", "w")}, "b.jsonl")):
        data = make(train, **options)
        data.setup("fit")
        for stage in ("test", "predict"):
            data.setup(stage)
            assert ids_of(data, "test") == ids_of(data, "val")
        assert files_of(data, "test") == {file}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("train val test", {"train": "train.jsonl", "val": "val.jsonl", "test": "test.jsonl"}),
        ("train val", {"train": "train.jsonl", "val": "val.jsonl", "test": "val.jsonl"}),
        ("train test", {"train": "train.jsonl", "val": "train.jsonl", "test": "test.jsonl"}),
        ("train", {"train": "train.jsonl", "val": "train.jsonl", "test": "train.jsonl"}),
        ("pairs val", {"train": "pairs.jsonl", "val": "val.jsonl", "test": "val.jsonl"}),
    ],
)
def test_a_directory_serves_each_role_from_the_file_of_its_name(make, tmp_path, names, expected):
    for name in names.split():
        write(tmp_path / f"{name}.jsonl", *numbered(name, 60))
    data = make(str(tmp_path))
    data.setup("fit")
    data.setup("test")
    assert {role: files_of(data, role) for role in data.pairs} == {role: {file} for role, file in expected.items()}


def test_the_built_in_set_brings_its_own_validation_pairs(make):
    data = make("builtin:courtesy")
    data.setup("fit")
    assert [len(data.pairs[role]) for role in ("train", "val")] == [600, 200]


def test_a_prompt_on_both_sides_is_warned_about(make, tmp_path, caplog):
    train, val = write(tmp_path / "a.jsonl", "x", "Y y", "z"), write(tmp_path / "b.jsonl", "y  Y", "w", "x")
    data = make(train, val=val)
    with caplog.at_level(logging.WARNING, "rlhf_lightning"):
        data.setup("fit")
    assert "2 of 3 pairs of val have a prompt that is also trained on" in caplog.text
    caplog.clear()
    data.setup("fit")
    make(write(tmp_path / "c.jsonl", *numbered("prompt", 60))).setup("fit")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_limit_takes_a_random_part_in_the_order_of_the_file(make, tmp_path):
    train, val = write(tmp_path / "a.jsonl", *numbered("prompt", 60)), write(tmp_path / "b.jsonl", *numbered("v", 9))

    def chosen(**options):
        data = make(train, val=val, **options)
        data.setup("fit")
        assert len(data.pairs["val"]) == 9
        return [int(i.partition(":")[2]) for i in ids_of(data, "train")]

    part = chosen(limit=20, seed=1)
    assert len(part) == 20
    assert part == sorted(part)
    assert part != list(range(20))
    assert part == chosen(limit=20, seed=1)
    assert part != chosen(limit=20, seed=2)
    assert set(part) < set(chosen(limit=30, seed=1))
    assert chosen(limit=60) == chosen(limit=99) == list(range(60))


def test_each_role_has_a_limit_of_its_own_after_the_split_by_prompt(make, tmp_path, caplog):
    source = write(tmp_path / "a.jsonl", *numbered("prompt", 200))

    def taken(**options):
        data = make(source, **options)
        data.setup("fit")
        data.setup("test")
        return {role: ids_of(data, role) for role in ("train", "val", "test")}

    whole = taken()
    with caplog.at_level(logging.INFO, "rlhf_lightning"):
        few = taken(limit=20, val_limit=5, test_limit=3, seed=7)
    assert {role: len(ids) for role, ids in few.items()} == {"train": 20, "val": 5, "test": 3}
    assert all(set(few[role]) < set(whole[role]) for role in few)
    other = taken(limit=20, val_limit=5, test_limit=3, seed=8)
    assert other["train"] != few["train"]
    assert (other["val"], other["test"]) == (few["val"], few["test"])
    assert "train: 20 pairs, drawn at random (limit 20, seed 7)" in caplog.text
    assert "val: 5 pairs, drawn at random (val_limit 5)" in caplog.text


def test_bad_rows_follow_the_policy_from_the_file_to_the_tokens(make, tmp_path):
    train = tmp_path / "a.jsonl"
    write(train, "fine", "a <|im_end|>", "")
    val = write(tmp_path / "b.jsonl", "v")
    with pytest.raises(DataError, match=r"2 of 3 rows .*row 1: .*control token.*row 2: the prompt has no text"):
        make(str(train), val=val).setup("fit")
    data = make(str(train), val=val, on_bad_rows="drop")
    data.setup("fit")
    assert ids_of(data, "train") == ["a.jsonl:0"]
    reasons = {reason: [row.split(", ")[-1] for row in rows] for reason, rows in data.reports["train"].bad_rows.items()}
    assert reasons == {"special_tokens": ["row 1"], "empty_prompt": ["row 2"]}
    assert data.reports["val"].bad_rows == {}
    write(train, "fine", "a <|im_end|>")
    with pytest.raises(DataError, match=r"1 of 2 rows .*row 1: .*control token"):
        make(str(train), val=val).setup("fit")


def test_what_is_cut_or_too_long_is_reported_to_the_role_it_belongs_to(make, tmp_path):
    rows = [{"prompt": f"{n} " + "word " * 80, "chosen": "yes", "rejected": "no " * (90 * (n % 2))} for n in range(60)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row | {"rejected": row["rejected"] or "no"}) + "\n" for row in rows))
    data = make(str(file), val_fraction=0.3, max_length=64)
    data.setup("fit")
    cut = [set(data.reports[role].rows_cut) for role in ("train", "val")]
    too_long = [set(data.reports[role].bad_rows["too_long"]) for role in ("train", "val")]
    assert [len(part) for part in cut] == [len(data.pairs[role]) for role in ("train", "val")]
    assert cut[0].isdisjoint(cut[1])
    assert too_long[0].isdisjoint(too_long[1])
    assert len(cut[0] | cut[1]) == len(too_long[0] | too_long[1]) == 30
    for role in ("train", "val"):
        report = data.reports[role]
        assert report.rows_read == len(data.pairs[role]) + report.rows_dropped
    assert data.reports["train"].rows_read + data.reports["val"].rows_read == 60
    assert data.reports["val"].summary().startswith(f"held out by prompt of {file}: ")


def test_a_fit_begins_with_three_lines(make, tmp_path, caplog):
    train = write(tmp_path / "a.jsonl", "short", "word " * 80, "short")
    rows = [{"prompt": "word " * 80, "chosen": "yes", "rejected": "none"}]
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    with caplog.at_level(logging.INFO, "rlhf_lightning"):
        make(train, val=str(tmp_path / "b.jsonl"), max_length=64).setup("fit")
    train_line, val_line, statistics = caplog.messages
    # The second response repeats its long prompt, so cutting the prompt is not enough.
    assert train_line.startswith("train: 2 pairs (")
    assert train_line.endswith("a.jsonl: 3 rows read, 1 dropped (too_long 1))")
    assert val_line.endswith("b.jsonl: 1 rows read; 1 prompts cut to fit max_length 64)")
    assert "the response with more characters is chosen in 0.0 % of val; 1 duplicates and 0 contradictory" in statistics
    assert "no prompt of val is trained on" in statistics


def test_token_ids_are_kept_between_runs_and_made_anew_when_anything_changes(make, tokenizer, tmp_path, monkeypatch):
    """Every part of the key: rows, columns, tokenizer, template, its arguments; and none that changes no id."""
    from rlhf_lightning.data import tokenized

    made = []
    real = tokenized.write_store
    monkeypatch.setattr(tokenized, "write_store", lambda *a, **kind: (made.append(1), real(*a, **kind)))

    def makes(train, **options):
        before = len(made)
        make(train, val=train, cache_dir=str(tmp_path / "cache"), **options).setup("validate")
        return len(made) - before

    file = tmp_path / "a.jsonl"
    train = write(file, "x", "y", q="?")
    assert makes(train) == 1
    for harmless in (
        {},
        {"max_length": 50},
        {"truncation": "drop"},
        {"batch_size": 1},
        {"seed": 7},
        {"shuffle": False},
    ):
        assert makes(train, **harmless) == 0
    assert makes(train, columns={"prompt": "q"}) == 1
    assert makes(train, chat_template="transcript") == 1
    assert makes(train, chat_template_kwargs={"x": 1}) == 1
    other = load_tokenizer(tokenizer)
    other.add_tokens(["yes"])
    other.save_pretrained(tmp_path / "tokenizer")
    assert makes(train, tokenizer=str(tmp_path / "tokenizer")) == 1
    write(file, "x", "z", q="?")
    assert makes(train) == 1
    write(file, "x", "y", q="?")
    assert makes(train) == 0
    monkeypatch.setattr(tokenized, "content_key", lambda *parts: real_key(*parts, "other code"))
    assert makes(train) == 1


def test_without_a_trainer_the_batches_are_those_of_one_process(make, tmp_path):
    data = make(write(tmp_path / "a.jsonl", *numbered("prompt", 9)), val=write(tmp_path / "b.jsonl", "v", "w"))
    data.setup("fit")
    attached = batches(data.train_dataloader()), batches(data.val_dataloader())
    data.trainer = None
    assert (batches(data.train_dataloader()), batches(data.val_dataloader())) == attached


def test_a_mixture_counts_each_source_by_its_weight(make, tmp_path, caplog):
    a, b, c = (write(tmp_path / f"{n}.jsonl", *numbered(n, k)) for n, k in (("a", 4), ("b", 3), ("c", 8)))
    mixture = [a, WeightedSource(b, weight=2), WeightedSource(c, weight=0.5)]
    data = make(mixture, val=write(tmp_path / "v.jsonl", "v"))
    with caplog.at_level(logging.INFO, "rlhf_lightning"):
        data.setup("fit")
    loader, seen = data.train_dataloader(), []
    for epoch in range(2):
        loader.set_epoch(epoch)
        ids = [ids_of(data, "train")[index] for batch in batches(loader) for index in batch]
        counts = Counter(ids)
        assert {counts[f"a.jsonl:{n}"] for n in range(4)} == {1}
        assert {counts[f"b.jsonl:{n}"] for n in range(3)} == {2}
        seen.append({i for i in ids if i.startswith("c")})
        assert len(seen[-1]) == len([i for i in ids if i.startswith("c")]) == 4
    assert seen[0] != seen[1]
    assert "train: 15 pairs, 14 an epoch by their weights (" in caplog.text
    with pytest.raises(ConfigurationError, match=r"data.val: a weight would count rows more than once"):
        make(a, val=[WeightedSource(b, weight=2)])


def test_columns_and_template_reach_the_tokens(make, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"q": "Hi", "j": "Well.", "k": "No!", "gap": 2}), encoding="utf-8")
    columns = {"prompt": "q", "chosen": "j", "rejected": "k", "margin": "gap"}
    data = make(str(file), val=str(file), columns=columns, chat_template="transcript")
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    row = batch.input_ids[0][batch.attention_mask[0]]
    assert data.chat_format.tokenizer.decode(row) == "\n\nHuman: Hi\n\nAssistant: Well.<|im_end|>"
    assert data.pairs["train"].margin.tolist() == [2.0]


def batches(loader):
    return [batch.index.tolist() for batch in loader]


def test_training_batches_follow_the_trainers_processes_and_accumulation(make, tmp_path):
    train, val = write(tmp_path / "a.jsonl", *numbered("prompt", 21)), write(tmp_path / "b.jsonl", *numbered("v", 7))
    seen = []
    for rank in range(2):
        data = make(train, val=val, accumulate=2, rank=rank, world_size=2, eval_batch_size=3, seed=1)
        data.setup("fit")
        loader = data.train_dataloader()
        assert len(loader) == 2 + 1
        weights = [batch.weight.item() for batch in loader]
        assert weights[:2] == [1.0, 1.0]
        # The last step has 5 pairs in one batch per process, of two accumulated: 3 / 5 * 2 * 2 and 2 / 5 * 2 * 2.
        assert weights[2] == pytest.approx([2.4, 1.6][rank], rel=1e-6)
        seen += sum(batches(loader), [])  # noqa: RUF017
        evaluated = batches(data.val_dataloader())
        assert [len(batch) for batch in evaluated] == [[2, 2], [2, 1]][rank]
    assert sorted(seen) == list(range(21))


def test_batches_of_all_roles_hold_all_pairs(make, tmp_path):
    data = make(write(tmp_path / "a.jsonl", *numbered("prompt", 21)), val=write(tmp_path / "b.jsonl", "v", "w"))
    data.setup("fit")
    data.setup("test")
    for loader, pairs in (
        (data.train_dataloader(), 21),
        (data.val_dataloader(), 2),
        (data.test_dataloader(), 2),
        (data.predict_dataloader(), 2),
    ):
        assert sorted(index for batch in batches(loader) for index in batch) == list(range(pairs))


def test_shuffling_follows_the_seed_and_can_be_turned_off(make, tmp_path, monkeypatch):
    train, val = write(tmp_path / "a.jsonl", *numbered("prompt", 21)), write(tmp_path / "b.jsonl", "v")

    def order(**options):
        data = make(train, val=val, **options)
        data.setup("fit")
        return [index for batch in batches(data.train_dataloader()) for index in batch]

    assert order(shuffle=False) == list(range(21))
    assert order(seed=3, group_by_length=False) != order(seed=4, group_by_length=False)
    assert order(seed=3) != order(seed=3, group_by_length=False)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert order() == order(seed=0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert order() == order(seed=3)


def test_a_schedule_of_accumulation_is_refused(make, tmp_path):
    scheduler = GradientAccumulationScheduler({0: 2})
    data = make(write(tmp_path / "a.jsonl", "x"), val=write(tmp_path / "b.jsonl", "v"), callbacks=[scheduler])
    data.setup("fit")
    with pytest.raises(ConfigurationError, match=r"GradientAccumulationScheduler: .*use trainer.accumulate_grad"):
        data.train_dataloader()
    data.trainer.callbacks = [Callback()]
    assert len(data.train_dataloader()) == 1


def test_padding_is_the_tokenizers_and_masks_do_not_read_it(make, tmp_path):
    data = make(write(tmp_path / "a.jsonl", "x", "a longer prompt"), val=write(tmp_path / "b.jsonl", "v"))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    pad = data.chat_format.tokenizer.pad_token_id
    assert set(batch.input_ids[~batch.attention_mask].tolist()) == {pad}
    eos_tokens = batch.input_ids == data.chat_format.eos_id
    last = batch.attention_mask.sum(1) - 1
    assert eos_tokens[torch.arange(4), last].all()
    assert batch.response_mask[torch.arange(4), last].all()


def test_a_tokenizer_must_be_named_and_must_be_one(make, tmp_path):
    train = write(tmp_path / "a.jsonl", "x")
    with pytest.raises(ConfigurationError, match=r"data.tokenizer: give the hub name or directory of a tokenizer"):
        make(train, tokenizer=None).setup("fit")
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        make(train, tokenizer=str(tmp_path)).setup("fit")


def test_a_single_pair_without_validation_data_is_refused_with_advice(make, tmp_path):
    with pytest.raises(DataError, match=r"splitting 1 pairs by prompt .* give a validation file with val: FILE"):
        make(write(tmp_path / "a.jsonl", "x")).setup("fit")


def test_more_processes_than_pairs_are_refused(make, tmp_path):
    data = make(write(tmp_path / "a.jsonl", "x"), val=write(tmp_path / "b.jsonl", "v"), world_size=2)
    data.setup("fit")
    with pytest.raises(ConfigurationError, match="1 training rows cannot be shared by 2 processes"):
        data.train_dataloader()
    with pytest.raises(ConfigurationError, match="1 evaluation rows cannot be shared by 2 processes"):
        data.val_dataloader()


def test_forms_of_one_prompt_stay_on_one_side(make, tmp_path):
    prompts = [f"Où est le café {number} ?" for number in range(40)]
    forms = [unicodedata.normalize("NFD", prompt) for prompt in prompts] + [p.replace(" ", "\u200b ") for p in prompts]
    data = make(write(tmp_path / "a.jsonl", *prompts, *forms), val_fraction=0.2)
    data.setup("fit")
    sides = [{int(name.partition(":")[2]) % 40 for name in ids_of(data, role)} for role in ("train", "val")]
    assert sides[0].isdisjoint(sides[1])
    assert sum(map(len, sides)) == 40


def test_a_fit_names_the_columns_that_it_does_not_use(make, tmp_path, caplog):
    data = make(write(tmp_path / "a.jsonl", *numbered("p", 30), topic="x", tags=[1]), val_fraction=0.3)
    with caplog.at_level(logging.INFO, "rlhf_lightning"):
        data.setup("fit")
    train_line, val_line, _ = caplog.messages
    assert "; not used: topic, tags)" in train_line
    assert "not used" not in val_line
    assert data.reports["train"].columns_unused == ["topic", "tags"]


def test_a_division_that_leaves_nothing_names_the_file(make, tmp_path):
    data = make(write(tmp_path / "few.jsonl", "one"), val_fraction=0.0001)
    with pytest.raises(DataError, match=r"few.jsonl: splitting 1 pairs by prompt .* leaves no validation pair"):
        data.setup("fit")
