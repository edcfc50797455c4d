"""One validated preference pair or prompt, and what became of the rows that it was read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from rlhf_lightning.errors import DataError

Message = Mapping[str, str]
"""A turn of a conversation: `{"role": "system" | "user" | "assistant", "content": text}`."""

OnBadRows = Literal["error", "drop"]
"""What to do with rows that cannot be used: `error` refuses the source, `drop` leaves them out and counts them."""

BAD_ROW_REASONS: dict[str, str] = {
    "missing_key": "a column that the row needs is absent or null",
    "wrong_type": "a value is neither text nor a list of messages",
    "bad_unicode": "a text holds half of a surrogate pair, which no tokenizer can read",
    "bad_messages": "a conversation is malformed: unknown role, no content, or the wrong turn at its end",
    "empty_prompt": "the prompt has no text",
    "no_response": "a conversation has no assistant turn to learn from",
    "empty_response": "a response has no text",
    "identical_pair": "chosen and rejected are the same text, so the pair states no preference",
    "prompts_differ": "chosen and rejected answer different prompts",
    "tie": "neither response is better by the row's label; ties are counted, and left out without being refused",
    "bad_label": "a label or the scores of the responses contradict themselves, or have no meaning that is known",
    "bad_margin": "the margin is not a number, or beyond a million",
    "no_place": "tools, calls, images, template arguments or reasoning in the row have no place in a pair or template",
    "special_tokens": "a text contains a control token, such as the end-of-sequence token or a mark of the template",
    "template_refused": "the chat template does not take the conversation, or changes the words of a response",
    "too_long": "prompt head, response and EOS do not fit into max_length, or a prompt into max_prompt_length",
}
"""Every reason for which a row is refused, with the sentence that explains it."""


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A prompt and two responses of which the first is preferred."""

    prompt: Sequence[Message]
    """The conversation up to the responses; its last turn is the user's."""
    chosen: str
    rejected: str
    margin: float | None
    """How much better the chosen response is, in the data's own unit, negative values as they are; None where the data
    does not say."""
    example_id: str
    """The row's own `id`, or `file:row`."""
    origin: str
    """Where the row is, for messages: `file, row 17` (rows counted from 0)."""
    source: str | None = None
    """What the data calls the place that the pair was taken from; accuracy is told apart by it."""
    has_reasoning: bool = False
    """Whether a response begins with `<think>...</think>` taken from `reasoning_content`."""

    @property
    def responses(self) -> tuple[str, ...]:
        return self.chosen, self.rejected

    @property
    def texts(self) -> list[str]:
        """Every text of the pair: the prompt's turns, chosen, rejected."""
        return [*(message["content"] for message in self.prompt), *self.responses]


@dataclass(frozen=True, slots=True)
class SFTExample:
    """A conversation that ends with an assistant turn, to be learned by heart."""

    prompt: Sequence[Message]
    """The conversation up to its last assistant turn."""
    response: str
    """The last assistant turn."""
    every_turn: bool
    """Whether the assistant turns in `prompt` are learned as well, or the response alone."""
    example_id: str
    """The row's own `id`, or `file:row`."""
    origin: str
    """Where the row is, for messages: `file, row 17` (rows counted from 0)."""
    has_reasoning: bool = False
    """Whether the response begins with `<think>...</think>` taken from `reasoning_content`."""

    @property
    def responses(self) -> tuple[str, ...]:
        return (self.response,)

    @property
    def texts(self) -> list[str]:
        """The text of each turn."""
        return [*(message["content"] for message in self.prompt), self.response]


@dataclass(frozen=True, slots=True)
class LabelledExample(SFTExample):
    """A prompt and one response, with what is said of how good it is."""

    label: float = 1.0
    """The number that the row has; infinite, and below 0 for a bad response, where it says so in another way."""


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A conversation that waits for the assistant's reply."""

    prompt: Sequence[Message]
    """Its turns; the last is the user's."""
    example_id: str
    """The row's own `id`, or `file:row`."""
    origin: str
    """Where the row is, for messages: `file, row 17` (rows counted from 0)."""
    has_reasoning: bool = False
    responses: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        """The text of each turn."""
        return [message["content"] for message in self.prompt]


