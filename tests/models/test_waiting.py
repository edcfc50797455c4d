"""How often a pass makes an accelerator's host wait: operations whose result is as large as numbers in memory say."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_lightning.models.causal_lm import CausalLM, Lora
from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.models.value_network import ValueNetwork
from tests.models.test_causal_lm import padded, rows

aten = torch.ops.aten
SIZED_BY_NUMBERS = (
    *(aten.nonzero.default, aten.masked_select.default, aten.masked_scatter_backward.default),
    *(aten._unique2.default, aten.repeat_interleave.Tensor),
)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Waits(TorchDispatchMode):
    """The names of such operations, forward and backward, in their order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function in INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1])
        if function in SIZED_BY_NUMBERS or by_mask:
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def waits(run) -> list[str]:
    with Waits() as seen:
        run().float().sum().backward()
    return seen.names


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("lora", [None, Lora(r=4)])
def test_a_pass_of_a_policy_waits_once_for_its_number_of_response_tokens(tiny_qwen2, layout, lora):
    policy, batch = CausalLM.from_pretrained(str(tiny_qwen2), layout=layout, lora=lora), padded(rows())
    assert waits(lambda: policy(*batch).sums) == ["aten::nonzero"]
    value = ValueNetwork.from_pretrained(str(tiny_qwen2), layout=layout)
    assert waits(lambda: value(*batch)) == ["aten::nonzero"]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_a_pass_of_a_reward_model_waits_for_nothing(tiny_qwen2, layout):
    network, (ids, mask, _) = RewardNetwork.from_backbone(str(tiny_qwen2), layout=layout), padded(rows())
    assert waits(lambda: network(ids, mask)) == []
