"""A linear reward head, as the decoders of transformers have it in their `*ForSequenceClassification`.

H hidden size.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.configuration import max_positions
from rlhf_lightning.models.row_check import exact_arithmetic, probe_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


_ROUNDING = 1e-4
"""Share of the largest possible score by which two ways of computing one may differ."""


class LinearHead(nn.Linear):
    """One linear layer without bias, `weight` [1, H], computed in float32.

    Begins with standard deviation 1/sqrt(H + 1) (Stiennon et al. 2020, arXiv 2009.01325, and its code).
    """

    def __init__(self, input_size: int) -> None:
        super().__init__(input_size, 1, bias=False)
        self.settings = {"head": "linear"}
        nn.init.normal_(self.weight, std=(input_size + 1) ** -0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores [...] float32 of hidden states [..., H]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float()).squeeze(-1)


def classifier_without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """The `*ForSequenceClassification` with one label of a configuration, on torch's meta device.

    Raises `ModelError` where transformers has none, or where it is more than a backbone and a linear `score`.
    """
    from transformers import AutoModelForSequenceClassification

    advice = "use model.head: mlp, which transformers loads with trust_remote_code=True"
    found = AutoModelForSequenceClassification._model_mapping.get(type(config), None)
    if found is None:
        raise ModelError(
            f"model.head: linear is what transformers' own *ForSequenceClassification computes, and it has none for "
            f"{config.model_type} models; {advice}"
        )
    own = copy.deepcopy(config)
    own.num_labels = 1
    with torch.device("meta"):
        model = found(own)
    others = {name for name in model.state_dict() if not name.startswith(f"{model.base_model_prefix}.")}
    if others != {"score.weight"}:
        raise ModelError(
            f"model.head: linear is a layer on the last token's state, and {found.__name__} of transformers reads its "
            f"score by other layers ({', '.join(sorted(others)[:3])}); {advice}"
        )
    return model


def check_classifier(backbone: PreTrainedModel, head: LinearHead) -> None:
    """Raise `ModelError` where transformers' own class, with these weights, gives a row another score.

    And as `classifier_without_weights` does.
    """
    model = classifier_without_weights(backbone.config)
    setattr(model, model.base_model_prefix, backbone)
    model.score = nn.Linear(head.in_features, 1, bias=False, device="meta")
    model.score.weight = head.weight
    model.config.get_text_config().pad_token_id = None  # of one row, the last token
    positions = max_positions(backbone.config.get_text_config())
    row = probe_of(backbone.config, positions=positions, device=backbone.device).rows[0][None]
    training = backbone.training
    try:
        with exact_arithmetic():
            theirs = model.eval()(input_ids=row).logits
            last = backbone(input_ids=row).last_hidden_state[:, -1]
    finally:
        backbone.train(training)
    if not (theirs - head(last)).abs() <= _ROUNDING * last.norm() * head.weight.norm():
        raise ModelError(
            f"model.head: linear is a layer on the last token's state, and {type(model).__name__} of transformers "
            "gives a row another score; use model.head: mlp"
        )