class Refusal(NamedTuple):
    """A row that cannot be used."""

    reason: str
    """Key of `BAD_ROW_REASONS`."""
    message: str
    """Where and what, in one line."""
    origin: str


@dataclass(slots=True)
class LoadReport:
    """Rows read and kept, and the row numbers of those refused, by reason code (see `BAD_ROW_REASONS`)."""

    source: str
    rows_read: int = 0
    bad_rows: dict[str, list[str]] = field(default_factory=dict)
    """Reason code -> origin of each refused row."""
    first_messages: list[str] = field(default_factory=list)
    """The first ten refusals in words."""
    rows_cut: list[str] = field(default_factory=list)
    """Origin of each row whose prompt was cut from the left to fit max_length or max_prompt_length."""
    rows_repeated: list[str] = field(default_factory=list)
    """Origin of each row that was left out as a duplicate, where each prompt is taken once."""
    label: str | None = None
    """Column that says which of two responses is better, where the rows are laid out so."""
    columns_unused: list[str] = field(default_factory=list)
    """Columns, and keys of turns such as `prompt[].name`, that nothing was made of."""

    def refuse(self, refusal: Refusal) -> None:
        """Count one refused row."""
        assert refusal.reason in BAD_ROW_REASONS, refusal.reason
        self.bad_rows.setdefault(refusal.reason, []).append(refusal.origin)
        if refusal.reason != "tie" and len(self.first_messages) < 10:
            self.first_messages.append(refusal.message)

    @property
    def rows_kept(self) -> int:
        return self.rows_read - self.rows_dropped - len(self.rows_repeated)

    @property
    def rows_dropped(self) -> int:
        return sum(len(origins) for origins in self.bad_rows.values())

    def summary(self) -> str:
        """One line: `train.jsonl: 1400 rows read, 7 dropped (empty_response 4, prompts_differ 3)`."""
        text = f"{self.source}: {self.rows_read} rows read"
        if self.label:
            text += f", chosen by {self.label}"
        if self.bad_rows:
            counts = ", ".join(f"{reason} {len(rows)}" for reason, rows in sorted(self.bad_rows.items()))
            text += f", {self.rows_dropped} dropped ({counts})"
        if self.rows_repeated:
            text += f", {len(self.rows_repeated)} duplicate prompts left out"
        if self.columns_unused:
            text += f"; not used: {', '.join(self.columns_unused)}"
        return " ".join(text.split())

    def enforce(self, on_bad_rows: OnBadRows) -> None:
        """Raise `DataError` when no row is usable, or when there are bad rows and the policy is `error`."""
        refused = self.rows_dropped - len(self.bad_rows.get("tie", ()))
        if (self.rows_kept or not self.rows_dropped) and (on_bad_rows == "drop" or not refused):
            return
        first = "; ".join(self.first_messages[: 10 if self.rows_kept else 1]) or "every one is a tie"
        if not self.rows_kept:
            raise DataError(f"{self.source}: none of its {self.rows_read} rows can be used: {first}")
        more = refused - 10
        raise DataError(
            f"{self.source}: {refused} of {self.rows_read} rows cannot be used: {first}"
            + (f"; and {more} more" if more > 0 else "")
            + ". Correct them, or leave them out with on_bad_rows: drop"
        )

    @classmethod
    def merged(cls, reports: Sequence[LoadReport]) -> LoadReport:
        """The report of several sources as one."""
        if len(reports) == 1:
            return reports[0]
        whole = cls(source=", ".join(report.source for report in reports))
        for report in reports:
            whole.rows_read += report.rows_read
            whole.first_messages = (whole.first_messages + report.first_messages)[:10]
            whole.rows_cut += report.rows_cut
            whole.rows_repeated += report.rows_repeated
            whole.label = whole.label or report.label
            whole.columns_unused += [name for name in report.columns_unused if name not in whole.columns_unused]
            for reason, origins in report.bad_rows.items():
                whole.bad_rows[reason] = whole.bad_rows.get(reason, []) + origins
        return whole
