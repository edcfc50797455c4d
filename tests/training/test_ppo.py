"""PPO as a whole: its steps, its numbers, its refusals, and that it goes on as if it had not been broken."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning import PPO, OnlineDPO, PromptDataModule
from rlhf_lightning.commands.main import main
from rlhf_lightning.errors import ConfigurationError, ModelError, TrainingError
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.models.value_network import ValueNetwork
from rlhf_lightning.models.vllm_engine import MISMATCH_IN_HALF
from rlhf_lightning.rewards.source import RewardSource
from rlhf_lightning.training.best import SavingOrder
from rlhf_lightning.training.callbacks import ExportBest
from rlhf_lightning.training.results import Results
from rlhf_lightning.training.resume import ProcessStates
from rlhf_lightning.training.validation import ValidateOnce
from tests.models.vllm_stand_in import StandIn
from tests.programs import run
from tests.test_configs import ROOT

HERE = "tests.training.test_ppo"


def length(prompts, responses):
    """A rule that looks at everything it is given."""
    assert all(messages[-1]["role"] == "user" for messages in prompts)
    return [len(response) / 10 for response in responses]


def spaces(prompts, responses):
    return [float(response.count(" ")) for response in responses]


def constant(prompts, responses):
    return [1.5] * len(responses)


def constant_and_large(prompts, responses):
    return [1000.1] * len(responses)


def not_a_number(prompts, responses):
    return [1.0, float("nan"), *([1.0] * (len(responses) - 2))]


def too_few(prompts, responses):
    return [1.0]


def raising(prompts, responses):
    raise KeyError("colour")


@pytest.fixture
def build_ppo(tiny_qwen2):
    """Make a PPO module and its prompts; keyword arguments go to the module."""

    def make(kind=PPO, *, data=None, **settings):
        torch.manual_seed(0)
        optimizer = functools.partial(torch.optim.AdamW, lr=1e-3, eps=1e-5)
        plain = {"backbone": str(tiny_qwen2), "reward_model": f"{HERE}:length", "optimizer": optimizer}
        plain |= {"lr_scheduler_type": "constant", "max_new_tokens": 6} | ({"value_lr": 1e-3} if kind is PPO else {})
        module = kind(**plain | settings)
        prompts = {"train": "builtin:courtesy", "tokenizer": str(tiny_qwen2), "batch_size": 6, "seed": 3}
        return module, PromptDataModule(**prompts | {"limit": 18} | (data or {}))

    return make


class Recorder(Callback):
    """The numbers of each rollout, and the weights at the end."""

    def __init__(self):
        self.rows = []

    def setup(self, trainer, pl_module, stage):
        original = pl_module.rollout_log.numbers

        def log(numbers):
            self.rows.append(dict(numbers))
            original(numbers)

        pl_module.rollout_log.numbers = log

    @property
    def curve(self):
        return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in self.rows]


def fitted(trainer, made, **settings):
    module, data = made
    recorder = Recorder()
    fitter = trainer(limit_val_batches=0, callbacks=[recorder], **settings)
    fitter.fit(module, data)
    return module, recorder, fitter


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"value_model": "shared"},
        {"advantage_estimator": "grpo", "num_generations": 2},
        {"advantage_estimator": "rloo", "num_generations": 3},
        {"advantage_estimator": "reinforce++"},
        {"lora": {"r": 4, "lora_alpha": 8.0}},
        {"layout": "packed"},
        {"temperature": 0.7},
    ],
    ids=lambda given: "-".join(map(str, given.values())) or "plain",
)
def test_the_first_minibatch_finds_the_policy_that_drew_the_replies(build_ppo, trainer, settings):
    """Ratio 1, nothing clipped, no KL: `_check_start` stops the run otherwise. Then the policy moves."""
    _, recorder, fitter = fitted(trainer, build_ppo(num_ppo_epochs=1, **settings), max_epochs=1)
    first = recorder.rows[0]
    assert first["ratio"] == pytest.approx(1, abs=1e-4)
    assert first["clip_fraction"] == 0
    assert first["approx_kl"] < 1e-6
    assert first["kl"] == pytest.approx(0, abs=1e-3), "the policy begins as its reference"
    assert fitter.global_step == 3
    assert recorder.rows[-1]["kl"] != first["kl"]


@pytest.mark.parametrize(("epochs", "num_mini_batches"), [(1, 1), (2, 3), (4, 1), (1, 6)])
def test_each_minibatch_is_an_optimizer_step(build_ppo, trainer, epochs, num_mini_batches):
    """A peer's `num_mini_batches` changed nothing (algorithms note, 3.4)."""
    _, recorder, fitter = fitted(trainer, build_ppo(num_ppo_epochs=epochs, num_mini_batches=num_mini_batches))
    assert [row["steps"] for row in recorder.rows] == [epochs * num_mini_batches] * 3
    assert fitter.global_step == 3 * epochs * num_mini_batches


