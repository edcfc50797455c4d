"""A run killed at any moment and started again with `--ckpt_path last` ends as if it had not been killed."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_lightning.errors import ModelError
from rlhf_lightning.training import references, reward_model
from rlhf_lightning.training.checkpoints import fault_of, read_checkpoint, shard_files
from tests.programs import run, start
from tests.training.killer import signal_at_line

LORA = {"lora": {"r": 2, "lora_alpha": 4.0, "lora_dropout": 0.2, "target_modules": "all-linear"}}
# Dropout: without the states of the random numbers, the rest of the run would be another one.
MODELS = {"RewardModel": {"dropout": 0.2}, "DPO": LORA, "SFT": LORA}
MODELS["PPO"] = {
    "reward_model": "tests.training.test_ppo:length",
    "max_new_tokens": 6,
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
}
MODELS["PPO"] |= {"adaptive_kl_target": 3.0, "kl_horizon": 20.0, "normalize_scores": True}
MODELS["OnlineDPO"] = {
    "reward_model": "tests.training.test_ppo:length",
    "max_new_tokens": 6,
    "num_epochs": 2,
    "num_mini_batches": 2,
}
CURVES = {
    "PPO": ("train/reward", "train/kl", "train/kl_coef", "train/value_loss", "train/lr", "val/reward"),
    "OnlineDPO": ("train/reward", "train/kl", "train/loss", "train/pairs", "train/lr", "val/reward"),
}
ZERO = ["--trainer.strategy", "zero2", "--trainer.precision", "16-mixed", "--trainer.devices", "2"]


def write_config(path: Path, kind: str, backbone: Path, pairs: Path, **model: object) -> str:
    """Write the configuration of a run of 9 optimizer steps: 18 batches in three epochs, validations between.

    PPO and OnlineDPO make four steps of each of the 18 batches.
    """
    plain_names = {"auto_insert_metric_name": False, "enable_version_counter": False}
    best = {"monitor": "val/loss", "mode": "min", "filename": "best-{step}"} | plain_names
    last = {"filename": "last-{step}", "every_n_train_steps": 3} | plain_names
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 3, "accumulate_grad_batches": 2}
    trainer |= {"val_check_interval": 0.5, "log_every_n_steps": 3, "num_sanity_val_steps": 0}
    trainer |= {"enable_progress_bar": False, "gradient_clip_val": 1.0}
    trainer["logger"] = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "run"}}
    trainer["callbacks"] = [{"class_path": "ModelCheckpoint", "init_args": each} for each in (best, last)]
    settings = {"backbone": str(backbone), "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}}
    data = {"train": str(pairs), "batch_size": 2}
    run = {
        "seed_everything": 7,
        "trainer": trainer,
        "model": {"class_path": kind, "init_args": settings | MODELS[kind] | model},
    }
    run["data"] = {"class_path": "PreferenceDataModule", "init_args": data}
    if kind in ("PPO", "OnlineDPO"):
        run["data"]["class_path"] = "PromptDataModule"
        del trainer["accumulate_grad_batches"], trainer["gradient_clip_val"]
        best |= {"monitor": "val/reward", "mode": "max"}
        last["every_n_train_steps"] = 12
        trainer["log_every_n_steps"] = 1
    path.write_text(yaml.safe_dump(run))
    return str(path)


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_qwen2, pairs):
    """Write the configuration of a kind of run."""
    return lambda kind: write_config(tmp_path_factory.mktemp("config") / f"{kind}.yaml", kind, tiny_qwen2, pairs)


def killer(moment: str, count: int) -> list[str]:
    callback = ["--trainer.callbacks+=tests.training.killer.Killer", "--trainer.callbacks.moment", moment]
    return [*callback, "--trainer.callbacks.count", str(count)]


def checkpoints(directory: Path) -> list[Path]:
    return sorted((directory / "runs" / "run" / "version_0" / "checkpoints").glob("*.ckpt"))


def last_checkpoint(directory: Path) -> Path:
    return max(checkpoints(directory), key=lambda path: read_checkpoint(path, weights=False)["global_step"])


def digest(path: Path) -> str:
    """SHA-256 of all trained weights, in float32, and of the optimizer's states."""
    total = hashlib.sha256()
    stored = read_checkpoint(path)
    for name, tensor in sorted(stored["state_dict"].items()):
        total.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    for states in stored.get("optimizer_states", []):
        for number, state in sorted(states["state"].items()):
            total.update(f"{number}".encode() + state["exp_avg_sq"].numpy().tobytes())
    return total.hexdigest()


