"""Pairs in which a label says which of two responses is better: the layouts of well-known public collections."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from rlhf_lightning.data.conversations import BadRow, exchange, parsed_json

_WINNERS = {"model_a": 1.0, "model_b": -1.0} | dict.fromkeys(("tie", "tie (bothbad)", "both_bad", "bothbad"), 0.0)
_LABEL_NAME = re.compile(
    r"(?:^|_)(?:labels?|preference|preferred|winner|verdict|votes?|(?:better|safer|chosen|preferred|best)_\w*id)(?:_|$)"
)
_JUDGED_NAME = re.compile(r"(?:^|_)(?:better|best|safer|choice|rank(?:ing)?|judg\w*|scores?|ratings?|rewards?)(?:_|$)")


class Ranking(NamedTuple):
    """A column that holds a list of responses, each with what tells how good it is."""

    column: str
    text: str
    """Key of a response's text."""
    measures: tuple[Callable[[Mapping[str, Any]], float | None], ...]
    """How good a response is, greater is better, or None: the first that judges two responses of a row is taken."""

    def lists(self, value: Any) -> bool:
        """Whether a value is such a list."""
        items = _decoded(value)
        return isinstance(items, list) and any(isinstance(item, Mapping) and self.text in item for item in items)

    def extremes(self, values: Mapping[str, Any]) -> list[tuple[float, Mapping[str, Any]]]:
        """The best and the worst response of a row and their scores, of several equals the first.

        Raises `BadRow` where fewer than two have one.
        """
        listed = _decoded(_present(values, self.column))
        items = [item for item in listed if isinstance(item, Mapping)] if isinstance(listed, list) else []
        for measure in self.measures:
            scored = [(score, item) for item in items if (score := measure(item)) is not None]
            if len(scored) > 1:
                return [best(scored, key=lambda one: one[0]) for best in (max, min)]
        raise BadRow("bad_label", f"{self.column} holds no two responses with a score, of which to make a pair")

    def spread(self, values: Mapping[str, Any]) -> float:
        """How much better the best response is than the worst. Raises `BadRow` where other scores say the opposite."""
        (high, best), (low, worst) = self.extremes(values)
        details = [as_number(item.get("fine-grained_score")) for item in (best, worst)]
        if details[0] is not None and details[1] is not None and details[0] < details[1]:
            raise BadRow(
                "bad_label",
                f"of {self.column}, the best by its score, {high:g}, has the fine-grained_score {details[0]:g}, and "
                f"the worst, {low:g}, has {details[1]:g}",
            )
        return high - low


def _mean_rating(item: Mapping[str, Any]) -> float | None:
    """UltraFeedback: the mean of the ratings of a response's aspects."""
    ratings = item.get("annotations")
    given = ratings.values() if isinstance(ratings, Mapping) else ()
    numbers = [as_number(one.get("Rating")) for one in given if isinstance(one, Mapping)]
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known else None


def _place(item: Mapping[str, Any]) -> float | None:
    """Nectar: rank 1 is the best."""
    rank = as_number(item.get("rank"))
    return None if rank is None else -rank


_COMPLETIONS = Ranking("completions", "response", (lambda item: as_number(item.get("overall_score")), _mean_rating))
_ANSWERS = Ranking("answers", "answer", (_place,))


class Layout(NamedTuple):
    """Which columns hold the prompt, two responses and the label."""

    name: str
    prompt: str | None
    """None: the responses are conversations that hold it, of which the first `turn` exchanges were judged."""
    responses: tuple[str, str]
    labels: tuple[str, ...]
    """All of them are needed; the first names the label in reports."""
    preference: Callable[[Mapping[str, Any]], float]
    """How much better the first response of a row is: negative where the second is better, 0 for a tie. Raises
    `BadRow`."""
    graded: bool = False
    """Whether the size of the preference says how much better, and so makes a margin."""
    ranking: Ranking | None = None
    """Where a column holds a list of responses, of which the best is the first response and the worst the second."""


