"""Pairs that are built, not labelled: the response to a prompt, and a good response to a modified instruction.

The second one answers another question well, so it is probably the worse answer to this one. Wang et al. 2024
(arXiv 2408.02666), section 3.2. What is probable is not certain: nobody has said that the chosen response is better.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from rlhf_lightning.data.examples import Message, PreferenceExample, PromptExample
from rlhf_lightning.data.splits import prompt_hash
from rlhf_lightning.evaluation.refusal import is_refusal
from rlhf_lightning.evaluation.self_taught.replies import Asking
from rlhf_lightning.rewards.questions import after_thinking, filled, written
from rlhf_lightning.rewards.writers import Reply, Writer

Prompted = TypeVar("Prompted", PromptExample, PreferenceExample)

REASONS = {
    "not_asked": "the prompt, or the request built on it, is too long for the model or holds a control token",
    "cut": "a reply reached max_new_tokens, or is empty",
    "refused": "a response refuses",
    "malformed": "the reply to the request lacks a heading or what stands below it, or has a heading twice",
    "same_instruction": "the modified instruction is the old one, but for case, punctuation and the order of words",
    "same_response": "both responses are the same text",
    "length_ratio": "one response is longer than the other by more than max_length_ratio",
}
"""Why no pair was made of a prompt, in the order in which it is looked for."""

RUN_OF_WORDS = 13
"""So many words in a row that an evaluation's prompt shares with one contaminate it (Brown et al. 2020, appendix C)."""

_TOGETHER = """\
Below are a conversation and a good answer to its last turn.

{conversation}

<answer>
{answer}
</answer>

Do two things. First write another instruction that could stand in the place of the last turn: close to it in topic, \
words and form, but asking for something else, so that the answer above would not be an answer to it. Then write the \
best answer to this new instruction that you can.

Write nothing but this, with both headings as they are:

### Modified instruction
(the new instruction)

### Answer
(the best answer to the new instruction)"""
_ALONE = """\
Below is a conversation.

{conversation}

Write another instruction that could stand in the place of its last turn: close to it in topic, words and form, but \
asking for something else, so that a good answer to the one would be a wrong answer to the other.

Write nothing but this, with the heading as it is:

### Modified instruction
(the new instruction)"""
_HEADINGS = [
    re.compile(rf"^[^\w\n]*{name}[^\w\n]*$", re.IGNORECASE | re.MULTILINE)
    for name in ("modified instruction", "answer")
]


@dataclass(frozen=True, slots=True)
class Contrast:
    """A pair, and the instruction that its rejected response answers."""

    prompt: PromptExample
    chosen: str
    rejected: str
    modified: str
    number: int
    """Among the pairs of its prompt, from 0."""


@dataclass(frozen=True, slots=True)
class Contrasts:
    """What was built, and of how many prompts nothing was, by `REASONS`."""

    pairs: list[Contrast]
    dropped: Mapping[str, int]


