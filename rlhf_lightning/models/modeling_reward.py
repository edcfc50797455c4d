"""A reward model of rlhf_lightning, for transformers: a backbone, and a small MLP that reads one number off its states.

Lies beside the weights and is run where `trust_remote_code=True` is given:
`AutoModelForSequenceClassification.from_pretrained(DIRECTORY, trust_remote_code=True)`. Needs torch and transformers
alone. `rlhf_lightning` itself neither runs it nor needs it.

R rows, T padded tokens, H hidden size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

STOP = (
    "this is a reward model of rlhf_lightning, whose head no class of transformers has; load it by "
    "AutoModelForSequenceClassification.from_pretrained(..., trust_remote_code=True), see its README.md"
)
"""Stands in config.json as `transformers_weights`, where transformers' own classes stop with this sentence: they would
load, with a head of random numbers."""
_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU, "gelu": nn.GELU}


class _Head(nn.Sequential):
    """Scores [R, 1] of what is read of each row, [R, H] or [R, (layers + 1) H]; in float32, under autocast too.

    A module that is called whole, since peft puts another one around it.
    """

    def forward(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            x = states.float()
            for layer in self:
                x = F.linear(x, layer.weight.float(), layer.bias.float()) if isinstance(layer, nn.Linear) else layer(x)
        return x


class RewardModelForSequenceClassification(PreTrainedModel):
    """`logits` [R, 1], float32, are the scores: not probabilities, and no sigmoid belongs on them.

    Tokens are found by the attention mask, so padding may be on either side.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: Any) -> None:
        backbone = AutoModel.from_config(config)
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None  # reads the first token alone, and was not trained
        super().__init__(config)
        self.base_model_prefix = backbone.base_model_prefix or "model"
        setattr(self, self.base_model_prefix, backbone)
        settings = config.reward_head
        self.pooling = settings["pooling"]
        width = config.get_text_config().hidden_size
        inputs = width * (config.get_text_config().num_hidden_layers + 1 if self.pooling == "layers" else 1)
        dropout = [nn.Dropout(settings["dropout"])] if settings["dropout"] > 0 else []
        self.score = _Head(
            nn.Linear(inputs, settings["hidden_size"]),
            _ACTIVATIONS[settings["activation"]](),
            *dropout,
            nn.Linear(settings["hidden_size"], 1),
        )
        self.post_init()

    @classmethod
    def from_pretrained(cls, directory: Any, *arguments: Any, config: Any = None, **options: Any) -> Any:
        """As transformers' own, past the sentence that stops every other class."""
        config = config or AutoConfig.from_pretrained(directory)
        config.transformers_weights = None
        return super().from_pretrained(directory, *arguments, config=config, **options)

    def save_pretrained(self, directory: Any, *arguments: Any, **options: Any) -> Any:
        """As transformers' own, with the sentence that stops every other class."""
        saved = super().save_pretrained(directory, *arguments, **options)
        file = Path(directory) / "config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings["transformers_weights"] = STOP
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return saved

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> SequenceClassifierOutput:
        """Scores of rows: `input_ids` and `attention_mask` [R, T]. Other arguments, such as token types, are not read.

        Raises `ValueError` for several rows without a mask, and for rows longer than the model scores right in batches.
        """
        if attention_mask is None:
            if len(input_ids) > 1:
                raise ValueError("attention_mask: not given, and without it padding cannot be told from tokens")
            attention_mask = torch.ones_like(input_ids)
        longest = self.config.reward_rows["longest"]
        if longest is not None and input_ids.shape[1] > longest:
            raise ValueError(
                f"input_ids: {input_ids.shape[1]} tokens, and beyond {longest} the rotary frequencies of this model go "
                "by the longest row of a batch; load it with rlhf_lightning's RewardNetwork"
            )
        states = self._states(input_ids, attention_mask)
        with torch.autocast(input_ids.device.type, enabled=False):
            pooled = self._pooled(states, attention_mask.bool())
        return SequenceClassifierOutput(logits=self.score(pooled))

    def _states(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Hidden states [R, T, H]: the last, or those of the embeddings and of every layer."""
        options: dict[str, Any] = {"output_hidden_states": True} if self.pooling == "layers" else {}
        first = self.config.reward_rows["first_position"]
        if first is not None:
            options["position_ids"] = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0) + first
        backbone = getattr(self, self.base_model_prefix)
        output = backbone(input_ids=input_ids, attention_mask=attention_mask.long(), **options)
        return output.hidden_states if self.pooling == "layers" else (output.last_hidden_state,)

    def _pooled(self, states: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        """What the head reads of each row, [R, H] or [R, (layers + 1) H], float32."""
        if self.pooling == "last":
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=-1)
            return states[0][torch.arange(len(mask), device=mask.device), last].float()
        found = [state.float() for state in states]
        if self.pooling == "layers":
            found = [F.layer_norm(state, state.shape[-1:]) for state in found]
        total = mask.sum(dim=-1, keepdim=True)
        return torch.cat([torch.where(mask[..., None], state, 0).sum(dim=1) / total for state in found], dim=-1)
