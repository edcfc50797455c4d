"""The losses against twins in plain Python floats, written from the papers, and closed-form gradients.

A twin knows nothing of torch: floats in, floats out. Everything in float64 and to 1e-12 unless said.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from rlhf_lightning.functional import (
    PREFERENCE_LOSSES,
    bradley_terry_loss,
    dpo_loss,
    dpop_loss,
    ipo_loss,
    orpo_loss,
    ppo_policy_loss,
    ppo_value_loss,
    r_dpo_loss,
    simpo_loss,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}
IDENTICAL = {"rtol": 0, "atol": 0}
B = 0.3  # beta
E = 0.1  # label smoothing
LN2 = math.log(2)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def nll(x: float) -> float:
    """-log sigmoid(x)"""
    return max(-x, 0) + math.log1p(math.exp(-abs(x)))


def log_odds(logprob: float) -> float:
    return logprob - math.log1p(-math.exp(logprob))


def bell(x: float) -> float:
    """The derivative of the sigmoid."""
    return sigmoid(x) * sigmoid(-x)


@dataclass
class Twin:
    """A loss of c and r: the log-ratios (or average log-probs) of the chosen and the rejected response."""

    value: Callable[[float, float], float]
    gradient: Callable[[float, float], tuple[float, float]]
    at_start: float  # where policy = reference; for the reference-free where both average log-probs are -1
    options: dict = field(default_factory=dict)


def of_difference(value, slope, at_start, **options):
    """A loss that knows the pair by x = beta (c - r) alone; `slope` is its derivative by x."""

    def gradient(c, r):
        return B * slope(B * (c - r)), -B * slope(B * (c - r))

    return Twin(lambda c, r: value(B * (c - r)), gradient, at_start, options)


def smoothed(x: float) -> float:
    return (1 - E) * nll(x) + E * nll(-x)


def smoothed_slope(x: float) -> float:
    return -(1 - E) * sigmoid(-x) + E * sigmoid(x)


def exo(x: float) -> float:
    p, q = sigmoid(x), sigmoid(-x)
    return p * (-nll(x) - math.log(0.95)) + q * (-nll(-x) - math.log(0.05))


def dpop_argument(c: float, r: float) -> float:
    return B * (c - r - 2 * max(0, -c))


def orpo_gradient(c: float, r: float) -> tuple[float, float]:
    push = B * sigmoid(log_odds(r) - log_odds(c))
    return -1 - push / -math.expm1(c), push / -math.expm1(r)


TWINS = {
    "sigmoid": of_difference(nll, lambda x: -sigmoid(-x), LN2),
    "sigmoid, smoothed": of_difference(smoothed, smoothed_slope, LN2, label_smoothing=E),
    "sigmoid_norm": of_difference(nll, lambda x: -sigmoid(-x), LN2),
    "sigmoid_norm, smoothed": of_difference(smoothed, smoothed_slope, LN2, label_smoothing=E),
    "robust": of_difference(
        lambda x: ((1 - E) * nll(x) - E * nll(-x)) / (1 - 2 * E),
        lambda x: (-(1 - E) * sigmoid(-x) - E * sigmoid(x)) / (1 - 2 * E),
        LN2,
        label_smoothing=E,
    ),
    "ipo": of_difference(lambda x: (x / B - 1 / (2 * B)) ** 2, lambda x: 2 * (x / B - 1 / (2 * B)) / B, 1 / (4 * B**2)),
    "hinge": of_difference(lambda x: max(0, 1 - x), lambda x: -1 if x < 1 else 0, 1),
    "exo_pair": of_difference(
        exo,
        lambda x: bell(x) * (x - math.log(0.95 / 0.05)),
        0.5 * math.log(0.5 / 0.95) + 0.5 * math.log(0.5 / 0.05),
        label_smoothing=0.05,
    ),
    "simpo": of_difference(lambda x: nll(x - 0.7), lambda x: -sigmoid(0.7 - x), nll(-0.7), gamma=0.7),
    "simpo, smoothed": of_difference(
        lambda x: smoothed(x - 0.7),
        lambda x: smoothed_slope(x - 0.7),
        (1 - E) * nll(-0.7) + E * nll(0.7),
        gamma=0.7,
        label_smoothing=E,
    ),
    "r_dpo": of_difference(
        lambda x: nll(x + 0.05 * 3),
        lambda x: -sigmoid(-x - 0.05 * 3),
        nll(0.15),
        alpha=0.05,
        chosen_lengths=7,
        rejected_lengths=4,
    ),
    "orpo": Twin(
        lambda c, r: -c + B * nll(log_odds(c) - log_odds(r)),
        orpo_gradient,
        1 + B * LN2,
    ),
    "apo_zero": Twin(
        lambda c, r: 1 - sigmoid(B * c) + sigmoid(B * r),
        lambda c, r: (-B * bell(B * c), B * bell(B * r)),
        1,
    ),
    "apo_down": Twin(
        lambda c, r: sigmoid(B * c) + 1 - sigmoid(B * (c - r)),
        lambda c, r: (B * bell(B * c) - B * bell(B * (c - r)), B * bell(B * (c - r))),
        1,
    ),
    "nca_pair": Twin(
        lambda c, r: nll(B * c) + 0.5 * nll(-B * c) + 0.5 * nll(-B * r),
        lambda c, r: (B * (-sigmoid(-B * c) + 0.5 * sigmoid(B * c)), 0.5 * B * sigmoid(B * r)),
        2 * LN2,
    ),
    "bco_pair": Twin(
        lambda c, r: nll(B * c) + nll(-B * r),
        lambda c, r: (-B * sigmoid(-B * c), B * sigmoid(B * r)),
        2 * LN2,
    ),
    "sppo_hard": Twin(
        lambda c, r: (c - 1 / (2 * B)) ** 2 + (r + 1 / (2 * B)) ** 2,
        lambda c, r: (2 * (c - 1 / (2 * B)), 2 * (r + 1 / (2 * B))),
        1 / (2 * B**2),
    ),
    "dpop": Twin(
        lambda c, r: nll(dpop_argument(c, r)),
        lambda c, r: (
            -sigmoid(-dpop_argument(c, r)) * B * (3 if c < 0 else 1),
            sigmoid(-dpop_argument(c, r)) * B,
        ),
        LN2,
        {"dpop_lambda": 2},
    ),
}

every_twin = pytest.mark.parametrize("name", TWINS)
every_loss = pytest.mark.parametrize("name", PREFERENCE_LOSSES)


def yaml_name(name: str) -> str:
    return name.split(",")[0]


def takes_reference(name: str) -> bool:
    return PREFERENCE_LOSSES[yaml_name(name)].uses_reference


def call(name: str, *logprobs: Tensor, **changed) -> Tensor:
    """The loss with its twin's options. The reference-free get the policy's two log-probs alone."""
    options = {"beta": B} | TWINS[name].options | changed
    options |= {key: torch.full_like(logprobs[0], options[key]) for key in options if key.endswith("lengths")}
    arguments = logprobs if takes_reference(name) else logprobs[:2]
    return PREFERENCE_LOSSES[yaml_name(name)].function(*arguments, **options)


def example(name: str, pairs: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """policy chosen, policy rejected, reference chosen, reference rejected: all below 0, as log-probs are."""
    generator = torch.Generator().manual_seed(1)
    if takes_reference(name):
        reference = -20 + 3 * torch.randn(2, pairs, dtype=torch.float64, generator=generator)
        policy = reference + 2 * torch.randn(2, pairs, dtype=torch.float64, generator=generator)
        return [*policy.to(dtype), *reference.to(dtype)]
    return [*-3 * torch.rand(4, pairs, dtype=torch.float64, generator=generator).to(dtype)]


def twin_arguments(name: str, logprobs: list[Tensor]) -> list[tuple[float, float]]:
    chosen, rejected, reference_chosen, reference_rejected = (each.tolist() for each in logprobs)
    if not takes_reference(name):
        return list(zip(chosen, rejected, strict=True))
    return [
        (c - rc, r - rr) for c, r, rc, rr in zip(chosen, rejected, reference_chosen, reference_rejected, strict=True)
    ]


def gradients(name: str, logprobs: list[Tensor]) -> list[Tensor]:
    leaves = [each.clone().requires_grad_() for each in logprobs]
    call(name, *leaves).sum().backward()
    return [leaf.grad for leaf in leaves]


# ---- the preference losses ---------------------------------------------------------------------------------


def test_the_table_holds_the_fifteen_names_and_every_one_is_tested_here():
    names = "sigmoid robust ipo hinge sigmoid_norm simpo orpo apo_zero apo_down exo_pair nca_pair bco_pair"
    assert set(PREFERENCE_LOSSES) == {*names.split(), "sppo_hard", "dpop", "r_dpo"}
    assert {yaml_name(name) for name in TWINS} == set(PREFERENCE_LOSSES)


@every_loss
def test_the_table_tells_a_trainer_how_to_call_the_loss(name):
    loss = PREFERENCE_LOSSES[name]
    keywords = {key for key, parameter in loss.parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    assert loss.uses_reference is (name not in {"simpo", "orpo"})
    assert loss.uses_lengths is (name == "r_dpo")
    assert len(loss.parameters) - len(keywords) == (4 if loss.uses_reference else 2)
    assert "beta" in keywords


@every_loss
def test_the_table_and_the_docstrings_agree_on_summed_or_average_logprobs(name):
    loss = PREFERENCE_LOSSES[name]
    assert loss.average is (name in {"ipo", "sigmoid_norm", "simpo", "orpo"})
    said = "of average ones it is `sigmoid_norm`" if name == "sigmoid_norm" else "Average log-probs"
    assert (said if loss.average else "Summed log-probs") in loss.function.__doc__.replace("*", "")


@every_twin
def test_the_loss_equals_its_definition(name):
    logprobs = example(name)
    expected = [TWINS[name].value(c, r) for c, r in twin_arguments(name, logprobs)]
    torch.testing.assert_close(call(name, *logprobs), torch.tensor(expected, dtype=torch.float64), **EXACT)


@every_twin
def test_the_gradient_equals_its_closed_form(name):
    logprobs = example(name)
    found = gradients(name, logprobs)
    closed = [TWINS[name].gradient(c, r) for c, r in twin_arguments(name, logprobs)]
    expected = torch.tensor(closed, dtype=torch.float64).T
    torch.testing.assert_close(torch.stack(found[:2]), expected, **EXACT)
    if takes_reference(name):
        torch.testing.assert_close(torch.stack(found[2:]), -expected, **EXACT)


@every_twin
def test_gradcheck(name):
    leaves = [each.requires_grad_() for each in example(name, pairs=3)]
    assert torch.autograd.gradcheck(lambda *logprobs: call(name, *logprobs), leaves)


@every_twin
def test_the_loss_of_a_policy_that_equals_its_reference(name):
    same = torch.full((3,), -1.0 if not takes_reference(name) else -42.0, dtype=torch.float64)
    torch.testing.assert_close(call(name, same, same, same, same), torch.full_like(same, TWINS[name].at_start), **EXACT)


FAR = [(1e4, -1e4), (-1e4, 1e4), (1e4, 0), (-1e4, 0), (0, 1e4), (0, -1e4), (1e4, 1e4), (-1e4, -1e4)]
FAR_BELOW_ZERO = [
    (-1e4, -1),
    (-1, -1e4),
    (-1e4, -1e4),
    (-100, -1e4),
    (-1e4, -100),
    (-1e-4, -1e4),
    (-1e4, -1e-4),
]


@every_twin
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_right_at_differences_of_ten_thousand(name, dtype):
    pairs = torch.tensor(FAR if takes_reference(name) else FAR_BELOW_ZERO, dtype=dtype)
    logprobs = [*pairs.T, *torch.zeros_like(pairs).T]
    arguments = twin_arguments(name, logprobs)
    value = torch.tensor([TWINS[name].value(c, r) for c, r in arguments], dtype=dtype)
    gradient = torch.tensor([TWINS[name].gradient(c, r) for c, r in arguments], dtype=dtype).T
    # float32: beta is rounded, and an average log-prob of -1e-4 leaves 1 - p with three digits less.
    close = EXACT if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(call(name, *logprobs), value, **close)
    torch.testing.assert_close(torch.stack(gradients(name, logprobs)[:2]), gradient, **close)


SYMMETRIC = ["sigmoid", "sigmoid, smoothed", "sigmoid_norm", "robust", "ipo", "hinge", "exo_pair"]


@pytest.mark.parametrize("name", SYMMETRIC)
def test_swapping_chosen_and_rejected_gives_the_loss_of_the_negated_difference(name):
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = example(name)
    swapped = call(name, policy_rejected, policy_chosen, reference_rejected, reference_chosen)
    difference = policy_chosen - policy_rejected - reference_chosen + reference_rejected
    zero = torch.zeros_like(difference)
    torch.testing.assert_close(swapped, call(name, -difference, zero, zero, zero), **EXACT)
    assert not torch.allclose(swapped, call(name, difference, zero, zero, zero), atol=1e-3)


@every_twin
def test_a_pair_does_not_see_the_other_pairs(name):
    logprobs = example(name)
    alone = [call(name, *(each[pair : pair + 1] for each in logprobs)) for pair in range(6)]
    torch.testing.assert_close(call(name, *logprobs), torch.cat(alone), **EXACT)


@every_loss
def test_no_pairs_give_no_losses(name):
    assert call(name, *torch.zeros(4, 0)).shape == (0,)


@every_twin
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    halves = example(name, dtype=dtype)
    # Far from the reference: close numbers are subtracted without error in half precision, too.
    halves[:2] = 3 * halves[0], 3 * halves[1]
    loss = call(name, *halves)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, call(name, *(each.float() for each in halves)), **IDENTICAL)


@every_twin
def test_no_argument_is_changed_in_place(name):
    logprobs = example(name)
    call(name, *logprobs)
    for before, after in zip(example(name), logprobs, strict=True):
        torch.testing.assert_close(after, before, **IDENTICAL)


@every_loss
def test_a_column_against_a_row_is_refused_wherever_it_stands(name):
    logprobs = example(name, pairs=4)
    for position in range(1, 4 if takes_reference(name) else 2):
        wrong = [each[:, None] if index == position else each for index, each in enumerate(logprobs)]
        with pytest.raises(ValueError, match=r"has the shape \[4, 1\] but policy_chosen has \[4\]"):
            call(name, *wrong)


@every_loss
@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_a_beta_that_is_not_positive_is_refused(name, beta):
    with pytest.raises(ValueError, match=r"^beta is .*, but it must be a finite number above 0$"):
        call(name, *example(name), beta=beta)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "robust", "exo_pair", "simpo"])
@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, 1.0, math.nan])
def test_a_label_smoothing_that_leaves_no_preference_is_refused(name, label_smoothing):
    with pytest.raises(ValueError, match="label_smoothing is"):
        call(name, *example(name), label_smoothing=label_smoothing)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("exo_pair", "label_smoothing", 0.0),
        ("simpo", "gamma", -0.1),
        ("dpop", "dpop_lambda", -1.0),
        ("r_dpo", "alpha", -0.1),
    ],
)
def test_an_impossible_option_is_refused_by_name(name, option, value):
    with pytest.raises(ValueError, match=rf"^{option} is {value}, but it must be a finite number"):
        call(name, *example(name), **{option: value})


def test_the_smoothed_loss_is_the_mean_over_right_and_flipped_labels():
    logprobs = example("sigmoid")
    flipped = [logprobs[index] for index in (1, 0, 3, 2)]
    expected = (1 - E) * call("sigmoid", *logprobs) + E * call("sigmoid", *flipped)
    torch.testing.assert_close(call("sigmoid, smoothed", *logprobs), expected, **EXACT)


def test_the_robust_loss_is_unbiased_under_flipped_labels():
    logprobs = example("robust")
    flipped = [logprobs[index] for index in (1, 0, 3, 2)]
    expectation = (1 - E) * call("robust", *logprobs) + E * call("robust", *flipped)
    torch.testing.assert_close(expectation, call("sigmoid", *logprobs), **EXACT)


def test_the_exo_loss_is_least_where_the_policy_is_as_sure_as_the_label():
    target = torch.tensor([math.log(0.95 / 0.05) / B], dtype=torch.float64)
    zero = torch.zeros_like(target)
    torch.testing.assert_close(call("exo_pair", target, zero, zero, zero), zero, **EXACT)


def test_dpop_is_dpo_until_the_chosen_response_falls_below_the_reference():
    rejected, zero = torch.tensor([-3.0, -3.0]), torch.zeros(2)
    chosen = torch.tensor([2.0, -2.0])
    dpo = dpo_loss(chosen, rejected, zero, zero, beta=B)
    dpop = dpop_loss(chosen, rejected, zero, zero, beta=B, dpop_lambda=5.0)
    assert dpop[0] == dpo[0]
    assert dpop[1] > dpo[1]


def test_r_dpo_gives_more_weight_to_a_pair_whose_chosen_response_is_shorter():
    chosen = torch.zeros(3, requires_grad=True)
    lengths = {"chosen_lengths": torch.tensor([5, 10, 20]), "rejected_lengths": torch.tensor([20, 10, 5])}
    zero = torch.zeros(3)
    r_dpo_loss(chosen, zero, zero, zero, beta=B, alpha=0.1, **lengths).sum().backward()
    shorter, equal, longer = (-chosen.grad).tolist()
    assert shorter > equal > longer
    assert equal == pytest.approx(B / 2)


@pytest.mark.parametrize("which", ["chosen_lengths", "rejected_lengths"])
def test_r_dpo_refuses_lengths_of_another_shape(which):
    lengths = {"chosen_lengths": torch.ones(4), "rejected_lengths": torch.ones(4)}
    lengths[which] = torch.ones(4, 1)
    with pytest.raises(ValueError, match=rf"{which} has the shape \[4, 1\] but policy_chosen has \[4\]"):
        r_dpo_loss(*example("r_dpo", pairs=4), beta=B, alpha=0.1, **lengths)


def test_ipo_is_least_at_an_average_margin_of_one_over_two_beta():
    chosen, zero = torch.tensor([1 / (2 * B)], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(ipo_loss(chosen, zero, zero, zero, beta=B), zero, **EXACT)


def test_simpo_without_a_margin_starts_at_ln_2():
    same = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    assert simpo_loss(same, same, beta=2.0, gamma=0.0).tolist() == pytest.approx([LN2, LN2], abs=1e-15)


def test_orpo_of_probabilities_two_thirds_and_one_third():
    # odds 2 and 1/2, so the odds ratio is 4 and its sigmoid 4/5
    chosen, rejected = torch.tensor([[2 / 3], [1 / 3]], dtype=torch.float64).log()
    expected = -math.log(2 / 3) - B * math.log(4 / 5)
    assert orpo_loss(chosen, rejected, beta=B).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_at_a_chosen_probability_of_one_has_the_limit_of_its_gradient(dtype):
    chosen, rejected = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (0.0, -1.0))
    loss = orpo_loss(chosen, rejected, beta=B)
    loss.backward()
    odds = math.exp(-1) / (1 - math.exp(-1))
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert chosen.grad.item() == pytest.approx(-1 - B * odds, rel=1e-6)
    assert rejected.grad.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen_value", [0.0, -1.0, -1e4])
def test_orpo_still_pushes_down_a_rejected_response_of_probability_one(dtype, chosen_value):
    chosen, rejected = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (chosen_value, 0.0))
    loss = orpo_loss(chosen, rejected, beta=B)
    loss.backward()
    assert loss.isfinite()
    assert 1 < rejected.grad.item() < math.inf
    assert -math.inf < chosen.grad.item() <= -1


@pytest.mark.parametrize("position", [0, 1])
def test_orpo_refuses_what_cannot_be_a_log_probability(position):
    logprobs = [torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0])]
    logprobs[position] = torch.tensor([-1.0, 0.5])
    with pytest.raises(ValueError, match=r"holds 0\.5, but a log-probability is at most 0"):
        orpo_loss(*logprobs, beta=B)


# ---- the reward model --------------------------------------------------------------------------------------


def scores(rows: int = 3) -> list[Tensor]:
    return [*torch.randn(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))]


def test_bradley_terry_equals_its_definition_with_margin_smoothing_and_centering():
    chosen, rejected, margin = scores()
    loss = bradley_terry_loss(chosen, rejected, margin=margin, label_smoothing=E, centering=0.01)
    expected = [
        smoothed(c - r - m) + 0.01 * (c + r) ** 2
        for c, r, m in zip(chosen.tolist(), rejected.tolist(), margin.tolist(), strict=True)
    ]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_bradley_terry_defaults_are_the_plain_likelihood():
    chosen, rejected, _ = scores()
    expected = [nll(c - r) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    torch.testing.assert_close(
        bradley_terry_loss(chosen, rejected), torch.tensor(expected, dtype=torch.float64), **EXACT
    )
    assert bradley_terry_loss(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(LN2, abs=1e-7)


def test_the_gradient_of_bradley_terry_equals_its_closed_form():
    chosen, rejected, margin = (each.requires_grad_() for each in scores())
    bradley_terry_loss(chosen, rejected, margin=margin, label_smoothing=E, centering=0.01).sum().backward()
    center = 0.02 * (chosen + rejected).detach()
    slope = torch.tensor([smoothed_slope(x) for x in (chosen - rejected - margin).tolist()], dtype=torch.float64)
    torch.testing.assert_close(chosen.grad, slope + center, **EXACT)
    torch.testing.assert_close(rejected.grad, -slope + center, **EXACT)
    torch.testing.assert_close(margin.grad, -slope, **EXACT)


def test_bradley_terry_passes_gradcheck():
    leaves = [each.requires_grad_() for each in scores()]
    assert torch.autograd.gradcheck(
        lambda c, r, m: bradley_terry_loss(c, r, margin=m, label_smoothing=E, centering=0.01), leaves
    )


@pytest.mark.parametrize("lead", [1e3, -1e3, 1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bradley_terry_is_right_at_great_differences(lead, dtype):
    chosen = torch.tensor([lead], dtype=dtype, requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros_like(chosen))
    loss.backward()
    assert loss.item() == max(-lead, 0)
    assert chosen.grad.item() == (0 if lead > 0 else -1)


def test_a_constant_added_to_all_scores_changes_the_centering_term_alone():
    chosen, rejected, _ = scores()
    torch.testing.assert_close(
        bradley_terry_loss(chosen + 100, rejected + 100), bradley_terry_loss(chosen, rejected), **EXACT
    )
    offsets = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    bradley_terry_loss(chosen + offsets, rejected + offsets, centering=0.25).sum().backward()
    # 0.25 * 4 * the sum; half a step down it brings the mean score of every pair to 0, the least of the term.
    torch.testing.assert_close(offsets.grad, chosen + rejected, **EXACT)


def test_swapping_the_scores_negates_the_difference():
    chosen, rejected, _ = scores()
    swapped = bradley_terry_loss(rejected, chosen)
    torch.testing.assert_close(swapped, bradley_terry_loss(-chosen, -rejected), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_compared_in_float32(dtype):
    halves = [each.to(dtype) for each in scores()]
    loss = bradley_terry_loss(*halves[:2], margin=halves[2], centering=0.01)
    wide = bradley_terry_loss(halves[0].float(), halves[1].float(), margin=halves[2].float(), centering=0.01)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wide, **IDENTICAL)


@pytest.mark.parametrize("wrong", ["rejected", "margin"])
def test_bradley_terry_refuses_a_column_against_a_row(wrong):
    arguments = dict.fromkeys(["chosen", "rejected", "margin"], torch.zeros(4)) | {wrong: torch.zeros(4, 1)}
    with pytest.raises(ValueError, match=rf"{wrong} has the shape \[4, 1\] but chosen has \[4\]"):
        bradley_terry_loss(**arguments)


@pytest.mark.parametrize(
    "option",
    [{"label_smoothing": 0.5}, {"label_smoothing": -0.1}, {"centering": -1.0}, {"centering": math.inf}],
)
def test_bradley_terry_refuses_impossible_options(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"^{name} is"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2), **option)


def test_bradley_terry_leaves_its_inputs_alone():
    chosen, rejected, margin = scores()
    bradley_terry_loss(chosen, rejected, margin=margin, label_smoothing=E, centering=0.01)
    for before, after in zip(scores(), (chosen, rejected, margin), strict=True):
        torch.testing.assert_close(after, before, **IDENTICAL)


# ---- PPO ---------------------------------------------------------------------------------------------------


def policy_example() -> list[Tensor]:
    """New and old log-probs with ratios on both sides of the clip range, and advantages of both signs."""
    generator = torch.Generator().manual_seed(3)
    old = -3 * torch.rand(4, 6, dtype=torch.float64, generator=generator)
    new = old + 0.4 * torch.randn(4, 6, dtype=torch.float64, generator=generator)
    return [new, old, torch.randn(4, 6, dtype=torch.float64, generator=generator)]


def value_example() -> list[Tensor]:
    return [*torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))]


def test_the_policy_loss_equals_a_loop():
    new, old, advantages = policy_example()
    expected = torch.empty_like(new)
    clipped = 0
    for index in range(new.numel()):
        n, o, a = (each.flatten()[index].item() for each in (new, old, advantages))
        ratio = math.exp(n - o)
        bounded = min(max(ratio, 0.8), 1.2)
        clipped += bounded != ratio
        expected.view(-1)[index] = -min(a * ratio, a * bounded)
    assert 4 < clipped < 20
    torch.testing.assert_close(ppo_policy_loss(new, old, advantages), expected, **EXACT)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.2),
        (1.3, 2.0, 0.0),
        (0.7, 2.0, -1.4),
        (0.7, -2.0, 0.0),
        (1.3, -2.0, 2.6),
        (0.9, -2.0, 1.8),
        (1.3, 0.0, 0.0),
    ],
)
def test_the_policy_gradient_is_cut_only_where_the_ratio_has_moved_far_enough(ratio, advantage, slope):
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    ppo_policy_loss(logprob, zero, zero + advantage).backward()
    assert logprob.grad.item() == pytest.approx(slope, abs=1e-12)


def test_on_the_first_minibatch_the_policy_loss_is_minus_the_advantage_and_so_is_its_gradient():
    new, _, advantages = policy_example()
    new.requires_grad_()
    loss = ppo_policy_loss(new, new.detach(), advantages)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), -advantages, **EXACT)
    torch.testing.assert_close(new.grad, -advantages, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("difference", "advantage", "expected"),
    [(1e4, 1.0, -1.2), (-1e4, 1.0, -math.exp(-20)), (1e4, -1.0, math.exp(20)), (-1e4, -1.0, 0.8)],
)
def test_the_policy_loss_is_finite_at_any_log_ratio(dtype, difference, advantage, expected):
    logprob = torch.tensor([difference], dtype=dtype, requires_grad=True)
    loss = ppo_policy_loss(logprob, torch.zeros_like(logprob), torch.full_like(logprob, advantage))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert logprob.grad.item() == 0


def test_the_value_loss_equals_a_loop():
    values, old, returns = value_example()
    expected = torch.empty_like(values)
    for index in range(values.numel()):
        v, o, r = (each.flatten()[index].item() for each in (values, old, returns))
        bounded = min(max(v, o - 0.2), o + 0.2)
        expected.view(-1)[index] = 0.5 * max((v - r) ** 2, (bounded - r) ** 2)
    torch.testing.assert_close(ppo_value_loss(values, old, returns), expected, **EXACT)


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        (0.1, 1.0, 0.405, -0.9),  # inside the range
        (0.5, 1.0, 0.32, 0.0),  # moved towards the return and beyond the range: no further push
        (-0.5, 1.0, 1.125, -1.5),  # moved away: full push back
        (0.5, -1.0, 1.125, 1.5),
        (-0.5, -1.0, 0.32, 0.0),
    ],
)
def test_the_value_gradient_is_cut_only_where_the_value_has_moved_far_enough(value, target, loss, slope):
    zero = torch.zeros(1, dtype=torch.float64)
    leaf = (zero + value).requires_grad_()
    result = ppo_value_loss(leaf, zero, zero + target)
    result.backward()
    assert result.item() == pytest.approx(loss, abs=1e-12)
    assert leaf.grad.item() == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_value_loss_is_right_at_ten_thousand(dtype):
    values = torch.tensor([1e4, -1e4, 0.0], dtype=dtype, requires_grad=True)
    loss = ppo_value_loss(values, torch.zeros_like(values), torch.tensor([0.0, 0.0, 1e4], dtype=dtype))
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.full((3,), 5e7, dtype=dtype), rtol=1e-6, atol=0)
    torch.testing.assert_close(values.grad, torch.tensor([1e4, -1e4, -1e4], dtype=dtype), rtol=1e-6, atol=0)


PPO = [(ppo_policy_loss, policy_example), (ppo_value_loss, value_example)]


@pytest.mark.parametrize(("function", "make"), PPO)
class TestBothPpoLosses:
    def test_the_clip_range_is_used(self, function, make):
        assert not torch.allclose(function(*make()), function(*make(), clip_range=0.05))

    def test_gradcheck(self, function, make):
        new, old, target = make()
        assert torch.autograd.gradcheck(lambda x: function(x, old, target), new.requires_grad_())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, function, make, dtype):
        halves = [each.to(dtype) for each in make()]
        wide = function(*(each.float() for each in halves))
        torch.testing.assert_close(function(*halves), wide, **IDENTICAL)

    def test_one_loss_per_token(self, function, make):
        assert function(*make()).shape == (4, 6)

    @pytest.mark.parametrize("position", [1, 2])
    def test_another_shape_is_refused(self, function, make, position):
        arguments = make()
        arguments[position] = arguments[position][:, :1]
        with pytest.raises(ValueError, match=r"has the shape \[4, 1\] but .* has \[4, 6\]"):
            function(*arguments)

    @pytest.mark.parametrize("clip_range", [0.0, -0.2, math.nan])
    def test_a_clip_range_that_is_not_positive_is_refused(self, function, make, clip_range):
        with pytest.raises(ValueError, match=r"^clip_range is"):
            function(*make(), clip_range=clip_range)

    def test_the_inputs_are_left_alone(self, function, make):
        arguments = make()
        function(*arguments)
        for before, after in zip(make(), arguments, strict=True):
            torch.testing.assert_close(after, before, **IDENTICAL)