@dataclass(frozen=True)
class Building:
    """How pairs are built.

    Args:
        maker: Answers the prompts and the modified instructions.
        modifier: Asked for the modified instructions; often the maker.
        two_replies: The modifier gives the instruction alone, and the maker answers it as it answers any prompt. Else
            the modifier's one reply holds both, as in the paper.
        template: The request in other words, with `{conversation}` and, for one reply, `{answer}`.
        max_length_ratio: Of characters, the longer response to the shorter one; None for no bound.
        asking: Where replies are kept.
    """

    maker: Writer
    modifier: Writer
    asking: Asking
    two_replies: bool = False
    template: Mapping[str, str] = field(default_factory=dict)
    max_length_ratio: float | None = None

    def build(self, prompts: Sequence[PromptExample], per_prompt: int = 1) -> Contrasts:
        """Pairs of each prompt, or the reasons why not. They are in the order of the prompts, first all first ones."""
        rounds = [self._round(prompts, number) for number in range(per_prompt)]
        dropped = {reason: sum(each.dropped[reason] for each in rounds) for reason in REASONS}
        return Contrasts([pair for each in rounds for pair in each.pairs], dropped)

    def _round(self, prompts: Sequence[PromptExample], number: int) -> Contrasts:
        turns = {prompt.example_id: prompt.prompt for prompt in prompts}
        responses = self._ask("responses", self.maker, turns, number)
        requests = {
            key: [{"role": "user", "content": self._request(turns[key], reply.text)}]
            for key, reply in responses.items()
            if reply is not None and reply.ended and reply.text.strip()
        }
        replies = self._ask("modified instructions", self.modifier, requests, number)
        modified = {key: _read(reply, self.two_replies) for key, reply in replies.items()}
        answers: Mapping[str, Reply | None] = replies
        if self.two_replies:
            others = {key: modified_prompt(turns[key], read[0]) for key, read in modified.items() if read is not None}
            answers = self._ask("responses to them", self.maker, others, number)
        pairs, dropped = [], Counter(dict.fromkeys(REASONS, 0))
        for prompt in prompts:
            key = prompt.example_id
            found = self._pair(prompt, responses[key], replies.get(key), modified.get(key), answers.get(key))
            if isinstance(found, str):
                dropped[found] += 1
            else:
                pairs.append(Contrast(prompt, *found, number))
        return Contrasts(pairs, dict(dropped))

    def _request(self, prompt: Sequence[Message], response: str) -> str:
        return contrast_request(prompt, response, self.two_replies, **self.template)

    def _ask(
        self, what: str, writer: Writer, conversations: Mapping[str, Sequence[Message]], number: int
    ) -> dict[str, Reply | None]:
        found = self.asking.replies(what, writer, conversations, range(number, number + 1))
        return {key: replies[0] for key, replies in found.items()}

    def _pair(
        self,
        prompt: PromptExample,
        response: Reply | None,
        reply: Reply | None,
        modified: tuple[str, str] | None,
        answer: Reply | None,
    ) -> tuple[str, str, str] | str:
        """Chosen, rejected and the modified instruction, or one of `REASONS`.

        What was not asked for because of an earlier reply is None.
        """
        if response is None:
            return "not_asked"
        if not response.ended or not response.text.strip():
            return "cut"
        if is_refusal(response.text):
            return "refused"
        if reply is None:
            return "not_asked"
        if not reply.ended:
            return "cut"
        if modified is None:
            return "malformed"
        instruction, rejected = modified
        if self.two_replies:
            if answer is None:
                return "not_asked"
            if not answer.ended or not answer.text.strip():
                return "cut"
            rejected = answer.text
        reason = self._reason(prompt, instruction, response.text, rejected)
        return reason or (response.text, rejected, instruction)

    def _reason(self, prompt: PromptExample, instruction: str, chosen: str, rejected: str) -> str | None:
        if is_refusal(rejected):
            return "refused"
        if sorted(words(instruction)) == sorted(words(prompt.prompt[-1]["content"])):
            return "same_instruction"
        if words(chosen) == words(rejected):
            return "same_response"
        lengths = sorted([len(chosen.strip()), len(rejected.strip())])
        too_long = self.max_length_ratio is not None and lengths[1] > self.max_length_ratio * lengths[0]
        return "length_ratio" if too_long else None


def contrast_request(
    prompt: Sequence[Message], response: str, two_replies: bool = False, template: str | None = None
) -> str:
    """What the modifier is asked: for a modified instruction, and unless `two_replies` a good answer to it."""
    template = template or (_ALONE if two_replies else _TOGETHER)
    return filled(template, conversation=written(prompt), answer=response)


def parse_contrast(reply: str) -> tuple[str, str] | None:
    """The modified instruction and the answer to it; None unless both headings stand there once, with text below."""
    whole = after_thinking(reply)
    first, second = (list(heading.finditer(whole)) for heading in _HEADINGS)
    if len(first) != 1 or len(second) != 1 or second[0].start() < first[0].end():
        return None
    instruction, answer = whole[first[0].end() : second[0].start()].strip(), whole[second[0].end() :].strip()
    return (instruction, answer) if instruction and answer else None


def parse_instruction(reply: str) -> str | None:
    """The text below the one heading; None where it is missing, twice or over nothing."""
    whole = after_thinking(reply)
    found = list(_HEADINGS[0].finditer(whole))
    return whole[found[0].end() :].strip() or None if len(found) == 1 else None


def modified_prompt(prompt: Sequence[Message], instruction: str) -> list[Message]:
    """The conversation with another last turn."""
    return [*prompt[:-1], {"role": "user", "content": instruction}]


def uncontaminated(rows: Sequence[Prompted], others: Iterable[PromptExample | PreferenceExample]) -> list[Prompted]:
    """The rows whose prompt's last turn none of the others has, nor `RUN_OF_WORDS` words in a row of it."""
    hashes: set[int] = set()
    runs: set[str] = set()
    for other in others:
        hashes.add(prompt_hash(other.prompt[-1:]))
        runs.update(_runs(other))
    return [each for each in rows if prompt_hash(each.prompt[-1:]) not in hashes and runs.isdisjoint(_runs(each))]


def words(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation."""
    return re.findall(r"\w+", text.casefold())


def _runs(row: PromptExample | PreferenceExample) -> list[str]:
    found = words(row.prompt[-1]["content"])
    return [" ".join(found[at : at + RUN_OF_WORDS]) for at in range(len(found) - RUN_OF_WORDS + 1)]


def _read(reply: Reply | None, two_replies: bool) -> tuple[str, str] | None:
    if reply is None or not reply.ended:
        return None
    if not two_replies:
        return parse_contrast(reply.text)
    instruction = parse_instruction(reply.text)
    return None if instruction is None else (instruction, "")
