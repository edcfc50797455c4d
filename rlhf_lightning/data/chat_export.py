"""The tokenizer of an exported model: its template writes all that training added to a conversation."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.chat_text import PROBE, TRANSCRIPT_TEMPLATE

_PAIR = (
    "{% set names = {'query': 'user', 'document': 'assistant'} %}{% set turns = namespace(all=[]) %}"
    "{% for turn in messages %}"
    "{% set turns.all = turns.all + [dict(turn, role=names.get(turn['role'], turn['role']))] %}"
    "{% endfor %}{% set messages = turns.all %}"
)
"""The two texts that sentence-transformers scores are a prompt and a response."""


def save_tokenizer(chat_format: ChatFormat, directory: str | Path, *, scored: bool = False) -> None:
    """Write the tokenizer with the template that was used, so that the model is asked as it was trained.

    `apply_chat_template` of what is written gives the ids of a prompt as they were trained on. Those of a whole
    conversation end with what the template writes after the EOS token; where they are `scored`, with the EOS token, are
    padded on the right with `padding_of_scored`, if there is one, and may be a query and a document.
    """
    tokenizer = copy.deepcopy(chat_format.tokenizer)
    tokenizer.chat_template = _exported_template(chat_format)
    if scored:
        tokenizer.chat_template = _PAIR + _ending_at_eos(tokenizer.chat_template, chat_format.after_end)
        tokenizer.padding_side = "right"
        if (padding := padding_of_scored(chat_format)) is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    tokenizer.save_pretrained(directory)
    if getattr(tokenizer, "legacy", False):  # transformers 5.24 loses it, and with it blanks behind special tokens
        file = Path(directory) / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) | {"legacy": True}
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def padding_of_scored(chat_format: ChatFormat) -> int | None:
    """A token to pad whole conversations with that ends none of them; None where the tokenizer has no such token.

    Classifiers of transformers read the last token that is not padding.
    """
    tokenizer = chat_format.tokenizer
    marks = sorted(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    known = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, *marks]
    return next((index for index in known if index not in (None, chat_format.eos_id)), None)


def _ending_at_eos(template: str, after: str) -> str:
    """The template without the text that it writes after the end of the last turn."""
    if not after:
        return template
    template = template.removesuffix("\n")  # Jinja leaves the last line end out
    return (
        f"{{% set conversation +%}}{template}{{%+ endset %}}"
        f"{{{{ conversation if add_generation_prompt else conversation.removesuffix({after!r}) }}}}"
    )


def _exported_template(form: ChatFormat) -> str:
    """The template, with what training added to its text written into it: arguments, start tokens, prompt tail."""
    end, *start = form.tokenizer.convert_ids_to_tokens([form.eos_id, *form.start_ids])
    template = form.template or TRANSCRIPT_TEMPLATE.replace("EOS", repr(end))
    # Each line ends with a block, after which Jinja, as transformers sets it up, leaves out the line end.
    for name, value in form.chat_template_kwargs.items():
        if name.isidentifier() and name in template:
            template = f"{{% set {name} = {name} if {name} is defined else {value!r} %}}\n{template}"
    prompt = form.generation_text(PROBE)
    if form.token_ids([prompt])[0][: len(start)] != form.start_ids:
        # After a token that is written out, some tokenizers leave out the blank that a text begins with.
        starts = ["".join(start), "".join(start) + " "]
        same = (text for text in starts if form.token_ids([text + prompt]) == form.encode_prompts([prompt]))
        template = f"{{% if true %}}{{{{ {next(same, starts[0])!r} }}}}{{% endif %}}\n{template}"
    if form.prompt_tail:
        tail = f"{{{{ {form.prompt_tail!r} if add_generation_prompt else '' }}}}"
        template = template.removesuffix("\n") + tail  # Jinja leaves the last line end out as well
    return template
