"""The value of a state: what reward is to come, read off the hidden state before each response token.

R rows, T tokens, N response tokens of all rows together, H hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lightning.batches import Layout
from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.backbones import AttentionImplementation
from rlhf_lightning.models.configuration import load_config
from rlhf_lightning.models.reward_network import Head, RewardHead, RewardNetwork, is_reward_network, pooling_of
from rlhf_lightning.models.states import token_states

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class ValueNetwork(nn.Module):
    """A transformer of its own with a head: a trainable copy of a reward network, or a language model's backbone.

    A head that is new begins at 0 everywhere, as is usual for a value model that begins as a policy.
    """

    def __init__(self, network: RewardNetwork) -> None:
        super().__init__()
        self.network = network

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PreTrainedModel,
        *,
        attn_implementation: AttentionImplementation | None = None,
        layout: Layout = "padded",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> ValueNetwork:
        """Of a saved reward network, with its head, or of any model with a new head. Raises `ModelError`.

        The head is new, too, where that of the reward network reads more than the state of a token (`layers`).
        """
        options: dict[str, Any] = {"attn_implementation": attn_implementation, "layout": layout}
        options["trust_remote_code"] = trust_remote_code
        if isinstance(name_or_path, str) and has_head_for_tokens(
            load_config(name_or_path, trust_remote_code=trust_remote_code)
        ):
            network = RewardNetwork.from_pretrained(name_or_path, **options).train()
            for layer in network.score.modules():
                if isinstance(layer, nn.Dropout):
                    layer.p = 0.0
        else:
            network = RewardNetwork.from_backbone(name_or_path, **options)
            zero_last_layer(network.score)
        if gradient_checkpointing:
            network.backbone.activation_checkpointing_enable()
        return cls(network)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
        """Values [N], float32, of the states before the response tokens, row by row.

        `input_ids` [R, T] int64; `attention_mask`, `response_mask` [R, T] bool, as `CausalLM.states` takes them.
        """
        before = F.pad(response_mask[:, 1:] & attention_mask[:, :-1], (0, 1)).flatten().nonzero().squeeze(1)
        return self.network.score(token_states(self.network.backbone, input_ids, attention_mask, before))

    def save_pretrained(self, directory: str | Path) -> Path:
        """As `RewardNetwork.save_pretrained`, from which a later run can begin."""
        return self.network.save_pretrained(directory)


def value_source(
    given: str | None, *, reward_model: str | None, backbone: str, policy: PretrainedConfig, trust_remote_code: bool
) -> str:
    """What a value model begins as: the given model, else a reward network like the policy, else the policy's backbone.

    `reward_model` is one of the policy's tokenizer. Raises `ModelError` for a given model of other token ids.
    """
    if given is None:
        if reward_model is None:
            return backbone
        config = load_config(reward_model, trust_remote_code=trust_remote_code)
        alike = is_reward_network(config) and config.model_type == policy.model_type
        return reward_model if alike else backbone
    config = load_config(given, trust_remote_code=trust_remote_code)
    its, own = (each.get_text_config().vocab_size for each in (config, policy))
    if its != own:
        raise ModelError(
            f"model.value_model: {given} knows {its} token ids, and the policy {own}; give a model of the policy's "
            "tokenizer"
        )
    return given


def has_head_for_tokens(config: PretrainedConfig) -> bool:
    """Whether a configuration is that of a reward network whose head is as wide as a token's state, so can read one."""
    return pooling_of(config) in ("last", "mean")


def zero_last_layer(head: Head) -> None:
    """Let a head begin with the value 0 for every state."""
    last = head[-1] if isinstance(head, RewardHead) else head
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
