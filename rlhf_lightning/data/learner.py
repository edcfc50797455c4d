"""What data asks of the module that learns from it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from lightning.pytorch import LightningDataModule

from rlhf_lightning.data.tokenizer import TokenizerSource


@runtime_checkable
class Learner(Protocol):
    """A module that knows its model: which tokenizer it has, for data that names none, and whether data suits it."""

    tokenizer: TokenizerSource | None

    def check_data(self, data: LightningDataModule | None) -> None: ...