@pytest.mark.parametrize("settings", [{}, {"value_model": "shared"}, {"layout": "packed"}])
def test_how_a_minibatch_is_divided_and_drawn_changes_no_weight(build_ppo, trainer, settings):
    sgd = functools.partial(torch.optim.SGD, lr=0.05)
    settings = settings | {"max_grad_norm": 0.0}  # clipping would hide a wrong factor
    whole, one, _ = fitted(trainer, build_ppo(micro_batch_size=6, optimizer=sgd, **settings))
    split, other, _ = fitted(
        trainer, build_ppo(micro_batch_size=1, generation_micro_batch_size=2, optimizer=sgd, **settings)
    )
    torch.testing.assert_close(weights(whole), weights(split), rtol=0, atol=2e-6)
    for row, twin in zip(one.curve, other.curve, strict=True):
        assert row == pytest.approx(twin, abs=2e-4)


def test_a_run_that_was_broken_goes_on_as_if_it_had_not_been(build_ppo, trainer, tmp_path):
    settings = {
        "adaptive_kl_target": 3.0,
        "kl_horizon": 100.0,
        "normalize_scores": True,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
    }
    whole, curve, _ = fitted(trainer, build_ppo(**settings), max_epochs=2)

    class Broken(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if pl_module.rollouts_done == 2:
                trainer.save_checkpoint(tmp_path / "broken.ckpt")
                raise KeyboardInterrupt

    broken, data = build_ppo(**settings)
    first = Recorder()
    with pytest.raises(SystemExit):
        trainer(limit_val_batches=0, callbacks=[first, Broken()], max_epochs=2).fit(broken, data)
    module, data = build_ppo(**settings)
    recorder = Recorder()
    fitter = trainer(limit_val_batches=0, callbacks=[recorder], max_epochs=2)
    fitter.fit(module, data, ckpt_path=tmp_path / "broken.ckpt")
    assert broken.rollouts_done == 2
    assert len(first.rows) == 2
    assert [*first.curve, *recorder.curve] == curve.curve
    assert torch.equal(weights(module), weights(whole))
    assert module.kl_coef == whole.kl_coef != 0.05


def validated(trainer, made, *, callbacks=(), ckpt_path=None, **settings):
    """Fit with the program's own callbacks; the steps that were validated, and the rollouts."""
    module, data = made
    results, recorder = Results(), Recorder()
    own = [results, SavingOrder(), ValidateOnce(), ProcessStates(), recorder, *callbacks]
    fitter = trainer(callbacks=own, enable_checkpointing=bool(callbacks), limit_val_batches=1, **settings)
    fitter.fit(module, data, ckpt_path=ckpt_path)
    return module, results, recorder


def test_a_run_begins_with_a_validation_that_changes_nothing_else(build_ppo, trainer):
    plain, _, one = validated(trainer, build_ppo(validate_at_start=False))
    module, results, other = validated(trainer, build_ppo(), num_sanity_val_steps=2)
    assert list(results.by_step) == [0, 12]
    assert results.by_step[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert results.by_step[0]["responses"] == 6
    assert other.curve == one.curve
    assert torch.equal(weights(module), weights(plain))


def test_the_start_can_be_the_best_checkpoint_and_is_exported_with_a_word(build_ppo, trainer, tmp_path, caplog):
    """By a monitor to which every step does harm; a run that goes on from it does not validate it again."""
    judge = ModelCheckpoint(tmp_path / "kept", filename="best-{step}", monitor="val/kl", mode="min")
    module, data = build_ppo()
    module.configure_model()
    start = weights(module.policy)
    whole, results, curve = validated(
        trainer, (module, data), callbacks=[judge, ExportBest(str(tmp_path / "out"))], max_epochs=2
    )
    assert list(results.by_step) == [0, 12, 24]
    assert Path(judge.best_model_path).name == "best-step=0.ckpt"
    exported = CausalLM.from_pretrained(str(tmp_path / "out"))
    assert torch.equal(weights(exported), start)
    assert not torch.equal(weights(whole.policy), start)
    assert "step 0 has the weights that the run began with" in caplog.text
    again, later, rest = validated(trainer, build_ppo(), ckpt_path=judge.best_model_path, max_epochs=2)
    assert list(later.by_step) == [12, 24]
    assert rest.curve == curve.curve
    assert torch.equal(weights(again), weights(whole))


def test_the_rule_is_learned(build_ppo, trainer):
    """The reward of longer replies rises by far more than its noise."""
    optimizer = functools.partial(torch.optim.AdamW, lr=6e-3, eps=1e-5)
    settings = {"optimizer": optimizer, "value_lr": 3e-3, "kl_coef": 0.0, "missing_eos_penalty": 0.0}
    prompts = {"batch_size": 36, "limit": 36}
    module, recorder, _ = fitted(trainer, build_ppo(data=prompts, **settings), max_epochs=14)
    rewards = [row["reward"] for row in recorder.rows]
    noise = recorder.rows[0]["reward_std"] / 36**0.5
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 5 * noise
    assert recorder.rows[-1]["kl"] > 1
    assert module.rollouts_done == 14


@pytest.fixture
def server(tiny_qwen2):
    stand_in = StandIn(tiny_qwen2)
    yield stand_in
    stand_in.stop()


def test_a_server_draws_with_the_weights_of_each_rollout_and_its_logprobs_are_only_compared(
    build_ppo, trainer, tmp_path, server, caplog
):
    """The start check holds, since the policy scores the replies again; what the server's rounding does is logged."""
    made = build_ppo(engine=server.url, engine_directory=str(tmp_path / "weights"), temperature=0.8, num_ppo_epochs=1)
    with caplog.at_level("INFO", logger="rlhf_lightning.training.rollout_log"):
        _, recorder, _ = fitted(trainer, made)
    routes = [route for route, _ in server.asked]
    assert routes == [*["/collective_rpc", "/reset_prefix_cache"], *["/v1/completions"] * 6] * 3
    assert all(1e-6 < row["engine_mismatch"] < MISMATCH_IN_HALF for row in recorder.rows)
    assert recorder.rows[0]["ratio"] == pytest.approx(1, abs=0.01)
    assert f"engine mismatch {recorder.rows[-1]['engine_mismatch']:.4f}" in caplog.text


@pytest.mark.parametrize("validation", [0, 1])
def test_a_server_whose_logprobs_are_not_the_policys_is_refused_at_the_first_rollout(
    build_ppo, trainer, tmp_path, server, validation
):
    server.raw = True
    module, data = build_ppo(engine=server.url, engine_directory=str(tmp_path / "weights"), temperature=0.5)
    before = weights(CausalLM.from_pretrained(module.hparams.backbone))
    with pytest.raises(ModelError, match="--generation-config vllm --logprobs-mode processed_logprobs"):
        trainer(limit_val_batches=validation).fit(module, data)
    assert sum(route == "/v1/completions" for route, _ in server.asked) == 6
    assert torch.equal(weights(module.policy), before)


def test_an_engine_that_is_none_is_refused(build_ppo):
    with pytest.raises(ConfigurationError, match="is no engine; use transformers"):
        build_ppo(engine="vllm")


def test_a_policy_that_never_ends_a_reply_is_told(build_ppo, trainer, caplog):
    fitted(trainer, build_ppo(max_new_tokens=2))
    assert caplog.text.count("no response of the first rollout ended") == 1


def test_the_penalty_meets_replies_without_an_end_alone(build_ppo):
    module, _ = build_ppo(missing_eos_penalty=2.0)
    scores, ended = torch.tensor([1.0, 1.0]), torch.tensor([True, False])
    assert module.shaped_scores(scores, ended).tolist() == [1.0, -1.0]


def test_scores_are_normalized_by_moments_and_clipped_afterwards(build_ppo, trainer, monkeypatch):
    module, _ = build_ppo(normalize_scores=True, score_clip=1.2, missing_eos_penalty=0.0)
    module.trainer = trainer()
    ended = torch.ones(4, dtype=torch.bool)
    first = module.shaped_scores(torch.tensor([0.0, 0.0, 2.0, 2.0]), ended)
    assert first.tolist() == [-1, -1, 1, 1]
    second = module.shaped_scores(torch.tensor([10.0, 10.0, 10.0, 10.0]), ended)
    every = torch.tensor([0.0, 0, 2, 2, 10, 10, 10, 10])
    assert module.moments.mean == pytest.approx(every.mean().item())
    assert module.moments.std == pytest.approx(every.std(correction=0).item())
    expected = min((10 - every.mean().item()) / every.std(correction=0).item(), 1.2)
    assert second.tolist() == pytest.approx([expected] * 4)


def test_the_reward_that_is_learned_from_is_the_score_less_penalty_and_kl(build_ppo, trainer):
    _, recorder, _ = fitted(trainer, build_ppo(kl_coef=0.3, missing_eos_penalty=0.7))
    assert abs(recorder.rows[-1]["kl"]) > 0.01
    for row in recorder.rows:
        assert row["kl_coef"] == 0.3
        expected = row["reward"] - 0.7 * row["missing_eos"] - 0.3 * row["kl"]
        assert row["reward_with_kl"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"advantage_estimator": "grpo", "num_generations": 2}], ids=["sum", "per token"]
)
def test_a_validation_measures_the_reward_with_penalty_and_kl_by_one_yardstick(build_ppo, trainer, settings):
    """Per reply: score - penalty - kl_coef * KL; whatever the steered coefficient and the moments are by then."""
    module, data = build_ppo(kl_coef=0.3, missing_eos_penalty=0.7, max_new_tokens=12, **settings)
    fitter = trainer(limit_val_batches=0)
    fitter.fit(module, data)
    module.kl_control.value = 7.0
    module.moments.update(10, 5.0, 100.0)
    kept, rollout = [], module.rollout
    module.rollout = lambda *given, **named: kept.append(rollout(*given, **named)) or kept[-1]
    numbers = trainer().validate(module, data, verbose=False)[0]
    values = []
    for responses, _, tokens, *_ in kept:
        for i, length in enumerate(responses.lengths.tolist()):
            d = (tokens.logprobs - tokens.reference)[i, :length].double()
            kl = (torch.expm1(-d) + d).mean() if settings else d.sum()
            values.append(-0.7 * (not responses.ended[i]) - 0.3 * kl.item())
    assert abs(numbers["val/kl"]) > 0.01
    assert numbers["val/reward_with_kl"] == pytest.approx(numbers["val/reward"] + sum(values) / len(values), abs=1e-4)


