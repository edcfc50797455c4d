"""Policy losses of a configuration: found by name, put together for a step, and what is learned from."""

from __future__ import annotations

import functools
import logging

import pytest
import torch

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.functional import ppo_policy_loss
from rlhf_lightning.functional.policy_losses import POLICY_LOSSES, PolicyLoss
from rlhf_lightning.models.generation import Sampled
from rlhf_lightning.training.policy_loss import StepLoss
from tests.training.test_ppo import build_ppo, fitted, rollout_lines, weights  # noqa: F401 (a fixture)
from tests.training.test_ppo_statements import Ending, rollout  # noqa: F401 (a fixture)

HERE = "tests.training.test_policy_loss"
SGD = functools.partial(torch.optim.SGD, lr=0.05)
GROUPS = {"advantage_estimator": "grpo", "num_generations": 3, "kl_coef": 0.1, "data": {"batch_size": 4, "limit": 12}}


def plain(logprobs, old_logprobs, advantages):
    return -advantages * (logprobs - old_logprobs).exp()


whole = PolicyLoss(POLICY_LOSSES["gspo"].function, whole_response=True)


def summed(logprobs, old_logprobs, advantages):
    return logprobs.sum(dim=1)


def still(logprobs, old_logprobs, advantages):
    return -advantages * old_logprobs


def other(logprobs):
    return logprobs


def few_letters(prompts, responses):
    """Some groups of equal rewards, some not."""
    return [float("e" in response) for response in responses]


def step_loss(name="ppo", **settings):
    return StepLoss(name, **{"aggregation": "token", "max_new_tokens": 8, "clip_range": 0.2} | settings)


def test_the_table_and_functions_of_the_users_own_are_found_by_name():
    for name, loss in POLICY_LOSSES.items():
        assert step_loss(name).loss is loss
    assert step_loss(f"{HERE}:whole", aggregation="response").loss is whole
    new, old, advantages = torch.randn(3, 4, 5, dtype=torch.float64)
    mask = torch.ones(4, 5, dtype=torch.bool)
    own = step_loss(f"{HERE}:plain")(new, old, advantages, mask)
    torch.testing.assert_close(own, step_loss(clip_range=None)(new, old, advantages, mask), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("ppoo", {}, "did you mean ppo"),
        ("nothing", {}, "use one of ppo, gspo, cispo"),
        (f"{HERE}:absent", {}, "cannot be imported"),
        (f"{HERE}:summed", {}, r"gives \[2\], not the loss of each token"),
        (f"{HERE}:still", {}, "without a gradient"),
        (f"{HERE}:other", {}, "refuses its settings"),
        (f"{HERE}:plain", {"clip_range_high": 0.3}, "model.clip_range_high: the loss .*plain takes none"),
        ("cispo", {"dual_clip": 3.0}, "model.dual_clip: the loss cispo takes none"),
        ("ppo", {"dual_clip": 1.0}, "dual_clip is 1.0, but it must be above 1"),
    ],
)
def test_what_is_no_policy_loss_is_refused(name, settings, words):
    with pytest.raises(ConfigurationError, match=words):
        step_loss(name, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "outside"),
    [
        ("ppo", {}, [True, True, False, False, True, True]),
        ("ppo", {"clip_range_high": 0.28}, [True, True, False, False, False, True]),
        ("ppo", {"clip_range": None}, [False] * 6),
        ("ppo", {"clip_range": None, "clip_range_high": 0.28}, [False] * 5 + [True]),
        ("cispo", {"clip_range_high": 0.28}, [False] * 5 + [True]),
    ],
)
def test_what_is_clipped_is_counted_by_the_range_of_the_loss(name, settings, outside):
    ratio = torch.tensor([[0.5, 0.79, 0.81, 1.19, 1.25, 1.3]])
    assert step_loss(name, **settings).outside(ratio).tolist() == [outside]


def test_gspo_with_the_range_or_the_mean_of_tokens_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        step_loss("gspo", clip_range=3e-4, clip_range_high=4e-4, aggregation="response")
        assert not caplog.records
        step_loss("gspo")
    assert [record.message.split(":")[0] for record in caplog.records] == ["model.clip_range", "model.loss_aggregation"]


# ---- a step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_aggregation": "response"},
        {"loss_aggregation": "constant", "mask_truncated_responses": True},
        {"loss_aggregation": "token", "mask_truncated_responses": True},
        {"policy_loss_type": "gspo", "loss_aggregation": "response", **GROUPS, "kl_coef": 0.0},
    ],
    ids=["response", "constant", "token", "gspo"],
)
def test_how_a_minibatch_is_divided_changes_no_weight(build_ppo, trainer, settings):  # noqa: F811
    def run(**division):
        made = build_ppo(optimizer=SGD, max_grad_norm=0.0, **{"max_new_tokens": 8} | settings | division)
        made[0].engine = Ending(made[0].engine)
        return fitted(trainer, made)

    one, curve, _ = run(micro_batch_size=12)
    many, other_curve, _ = run(micro_batch_size=1, generation_micro_batch_size=2)
    torch.testing.assert_close(weights(one), weights(many), rtol=0, atol=2e-6)
    for row, twin in zip(curve.curve, other_curve.curve, strict=True):
        assert row == pytest.approx(twin, abs=2e-4, rel=1e-5)
    if settings.get("mask_truncated_responses"):
        assert 0 < curve.rows[0]["left_out"] < 1