def _choice(column: str, meaning: Mapping[float, float]) -> Callable[[Mapping[str, Any]], float]:
    """A number that names a response."""

    def preference(values: Mapping[str, Any]) -> float:
        number = _number(values, column)
        if number not in meaning:
            raise BadRow("bad_label", f"{column} is {reprlib.repr(values[column])}, none of {_named(meaning)}")
        return meaning[number]

    return preference


def _strength(column: str) -> Callable[[Mapping[str, Any]], float]:
    """HelpSteer: -3, the first is much better, to 3, the second is."""

    def preference(values: Mapping[str, Any]) -> float:
        number = _number(values, column)
        if not -3 <= number <= 3:
            raise BadRow("bad_label", f"{column} is {number:g}, not between -3 and 3")
        return -number

    return preference


def _votes(values: Mapping[str, Any]) -> float:
    """SHP: 1 where the first is better. Its votes, where a row has them, say the same."""
    preference = _choice("labels", {1: 1.0, 0: -1.0})(values)
    if values.get("score_A") is not None and values.get("score_B") is not None:
        first, second = _number(values, "score_A"), _number(values, "score_B")
        if (first - second) * preference < 0:
            raise BadRow(
                "bad_label", f"labels is {values['labels']}, but score_A is {first:g} and score_B is {second:g}"
            )
    return preference


def _half_way(values: Mapping[str, Any]) -> float:
    """AlpacaFarm: 1, the first is better, to 2, the second is; 1.5, or 0, is a tie."""
    number = _number(values, "preference")
    if number != 0 and not 1 <= number <= 2:
        raise BadRow("bad_label", f"preference is {number:g}, neither 1 (output_1 is better) nor 2 (output_2 is)")
    return 0.0 if number == 0 else 3 - 2 * number


def _winner(values: Mapping[str, Any]) -> float:
    winner = _present(values, "winner")
    if not isinstance(winner, str) or winner.strip().lower() not in _WINNERS:
        raise BadRow("bad_label", f"winner is {reprlib.repr(winner)}, none of {_named(_WINNERS)}")
    return _WINNERS[winner.strip().lower()]


def _flags(values: Mapping[str, Any]) -> float:
    flags = [_number(values, f"winner_{name}") for name in ("model_a", "model_b", "tie")]
    if sorted(flags) != [0, 0, 1]:
        found = ", ".join(f"{flag:g}" for flag in flags)
        raise BadRow("bad_label", f"winner_model_a, winner_model_b and winner_tie are {found}, not one of them 1")
    return flags[0] - flags[1]


LAYOUTS = (
    Layout(
        "PKU-SafeRLHF",
        "prompt",
        ("response_0", "response_1"),
        ("better_response_id",),
        _choice("better_response_id", {0: 1.0, 1: -1.0}),
    ),
    Layout(
        "HelpSteer3",
        "context",
        ("response1", "response2"),
        ("overall_preference",),
        _strength("overall_preference"),
        graded=True,
    ),
    Layout(
        "HelpSteer2, preferences",
        "prompt",
        ("response_1", "response_2"),
        ("preference_strength",),
        _strength("preference_strength"),
        graded=True,
    ),
    Layout(
        "UltraFeedback",
        "instruction",
        ("completions", "completions"),
        ("completions",),
        _COMPLETIONS.spread,
        graded=True,
        ranking=_COMPLETIONS,
    ),
    Layout("Nectar", "prompt", ("answers", "answers"), ("answers",), _ANSWERS.spread, ranking=_ANSWERS),
    Layout("SHP", "history", ("human_ref_A", "human_ref_B"), ("labels",), _votes),
    Layout("AlpacaFarm", "instruction", ("output_1", "output_2"), ("preference",), _half_way),
    Layout("Chatbot Arena", None, ("conversation_a", "conversation_b"), ("winner",), _winner),
    Layout(
        "LMArena",
        "prompt",
        ("response_a", "response_b"),
        ("winner_model_a", "winner_model_b", "winner_tie"),
        _flags,
    ),
    Layout("LMArena", "prompt", ("response_a", "response_b"), ("winner",), _winner),
)
"""Columns and meanings as the cards of PKU-Alignment/PKU-SafeRLHF, nvidia/HelpSteer3, nvidia/HelpSteer2,
openbmb/UltraFeedback, berkeley-nest/Nectar, stanfordnlp/SHP, tatsu-lab/alpaca_farm,
lmsys/chatbot_arena_conversations, lmarena-ai/arena-human-preference-140k and
lmsys/lmsys-arena-human-preference-55k have them."""


