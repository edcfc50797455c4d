"""Advantage estimators by name: those of the table, a user's own, and what is refused."""

from __future__ import annotations

import pytest
import torch

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.functional.advantages import ADVANTAGES, AdvantageEstimator, leave_one_out_advantages
from rlhf_lightning.training.estimators import find_estimator


def plain(rewards, values, mask, *, group_size, gamma, gae_lambda):
    return leave_one_out_advantages(rewards, mask, group_size=group_size), torch.zeros_like(rewards)


grouped = AdvantageEstimator(plain, uses_groups=True)


def short(rewards, values, mask, *, group_size, gamma, gae_lambda):
    return rewards.sum(dim=1), values


def alone(rewards, values, mask, *, group_size, gamma, gae_lambda):
    return rewards


def other(rewards):
    return rewards, rewards


def test_the_table_and_functions_of_the_users_own_are_found_by_name():
    for name, estimator in ADVANTAGES.items():
        assert find_estimator(name) is estimator
    assert find_estimator(f"{__name__}:plain") == AdvantageEstimator(plain)
    assert find_estimator(f"{__name__}:grouped") is grouped
    rewards, mask = torch.randn(4, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.bool)
    settings = {"group_size": 2, "gamma": 1.0, "gae_lambda": 0.95}
    own, theirs = (each(rewards, rewards * 0, mask, **settings) for each in (grouped, ADVANTAGES["rloo"]))
    assert torch.equal(own[0], theirs[0])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("grpoo", "did you mean grpo"),
        ("nothing", "use one of gae"),
        (f"{__name__}:absent", "cannot be imported"),
        (f"{__name__}:short", "does not give"),
        (f"{__name__}:alone", "does not give"),
        (f"{__name__}:other", "fails on a small rollout"),
    ],
)
def test_what_is_no_estimator_is_refused(name, words):
    with pytest.raises(
        ConfigurationError, match=f"^model.advantage_estimator: {name}|^{name}|^model.advantage_estimator: '{name}"
    ) as found:
        find_estimator(name)
    assert words in str(found.value)
