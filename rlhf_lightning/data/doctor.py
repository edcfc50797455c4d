"""The data doctor: what is in pairs, conversations or judged responses, row by row, before a run meets it.

It looks through the eyes of the run's data module: same reading, same tokens, same reasons for leaving a row out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_lightning.data.chat_format import ChatFormat, EncodedPrompt, EncodedResponses
from rlhf_lightning.data.datamodules import ResponseDataModule
from rlhf_lightning.data.examples import LoadReport, Message, Refusal
from rlhf_lightning.data.roles import Role
from rlhf_lightning.data.selection import (
    TokenizedConversations,
    TokenizedPairs,
    TokenizedResponses,
    TokenizedRows,
    Truncation,
    fit_rows,
)
from rlhf_lightning.data.sources import local_files
from rlhf_lightning.data.statistics import (
    LayoutCost,
    both_labels,
    contradictions,
    duplicates,
    layout_costs,
    longer_chosen,
    shared_prompts,
)
from rlhf_lightning.data.tokenized import READERS
from rlhf_lightning.data.unpaired_datamodule import UnpairedDataModule

QUANTILES = (0, 5, 25, 50, 75, 95, 99, 100)
"""Percent."""
LIMITS = (256, 512, 1024, 2048, 4096, 8192)
"""Values of max_length whose effect is shown beside the configured one."""
UNLIMITED = 2**30
SAMPLES = 3

Kind = Literal["control", "prompt", "response", "gap"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a row of tokens."""

    text: str
    kind: Kind
    """`control`: a control token; `prompt`; `response`, which is what the response mask marks, its EOS token
    included; `gap`: a remark on what is not shown."""
    in_response: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One row as the model gets it."""

    origin: str
    sides: dict[str, list[Piece]]
    """Of a pair `chosen` and `rejected`, of a conversation `response`."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What a value of max_length would do."""

    max_length: int
    cut: int
    """Rows whose prompt would lose its beginning."""
    too_long: int
    """Rows that would be left out."""


@dataclass(frozen=True)
class RoleDiagnosis:
    """Findings on the rows of one role. Rows are named by origin (`file, row 17`, counted from 0)."""

    role: Role
    source: str
    files: int
    """Number of files or hub splits that the rows come from."""
    rows_read: int
    bad_rows: dict[str, list[str]]
    """Reason code -> rows that are left out; `too_long` under the configured max_length."""
    messages: list[str]
    """The first ten of them in words, ties aside."""
    label: str | None
    """Column that says which of two responses is better, where the rows are laid out so."""
    columns_unused: list[str]
    """Columns, and keys of turns such as `prompt[].name`, that nothing was made of."""
    kind: str
    """`pairs`, `conversations` or `responses`."""
    pairs: int
    """Rows that would be used."""
    rows_cut: list[str]
    quantiles: dict[str, dict[int, int]]
    """Lengths of prompt, each response and the (longer) row by percent (`QUANTILES`), before any cut, in the unit, of
    all rows that are no bad rows."""
    limits: list[Limit] | None
    layouts: list[LayoutCost] | None
    duplicates: list[str]
    """Used rows, as in the fields below, that stand more than once: all but the first."""
    contradictions: list[str]
    """Pairs that also stand with the opposite preference, or judged responses that also have the opposite label."""
    desirable: int | None
    """How many of the judged responses that would be used are good; None where none are judged."""
    shared_prompts: list[str] | None
    """Validation rows whose prompt is also trained on; None for training rows."""
    longer_chosen: float | None
    """Share of the used pairs whose chosen response has more characters, ties one half; None where there is none."""
    foreign_tokens: list[str]
    """Rows with what looks like a control token or role marker of some model written out in a text."""
    samples: list[Sample]

    @property
    def dropped(self) -> int:
        return sum(map(len, self.bad_rows.values()))


@dataclass(frozen=True)
class Diagnosis:
    """Findings on all roles, and the settings they hold for."""

    unit: Literal["tokens", "words"]
    tokenizer: str | None
    template: str
    max_length: int | None
    truncation: str
    batch_size: int
    accumulate: int
    unseen: list[str] | None
    """Differences between texts that the tokenizer does not see (`ChatFormat.unseen`); None without a tokenizer."""
    roles: list[RoleDiagnosis]

    @property
    def exit_code(self) -> int:
        """0: every row would be used. 1: some would be left out. 2: of a role nothing would be left."""
        if not all(role.pairs for role in self.roles):
            return 2
        return int(any(role.dropped for role in self.roles))


