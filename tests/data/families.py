"""Small tokenizers of the kinds that models come with, and templates of their shapes, of which any two go together."""

from __future__ import annotations

import functools
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_lightning.tiny import builtin_texts
from tests.data.chat_formats import BLANK_BEFORE_END, CHATML, GEMMA, LLAMA2, LLAMA3, ZEPHYR

VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}"
    "{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ALPACA = (  # no token ends a reply
    "{% for m in messages %}{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}{% else %}"
    "{{ '### Response:\n' + m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
BLANK_AT_THE_BORDER = (  # every word joins the blank before it
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
COHERE = (
    "{% for m in messages %}{{ '<|turn|><|' + m.role + '|>' }}"
    "{{ '<|response|>' + m.content + '<|end_response|>' if m.role == 'assistant' else m.content }}{{ '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|><|assistant|>' }}{% endif %}"
)
_READ_THOUGHT = (
    "{% set c = m.content %}{% set r = '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{% if m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% else %}" + _READ_THOUGHT + "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}{{ c }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if not enable_thinking | default(true) %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
QWEN3_OPENED = QWEN3.replace("assistant\n' }}{% if not enable", "assistant\n<think>\n' }}{% if not enable")
GLM = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content }}{% else %}"
    + _READ_THOUGHT
    + "{{ '<|assistant|>\n<think>' + (r if loop.last else '') + '</think>\n' + c }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if not enable_thinking | default(true) %}{{ '\n<think></think>' }}{% endif %}{% endif %}"
)
R1 = (  # thoughts are left out of every turn, the last one too
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)

TEMPLATES = {
    "chatml": CHATML,
    "blank before the end": BLANK_BEFORE_END,
    "llama 2": LLAMA2,
    "llama 3": LLAMA3,
    "zephyr": ZEPHYR,
    "gemma": GEMMA,
    "vicuna": VICUNA,
    "alpaca": ALPACA,
    "blank at the border": BLANK_AT_THE_BORDER,
    "phi 3": PHI3,
    "cohere": COHERE,
    "qwen 3": QWEN3,
    "qwen 3, opened": QWEN3_OPENED,
    "glm": GLM,
    "r1": R1,
    "transcript": None,
}
_MARKS = {  # what each template has as tokens
    "chatml": "<|im_start|> <|im_end|>",
    "blank before the end": "<|im_start|> <|im_end|>",
    "llama 3": "<|start_header_id|> <|end_header_id|> <|eot_id|>",
    "gemma": "<start_of_turn> <end_of_turn>",
    "phi 3": "<|user|> <|assistant|> <|end|>",
    "cohere": "<|turn|> <|user|> <|assistant|> <|response|> <|end_response|> <|end|>",
    "qwen 3": "<|im_start|> <|im_end|>",
    "qwen 3, opened": "<|im_start|> <|im_end|>",
    "glm": "[gMASK] <sop> <|user|> <|assistant|>",
    "r1": "<|User|> <|Assistant|>",
}
_THOUGHTS = ("qwen 3", "qwen 3, opened", "glm", "r1")
KINDS = ("byte-level", "prefix blank", "prepend", "always", "first", "never", "llama", "llama legacy")
"""Byte-level BPE without and with a blank before a text, and the kinds of SentencePiece: a normalizer that prepends its
blank behind every special token (Llama 2 and Mistral on the hub), Metaspace, and transformers' own class."""
_START = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@functools.cache
def _pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a small SentencePiece model, with a token per byte for what it does not know."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    texts = [*builtin_texts()[:300], *(blank * 8 for blank in "  ")]
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    tokens += ["▁▁", "▁▁▁▁"]  # runs of blanks, as of an indented line
    merges = [*map(tuple, model["merges"]), ("▁", "▁"), ("▁▁", "▁▁")]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def _sentencepiece(kind: str) -> PreTrainedTokenizerBase:
    vocab, merges = _pieces()
    if kind.startswith("llama"):
        return LlamaTokenizer(vocab=vocab, merges=merges, legacy=kind == "llama legacy", **_START)
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _START.values()])
    if kind == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    strip = [] if kind == "never" else [decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=core, **_START)


def _byte_level(kind: str) -> PreTrainedTokenizerBase:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix blank")
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*builtin_texts()[:300], *["a\n\nb", "a\n  b\n    c\n\n  d"] * 50], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **_START)


def family(kind: str, template: str, *, special: bool = True) -> PreTrainedTokenizerBase:
    """A tokenizer of a kind with a template, whose marks are `special` tokens or merely added ones."""
    tokenizer = _byte_level(kind) if kind in ("byte-level", "prefix blank") else _sentencepiece(kind)
    marks = _MARKS.get(template, "").split()
    thoughts = ["<think>", "</think>"] if template in _THOUGHTS else []
    for tokens, is_special in ((marks, special), (thoughts, False)):
        if tokens:
            tokenizer.add_tokens([AddedToken(t, special=is_special, normalized=False) for t in tokens], is_special)
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer
