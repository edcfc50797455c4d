"""The spread of an ensemble's scores, and the score that is careful of it."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_lightning.functional.ensembles import careful_score, ensemble_spread


def test_anchors():
    assert ensemble_spread(torch.tensor([[1.0, 3.0], [5.0, 5.0]])).tolist() == [1.0, 0.0]
    assert ensemble_spread(torch.tensor([[7.0]])).tolist() == [0.0]
    assert careful_score(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), penalty=0.5).tolist() == [1.5, 5.0]


def test_a_slow_twin_in_float64_also_far_from_zero():
    scores = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)) * 0.01 + 1000
    for row, spread, careful in zip(
        scores.tolist(), ensemble_spread(scores).tolist(), careful_score(scores, penalty=2.0).tolist(), strict=True
    ):
        mean = sum(row) / 4
        expected = math.sqrt(sum((score - mean) ** 2 for score in row) / 4)
        assert spread == pytest.approx(expected, rel=1e-6)
        assert careful == pytest.approx(mean - 2 * expected, rel=1e-6)


def test_the_spread_has_no_gradient_and_each_member_has_its_share_of_the_mean():
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    careful_score(scores, penalty=3.0).sum().backward()
    assert scores.grad.tolist() == [[0.25] * 4] * 3


def test_what_has_no_members_and_a_penalty_below_0_are_refused():
    for scores in (torch.tensor(1.0), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match="members"):
            ensemble_spread(scores)
    for penalty in (-0.1, math.nan):
        with pytest.raises(ValueError, match="penalty"):
            careful_score(torch.zeros(2, 2), penalty=penalty)
