"""The policy losses and their aggregation: twins in plain Python floats, closed-form gradients, and TRL's own numbers.

`trl_policy_losses.json` was made by TRL 1.16's `GRPOTrainer._compute_loss`, called on the tensors in it. Everything in
float64 and to 1e-12 unless said. The default `ppo_policy_loss` has further tests in test_losses.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlhf_lightning.functional import (
    POLICY_LOSSES,
    cispo_loss,
    gspo_loss,
    kl_estimate,
    ppo_policy_loss,
    step_size,
    token_weights,
)
from rlhf_lightning.functional.policy_losses import response_ratio

EXACT = {"rtol": 0, "atol": 1e-12}
LENGTHS = [5, 1, 3, 4]
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
TRL = json.loads((Path(__file__).parent / "trl_policy_losses.json").read_text(encoding="utf-8"))


def example():
    """Log-probs, old log-probs and advantages, [4, 5]: ratios on both sides of each range, advantages of both signs."""
    generator = torch.Generator().manual_seed(1)
    old = -3 * torch.rand(4, 5, dtype=torch.float64, generator=generator)
    new = old + 0.6 * torch.randn(4, 5, dtype=torch.float64, generator=generator)
    new[3] += 0.6  # a whole response beyond the ranges
    return [new, old, torch.randn(4, 5, dtype=torch.float64, generator=generator)]


def surrogate(ratio, advantage, low, high, dual):
    """The definition, on floats."""
    bounded = ratio
    if low is not None:
        bounded = max(bounded, 1 - low)
    if high is not None:
        bounded = min(bounded, 1 + high)
    loss = -min(advantage * ratio, advantage * bounded)
    return min(loss, -dual * advantage) if dual is not None and advantage < 0 else loss


@pytest.mark.parametrize("low", [None, 0.2])
@pytest.mark.parametrize("high", [None, 0.28])
@pytest.mark.parametrize("dual", [None, 1.5])
@pytest.mark.parametrize("whole", [False, True], ids=["ppo", "gspo"])
def test_the_clipped_losses_equal_a_loop(low, high, dual, whole):
    new, old, advantages = example()
    settings = {"clip_range": low, "clip_range_high": high, "dual_clip": dual}
    made = (
        gspo_loss(new, old, advantages, MASK, **settings)
        if whole
        else ppo_policy_loss(new, old, advantages, **settings)
    )
    ratios = set()
    for i, length in enumerate(LENGTHS):
        mean = sum(new[i, t].item() - old[i, t].item() for t in range(length)) / length
        for t in range(length):
            ratio = math.exp(mean if whole else new[i, t].item() - old[i, t].item())
            ratios.add(ratio)
            expected = surrogate(ratio, advantages[i, t].item(), low, low if high is None else high, dual)
            assert made[i, t].item() == pytest.approx(expected, abs=1e-12)
    assert min(ratios) < 0.8
    assert max(ratios) > 1.28


@pytest.mark.parametrize("high", [None, 0.28, 4.0])
def test_cispo_equals_a_loop_and_its_gradient_is_the_capped_weight(high):
    new, old, advantages = example()
    new.requires_grad_()
    made = cispo_loss(new, old, advantages, clip_range_high=high)
    made.sum().backward()
    capped = 0
    for i in range(4):
        for t in range(5):
            n, o, a = (each[i, t].item() for each in (new, old, advantages))
            weight = min(math.exp(n - o), math.inf if high is None else 1 + high)
            capped += weight != math.exp(n - o)
            assert made[i, t].item() == pytest.approx(-weight * a * n, abs=1e-12)
            assert new.grad[i, t].item() == pytest.approx(-weight * a, abs=1e-12)
    assert (capped > 2) == (high == 0.28)


@pytest.mark.parametrize(
    ("ratio", "advantage", "settings", "slope"),
    [
        (1.25, 2.0, {"clip_range_high": 0.28}, -2.5),  # clip-higher lets it rise further
        (1.3, 2.0, {"clip_range_high": 0.28}, 0.0),
        (0.7, -2.0, {"clip_range_high": 0.28}, 0.0),
        (5.0, 2.0, {"clip_range": None}, -10.0),  # not clipped: A q
        (0.1, -2.0, {"clip_range": None}, 0.2),
        (2.9, -2.0, {"dual_clip": 3.0}, 5.8),
        (3.1, -2.0, {"dual_clip": 3.0}, 0.0),  # without the dual clip 6.2
        (3.1, 2.0, {"dual_clip": 3.0, "clip_range": None}, -6.2),
    ],
)
def test_the_gradient_is_cut_where_the_settings_say(ratio, advantage, settings, slope):
    logprob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    ppo_policy_loss(logprob, zero, zero + advantage, **settings).sum().backward()
    assert logprob.grad.item() == pytest.approx(slope, abs=1e-12)


def test_on_the_first_minibatch_every_loss_has_the_gradient_of_the_policy_gradient():
    """-A on each token; GSPO spreads a response's sum evenly, so with one advantage a response it is the same."""
    new, _, advantages = example()
    advantages = advantages[:, :1].expand(4, 5)
    for name, loss in POLICY_LOSSES.items():
        leaf = new.clone().requires_grad_()
        torch.where(MASK, loss(leaf, new, advantages, MASK), 0).sum().backward()
        torch.testing.assert_close(leaf.grad, torch.where(MASK, -advantages, 0), **EXACT, msg=name)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_gradcheck_and_dtypes_and_refusals(name):
    loss = POLICY_LOSSES[name]
    new, old, advantages = example()
    if name != "cispo":  # whose ratio has no gradient, by definition
        wide = {"clip_range": 0.21, "clip_range_high": 0.33}
        assert torch.autograd.gradcheck(lambda x: loss(x, old, advantages, MASK, **wide), new.requires_grad_())
    for dtype in (torch.float16, torch.bfloat16):
        halves = [each.detach().to(dtype) for each in (new, old, advantages)]
        wide = loss(*(each.float() for each in halves), MASK)
        assert loss(*halves, MASK).dtype == torch.float32
        torch.testing.assert_close(loss(*halves, MASK), wide, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"has the shape \[4, 1\]"):
        loss(new, old, advantages[:, :1], MASK)
    with pytest.raises(ValueError, match=r"has the shape \[4, 1\]"):
        loss(new, old[:, :1], advantages, MASK)
    for key in ("clip_range", "clip_range_high", "dual_clip"):
        if key in loss.parameters:
            with pytest.raises(ValueError, match=f"^{key} is"):
                loss(new, old, advantages, MASK, **{key: -0.1})


