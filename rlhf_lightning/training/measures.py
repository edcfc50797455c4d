"""What a module measures of a batch, and the metrics that are fed with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric


class Measured(NamedTuple):
    """What a batch gives to metrics."""

    values: Mapping[str, Tensor | tuple[Tensor, ...]]
    """What a metric is updated with, by the metric's name."""
    others: tuple[Tensor, ...] = ()
    """What each metric that has no value of its own is updated with, such as the scores of both responses, [B] each."""

    def feed(self, metrics: nn.ModuleDict) -> None:
        """Update each metric."""
        for name, metric in named(metrics).items():
            given = self.values.get(name, self.others)
            metric.update(*given) if isinstance(given, tuple) else metric.update(given)


def means(*names: str) -> dict[str, Metric]:
    """Metrics that are means, by their names; each is defined in docs/metrics.md."""
    return {name: MeanMetric(nan_strategy="disable") for name in names}


def named(metrics: nn.ModuleDict) -> dict[str, Metric]:
    """The metrics of a module by their names."""
    return dict(metrics.items())
