"""A reward model of several heads: what each learns, what is said of their spread, and what a policy makes of it."""

from __future__ import annotations

import json
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from rlhf_lightning import PPO, OnlineDPO, PromptDataModule
from rlhf_lightning.commands.main import main
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.rewards.scorers import RewardScorer
from rlhf_lightning.rewards.source import RewardSource
from rlhf_lightning.training.callbacks import PredictionWriter
from tests.training.conftest import VAL_PAIRS, sgd, weights
from tests.training.test_ppo import HERE, fitted

HEADS = {"num_heads": 3, "hidden_size": 8}


@pytest.fixture(scope="module")
def ensemble(tiny_qwen2, tmp_path_factory):
    """A saved reward network of three heads with its tokenizer."""
    torch.manual_seed(0)
    network = RewardNetwork.from_backbone(str(tiny_qwen2), **HEADS)
    saved = network.save_pretrained(tmp_path_factory.mktemp("reward") / "ensemble")
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(saved)
    return saved


@pytest.mark.parametrize("head", [{"hidden_size": 8}, {"head": "linear"}], ids=["mlp", "linear"])
def test_each_head_takes_the_step_of_its_own_loss(build, trainer, head):
    """By hand: a head's gradient is a third of that of its own loss, and nothing of the others'."""
    module, datamodule = build(
        model={"num_heads": 3, "freeze_backbone": True, "center_rewards_coefficient": 0.1} | head,
        data={"batch_size": 11, "shuffle": False},
    )
    found = {}

    class Before(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            (batch,) = datamodule.train_dataloader()
            chosen, rejected = pl_module.each(batch)
            found["starts"] = chosen.detach()
            for number, one in enumerate(pl_module.network.score):
                c, r = chosen[:, number], rejected[:, number]
                loss = (torch.nn.functional.softplus(r - c) + 0.1 * (c + r) ** 2).mean() / 3
                gradients = torch.autograd.grad(loss, list(one.parameters()), retain_graph=True)
                found[number] = [p.detach() - 0.05 * g for p, g in zip(one.parameters(), gradients, strict=True)]

    trainer(callbacks=[Before()], limit_val_batches=0).fit(module, datamodule)
    assert found["starts"].std(dim=1).min() > 0
    for number, one in enumerate(module.network.score):
        for parameter, expected in zip(one.parameters(), found[number], strict=True):
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)


def test_one_head_is_what_it_was(build, trainer):
    """The names of its weights, and no metric of a spread."""
    module, datamodule = build(model={"num_heads": 1})
    run = trainer()
    run.fit(module, datamodule)
    assert set(module.network.score.state_dict()) == {
        f"{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")
    }
    assert not [name for name in run.callback_metrics if "spread" in name]


