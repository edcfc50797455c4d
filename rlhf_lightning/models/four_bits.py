"""QLoRA's 4-bit weights (Dettmers et al. 2023, arXiv 2305.14314): how they are asked for, and made whole again."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import ModelError
from rlhf_lightning.files.adapters import adapters_alone

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_four_bits(backbone: str | PreTrainedModel, load_in_4bit: bool) -> None:
    """Refuse 4-bit weights below adapters that are to be merged into them. Raises `ModelError`."""
    if load_in_4bit and isinstance(backbone, str) and adapters_alone(backbone) is not None:
        raise ModelError(
            f"model.load_in_4bit: the adapters of {backbone} cannot be merged into 4-bit weights without rounding; "
            "merge them first (CausalLM.from_pretrained(DIR).save_pretrained(OUT)), and give that directory"
        )


def four_bits() -> Any:
    """The quantization of QLoRA, for transformers. Raises `ModelError` without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("model.load_in_4bit: the package bitsandbytes is not installed; pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    half = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=half
    )


def is_quantized(model: nn.Module) -> bool:
    """Whether a model holds weights in 4 bits."""
    return bool(getattr(model, "is_quantized", False))


def dequantized(weight: Tensor) -> Tensor:
    """What the 4-bit numbers of a weight stand for, in the shape and dtype that it had; any other weight as it is."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def with_whole_weights(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> PreTrainedModel:
    """A model of the same class and settings, not quantized, of these weights on the CPU, in the embeddings' dtype."""
    dtype = model.get_input_embeddings().weight.dtype
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        made = type(model)(config)
    made.load_state_dict({name: weight.to("cpu", dtype) for name, weight in weights}, assign=True)
    made.tie_weights()
    made.generation_config = model.generation_config
    return made
