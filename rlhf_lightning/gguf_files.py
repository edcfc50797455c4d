"""Models in GGUF files, the format of llama.cpp: found by name, and converted once to a directory of transformers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.errors import ModelError, reason_of
from rlhf_lightning.files.model_cache import cached_model
from rlhf_lightning.files.seals import file_hash
from rlhf_lightning.terminal import silenced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_SUFFIX = ".gguf"
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
"""Ends the names of llama.cpp's split files."""
_OTHER_MODELS = ("adapter_config.json", "*.safetensors", "pytorch_model*.bin")
_TEXT = " A word,  two; <|im_start|>user\n\t1234.5 é 漢字 🙂 don't"
"""Of which a tokenizer that was written has to give the ids of the one in the GGUF file."""


def gguf_file(name: str) -> Path | None:
    """The GGUF file that a name stands for: that file, or a directory with this one and no other model; else None.

    Raises `ModelError` where there are several, or one that is a part of a model, or the file is not there.
    """
    path = Path(name).expanduser()
    if path.suffix == _SUFFIX:
        if path.is_file():
            _check_whole(path)
            return path
        if not path.is_dir():
            raise ModelError(f"{name}: no such file; give a GGUF file, or a directory with one")
    if not path.is_dir() or any(any(path.glob(pattern)) for pattern in _OTHER_MODELS):
        return None
    files = sorted(path.glob(f"*{_SUFFIX}"))
    for file in files[:1]:
        _check_whole(file)
    if len(files) > 1:
        raise ModelError(
            f"{name}: holds {len(files)} GGUF files; give one of them: {', '.join(each.name for each in files[:4])}"
        )
    return files[0] if files else None


def _check_whole(file: Path) -> None:
    if part := _PART.search(file.name):
        whole = file.name.removesuffix(part[0]) + _SUFFIX
        raise ModelError(
            f"{file}: one of {int(part[1])} parts of a model; join them with llama.cpp's `llama-gguf-split --merge "
            f"{file.name.removesuffix(part[0])}-00001-of-{part[1]}{_SUFFIX} {whole}`, and give {whole}"
        )


def converted(file: Path) -> str:
    """The directory in the cache with the model of a GGUF file, float32, and its tokenizer; made once.

    Named by the file's bytes and the version of transformers. Raises `ModelError` without the package gguf, and where
    transformers cannot read the file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{file}: a GGUF file needs the package gguf; pip install 'rlhf-lightning[gguf]'")
    version = importlib.metadata.version("transformers")
    return cached_model(f"{file.stem[:60]}-{file_hash(file)[:12]}-{version}", lambda made: convert(file, made))


def convert(file: Path, directory: Path) -> None:
    """Write the model of a GGUF file, float32, and its tokenizer as a plain directory of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    log.info("%s: is converted to float32 safetensors, once", file)
    try:
        with silenced("transformers.modeling_utils"):
            model, info = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),  # else it could not be saved
                output_loading_info=True,
            )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # transformers and gguf raise anything
        raise ModelError(f"{file}: no model can be loaded from it ({reason_of(error)})") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{file}: {len(missing)} weights are not in it, the first {missing[0]}; give a whole model")
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        for key in ("quantization_config", "_model_name_or_path"):  # no longer quantized; the file's title
            vars(config).pop(key, None)
    model.save_pretrained(directory, max_shard_size="5GB")
    tokenizer.save_pretrained(directory)
    if not _same_tokens(tokenizer, AutoTokenizer.from_pretrained(directory)):
        raise ModelError(f"{file}: its tokenizer, written and loaded again, gives other ids; convert it yourself")


def _same_tokens(tokenizer: PreTrainedTokenizerBase, written: PreTrainedTokenizerBase) -> bool:
    """Whether they give the same; the class that one is loaded as may bring a pre-tokenizer of its own."""
    same = tokenizer(_TEXT)["input_ids"] == written(_TEXT)["input_ids"]
    return same and tokenizer.chat_template == written.chat_template and tokenizer.get_vocab() == written.get_vocab()
