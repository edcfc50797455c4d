"""Which model is the reference of a policy, and whether it may be."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.functional.losses import REFERENCE_FREE_LOSSES
from rlhf_lightning.models.backbones import reason_of
from rlhf_lightning.tiny import resolve_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FROZEN, ADAPTER = "frozen", "adapter"

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")


def choose_reference(
    given: str | None, backbone: str, loss_type: str, *, adapters: bool, quantization: str | None
) -> str | None:
    """`adapter`, the directory or name of the model to freeze, or None for a loss without a reference.

    Raises `ConfigurationError` when the settings contradict each other.
    """
    if loss_type in REFERENCE_FREE_LOSSES:
        if given is not None:
            raise ConfigurationError(
                f"model.reference: the loss {loss_type} has no reference; leave the key out (null)"
            )
        return None
    chosen = given or (ADAPTER if adapters else FROZEN)
    if chosen == ADAPTER and not adapters:
        raise ConfigurationError(
            "model.reference: adapter is the policy without its adapters, and there are none; give model.lora, or "
            "reference: frozen"
        )
    if chosen == FROZEN and quantization is not None:
        raise ConfigurationError(
            f"model.reference: frozen would be a copy without the policy's {quantization} quantization, so another "
            "model; use reference: adapter"
        )
    return backbone if chosen == FROZEN else chosen


def check_reference_config(reference: str, its: PretrainedConfig, backbone: str, own: PretrainedConfig) -> None:
    """Refuse a reference of another kind of model or another vocabulary. Raises `ConfigurationError`."""
    for what in ("model_type", "vocab_size"):
        mine, other = (getattr(config.get_text_config(), what) for config in (own, its))
        if mine != other:
            raise ConfigurationError(
                f"model.reference: {reference} has {what} {other}, but {backbone} has {mine}; their log-probs cannot "
                "be compared. Give a model of the same architecture and tokenizer"
            )


def check_reference_tokenizer(reference: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a reference whose own tokenizer gives other ids. Raises `ConfigurationError` or `ModelError`."""
    from transformers import AutoTokenizer

    path = Path(resolve_model(reference)).expanduser()
    if path.is_dir() and not any(any(path.glob(pattern)) for pattern in _TOKENIZER_FILES):
        # transformers would make up an empty tokenizer from the kind of model.
        log.info("reference %s: no tokenizer beside it, so only the size of its vocabulary was compared", reference)
        return
    try:
        other = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else reference)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for the same mistake
        raise ModelError(f"model.reference: {reference} has no tokenizer that loads ({reason_of(error)})") from error
    mine, its = tokenizer.get_vocab(), other.get_vocab()
    if mine != its:
        different = sorted(token for token in mine.keys() | its.keys() if mine.get(token) != its.get(token))
        raise ConfigurationError(
            f"model.reference: the tokenizer of {reference} gives other ids than that of the policy ({len(different)} "
            f"tokens differ, the first {different[0]!r}); give a model of the same tokenizer"
        )
