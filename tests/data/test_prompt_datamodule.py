"""From a source of prompts to ragged batches, in step with what a reward model is trained on."""

from __future__ import annotations

import json
import logging
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.data import DataError
from rlhf_lightning.data.datamodules import PreferenceDataModule
from rlhf_lightning.data.prompt_datamodule import PromptDataModule
from rlhf_lightning.data.sources import WeightedSource
from rlhf_lightning.errors import ConfigurationError
from tests.data.test_preference_datamodule import batches, numbered
from tests.data.test_real_data import SHARED


def write(path, *prompts, **extra):
    path.write_text("".join(json.dumps({"prompt": prompt, **extra}) + "\n" for prompt in prompts), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen2):
    return str(tiny_qwen2)


def attached(data, *, accumulate=1, rank=0, world_size=1, callbacks=()):
    """A data module with what it asks of a trainer."""
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


@pytest.fixture
def make(tokenizer):
    def module(train, *, accumulate=1, rank=0, world_size=1, callbacks=(), **options):
        data = PromptDataModule(train, **{"tokenizer": tokenizer, "batch_size": 4, **options})
        return attached(data, accumulate=accumulate, rank=rank, world_size=world_size, callbacks=callbacks)

    return module


@pytest.fixture(scope="module")
def shared_file(tmp_path_factory):
    """Prompts of different lengths; and pairs of the same prompts, each twice."""
    directory = tmp_path_factory.mktemp("prompts")
    prompts = [f"prompt {number} " + "word " * (number % 7) for number in range(61)]
    pairs = write(directory / "pairs.jsonl", *prompts, *prompts, chosen="yes", rejected="no")
    return SimpleNamespace(prompts=write(directory / "prompts.jsonl", *prompts), pairs=pairs, count=61)


def test_a_batch_holds_ragged_ids_positions_and_a_weight(make, tmp_path):
    data = make(write(tmp_path / "a.jsonl", "x", "a longer prompt"), val=write(tmp_path / "b.jsonl", "v"))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, PromptBatch)
    assert isinstance(batch.input_ids, list)
    assert batch.prompts == len(batch.input_ids) == 2
    decode = data.chat_format.tokenizer.decode
    for ids, index in zip(batch.input_ids, batch.index.tolist(), strict=True):
        text = ["x", "a longer prompt"][index]
        assert decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        assert (ids.dtype, ids.ndim) == (torch.int64, 1)
        assert data.messages("train", index) == [{"role": "user", "content": text}]
    assert len({len(ids) for ids in batch.input_ids}) == 2
    assert (batch.index.dtype, batch.index.shape) == (torch.int64, (2,))
    assert (batch.weight.dtype, batch.weight.shape, batch.weight.item()) == (torch.float32, (), 1.0)
    assert data.example_ids("train") == ["a.jsonl:0", "a.jsonl:1"]


def test_messages_are_those_of_the_position_in_a_mixture_where_some_rows_are_left_out(make, tmp_path):
    long = "word " * 300
    a, b = write(tmp_path / "a.jsonl", "x", long, "y", "X"), write(tmp_path / "b.jsonl", long, "Y", "z")
    data = make([a, b], val=write(tmp_path / "v.jsonl", "v"), max_prompt_length=64)
    data.setup("fit")
    texts = [data.messages("train", index)[0]["content"] for index in range(3)]
    assert texts == ["x", "y", "z"]
    assert data.example_ids("train") == ["a.jsonl:0", "a.jsonl:2", "b.jsonl:2"]
    report = data.reports["train"]
    assert [origin.split("/")[-1] for origin in report.rows_repeated] == ["a.jsonl, row 3", "b.jsonl, row 1"]
    assert [origin.split("/")[-1] for origin in report.bad_rows["too_long"]] == ["a.jsonl, row 1", "b.jsonl, row 0"]
    data = make([a, b], val=write(tmp_path / "v.jsonl", "v"), max_prompt_length=64, unique=False, truncation="left")
    data.setup("fit")
    assert len(data.prompts["train"]) == 7
    assert data.prompts["train"].lengths.max() == 64
    (message,) = data.messages("train", 1)
    assert message["content"] == ("word " * 300)[-len(message["content"]) :], "what is left of it"
    assert data.chat_format.encode_prompts([data.chat_format.prompt_text([message])])[0] == (
        data.prompts["train"].ids(1).tolist()
    )


def test_fit_reads_training_and_validation_and_nothing_else(make, tmp_path):
    data = make(write(tmp_path / "a.jsonl", "x"), val=write(tmp_path / "b.jsonl", "z"), test=str(tmp_path / "no.jsonl"))
    data.setup("fit")
    assert (data.example_ids("train"), data.example_ids("val")) == (["a.jsonl:0"], ["b.jsonl:0"])
    with pytest.raises(DataError, match=r"no.jsonl: no such file"):
        data.setup("test")
    data = make(str(tmp_path / "no.jsonl"), test=write(tmp_path / "c.jsonl", "z"))
    data.setup("predict")
    assert list(data.prompts) == ["test"]


