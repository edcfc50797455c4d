"""Loading of pretrained backbones, and the arguments of their forward pass.

R rows, T tokens.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.errors import ModelError
from rlhf_lightning.functional.shapes import at_least_float32
from rlhf_lightning.hub import use_cache_without_network
from rlhf_lightning.models.packed_attention import PACKED, packed_hidden_states, register
from rlhf_lightning.tiny import resolve_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

AttentionImplementation = Literal["eager", "sdpa", "flash_attention_2", "flex_attention", "packed"]
"""`packed` lays the rows of a batch end to end, so that nothing is computed on padding; the others are those of
transformers."""

# Position embeddings of the RoBERTa family begin after the padding index.
_POSITION_OFFSET_FAMILY = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "xlm-roberta-xl", "mpnet")


def load_config(name_or_path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model by hub name or directory, with dropout off.

    Raises `ModelError` when there is no model, or it is of a kind that has no one hidden state per token.
    """
    from transformers import AutoConfig

    path = resolve_model(name_or_path)
    if _is_local(path) and not (Path(path) / "config.json").is_file():
        what = "a directory without a config.json, so no model" if Path(path).is_dir() else "no directory here"
        if (Path(path) / "adapter_config.json").is_file():
            what = "LoRA adapters alone; export their checkpoint with --merge true"
        raise ModelError(f"{name_or_path}: {what}; give a Hugging Face model directory or the name of a hub model")
    if not Path(path).exists():
        use_cache_without_network()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for the same mistake
        raise ModelError(f"{name_or_path}: no model could be found under this name ({reason_of(error)})") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name_or_path}: an encoder-decoder model ({config.model_type}); use a decoder or an encoder")
    switch_dropout_off(config)
    config.use_cache = False
    return config


def load_backbone(
    name_or_path: str,
    *,
    attn_implementation: AttentionImplementation | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A pretrained transformer without head, float32, in train mode, dropout off.

    float32 because these are the master weights: mixed precision is the Trainer's business. Raises `ModelError`.
    """
    from transformers import AutoModel

    config = load_config(name_or_path, trust_remote_code=trust_remote_code)
    return load_weights(
        AutoModel,
        name_or_path,
        config,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        **no_pooler(config),
    )


def load_weights(
    auto_class: type,
    name_or_path: str,
    config: PretrainedConfig,
    *,
    attn_implementation: AttentionImplementation | None = None,
    trust_remote_code: bool = False,
    **arguments: Any,
) -> PreTrainedModel:
    """The model that `auto_class` makes of a directory or hub name, float32, in train mode.

    Raises `ModelError` when the weights cannot be loaded or some are missing.
    """
    check_attention(attn_implementation)
    if attn_implementation == PACKED:
        register()
    # Its report calls a head's weights unexpected and tells of missing ones; the former are meant, the latter refused.
    report = logging.getLogger("transformers.modeling_utils")
    level = report.level
    report.setLevel(logging.ERROR)
    try:
        model, info = auto_class.from_pretrained(
            resolve_model(name_or_path),
            config=config,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **arguments,
        )
    except Exception as error:
        raise ModelError(f"{name_or_path}: its weights could not be loaded ({reason_of(error)})") from error
    finally:
        report.setLevel(level)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{name_or_path}: {len(missing)} weights of a {config.model_type} model are not in its files, the first "
            f"{missing[0]}; they would stay random. Give the directory or name of a whole model"
        )
    if attn_implementation == PACKED:
        _check_packing(model.base_model, name_or_path)
    return model.train()


def check_attention(attn_implementation: AttentionImplementation | None) -> None:
    """Refuse an attention implementation that this machine does not have. Raises `ModelError`."""
    from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

    available = {"flash_attention_2": is_flash_attn_2_available, "flex_attention": is_torch_flex_attn_available}
    needed = {"flash_attention_2": "the package flash_attn and an NVIDIA or AMD GPU", "flex_attention": "torch 2.5"}
    if attn_implementation in available and not available[attn_implementation]():
        raise ModelError(
            f"attn_implementation: {attn_implementation} needs {needed[attn_implementation]}, not found here; use sdpa"
        )


def hidden_states(backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden state of each token, [R, T, H].

    `input_ids` [R, T] int64; `attention_mask` [R, T] bool, True on tokens. Positions are counted over the mask, so that
    padding on either side changes nothing.
    """
    (last,) = _states(backbone, input_ids, attention_mask, every_layer=False)
    return last


def layer_states(backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """Hidden states of each token after the embeddings and after every layer, each [R, T, H], at least float32.

    Arguments as for `hidden_states`. The states of a token have mean 0 and variance 1 over their H entries
    (`layer_norm`): those of a decoder's layers differ a hundredfold in size.
    """
    return normalised(_states(backbone, input_ids, attention_mask, every_layer=True))


def normalised(states: Iterable[Tensor]) -> list[Tensor]:
    """Each of the states [..., H] with mean 0 and variance 1 over its H entries, at least float32."""
    return [F.layer_norm(at_least_float32(state), state.shape[-1:]) for state in states]


def _states(
    backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, *, every_layer: bool
) -> tuple[Tensor, ...]:
    position_ids = None
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0) + _position_offset(backbone.config)
    if backbone.config._attn_implementation == PACKED:
        return packed_hidden_states(backbone, input_ids, attention_mask, position_ids, every_layer=every_layer)
    arguments: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
    if every_layer:
        arguments["output_hidden_states"] = True
    output = backbone(input_ids=input_ids, attention_mask=attention_mask.long(), **arguments)
    return output.hidden_states if every_layer else (output.last_hidden_state,)


def max_positions(config: PretrainedConfig) -> int | None:
    """Longest row that the backbone has positions for, or None when it says nothing of a limit."""
    limit = getattr(config, "max_position_embeddings", None)
    return None if limit is None else limit - _position_offset(config)


def switch_dropout_off(config: PretrainedConfig) -> None:
    """Set every dropout rate of a configuration to 0.

    Dropout makes the score of a response a random number in training, and two passes over one pair differ.
    """
    for name, value in list(vars(config).items()):
        if ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)


@torch.no_grad()
def _check_packing(backbone: PreTrainedModel, name: str) -> None:
    """Raise `ModelError` when a model's rows are not the same packed as alone, measured on a few tokens."""
    ids = torch.arange(12, device=backbone.device).view(2, 6) % backbone.config.get_text_config().vocab_size
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3], device=ids.device)
    packed = hidden_states(backbone, ids, mask)
    for row, length in enumerate((6, 3)):
        alone = hidden_states(backbone, ids[row : row + 1, :length], mask[row : row + 1, :length])[0]
        if not (packed[row, :length] - alone).abs().max() <= 1e-5 * alone.abs().max():
            raise ModelError(
                f"{name}: the rows of a {backbone.config.model_type} model see each other when they are packed; use "
                "attn_implementation: sdpa"
            )


def _position_offset(config: PretrainedConfig) -> int:
    return config.pad_token_id + 1 if config.model_type in _POSITION_OFFSET_FAMILY else 0


def no_pooler(config: PretrainedConfig) -> dict[str, bool]:
    """BERT's pooler reads the first token and would be left without a gradient, which DDP refuses."""
    from transformers import AutoModel

    model_class = AutoModel._model_mapping.get(type(config), None)
    model_class = model_class[0] if isinstance(model_class, tuple | list) else model_class
    takes_it = model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if takes_it else {}


def _is_local(path: str) -> bool:
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1


def reason_of(error: BaseException) -> str:
    """The first line of an error, for use inside another one."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
