"""The tensors that travel from data to models.

B pairs or prompts, T padded tokens, T_i tokens of row i. Masks are True where a token belongs to the row; they come
from lengths, never from a comparison with the pad id, so that pad == eos changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PreferenceBatch(NamedTuple):
    """B preference pairs as 2B padded rows, chosen first: row i and row B + i are the two sides of pair i."""

    input_ids: Tensor
    """[2B, T] int64: prompt, response, terminator, padding."""
    attention_mask: Tensor
    """[2B, T] bool, True on every token of the row, the terminator included."""
    response_mask: Tensor
    """[2B, T] bool, True on the response and its terminator."""
    margin: Tensor
    """[B] float32, how much better the chosen response is said to be; 0 where the data does not say."""
    index: Tensor
    """[B] int64, position of the pair in its data set."""
    weight: Tensor
    """[] float32: the batch's pairs over the average number of pairs in the batches of its optimizer step, so that
    the mean over equally counted batches is the mean over pairs. 1 for full batches."""

    @property
    def pairs(self) -> int:
        """Number of pairs B."""
        return self.margin.shape[0]


class PromptBatch(NamedTuple):
    """B prompts, each as long as it is: nothing is padded."""

    input_ids: list[Tensor]
    """B tensors [T_i] int64: the prompt, up to where the assistant's reply begins. A list, because torch makes one of a
    nested tuple when it pins memory."""
    index: Tensor
    """[B] int64, position of the prompt in its data set."""
    weight: Tensor
    """[] float32: the batch's prompts over the average number of prompts in the batches of its step, over all
    processes, so that the mean over equally counted batches is the mean over prompts. 1 for full batches."""

    @property
    def prompts(self) -> int:
        """Number of prompts B."""
        return len(self.input_ids)
