"""A world of functions: a maker and judges whose errors are known, for `module:function`."""

from __future__ import annotations

import random
import re

ERROR, FIRST_PLACE, UNREADABLE = 0.2, 0.1, 0.05
"""Of `judge`: how often it is wrong, how often it says A without looking, and how often neither."""


def topic_of(text: str) -> str:
    """The last topic that a text names."""
    return re.findall(r"topic (\d+)", text)[-1]


def maker(conversations, seeds):
    """Answers about the topic asked for, and writes a modified instruction about another one."""
    replies = []
    for turns, seed in zip(conversations, seeds, strict=True):
        text, draw = turns[-1]["content"], random.Random(seed)
        if "### Modified" not in text:
            replies.append(f"All of topic {topic_of(text)}, {draw.choice('abc')}.")
            continue
        other = int(re.findall(r"Tell me about topic (\d+)", text)[-1]) + 1000
        lines = ["### Modified instruction", f"Tell me about topic {other}.", "### Answer", f"All of topic {other}."]
        if other % 10 == 3:  # no form
            lines.pop(0)
        if other % 10 == 4:  # the same instruction, in other words
            lines[1] = f"tell me about: TOPIC {other - 1000}!"
        if other % 10 == 5:
            lines[3] = "I'm sorry, but I cannot help with that."
        if other % 10 == 6:
            lines[3] = f"All of topic {other}. " * 9
        replies.append("\n".join(lines))
    return replies


def instruction_alone(conversations, seeds):
    """The modified instruction without an answer."""
    texts = [turns[-1]["content"] for turns in conversations]
    assert not any("### Answer" in text for text in texts)
    return [f"### Modified instruction\nTell me about topic {int(topic_of(text)) + 1000}." for text in texts]


def _answers(question: str) -> dict[str, str]:
    return dict(re.findall(r"<answer ([A-Z])>\n(.*?)\n</answer>", question, re.DOTALL))


def right_letter(question: str) -> str:
    """Of the answer about the topic of the conversation."""
    topic = re.findall(r"user: Tell me about topic (\d+)", question)[-1]
    return next(letter for letter, text in _answers(question).items() if topic_of(text) == topic)


def judge(conversations, seeds):
    """Wrong at a rate of `ERROR`, biased to the first place, now and then unreadable."""
    replies = []
    for turns, seed in zip(conversations, seeds, strict=True):
        draw = random.Random(seed)
        if draw.random() < UNREADABLE:
            replies.append("Both are fine.")
            continue
        right = right_letter(turns[-1]["content"])
        letter = right if draw.random() >= ERROR else {"A": "B", "B": "A"}[right]
        replies.append(f"Reasons {seed % 97}.\n[[{'A' if draw.random() < FIRST_PLACE else letter}]]")
    return replies


def always_a(conversations, seeds):
    """Has one answer to everything."""
    return ["[[A]]"] * len(conversations)


def contrary(conversations, seeds):
    """Calls the other answer better, always."""
    return [f"[[{'B' if right_letter(turns[-1]['content']) == 'A' else 'A'}]]" for turns in conversations]
