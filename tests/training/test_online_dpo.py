"""Online DPO: its pairs, the loss of a step by its definition, its refusals, and that it learns.

That it resumes exactly, and in two processes, is in test_resume.py, test_resume_chains.py and test_ppo.py.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch

from rlhf_lightning import OnlineDPO, PromptDataModule
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.functional.advantages import best_and_worst
from tests.training.conftest import sgd, weights
from tests.training.test_ppo import HERE, fitted
from tests.training.test_ppo_statements import Ending


@pytest.fixture
def build(tiny_qwen2):
    """Make an OnlineDPO module and its 18 prompts in batches of 6; keyword arguments go to the module."""

    def make(*, data=None, **settings):
        torch.manual_seed(0)
        plain = {"backbone": str(tiny_qwen2), "reward_model": f"{HERE}:length", "optimizer": sgd(0.05)}
        module = OnlineDPO(**plain | {"lr_scheduler_type": "constant", "max_new_tokens": 6, "beta": 0.3} | settings)
        prompts = {"train": "builtin:courtesy", "tokenizer": str(tiny_qwen2), "batch_size": 6, "seed": 3}
        return module, PromptDataModule(**prompts | {"limit": 18} | (data or {}))

    return make


def test_best_and_worst_of_each_group_are_a_pair_above_the_gap():
    scores = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.0, 0.5, 0.0, 0.5])
    best, worst, differ = best_and_worst(scores, group_size=3, min_gap=0.5)
    assert best.tolist() == [1, 3, 6]
    assert worst.tolist() == [0, 3, 7]
    assert differ.tolist() == [True, False, False]
    assert best_and_worst(scores, group_size=3)[2].tolist() == [True, False, True]


@pytest.mark.parametrize("given", [{"group_size": 1}, {"group_size": 4}, {"group_size": 3, "min_gap": -0.1}])
def test_groups_that_make_no_pairs_are_refused(given):
    with pytest.raises(ValueError, match=r"group_size is|min_gap"):
        best_and_worst(torch.zeros(6), **given)
    with pytest.raises(ValueError, match="scores"):
        best_and_worst(torch.zeros(3, 2), group_size=2)


def kept(module):
    """What each step of a module learned from, as it goes, with the policy's log-probs of all responses before it."""
    steps, original = [], module._step

    def step(experience, pairs, part):
        logprobs = module.rollouts.logprobs(experience.responses).logprobs.double().sum(dim=1)
        steps.append((experience, pairs, list(part), logprobs, original(experience, pairs, part)))
        return steps[-1][-1]

    module._step = step
    return steps


