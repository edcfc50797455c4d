"""KL estimates, the exact KL and the adaptive coefficient, against plain Python; in float64 unless said."""

import math

import pytest
import torch

from rlhf_lightning.functional import AdaptiveKLController, exact_kl, kl_estimate

EXACT = {"rtol": 0, "atol": 1e-12}
TWINS = {
    "k1": (lambda d: d, lambda d: 1.0),
    "k2": (lambda d: d**2 / 2, lambda d: d),
    "k3": (lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
}
every_estimator = pytest.mark.parametrize("estimator", TWINS)


def token_logprobs() -> tuple[torch.Tensor, torch.Tensor]:
    policy, reference = -3 * torch.rand(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return policy, reference


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    policy, reference = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return policy, reference


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


# ---- estimates per token -----------------------------------------------------------------------------------


@every_estimator
def test_the_estimate_and_its_gradient_equal_the_definition(estimator):
    policy, reference = (each.requires_grad_() for each in token_logprobs())
    value, slope = TWINS[estimator]
    estimate = kl_estimate(policy, reference, estimator=estimator)
    estimate.sum().backward()
    differences = [p - r for p, r in zip(policy.flatten().tolist(), reference.flatten().tolist(), strict=True)]
    slopes = torch.tensor([slope(d) for d in differences], dtype=torch.float64)
    expected = torch.tensor([value(d) for d in differences], dtype=torch.float64)
    torch.testing.assert_close(estimate.detach().flatten(), expected, **EXACT)
    torch.testing.assert_close(policy.grad.flatten(), slopes, **EXACT)
    torch.testing.assert_close(reference.grad.flatten(), -slopes, **EXACT)


@every_estimator
def test_gradcheck(estimator):
    leaves = [each.requires_grad_() for each in token_logprobs()]
    assert torch.autograd.gradcheck(lambda p, r: kl_estimate(p, r, estimator=estimator), leaves)


def test_k1_is_the_default():
    policy, reference = token_logprobs()
    torch.testing.assert_close(kl_estimate(policy, reference), policy - reference, **EXACT)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_expectation_under_the_policy_is_the_exact_kl(estimator):
    policy, reference = (each.log_softmax(dim=-1) for each in logits())
    expectation = (policy.exp() * kl_estimate(policy, reference, estimator=estimator)).sum(dim=-1)
    torch.testing.assert_close(expectation, exact_kl(policy, reference), **EXACT)


@every_estimator
def test_equal_models_are_zero_apart(estimator):
    policy, _ = token_logprobs()
    assert (kl_estimate(policy, policy, estimator=estimator) == 0).all()


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e-2, 1.0, 10.0, 1e4])
def test_k3_is_never_negative_in_float32(scale):
    difference = scale * torch.randn(10_000, generator=torch.Generator().manual_seed(2))
    assert (kl_estimate(difference, torch.zeros_like(difference), estimator="k3") >= 0).all()


def test_k3_keeps_its_digits_near_zero_in_float32():
    difference = torch.tensor([1e-3, -1e-3, 1e-4], requires_grad=True)
    k3 = kl_estimate(difference, torch.zeros(3), estimator="k3")
    k3.sum().backward()
    # exp(-d) - 1 + d as written would give 4.77e-7 and 0 for the first and the last
    torch.testing.assert_close(k3, torch.tensor([4.998e-7, 5.002e-7, 5.0e-9]), rtol=1e-3, atol=0)
    torch.testing.assert_close(difference.grad, -torch.expm1(-difference), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("estimator", "difference", "value", "slope"),
    [
        ("k1", 1e4, 1e4, 1),
        ("k1", -1e4, -1e4, 1),
        ("k2", 1e4, 5e7, 1e4),
        ("k2", -1e4, 5e7, -1e4),
        ("k3", 1e4, 1e4 - 1, 1),
        ("k3", -19.0, math.exp(19) - 20, 1 - math.exp(19)),
        ("k3", -1e4, math.exp(20) * (1 + 1e4 - 20) - 1 - 1e4, 1 - math.exp(20)),  # the tangent at -20
    ],
)
def test_the_estimate_is_finite_and_pulls_the_right_way_far_apart(dtype, estimator, difference, value, slope):
    policy = torch.tensor([difference], dtype=dtype, requires_grad=True)
    estimate = kl_estimate(policy, torch.zeros_like(policy), estimator=estimator)
    estimate.backward()
    assert estimate.item() == pytest.approx(value, rel=1e-6)
    assert policy.grad.item() == pytest.approx(slope, rel=1e-6)


@every_estimator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logprobs_are_compared_in_float32(estimator, dtype):
    policy, reference = (each.to(dtype) for each in token_logprobs())
    estimate = kl_estimate(policy, reference, estimator=estimator)
    wide = kl_estimate(policy.float(), reference.float(), estimator=estimator)
    torch.testing.assert_close(estimate, wide, rtol=0, atol=0)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="estimator is 'k4', but it must be 'k1', 'k2' or 'k3'"):
        kl_estimate(torch.zeros(2), torch.zeros(2), estimator="k4")


@pytest.mark.parametrize("function", [kl_estimate, exact_kl])
def test_another_shape_is_refused(function):
    with pytest.raises(ValueError, match=r"has the shape \[4, 1\] but .* has \[4\]"):
        function(torch.zeros(4), torch.zeros(4, 1))