def curve(directory: Path, name: str) -> dict[int, float]:
    """A logged number by step; steps that were made twice have been logged twice, with one value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (version,) = (directory / "runs" / "run").iterdir()
    values: dict[int, set[float]] = {}
    for file in version.glob("events*"):
        events = EventAccumulator(str(file)).Reload()
        for event in events.Scalars(name) if name in events.Tags()["scalars"] else []:
            values.setdefault(event.step, set()).add(event.value)
    assert all(len(found) == 1 for found in values.values()), values
    return {step: found.pop() for step, found in sorted(values.items())}


LOGGED = ("train/loss", "train/lr", "train/grad_norm", "val/loss")


def check_same(killed: Path, unbroken: Path, names: tuple[str, ...] = LOGGED) -> None:
    assert digest(last_checkpoint(killed)) == digest(last_checkpoint(unbroken))
    assert [path.name for path in checkpoints(killed)] == [path.name for path in checkpoints(unbroken)]
    for name in names:
        assert curve(unbroken, name), name
        assert curve(killed, name) == curve(unbroken, name), name
    assert not list(last_checkpoint(killed).parent.glob(".*part")), "nothing half written is left"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, config):
    """Directories of runs that were not killed."""
    made: dict[tuple, tuple[str, Path]] = {}

    def get(kind: str, *arguments: str, processes: int = 1) -> tuple[str, Path]:
        if (kind, arguments) not in made:
            file, directory = config(kind), tmp_path_factory.mktemp("unbroken")
            code, _, error = run(directory, "fit", "--config", file, *arguments, processes=processes)
            assert code == 0, error[-3000:]
            made[kind, arguments] = file, directory
        return made[kind, arguments]

    return get


@pytest.mark.parametrize(
    ("kind", "moment", "count"),
    [
        ("RewardModel", "batch", 10),  # between the two batches of a step
        ("RewardModel", "batch", 13),  # at the beginning of an epoch
        ("RewardModel", "validation", 7),
        ("RewardModel", "checkpoint", 2),
        ("RewardModel", "checkpoint", 4),
        ("DPO", "batch", 8),
        ("DPO", "checkpoint", 3),
        ("SFT", "batch", 15),
        ("PPO", "batch", 8),
        ("PPO", "validation", 7),
        ("PPO", "checkpoint", 4),
        ("OnlineDPO", "batch", 8),
        ("OnlineDPO", "checkpoint", 4),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, unbroken, kind, moment, count):
    file, whole = unbroken(kind)
    code, _, error = run(tmp_path / "run", "fit", "--config", file, *killer(moment, count))
    assert code == -signal.SIGKILL, error[-3000:]
    code, _, error = run(tmp_path / "run", "fit", "--config", file, "--ckpt_path", "last")
    assert code == 0, error[-3000:]
    assert re.search(r"resuming from runs/run/version_0/checkpoints/(last|best)-\d+\.ckpt \(step \d+\)", error)
    assert "not whole" not in error, "a checkpoint is in its place when it is complete"
    check_same(tmp_path / "run", whole, CURVES.get(kind, LOGGED))


@pytest.mark.parametrize(("moment", "count"), [("batch", 9), ("checkpoint", 3)])
def test_a_killed_run_of_two_processes_under_zero_2_in_16_mixed_goes_on(tmp_path, unbroken, moment, count):
    pytest.importorskip("deepspeed")
    file, whole = unbroken("RewardModel", *ZERO, processes=2)
    code, _, error = run(tmp_path / "run", "fit", "--config", file, *ZERO, *killer(moment, count), processes=2)
    assert code == -signal.SIGKILL, error[-3000:]
    code, _, error = run(tmp_path / "run", "fit", "--config", file, *ZERO, "--ckpt_path", "last", processes=2)
    assert code == 0, error[-3000:]
    check_same(tmp_path / "run", whole)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, unbroken):
    file, whole = unbroken("RewardModel")
    code, _, error = run(tmp_path / "run", "fit", "--config", file, *killer("batch", 14))
    newest, *_ = sorted(checkpoints(tmp_path / "run"), key=lambda path: -path.stat().st_mtime)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    newest.write_bytes(content)
    code, _, error = run(tmp_path / "run", "fit", "--config", file, "--ckpt_path", "last")
    assert code == 0, error[-3000:]
    assert re.search(rf"{newest.name}: is not whole \(.* is damaged at .*\); looking for the one before it", error)
    assert re.search(r"resuming from (\S+)", error)[1] != str(newest)
    assert digest(last_checkpoint(tmp_path / "run")) == digest(last_checkpoint(whole))


@pytest.mark.parametrize(
    ("name", "count", "where", "code", "step"),
    [
        ("SIGTERM", 12, [], 143, 6),
        ("SIGTERM", 2, [], 143, 1),  # whose validation, of the best checkpoint, comes within step 2
        ("SIGINT", 9, [], 130, 4),  # the first batch of step 5, of whose gradients nothing is kept
        ("SIGUSR1", 10, ["--trainer.callbacks.validating", "true"], 138, 4),  # that is validated within step 5
    ],
)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_just_there(tmp_path, unbroken, name, count, where, code, step):
    file, whole = unbroken("RewardModel")
    ended, _, error = run(tmp_path / "run", "fit", "--config", file, *killer(name, count), *where)
    assert ended == code, error[-3000:]
    assert re.search(rf"interrupted at step {step}; resume with --ckpt_path runs/\S*/last-{step}\.ckpt\n", error)
    ended, _, error = run(tmp_path / "run", "fit", "--config", file, "--ckpt_path", "last")
    assert ended == 0, error[-3000:]
    assert f"(step {step})" in re.search(r"resuming from .*", error)[0]
    check_same(tmp_path / "run", whole)


def fail_of_a_signal() -> None:
    """Let a signal come while a library is in the midst of what it can then not undo, as torch's stack of modes."""
    load = reward_model.RewardModel.configure_model

    def configure_model(module):
        load(module)
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(1.0)
        finally:
            raise RuntimeError("half done")

    reward_model.RewardModel.configure_model = configure_model