def test_the_split_is_that_of_the_pairs_of_the_same_prompts(make, tokenizer, shared_file):
    pairs = attached(PreferenceDataModule(shared_file.pairs, tokenizer=tokenizer, val_fraction=0.3))
    pairs.setup("fit")
    for train in (shared_file.pairs, shared_file.prompts):
        data = make(train, val_fraction=0.3)
        data.setup("fit")
        data.setup("test")
        for role in ("train", "val"):
            hashes = data.prompts[role].numbers("prompt_hash").tolist()
            assert len(hashes) == len(set(hashes)), "each prompt once"
            assert set(hashes) == set(pairs.pairs[role].numbers("prompt_hash").tolist())
        assert len(data.prompts["train"]) + len(data.prompts["val"]) == shared_file.count
        assert data.example_ids("test") == data.example_ids("val")


def test_the_built_in_pairs_serve_as_prompts(make):
    data = make("builtin:courtesy")
    data.setup("fit")
    assert all(len(data.prompts[role]) > 0 for role in ("train", "val"))
    assert data.messages("val", 0)[-1]["role"] == "user"


quick = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(st.integers(1, 9), st.integers(1, 3), st.sampled_from([1, 3]), st.booleans(), st.integers(0, 3))
def test_each_prompt_comes_once_per_epoch_and_once_in_evaluation(
    make, shared_file, batch_size, world_size, accumulate, shuffle, epoch
):
    seen = {"train": [], "test": []}
    counts = set()
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "accumulate": accumulate, "shuffle": shuffle}
        data = make(shared_file.prompts, test=shared_file.prompts, batch_size=batch_size, **options)
        data.setup("fit")
        data.setup("test")
        train = data.train_dataloader()
        train.set_epoch(epoch)
        for role, loader in (("train", train), ("test", data.test_dataloader())):
            found = list(loader)
            seen[role] += [index for batch in found for index in batch.index.tolist()]
            counts.add((role, len(found), len(loader)))
            lengths = data.prompts[role].lengths
            assert all(
                len(ids) == lengths[index]
                for batch in found
                for ids, index in zip(batch.input_ids, batch.index, strict=True)
            )
    assert len(counts) == 2, "every process gets the same number of batches"
    assert sorted(seen["train"]) == list(range(len(data.prompts["train"])))
    assert sorted(seen["test"]) == list(range(shared_file.count))


def test_the_prompts_of_a_short_last_step_weigh_the_same_on_every_process(make, tmp_path):
    train, val = write(tmp_path / "a.jsonl", *numbered("prompt", 21)), write(tmp_path / "b.jsonl", *numbered("v", 7))
    for rank, size in enumerate((3, 2)):
        data = make(train, val=val, accumulate=2, rank=rank, world_size=2)
        data.setup("fit")
        last = list(data.train_dataloader())[-1]
        # 5 prompts in one batch per process, of two accumulated: each counts 2 * 2 / 5.
        assert (last.prompts, last.weight.item()) == (size, pytest.approx(size / 5 * 2 * 2, rel=1e-6))


def test_evaluation_has_a_batch_size_of_its_own(make, tmp_path):
    val = write(tmp_path / "b.jsonl", *numbered("v", 7))
    for options, sizes in (({}, [4, 3]), ({"eval_batch_size": 7}, [7])):
        data = make(write(tmp_path / "a.jsonl", "x"), val=val, **options)
        data.setup("fit")
        assert [batch.prompts for batch in data.val_dataloader()] == sizes


def test_shuffling_follows_seed_and_epoch_and_not_the_lengths(make, shared_file, monkeypatch):
    def order(epoch=0, **options):
        data = make(shared_file.prompts, **options)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.set_epoch(epoch)
        return [index for batch in batches(loader) for index in batch], data.prompts["train"].lengths

    plain, lengths = order(shuffle=False)
    assert plain == list(range(len(plain)))
    assert order(seed=3)[0] == order(seed=3)[0] != order(seed=4)[0]
    assert order(seed=3)[0] != order(seed=3, epoch=1)[0]
    shuffled = lengths[order(seed=3)[0]]
    assert any(shuffled[i] < shuffled[i + 1] for start in range(0, 40, 4) for i in range(start, start + 3))
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert order()[0] == order(seed=3)[0]


