"""A few fixed tokens by whose outputs two copies of a model are compared; run as a program, the copy on disk.

python -m rlhf_lightning.models.probe DIRECTORY FILE.safetensors [trust] [4bit] [packed|shared]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_lightning.batches import Layout

_ROWS, _TOKENS = 2, 16


def probe_rows(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (bool), both [2, 16]: arbitrary ids, the second row half padding."""
    ids = torch.randint(vocab_size, (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, _TOKENS // 2 :] = False
    return ids, mask


@torch.no_grad()
def log_probs(model: nn.Module, vocab_size: int) -> Tensor:
    """Log-probabilities of the whole vocabulary after each token of the probe, nats, [24, V] float32."""
    ids, mask = probe_rows(vocab_size)
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    return logits.float().log_softmax(-1)[mask]


@torch.no_grad()
def main(directory: str, file: str, *options: str) -> None:
    """Load a directory as a user would, and write its log-probs or scores on the probe as `outputs`.

    With the option `trust` code that comes with the model is run; with `4bit` its weights are held as QLoRA's; with
    `packed` or `shared` the rows of a reward network lie so.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf_lightning.models.four_bits import four_bits
    from rlhf_lightning.models.reward_network import RewardNetwork, is_reward_network

    trust = "trust" in options
    adapters_alone = (Path(directory) / "adapter_config.json").is_file()
    config = None if adapters_alone else AutoConfig.from_pretrained(directory, trust_remote_code=trust)
    if config is not None and is_reward_network(config):
        layout: Layout = next((each for each in ("packed", "shared") if each in options), "padded")
        network = RewardNetwork.from_pretrained(directory, layout=layout, trust_remote_code=trust)
        outputs = network(*probe_rows(config.vocab_size))
    else:
        settings = {"quantization_config": four_bits()} if "4bit" in options else {}
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, trust_remote_code=trust, **settings
        )
        outputs = log_probs(model.eval(), model.config.get_text_config().vocab_size)
    save_file({"outputs": outputs.contiguous()}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
