"""Rows of prompt and response become one right-padded block, whatever they are padded with."""

from __future__ import annotations

import pytest
import torch

from rlhf_lightning.batches import collate_rows, like_together


@pytest.mark.parametrize("pad_id", [0, 7])
def test_rows_are_padded_on_the_right_and_their_masks_come_from_lengths(pad_id):
    rows = [torch.tensor([5, 7, 6, 7]), torch.tensor([7, 7])]  # a token that is also what is padded with
    inputs = collate_rows(rows, [3, 1], pad_id=pad_id)
    assert inputs.input_ids.tolist() == [[5, 7, 6, 7], [7, 7, pad_id, pad_id]]
    assert inputs.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert inputs.response_mask.tolist() == [[False, False, False, True], [False, True, False, False]]
    assert (inputs.input_ids.dtype, inputs.attention_mask.dtype) == (torch.int64, torch.bool)
    assert [tensor.data_ptr() for tensor in inputs.text] == [tensor.data_ptr() for tensor in inputs[:3]]
    assert inputs.extra is None


def test_a_prompt_without_a_response_has_none_in_its_mask():
    inputs = collate_rows([torch.tensor([1, 2]), torch.tensor([1, 2, 3])], [2, 2], pad_id=0)
    assert inputs.response_mask.sum(dim=1).tolist() == [0, 1]


def test_rows_of_a_prompt_lie_side_by_side_by_their_longest():
    prompts = [[1, 2], [3], [1, 2], [4, 5, 6], [3]]
    lengths = [9, 4, 3, 5, 6]
    # The prompt 4 5 6 is at most 5 tokens long with its response, 3 at most 6, and 1 2 at most 9.
    assert like_together(prompts, lengths) == [3, 1, 4, 2, 0]
    assert like_together([], []) == []