@pytest.mark.parametrize("handed_out", [0, 1, 5, 13])
def test_a_resumed_epoch_gives_the_batches_that_were_left(make, shared_file, handed_out):
    def loader(state=None):
        data = make(shared_file.prompts, seed=1)
        data.setup("fit")
        if state is not None:
            data.load_state_dict(state)
        found = data.train_dataloader()
        found.set_epoch(2)
        return data, found

    whole = batches(loader()[1])
    assert len(whole) == 14
    data, running = loader()
    iterator = iter(running)
    first = [next(iterator).index.tolist() for _ in range(handed_out)]
    rest = batches(loader(data.state_dict())[1])
    assert first + rest == whole
    assert make(shared_file.prompts).state_dict() == {}


class Recorder(LightningModule):
    """Takes steps on nothing, and keeps the positions of the prompts."""

    def __init__(self):
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        assert isinstance(batch, PromptBatch)
        assert all(ids.device == self.device for ids in batch.input_ids)
        self.seen.append(batch.index.tolist())
        return self.parameter * batch.weight

    def validation_step(self, batch, batch_idx):
        assert isinstance(batch, PromptBatch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_stopped_run_goes_on_in_the_middle_of_an_epoch(tokenizer, shared_file, tmp_path):
    """Through the Trainer: the batches travel as they are, and the checkpoint knows the position."""

    def run(ckpt_path=None, callbacks=()):
        module, data = Recorder(), PromptDataModule(shared_file.prompts, tokenizer=tokenizer, batch_size=4, seed=5)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        quiet |= {"default_root_dir": tmp_path, "enable_checkpointing": bool(callbacks)}
        trainer = Trainer(accelerator="cpu", max_steps=20, callbacks=list(callbacks), **quiet)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return module.seen

    keep = ModelCheckpoint(tmp_path / "all", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run(callbacks=[keep])
    assert len(whole) == 20
    assert whole[:6] != whole[14:]
    for stopped in (5, 17):
        assert run(tmp_path / "all" / f"step={stopped}.ckpt") == whole[stopped:]


def test_a_mixture_counts_each_source_by_its_weight(make, tmp_path):
    a, b, c = (write(tmp_path / f"{n}.jsonl", *numbered(n, k)) for n, k in (("a", 4), ("b", 3), ("c", 8)))
    data = make([a, WeightedSource(b, weight=2), WeightedSource(c, weight=0.5)], val=write(tmp_path / "v.jsonl", "v"))
    data.setup("fit")
    ids = [data.example_ids("train")[index] for batch in batches(data.train_dataloader()) for index in batch]
    assert Counter(i[0] for i in ids) == {"a": 4, "b": 6, "c": 4}
    assert set(Counter(i for i in ids if i[0] == "b").values()) == {2}
    with pytest.raises(ConfigurationError, match=r"data.val: a weight would count rows more than once"):
        make(a, val=[WeightedSource(b, weight=2)])


def test_limit_takes_a_random_part_in_the_order_of_the_file(make, shared_file):
    def chosen(**options):
        data = make(shared_file.prompts, val=shared_file.pairs, **options)
        data.setup("fit")
        assert len(data.prompts["val"]) == shared_file.count
        return [int(i.partition(":")[2]) for i in data.example_ids("train")]

    part = chosen(limit=20, seed=1)
    assert len(part) == 20
    assert part == sorted(part) != list(range(20))
    assert part != chosen(limit=20, seed=2)
    assert chosen(limit=99) == list(range(shared_file.count))


def test_bad_rows_follow_the_policy_from_the_file_to_the_tokens(make, tmp_path):
    train, val = write(tmp_path / "a.jsonl", "fine", "a <|im_end|>", ""), write(tmp_path / "b.jsonl", "v")
    with pytest.raises(DataError, match=r"2 of 3 rows .*row 1: .*control token.*row 2: the prompt has no text"):
        make(train, val=val).setup("fit")
    data = make(train, val=val, on_bad_rows="drop")
    data.setup("fit")
    assert data.example_ids("train") == ["a.jsonl:0"]
    assert sorted(data.reports["train"].bad_rows) == ["empty_prompt", "special_tokens"]


def test_columns_and_template_reach_the_tokens(make, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"q": "Hi", "key": 7}), encoding="utf-8")
    data = make(str(file), val=str(file), columns={"prompt": "q", "id": "key"}, chat_template="transcript")
    data.setup("fit")
    (ids,) = next(iter(data.train_dataloader())).input_ids
    assert data.chat_format.tokenizer.decode(ids) == "\n\nHuman: Hi\n\nAssistant:"
    assert data.example_ids("val") == ["7"]


def test_token_ids_are_kept_between_runs_and_apart_from_those_of_pairs(make, tokenizer, shared_file, monkeypatch):
    from rlhf_lightning.data import tokenized

    make(shared_file.pairs).setup("fit")
    PreferenceDataModule(shared_file.pairs, tokenizer=tokenizer).setup("fit")

    def refuse(*arguments, **options):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(tokenized, "write_store", refuse)
    for options in ({}, {"max_prompt_length": 50}, {"truncation": "left"}, {"unique": False}, {"seed": 7}):
        make(shared_file.pairs, **options).setup("fit")
    with pytest.raises(AssertionError, match="tokenized again"):
        make(shared_file.pairs, chat_template="transcript").setup("fit")


