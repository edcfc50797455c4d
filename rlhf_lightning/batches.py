"""The tensors that travel from data to models.

B pairs or prompts, R rows, T padded tokens, T_i tokens of row i. Masks are True where a token belongs to the row; they
come from lengths, never from a comparison with the pad id, so that pad == eos changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Layout = Literal["auto", "padded", "packed", "shared"]
"""How the rows of a forward pass lie: padded, end to end (`packed`), or with what they begin alike once (`shared`).
`auto` is the last of the three that gives a model's rows the numbers that they have alone."""


class ModelInputs(NamedTuple):
    """R rows of a prompt and its response, right-padded, as a model takes them in one forward pass."""

    input_ids: Tensor
    """[R, T] int64: prompt, response, padding."""
    attention_mask: Tensor
    """[R, T] bool, True on every token of the row."""
    response_mask: Tensor
    """[R, T] bool, True on the tokens of the response."""
    extra: dict[str, Tensor] | None = None
    """What a model takes beside text, such as pixels, by the name of its argument; None for text alone."""

    @property
    def text(self) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of a model of text: ids, attention mask and response mask."""
        return self[:3]


def collate_rows(rows: Sequence[Tensor], prompt_lengths: Sequence[int], *, pad_id: int) -> ModelInputs:
    """Right-pad R rows of token ids to the longest of them.

    `rows` are 1-D int64 on one device, each a prompt of `prompt_lengths[i]` tokens and its response. Nothing reads what
    is padded with: the masks come from the lengths.
    """
    input_ids = pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
    device = input_ids.device
    position = torch.arange(input_ids.shape[1], device=device)
    starts = torch.tensor(prompt_lengths, device=device)[:, None]
    ends = torch.tensor([len(row) for row in rows], device=device)[:, None]
    return ModelInputs(input_ids, position < ends, (position >= starts) & (position < ends))


def like_together(prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    """The order in which to divide rows into batches: rows of like length together, those of one prompt side by side.

    `prompts` are token ids of each row, `lengths` tokens of prompt and response together. Prompts come in the order of
    their longest row: a batch that holds all rows of a prompt has it computed once (see `models.layouts`).
    """
    keys = [tuple(prompt) for prompt in prompts]
    longest: dict[tuple[int, ...], int] = {}
    for key, length in zip(keys, lengths, strict=True):
        longest[key] = max(length, longest.get(key, 0))
    return sorted(range(len(keys)), key=lambda row: (longest[keys[row]], keys[row], lengths[row]))


class PreferenceBatch(NamedTuple):
    """B preference pairs as 2B padded rows, chosen first: row i and row B + i are the two sides of pair i."""

    input_ids: Tensor
    """[2B, T] int64: prompt, response, EOS, padding."""
    attention_mask: Tensor
    """[2B, T] bool, True on every token of the row, EOS included."""
    response_mask: Tensor
    """[2B, T] bool, True on the response and its EOS."""
    margin: Tensor
    """[B] float32, how much better the chosen response is said to be; 0 where the data does not say."""
    index: Tensor  # type: ignore[assignment]  # hides the method of tuples
    """[B] int64, position of the pair in its data set."""
    weight: Tensor
    """[] float32: the batch's pairs over the average number of pairs in the batches of its optimizer step, so that
    the mean over equally counted batches is the mean over pairs. 1 for full batches."""

    @property
    def pairs(self) -> int:
        """Number of pairs B."""
        return self.margin.shape[0]

    @property
    def chosen(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids, attention mask and response mask of the chosen rows, [B, T] each."""
        return self.input_ids[: self.pairs], self.attention_mask[: self.pairs], self.response_mask[: self.pairs]


class SFTBatch(NamedTuple):
    """B conversations as padded rows."""

    input_ids: Tensor
    """[B, T] int64: the conversation up to its last assistant turn and the EOS after it, padding."""
    attention_mask: Tensor
    """[B, T] bool, True on every token of the row, EOS included."""
    response_mask: Tensor
    """[B, T] bool, True on the assistant turns that are learned, each with its EOS."""
    index: Tensor  # type: ignore[assignment]  # hides the method of tuples
    """[B] int64, position of the conversation in its data set."""
    weight: Tensor
    """[] float32, as that of a `PreferenceBatch`."""

    @property
    def chosen(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids, attention mask and response mask of what SFT learns: all of it."""
        return self[:3]


class UnpairedBatch(NamedTuple):
    """B responses that are judged one at a time, as padded rows."""

    input_ids: Tensor
    """[B, T] int64: prompt, response, EOS, padding."""
    attention_mask: Tensor
    """[B, T] bool, True on every token of the row, EOS included."""
    response_mask: Tensor
    """[B, T] bool, True on the response and its EOS."""
    desirable: Tensor
    """[B] bool, True where the response is a good one."""
    index: Tensor  # type: ignore[assignment]  # hides the method of tuples
    """[B] int64, position of the response in its data set."""
    weight: Tensor
    """[] float32, as that of a `PreferenceBatch`."""
    mismatched: ModelInputs | None
    """Prompts with the responses to other ones, K rows: of an optimizer step all those of this process, in its first
    batch, and None in the others; of an evaluation those of the batch's prompts. K may be 0."""


class PromptBatch(NamedTuple):
    """B prompts, each as long as it is: nothing is padded."""

    input_ids: list[Tensor]
    """B tensors [T_i] int64: the prompt, up to where the assistant's response begins. A list, as torch makes one of
    a nested tuple when it pins memory."""
    index: Tensor  # type: ignore[assignment]  # hides the method of tuples
    """[B] int64, position of the prompt in its data set."""
    weight: Tensor
    """[] float32: the batch's prompts over the average number of prompts in the batches of its step, over all
    processes, so that the mean over equally counted batches is the mean over prompts. 1 for full batches."""

    @property
    def prompts(self) -> int:
        """Number of prompts B."""
        return len(self.input_ids)
