"""Metrics of reward models and policies, exact over the whole split.

Legend: B pairs of a batch, N pairs of the split over all ranks, c and r the rewards of the chosen and the
rejected response, d = c - r.

Each metric takes `update(chosen [B], rejected [B])` with raw rewards, of any dtype, offset and scale. It
computes one float64 scalar (`PairCount`: int64) that depends neither on the batch size nor on the number of
processes, of which some may have seen no pair. Without any pair it is NaN (`PairCount`: 0). Shapes that
differ or are not [B] raise ValueError in `update`. A NaN or infinite reward raises UserError, a ValueError,
in `compute`: there the states are gathered, so all ranks raise together, and `update` never makes the host
wait for the GPU.

In a LightningModule: `self.auroc.update(chosen, rejected)`, then `self.log("val/auroc", self.auroc)`. Calling
the metric itself computes on every batch as well, which waits for the GPU. Pairs that a distributed sampler
repeats are counted again: drop them before `update`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error
from torchmetrics.utilities import dim_zero_cat

from rlhf_lightning.errors import ConfigurationError, UserError
from rlhf_lightning.functional.shapes import check_layout

__all__ = [
    "LabelAUROC",
    "MarginAUROC",
    "MeanGap",
    "PairCount",
    "PairwiseAccuracy",
    "PairwiseCalibrationError",
    "Perplexity",
    "PooledAUROC",
    "ShiftedLoss",
    "TokensPerSecond",
]

LARGEST_BELOW_ONE = math.nextafter(1.0, 0.0)


class _PairMetric(Metric):
    """A metric whose state moves between devices but is never rounded.

    torchmetrics ignores `module.half()`, yet lets `module.to(torch.bfloat16)` (Lightning's bf16-true) cast
    the states, the cached result, and the empty tensor with which a rank without pairs joins a gather.
    """

    is_differentiable = False
    full_state_update = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every gathered state; ranks that disagree on it break the collective."""
        return torch.float64

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> "_PairMetric":
        def move(state: Tensor) -> Tensor:
            return state.to(fn(state.new_empty(0)).device)

        return super()._apply(move, exclude_state)


class PairCount(_PairMetric):
    """Number of pairs N, int64, reported with every other metric."""

    pairs: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("pairs", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, chosen: Tensor, rejected: Tensor) -> None:
        check_layout(chosen=(chosen, "B"), rejected=(rejected, "B"))
        self.pairs = self.pairs + chosen.numel()

    def compute(self) -> Tensor:
        return self.pairs


class ResponseCount(Metric):
    """Number of responses, int64, reported with their means."""

    full_state_update = False
    responses: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("responses", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: Tensor) -> None:
        check_layout(scores=(scores, "B"))
        self.responses = self.responses + scores.numel()

    def compute(self) -> Tensor:
        return self.responses


class PairwiseAccuracy(_PairMetric):
    """Share of the pairs whose chosen response has the higher reward, a tie counted one half.

    mean([c > r] + [c = r] / 2): rewards of two prompts are never compared. State: three int64, whatever N.
    """

    higher_is_better = True
    half_points: Tensor
    pairs: Tensor
    not_finite: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("half_points", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("pairs", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("not_finite", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, chosen: Tensor, rejected: Tensor) -> None:
        check_layout(chosen=(chosen, "B"), rejected=(rejected, "B"))
        # Not `+=`: a state that Lightning reset under inference_mode may not change in place outside of it.
        self.half_points = self.half_points + 2 * (chosen > rejected).sum() + (chosen == rejected).sum()
        self.pairs = self.pairs + chosen.numel()
        self.not_finite = self.not_finite + _not_finite(chosen, rejected)

    def compute(self) -> Tensor:
        _refuse_not_finite(self, self.not_finite, self.pairs)
        return _float64_copy(self.half_points) / _float64_copy(2 * self.pairs)


class _RewardMetric(_PairMetric):
    """Keeps both rewards of every pair in float64: 16 bytes a pair, exact for every float dtype.

    In a `MetricCollection` the subclasses share one copy of this state.
    """

    chosen: list[Tensor]
    rejected: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("chosen", [], dist_reduce_fx="cat")
        self.add_state("rejected", [], dist_reduce_fx="cat")

    def update(self, chosen: Tensor, rejected: Tensor) -> None:
        check_layout(chosen=(chosen, "B"), rejected=(rejected, "B"))
        self.chosen.append(_float64_copy(chosen))
        self.rejected.append(_float64_copy(rejected))

    def _whole(self, state: list[Tensor]) -> Tensor:
        """A state as one tensor, empty where nothing was seen."""
        return dim_zero_cat(state) if len(state) else _float64_copy(torch.empty(0, device=self.device))

    def _rewards(self) -> tuple[Tensor, Tensor]:
        """Rewards of the split, chosen [N] and rejected [N], float64 and finite."""
        chosen, rejected = self._whole(self.chosen), self._whole(self.rejected)
        _refuse_not_finite(self, _not_finite(chosen, rejected), len(chosen))
        return chosen, rejected


class PooledAUROC(_RewardMetric):
    """Probability that a chosen response outscores a rejected one of any prompt, a tie counted one half.

    AUROC over {(c, 1)} u {(r, 0)}, all 2N responses. An offset shared by all responses of one prompt lowers
    it, although neither the Bradley-Terry loss nor `PairwiseAccuracy` can see such an offset. Hanley &
    McNeil 1982 (doi 10.1148/radiology.143.1.7063747): AUROC as this probability.
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        chosen, rejected = self._rewards()
        return _auroc(chosen, rejected)


class MarginAUROC(_RewardMetric):
    """P(d_i + d_j > 0) over all N^2 ordered couples of pairs, a tie counted one half.

    AUROC over {(d, 1)} u {(-d, 0)}, each pair in both orders. It flatters: normal margins of accuracy 0.70
    give 0.77. The subtraction is float64; digits that the rewards lost before `update` (float32 rewards
    around 1e6 come in steps of 0.06) stay lost.
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        chosen, rejected = self._rewards()
        margin = chosen - rejected
        return _auroc(margin, -margin)


class PairwiseCalibrationError(_RewardMetric):
    """Expected calibration error of sigmoid(d) as the probability that the chosen response is preferred.

    Each pair enters in both orders, (sigmoid(d), 1) and (sigmoid(-d), 0); with the label 1 alone, a
    perfectly calibrated model would be charged for every doubt. `n_bins` bins of equal width divide [0, 1];
    the result is the mean over the 2N entries of |mean probability - share of label 1| of their bin (Guo et
    al. 2017, arXiv 1706.04599, eq. 3). An even `n_bins` equals the top-label form, confidence max(p, 1 - p)
    against agreement, with n_bins / 2 bins on [0.5, 1]. An odd one has a bin around 1/2 that holds its pairs
    in both orders and is blind to them. An offset changes nothing, the scale does. `n_bins` below 2 raises
    ConfigurationError.
    """

    higher_is_better = False

    def __init__(self, n_bins: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(n_bins, int) or n_bins < 2:
            raise ConfigurationError(
                f"PairwiseCalibrationError: n_bins is {n_bins!r}, but a single bin holds every pair in both "
                "orders and always gives 0; use an integer of at least 2, best an even one"
            )
        self.n_bins = n_bins

    def compute(self) -> Tensor:
        chosen, rejected = self._rewards()
        margin = chosen - rejected
        # torchmetrics gives 1.0 a bin of its own, so the two orders of a saturated pair would part.
        probability = torch.cat([margin, -margin]).sigmoid().clamp(max=LARGEST_BELOW_ONE)
        return binary_calibration_error(probability, _labels(margin, -margin), n_bins=self.n_bins)


class MeanGap(_PairMetric):
    """Mean reward of desirable responses minus that of the others: float64, NaN without one of both.

    Takes `update(rewards [B], desirable [B] bool)`. State: two sums and two counts.
    """

    higher_is_better = True
    sums: Tensor
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rewards: Tensor, desirable: Tensor) -> None:
        check_layout(rewards=(rewards, "B"), desirable=(desirable, "B"))
        masks = _float64_copy(torch.stack([desirable, ~desirable]))
        self.sums = self.sums + masks @ _float64_copy(rewards)
        self.counts = self.counts + masks.sum(dim=1)

    def compute(self) -> Tensor:
        desirable, other = self.sums / self.counts
        return desirable - other


class LabelAUROC(_RewardMetric):
    """Probability that a desirable response has a higher reward than another one, a tie counted one half.

    Takes `update(rewards [B], desirable [B] bool)`; NaN without one of both. Kept as the rewards of two classes.
    """

    higher_is_better = True

    def update(self, rewards: Tensor, desirable: Tensor) -> None:
        check_layout(rewards=(rewards, "B"), desirable=(desirable, "B"))
        self.chosen.append(_float64_copy(rewards[desirable]))
        self.rejected.append(_float64_copy(rewards[~desirable]))

    def compute(self) -> Tensor:
        chosen, rejected = self._whole(self.chosen), self._whole(self.rejected)
        every = torch.cat([chosen, rejected])
        _refuse_not_finite(self, _not_finite(every, every), len(every))
        return _auroc(chosen, rejected)


class ShiftedLoss(_PairMetric):
    """Mean of losses whose shift is known only once all responses are: float64.

    Takes `update(ratios [B], desirable [B] bool, mismatched [K])`: log-ratios policy - reference of responses, and of
    responses to other prompts. `loss(ratios [N], desirable [N], mismatched [])` gives the loss of each response of the
    split, where `mismatched` is the mean of the last, 0 without any.
    """

    higher_is_better = False
    ratios: list[Tensor]
    desirable: list[Tensor]
    total: Tensor
    count: Tensor

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss = loss
        self.add_state("ratios", [], dist_reduce_fx="cat")
        self.add_state("desirable", [], dist_reduce_fx="cat")
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, ratios: Tensor, desirable: Tensor, mismatched: Tensor) -> None:
        check_layout(ratios=(ratios, "B"), desirable=(desirable, "B"), mismatched=(mismatched, "K"))
        self.ratios.append(_float64_copy(ratios))
        self.desirable.append(_float64_copy(desirable))
        self.total = self.total + _float64_copy(mismatched).sum()
        self.count = self.count + mismatched.numel()

    def compute(self) -> Tensor:
        if not len(self.ratios):
            return self.total.new_tensor(math.nan)
        mean = self.total / self.count.clamp(min=1)
        return self.loss(dim_zero_cat(self.ratios), dim_zero_cat(self.desirable).bool(), mean).mean()


class Perplexity(_PairMetric):
    """exp of the mean negative log-likelihood per token, over all tokens of the split: float64.

    Takes `update(nll [B], tokens [B])`: the summed negative log-likelihood of each response in nats, and its tokens.
    """

    higher_is_better = False
    nll: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nll", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor) -> None:
        check_layout(nll=(nll, "B"), tokens=(tokens, "B"))
        self.nll = self.nll + _float64_copy(nll).sum()
        self.tokens = self.tokens + tokens.sum()

    def compute(self) -> Tensor:
        return (self.nll / self.tokens).exp()


class TokensPerSecond(_PairMetric):
    """Tokens of all processes over the seconds that one of them took, float64. Takes `update(tokens [], seconds)`."""

    higher_is_better = True
    tokens: Tensor
    seconds: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("seconds", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="mean")

    def update(self, tokens: Tensor, seconds: float) -> None:
        self.tokens = self.tokens + tokens
        self.seconds = self.seconds + seconds

    def compute(self) -> Tensor:
        return self.tokens / self.seconds


def _auroc(positive: Tensor, negative: Tensor) -> Tensor:
    """AUROC of float64 scores [N] and [M], a tie one half, NaN if N or M is 0.

    torchmetrics puts a sigmoid on scores outside [0, 1], which ties 20 and 23 in float32 (its issue 2819);
    ranks over their number keep the order and stay inside.
    """
    if not len(positive) or not len(negative):
        return positive.new_tensor(math.nan)
    values, ranks = torch.unique(torch.cat([positive, negative]), return_inverse=True)
    with _dividing_in_float64():
        return binary_auroc(ranks.double() / len(values), _labels(positive, negative))


def _labels(positive: Tensor, negative: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(positive), torch.zeros_like(negative)]).long()


@contextmanager
def _dividing_in_float64() -> Iterator[None]:
    """binary_auroc divides counts in the default dtype, which is bfloat16 in Lightning's bf16-true steps."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _float64_copy(x: Tensor) -> Tensor:
    """A copy of x, which later changes of x do not reach; on the CPU for MPS, which has no float64."""
    device = torch.device("cpu") if x.device.type == "mps" else x.device
    return x.detach().to(device, torch.float64, copy=True)


def _not_finite(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Number of pairs with a NaN or infinite reward, int64 scalar."""
    return (~(chosen.isfinite() & rejected.isfinite())).sum()


def _refuse_not_finite(metric: Metric, not_finite: Tensor, pairs: Tensor | int) -> None:
    if not_finite:
        raise UserError(
            f"{type(metric).__name__}: {int(not_finite)} of {int(pairs)} pairs have a NaN or infinite "
            "reward, which has no rank; score in float32 (float16 ends at 65504), or look for divergence"
        )
