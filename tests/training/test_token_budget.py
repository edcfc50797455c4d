"""Training on batches by a number of tokens."""

from __future__ import annotations

import pytest
import torch

from rlhf_lightning.errors import ConfigurationError


def test_training_by_tokens_weighs_pairs_as_training_by_rows_does(build_dpo, trainer):
    """A step on all pairs at once, and one on two batches of other sizes, of equal tokens."""
    trained = []
    for data, accumulate in (({"batch_size": 11}, 1), ({"tokens_per_batch": BUDGET}, 2)):
        module, datamodule = build_dpo(data=data)
        run = trainer(max_steps=1, limit_val_batches=0, accumulate_grad_batches=accumulate)
        run.fit(module, datamodule)
        trained.append(torch.cat([each.detach().flatten() for each in module.policy.parameters()]))
    batches = list(datamodule.train_dataloader())
    assert len({len(batch.index) for batch in batches}) == 2
    assert datamodule.state_dict()["train_loader"]["data.tokens_per_batch"] == BUDGET
    start, _ = build_dpo()
    start.configure_model()
    before = torch.cat([each.detach().flatten() for each in start.policy.parameters()])
    assert (trained[0] - before).abs().max() > 1e-3
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=1e-5)


def test_padded_rows_have_no_budget(build_dpo, trainer):
    module, datamodule = build_dpo(model={"layout": "padded"}, data={"tokens_per_batch": BUDGET})
    with pytest.raises(ConfigurationError, match="padded"):
        trainer().fit(module, datamodule)


BUDGET = 1000
