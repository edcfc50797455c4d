"""The true utility of an answer to a question of the built-in sets: a reward by rule, and the judge of a learned one.

Use it as `--model.reward_model rlhf_lightning.data.courtesy.rule:true_utility`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from rlhf_lightning.data.courtesy.make import ALL_TASKS, CLOSINGS, FRAMES, OPENINGS, OTHER_TASKS, UTILITY
from rlhf_lightning.data.examples import Message

UNKNOWN_SENTENCE = -1.0
"""Utility of a stretch of text that is no phrase or step of the set, or repeats one."""

_STEPS = {step: task for task, steps in ALL_TASKS.items() for step in steps.split(" | ")}


def true_utility(prompts: Sequence[Sequence[Message]], responses: Sequence[str]) -> list[float]:
    """Utility of each response, in logits of the Bradley-Terry model that labelled the built-in pairs.

    An answer as the sets hold them has exactly the utility that it was made with. Of any other text, phrases count
    where they stand at the beginning or the end, steps anywhere and once, and every other stretch `UNKNOWN_SENTENCE`.
    Raises `ValueError` for a prompt that asks about none of the set's tasks.
    """
    return [_utility(prompt[-1]["content"], response) for prompt, response in zip(prompts, responses, strict=True)]


def brevity(prompts: Sequence[Sequence[Message]], responses: Sequence[str]) -> list[float]:
    """Minus the distance of each response's length from that of the sets' answers, in hundreds of characters.

    A rule for any prompt: half of the answers of `builtin:courtesy` have at least 108 characters, the longest has 201.
    """
    return [-abs(len(response) - 108) / 100 for response in responses]


def good_answer(conversations: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[str]:
    """Instead of a language model in `contrast`: a kind or plain answer, with one to three steps of the task asked for.

    Raises `ValueError` for a prompt that asks about none of the set's tasks.
    """
    replies = []
    for turns, seed in zip(conversations, seeds, strict=True):
        draw = random.Random(seed)
        steps = ALL_TASKS[_task(turns[-1]["content"])].split(" | ")[: draw.randint(1, 3)]
        tone = draw.choice(["kind", "plain"])
        replies.append(" ".join(filter(None, [draw.choice(OPENINGS[tone]), *steps, draw.choice(CLOSINGS[tone])])))
    return replies


def another_task(conversations: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[str]:
    """Instead of a language model in `contrast`: a modified instruction that asks about one of `OTHER_TASKS`."""
    replies = []
    for draw in map(random.Random, seeds):
        question = draw.choice(FRAMES).format(draw.choice(list(OTHER_TASKS)))
        replies.append(f"### Modified instruction\n{question}")
    return replies


def coin(conversations: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[str]:
    """A judge that looks at nothing: what learns from all of its verdicts learns their form alone."""
    return [f"[[{random.Random(seed).choice('AB')}]]" for seed in seeds]


def _utility(question: str, response: str) -> float:
    task = _task(question)
    rest = response.strip()
    opening, rest = _taken(rest, OPENINGS, str.startswith, str.removeprefix)
    closing, rest = _taken(rest, CLOSINGS, str.endswith, str.removesuffix)
    steps = [step for step in _STEPS if step in rest]
    unknown = re.split("|".join(map(re.escape, steps)), rest) if steps else [rest]
    utility = UTILITY[opening] + UTILITY[closing] + UTILITY["step"] * min(len(steps), 3)
    utility += UNKNOWN_SENTENCE * sum(bool(stretch.strip()) for stretch in unknown)
    utility += UNKNOWN_SENTENCE * sum(rest.count(step) - 1 for step in steps)
    return utility + (UTILITY["off_topic"] if any(_STEPS[step] != task for step in steps) else 0.0)


def _task(question: str) -> str:
    task = next((task for task in ALL_TASKS if task in question), None)
    if task is None:
        raise ValueError(f"{question[:60]!r} asks about none of the built-in tasks")
    return task


def _taken(text: str, phrases: dict[str, list[str]], stands, without) -> tuple[str, str]:
    """The tone of the phrase that stands at one end of a text, and the text without it."""
    for tone, known in phrases.items():
        for phrase in known:
            if phrase and stands(text, phrase):
                return tone, without(text, phrase).strip()
    return "plain", text