def test_gradients_are_clipped_for_a_fused_optimizer_as_for_another(build_ppo, trainer):
    ends = []
    for fused in (False, True):
        made = build_ppo(optimizer=functools.partial(torch.optim.SGD, lr=0.5, fused=fused), max_grad_norm=0.01)
        module, _, _ = fitted(trainer, made, precision="bf16-mixed", max_steps=2)
        ends.append(weights(module))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "reinforce++"])
@pytest.mark.parametrize("normalize", [False, True])
def test_equal_rewards_teach_nothing(build_ppo, trainer, advantage, normalize):
    settings = {"advantage_estimator": advantage, "num_generations": 3, "normalize_scores": normalize, "kl_coef": 0.0}
    settings |= {"missing_eos_penalty": 0.0, "reward_model": f"{HERE}:constant_and_large"}
    made = build_ppo(optimizer=functools.partial(torch.optim.SGD, lr=1.0), max_grad_norm=0.0, **settings)
    made[0].configure_model()
    before = weights(made[0])
    module, recorder, _ = fitted(trainer, made, max_epochs=1)
    assert torch.equal(weights(module), before)
    assert [row["policy_loss"] for row in recorder.rows] == [0, 0, 0]


@pytest.mark.parametrize("whiten", [True, False])
def test_advantages_are_whitened_over_the_rollout(build_ppo, trainer, whiten):
    module, data = build_ppo(whiten_advantages=whiten)
    seen = []
    update = module._update
    module._update = lambda *given: seen.append(given) or update(*given)
    trainer(limit_val_batches=0).fit(module, data)
    for experience, targets in seen:
        mask = experience.tokens.mask
        taken = targets.advantages[mask].double()
        white = abs(taken.mean()) < 1e-5 and abs(taken.std(correction=0) - 1) < 1e-4
        assert white == whiten
        assert targets.advantages[~mask].abs().sum() == 0


