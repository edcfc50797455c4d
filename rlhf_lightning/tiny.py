"""A tiny model and its tokenizer, made on the spot: for the quickstart, for tests, and for a first look offline."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from rlhf_lightning.files.model_cache import cached_model
from rlhf_lightning.files.packages import PACKAGE, package_path
from rlhf_lightning.gguf_files import converted, gguf_file

TINY = "builtin:tiny"
"""Name under which a model key asks for the built-in tiny model."""

Architecture = Literal["qwen2", "llama", "bert"]

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def resolve_model(name_or_path: str) -> str:
    """The directory of `package:NAME`, of `builtin:tiny` or of a GGUF file, made first if need be; others as they are.

    Raises `ModelError` where a GGUF file cannot be converted, or a package is not installed.
    """
    if name_or_path.startswith(PACKAGE):
        name_or_path = str(package_path(name_or_path))
    if name_or_path == TINY:
        texts = builtin_texts()
        # The name says what it was made of, by what: a stale copy in the cache is never used.
        made_of = hashlib.sha256(repr((texts, Path(__file__).read_text())).encode()).hexdigest()
        return cached_model(f"tiny-{made_of[:12]}", lambda directory: make_tiny_model(directory, texts))
    file = gguf_file(name_or_path)
    return name_or_path if file is None else converted(file)


def builtin_texts() -> list[str]:
    """The texts of the built-in preference set, to train a tokenizer on."""
    import json

    rows = (Path(__file__).parent / "data" / "courtesy" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [text for row in map(json.loads, rows) for text in (row["prompt"], row["chosen"], row["rejected"])]


def make_tiny_model(
    directory: str | Path,
    texts: Iterable[str],
    *,
    architecture: Architecture = "qwen2",
    hidden_size: int = 64,
    layers: int = 2,
    vocab_size: int = 1024,
    initializer_range: float = 0.02,
    seed: int = 0,
) -> Path:
    """Write a random-weight model and a tokenizer trained on `texts` as a Hugging Face directory.

    `qwen2` and `llama` are decoders with a byte-level BPE tokenizer, a ChatML template, EOS `<|im_end|>` and pad
    `<|endoftext|>`; `bert` is an encoder with `[CLS] ... [SEP]` and no template. Returns the directory.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig, Qwen2Config

    directory = Path(directory)
    tokenizer = _train_tokenizer(list(texts), vocab_size, encoder=architecture == "bert")
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "initializer_range": initializer_range,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if architecture == "bert":
        config, factory = BertConfig(**sizes), AutoModel
    else:
        kind = Qwen2Config if architecture == "qwen2" else LlamaConfig
        ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
        config, factory = kind(**sizes, **ids, num_key_value_heads=2, tie_word_embeddings=True), AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory.from_config(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _train_tokenizer(texts: list[str], vocab_size: int, *, encoder: bool):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[CLS]", "[SEP]"] if encoder else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if encoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=_CHAT_TEMPLATE,
    )
