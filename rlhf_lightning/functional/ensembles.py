"""Scores of an ensemble of reward models: how far its members agree, and what a careful policy makes of it.

K members; the leading dimensions are those of the rows.
"""

from __future__ import annotations

from torch import Tensor


def ensemble_spread(scores: Tensor) -> Tensor:
    """Standard deviation of the scores of K members, [..., K], with divisor K (ddof 0): [...] float32, no gradient.

    In units of the score; 0 for one member. Coste et al. 2023 (arXiv 2310.02743) take its square, with the same
    divisor. Raises `ValueError` for a tensor without members.
    """
    if scores.dim() == 0 or scores.shape[-1] == 0:
        raise ValueError(f"scores has the shape {list(scores.shape)}: the last dimension must be that of the members")
    # In float64: float32 scores around 1e3 would leave a few digits of a small spread.
    return scores.detach().double().std(dim=-1, correction=0).float()


def careful_score(scores: Tensor, *, penalty: float) -> Tensor:
    """mean - penalty * spread of the K scores of each row, [..., K] to [...] float32.

    Uncertainty-weighted optimization of Coste et al. 2023 (arXiv 2310.02743), with the standard deviation in the place
    of the variance, so that the penalty has no unit. Raises `ValueError` for a penalty below 0 and as
    `ensemble_spread` does.
    """
    if not penalty >= 0:
        raise ValueError(f"penalty is {penalty}: below 0 it would reward what the members disagree on; use 0 or more")
    return scores.float().mean(dim=-1) - penalty * ensemble_spread(scores)