def test_a_step_is_the_mean_that_is_asked_for(rollout):  # noqa: F811
    """The sums that a step divides, response by response, from the definition."""
    made = {}
    for aggregation in ("token", "response", "constant"):
        module, experience, targets, _ = rollout(loss_aggregation=aggregation, vf_coef=0.0)
        everything = list(range(len(experience.responses.rows)))
        loss, _ = module._losses(experience, targets, everything, counts=True)
        size = module.policy_loss.size(targets.learned)
        lengths = experience.responses.lengths.tolist()
        assert len(set(lengths)) > 2
        rows = module.rollouts.padded(experience.responses)
        flat = module.policy(*rows.text).tokens[rows.response_mask]
        losses = torch.zeros(experience.tokens.mask.shape).masked_scatter(experience.tokens.mask, flat)
        losses = ppo_policy_loss(losses, experience.tokens.logprobs, targets.advantages)
        sums = [losses[i, :length].sum().item() for i, length in enumerate(lengths)]
        expected = {
            "token": sum(sums) / sum(lengths),
            "response": sum(each / length for each, length in zip(sums, lengths, strict=True)) / len(sums),
            "constant": sum(sums) / 8 / len(sums),
        }
        made[aggregation] = (loss / size).item()
        assert made[aggregation] == pytest.approx(expected[aggregation], abs=1e-5)
    assert len({round(each, 4) for each in made.values()}) == 3


def test_the_three_means_take_one_step_where_all_responses_are_of_full_length(build_ppo, trainer):  # noqa: F811
    made = []
    for aggregation in ("token", "response", "constant"):
        settings = {"loss_aggregation": aggregation, "num_ppo_epochs": 2, "max_grad_norm": 0.0}
        module, recorder, _ = fitted(trainer, build_ppo(optimizer=SGD, data={"limit": 6}, **settings))
        assert recorder.rows[0]["missing_eos"] == 1
        made.append((weights(module), recorder.rows[0]["value_loss"]))
    assert made[0][1] > 1e-3
    for other_weights, loss in made[1:]:
        torch.testing.assert_close(other_weights, made[0][0], rtol=0, atol=1e-6)
        assert loss == pytest.approx(made[0][1], rel=1e-5)


def test_two_processes_take_the_step_of_one(tmp_path):
    """Mean over responses, those without an end left out, rewards scaled by the batch of all processes."""
    settings = ["--model.advantage_estimator", "grpo", "--model.num_generations", "2", "--model.value_model", "null"]
    settings += ["--model.loss_aggregation", "response", "--model.scale_rewards", "batch"]
    settings += ["--model.mask_truncated_responses", "true", "--model.max_new_tokens", "40"]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = rollout_lines(tmp_path / "one", "ppo.yaml", *settings)
    assert len(one) == 4
    assert rollout_lines(tmp_path / "two", "ppo.yaml", *settings, "--trainer.strategy", "ddp", processes=2) == one


# ---- what is learned from ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_truncated_responses": True, "max_new_tokens": 2},
        {**GROUPS, "skip_equal_groups": True, "reward_model": "tests.training.test_ppo:constant"},
    ],
    ids=["truncated", "equal"],
)
def test_nothing_is_learned_from_responses_that_are_left_out(build_ppo, trainer, settings):  # noqa: F811
    made = build_ppo(optimizer=SGD, max_grad_norm=0.0, kl_loss_coef=0.0, **{"missing_eos_penalty": 0.0} | settings)
    made[0].configure_model()
    before = weights(made[0])
    with torch.no_grad():
        made[0].reference.match(made[0].policy)
    module, recorder, _ = fitted(trainer, made, max_epochs=1)
    assert torch.equal(weights(module), before)
    assert [row["left_out"] for row in recorder.rows] == [1, 1, 1]


def test_groups_of_equal_rewards_are_counted_and_their_tokens_leave_the_mean(rollout):  # noqa: F811
    settings = {**GROUPS, "reward_model": f"{HERE}:few_letters", "missing_eos_penalty": 0.0}
    module, experience, targets, _ = rollout(skip_equal_groups=True, **settings)
    groups = experience.scores.view(-1, 3)
    equal = (groups == groups[:, :1]).all(dim=1)
    assert 0 < equal.sum() < len(equal)
    learned = targets.learned.any(dim=1)
    assert torch.equal(learned, ~equal.repeat_interleave(3))
    assert module.policy_loss.size(targets.learned) == experience.responses.lengths[learned].sum()
    _, counted = module._learnable(experience)
    assert counted["frac_reward_zero_std"] == counted["left_out"] == equal.float().mean().item()


