"""KTO, BCO and APO-zero: anchors, closed-form gradients, twins in plain Python floats, and TRL's own numbers.

`trl_unpaired_losses.json` was made by TRL 1.16's `KTOTrainer._compute_loss`, called on the tensors in it. That version
has no BCO. Everything in float64 and to 1e-12 unless said.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlhf_lightning.functional import UNPAIRED_LOSSES, RewardShift, kto_shift

TRL = json.loads((Path(__file__).parent / "trl_unpaired_losses.json").read_text(encoding="utf-8"))
EXACT = {"rtol": 0, "atol": 1e-12}
DESIRABLE = torch.tensor([True, False, True, False, False])
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}


def example():
    generator = torch.Generator().manual_seed(1)
    policy, reference = (-20 * torch.rand(5, dtype=torch.float64, generator=generator) for _ in range(2))
    return policy, reference


def settings_of(name, shift, **others):
    return others | ({"shift": torch.tensor(shift, dtype=torch.float64)} if UNPAIRED_LOSSES[name].shift else {})


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


TWINS = {
    "kto": lambda r, z, good: 1 - sigmoid(r - z) if good else 1 - sigmoid(z - r),
    "bco": lambda r, d, good: -math.log(sigmoid(r - d)) if good else -math.log(1 - sigmoid(r - d)),
    "apo_zero_unpaired": lambda r, _, good: 1 - sigmoid(r) if good else sigmoid(r),
}
SLOPES = {
    "kto": lambda r, z: sigmoid(r - z) * (1 - sigmoid(r - z)),
    "bco": None,
    "apo_zero_unpaired": lambda r, z: sigmoid(r) * (1 - sigmoid(r)),
}


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_a_policy_that_is_its_reference_has_the_loss_of_a_coin(name):
    policy, _ = example()
    coin = math.log(2) if name == "bco" else 0.5
    made = UNPAIRED_LOSSES[name].function(policy, policy, DESIRABLE, **settings_of(name, 0.0, beta=0.3, **WEIGHTS))
    torch.testing.assert_close(made, coin * torch.where(DESIRABLE, 1.5, 0.5).double(), **EXACT)


@pytest.mark.parametrize("shift", [0.0, 0.7])
@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_losses_and_gradients_equal_the_definition(name, shift):
    policy, reference = example()
    policy.requires_grad_()
    beta = 0.4
    made = UNPAIRED_LOSSES[name].function(
        policy, reference, DESIRABLE, **settings_of(name, shift, beta=beta, **WEIGHTS)
    )
    made.sum().backward()
    for i, good in enumerate(DESIRABLE.tolist()):
        reward, weight = beta * (policy[i].item() - reference[i].item()), 1.5 if good else 0.5
        assert made[i].item() == pytest.approx(weight * TWINS[name](reward, shift, good), abs=1e-12)
        if name == "bco":
            slope = 1 - sigmoid(reward - shift) if good else sigmoid(reward - shift)
        else:
            slope = SLOPES[name](reward, shift)
        assert policy.grad[i].item() == pytest.approx((-1 if good else 1) * weight * beta * slope, abs=1e-12)


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_gradcheck_dtypes_and_refusals(name):
    loss, (policy, reference) = UNPAIRED_LOSSES[name].function, example()
    given = settings_of(name, 0.2, beta=0.1)
    assert torch.autograd.gradcheck(lambda x: loss(x, reference, DESIRABLE, **given), policy.requires_grad_())
    half = loss(policy.detach().bfloat16(), reference.bfloat16(), DESIRABLE, **settings_of(name, 0.0, beta=0.1))
    assert half.dtype is torch.float32
    with pytest.raises(ValueError, match=r"desirable has the shape \[5, 1\]"):
        loss(policy, reference, DESIRABLE[:, None], **given)
    with pytest.raises(ValueError, match="dtype"):
        loss(policy, reference, DESIRABLE.float(), **given)
    with pytest.raises(ValueError, match=r"^beta is 0"):
        loss(policy, reference, DESIRABLE, **given | {"beta": 0.0})
    with pytest.raises(ValueError, match=r"^desirable_weight is -1"):
        loss(policy, reference, DESIRABLE, **given, desirable_weight=-1.0)


def test_losses_are_finite_far_from_the_reference():
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    for name, loss in UNPAIRED_LOSSES.items():
        for good in (True, False):
            made = loss.function(far, torch.zeros(2), torch.tensor([good] * 2), **settings_of(name, 0.0, beta=1.0))
            (gradient,) = torch.autograd.grad(made.sum(), far)
            assert made.isfinite().all(), name
            assert gradient.isfinite().all(), name


# ---- shifts ------------------------------------------------------------------------------------------------


def test_the_reference_point_is_a_mean_over_processes_that_is_clamped_afterwards():
    policy, reference = torch.tensor([-3.0, -5.0]).double(), torch.tensor([-4.0, -5.5]).double()
    assert kto_shift(policy, reference, beta=0.1).item() == pytest.approx(0.075, abs=1e-12)
    assert kto_shift(reference, policy, beta=0.1).item() == 0
    other = torch.tensor([-1.2, 3.0], dtype=torch.float64)  # of another process: sum, number
    assert kto_shift(policy, reference, beta=0.1, sum_over=lambda own: own + other).item() == pytest.approx(
        0.1 * 0.3 / 5, abs=1e-12
    )
    none = torch.zeros(0).double()
    assert kto_shift(none, none, beta=0.1).item() == 0
    assert not kto_shift(policy.requires_grad_(), reference, beta=0.1).requires_grad
    with pytest.raises(ValueError, match="shape"):
        kto_shift(policy, none, beta=0.1)


def test_the_reward_shift_is_the_half_sum_of_the_means_of_all_so_far():
    shift = RewardShift()
    assert shift.value == 0
    shift.update(torch.tensor([1.0, 2.0]), torch.tensor([True, True]))
    assert shift.value == 0.75, "the other class counts as 0"
    shift.update(torch.tensor([3.0, -2.0]), torch.tensor([True, False]))
    assert shift.value == (2.0 - 2.0) / 2
    again = RewardShift()
    again.load_state_dict(shift.state_dict())
    for one in (shift, again):
        one.update(torch.tensor([5.0]), torch.tensor([False]), sum_over=lambda own: 2 * own)
        assert one.value.item() == pytest.approx((2.0 + (-2.0 + 10.0) / 3) / 2, abs=1e-12)


# ---- TRL ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TRL["cases"], ids=lambda case: f"{case['loss_type']}-{case['beta']}")
def test_loss_and_gradient_equal_those_of_trl(case):
    tokens, reference, mismatched, its = (
        torch.tensor(TRL[name], dtype=torch.float64)
        for name in ("logprobs", "reference_logprobs", "mismatched_logprobs", "mismatched_reference_logprobs")
    )
    policy, beta = tokens.sum(1).requires_grad_(), case["beta"]
    loss, given = UNPAIRED_LOSSES[case["loss_type"]], {}
    if loss.shift == "kl":
        given["shift"] = kto_shift(mismatched + case["added_to_kl"], its, beta=beta)
        assert given["shift"].item() == pytest.approx(beta * case["kl"], abs=1e-9)
    weights = {name: case[name] for name in ("desirable_weight", "undesirable_weight")}
    made = loss.function(policy, reference.sum(1), torch.tensor(TRL["desirable"]), beta=beta, **weights, **given).mean()
    made.backward()
    assert made.item() == pytest.approx(case["loss"], abs=1e-9)
    assert policy.grad.abs().min() > 1e-3
    torch.testing.assert_close(policy.grad, torch.tensor(case["gradient"], dtype=torch.float64), rtol=0, atol=1e-9)
