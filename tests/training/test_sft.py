"""SFT's training: the loss of the chosen responses, and what is logged is what happened."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning import DPO, SFT, RewardModel, SFTDataModule
from rlhf_lightning.errors import ConfigurationError, TrainingError
from rlhf_lightning.training.callbacks import PredictionWriter
from rlhf_lightning.training.results import Results
from tests.training.conftest import VAL_PAIRS, weights
from tests.training.test_dpo import LORA
from tests.training.test_reward_model import LossLog


def trained(build_sft, trainer, *, batch_size=2, accumulate=1, model=None, data=None, **settings):
    module, datamodule = build_sft(model=model, data={"batch_size": batch_size} | (data or {}))
    trainer(accumulate_grad_batches=accumulate, **settings).fit(module, datamodule)
    return module, datamodule


@torch.no_grad()
def nlls(module: SFT, batch) -> list[torch.Tensor]:
    """Negative log-likelihood of each token of each chosen response, from full logits."""
    logits = module.policy.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    each = -logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    return [each[row][batch.response_mask[row, 1:]] for row in range(batch.pairs)]


@torch.no_grad()
def hits(module: SFT, batch) -> torch.Tensor:
    logits = module.policy.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    right = logits[:, :-1].argmax(-1) == batch.input_ids[:, 1:]
    return right[: batch.pairs][batch.response_mask[: batch.pairs, 1:]]


def test_the_loss_is_that_of_the_chosen_responses_and_counts_each_the_same(build_sft, trainer):
    module, datamodule = build_sft(data={"batch_size": 4})
    log = LossLog()
    trainer(max_steps=1, limit_val_batches=0, callbacks=[log]).fit(module, datamodule)
    start, _ = build_sft()
    start.configure_model()
    batch = next(iter(datamodule.train_dataloader()))
    expected = torch.stack([nll.mean() for nll in nlls(start, batch)]).mean()
    assert log.losses == [pytest.approx(expected.item(), abs=1e-5)]


@pytest.mark.parametrize("model", [{}, LORA], ids=["whole", "lora"])
def test_accumulation_gives_the_weights_of_one_large_batch(build_sft, trainer, model):
    whole, _ = trained(build_sft, trainer, model=model, batch_size=4, limit_val_batches=0)
    parts, _ = trained(build_sft, trainer, model=model, batch_size=1, accumulate=4, limit_val_batches=0)
    start, _ = build_sft(model=model)
    start.configure_model()
    assert (weights(whole) - weights(start)).abs().max() > 1e-3
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-5)


def test_a_line_in_a_log_says_how_long_the_training_will_take_at_this_speed(build_sft, trainer, caplog):
    caplog.set_level("INFO")
    trained(build_sft, trainer, batch_size=2, max_steps=4, log_every_n_steps=1, limit_val_batches=0)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]
    assert [bool(re.search(r", about \d+ s left$", line)) for line in lines] == [True, True, True, False]


def test_a_log_says_how_far_a_validation_is(build_sft, trainer, caplog, monkeypatch):
    monkeypatch.setattr("rlhf_lightning.terminal.SECONDS_BETWEEN_LINES", 0.0)
    caplog.set_level("INFO")
    trained(build_sft, trainer, max_epochs=1, data={"eval_batch_size": 1}, callbacks=[Results()])
    lines = [message for message in caplog.messages if message.startswith("batches of the validation")]
    said = [re.match(r"batches of the validation: (\d+) of (\d+), about \d+ s left$", line).groups() for line in lines]
    assert said == [(str(done), str(VAL_PAIRS)) for done in range(1, VAL_PAIRS)]


def test_training_lowers_the_perplexity(build_sft, trainer):
    (before,) = trainer().validate(*build_sft(), verbose=False)
    module, _ = trained(build_sft, trainer, max_epochs=4)
    assert module.trainer.callback_metrics["val/perplexity"] < 0.8 * before["val/perplexity"]


def test_any_evaluation_batch_size_gives_the_metrics_of_the_whole_split(build_sft, trainer):
    measured = []
    for size in (1, 2, 3, VAL_PAIRS):
        module, datamodule = build_sft(data={"eval_batch_size": size})
        (metrics,) = trainer().validate(module, datamodule, verbose=False)
        measured.append(metrics)
    batches = list(datamodule.val_dataloader())
    responses = [nll.double() for batch in batches for nll in nlls(module, batch)]
    lengths = torch.tensor([len(nll) for nll in responses]).double()
    expected = {
        "val/loss": torch.stack([nll.mean() for nll in responses]).mean().item(),
        "val/perplexity": torch.cat(responses).mean().exp().item(),
        "val/token_accuracy": torch.cat([hits(module, batch) for batch in batches]).double().mean().item(),
        "val/lengths/chosen": lengths.mean().item(),
        "val/conversations": VAL_PAIRS,
    }
    assert lengths.unique().numel() > 1
    for metrics in measured:
        assert metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model", [{}, LORA], ids=["whole", "lora"])
def test_a_loaded_checkpoint_gives_the_same_numbers(build_sft, trainer, tmp_path, model):
    save = ModelCheckpoint(tmp_path, filename="last")
    run, _ = trained(build_sft, trainer, model=model, callbacks=[save], enable_checkpointing=True)
    measured = {name: value.item() for name, value in run.trainer.callback_metrics.items() if name.startswith("val/")}
    (metrics,) = trainer().test(*build_sft(model=model), ckpt_path=save.best_model_path, verbose=False)
    assert {name.replace("test/", "val/"): value for name, value in metrics.items()} == measured
    loaded = SFT.load_from_checkpoint(save.best_model_path)
    assert torch.equal(weights(loaded), weights(run))


def test_predict_gives_the_log_probabilities_of_both_responses(build_sft, trainer):
    module, datamodule = build_sft()
    trainer().validate(module, datamodule, verbose=False)
    batch = next(iter(datamodule.val_dataloader()))
    with torch.no_grad():
        scores = module.predict_step(batch, 0)
    sums = torch.stack([-nll.sum() for nll in nlls(module, batch)])
    torch.testing.assert_close(scores.chosen, sums, rtol=0, atol=1e-3)  # sums of some 50 tokens in float32
    assert not torch.equal(scores.chosen, scores.rejected)


def test_a_loss_that_is_no_number_stops_the_run(build_sft, trainer):
    module, datamodule = build_sft()
    module.configure_model()
    with torch.no_grad():
        next(module.policy.parameters()).fill_(math.nan)
    with pytest.raises(TrainingError, match=r"step 0: the loss is nan for the examples courtesy-train-.*no checkpoint"):
        trainer().fit(module, datamodule)


USER, REPLY = {"role": "user", "content": "How do I boil an egg?"}, {"role": "assistant", "content": "Good question."}
CONVERSATIONS = [
    {"messages": [USER, REPLY, {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Enjoy!"}]},
    {"prompt": "How do I clean a window?", "response": "Of course, here is how. Wipe off the dust."},
    {"instruction": "Hang a picture.", "output": "Begin."},
    {"messages": [USER, {"role": "assistant", "content": "You can do it. Let me know how it goes!"}]},
    {"prompt": "How do I sew on a button?", "chosen": "Gladly.", "rejected": "Whatever."},
    {"messages": [USER, REPLY, USER, REPLY, USER, {"role": "assistant", "content": "Everybody knows that."}]},
]


@pytest.fixture
def build_conversations(build_sft, tiny_qwen2):
    """Make an SFT module and data of conversations, in their order."""

    def make(*, model=None, data=None):
        module, _ = build_sft(model=model)
        settings = {"val": CONVERSATIONS, "tokenizer": str(tiny_qwen2), "batch_size": 2, "seed": 3}
        return module, SFTDataModule(CONVERSATIONS, **settings | (data or {}))

    return make


@torch.no_grad()
def twin(module, batch) -> list[torch.Tensor]:
    """NLL of each learned token of each row by itself, float64, from the logits of the row alone."""
    policy = copy.deepcopy(module.policy.model).double()
    found = []
    for ids, real, learned in zip(batch.input_ids, batch.attention_mask, batch.response_mask, strict=True):
        row = ids[real]
        logits = policy(input_ids=row[None]).logits[0]
        logprobs = torch.log_softmax(logits, dim=-1)
        places = learned[real].nonzero().flatten().tolist()
        found.append(torch.stack([-logprobs[place - 1, row[place]] for place in places]))
    return found


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_the_loss_of_conversations_is_that_of_their_assistant_turns(build_conversations, trainer, layout):
    module, data = build_conversations(model={"layout": layout}, data={"eval_batch_size": 4})
    (metrics,) = trainer().validate(module, data, verbose=False)
    rows = [row for batch in data.val_dataloader() for row in twin(module, batch)]
    expected = torch.stack([row.mean() for row in rows]).mean().item()
    assert metrics["val/loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["val/perplexity"] == pytest.approx(torch.cat(rows).mean().exp().item(), rel=1e-6)
    assert metrics["val/lengths/chosen"] == pytest.approx(sum(map(len, rows)) / len(rows))
    whole = SFTDataModule([CONVERSATIONS[0]], val=[CONVERSATIONS[0]], tokenizer=data.tokenizer)
    turns = [message for message in CONVERSATIONS[0]["messages"] if message["role"] == "assistant"]
    whole.setup("validate")
    assert len(twin(module, next(iter(whole.val_dataloader())))[0]) == sum(
        len(whole.chat_format.token_ids([turn["content"]])[0]) + 1 for turn in turns
    )


def test_conversations_of_any_layout_train_the_same_weights(build_conversations, trainer):
    trained_weights = []
    for layout in ("padded", "packed", "shared"):
        module, data = build_conversations(model={"layout": layout}, data={"batch_size": 3})
        trainer(max_epochs=2, limit_val_batches=0).fit(module, data)
        trained_weights.append(weights(module))
    start, _ = build_conversations()
    start.configure_model()
    assert (trained_weights[0] - weights(start)).abs().max() > 1e-3
    for other in trained_weights[1:]:
        torch.testing.assert_close(other, trained_weights[0], rtol=0, atol=1e-5)


def test_a_run_on_conversations_resumes_exactly(build_conversations, trainer, tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module, data = build_conversations(data={"batch_size": 1})
    trainer(max_epochs=2, callbacks=[save], enable_checkpointing=True).fit(module, data)
    resumed, data = build_conversations(data={"batch_size": 1})
    run = trainer(max_epochs=2)
    run.fit(resumed, data, ckpt_path=tmp_path / "step=8.ckpt")
    assert run.global_step == 2 * len(CONVERSATIONS)
    assert torch.equal(weights(resumed), weights(module))


def test_predict_gives_the_log_probability_of_each_conversation(build_conversations, trainer, tmp_path):
    module, data = build_conversations(data={"eval_batch_size": 4})
    writer = PredictionWriter(str(tmp_path / "scores.jsonl"))
    trainer(callbacks=[writer]).predict(module, data)
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"example_id", "logprob"}] * len(CONVERSATIONS)
    expected = torch.zeros(len(lines)).double()
    for batch in data.test_dataloader():
        expected[batch.index] = torch.stack([-row.sum() for row in twin(module, batch)])
    assert [line["logprob"] for line in lines] == pytest.approx(expected.tolist(), abs=1e-3)


@pytest.mark.parametrize("kind", [DPO, RewardModel])
def test_conversations_are_no_data_of_what_learns_from_pairs(build_conversations, tiny_qwen2, kind):
    _, data = build_conversations()
    with pytest.raises(ConfigurationError, match="use PreferenceDataModule, not SFTDataModule"):
        kind(str(tiny_qwen2)).check_data(data)
