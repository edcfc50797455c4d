"""The program as a user runs it: commands, overrides, one-line refusals with exit code 2."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_lightning import __version__
from rlhf_lightning.commands.fit import ParsedRun, run
from rlhf_lightning.commands.main import COMMANDS, main
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.other_names import OTHER_NAMES
from tests.test_configs import CONFIGS, ROOT

QUICKSTART = str(ROOT / "configs" / "quickstart" / "reward_model.yaml")
DPO = str(ROOT / "configs" / "dpo.yaml")
SFT = str(ROOT / "configs" / "sft.yaml")
PPO = str(ROOT / "configs" / "ppo.yaml")
CPU = ["--config", str(ROOT / "configs" / "hardware" / "cpu.yaml")]
TINY = [*CPU, "--model.backbone", "builtin:tiny", "--data.train", "builtin:courtesy"]
WHOLE = ["--model.lora", "null", "--model.reference", "null"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Runs write under the working directory."""
    monkeypatch.chdir(tmp_path)


def printed_config(capsys, *arguments) -> dict:
    assert main([*arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def refusal(capsys, *arguments) -> str:
    """The one line that a refused command prints."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("rlhf-lightning: error: ")
    assert "Traceback" not in captured.err
    return line


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(capsys, arguments):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {command} ", text, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("older", [None, "max_split_size_mb:64"])
def test_the_allocator_of_a_gpu_has_segments_that_grow_unless_it_was_configured(capsys, monkeypatch, older):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    monkeypatch.setattr(os, "environ", environment | ({} if older is None else {names[1]: older}))
    assert main(["configs"]) == 0
    assert os.environ.get(names[0]) == (None if older else "expandable_segments:True")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_help_of_a_command_lists_its_keys(capsys):
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--trainer.max_epochs" in text
    assert "--data CONFIG" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RewardModel", "pulls the mean reward to 0"),
        ("DPO", "the policy without its adapters"),
        ("KTO", "between 1:1 and 4:3"),
        ("SFT", "Train low-rank adapters alone"),
    ],
)
def test_help_of_a_class_shows_the_sentences_of_its_docstring(capsys, name, words):
    assert main(["fit", "--model.help", name]) == 0
    assert words in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], ["unknown command 'train'", "fit, validate, test, predict"]),
        (["fit", "--config", DPO, *TINY, "--model.loss_type", "dpo"], ["model.loss_type", "sigmoid", "'dpo'"]),
        (["fit", "--config", DPO, *TINY, "--model.beta", "0"], ["beta", "v>0"]),
        (["fit", "--config", DPO, *TINY, "--model.gamma", "1"], ["model.gamma", "sigmoid takes none", "simpo"]),
        (["fit", "--config", DPO, *TINY, "--model.lora", "null"], ["model.reference", "give model.lora"]),
        (["fit", "--config", DPO, *TINY, "--model.reference", "./absent"], ["./absent", "no directory here"]),
        (["fit", "--config", DPO, *TINY, "--model.lora.rank", "4"], ["lora", "rank"]),
        (["fit", "--config", DPO, *TINY, "--model.lora.r", "0"], ["lora", "r must be 1 or more"]),
        (["fit", "--config", DPO, *TINY, "--model.attn_implementation", "flash_attention_2"], ["use sdpa"]),
        (["fit", "--config", SFT, *TINY, "--model.backbone", "./absent"], ["./absent", "no directory here"]),
        (["fit"], ["no model class", "--config"]),
        (["fit", "--data.train", "a.jsonl"], ["no model class", "--config"]),
        (["fit", "--config", "absent.yaml"], ["absent.yaml", "no such file", "rlhf-lightning configs"]),
        (["fit", "--config", QUICKSTART, "--model.betaa", "3"], ["model", "'betaa' is not accepted"]),
        (["fit", "--config", QUICKSTART, "--trainer.max_step", "4"], ["--trainer.max_step"]),
        (["fit", "--config", QUICKSTART, "--trainer.max_epochs", "many"], ["trainer.max_epochs", "many"]),
        (["fit", "--config", QUICKSTART, "--data.batch_size", "abc"], ["data", "batch_size", "'abc'"]),
        (["fit", "--config", QUICKSTART, "--data.batch_size", "-1"], ["data", "batch_size", "-1", "v>0"]),
        (
            ["fit", "--config", QUICKSTART, "--model.center_rewards_coefficient", "-1"],
            ["model", "center_rewards_coefficient", "-1", "v>=0"],
        ),
        (["fit", "--config", QUICKSTART, "--model.label_smoothing", "0.5"], ["label_smoothing", "0.5"]),
        (
            ["fit", "--config", QUICKSTART, "--model.lr_scheduler_type", "steep"],
            ["lr_scheduler_type", "'linear'", "steep"],
        ),
        (["fit", "--config", QUICKSTART, "--model", "Nonsense"], ["model", "no such class", "Nonsense"]),
        (["fit", "--config", QUICKSTART, "--model.optimizer", "Nonsense"], ["optimizer", "Nonsense"]),
        (["fit", "--config", QUICKSTART, "--model.optimizer.lrr", "1"], ["optimizer", "'lrr' is not accepted"]),
        (["fit", "--config", QUICKSTART, "--data.train", "absent.jsonl"], ["absent.jsonl", "no such file"]),
        (["fit", "--config", QUICKSTART, "--model.backbone", "./absent"], ["./absent", "no directory here"]),
        (["fit", "--config", QUICKSTART, "--model.backbone", "."], ["config.json", "no model"]),
        (["fit", "--config", QUICKSTART, "--trainer.accelerator", "gpu"], ["accelerator", "gpu", "hardware/cpu.yaml"]),
        (["fit", "--config", QUICKSTART, "--trainer.precision", "bf16-true"], ["rotary", "use bf16-mixed"]),
        (["fit", "--config", QUICKSTART, "--model.optimizer.lr", "-1"], ["model.optimizer", "-1"]),
        (["fit", "--config", QUICKSTART, "--trainer.logger.save_dir", "/proc/x"], ["/proc/x"]),
        (["test", "--config", QUICKSTART, "--ckpt_path", QUICKSTART], ["reward_model.yaml", "cannot be read"]),
        (["test", "--config", QUICKSTART, "--ckpt_path", str(ROOT)], ["cannot be read as a checkpoint"]),
        (["test", "--config", QUICKSTART, "--ckpt_path", "absent.ckpt"], ["absent.ckpt", "no checkpoint"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys, tmp_path, arguments, words):
    line = refusal(capsys, *arguments)
    assert all(word in line for word in words), line
    assert len(line) < 300
    assert list(tmp_path.iterdir()) == [], "nothing half-written is left"


def test_a_misspelt_monitor_is_refused_before_the_training(capsys, tmp_path):
    config = yaml.safe_load(Path(QUICKSTART).read_text())
    config["trainer"]["callbacks"][0]["init_args"]["monitor"] = "val/aurok"
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump(config))
    line = refusal(capsys, "fit", "--config", "typo.yaml")
    assert "ModelCheckpoint.monitor is 'val/aurok'" in line
    assert "val/auroc" in line


@pytest.mark.parametrize(
    ("callback", "monitor"),
    [("ModelCheckpoint", "train/aurok"), ("EarlyStopping", "val_loss"), ("EarlyStopping", "step")],
)
def test_what_is_never_logged_cannot_be_monitored(capsys, callback, monitor):
    arguments = [f"--trainer.callbacks+={callback}", f"--trainer.callbacks.monitor={monitor}"]
    line = refusal(capsys, "fit", "--config", QUICKSTART, *arguments)
    assert f"{callback}.monitor is {monitor!r}; use one of val/loss, " in line
    assert "train/loss" in line


def test_an_interval_of_validation_longer_than_an_epoch_is_refused_in_a_line(capsys):
    line = refusal(capsys, "fit", "--config", QUICKSTART, "--trainer.val_check_interval", "76")
    assert "`val_check_interval` (76) must be less than or equal to the number of the training batches (75)" in line
    over_epochs = ["--trainer.check_val_every_n_epoch", "null"]
    line = refusal(capsys, "fit", "--config", QUICKSTART, *over_epochs, "--trainer.val_check_interval", "0.5")
    assert "trainer.val_check_interval" in line
    assert "trainer.check_val_every_n_epoch to 1" in line


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}])
def test_a_file_of_torch_that_is_no_checkpoint_is_refused(capsys, tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    line = refusal(capsys, "test", "--config", QUICKSTART, "--ckpt_path", "other.ckpt")
    assert "other.ckpt is no checkpoint of a run" in line


def test_a_checkpoint_of_another_model_is_refused(capsys, tmp_path):
    few = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    assert main(["fit", "--config", QUICKSTART, *few, "--model.warmup_ratio", "0"]) == 0
    (checkpoint,) = (tmp_path / "runs").rglob("*.ckpt")
    arguments = ["test", "--config", QUICKSTART, "--ckpt_path", str(checkpoint), "--model.hidden_size", "16"]
    assert "another model" in refusal(capsys, *arguments)


def test_a_checkpoint_brings_the_settings_of_its_run(capsys, tmp_path):
    few = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--model.warmup_ratio", "0"]
    assert main(["fit", "--config", QUICKSTART, *few, "--data.max_length", "77"]) == 0
    (checkpoint,) = (tmp_path / "runs").rglob("*.ckpt")
    capsys.readouterr()
    card = (tmp_path / "models" / "quickstart_reward_model" / "README.md").read_text()
    assert "optimizer step 1;" in card
    assert "AutoModelForSequenceClassification" in card
    assert "| `auroc` (pooled AUROC) |" in card
    given = printed_config(capsys, "test", "--ckpt_path", str(checkpoint))
    assert given["data"]["init_args"]["max_length"] == 77
    assert given["ckpt_path"] == str(checkpoint)
    assert (
        printed_config(capsys, "predict", f"--ckpt_path={checkpoint}", "--data.max_length", "66")["data"]["init_args"][
            "max_length"
        ]
        == 66
    )
    moved = checkpoint.rename(tmp_path / "moved.ckpt")
    assert "no model class" in refusal(capsys, "test", "--ckpt_path", str(moved))
    assert "no model class" in refusal(capsys, "fit", "--ckpt_path", str(moved)), "a run is not begun by accident"


def test_a_run_that_was_stopped_before_it_got_better_says_so(capsys, tmp_path):
    """Its held-out pairs say the opposite of what it learns."""
    answers = ("It is so, I think.", "no")
    for name, (chosen, rejected) in (("pairs", answers), ("val", answers[::-1])):
        rows = [{"prompt": f"{name} {i} + {i}?", "chosen": chosen, "rejected": rejected} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ["--config", "builtin:reward_model", "--config", "builtin:hardware/cpu", "--model.backbone=builtin:tiny"]
    assert main(["fit", *config, "--data.train=pairs.jsonl", "--data.val=val.jsonl", "--trainer.max_epochs=12"]) == 0
    printed = capsys.readouterr().out
    assert "checkpoint:  runs/reward_model/version_0/checkpoints/best-0.ckpt" in printed
    assert re.search(r"^stopped early: .*val/auroc did not improve in the last 6", printed, re.MULTILINE)
    assert "model:       models/reward_model (UNTRAINED" in printed


def test_scores_of_an_untrained_head_are_called_so(capsys):
    assert main(["validate", "--config", QUICKSTART, "--trainer.limit_val_batches", "1"]) == 0
    assert "the head is untrained" in capsys.readouterr().err


def test_stock_deepspeed_is_refused():
    from types import SimpleNamespace

    from lightning.pytorch.strategies import DeepSpeedStrategy

    from rlhf_lightning.commands.trainer_checks import refuse_wrong_numbers

    strategy = object.__new__(DeepSpeedStrategy)  # its constructor wants deepspeed installed
    with pytest.raises(ConfigurationError, match="use zero2"):
        refuse_wrong_numbers(SimpleNamespace(strategy=strategy, precision="32-true"))


def test_an_unknown_key_in_a_file_is_refused(capsys, tmp_path):
    config = yaml.safe_load(Path(QUICKSTART).read_text())
    config["data"]["init_args"]["bacth_size"] = 4
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump(config))
    assert "'bacth_size' is not accepted" in refusal(capsys, "fit", "--config", "typo.yaml")


def test_a_file_that_is_no_yaml_is_refused(capsys, tmp_path):
    (tmp_path / "broken.yaml").write_text("model: [1\n  class_path")
    assert "broken.yaml: not valid YAML: line 3, column 1: " in refusal(capsys, "fit", "--config", "broken.yaml")


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--model.learning_rate=1", "model: Option 'learning_rate' is not accepted; did you mean model.optimizer.lr?"),
        ("--model.optimizer.learning_rate=1", "did you mean model.optimizer.lr?"),
        ("--model.maxNewTokens=1", "model: Option 'maxNewTokens' is not accepted; did you mean model.max_new_tokens?"),
        ("--model.lora.targets=all-linear", "model.lora: Option 'targets' is not accepted; did you mean model.lora.t"),
        ("--trainer.epochs=1", "did you mean trainer.max_epochs?"),
        ("--trainer.max_epoch=1", "did you mean trainer.max_epochs?"),
        ("--output_dir=x", "did you mean trainer.callbacks.directory"),
        ("--lr=1", "did you mean model.optimizer.lr?"),
        ("--num_train_epochs=2 --lr=1", "did you mean trainer.max_epochs, model.optimizer.lr?"),
        ("--model=Sft", "model: no such class: Sft; did you mean SFT?"),
        ("--model.optimizer=Adamw", "model.optimizer: no such class: Adamw; did you mean AdamW?"),
        ("--model.optimizer.lr=5e-6x", "model.optimizer.lr: expected a number, not '5e-6x'"),
        ("--trainer.max_epochs=three", "trainer.max_epochs: expected an integer, not 'three'"),
        ("--trainer.precision=fp16", "'bf16', not 'fp16'; did you mean 16-mixed?"),
        ("--model.lr_scheduler_type=cosinus", "'cosine', not 'cosinus'; did you mean cosine?"),
    ],
)
def test_a_refused_key_names_the_one_that_was_meant(capsys, argument, line):
    said = refusal(capsys, "fit", "--config", PPO, *argument.split())
    assert line in said
    assert said.count("did you mean") <= 1


def test_what_a_refusal_names_are_keys():
    """Of a policy's run, or of a reward model's where a policy has none of the name."""
    named = {
        *("model.optimizer.lr=1", "model.optimizer.weight_decay=1", "model.optimizer=SGD"),
        *("model.lr_scheduler_type=linear", "model.backbone=x", "model.warmup_ratio=0.1", "model.lora={r: 2}"),
        *("model.lora.target_modules=all-linear", "model.lora.lora_alpha=1", "model.lora.r=1"),
        *("model.temperature=1", "model.max_new_tokens=1", "model.layout=packed"),
        *("data.train=a", "data.val=a", "data.batch_size=1", "data.eval_batch_size=1", "data.max_length=1"),
        *("trainer.max_epochs=1", "trainer.max_steps=1", "trainer.accumulate_grad_batches=1"),
        *("trainer.gradient_clip_val=1", "trainer.log_every_n_steps=1", "trainer.val_check_interval=1"),
        *("model.clip_range=0.1", "model.clip_range_high=0.3", "model.dual_clip=3", "model.loss_aggregation=token"),
        *("model.mask_truncated_responses=true", "model.policy_loss_type=gspo"),
        *("trainer.devices=1", "trainer.precision=16-mixed", "trainer.precision=bf16-mixed", "trainer.strategy=zero2"),
        *("trainer.logger=false", "trainer.logger.save_dir=x", "trainer.callbacks.directory=x"),
        *("ckpt_path=last", "seed_everything=1"),
    }
    keys = {each.partition(" (")[0].replace(" ", "=") for text in OTHER_NAMES.values() for each in text.split(", ")}
    assert {each.partition("=")[0] for each in keys} == {each.partition("=")[0] for each in named}
    assert {each for each in keys if "=" in each} <= named
    of_reward_model = [f"--{each}" for each in named if each.startswith("data.max_length")]
    run(["fit", "--config", QUICKSTART, *of_reward_model], program=ParsedRun)
    rest = [f"--{each}" for each in sorted(named) if each not in ("data.max_length=1", "ckpt_path=last")]
    run(["fit", "--config", PPO, *rest], program=ParsedRun)


def test_the_file_that_a_command_without_classes_takes_names_near_keys_too(capsys):
    assert "unrecognized arguments: --reward_modle x; did you mean reward_model?" in refusal(
        capsys, "evaluate", "--reward_modle", "x"
    )
    assert "did you mean" not in refusal(capsys, "evaluate", "--learning_rate", "1")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", ["pairs.jsonl", "no rows"]),
        ('{"prompt": "a", "chosen": "b"}\n', ["pairs.jsonl", "'rejected'", "columns"]),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\nnot json\n', ["pairs.jsonl", "line 2", "JSON"]),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "b"}\n{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
            ["row 0", "the same text", "on_bad_rows: drop"],
        ),
    ],
)
def test_data_that_cannot_be_used_is_refused_in_one_line(capsys, tmp_path, rows, words):
    (tmp_path / "pairs.jsonl").write_text(rows)
    line = refusal(capsys, "fit", "--config", QUICKSTART, "--data.train", "pairs.jsonl")
    assert all(word in line for word in words), line


@pytest.mark.parametrize("missing", ["eos", "pad"])
def test_a_tokenizer_without_eos_is_refused_and_one_without_pad_is_not_needed(capsys, tmp_path, tiny_qwen2, missing):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    setattr(tokenizer, f"{missing}_token", None)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = ["validate", "--config", QUICKSTART, "--model.backbone", str(tiny_qwen2)]
    arguments += ["--data.tokenizer", str(tmp_path / "tokenizer"), "--trainer.logger", "false"]
    if missing == "eos":
        line = refusal(capsys, *arguments)
        assert "neither an EOS nor a SEP token" in line
        assert "set eos_token" in line
    else:
        assert main([*arguments, "--trainer.limit_val_batches", "1"]) == 0


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_printed_configuration_round_trips(capsys, tmp_path, config):
    first = printed_config(capsys, "fit", "--config", str(config))
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(first))
    assert printed_config(capsys, "fit", "--config", "printed.yaml") == first


def test_later_files_and_then_flags_win(capsys, tmp_path):
    (tmp_path / "overlay.yaml").write_text("trainer: {max_epochs: 9, precision: bf16-mixed}\n")
    config = printed_config(
        capsys, "fit", "--config", QUICKSTART, "--config", "overlay.yaml", "--trainer.max_epochs", "2"
    )
    assert config["trainer"]["max_epochs"] == 2
    assert config["trainer"]["precision"] == "bf16-mixed"
    assert config["trainer"]["accelerator"] == "cpu"
    assert config["model"]["init_args"]["backbone"] == "builtin:tiny"


def optimizer_of(capsys, directory, *arguments, kind="DPO", optimizer=None) -> torch.optim.Optimizer:
    """What is built of a configuration with this optimizer, or with none, and of arguments after it."""
    model = {"backbone": "builtin:tiny"} | ({"optimizer": optimizer} if optimizer else {})
    online = kind in ("PPO", "OnlineDPO")
    model |= {"reward_model": "module:function"} if online else {}
    data = {"class_path": "PromptDataModule" if online else "PreferenceDataModule"}
    config = {"model": {"class_path": kind, "init_args": model}, "data": data | {"init_args": {"train": "x.jsonl"}}}
    (directory / "of.yaml").write_text(yaml.safe_dump(config))
    resolved = printed_config(capsys, "fit", "--config", "of.yaml", *arguments)["model"]["init_args"]["optimizer"]
    kind = getattr(torch.optim, resolved["class_path"].rpartition(".")[2])
    return kind([torch.nn.Parameter(torch.zeros(1))], **resolved["init_args"])


def plain(kind: type[torch.optim.Optimizer], **given) -> dict:
    return kind([torch.nn.Parameter(torch.zeros(1))], **given).defaults


SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
DECAYING = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5, "weight_decay": 0.25, "eps": 0.125}}


@pytest.mark.parametrize(
    ("optimizer", "arguments", "expected"),
    [
        (SGD, [], plain(torch.optim.SGD, lr=0.5)),
        ({"class_path": "SGD"}, [], plain(torch.optim.SGD)),
        ("Adagrad", [], plain(torch.optim.Adagrad)),
        ({"class_path": "AdamW", "init_args": {"weight_decay": 0.25}}, [], plain(torch.optim.AdamW, weight_decay=0.25)),
        (None, ["--model.optimizer", "AdamW"], plain(torch.optim.AdamW)),
        (None, ["--model.optimizer.lr", "0.5"], plain(torch.optim.Adam, lr=0.5)),
        (DECAYING, ["--model.optimizer.lr", "0.25"], plain(torch.optim.AdamW, lr=0.25, weight_decay=0.25, eps=0.125)),
        (DECAYING, ["--model.optimizer", "RMSprop"], plain(torch.optim.RMSprop)),
        (DECAYING, ["--model.optimizer", "ASGD", "--model.optimizer.lr=0.25"], plain(torch.optim.ASGD, lr=0.25)),
        (DECAYING, ["--model.optimizer.lr=0.25", "--model.optimizer", "ASGD"], plain(torch.optim.ASGD, lr=0.25)),
        (DECAYING, ["--model.optimizer.class_path=ASGD"], plain(torch.optim.ASGD)),
    ],
)
def test_an_optimizer_inherits_nothing_from_another(capsys, tmp_path, optimizer, arguments, expected):
    assert optimizer_of(capsys, tmp_path, *arguments, optimizer=optimizer).defaults == expected


def test_a_short_name_is_torch_s_optimizer_whatever_else_is_imported(capsys, tmp_path, monkeypatch):
    """As bitsandbytes has an AdamW, and transformers an Adafactor; by its path another one is taken."""
    code = "".join(f"class {name}(torch.optim.SGD):\n    pass\n" for name in ("AdamW", "AdamW8bit"))
    (tmp_path / "bitsandbytes_stand_in.py").write_text(f"import torch\n{code}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes_stand_in", importlib.import_module("bitsandbytes_stand_in"))
    for name, path in (("AdamW", "torch.optim.AdamW"), ("AdamW8bit", "bitsandbytes_stand_in.AdamW8bit")):
        arguments = ("fit", "--config", QUICKSTART, "--model.optimizer", name)
        assert printed_config(capsys, *arguments)["model"]["init_args"]["optimizer"]["class_path"] == path
    arguments = ("fit", "--config", QUICKSTART, "--model.optimizer", "bitsandbytes_stand_in.AdamW")
    found = printed_config(capsys, *arguments)["model"]["init_args"]["optimizer"]
    assert found["class_path"] == "bitsandbytes_stand_in.AdamW"


@pytest.mark.parametrize(
    ("kind", "lr"),
    [("RewardModel", 2e-5), ("DPO", 5e-6), ("KTO", 5e-6), ("SFT", 1e-5), ("PPO", 1e-6), ("OnlineDPO", 5e-7)],
)
def test_without_an_optimizer_it_is_adam_of_which_none_inherits_anything(capsys, tmp_path, kind, lr):
    assert optimizer_of(capsys, tmp_path, kind=kind).defaults == plain(torch.optim.Adam, lr=lr)
    for name in ("AdamW", "SGD"):
        built = optimizer_of(capsys, tmp_path, kind=kind, optimizer={"class_path": name, "init_args": {"lr": 0.5}})
        assert built.defaults == plain(getattr(torch.optim, name), lr=0.5)


def test_an_overlay_changes_an_optimizer_or_replaces_it(capsys, tmp_path):
    def overlay(optimizer) -> dict:
        (tmp_path / "overlay.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"optimizer": optimizer}}}))
        return optimizer_of(capsys, tmp_path, "--config", "overlay.yaml", optimizer=DECAYING).defaults

    assert overlay(SGD) == plain(torch.optim.SGD, lr=0.5)
    for same in ({"init_args": {"lr": 0.25}}, {"class_path": "AdamW", "init_args": {"lr": 0.25}}):
        assert overlay(same) == plain(torch.optim.AdamW, lr=0.25, weight_decay=0.25, eps=0.125)


def test_bare_class_names_and_any_torch_optimizer_resolve(capsys):
    config = printed_config(
        capsys, "fit", "--config", QUICKSTART, "--model.optimizer", "RMSprop", "--model.optimizer.momentum", "0.9"
    )
    assert config["model"]["class_path"] == "rlhf_lightning.RewardModel"
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.RMSprop"
    assert config["model"]["init_args"]["optimizer"]["init_args"]["momentum"] == 0.9


@pytest.mark.parametrize("explicit", [True, False])
def test_the_tokenizer_is_the_models_unless_one_is_named(capsys, tmp_path, tiny_qwen2, tiny_llama, explicit):
    arguments = ["validate", "--config", QUICKSTART, "--model.backbone", str(tiny_qwen2)]
    arguments += ["--data.tokenizer", str(tiny_llama)] if explicit else []
    assert main([*arguments, "--trainer.limit_val_batches", "1"]) == 0
    saved = yaml.safe_load(next((tmp_path / "runs").rglob("config.yaml")).read_text())
    assert saved["data"]["init_args"]["tokenizer"] == str(tiny_llama if explicit else tiny_qwen2)


def table_values(text: str) -> dict[str, tuple[str, str]]:
    """Rows of the results table: name -> (value, pairs)."""
    rows = re.findall(r"^│ ([\w ()-]+?) +│ +(-?[\d.]+) │ +(\d+) │$", text, re.MULTILINE)
    return {name: (value, pairs) for name, value, pairs in rows}


def test_fit_ends_with_its_numbers_and_test_repeats_them(capsys, tmp_path):
    few = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "20"]
    assert main(["fit", "--config", QUICKSTART, *few]) == 0
    text = capsys.readouterr().out
    fitted = table_values(text)
    assert list(fitted) == [
        "loss",
        "pairwise accuracy",
        "pooled AUROC",
        "margin AUROC",
        "calibration error",
    ]
    assert {pairs for _, pairs in fitted.values()} == {"200"}
    (checkpoint,) = re.findall(r"^checkpoint: +(\S+)$", text, re.MULTILINE)
    (log_directory,) = re.findall(r"^TensorBoard: +(\S+)$", text, re.MULTILINE)
    (model,) = re.findall(r"^model: +(\S+)$", text, re.MULTILINE)
    assert list((tmp_path / log_directory).glob("events.out.tfevents.*"))
    assert (tmp_path / model / "model.safetensors").is_file()
    assert main(["test", "--config", QUICKSTART, "--ckpt_path", checkpoint]) == 0
    assert table_values(capsys.readouterr().out) == fitted
    written = str(tmp_path / log_directory / "config.yaml")
    assert main(["test", "--config", written, "--ckpt_path", checkpoint]) == 0, "the configuration that its run wrote"
    assert table_values(capsys.readouterr().out) == fitted


def test_a_run_s_configuration_is_left_alone_by_what_is_refused_and_by_tests(capsys, tmp_path):
    few = ["--trainer.limit_train_batches", "5", "--trainer.val_check_interval", "1.0"]
    layers = ["--model.pooling", "layers"]
    assert main(["fit", "--config", QUICKSTART, *few, *layers, "--trainer.max_epochs", "1"]) == 0
    run = tmp_path / "runs" / "quickstart_reward_model" / "version_0"
    before = (run / "config.yaml").read_text()
    more = ["--trainer.max_epochs", "2", "--ckpt_path", "last"]
    assert "its run had model.pooling layers" in refusal(capsys, "fit", "--config", QUICKSTART, *few, *more)
    assert (run / "config.yaml").read_text() == before
    assert main(["fit", "--config", str(run / "config.yaml"), *more]) == 0
    written = (run / "config.yaml").read_text()
    assert yaml.safe_load(written)["trainer"]["max_epochs"] == 2
    assert "reward: the checkpoint's mlp head, pooling layers" in capsys.readouterr().err
    (checkpoint, *_) = run.rglob("*.ckpt")
    files = sorted(run.rglob("*"))
    assert main(["test", "--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)]) == 0
    assert (sorted(run.rglob("*")), (run / "config.yaml").read_text()) == (files, written)


def test_tensorboard_holds_the_documented_scalars(capsys, tmp_path):
    few = ["--trainer.limit_train_batches", "10", "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "5"]
    assert main(["fit", "--config", QUICKSTART, *few]) == 0
    (run,) = (tmp_path / "runs" / "quickstart_reward_model").iterdir()
    assert logged_scalars(run) == documented_scalars("RewardModel")


def logged_scalars(run: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = {tag for tag in EventAccumulator(str(run)).Reload().Tags()["scalars"] if "/" in tag}
    return {tag for tag in tags if not tag.startswith("best/val/")}


def documented_scalars(name: str) -> set[str]:
    """The names in docs/metrics.md of what one class logs; those of CUDA or of 16-mixed alone are left out."""
    names = set()
    for row, classes in re.findall(r"^\| (`.*?) \| (.*?) \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE):
        names |= set(re.findall(r"`((?:train|val)/[\w/]+)`", row)) if name in classes.split(", ") else set()
    return names - {"train/peak_memory_gib", "train/loss_scale", "train/skipped_steps"}


@pytest.mark.usefixtures("forked_proof")
@pytest.mark.parametrize(
    ("kind", "adapters", "model", "rows"),
    [
        ("DPO", False, "models/rl_policy", ["loss", "reward accuracy", "reward margin", "log-ratio (k1)"]),
        ("DPO", True, "models/rl_policy", ["loss", "reward accuracy", "reward margin", "log-ratio (k1)"]),
        ("KTO", True, "models/kto_policy", ["loss", "pooled AUROC", "reward margin", "log-ratio (k1)"]),
    ],
)
def test_the_mission_s_dpo_and_kto_run_on_the_cpu_with_a_tiny_model_and_test_repeats_their_numbers(
    capsys, tmp_path, kind, adapters, model, rows
):
    config = str(ROOT / "configs" / f"{kind.lower()}.yaml")
    lora = ["--model.lora.r", "4", "--model.optimizer.lr", "1e-2"] if adapters else WHOLE
    few = ["--data.limit", "128", "--trainer.val_check_interval", "1.0", *lora]
    assert main(["fit", "--config", config, *TINY, *few]) == 0
    text = capsys.readouterr().out
    fitted = table_values(text)
    assert list(fitted) == rows
    (checkpoint,) = re.findall(r"^checkpoint: +(\S+)$", text, re.MULTILINE)
    assert re.findall(r"^model: +(\S+)$", text, re.MULTILINE) == [model]
    (run,) = (tmp_path / "runs" / kind.lower()).iterdir()
    assert logged_scalars(run) == documented_scalars(kind)
    assert main(["test", "--config", config, *TINY, *lora, "--ckpt_path", checkpoint]) == 0
    assert table_values(capsys.readouterr().out) == fitted
    if adapters:
        from transformers import AutoModelForCausalLM

        assert main(["export", "--ckpt_path", checkpoint, "--out", "exported"]) == 0
        exported, best = (AutoModelForCausalLM.from_pretrained(name) for name in ("exported", model))
        for ours, theirs in zip(exported.parameters(), best.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        wrong = ["test", "--config", config, *TINY, *WHOLE, "--ckpt_path", checkpoint]
        assert "those of another model" in refusal(capsys, *wrong), "the adapters were left out"


def test_sft_runs_on_the_cpu_with_a_tiny_model_and_dpo_goes_on_from_its_directory(capsys, tmp_path):
    few = ["--data.limit", "64", "--trainer.val_check_interval", "1.0", "--model.warmup_ratio", "0"]
    assert main(["fit", "--config", SFT, *TINY, *few]) == 0
    assert list(table_values(capsys.readouterr().out)) == ["loss", "perplexity", "token accuracy"]
    (run,) = (tmp_path / "runs" / "sft").iterdir()
    assert logged_scalars(run) == documented_scalars("SFT")
    go_on = [*CPU, "--model.backbone", "models/sft", "--data.train", "builtin:courtesy", *few]
    assert main(["fit", "--config", DPO, *go_on, "--model.loss_type", "ipo", "--trainer.logger", "false"]) == 0


def test_predict_writes_the_rewards_of_a_policy(capsys, tmp_path):
    arguments = ["predict", "--config", DPO, *TINY, "--trainer.limit_predict_batches", "2"]
    assert main(arguments) == 0
    (written,) = tmp_path.rglob("predictions.jsonl")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(rows) == 8
    assert all(row["chosen"] == row["rejected"] == row["margin"] == 0 for row in rows), "the policy is its reference"


def test_keys_before_the_configuration_win_as_well(capsys):
    before = printed_config(capsys, "fit", "--data.batch_size", "3", "--config", QUICKSTART, "--seed_everything", "9")
    after = printed_config(capsys, "fit", f"--config={QUICKSTART}", "--data.batch_size", "3", "--seed_everything", "9")
    assert (
        before
        == after
        == printed_config(capsys, "fit", "--seed_everything", "9", "--data.batch_size", "3", "-c", QUICKSTART)
    )
    assert (before["data"]["init_args"]["batch_size"], before["seed_everything"]) == (3, 9)


def test_doctor_takes_the_short_name_of_config_too(capsys):
    assert main(["doctor", "-c", QUICKSTART]) == 0
    assert "All 800 rows can be used (builtin:tiny, chat template)." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("a.jsonl", ["doctor", "./a.jsonl", "--json", "a.jsonl"]),
        ("a.jsonl", ["doctor", "--data.train=a.jsonl", "--html", "a.jsonl"]),
        ("c.yaml", ["plan", "--config", "c.yaml", "--json", "c.yaml"]),
        ("out/samples.jsonl", ["evaluate", "--policy", "p", "--prompts", "out/samples.jsonl", "--out", "out"]),
        (
            "o/scores.jsonl",
            ["evaluate", "--reward_model", "p", "--benchmarks", '{"b": "o/scores.jsonl"}', "--out", "o"],
        ),
        (
            "o/scores.jsonl",
            ["evaluate", "--reward_model", "p", "--pairs", "[{source: o/scores.jsonl, columns: {a: b}}]", "--out=o"],
        ),
    ],
)
def test_no_command_writes_over_a_file_that_it_reads(capsys, tmp_path, file, arguments):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    content = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    (tmp_path / file).write_text(content)
    assert f"{file} is read here" in refusal(capsys, *arguments)
    assert (tmp_path / file).read_text() == content


def test_doctor_holds_a_source_against_validation_pairs(capsys, tmp_path):
    row = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(row)
    for arguments in (["a.jsonl"], ["--data.train", "a.jsonl"]):
        assert main(["doctor", *arguments, "--data.val", "b.jsonl", "--json", "d.json"]) == 0
        found = yaml.safe_load((tmp_path / "d.json").read_text())
        assert [role["source"] for role in found["roles"]] == ["a.jsonl", "b.jsonl"]
        assert found["roles"][1]["shared_prompts"] == ["b.jsonl, row 0"]
    assert "both given" in refusal(capsys, "doctor", "a.jsonl", "--data.train", "b.jsonl")


def test_doctor_examines_a_source_alone(capsys, tmp_path):
    good = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "some.jsonl").write_text(good + '{"prompt": "a", "chosen": "b"}\n')
    assert main(["doctor", "good.jsonl"]) == 0
    assert "All 1 rows can be used (no tokenizer)." in capsys.readouterr().out
    assert main(["doctor", "some.jsonl", "--json", "out/d.json", "--html", "d.html"]) == 1
    found = yaml.safe_load((tmp_path / "out" / "d.json").read_text())
    assert found["roles"][0]["bad_rows"] == {"missing_key": ["some.jsonl, row 1"]}
    assert "missing_key" in (tmp_path / "d.html").read_text()
    (tmp_path / "none.jsonl").write_text("")
    assert "none.jsonl: the file is empty" in refusal(capsys, "doctor", "none.jsonl")


def test_doctor_reads_a_source_alone_once(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert main(["doctor", "a.jsonl", "--data.cache_dir", "cache"]) == 0
    assert len([entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]) == 1


def test_doctor_examines_the_data_of_a_run_with_its_settings(capsys, tmp_path):
    assert main(["doctor", "--config", QUICKSTART, "--json", "d.json"]) == 0
    found = yaml.safe_load((tmp_path / "d.json").read_text())
    assert [(role["role"], role["pairs"]) for role in found["roles"]] == [("train", 600), ("val", 200)]
    assert (found["unit"], found["tokenizer"], found["max_length"], found["batch_size"]) == (
        *("tokens", "builtin:tiny", 256, 8),
    )
    row = '{"q": "a", "chosen": "b", "rejected": "c"}\n'
    (tmp_path / "own.jsonl").write_text(row)
    assert main(["doctor", "own.jsonl", "--config", QUICKSTART, "--data.columns", "{prompt: q}"]) == 0
    assert "builtin:tiny, chat template" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a SOURCE, --data.train, or the --config of a run"),
        (["nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["x.jsonl", "--data.batch_size", "-1"], "batch_size"),
        (["x.jsonl", "--wrong"], "--wrong"),
        (["x.jsonl", "--json"], "--json"),
        (["x.jsonl", "--json", "."], ". is a directory; name a file"),
        (["x.jsonl", "--html", "/dev/null/d.html"], "/dev/null"),
    ],
)
def test_doctor_refuses_in_one_line(capsys, arguments, message):
    assert message in refusal(capsys, "doctor", *arguments)


def test_the_parser_never_reads_the_data_file_itself(capsys, tmp_path):
    # A type that a file could hold makes jsonargparse read the file in search of it.
    for text in ("prompt,chosen,rejected\n", "[1, 2]", "{}", "- a\n- b\n"):
        (tmp_path / "data.csv").write_text(text)
        config = printed_config(capsys, "fit", "--config", QUICKSTART, "--data.train", "data.csv")
        assert config["data"]["init_args"]["train"] == "data.csv"


def test_a_mixture_round_trips(capsys):
    mixture = ["a.jsonl", {"source": "b.jsonl", "weight": 0.5, "columns": {"prompt": "q"}}]
    config = printed_config(capsys, "fit", "--config", QUICKSTART, "--data.train", str(mixture))
    assert config["data"]["init_args"]["train"] == mixture
    for wrong, message in (("{source: b, weight: -1}", "v>0"), ("{source: b, wait: 1}", "wait"), ("{}", "source")):
        assert message in refusal(capsys, "fit", "--config", QUICKSTART, "--data.train", f"[a, {wrong}]")


def test_a_command_that_reads_data_without_a_word_leaves_its_logger_as_it_was(capsys):
    logger = logging.getLogger("rlhf_lightning.data.datamodules")
    for arguments in (["doctor", "builtin:courtesy"], ["plan", "--config", QUICKSTART]):
        logger.setLevel(logging.DEBUG)
        assert main(arguments) in (0, 1)
        assert "pairs (" not in capsys.readouterr().err
        assert logger.level == logging.DEBUG
    logger.setLevel(logging.NOTSET)


def test_no_thread_of_gloo_outlives_the_program():
    """It may abort the process as it ends ("terminate called without an active exception")."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    assert main(["evaluate", "--reward_model", "nowhere"]) == 2
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("rank", "words"), [(None, "rlhf-lightning: interrupted\n"), ("0", "rlhf-lightning: interrupted\n"), ("1", "")]
)
@pytest.mark.parametrize("within", ["a line of ours", "a library, which then fails of it"])
def test_of_several_processes_one_says_that_it_was_interrupted(capsys, monkeypatch, rank, words, within):
    def interrupted(_):
        try:
            raise KeyboardInterrupt
        finally:
            if within != "a line of ours":
                raise RuntimeError("half done")

    monkeypatch.setattr("rlhf_lightning.commands.doctor.run", interrupted)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == words


def test_a_builtin_configuration_is_named_like_a_file(capsys):
    given = printed_config(capsys, "fit", "--config", "builtin:reward_model", "--config=builtin:hardware/cpu")
    assert given == printed_config(capsys, "fit", "--config", str(ROOT / "configs" / "reward_model.yaml"), *CPU)
    assert "did you mean quickstart/sft?" in refusal(capsys, "fit", "--config", "builtin:quikstart/sft")


def test_configs_copies_over_nothing(capsys, tmp_path):
    assert main(["configs", "copy", "sft", "sub/mine.yaml"]) == 0
    assert (tmp_path / "sub" / "mine.yaml").read_text() == Path(SFT).read_text()
    (tmp_path / "all.yaml").write_text("mine")
    for file in ("sub/mine.yaml", "all.yaml", "sub"):
        assert f"{file} exists" in refusal(capsys, "configs", "copy", "quickstart", file)
    assert (tmp_path / "all.yaml").read_text() == "mine"
    assert not (tmp_path / "quickstart").exists()
    assert "copy NAME FILE" in refusal(capsys, "configs", "show", "sft")