@pytest.mark.parametrize("settings", [{}, {"loss_type": "ipo"}, {"num_epochs": 2, "num_mini_batches": 2}], ids=str)
def test_the_loss_of_a_step_is_dpo_of_best_against_worst(build, trainer, settings):
    """From the scores and log-probs of a rollout alone, in float64; two of its three rollouts have moved weights."""
    module, data = build(num_generations=3, max_new_tokens=8, missing_eos_penalty=2.0, **settings)
    module.engine = Ending(module.engine)
    steps = kept(module)
    trainer(limit_val_batches=0).fit(module, data)
    assert len(steps) == 3 * settings.get("num_epochs", 1) * settings.get("num_mini_batches", 1)
    for experience, _, part, policy, logged in steps:
        responses, scores, tokens, *_ = experience
        shaped = scores - 2.0 * (~responses.ended).float()
        assert 0 < responses.ended.sum() < len(scores)
        reference, lengths, losses, rewards = tokens.reference.double().sum(dim=1), responses.lengths, [], []
        for prompt in part:
            group = list(range(3 * prompt, 3 * prompt + 3))
            best, worst = max(group, key=lambda i: shaped[i]), min(group, key=lambda i: shaped[i])
            ratio = (policy - reference) / (lengths if settings.get("loss_type") else 1)
            margin = (ratio[best] - ratio[worst]).item()
            if shaped[best] > shaped[worst]:
                rewards.append(0.3 * ratio[best].item())
                ipo = (margin - 1 / (2 * 0.3)) ** 2
                losses.append(ipo if settings.get("loss_type") else math.log1p(math.exp(-0.3 * margin)))
        assert logged["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert logged["rewards/chosen"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-5)
    first = steps[0][-1]["loss"]
    assert first == pytest.approx(1 / 0.36 if settings.get("loss_type") else math.log(2), abs=1e-5)
    assert steps[-1][-1]["loss"] != pytest.approx(first, abs=1e-4)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_how_a_step_is_divided_and_sampled_changes_no_weight(build, trainer, layout):
    settings = {"num_generations": 3, "max_grad_norm": 0.0, "layout": layout}  # clipping would hide a wrong factor
    whole, one, _ = fitted(trainer, build(micro_batch_size=6, **settings))
    split, other, _ = fitted(trainer, build(micro_batch_size=1, generation_micro_batch_size=2, **settings))
    torch.testing.assert_close(weights(whole), weights(split), rtol=0, atol=2e-6)
    for row in (one.rows[0], other.rows[0]):
        del row["rewards/accuracies"]  # of a policy equal to its reference: the sign of rounding
    for row, twin in zip(one.curve, other.curve, strict=True):
        assert row == pytest.approx(twin, abs=2e-4)


@pytest.mark.parametrize("settings", [{"reward_model": f"{HERE}:constant"}, {"min_score_gap": 1e3}], ids=str)
def test_ties_and_small_gaps_are_counted_and_teach_nothing(build, trainer, settings):
    module, data = build(missing_eos_penalty=0.0, **settings)
    module.configure_model()
    before = weights(module)
    module, recorder, fitter = fitted(trainer, (module, data))
    assert [row["pairs"] for row in recorder.rows] == [0] * 3
    assert [row["left_out"] for row in recorder.rows] == [1] * 3
    equal = float("reward_model" in settings)
    assert recorder.rows[0]["frac_reward_zero_std"] == pytest.approx(equal, abs=0.5)
    assert fitter.global_step == 3
    assert torch.equal(weights(module), before)


def test_what_is_logged_of_a_rollout(build, trainer):
    _, recorder, _ = fitted(trainer, build(num_generations=4, lora={"r": 4, "lora_alpha": 8.0}))
    for row in recorder.rows:
        assert row["pairs"] == pytest.approx(6 * (1 - row["left_out"]))
        assert row["score_gap"] > 0
        assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-6)
        expected = row["reward"] - row["missing_eos"] - 0.3 * row["kl"]
        assert row["reward_with_kl"] == pytest.approx(expected, abs=1e-5)
    assert recorder.rows[0]["kl"] == pytest.approx(0, abs=1e-3)


def test_the_rule_is_learned(build, trainer):
    optimizer = functools.partial(torch.optim.AdamW, lr=6e-3)
    made = build(
        optimizer=optimizer,
        num_generations=4,
        num_epochs=4,
        beta=0.05,
        missing_eos_penalty=0.0,
        data={"batch_size": 18},
    )
    _, recorder, _ = fitted(trainer, made, max_epochs=12)
    rewards = [row["reward"] for row in recorder.rows]
    noise = recorder.rows[0]["reward_std"] / 72**0.5
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 5 * noise


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_generations": 1}, "num_generations is 1, which makes no pair"),
        ({"loss_type": "sigmoyd"}, "did you mean sigmoid"),
        ({"loss_type": "simpo"}, r"model\.gamma: the loss simpo needs it"),
        ({"lora": {"r": 4, "lora_dropout": 0.1}}, "lora_dropout"),
        ({"reference": "adapter"}, "adapter"),
    ],
)
def test_settings_that_make_no_sense_are_refused(build, settings, words):
    with pytest.raises(ConfigurationError, match=words):
        build(**settings)


def test_a_language_model_may_be_the_judge(build, trainer):
    module, data = build(reward_model="judge://tests.rewards.test_judged:rater", max_new_tokens=4)
    steps = kept(module)
    fitted(trainer, (module, data), max_epochs=1)
    for experience, *_ in steps:
        texts = experience.responses.texts(module.chat_format)
        expected = [len(text) if 1 <= len(text) <= 10 else 0 for text in texts]
        assert experience.scores.tolist() == expected
    assert steps