@torch.no_grad()
@pytest.mark.parametrize("source", ["policy", "mlp", "linear"])
def test_a_value_is_read_off_the_state_before_its_token(tiny_qwen2, tmp_path, source):
    directory = tiny_qwen2
    if source != "policy":
        directory = RewardNetwork.from_backbone(str(tiny_qwen2), head=source).save_pretrained(tmp_path / "reward")
    value = ValueNetwork.from_pretrained(str(directory))
    torch.nn.init.normal_(value.network.score[-1].weight) if source == "policy" else None
    ids, mask = (
        torch.tensor([[5, 6, 7, 8, 9], [4, 9, 8, 0, 0]]),
        torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool(),
    )
    response = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]).bool()
    values = value(ids, mask, response)
    before = [[5, 6], [5, 6, 7], [5, 6, 7, 8], [4], [4, 9]]
    for found, prefix in zip(values, before, strict=True):
        row = torch.tensor([prefix])
        expected = value.network(row, torch.ones_like(row, dtype=torch.bool))
        torch.testing.assert_close(found[None], expected, rtol=0, atol=1e-5)


def test_a_value_model_that_begins_as_a_policy_begins_at_0(tiny_qwen2):
    value = ValueNetwork.from_pretrained(str(tiny_qwen2))
    ids = torch.tensor([[5, 6, 7]])
    assert value(ids, torch.ones_like(ids).bool(), torch.tensor([[False, True, True]])).tolist() == [0, 0]


