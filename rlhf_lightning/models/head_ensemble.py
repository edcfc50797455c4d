"""Several reward heads on one backbone, whose mean is the score and whose spread says how sure it is.

K heads, H numbers that a head reads of a row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.linear_head import LinearHead

if TYPE_CHECKING:
    from rlhf_lightning.models.reward_network import RewardHead

FILE = "score.safetensors.heads"
"""Of all heads, in the format of safetensors. Its name does not end as theirs do: vLLM loads every file that does."""
_NUMBER = "num_heads"


class HeadEnsemble(nn.ModuleList):
    """K heads of one kind, each begun by itself; the score is their mean (Coste et al. 2023, arXiv 2310.02743).

    They share a backbone, where the ensembles of the paper share none: what the backbone does not see, no head doubts.
    """

    def __init__(self, heads: Sequence[RewardHead | LinearHead]) -> None:
        super().__init__(heads)

    @property
    def one(self) -> Any:
        """The first of them."""
        return self[0]

    @property
    def settings(self) -> dict[str, Any]:
        """What config.json says of them: the keys of the `mean` head, and how many it was made of."""
        return self._mean_settings | {_NUMBER: len(self)}

    @property
    def _mean_settings(self) -> dict[str, Any]:
        own = self.one.settings
        return own | {"hidden_size": len(self) * own["hidden_size"]} if "hidden_size" in own else own

    def each(self, hidden: Tensor) -> Tensor:
        """Scores [..., K] float32 of hidden states [..., H]."""
        return torch.stack([head(hidden) for head in self], dim=-1)

    def forward(self, hidden: Tensor) -> Tensor:
        """The mean of the scores, [...] float32."""
        return self.each(hidden).mean(dim=-1)

    def mean(self) -> RewardHead | LinearHead:
        """One head of the same kind that gives the mean: the mean of linear ones, or MLPs side by side in a wide one.

        So whoever knows one head can load it. Its weights are copies.
        """
        mean = copy.deepcopy(self.one)  # not a new one, which would draw random numbers in the middle of a run
        heads: list[Any] = list(self)
        if isinstance(mean, LinearHead):
            mean.weight = _joined([head.weight for head in heads], mean=True)
            return mean
        layers = [[layer for layer in head if isinstance(layer, nn.Linear)] for head in (mean, *heads)]
        (first, last), (firsts, lasts) = layers[0], zip(*layers[1:], strict=True)
        first.weight, first.bias = (_joined([getattr(layer, part) for layer in firsts]) for part in ("weight", "bias"))
        last.weight = _joined([layer.weight / len(self) for layer in lasts], dim=1)
        last.bias = _joined([layer.bias for layer in lasts], mean=True)
        first.out_features = last.in_features = len(first.weight)
        mean.settings = self._mean_settings
        return mean


def _joined(tensors: Sequence[Tensor], *, dim: int = 0, mean: bool = False) -> nn.Parameter:
    return nn.Parameter((torch.stack(list(tensors)).mean(0) if mean else torch.cat(list(tensors), dim)).detach())


def each_score(head: nn.Module, hidden: Tensor) -> Tensor:
    """Scores [..., K] float32 of hidden states [..., H] by the heads of an ensemble, or by the one that there is."""
    return head.each(hidden) if isinstance(head, HeadEnsemble) else head(hidden).unsqueeze(-1)


def head_settings(saved: dict[str, Any]) -> Any:
    """The keys of one of the heads, of what config.json says of the mean of K."""
    if saved.get(_NUMBER, 1) > 1 and saved.get("hidden_size"):
        return saved | {"hidden_size": saved["hidden_size"] // saved[_NUMBER]}
    return saved


def save_heads(heads: HeadEnsemble, directory: Path) -> None:
    """Write them beside the weights of a model, which hold their mean alone."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in heads.state_dict().items()}, directory / FILE)


def load_heads(heads: HeadEnsemble, directory: Path, mean: dict[str, Tensor]) -> None:
    """Read what `save_heads` wrote, beside the weights of their `mean`.

    Raises `ModelError` where the file is not there, or holds other heads: ones whose mean others have trained since.
    """
    from safetensors.torch import load_file

    alone = f"to use what stands there as one head, remove {_NUMBER} from its config.json"
    if not (directory / FILE).is_file():
        raise ModelError(f"{directory}: config.json says {len(heads)} heads, and {FILE} is not there; {alone}")
    try:
        heads.load_state_dict(load_file(directory / FILE))
        expected = heads.mean().state_dict()
        same = all(torch.allclose(expected[name], mean[name].float(), rtol=1e-4, atol=1e-6) for name in expected)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{directory / FILE}: its heads do not fit to config.json ({reason}); {alone}") from error
    if not same:
        raise ModelError(
            f"{directory / FILE}: the weights of the model are not the mean of these heads, so they were trained on "
            f"since; {alone}"
        )
