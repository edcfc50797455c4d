"""PPO learns: the tiny model, taught to speak by SFT, then rewarded by a rule and by a reward model of ours."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import seed_everything

from rlhf_lightning import PPO, PromptDataModule
from rlhf_lightning.cli import main
from rlhf_lightning.training.rewards import RewardSource
from tests.test_configs import ROOT

QUICKSTART = ROOT / "configs" / "quickstart"
RULE = "rlhf_lightning.data.courtesy.rule:true_utility"
SEEDS = range(5)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """A directory where the quickstart's SFT and reward model have run."""
    directory, before = tmp_path_factory.mktemp("quickstart"), Path.cwd()
    os.chdir(directory)
    try:
        for name in ("sft", "reward_model"):
            assert main(["fit", "--config", str(QUICKSTART / f"{name}.yaml"), "--trainer.logger", "false"]) == 0
    finally:
        os.chdir(before)
    return directory / "models"


@pytest.fixture
def ppo(quickstart, trainer):
    """Train by the quickstart's PPO settings; what a validation says before and after, and by the rule."""

    def run(reward_model: str, seed: int) -> tuple[list[dict], list[dict]]:
        config = yaml.safe_load((QUICKSTART / "ppo.yaml").read_text())
        settings, data = config["model"]["init_args"], config["data"]["init_args"]
        factory = functools.partial(torch.optim.AdamW, **settings.pop("optimizer")["init_args"])
        seed_everything(seed)
        settings |= {"backbone": str(quickstart / "quickstart_sft"), "reward_model": reward_model}
        module = PPO(**settings | {"samples_per_prompt": 1, "micro_batch_size": 64}, optimizer=factory)
        prompts = PromptDataModule(**data | {"batch_size": 54, "seed": seed}, tokenizer=settings["backbone"])
        learned, true = [], []
        for fit in (lambda: None, lambda: trainer(max_epochs=3, limit_val_batches=0).fit(module, prompts)):
            fit()
            for source, numbers in ((reward_model, learned), (RULE, true)):
                module.rewards = RewardSource(source, batch_size=64)
                numbers.append(trainer().validate(module, prompts, verbose=False)[0])
            module.rewards = RewardSource(reward_model, batch_size=64)
        return learned, true

    return run


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean over the seeds and its standard error."""
    found = torch.tensor(values, dtype=torch.float64)
    return found.mean().item(), found.std().item() / math.sqrt(len(values))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("reward", ["rule", "reward model"])
def test_the_mean_reward_of_unseen_tasks_rises_over_five_seeds(ppo, quickstart, reward):
    """By more than two standard errors; and with a learned reward the true one rises too, which it never saw."""
    source = RULE if reward == "rule" else str(quickstart / "quickstart_reward_model")
    rises, true_rises, distances = [], [], []
    for seed in SEEDS:
        (before, after), true = ppo(source, seed)
        assert before["val/kl"] == pytest.approx(0, abs=1e-3)
        rises.append(after["val/reward"] - before["val/reward"])
        true_rises.append(true[1]["val/reward"] - true[0]["val/reward"])
        distances.append(after["val/kl"])
    for name, values in (("reward", rises), ("true utility", true_rises)):
        mean, error = mean_and_error(values)
        print(f"{reward}: {name} rises by {mean:.3f}, standard error {error:.3f}")
        assert mean > (2 * error if name == "reward" else 0), (name, values)
    print(f"KL {mean_and_error(distances)[0]:.2f} nats")
    assert all(0 < distance < 50 for distance in distances), distances