def test_a_signal_of_which_a_library_fails_ends_a_run_as_a_signal(tmp_path, unbroken):
    file, _ = unbroken("RewardModel")
    ended = run(tmp_path, "fit", "--config", file, prepare=fail_of_a_signal)
    assert ended.code == 138, ended.error[-3000:]
    assert "interrupted at step 0; no checkpoint was saved yet" in ended.error
    assert "Traceback" not in ended.error


def fail_at(step: int, error: Exception) -> None:
    """Let the training of a reward model raise an error in an optimizer step, as one of a server or a file would be."""
    train = reward_model.RewardModel.training_step

    def training_step(module, *arguments):
        if module.global_step == step:
            raise error
        return train(module, *arguments)

    reward_model.RewardModel.training_step = training_step


@pytest.mark.parametrize("error", [None, ModelError("no server answers"), RuntimeError("a fault of ours")], ids=str)
def test_a_run_that_ends_early_names_the_checkpoint_to_resume_from(tmp_path, unbroken, error):
    """And not that of another run of the same name, which is newer."""
    file, whole = unbroken("RewardModel")
    at = killer("SIGTERM", 12) if error is None else []
    broken = None if error is None else functools.partial(fail_at, 5, error)
    ended = run(tmp_path, "fit", "--config", file, *at, prepare=broken)
    assert ended.code == (143 if error is None else 2 if isinstance(error, ModelError) else 1), ended.error[-3000:]
    advice = re.search(r"resume with (--ckpt_path \S+/last-\d\.ckpt)$", ended.error.strip())[1]
    shutil.copytree(tmp_path / "runs/run/version_0", tmp_path / "runs/run/version_1")
    resumed = run(tmp_path, "fit", "--config", file, *shlex.split(advice))
    assert resumed.code == 0, resumed.error[-3000:]
    assert digest(last_checkpoint(tmp_path)) == digest(last_checkpoint(whole))


