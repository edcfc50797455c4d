"""Replies in TensorBoard: those of the policy, and a run that does not notice them."""

from __future__ import annotations

import re

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.models.slot_engine import greedy_responses
from rlhf_lightning.training.media import cell
from rlhf_lightning.training.samples import Samples


def tables(logger) -> dict[int, list[list[str]]]:
    """The rows of each table, by step."""
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0})
    events.Reload()
    found = {}
    for event in events.Tensors("samples/text_summary"):
        lines = event.tensor_proto.string_val[0].decode().splitlines()
        found[event.step] = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return found


@pytest.fixture
def sampled(build_dpo, trainer, tmp_path):
    def run(samples, *, model=None, **settings):
        logger = TensorBoardLogger(tmp_path / "logs", name="run")
        module, datamodule = build_dpo(model=model)
        trainer(logger=logger, callbacks=samples, log_every_n_steps=1, **settings).fit(module, datamodule)
        return module, logger

    return run


@pytest.mark.parametrize("model", [{}, {"lora": {"r": 4}, "optimizer": torch.optim.SGD}], ids=["whole", "adapters"])
def test_replies_stand_beside_the_first_ones_and_change_nothing(sampled, model):
    module, logger = sampled([Samples(every_n_steps=2, prompts=3, max_new_tokens=6)], model=model, max_epochs=1)
    found = tables(logger)
    assert list(found) == [0, 2, 4, 6]
    for step, rows in found.items():
        assert [cell.strip() for cell in rows[0]] == ["prompt", "at the start", "now"]
        assert len(rows) == 2 + 3
        assert [row[:2] for row in rows[2:]] == [row[:2] for row in found[0][2:]]
        assert "&lt;\\|im\\_start\\|&gt;user" in rows[2][0]
        assert all(row[2].endswith("\\[truncated\\] ") or "im\\_end" in row[2] for row in rows[2:])
        if step == 0:
            assert all(row[1] == row[2] for row in rows[2:])
    without, _ = sampled([], model=model, max_epochs=1)
    assert torch.equal(parameters(module), parameters(without))


def parameters(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_a_resumed_run_compares_with_the_replies_of_its_beginning(build_dpo, trainer, tmp_path):
    save = ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=2)
    module, datamodule = build_dpo()
    first = Samples(prompts=2, max_new_tokens=4)
    logger = TensorBoardLogger(tmp_path / "logs", name="run")
    trainer(logger=logger, callbacks=[first, save], enable_checkpointing=True, max_steps=2).fit(module, datamodule)
    module, datamodule = build_dpo(model={"optimizer": lambda p: torch.optim.SGD(p, lr=1.0)})
    second = Samples(prompts=2, max_new_tokens=4)
    run = trainer(logger=logger, callbacks=[second], max_steps=4)
    run.fit(module, datamodule, ckpt_path=save.best_model_path)
    assert second._first == first._first


@torch.no_grad()
def test_greedy_responses_are_the_argmax_token_by_token_up_to_the_terminator(build_dpo, trainer):
    module, datamodule = build_dpo()
    trainer().validate(module, datamodule, verbose=False)
    policy, model = module.policy.train(), module.policy.model
    prompts = [torch.tensor(ids) for ids in ([5, 6, 7], [300, 8, 9, 10, 11])]

    def continued(prompt, eos):
        ids = prompt.tolist()
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == eos:
                break
        return ids[len(prompt) :]

    free = [continued(prompt, None) for prompt in prompts]
    eos = free[0][3]
    expected = [continued(prompt, eos) for prompt in prompts]
    replies = greedy_responses(policy, prompts, max_new_tokens=8, eos_id=eos, pad_id=0)
    assert [reply.tolist() for reply in replies] == expected
    assert len(expected[0]) <= 4
    assert policy.training


def test_a_module_without_a_policy_is_refused(build, trainer):
    with pytest.raises(ConfigurationError, match="a RewardModel has no policy that could answer"):
        trainer(callbacks=[Samples()]).fit(*build())


def test_a_cell_holds_any_text():
    assert cell("<b>|a|*x*\nb</b>") == "&lt;b&gt;\\|a\\|\\*x\\*<br>b&lt;/b&gt;"