def test_a_run_resumes_as_if_it_had_not_stopped_and_not_with_other_heads(build, trainer, tmp_path):
    whole, datamodule = build(model=HEADS)
    trainer(max_epochs=2).fit(whole, datamodule)
    half, datamodule = build(model=HEADS)
    first = trainer(max_epochs=1)
    first.fit(half, datamodule)
    first.save_checkpoint(tmp_path / "a.ckpt")
    half.export(tmp_path / "in_between")
    resumed, datamodule = build(model=HEADS)
    trainer(max_epochs=2).fit(resumed, datamodule, ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(weights(resumed), weights(whole))
    other, datamodule = build(model=HEADS | {"num_heads": 2})
    with pytest.raises(ConfigurationError, match=r"its run had model\.num_heads 3, this one has 2"):
        trainer(max_epochs=2).fit(other, datamodule, ckpt_path=tmp_path / "a.ckpt")
    again, _ = build(model={"backbone": str(tmp_path / "in_between")})
    assert (again.hparams.num_heads, again.hparams.hidden_size) == (3, 8)
    again.configure_model()
    assert torch.equal(weights(again), weights(half))


def by_hand(scores):
    """Of scores [N, 2, 3]: mean spread, AUROC of the margin's spread on wrong pairs, and who is wrong."""
    margins = scores[:, 0] - scores[:, 1]
    wrong, spread = margins.mean(axis=1) <= 0, margins.std(axis=1)
    points = [(a > b) + 0.5 * (a == b) for a in spread[wrong] for b in spread[~wrong]]
    return scores.std(axis=2).mean(), np.mean(points) if points else math.nan, wrong


def test_validation_predict_and_evaluate_say_the_same_spreads(build, trainer, tmp_path, pairs, tiny_qwen2):
    """At any batch size; and they are those of all scores at once, in float64."""
    module, datamodule = build(model=HEADS | {"center_rewards_coefficient": 0.01})
    trainer(limit_val_batches=0).fit(module, datamodule)
    module.export(tmp_path / "model")
    found = []
    for size in (1, 3):
        _, data = build(data={"eval_batch_size": size})
        path = tmp_path / f"{size}.jsonl"
        run = trainer(callbacks=[PredictionWriter(str(path))])
        run.predict(module, data)
        (measured,) = run.validate(module, data, verbose=False)
        found.append((measured, [json.loads(line) for line in path.read_text().splitlines()]))
    with torch.no_grad():
        sides = [torch.cat(side) for side in zip(*(module.each(batch) for batch in data.val_dataloader()), strict=True)]
    scores = torch.stack(sides, dim=1).double().numpy()
    spread, auroc, wrong = by_hand(scores)
    assert 0 < wrong.sum() < VAL_PAIRS
    for measured, rows in found:
        assert measured["val/spread"] == pytest.approx(spread, abs=1e-6)
        assert measured["val/spread_auroc"] == pytest.approx(auroc, abs=1e-6)
        margins = (scores[:, 0] - scores[:, 1]).std(axis=1)
        assert sorted(row["margin_spread"] for row in rows) == pytest.approx(sorted(margins), abs=1e-6)
    arguments = ["--reward_model", str(tmp_path / "model"), "--pairs", str(pairs / "val.jsonl"), "--out"]
    assert main(["evaluate", *arguments, str(tmp_path / "out")]) == 0
    numbers = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert numbers["metrics"]["rm/spread"]["value"] == pytest.approx(spread, abs=1e-6)
    assert numbers["metrics"]["rm/spread_auroc"] == pytest.approx(auroc, abs=1e-6)
    assert numbers["details"]["scorers"][0]["quality"]["heads"]["heads"] == 3
    kept = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    predicted = {row["example_id"]: row for row in found[0][1]}
    for row in kept:
        same = predicted[row["id"]]
        assert row["spreads"] == pytest.approx([same["chosen_spread"], same["rejected_spread"]], abs=1e-6)
        assert row["scores"] == pytest.approx([same["chosen"], same["rejected"]], abs=1e-6)
    assert "wrong pairs spread more" in (tmp_path / "out" / "report.md").read_text()


def online(kind, directory, reward_model, **settings):
    torch.manual_seed(0)
    plain = {"backbone": str(directory), "reward_model": str(reward_model), "optimizer": sgd(0.05), "max_new_tokens": 6}
    plain |= {"lr_scheduler_type": "constant", "num_generations": 2}
    plain |= {"advantage_estimator": "grpo"} if kind is PPO else {}
    data = {"train": "builtin:courtesy", "tokenizer": str(directory), "batch_size": 6, "seed": 3, "limit": 6}
    return kind(**plain | settings), PromptDataModule(**data)


@pytest.mark.parametrize("kind", [PPO, OnlineDPO])
def test_a_policy_learns_from_the_mean_less_the_spread(trainer, tiny_qwen2, ensemble, kind):
    rows = []
    for penalty in (0.0, 2.0):
        module, data = online(kind, tiny_qwen2, ensemble, ensemble_penalty=penalty)
        _, recorder, _ = fitted(trainer, (module, data))
        (validated,) = trainer().validate(module, data, verbose=False)
        rows.append((recorder.rows[0], validated, weights(module)))
    (plain, before, without), (careful, after, with_penalty) = rows
    assert plain["reward_spread"] == careful["reward_spread"] > 0.01
    assert careful["reward"] == pytest.approx(plain["reward"] - 2 * plain["reward_spread"], abs=1e-5)
    assert before["val/reward_spread"] > 0.01
    assert after["val/reward"] < before["val/reward"]
    assert not torch.equal(without, with_penalty)


def test_a_source_of_rewards_is_careful_of_its_ensembles_alone(ensemble):
    prompts = [[{"role": "user", "content": text}] for text in ("Hello?", "Where is the station, please?")]
    responses = ["Good day.", "I do not know."]
    heads = np.array([each.heads for each in RewardScorer(str(ensemble), batch_size=1)(prompts, responses)])
    sources = [str(ensemble), {"source": f"{HERE}:length", "weight": 2.0}]
    found = RewardSource(sources, batch_size=4, ensemble_penalty=0.5).each(prompts, responses)
    assert found.scores[:, 0].tolist() == pytest.approx(heads.mean(axis=1) - 0.5 * heads.std(axis=1), abs=1e-6)
    assert found.scores[:, 1].tolist() == pytest.approx([0.9, 1.4])
    assert list(found.spreads) == ["ensemble"]
    assert found.spreads["ensemble"].tolist() == pytest.approx(heads.std(axis=1), abs=1e-6)


def test_a_penalty_for_what_has_one_head_or_is_no_model_is_refused(tiny_qwen2, ensemble, tmp_path):
    network = RewardNetwork.from_backbone(str(tiny_qwen2))
    saved = network.save_pretrained(tmp_path / "single")
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(saved)
    for given in (str(saved), f"{HERE}:length", [str(ensemble), str(saved)]):
        RewardSource(given, batch_size=4)
        with pytest.raises(ConfigurationError, match=r"model\.ensemble_penalty"):
            RewardSource(given, batch_size=4, ensemble_penalty=0.5)
