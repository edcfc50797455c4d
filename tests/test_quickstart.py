"""The quickstart from end to end, with a third of its PPO; and that PPO learns from what it leaves, over seeds.

The tiny model, taught to speak by SFT, is rewarded by a rule and by a reward model of ours.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import seed_everything

from rlhf_lightning import PPO, PromptDataModule
from rlhf_lightning.data.courtesy.rule import true_utility
from rlhf_lightning.rewards.source import RewardSource
from tests.programs import run
from tests.test_configs import ROOT
from tests.training.conftest import trainer  # noqa: F401 (a fixture)

CONFIGS = ROOT / "configs"
RULE = "rlhf_lightning.data.courtesy.rule:true_utility"
SEEDS = range(5)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[Path, str]:
    """A directory where the quickstart has run, and what it printed."""
    directory = tmp_path_factory.mktemp("quickstart")
    settings = ["--ppo.trainer.max_epochs", "2"]  # of 6: a third of its time
    code, out, error = run(directory, "pipeline", "--config", str(CONFIGS / "quickstart.yaml"), *settings)
    assert code == 0, error[-3000:]
    return directory, out


def test_the_quickstart_learns_and_leaves_its_models_and_a_report(quickstart):
    """Far above chance, and not above the oracle by more than chance: 0.885 + 3 standard errors of 200 pairs."""
    directory, text = quickstart
    values = {name: float(value) for name, value in re.findall(r"^│ ([\w ]+?) +│ +([\d.]+) │ +200 │$", text, re.M)}
    assert 0.70 < values["pairwise accuracy"] < 0.955
    assert values["pooled AUROC"] > 0.65
    assert values["margin AUROC"] > 0.75
    assert values["loss"] < 0.62
    for name in ("sft", "reward_model", "ppo"):
        assert (directory / "models" / f"quickstart_{name}" / "model.safetensors").is_file()
    numbers = json.loads((directory / "reports" / "quickstart" / "metrics.json").read_text())["metrics"]
    assert numbers["rm/auroc"]["value"] == pytest.approx(values["pooled AUROC"], abs=1e-4)
    assert numbers["policy/anchored_gain"]["low"] > 25
    assert 1 < numbers["policy/kl_nats"]["value"] < 40
    assert "Reward against the distance" in (directory / "reports" / "quickstart" / "report.html").read_text()


class AlsoTrue(RewardSource):
    """A source of rewards that keeps what the rule says of the same replies."""

    def each(self, prompts, responses, ended=None):
        self.true = getattr(self, "true", []) + true_utility(prompts, responses)
        return super().each(prompts, responses, ended)


@pytest.fixture
def ppo(quickstart, trainer):  # noqa: F811
    """Train by the quickstart's PPO settings; what a validation says before and after, and by the rule."""

    def run(reward_model: str, seed: int) -> list[dict[str, float]]:
        config = yaml.safe_load((CONFIGS / "quickstart" / "ppo.yaml").read_text())
        settings, data = config["model"]["init_args"], config["data"]["init_args"]
        factory = functools.partial(torch.optim.AdamW, **settings.pop("optimizer")["init_args"])
        seed_everything(seed)
        backbone = str(quickstart[0] / "models" / "quickstart_sft")
        settings |= {"backbone": backbone, "num_generations": 1, "micro_batch_size": 64, "num_ppo_epochs": 2}
        module = PPO(**settings | {"reward_model": reward_model}, optimizer=factory)
        prompts = PromptDataModule(**data | {"batch_size": 54, "seed": seed}, tokenizer=backbone)
        module.rewards = AlsoTrue(reward_model, batch_size=64)
        found = []
        for fit in (lambda: None, lambda: trainer(max_epochs=2, limit_val_batches=0).fit(module, prompts)):
            fit()
            module.rewards.true = []
            numbers = trainer().validate(module, prompts, verbose=False)[0]
            true = module.rewards.true
            found.append(numbers | {"true": math.fsum(true) / len(true)})
        return found

    return run


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean over the seeds and its standard error."""
    found = torch.tensor(values, dtype=torch.float64)
    return found.mean().item(), found.std().item() / math.sqrt(len(values))


@pytest.mark.parametrize("reward", ["rule", "reward model"])
def test_the_mean_reward_of_unseen_tasks_rises_over_five_seeds(ppo, quickstart, reward):
    """By more than two standard errors; and with a learned reward the true one rises too, which it never saw."""
    source = RULE if reward == "rule" else str(quickstart[0] / "models" / "quickstart_reward_model")
    rises, true_rises, distances = [], [], []
    for seed in SEEDS:
        before, after = ppo(source, seed)
        assert before["val/kl"] == pytest.approx(0, abs=1e-3)
        rises.append(after["val/reward"] - before["val/reward"])
        true_rises.append(after["true"] - before["true"])
        distances.append(after["val/kl"])
    for name, values in (("reward", rises), ("true utility", true_rises)):
        mean, error = mean_and_error(values)
        print(f"{reward}: {name} rises by {mean:.3f}, standard error {error:.3f}")
        assert mean > (2 * error if name == "reward" else 0), (name, values)
    print(f"KL {mean_and_error(distances)[0]:.2f} nats")
    assert all(0 < distance < 50 for distance in distances), distances