@pytest.mark.parametrize(("pooling", "zero"), [("mean", False), ("layers", True)])
def test_a_value_model_has_a_head_of_its_own_where_that_of_the_reward_model_reads_more(
    tiny_qwen2, tmp_path, pooling, zero
):
    network = RewardNetwork.from_backbone(str(tiny_qwen2), pooling=pooling)
    value = ValueNetwork.from_pretrained(str(network.save_pretrained(tmp_path / "reward")))
    ids = torch.tensor([[5, 6, 7]])
    values = value(ids, torch.ones_like(ids).bool(), torch.tensor([[False, True, True]]))
    assert (values == 0).all() == zero
    again = ValueNetwork.from_pretrained(str(value.save_pretrained(tmp_path / "value")))
    assert torch.equal(again(ids, torch.ones_like(ids).bool(), torch.tensor([[False, True, True]])), values)


def test_passes_are_left_out_once_the_policy_has_gone_far(build_ppo, trainer):
    _, recorder, _ = fitted(trainer, build_ppo(num_ppo_epochs=5, target_kl=1e-7), max_epochs=1)
    assert recorder.rows[0]["stopped_early"] == 1
    assert recorder.rows[0]["steps"] < 5


def test_the_kl_coefficient_goes_up_while_the_kl_is_above_its_target(build_ppo, trainer):
    module, recorder, _ = fitted(trainer, build_ppo(adaptive_kl_target=1e-3, kl_horizon=60.0), max_epochs=2)
    assert module.kl_coef > 0.05
    assert [row["kl_coef"] for row in recorder.rows] != [0.05] * len(recorder.rows)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("not_a_number", "not finite for the prompts .*nan"),
        ("too_few", r"gave 1 results for 6 rows, asked about courtesy-train-\d+, .* and 1 more"),
        ("raising", r"KeyError.*test_ppo.py, line \d+, asked about courtesy-train-\d+"),
    ],
)
def test_a_reward_that_is_no_reward_stops_the_run(build_ppo, trainer, name, words):
    module, data = build_ppo(reward_model=f"{HERE}:{name}")
    with pytest.raises(TrainingError, match=words):
        trainer(limit_val_batches=0).fit(module, data)
    assert module.trainer.global_step == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"advantage_estimator": "grpo"}, "num_generations"),
        ({"advantage_estimator": "rloo", "num_generations": 2, "value_model": "shared"}, "has no value model"),
        ({"lora": {"r": 4, "lora_dropout": 0.1}}, "lora_dropout"),
        ({"reference": "adapter"}, "adapter"),
        (
            {"adaptive_kl_target": 1.0, "kl_coef": 0.0},
            "adaptive_kl_target: the coefficient that it steers is model.kl_coef, which is 0",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(build_ppo, settings, words):
    with pytest.raises(ConfigurationError, match=words):
        build_ppo(**settings)


SEVERAL = [f"{HERE}:length", {"source": f"{HERE}:spaces", "weight": -3, "name": "gaps"}]


@pytest.mark.parametrize("kind", [PPO, OnlineDPO])
def test_several_rewards_are_logged_by_their_names_and_learned_from_by_their_sum(build_ppo, trainer, kind):
    module, recorder, _ = fitted(trainer, build_ppo(kind, reward_model=SEVERAL, num_generations=3))
    for row in recorder.rows:
        assert row["reward"] == pytest.approx(row["reward/length"] - 3 * row["reward/gaps"], abs=1e-5)
    assert recorder.rows[0]["reward/gaps"] > 0
    numbers = trainer().validate(module, build_ppo()[1], verbose=False)[0]
    assert numbers["val/reward"] == pytest.approx(numbers["val/reward/length"] - 3 * numbers["val/reward/gaps"])
    assert [each["source"] for each in module.hparams.reward_model] == [f"{HERE}:length", f"{HERE}:spaces"]


def test_rewards_normalized_in_their_groups_are_added_before_penalties(build_ppo, trainer):
    settings = {"advantage_estimator": "grpo", "scale_rewards": "none", "missing_eos_penalty": 0.0}
    both = {"reward_model": SEVERAL, "multi_objective_aggregation": "normalize_then_sum", "num_generations": 3}
    module, data = build_ppo(**settings, **both)
    kept, update = [], module._update
    module._update = lambda *given: kept.append(given) or update(*given)
    trainer(limit_val_batches=0).fit(module, data)
    for experience, targets in kept:
        length, gaps = (experience.rewards[name].double().view(-1, 3) for name in ("length", "gaps"))
        expected = sum(
            weight * (each - each.mean(dim=1, keepdim=True)) / (each.std(dim=1, keepdim=True) + 1e-4)
            for weight, each in ((1, length), (-3, gaps))
        )
        assert targets.advantages[:, 0].tolist() == pytest.approx(expected.flatten().tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_generations": 2}, "needs a list of rewards"),
        ({"reward_model": SEVERAL}, "needs model.num_generations of 2 or more"),
    ],
)
def test_rewards_that_cannot_be_normalized_in_groups_are_refused(build_ppo, settings, words):
    with pytest.raises(ConfigurationError, match=words):
        build_ppo(multi_objective_aggregation="normalize_then_sum", **settings)


