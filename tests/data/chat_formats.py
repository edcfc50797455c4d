"""Tokenizers of one token per byte with the chat templates of known models, and rows as these models want them."""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.data.chat_format import ChatFormat

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITHOUT_GENERATION_PROMPT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)
THINKING = CHATML.replace(
    "m.content +", "('<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' else '') + m.content +"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must\nalternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
BLANK_BEFORE_END = CHATML.replace("m.content + '<|im_end|>", "m.content + '\n<|im_end|>")
UNSTABLE = "{{ messages | length }} turns\n" + CHATML


def byte_tokenizer(
    specials: str, template: str | None = None, *, adds: str = "$A", **roles: str
) -> PreTrainedTokenizerFast:
    """A token per byte, and `specials` as control tokens; `adds` is what the tokenizer itself puts around a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials.split())
    core.post_processor = processors.TemplateProcessing(
        single=adds, special_tokens=[(token, core.token_to_id(token)) for token in specials.split()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=template, extra_special_tokens=specials.split(), **roles
    )


class KnownFormat(NamedTuple):
    """A tokenizer, and the row that it must make of the prompt `Hi there` and the response `Well.`."""

    tokenizer: PreTrainedTokenizerFast
    prompt: str
    response: str
    chat_template: str | None = None

    @property
    def chat_format(self) -> ChatFormat:
        return ChatFormat(self.tokenizer, chat_template=self.chat_template)


CHATML_PROMPT = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"


def _chatml(template: str | None = CHATML, **roles: str) -> PreTrainedTokenizerFast:
    return byte_tokenizer("<|im_start|> <|im_end|> <|endoftext|>", template, **roles)


FORMATS = {
    "qwen": KnownFormat(_chatml(eos_token="<|im_end|>", pad_token="<|endoftext|>"), CHATML_PROMPT, "Well.<|im_end|>"),
    "eos is not what ends a turn": KnownFormat(_chatml(eos_token="<|endoftext|>"), CHATML_PROMPT, "Well.<|im_end|>"),
    "no eos, no pad": KnownFormat(_chatml(), CHATML_PROMPT, "Well.<|im_end|>"),
    "pad is eos": KnownFormat(
        _chatml(eos_token="<|im_end|>", pad_token="<|im_end|>"), CHATML_PROMPT, "Well.<|im_end|>"
    ),
    "template without generation prompt": KnownFormat(
        _chatml(WITHOUT_GENERATION_PROMPT, eos_token="<|im_end|>"), CHATML_PROMPT, "Well.<|im_end|>"
    ),
    "template with an empty thought": KnownFormat(
        _chatml(THINKING, eos_token="<|im_end|>"), CHATML_PROMPT, "<think>\n\n</think>\n\nWell.<|im_end|>"
    ),
    "template with a blank before the end": KnownFormat(
        _chatml(BLANK_BEFORE_END, eos_token="<|endoftext|>"),
        CHATML_PROMPT.replace("<|im_end|>", "\n<|im_end|>"),
        "Well.\n<|im_end|>",
    ),
    "llama 3": KnownFormat(
        byte_tokenizer(
            "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end_of_text|>",
            LLAMA3,
            adds="<|begin_of_text|> $A",
            bos_token="<|begin_of_text|>",
            eos_token="<|end_of_text|>",
        ),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Well.<|eot_id|>",
    ),
    "llama 2": KnownFormat(
        byte_tokenizer("<s> </s>", LLAMA2, adds="<s> $A", bos_token="<s>", eos_token="</s>"),
        "<s>[INST] Hi there [/INST]",
        " Well. </s>",
    ),
    "zephyr": KnownFormat(
        byte_tokenizer("<s> </s>", ZEPHYR, adds="<s> $A", bos_token="<s>", eos_token="</s>", pad_token="</s>"),
        "<s><|user|>\nHi there</s>\n<|assistant|>\n",
        "Well.</s>",
    ),
    "gemma": KnownFormat(
        byte_tokenizer(
            "<bos> <eos> <start_of_turn> <end_of_turn>", GEMMA, adds="<bos> $A", bos_token="<bos>", eos_token="<eos>"
        ),
        "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n",
        "Well.<end_of_turn>",
    ),
    "plain with bos": KnownFormat(
        byte_tokenizer("<s> </s>", adds="<s> $A", bos_token="<s>", eos_token="</s>"),
        "<s>\n\nHuman: Hi there\n\nAssistant:",
        " Well.</s>",
    ),
    "plain without bos": KnownFormat(
        byte_tokenizer("<|endoftext|>", eos_token="<|endoftext|>"),
        "\n\nHuman: Hi there\n\nAssistant:",
        " Well.<|endoftext|>",
    ),
    "plain with eos added": KnownFormat(
        byte_tokenizer("<s> </s>", adds="<s> $A </s>", bos_token="<s>", eos_token="</s>"),
        "<s>\n\nHuman: Hi there\n\nAssistant:",
        " Well.</s>",
    ),
    "transcript in place of a template": KnownFormat(
        _chatml(eos_token="<|im_end|>"), "\n\nHuman: Hi there\n\nAssistant:", " Well.<|im_end|>", "transcript"
    ),
    "encoder": KnownFormat(
        byte_tokenizer("[CLS] [SEP] [PAD]", adds="[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]"),
        "[CLS]\n\nHuman: Hi there\n\nAssistant:",
        " Well.[SEP]",
    ),
}
