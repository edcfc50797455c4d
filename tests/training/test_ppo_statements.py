"""What peers get wrong in PPO (the project's statements C27 to C37), tested in a run, from the drawn replies on.

The same statements of pure functions: C27, C28, C31, C32 and C35 in tests/functional; C29 over processes, C30, C33 and
C36 in test_ppo.py; C35 and C38 through a kill in test_resume.py.
"""

from __future__ import annotations

import functools

import pytest
import torch

from rlhf_lightning.functional.reductions import scatter_to_mask
from rlhf_lightning.models.generation import Sampled
from rlhf_lightning.rewards.scorers import RewardScorer
from tests.rewards.test_scorers import saved_classifier
from tests.training.test_ppo import build_ppo, fitted  # noqa: F401 (a fixture)


class Ending:
    """An engine whose every other reply ends early; a tiny model of random weights hardly ever ends one."""

    def __init__(self, engine):
        self.engine = engine

    def synchronize(self, policy):
        pass

    def draw(self, policy, prompts, seeds, *, eos_id, **options):
        drawn = self.engine.draw(policy, prompts, seeds, eos_id=eos_id, **options)
        end = torch.tensor([eos_id])
        cut = [torch.cat([reply.ids[: seed % 7], end]) for reply, seed in zip(drawn, seeds, strict=True)]
        return [reply if seed % 2 else Sampled(ids) for reply, ids, seed in zip(drawn, cut, seeds, strict=True)]


@pytest.fixture
def rollout(build_ppo, trainer):  # noqa: F811
    """Module, experience, targets and steps of a second rollout, when policy, reference and values are far apart."""

    def make(**settings):
        module, data = build_ppo(**{"max_new_tokens": 8, "num_ppo_epochs": 2} | settings)
        module.engine = Ending(module.engine)
        kept = []
        update = module._update
        module._update = lambda *given: kept.append(given) or update(*given)
        steps = []

        def step(experience, targets, part):
            steps.append((experience, list(part)))
            return original(experience, targets, part)

        original, module._step = module._step, step
        trainer(limit_val_batches=0).fit(module, data)
        return module, *kept[1], steps

    return make


def quadratic(rewards, values, gamma, gae_lambda):
    """Advantages of one reply of L tokens, from the definition: sum over l of (gamma lambda)^l delta_(t+l)."""
    length = len(rewards)
    following = [*values[1:], 0.0]  # nothing comes after the last token
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(length)]
    return [sum((gamma * gae_lambda) ** (s - t) * deltas[s] for s in range(t, length)) for t in range(length)]


def test_c27_c28_advantages_of_a_rollout_equal_their_definition(rollout):
    """From scores, log-probs and values, reply by reply: the score is paid once, on the last token, ended or not."""
    module, experience, targets, _ = rollout(
        whiten_advantages=False, gamma=0.97, gae_lambda=0.9, kl_coef=0.4, missing_eos_penalty=0.7
    )
    settings, replies, scores = module.hparams, experience.responses, experience.scores
    ended = [bool(row[-1] == module.trainer.datamodule.chat_format.eos_id) for row in replies.rows]
    assert ended == replies.ended.tolist()
    assert 0 < sum(ended) < len(ended)
    mask, logprobs, _, values = experience.tokens
    rows = module.rollouts.padded(replies)
    reference = scatter_to_mask(
        module.reference(module.policy, *rows.text).tokens[rows.response_mask].float(), mask
    ).double()
    for i, length in enumerate(replies.lengths.tolist()):
        its_logprobs, its_values = logprobs[i, :length].double(), values[i, :length].double()
        rewards = (-settings.kl_coef * (its_logprobs - reference[i, :length])).tolist()
        rewards[-1] += scores[i].item() - settings.missing_eos_penalty * (not ended[i])
        expected = torch.tensor(quadratic(rewards, its_values.tolist(), 0.97, 0.9), dtype=torch.float64)
        torch.testing.assert_close(targets.advantages[i, :length].double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(targets.returns[i, :length].double(), expected + its_values, rtol=0, atol=1e-5)
        assert targets.advantages[i, length:].abs().sum() == 0
    assert (logprobs - reference)[mask].abs().max() > 1e-3


GROUPS = {"num_generations": 3, "missing_eos_penalty": 0.7, "data": {"batch_size": 4, "limit": 12}}


def group_scores(module, experience):
    """Scores less the penalty, [4, 3] float64."""
    return (
        (experience.scores - module.hparams.missing_eos_penalty * (~experience.responses.ended).float())
        .double()
        .view(4, 3)
    )


def test_grpo_has_statistics_of_scores_and_its_kl_in_the_loss(rollout):
    """Shao et al. 2024, eq. 3 and 4; the weight counts where scores are equal too."""
    module, experience, targets, _ = rollout(advantage_estimator="grpo", kl_coef=0.4, **GROUPS)
    groups = group_scores(module, experience)
    expected = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    expected = torch.where(experience.tokens.mask, expected, 0)
    torch.testing.assert_close(targets.advantages.double(), expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.5

    def loss_and_gradient(kl_coef):
        module.hparams.kl_coef = module.kl_control.value = kl_coef
        module.zero_grad()
        loss, _ = module._losses(experience, targets, everything, counts=True)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in module.policy.parameters()]).double()

    everything = list(range(len(experience.responses.rows)))
    rows = module.rollouts.padded(experience.responses)
    now = scatter_to_mask(module.policy(*rows.text).tokens[rows.response_mask].float(), experience.tokens.mask)
    ratio = torch.where(experience.tokens.mask, experience.tokens.reference - now.detach(), 0).double()
    (k3,) = (ratio.exp() - ratio - 1).sum(dim=1, keepdim=True).sum(dim=0).tolist()
    assert k3 > 1e-3
    plain, once, twice = (loss_and_gradient(kl_coef) for kl_coef in (0.0, 0.4, 0.8))
    assert once[0] - plain[0] == pytest.approx(0.4 * k3, rel=1e-3)
    pull = once[1] - plain[1]
    assert pull.abs().max() > 1e-4
    torch.testing.assert_close(twice[1] - plain[1], 2 * pull, rtol=0, atol=1e-4 * pull.abs().max().item())


def test_rloo_has_the_kl_of_a_reply_in_its_reward(rollout):
    """Ahmadian et al. 2024: R = score - kl_coef * log(policy / reference), less the mean R of the others."""
    module, experience, targets, _ = rollout(advantage_estimator="rloo", kl_coef=0.4, **GROUPS)
    kl = (
        torch.where(experience.tokens.mask, experience.tokens.logprobs - experience.tokens.reference, 0)
        .double()
        .sum(dim=1)
    )
    assert kl.abs().max() > 1e-2
    rewards = group_scores(module, experience) - 0.4 * kl.view(4, 3)
    expected = (rewards - (rewards.sum(1, keepdim=True) - rewards) / 2).view(-1, 1)
    expected = torch.where(experience.tokens.mask, expected, 0)
    torch.testing.assert_close(targets.advantages.double(), expected, rtol=0, atol=1e-5)


def test_c34_no_token_that_was_not_drawn_is_in_the_loss(rollout):
    """A reply has one eos, at its end, or is cut without one; what rows are padded with changes no loss."""
    module, experience, targets, _ = rollout(missing_eos_penalty=0.0)
    eos = module.trainer.datamodule.chat_format.eos_id
    for row, start, ended in zip(
        experience.responses.rows, experience.responses.prompt_lengths, experience.responses.ended, strict=True
    ):
        reply = row[start:]
        assert (reply == eos).sum() == int(ended)
        assert len(reply) <= 8
        assert bool(ended) or len(reply) == 8
    assert experience.tokens.mask.sum(dim=1).tolist() == experience.responses.lengths.tolist()
    everything = list(range(len(experience.responses.rows)))
    losses = []
    chat_format = module.trainer.datamodule.chat_format
    for pad_id in (chat_format.pad_id, eos, 77):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(chat_format), "pad_id", pad_id)
            losses.append(module._losses(experience, targets, everything, counts=True)[0].item())
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


@pytest.mark.parametrize("value_model", [None, "shared"])
def test_c37_the_order_of_replies_changes_no_gradient(rollout, value_model):
    module, experience, targets, _ = rollout(value_model=value_model, max_grad_norm=0.0)

    def gradient(pieces):
        module.zero_grad()
        for piece in pieces:
            module._losses(experience, targets, piece, counts=True)[0].backward()
        return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).double()

    whole = gradient([[0, 1, 2, 3, 4, 5]])
    assert whole.abs().max() > 1e-3
    for pieces in ([[5, 3, 1, 0, 2, 4]], [[4, 0], [5], [3, 1, 2]], [[5], [4], [3], [2], [1], [0]]):
        torch.testing.assert_close(gradient(pieces), whole, rtol=0, atol=1e-5 * whole.abs().max().item())


def test_each_pass_learns_from_each_reply_once_in_an_order_of_its_own(rollout):
    _, experience, _, steps = rollout(num_mini_batches=3)
    second = [part for taken, part in steps if taken is experience]
    passes = [[i for part in each for i in part] for each in (second[:3], second[3:])]
    assert [sorted(each) for each in passes] == [list(range(6))] * 2
    assert passes[0] != passes[1]


def test_c33_the_moments_of_a_rollout_stand_still_while_it_is_learned_from(rollout):
    module, experience, targets, _ = rollout(normalize_scores=True, num_mini_batches=2)
    before = module.moments.state_dict()
    module._update(experience, targets)
    assert module.moments.state_dict() == before
    assert before["count"] == 18
    assert experience.scores.std() > 0


def test_c30_the_first_ratio_is_one_of_another_temperature_too(build_ppo, trainer):  # noqa: F811
    sgd = functools.partial(torch.optim.SGD, lr=1e-12)
    _, recorder, _ = fitted(trainer, build_ppo(temperature=1.7, num_ppo_epochs=3, optimizer=sgd, value_lr=1e-12))
    for row in recorder.rows:
        assert row["ratio"] == pytest.approx(1, abs=1e-5)
        assert row["clip_fraction"] == 0


def test_the_reward_model_is_shown_an_end_only_where_there_is_one(rollout, tiny_bert, tmp_path, monkeypatch):
    """And its text is the one that the key names."""
    asked = []
    saved = saved_classifier(tiny_bert, tmp_path / "classifier")
    original = RewardScorer.__call__

    def call(self, prompts, responses, ended=None):
        asked.append((self.chat_format.kind, ended))
        return original(self, prompts, responses, ended)

    monkeypatch.setattr(RewardScorer, "__call__", call)
    _, experience, _, _ = rollout(reward_model=str(saved), reward_chat_template="plain")
    assert asked[1] == ("plain", experience.responses.ended.tolist())
    assert 0 < sum(asked[1][1]) < 6