def test_replies_that_leave_no_room_for_a_prompt_are_refused(build_ppo, trainer):
    module, data = build_ppo(max_new_tokens=2048)
    with pytest.raises(ConfigurationError, match=r"max_new_tokens is 2048.*positions for 2048 tokens"):
        trainer().fit(module, data)


def test_a_prompt_has_the_positions_that_the_replies_leave(build_ppo, caplog):
    module, data = build_ppo(max_new_tokens=2000, data={"max_prompt_length": 64})
    module.check_data(data)
    assert data.max_prompt_length == 48
    assert "max_prompt_length is 64" in caplog.text
    module, data = build_ppo(max_new_tokens=2000, data={"max_prompt_length": 48})
    module.check_data(data)
    assert data.max_prompt_length == 48
    assert caplog.text.count("max_prompt_length is") == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("no_such_module:f", "cannot be imported"),
        (f"{HERE}:HERE", "not a function"),
        ("nowhere/at/all", "no directory"),
    ],
)
def test_a_reward_source_that_is_none_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        RewardSource(given, batch_size=4)


def test_a_language_model_is_no_reward_model(tiny_qwen2):
    with pytest.raises(ValueError, match="without a reward head"):
        RewardSource(str(tiny_qwen2), batch_size=4)


@torch.no_grad()
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert"])
def test_a_reward_model_of_any_tokenizer_scores_the_text_in_its_own_format(request, tmp_path, model):
    """C36; in any batch, and with a eos at the end."""
    from transformers import AutoTokenizer

    from rlhf_lightning.data.chat_format import ChatFormat

    directory = request.getfixturevalue(model)
    network = RewardNetwork.from_backbone(str(directory)).eval()
    saved = network.save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(directory).save_pretrained(saved)
    prompts = [[{"role": "user", "content": text}] for text in ("Hello?", "Where is the station, please?", "Help")]
    responses = ["Good day.", "I do not know.", "Of course, gladly."]
    scores = RewardSource(str(saved), batch_size=2)(prompts, responses)
    form = ChatFormat(AutoTokenizer.from_pretrained(directory))
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        head = form.encode_prompts([form.prompt_text(prompt)])[0]
        row = torch.tensor([[*head, *form.token_ids([form.response_text(response)])[0], form.eos_id]])
        expected = network(row, torch.ones_like(row, dtype=torch.bool))
        torch.testing.assert_close(score[None], expected, rtol=0, atol=1e-5)