@pytest.mark.parametrize(("function", "make"), [(kl_estimate, token_logprobs), (exact_kl, logits)])
def test_the_inputs_are_left_alone(function, make):
    arguments = make()
    function(*arguments)
    for before, after in zip(make(), arguments, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


# ---- the exact KL ------------------------------------------------------------------------------------------


def test_the_exact_kl_equals_a_loop_over_the_vocabulary():
    policy, reference = logits()
    expected = []
    for policy_row, reference_row in zip(policy.tolist(), reference.tolist(), strict=True):
        pairs = zip(softmax(policy_row), softmax(reference_row), strict=True)
        expected.append(sum(p * math.log(p / q) for p, q in pairs))
    torch.testing.assert_close(exact_kl(policy, reference), torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_the_exact_kl_of_a_certain_from_a_fair_coin_is_ln_2():
    certain, fair = (
        torch.tensor([[0.0, -math.inf]], dtype=torch.float64),
        torch.zeros(1, 2, dtype=torch.float64),
    )
    certain.requires_grad_()
    kl = exact_kl(certain, fair)
    kl.backward()
    assert kl.item() == pytest.approx(math.log(2), abs=1e-15)
    assert certain.grad.isfinite().all()


def test_the_exact_kl_ignores_tokens_that_neither_model_can_produce():
    policy, reference = logits()
    barred = torch.full((3, 1), -math.inf, dtype=torch.float64)
    wider = exact_kl(torch.cat([policy, barred], dim=1), torch.cat([reference, barred], dim=1))
    torch.testing.assert_close(wider, exact_kl(policy, reference), **EXACT)


def test_the_exact_kl_passes_gradcheck():
    assert torch.autograd.gradcheck(exact_kl, [each.requires_grad_() for each in logits()])


def test_the_exact_kl_is_finite_at_logits_of_ten_thousand():
    policy = torch.tensor([[1e4, -1e4]], requires_grad=True)
    kl = exact_kl(policy, -policy.detach())
    kl.backward()
    assert kl.item() == 2e4
    assert policy.grad.tolist() == [[0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_in_float32(dtype):
    policy, reference = (each.to(dtype) for each in logits())
    kl = exact_kl(policy, reference)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, exact_kl(policy.float(), reference.float()), rtol=0, atol=0)


# ---- the adaptive coefficient ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 0.0064),
        (5.4, 1 - 0.1 * 0.0064),
        (12.0, 1 + 0.2 * 0.0064),  # the error of 1 is clipped to 0.2
        (-3.0, 1 - 0.2 * 0.0064),
    ],
)
def test_the_coefficient_moves_by_the_clipped_relative_error(kl, factor):
    controller = AdaptiveKLController(0.2, target=6.0, horizon=10_000)
    assert controller.value == 0.2
    controller.update(kl, episodes=64)
    assert controller.value == pytest.approx(0.2 * factor, abs=1e-15)


def test_the_coefficient_steers_a_kl_that_answers_to_it_to_the_target():
    controller = AdaptiveKLController(1.0, target=6.0, horizon=1000)
    for _ in range(2000):
        controller.update(3 / controller.value, episodes=64)
    assert controller.value == pytest.approx(0.5, rel=1e-3)


def test_the_coefficient_stays_positive_under_any_kl():
    controller = AdaptiveKLController(0.2, target=6.0, horizon=100)
    for _ in range(50):
        controller.update(-1e9, episodes=499)
        assert controller.value > 0


def test_a_tensor_is_taken_as_kl_and_not_kept():
    controller = AdaptiveKLController(0.2, target=6.0, horizon=10_000)
    controller.update(torch.tensor(12.0, requires_grad=True).detach(), episodes=64)
    assert type(controller.value) is float


def test_a_restored_controller_goes_on_where_the_saved_one_stopped():
    saved = AdaptiveKLController(0.2, target=6.0, horizon=10_000)
    saved.update(9.0, episodes=512)
    restored = AdaptiveKLController(0.1, target=6.0, horizon=10_000)
    restored.load_state_dict(saved.state_dict())
    assert restored.value == saved.value
    for controller in (saved, restored):
        controller.update(3.0, episodes=512)
    assert restored.value == saved.value


@pytest.mark.parametrize("name", ["initial", "target", "horizon"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_setting_that_is_not_positive_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        AdaptiveKLController(**{"initial": 0.2, "target": 6.0, "horizon": 100, name: value})


@pytest.mark.parametrize(
    ("kl", "episodes", "message"),
    [
        (math.nan, 64, "kl is nan"),
        (math.inf, 64, "kl is inf"),
        (6.0, 0, "episodes is 0"),
        (6.0, 500, "horizon above a fifth"),
    ],
)
def test_an_update_that_would_spoil_the_coefficient_is_refused_and_changes_nothing(kl, episodes, message):
    controller = AdaptiveKLController(0.2, target=6.0, horizon=100)
    with pytest.raises(ValueError, match=message):
        controller.update(kl, episodes)
    assert controller.value == 0.2


def test_a_saved_coefficient_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="value is -1"):
        AdaptiveKLController(0.2, target=6.0, horizon=100).load_state_dict({"value": -1.0})
