"""From sources to batches of responses that are judged one at a time, for KTO."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_lightning.batches import UnpairedBatch
from rlhf_lightning.data.batching import MicroBatch, collate_responses
from rlhf_lightning.data.datamodules import ResponseDataModule
from rlhf_lightning.data.examples import LoadReport
from rlhf_lightning.data.roles import Role
from rlhf_lightning.data.selection import TokenizedResponses
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.statistics import both_labels, duplicates
from rlhf_lightning.data.tokenizer import TokenizerSource
from rlhf_lightning.errors import DataError


class UnpairedDataModule(ResponseDataModule[TokenizedResponses]):
    """Responses with a label, good or bad, as right-padded `UnpairedBatch`es; a preference pair gives one of each.

    A row is a prompt, its response, and a `label`: true or false, 1 or 0, 1 or -1, good or bad, or a rating.

    Args:
        rating_threshold: Responses with this rating, and better ones, are good; needed where labels are other numbers
            than 1 and 0, or 1 and -1.
    """

    rows_class = TokenizedResponses

    def __init__(
        self,
        train: Source,
        val: Source | None = None,
        test: Source | None = None,
        tokenizer: TokenizerSource | None = None,
        rating_threshold: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(train, val, test, tokenizer, **kwargs)
        self.rating_threshold = rating_threshold

    def desirable(self, role: Role) -> np.ndarray:
        """Which responses of a role are good, [P] bool, once `setup` has run."""
        return self.rows[role].desirable(self.rating_threshold)

    def _select(self, role: Role) -> tuple[TokenizedResponses, LoadReport]:
        rows, report = super()._select(role)
        good = int(np.count_nonzero(rows.desirable(self.rating_threshold)))
        if good in (0, len(rows)):
            raise DataError(
                f"{report.source}: {'all' if good else 'none'} of its {len(rows)} responses are good, so there is "
                "nothing to tell apart; look at the labels and data.rating_threshold"
                + (", or learn them with SFT" if good else "")
            )
        return rows, report

    def _prompts(self, role: Role) -> np.ndarray:
        return self.rows[role].numbers("prompt_hash")

    def _collate(self, role: Role) -> Callable[[MicroBatch], UnpairedBatch]:
        return functools.partial(
            collate_responses,
            responses=self.rows[role],
            desirable=self.desirable(role),
            pad_id=self._format().pad_id,
        )

    def _statistics(self, leak: str) -> str:
        rows, good = self.rows["train"], self.desirable("train")
        return (
            f"responses: {good.sum()} good and {(~good).sum()} bad ones in train; {len(duplicates(rows))} duplicates, "
            f"{len(both_labels(rows, good))} with both labels; {leak}; more from `rlhf-lightning doctor`"
        )