def test_conversations_too_long_for_the_reward_model_are_said_once(tiny_qwen2, tmp_path, caplog):
    from transformers import AutoTokenizer

    network = RewardNetwork.from_backbone(str(tiny_qwen2))
    network.backbone.config.max_position_embeddings = 60
    saved = network.save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(saved)
    rewards = RewardSource(str(saved), batch_size=2)
    prompts = [[{"role": "user", "content": text}] for text in ("Why? " * 40, "Why?")]
    rewards(prompts[1:], ["So."])
    assert not [record for record in caplog.records if "longer than" in record.message]
    for _ in range(2):
        assert rewards(prompts, ["So.", "So."]).isfinite().all()
    said = [record.message for record in caplog.records if "longer than" in record.message]
    assert len(said) == 1
    assert said[0].startswith(f"reward: 1 of 2 conversations are longer than what {saved} reads")


@pytest.mark.usefixtures("forked_proof")
def test_from_the_command_line_with_a_list_of_rewards_and_export(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reward = ["--config", str(ROOT / "configs" / "quickstart" / "reward_model.yaml"), "--trainer.max_epochs", "1"]
    assert main(["fit", *reward]) == 0
    arguments = ["--config", str(ROOT / "configs" / "ppo.yaml"), "--model.backbone", "builtin:tiny"]
    rule = {"source": "rlhf_lightning.data.courtesy.rule:brevity", "weight": 0.5, "name": "rule"}
    both = {"reward_model": ["models/quickstart_reward_model", rule]}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"model": {"init_args": both}}))
    arguments += ["--config", "both.yaml", "--model.lora", "null", "--model.value_model", "null"]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--data.train", "builtin:courtesy"]
    arguments += ["--model.max_new_tokens", "8"]
    assert main(["fit", *arguments]) == 0
    printed = capsys.readouterr()
    assert "responses" in printed.out
    assert "reward" in printed.out
    assert "value model: models/quickstart_reward_model, with its own head" in printed.err
    checkpoint = next(line.split()[-1] for line in printed.out.splitlines() if line.startswith("checkpoint:  runs/ppo"))
    assert (tmp_path / "models" / "ppo_policy" / "config.json").is_file()
    assert main(["export", "--ckpt_path", checkpoint, "--out", "exported"]) == 0
    assert main(["test", *arguments, "--ckpt_path", checkpoint]) == 0


def rollout_lines(directory: Path, config: str, *settings: str, processes: int = 1) -> list[str]:
    """What a configuration's run on 24 prompts prints of its rollouts of 12 prompts and its validation."""
    always = ["--config", str(ROOT / "configs" / config), "--model.backbone", "builtin:tiny"]
    always += ["--model.reward_model", f"{HERE}:length", "--model.lora", "null", "--trainer.accelerator", "cpu"]
    always += ["--trainer.precision", "32-true", "--data.train", "builtin:courtesy", "--data.limit", "24"]
    always += ["--model.max_new_tokens", "6", "--trainer.logger", "false"]
    always += ["--trainer.callbacks", "[]", "--model.optimizer.lr", "1e-3"]
    always += ["--data.batch_size", str(12 // processes), "--trainer.devices", str(processes)]
    code, _, error = run(directory, "fit", *always, *settings, processes=processes)
    assert code == 0, error[-2000:]
    lines = [line for line in error.splitlines() if line.startswith(("rollout", "validation at"))]
    return [re.sub(", about [0-9]+ (s|min) left$", "", line) for line in lines]


@pytest.fixture(scope="module")
def lines_of_one(tmp_path_factory):
    return functools.cache(lambda config: rollout_lines(tmp_path_factory.mktemp("one"), config))


@pytest.mark.parametrize("config", ["ppo.yaml", "online_dpo.yaml"])
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_two_processes_draw_and_learn_what_one_does(tmp_path, lines_of_one, strategy, config):
    """The same replies, rewards and steps: every printed digit."""
    if strategy == "zero2":
        pytest.importorskip("deepspeed")
    assert len(lines_of_one(config)) == 4
    lines = rollout_lines(tmp_path, config, "--trainer.strategy", strategy, processes=2)
    assert lines == lines_of_one(config)
