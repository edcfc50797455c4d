"""Loading a tokenizer; and whether two give the same ids, without which log-probs cannot be compared."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from rlhf_lightning.errors import ConfigurationError, ModelError, reason_of
from rlhf_lightning.files.adapters import adapter_base, adapters_alone
from rlhf_lightning.files.seals import check_seal
from rlhf_lightning.hub import use_cache_without_network
from rlhf_lightning.tiny import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    TokenizerSource: TypeAlias = str | PreTrainedTokenizerBase
else:
    TokenizerSource = str  # what a configuration can name

log = logging.getLogger(__name__)

_FILES = ("tokenizer*", "vocab*", "*.model")


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer by hub name or directory; with adapters that have none, that of their base model.

    Raises `ModelError` when there is none, or a damaged one.
    """
    from transformers import AutoTokenizer

    path = _tokenizer_place(name_or_path)
    check_seal(path, weights=False)
    if not Path(path).exists():
        use_cache_without_network()
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for the same mistake
        raise ModelError(
            f"{name_or_path}: no tokenizer could be loaded from it ({reason_of(error)}); give the hub name of one, or "
            "a directory with tokenizer.json and tokenizer_config.json"
        ) from error


def different_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that one of them lacks, or to which they give different ids."""
    mine, its = tokenizer.get_vocab(), other.get_vocab()
    if mine == its:
        return []
    return sorted(token for token in mine.keys() | its.keys() if mine.get(token) != its.get(token))


def has_tokenizer(model: str) -> bool:
    """Whether a model has a tokenizer beside it; transformers makes up an empty one from the kind of model else."""
    path = Path(_tokenizer_place(model)).expanduser()
    return not path.is_dir() or _has_files(path)


def _has_files(directory: Path) -> bool:
    return any(any(directory.glob(pattern)) for pattern in _FILES)


def _tokenizer_place(model: str) -> str:
    """The directory or hub name that the tokenizer of a model is loaded from."""
    while (adapters := adapters_alone(model)) is not None and not _has_files(adapters):
        model = adapter_base(adapters)
    return resolve_model(model)


def check_reference_tokenizer(
    reference: str, tokenizer: PreTrainedTokenizerBase, *, key: str = "reference", trust_remote_code: bool = False
) -> None:
    """Refuse a reference whose own tokenizer gives other ids than the policy's.

    Raises `ConfigurationError`, or `ModelError` where its tokenizer cannot be loaded; `key` names the setting.
    """
    if not has_tokenizer(reference):
        log.info("reference %s: it has no tokenizer, so only the size of its vocabulary was compared", reference)
        return
    try:
        other = load_tokenizer(reference, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from error
    if different := different_tokens(tokenizer, other):
        raise ConfigurationError(
            f"{key}: the tokenizer of {reference} gives other ids than that of the policy ({len(different)} tokens "
            f"differ, the first {different[0]!r}); give a model of the same tokenizer"
        )
