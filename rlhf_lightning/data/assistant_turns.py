"""Where in the text and in the ids of a conversation the assistant's earlier turns stand, which SFT learns as well.

The places are those at which a policy would have been asked: the text before a turn must be the prompt that the
template writes of the turns before it. That needs no `{% generation %}` in the template, and does not look at it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_lightning.data.chat_text import ChatText
from rlhf_lightning.data.examples import Message
from rlhf_lightning.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding

Spans = list[tuple[int, int]]


def text_spans(form: ChatText, messages: Sequence[Message], text: str) -> Spans:
    """First and one past the last character of each assistant turn in `text`, the prompt that is written of `messages`.

    A turn begins where the generation prompt of the turns before it ends, and ends with the token that the template
    puts after it; where it puts none after an earlier turn, with its last word. Raises `DataError` where the template
    writes these turns in another way once others follow.
    """
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = form.prompt_text(messages[:place])
        if not text.startswith(before):
            raise DataError(
                "the chat template writes the beginning of a conversation differently once more turns follow, so the "
                "places of its assistant turns are not known; give another one with chat_template: FILE.jinja, or rows "
                "of one prompt and one response"
            )
        spans.append((len(before), _end(form, message["content"], text, len(before))))
    return spans


def _end(form: ChatText, words: str, text: str, begin: int) -> int:
    """Where the turn of some words ends that begins at `begin`."""
    leads = ("", form.response_lead.strip(), form.opening.strip())
    for written in (words, words.strip()):
        place = text.find(written, begin)
        if place >= 0 and text[begin:place].strip() in leads:
            stop = place + len(written)
            closing = form.response_trail + (form.end or "")
            return stop + len(closing) if form.end and text.startswith(closing, stop) else stop
    raise DataError(
        "the chat template changes the words of an earlier assistant turn, such as by leaving out its thought; give "
        "rows of one prompt and one response"
    )


def token_spans(spans: Spans, encoding: Encoding, *, eos_id: int) -> Spans:
    """The same in tokens: those that lie within a turn, and its EOS, which may reach over blanks behind it.

    A token that a turn shares with the header before it is not one that a policy could have sampled there.
    """
    begins, ends = zip(*encoding.offsets, strict=True)
    found = []
    for first, last in spans:
        start, stop = bisect.bisect_left(begins, first), bisect.bisect_right(ends, last)
        if stop < len(begins) and encoding.ids[stop] == eos_id and begins[stop] < last:
            stop += 1
        found.append((start, stop))
    return found