def test_the_kl_can_be_a_term_of_the_loss_of_every_estimator(rollout):  # noqa: F811
    module, experience, targets, _ = rollout(kl_coef=0.0, kl_loss_coef=0.4)
    everything = list(range(len(experience.responses.rows)))
    with_kl, sums = module._losses(experience, targets, everything, counts=True)
    module.hparams.kl_loss_coef = 0.0
    without, _ = module._losses(experience, targets, everything, counts=True)
    added = (with_kl - without).item()
    assert added == pytest.approx(sums[2].item(), abs=1e-5)
    rows = module.rollouts.padded(experience.responses)
    now = module.policy(*rows.text).tokens[rows.response_mask].double()
    d = experience.tokens.reference[experience.tokens.mask].double() - now
    assert added == pytest.approx(0.4 * (d.exp() - d - 1).sum().item(), rel=1e-3)
    assert added > 1e-5


def test_an_entropy_bonus_is_taken_off_the_loss_of_each_token(rollout):  # noqa: F811
    module, experience, targets, _ = rollout(entropy_coef=0.3)
    everything = list(range(len(experience.responses.rows)))
    with_bonus, sums = module._losses(experience, targets, everything, counts=True)
    module.hparams.entropy_coef = 0.0
    without, _ = module._losses(experience, targets, everything, counts=True)
    states = module.policy.states(*module.rollouts.padded(experience.responses).text)
    logits = module.policy.model.get_output_embeddings()(states.hidden).double()
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum().item()
    assert (with_bonus - without).item() == pytest.approx(-0.3 * entropy, rel=1e-4)
    assert sums[3].item() == pytest.approx(-0.3 * entropy, rel=1e-4)


def test_the_penalty_grows_over_the_last_tokens_and_validation_has_it_too(rollout):  # noqa: F811
    module, experience, _, _ = rollout(overlong_buffer=4, missing_eos_penalty=0.5, kl_coef=0.0)
    lengths, ended = experience.responses.lengths, experience.responses.ended
    shares = [max(0, length - 4) / 4 for length in lengths.tolist()]
    assert sum(0 < share < 1 for share in shares) > 0
    _, numbers = module._learnable(experience)
    expected = sum(shares) / len(shares)
    assert numbers["reward"] - numbers["reward_with_kl"] == pytest.approx(0.5 * expected, abs=1e-6)
    assert (module.overlong_penalty(experience.responses)[~ended] == 0).all(), "the missing end is their penalty"
    module.rollout = lambda *given, **named: experience
    values = module.measure(None, "val").values
    torch.testing.assert_close(values["reward"] - values["reward_with_kl"], 0.5 * torch.tensor(shares))


class Mismatched(Ending):
    """An engine with log-probs of its own: the policy's, off by known amounts."""

    def draw(self, policy, prompts, seeds, **options):
        drawn = super().draw(policy, prompts, seeds, **options)
        return [Sampled(each.ids, torch.full((len(each.ids),), -4.0 - 0.5 * (i % 3))) for i, each in enumerate(drawn)]


@pytest.mark.parametrize("cap", [None, 1.05])
def test_advantages_are_weighted_by_the_mismatch_of_an_engine(build_ppo, trainer, cap):  # noqa: F811
    module, data = build_ppo(engine_importance_cap=cap, max_new_tokens=8)
    module.engine = Mismatched(module.engine)
    kept, update = [], module._update
    module._update = lambda *given: kept.append(given) or update(*given)
    trainer(limit_val_batches=0).fit(module, data)
    experience, targets = kept[0]
    module.hparams.engine_importance_cap = None
    plain_targets, plain_numbers = module._learnable(experience)
    assert "engine_weight" not in plain_numbers
    mask = experience.tokens.mask
    expected = plain_targets.advantages.clone()
    if cap is not None:
        ratio = (experience.tokens.logprobs[mask] - torch.cat(experience.responses.engine_logprobs)).exp()
        assert 0 < (ratio > cap).sum() < len(ratio)
        expected[mask] *= ratio.clamp(max=cap)
        module.hparams.engine_importance_cap = cap
        numbers = module._learnable(experience)[1]
        assert numbers["engine_weight"] == pytest.approx(ratio.clamp(max=cap).mean().item())
        assert numbers["engine_weight_max"] == pytest.approx(cap)
    torch.testing.assert_close(targets.advantages, expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scale_rewards": "none"}, "model.scale_rewards: gae"),
        ({**GROUPS, "kl_loss_coef": 0.1}, "model.kl_loss_coef: the KL of grpo"),
        ({"skip_equal_groups": True}, "model.skip_equal_groups"),
        ({"overlong_buffer": 7}, "model.overlong_buffer is 7, but max_new_tokens is 6"),
        ({"overlong_buffer": 2, "missing_eos_penalty": 0.0}, "model.missing_eos_penalty, which is 0"),
        ({"policy_loss_type": "gpso"}, "did you mean gspo"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(build_ppo, settings, words):  # noqa: F811
    settings = {key: value for key, value in settings.items() if key != "data"}
    with pytest.raises(ConfigurationError, match=words):
        build_ppo(**settings)