def test_a_fit_begins_with_three_lines(make, tmp_path, caplog):
    train = write(tmp_path / "a.jsonl", "short", "word " * 80, "Short ", "x")
    val = write(tmp_path / "b.jsonl", "other " * 80)
    with caplog.at_level(logging.INFO, "rlhf_lightning"):
        data = make(train, val=val, max_prompt_length=64, truncation="left")
        data.setup("fit")
    train_line, val_line, statistics = caplog.messages
    assert train_line.startswith("train: 3 prompts (")
    assert train_line.endswith(
        "a.jsonl: 4 rows read, 1 duplicate prompts left out; 1 prompts cut to fit max_prompt_length 64)"
    )
    assert val_line.endswith("b.jsonl: 1 rows read; 1 prompts cut to fit max_prompt_length 64)")
    shortest, median, longest = sorted(data.prompts["train"].lengths.tolist())
    assert statistics == (
        f"prompts: {shortest} to {longest} tokens in train, median {median}; no prompt of val is trained on"
    )
    assert longest == 64


def test_a_prompt_on_both_sides_is_warned_about(make, tmp_path, caplog):
    train, val = write(tmp_path / "a.jsonl", "x", "Y y", "z"), write(tmp_path / "b.jsonl", "y  Y", "w", "x")
    with caplog.at_level(logging.WARNING, "rlhf_lightning"):
        make(train, val=val).setup("fit")
    assert "2 of 3 prompts of val have a prompt that is also trained on" in caplog.text


def test_what_cannot_be_is_refused_with_advice(make, tmp_path):
    train, val = write(tmp_path / "a.jsonl", "x"), write(tmp_path / "b.jsonl", "v")
    with pytest.raises(ConfigurationError, match=r"data.tokenizer: give the hub name or directory of a tokenizer"):
        make(train, tokenizer=None).setup("fit")
    with pytest.raises(DataError, match=r"splitting 1 prompts by prompt .* no validation prompts; give a validation"):
        make(train).setup("fit")
    data = make(train, val=val, world_size=2)
    data.setup("fit")
    with pytest.raises(ConfigurationError, match="1 training rows cannot be shared by 2 processes"):
        data.train_dataloader()
    with pytest.raises(ConfigurationError, match="1 evaluation rows cannot be shared by 2 processes"):
        data.val_dataloader()
    data = make(train, val=val, callbacks=[GradientAccumulationScheduler({0: 2})])
    data.setup("fit")
    with pytest.raises(ConfigurationError, match=r"GradientAccumulationScheduler: .*use trainer.accumulate_grad"):
        data.train_dataloader()


def test_the_class_is_known_by_its_bare_name(capsys):
    from rlhf_lightning.commands.main import main

    data = ["--data", "PromptDataModule", "--data.train", "x.jsonl", "--data.truncation", "left"]
    assert main(["fit", "--model", "RewardModel", "--model.backbone", "builtin:tiny", *data, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["data"]
    assert printed["class_path"].endswith("PromptDataModule")
    assert printed["init_args"]["truncation"] == "left"


def test_a_reward_model_is_not_trained_on_prompts(make, tokenizer, tmp_path):
    from rlhf_lightning import RewardModel

    with pytest.raises(ConfigurationError, match="use PreferenceDataModule"):
        RewardModel(tokenizer).check_data(make(write(tmp_path / "a.jsonl", "x")))


@pytest.mark.skipif(not SHARED.is_dir(), reason="no directory ../shared/data beside the repository")
def test_what_a_reward_model_holds_out_of_real_pairs_is_held_out_of_their_prompts(make, tokenizer):
    source = str(SHARED / "hh_harmless_base" / "val.jsonl.gz")
    pairs = PreferenceDataModule(source, tokenizer=tokenizer, on_bad_rows="drop", max_length=4096)
    data = make(source, on_bad_rows="drop", max_prompt_length=4096)
    for module in (pairs, data):
        module.setup("fit")
    for role in ("train", "val"):
        assert set(pairs.pairs[role].numbers("prompt_hash")) == set(data.prompts[role].numbers("prompt_hash"))


def test_a_fit_names_the_columns_that_it_does_not_use(make, tmp_path, caplog):
    data = make(write(tmp_path / "a.jsonl", *numbered("p", 30), answer="x", system="Be brief."), val_fraction=0.3)
    with caplog.at_level(logging.INFO, "rlhf_lightning"):
        data.setup("fit")
    assert "; not used: answer)" in caplog.messages[0]
    assert data.messages("train", 0)[0] == {"role": "system", "content": "Be brief."}