def layout_of(found: Mapping[str, Any]) -> Layout | None:
    """The layout whose responses and labels are all among some columns, given a value of each."""
    return next((one for one in LAYOUTS if _is_laid_out(found, one)), None)


def _is_laid_out(found: Mapping[str, Any], layout: Layout) -> bool:
    if not {*layout.responses, *layout.labels} <= found.keys():
        return False
    return layout.ranking is None or layout.ranking.lists(found[layout.ranking.column])


def responses_of(layout: Layout, values: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Prompt, first and second response of a row; no prompt (None) where the responses are conversations."""
    prompt = None if layout.prompt is None else values.get(layout.prompt)
    if layout.ranking:
        (_, best), (_, worst) = layout.ranking.extremes(values)
        return prompt, best.get(layout.ranking.text), worst.get(layout.ranking.text)
    first, second = (values.get(name) for name in layout.responses)
    if layout.prompt is None:
        turns = values.get("turn")
        return None, _judged_turns(_decoded(first), turns), _judged_turns(_decoded(second), turns)
    if layout.name == "LMArena":
        lists = [texts for value in (prompt, first, second) if (texts := _text_list(value)) is not None]
        if len(lists) == 3:
            questions, *sides = lists
            if any(len(side) != len(questions) for side in sides):
                raise BadRow("bad_messages", "prompt, response_a and response_b are lists of different lengths")
            return None, _interleaved(questions, sides[0]), _interleaved(questions, sides[1])
        if layout.preference is _flags:
            raise BadRow("bad_messages", "prompt, response_a and response_b are not JSON lists of texts")
    return prompt, first, second


def _decoded(value: Any) -> Any:
    """A list of mappings, such as a conversation, that a file holds as JSON inside a string."""
    items = parsed_json(value) if isinstance(value, str) else None
    return items if isinstance(items, list) and items and isinstance(items[0], Mapping) else value


def _judged_turns(conversation: Any, turns: Any) -> Any:
    """A conversation up to the exchange that was judged, of `turns` exchanges; MT-bench keeps the later ones too."""
    turns = as_number(turns)
    if not isinstance(conversation, list) or turns is None or turns < 1:
        return conversation
    begins = [i for i, turn in enumerate(conversation) if isinstance(turn, Mapping) and turn.get("role") == "user"]
    return conversation[: begins[int(turns)]] if len(begins) > turns else conversation


def _text_list(value: Any) -> list[str] | None:
    """A list of texts, or the JSON of one; a null in it, which is an answer that never came, is empty."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed_json(value)
    if not isinstance(value, list) or not value or not all(text is None or isinstance(text, str) for text in value):
        return None
    return [text or "" for text in value]


def _interleaved(questions: list[str], answers: list[str]) -> list[dict[str, str]]:
    """The turns of a conversation in which each question has its answer."""
    exchanges = zip(questions, answers, strict=True)
    return [turn for question, answer in exchanges for turn in exchange(question, answer)]


def label_columns(found: Mapping[str, Any]) -> list[str]:
    """Columns that look as if they said which response of a row is better, given a value of each column."""

    def is_label(name: str, value: Any) -> bool:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
        judged = isinstance(value, int | float | list) or (isinstance(value, str) and as_number(value) is not None)
        return bool(_LABEL_NAME.search(name) or (judged and _JUDGED_NAME.search(name)))

    return [str(name) for name, value in found.items() if is_label(str(name), value)]


def _present(values: Mapping[str, Any], column: str) -> Any:
    value = values.get(column)
    if value is None or value == "":
        raise BadRow("missing_key", f"{column} absent or null")
    return value


def _number(values: Mapping[str, Any], column: str) -> float:
    number = as_number(_present(values, column))
    if number is None:
        raise BadRow("bad_label", f"{column} is {reprlib.repr(values[column])}, not a number")
    return number


def as_number(value: Any) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _named(values: Collection[Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, int | float) else value for value in values)