class Words:
    """Stands in for a `ChatFormat` where no tokenizer is named: a token is a word, and there is no template."""

    eos_id = pad_id = tail_length = 0
    knows_thoughts = True

    def generation_text(self, messages: Sequence[Message]) -> str:
        return "\n\n".join(message["content"] for message in messages)

    def control_token_in(self, texts: Iterable[str]) -> None:
        return None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """As many numbers as each text has words; what they are does not matter, that texts of the same words have the
        same ones, and others others, does."""
        return [_word_ids(text.split()) for text in texts]

    def encode_turns(self, prompts: Sequence[tuple[Sequence[Message], str]]) -> list[EncodedPrompt]:
        return [
            EncodedPrompt(*prompt, ids, [0])
            for prompt, ids in zip(prompts, self.encode([text for _, text in prompts]), strict=True)
        ]

    def encode_responses(
        self, prompts: Sequence[EncodedPrompt], responses: Sequence[Sequence[str]]
    ) -> list[EncodedResponses]:
        sides = [[[*ids, self.eos_id] for ids in self.encode(its)] for its in responses]
        return [EncodedResponses(prompt.ids, its) for prompt, its in zip(prompts, sides, strict=True)]

    def assistant_turns(self, prompt: EncodedPrompt) -> list[tuple[int, int]]:
        return []

    def says_nothing(self, response: str, ids: Sequence[int]) -> bool:
        return len(ids) == 1

    def fingerprint(self) -> str:
        return "words"


def _word_ids(words: list[str]) -> list[int]:
    digest = hash(" ".join(words))
    return [digest & 0x7FFFFFFF, digest >> 31 & 0x7FFFFFFF, *[0] * (len(words) - 2)][: len(words)]


def diagnose(data: ResponseDataModule, *, roles: Sequence[Role] = ("train", "val"), accumulate: int = 1) -> Diagnosis:
    """Read, validate and tokenize the data of a run, and say what is in them.

    `data` must not have been set up; it is changed (no row is refused any more). Raises `DataError` when a source is
    not usable at all, `ModelError` when the tokenizer is not.
    """
    max_length, truncation = data.max_length, data.truncation
    data.max_length, data.on_bad_rows = UNLIMITED, "drop"
    data.limits = dict.fromkeys(data.limits)
    if data.tokenizer is None:
        data.chat_format, max_length = Words(), None  # type: ignore[assignment]  # takes the place of one
    data.read(roles)
    found = [
        _diagnose_role(data, role, max_length=max_length, truncation=truncation, accumulate=accumulate)
        for role in roles
    ]
    form, template = data.chat_format if isinstance(data.chat_format, ChatFormat) else None, "none"
    if form is not None:
        template = "transcript" if form.template is None else "chat template"
    return Diagnosis(
        unit="words" if form is None else "tokens",
        tokenizer=data.tokenizer_source,
        template=template,
        max_length=max_length,
        truncation=truncation,
        batch_size=data.batch_size,
        accumulate=accumulate,
        unseen=None if form is None else form.unseen,
        roles=found,
    )


def _diagnose_role(
    data: ResponseDataModule, role: Role, *, max_length: int | None, truncation: Truncation, accumulate: int
) -> RoleDiagnosis:
    everything, report, form = data.rows[role], data.reports[role], data.chat_format
    sources, split, _ = data.role_sources(role)
    kept, limits, layouts = everything, None, None
    bad_rows, messages, rows_cut = dict(report.bad_rows), list(report.first_messages), []
    if max_length is not None:
        kept, cut, too_long = _fitted(everything, max_length, truncation)
        rows_cut = everything.origins(cut)
        if len(too_long):
            bad_rows["too_long"] = everything.origins(too_long)
            lengths = everything.lengths[too_long[: 10 - len(messages)]]
            messages += [
                f"{origin}: the row has {length} tokens, max_length is {max_length}"
                for origin, length in zip(bad_rows["too_long"], lengths, strict=False)
            ]
        sizes = sorted({*LIMITS, max_length})
        limits = [Limit(size, *map(len, _fitted(everything, size, truncation)[1:])) for size in sizes]
        layouts = layout_costs(kept, data.batch_size, accumulate) if len(kept) else None
    is_val = role != "train"
    trained = data.rows["train"]
    if is_val and max_length is not None:
        trained, _, _ = _fitted(trained, max_length, truncation)
    good = None
    if isinstance(data, UnpairedDataModule) and isinstance(kept, TokenizedResponses):
        good = kept.desirable(data.rating_threshold)
    return RoleDiagnosis(
        role=role,
        source=report.source,
        files=sum(len(local_files(one.source, split=split) or [one]) for one in sources),
        rows_read=report.rows_read,
        bad_rows=bad_rows,
        messages=messages,
        label=report.label,
        columns_unused=report.columns_unused,
        kind=kept.kind,
        pairs=len(kept),
        rows_cut=rows_cut,
        quantiles=_quantiles(everything, eos=max_length is not None),
        limits=limits,
        layouts=layouts,
        duplicates=kept.origins(duplicates(kept)),
        contradictions=kept.origins(_contradictions(kept, good)),
        desirable=None if good is None else int(good.sum()),
        shared_prompts=kept.origins(shared_prompts(trained, kept)) if is_val else None,
        longer_chosen=longer_chosen(kept) if len(kept) and isinstance(kept, TokenizedPairs) else None,
        foreign_tokens=kept.origins(np.flatnonzero(kept.numbers("foreign_tokens"))),
        samples=_token_samples(kept, form) if isinstance(form, ChatFormat) else _text_samples(data, role),
    )