def test_a_second_signal_ends_a_run_at_once(tmp_path, unbroken):
    """Whose batch would not end."""
    file, _ = unbroken("RewardModel")
    hangs = ["--trainer.callbacks.hangs", "true"]
    ended, _, error = run(tmp_path / "run", "fit", "--config", file, *killer("SIGTERM", 12), *hangs)
    assert ended == 143, error[-3000:]
    assert "SIGTERM: saved when the batch under way is done; a second signal ends the run at once" in error
    assert re.search(r"ended at once; .*; resume with --ckpt_path runs/\S*/last-3\.ckpt\n", error)
    assert [path.name for path in checkpoints(tmp_path / "run")][-1] == "last-3.ckpt"


CACHE = ["--model.lora", "null", "--model.precompute_reference", "true", "--model.reference_cache", "cache"]
AT_VALIDATION = ["--trainer.callbacks.validating", "true"]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138), ("SIGHUP", 129)])
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("RewardModel", ["--trainer.num_sanity_val_steps", "2"]),
        ("PPO", []),  # which validates at its start
        ("DPO", CACHE),  # signalled while it computes the log-probs of its reference
    ],
)
def test_a_signal_before_the_first_batch_ends_the_run_in_a_line(tmp_path, config, kind, arguments, name, code):
    directory, told, prepare = tmp_path / "run", [*killer(name, 1), *AT_VALIDATION], None
    if kind == "DPO":
        told, prepare = [], functools.partial(signal_at_line, [references.__file__], 40, getattr(signal, name))
    ended = run(directory, "fit", "--config", config(kind), *arguments, *told, prepare=prepare)
    assert ended.code == code, ended.error[-3000:]
    assert ended.error.splitlines()[-1] == "rlhf-lightning: interrupted at step 0; no checkpoint was saved yet"
    assert "Traceback" not in ended.error
    assert not [path for path in directory.rglob("*") if path.suffix in (".ckpt", ".part") or "part" in path.name]


@pytest.mark.parametrize("command", ["test", "validate"])
def test_a_signal_ends_an_evaluation_in_a_line(tmp_path, config, command):
    """Which has nothing to go on from."""
    at = [*killer("SIGTERM", 1), *AT_VALIDATION] if command == "validate" else []
    prepare = None if at else functools.partial(signal_at_line, [reward_model.__file__], 60, signal.SIGTERM)
    ended = run(tmp_path / "run", command, "--config", config("RewardModel"), *at, prepare=prepare)
    assert (ended.code, ended.error.splitlines()[-1]) == (143, "rlhf-lightning: interrupted"), ended.error[-3000:]
    assert "Traceback" not in ended.error


def test_of_two_processes_one_gets_the_signal_and_both_save(tmp_path, unbroken):
    pytest.importorskip("deepspeed")
    file, whole = unbroken("RewardModel", *ZERO, processes=2)
    told = [*killer("SIGTERM", 9), "--trainer.callbacks.rank", "1"]
    ended, _, error = run(tmp_path / "run", "fit", "--config", file, *ZERO, *told, processes=2)
    assert ended == 143, error[-3000:]
    assert re.search(r"interrupted at step \d; resume with --ckpt_path runs/", error)
    ended, _, error = run(tmp_path / "run", "fit", "--config", file, *ZERO, "--ckpt_path", "last", processes=2)
    assert ended == 0, error[-3000:]
    check_same(tmp_path / "run", whole)


