"""Sequence classifiers of transformers: loading, and where their scores are read.

R rows, T padded tokens, L labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_lightning.batches import Layout
from rlhf_lightning.errors import ModelError, reason_of
from rlhf_lightning.models.backbones import load_weights
from rlhf_lightning.models.configuration import max_positions
from rlhf_lightning.models.row_check import (
    check_attention_type,
    check_rows,
    difference,
    exact_arithmetic,
    probe_of,
    rounding,
)
from rlhf_lightning.models.states import last_states

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_classifier(
    name_or_path: str, config: PretrainedConfig, *, layout: Layout = "padded", trust_remote_code: bool = False
) -> PreTrainedModel:
    """An `AutoModelForSequenceClassification` with all its weights, float32, in eval mode, without gradients.

    `config` is that of `load_config`. Raises `ModelError` when weights are missing, the head's too, and when the scores
    of a row change with its padding or with the rows beside it.
    """
    from transformers import AutoModelForSequenceClassification

    model = load_weights(AutoModelForSequenceClassification, name_or_path, config, trust_remote_code=trust_remote_code)
    model = model.eval().requires_grad_(False)
    if token_head(model) is not None:
        check_rows(model.base_model, name_or_path, layout)
    check_attention_type(config, name_or_path)
    _check_scores(model, name_or_path)
    return model


def token_head(model: nn.Module) -> nn.Module | None:
    """The layer that reads scores off the last token's state in a decoder; None where the model pools by itself.

    A decoder's own pooling finds the last token by the pad id, which may be that of a true token.
    """
    return getattr(model, "score", None)


def _check_scores(model: PreTrainedModel, name: str) -> None:
    """Compare the scores of rows padded on the right with those that the model itself gives each row alone."""
    config = model.config

    def alone(row: Tensor) -> Tensor:
        return model(input_ids=row[None]).logits

    try:
        probe = probe_of(config, positions=max_positions(config.get_text_config()), device=model.device)
        head, ids, mask = token_head(model), probe.ids[[0, 2]], probe.mask[[0, 2]]
        with exact_arithmetic():
            expected = torch.cat([alone(row) for row in probe.rows])
            noise = rounding(model, lambda: torch.cat([alone(row) for row in probe.rows]), expected)
            if head is None:
                found = model(input_ids=ids, attention_mask=mask.long()).logits
            else:
                found = head(last_states(model.base_model, ids, mask))
            change = difference(found, expected)
    except Exception as error:  # an architecture that wants other input may raise anything
        raise ModelError(
            f"{name}: a {config.model_type} classifier that does not run on rows of tokens ({reason_of(error)})"
        ) from error
    if not change <= noise:
        raise ModelError(
            f"{name}: the scores of a {config.model_type} classifier for a row of tokens change with its padding and "
            f"other rows of the batch (by {change:.2g} of their size); use another model"
        )