def test_a_ratio_of_a_response_is_finite_at_any_log_ratio_and_does_not_see_padding():
    new, old, _ = example()
    other = torch.where(MASK, new, 7e4)
    torch.testing.assert_close(response_ratio(other, old, MASK), response_ratio(new, old, MASK), rtol=0, atol=0)
    assert response_ratio(new + 1e6, old, MASK).max() == math.exp(20)
    assert response_ratio(new, old, MASK & False).unique().tolist() == [1.0]


# ---- from tokens to a step ---------------------------------------------------------------------------------


def test_the_three_means_of_a_step_equal_their_definitions():
    losses = example()[0]
    rows = [losses[i, :length].tolist() for i, length in enumerate(LENGTHS)]
    expected = {
        "token": sum(map(sum, rows)) / sum(LENGTHS),
        "response": sum(sum(row) / len(row) for row in rows) / len(rows),
        "constant": sum(sum(row) / 9 for row in rows) / len(rows),
    }
    for name, number in expected.items():
        weights = token_weights(MASK, aggregation=name, max_new_tokens=9)
        whole = (weights.double() * losses).sum() / step_size(MASK, aggregation=name)
        assert whole.item() == pytest.approx(number, abs=1e-7), name  # weights are float32
        assert weights[~MASK].abs().sum() == 0


@pytest.mark.parametrize("aggregation", ["token", "response", "constant"])
def test_responses_that_are_left_out_leave_the_mean(aggregation):
    learned = MASK & torch.tensor([[True], [False], [True], [False]])
    few = MASK[[0, 2]]
    assert step_size(learned, aggregation=aggregation) == step_size(few, aggregation=aggregation)
    weights = token_weights(learned, aggregation=aggregation, max_new_tokens=9)
    assert torch.equal(weights[[0, 2]], token_weights(few, aggregation=aggregation, max_new_tokens=9))
    assert weights[[1, 3]].abs().sum() == 0
    assert step_size(learned & False, aggregation=aggregation) == 0


def test_another_aggregation_or_a_float_mask_is_refused():
    with pytest.raises(ValueError, match="aggregation is 'mean'"):
        token_weights(MASK, aggregation="mean", max_new_tokens=9)
    with pytest.raises(ValueError, match="mask has the dtype"):
        token_weights(MASK.float(), aggregation="token", max_new_tokens=9)


# ---- TRL ---------------------------------------------------------------------------------------------------

AGGREGATIONS = {"grpo": "response", "dapo": "token", "bnpo": "token", "dr_grpo": "constant", "cispo": "token"}


def own_loss(case, logprobs):
    """The loss of a step as our functions make it from TRL's settings."""
    old, reference, weights = (
        torch.tensor(TRL[name], dtype=torch.float64)
        for name in ("old_logprobs", "reference_logprobs", "importance_weights")
    )
    mask = torch.arange(old.shape[1]) < torch.tensor(TRL["lengths"])[:, None]
    advantages = torch.tensor(TRL["advantages"], dtype=torch.float64)[:, None].expand(old.shape)
    if case["correct"]:
        advantages = advantages * weights
    if case["loss_type"] == "cispo":
        losses = cispo_loss(logprobs, old, advantages, clip_range_high=case["epsilon_high"] - 1)
    else:
        settings = {"clip_range": case["epsilon"], "clip_range_high": case["epsilon_high"], "dual_clip": case["delta"]}
        sequence = case["importance_sampling_level"] == "sequence"
        function, rows = (gspo_loss, (mask,)) if sequence else (ppo_policy_loss, ())
        losses = function(logprobs, old, advantages, *rows, **settings)
    losses = losses + case["beta"] * kl_estimate(logprobs, reference, estimator="k3")
    aggregation = AGGREGATIONS[case["loss_type"]]
    by_token = token_weights(mask, aggregation=aggregation, max_new_tokens=TRL["max_completion_length"]).double()
    return (by_token * losses).sum() / step_size(mask, aggregation=aggregation)


@pytest.mark.parametrize(
    "case", TRL["cases"], ids=lambda case: f"{case['loss_type']}-{case['importance_sampling_level']}-{case['beta']}"
)
def test_loss_and_gradient_equal_those_of_trl(case):
    logprobs = torch.tensor(TRL["logprobs"], dtype=torch.float64, requires_grad=True)
    loss = own_loss(case, logprobs)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-7)
    theirs = torch.tensor(case["gradient"], dtype=torch.float64).view_as(logprobs)
    assert theirs.abs().max() > 1e-2
    torch.testing.assert_close(logprobs.grad, theirs, rtol=0, atol=1e-7)