def test_a_job_of_slurm_is_saved_and_put_back_into_the_queue_and_goes_on_by_itself(tmp_path, unbroken, monkeypatch):
    file, whole = unbroken("RewardModel")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    ids = {"JOB_ID": "4321", "JOB_NAME": "mine", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in ids.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    ended, _, error = run(tmp_path / "run", "fit", "--config", file, *killer("SIGUSR1", 9))
    assert ended == 138, error[-3000:]
    assert (tmp_path / "asked").read_text() == "requeue 4321\n"
    assert not list((tmp_path / "run").glob("hpc*")), "of Lightning's, which would be of the middle of a batch"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    ended, _, error = run(tmp_path / "run", "fit", "--config", file)
    assert ended == 0, error[-3000:]
    check_same(tmp_path / "run", whole)


def test_a_checkpoint_that_the_user_named_is_kept(tmp_path, unbroken):
    file, whole = unbroken("RewardModel")
    run(tmp_path / "run", "fit", "--config", file, *killer("batch", 14))
    named = last_checkpoint(tmp_path / "run")
    before = digest(named)
    code, _, error = run(tmp_path / "run", "fit", "--config", file, "--ckpt_path", str(named))
    assert code == 0, error[-3000:]
    assert digest(named) == before
    assert digest(last_checkpoint(tmp_path / "run")) == digest(last_checkpoint(whole))


def test_what_broken_attempts_left_is_removed_and_what_the_user_named_or_copied_is_not(tmp_path, unbroken):
    file, whole = unbroken("RewardModel")
    run(tmp_path / "run", "fit", "--config", file, *killer("batch", 8))
    third = next(path for path in checkpoints(tmp_path / "run") if path.name == "last-3.ckpt")
    mine = shutil.copy(third, third.with_name("last-3-mine.ckpt"))
    # Killed after the next one was written and before this one was removed, or while a signal's was written.
    content = third.read_bytes()
    run(tmp_path / "run", "fit", "--config", file, "--ckpt_path", str(third), *killer("batch", 14 - 6))
    assert third.exists(), "the user named it"
    for name in ("last-2.ckpt", "interrupted-3.ckpt", ".last-4.ckpt.part"):
        third.with_name(name).write_bytes(content)
    code, _, error = run(tmp_path / "run", "fit", "--config", file, "--ckpt_path", "last")
    assert code == 0, error[-3000:]
    left = {path.name for path in third.parent.iterdir()}
    assert left == {path.name for path in checkpoints(whole)} | {"last-3.ckpt", mine.name}
    (line,) = [line for line in error.splitlines() if "removed, left by attempts" in line]
    assert line.endswith(": .last-4.ckpt.part, interrupted-3.ckpt, last-2.ckpt")
    assert digest(last_checkpoint(tmp_path / "run")) == digest(last_checkpoint(whole))


def test_a_best_checkpoint_that_a_better_one_has_replaced_is_removed_and_one_of_the_same_step_is_not(
    tmp_path, unbroken
):
    file, whole = unbroken("RewardModel")
    run(tmp_path / "run", "fit", "--config", file, *killer("batch", 8))
    earlier = last_checkpoint(tmp_path / "run").read_bytes()
    run(tmp_path / "run", "fit", "--config", file, "--ckpt_path", "last", *killer("batch", 14 - 6))
    newest = last_checkpoint(tmp_path / "run")
    newest.with_name("best-99.ckpt").write_bytes(newest.read_bytes())
    os.utime(newest.with_name("best-99.ckpt"), (0, 0))  # or the run would go on from it
    for name in ("best-88.ckpt", "best-88-mine.ckpt"):  # killed before the first was removed
        newest.with_name(name).write_bytes(earlier)
    code, _, error = run(tmp_path / "run", "fit", "--config", file, "--ckpt_path", "last")
    assert code == 0, error[-3000:]
    left = {path.name for path in newest.parent.iterdir()}
    assert left == {path.name for path in checkpoints(whole)} | {"best-99.ckpt", "best-88-mine.ckpt"}
    (line,) = [line for line in error.splitlines() if "removed, left by attempts" in line]
    assert ": best-88.ckpt" in line


def test_no_validation_is_made_that_was_not_due(tmp_path, unbroken):
    """The checkpoint at the end of the first epoch, with a validation after every second one."""
    every = ["--trainer.check_val_every_n_epoch", "2", "--trainer.val_check_interval", "1.0"]
    file, whole = unbroken("RewardModel", *every)
    run(tmp_path / "run", "fit", "--config", file, *every, *killer("batch", 8))
    code, _, error = run(tmp_path / "run", "fit", "--config", file, *every, "--ckpt_path", "last")
    assert code == 0, error[-3000:]
    check_same(tmp_path / "run", whole)


def test_a_checkpoint_of_another_class_is_refused(tmp_path, unbroken, config):
    path = str(last_checkpoint(unbroken("SFT")[1]))
    for command in ("fit", "test"):
        code, _, error = run(tmp_path / "run", command, "--config", config("DPO"), "--ckpt_path", path)
        assert (code, "is of a run of SFT, and this is DPO; to begin from its model, export it" in error) == (2, True)


def test_without_a_checkpoint_last_begins_at_step_0_and_says_so(tmp_path, unbroken):
    file, whole = unbroken("RewardModel")
    code, _, error = run(tmp_path / "run", "fit", "--config", file, "--ckpt_path", "last")
    assert code == 0
    assert "no checkpoint of this run yet; beginning at step 0" in error
    check_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.batch_size", "1"], "its run had data.batch_size 2, this one has 1"),
        (["--trainer.accumulate_grad_batches", "1"], "its run had trainer.accumulate_grad_batches 2, this one has 1"),
        (["--data.limit", "10"], "its run had rows in an epoch 11, this one has 10"),
        (["--model.hidden_size", "7"], "weights are those of another model"),
        (["--trainer.strategy", "zero2"], "is no checkpoint of DeepSpeed"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_run_is_refused(tmp_path, unbroken, arguments, message):
    file, whole = unbroken("RewardModel")
    path = str(last_checkpoint(whole))
    code, _, error = run(tmp_path / "run", "fit", "--config", file, "--ckpt_path", path, *arguments)
    assert code == 2
    assert message in error
    assert "Traceback" not in error


def test_sharded_checkpoints_test_export_and_refuse_without_deepspeed_s_strategy(tmp_path, unbroken):
    pytest.importorskip("deepspeed")
    file, whole = unbroken("RewardModel", *ZERO, processes=2)
    path = last_checkpoint(whole)
    assert (fault_of(path), len(shard_files(path)[1])) == (None, 2)
    code, _, error = run(tmp_path / "a", "test", "--config", file, "--ckpt_path", str(path))
    assert code == 0, error[-3000:]
    code, _, error = run(tmp_path / "a", "export", "--ckpt_path", str(path), "--out", "model")
    assert code == 0, error[-3000:]
    assert "largest difference" in (tmp_path / "a" / "out.txt").read_text()
    (tmp_path / "a" / "other").mkdir()
    (tmp_path / "a" / "other" / "thesis.txt").write_text("mine")
    code, _, error = run(tmp_path / "a", "export", "--ckpt_path", str(path), "--out", "other")
    assert (code, (tmp_path / "a" / "other" / "thesis.txt").read_text()) == (2, "mine")
    code, _, error = run(tmp_path / "a", "fit", "--config", file, "--ckpt_path", str(path))
    assert (code, "set trainer.strategy to zero2" in error) == (2, True)
    one = ["--trainer.strategy", "zero2", "--trainer.precision", "16-mixed"]
    code, _, error = run(tmp_path / "a", "fit", "--config", file, *one, "--ckpt_path", str(path))
    assert (code, "is of a run of 2 processes, this one has 1" in error) == (2, True)


def test_two_processes_under_zero_2_train_the_weights_of_one(tmp_path, config):
    """32-true, so that only the order of sums differs; the last step of an epoch has 3 pairs for two processes."""
    pytest.importorskip("deepspeed")
    file, plain = config("RewardModel"), ["--model.dropout", "0", "--trainer.logger.name", "run"]
    plain += ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.05"]
    plain += ["--trainer.val_check_interval", "1.0"]
    two = ["--trainer.strategy", "zero2", "--trainer.devices", "2", "--data.batch_size", "1"]
    assert run(tmp_path / "one", "fit", "--config", file, *plain)[0] == 0
    code, _, error = start(tmp_path / "two", "fit", "--config", file, *plain, *two)
    assert code == 0, error[-3000:]
    one, both = (read_checkpoint(last_checkpoint(tmp_path / name)) for name in ("one", "two"))
    assert one["global_step"] == both["global_step"] == 9
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(both["state_dict"][name], tensor, rtol=0, atol=2e-6, msg=name)
    for name in ("train/loss", "val/loss", "train/grad_norm"):
        assert curve(tmp_path / "two", name) == pytest.approx(curve(tmp_path / "one", name), abs=1e-4), name