def _contradictions(rows: TokenizedRows, desirable: np.ndarray | None) -> np.ndarray:
    if isinstance(rows, TokenizedPairs):
        return contradictions(rows)
    return np.array([], dtype=np.int64) if desirable is None else both_labels(rows, desirable)


def _fitted(
    pairs: TokenizedRows, max_length: int, truncation: Truncation
) -> tuple[TokenizedRows, np.ndarray, np.ndarray]:
    """The rows that fit into `max_length`, and the positions of those cut and of those left out."""
    kept: np.ndarray = np.empty(len(pairs), dtype=bool)
    cut: np.ndarray = np.empty(len(pairs), dtype=bool)
    for number, store in enumerate(pairs.stores):
        own = pairs.source == number
        fit = fit_rows(store, max_length=max_length, truncation=truncation)
        kept[own], cut[own] = fit.kept[pairs.rows[own]], fit.cut[pairs.rows[own]]
    rows = [pairs.rows[kept & (pairs.source == number)] for number in range(len(pairs.stores))]
    return type(pairs)(pairs.stores, rows, max_length=max_length), np.flatnonzero(cut), np.flatnonzero(~kept)


def _quantiles(rows: TokenizedRows, *, eos: bool) -> dict[str, dict[int, int]]:
    parts = rows.segment_lengths.copy()
    parts[:, 1:] -= 0 if eos else 1
    columns = dict(zip(_parts(rows), parts.T, strict=True)) | {"row": parts[:, 0] + parts[:, 1:].max(axis=1)}
    return {
        name: dict(zip(QUANTILES, np.percentile(lengths, QUANTILES, method="inverted_cdf").tolist(), strict=True))
        for name, lengths in columns.items()
    }


def _parts(rows: TokenizedRows) -> tuple[str, ...]:
    """What the columns of ids hold: `prompt`, then the responses."""
    return rows.stores[0].id_columns


def _token_samples(rows: TokenizedRows, chat_format: ChatFormat) -> list[Sample]:
    """The first row, one of middle length and the longest, decoded."""
    if not len(rows):
        return []
    order = np.argsort(rows.lengths, kind="stable")
    positions = dict.fromkeys([0, int(order[len(order) // 2]), int(order[-1])])
    origins = rows.origins(np.array(list(positions)))
    samples = []
    for position, origin in zip(positions, origins, strict=True):
        prompt, *sides = rows.segments(position)
        decoded = {}
        for name, side in zip(_parts(rows)[1:], sides, strict=True):
            mask = np.arange(len(prompt) + len(side)) >= len(prompt)
            if isinstance(rows, TokenizedConversations):
                mask = rows.response_mask(position)
            decoded[name] = _decoded(np.concatenate([prompt, side]).tolist(), mask.tolist(), chat_format)
        samples.append(Sample(origin, decoded))
    return samples


def _decoded(ids: list[int], mask: list[bool], chat_format: ChatFormat) -> list[Piece]:
    """Texts of a row's stretches inside and outside of its response mask, control tokens apart."""
    pieces: list[Piece] = []
    kinds = [(learned, token in chat_format.control_ids) for token, learned in zip(ids, mask, strict=True)]
    begin = 0
    for (learned, is_control), group in itertools.groupby(kinds):
        end = begin + len(list(group))
        for start, stop in [(place, place + 1) for place in range(begin, end)] if is_control else [(begin, end)]:
            text = chat_format.decode_after(ids[:start], ids[start:stop])
            pieces.append(Piece(text, "control" if is_control else "response" if learned else "prompt", learned))
        begin = end
    return pieces


def _text_samples(data: ResponseDataModule, role: Role) -> list[Sample]:
    """The first rows as texts, where there is no tokenizer to show tokens."""
    sources, split, _ = data.role_sources(role)
    source, kind = sources[0], data.rows_class.kind
    rows = READERS[kind](source.source, LoadReport(""), columns=source.columns or data.columns, split=split)
    samples = []
    for example in itertools.islice((row for row in rows if not isinstance(row, Refusal)), SAMPLES):
        turns = "".join(f"[{message['role']}] {message['content']}\n\n" for message in example.prompt)
        prompt = Piece(f"{turns}[assistant] ", "prompt", False)
        sides = [[prompt, Piece(text, "response", True)] for text in example.responses]
        samples.append(Sample(example.origin, dict(zip(_parts(data.rows[role])[1:], sides, strict=True))))
    return samples
