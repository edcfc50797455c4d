"""Which sources serve training, validation and test, and how one source is divided between the first two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from rlhf_lightning.data.sources import Source, Split, WeightedSource, has_split, source_list
from rlhf_lightning.data.splits import Part, held_out
from rlhf_lightning.data.tokenized import TokenStore
from rlhf_lightning.errors import ConfigurationError, DataError

Role = Literal["train", "val", "test"]


def sources_by_role(
    train: Source, val: Source | None, test: Source | None, *, noun: str
) -> dict[Role, list[WeightedSource] | None]:
    """The sources given for each role. Raises `ConfigurationError` for a weight outside training."""
    given: dict[Role, Source | None] = {"train": train, "val": val, "test": test}
    sources = {role: None if source is None else source_list(source) for role, source in given.items()}
    for role in ("val", "test"):
        if any(source.weight != 1 for source in sources[role] or ()):
            raise ConfigurationError(f"data.{role}: a weight would count {noun}s more than once; leave it out")
    return sources


def roles_of(stage: str) -> tuple[Role, ...]:
    """The roles that a stage of the Trainer reads; `predict` reads what `test` does."""
    stages: dict[str, tuple[Role, ...]] = {"fit": ("train", "val"), "validate": ("val",)}
    return stages.get(stage, ("test",))


def role_sources(
    sources: dict[Role, list[WeightedSource] | None], role: Role
) -> tuple[Sequence[WeightedSource], Split, Part | None]:
    """Sources of a role, the split to read of them, and the part of it where they are divided by prompt.

    Those given for it, or the training directories that have files for it. Else the training sources are divided into
    training and validation, and `test` takes what serves validation.
    """
    if (own := _own_sources(sources, role)) is not None and role != "train":
        return own, role, None
    if role == "test":
        return role_sources(sources, "val")
    divided = _own_sources(sources, "val") is None
    return sources["train"], "train", role if divided else None


def _own_sources(sources: dict[Role, list[WeightedSource] | None], role: Role) -> Sequence[WeightedSource] | None:
    if sources[role] is not None:
        return sources[role]
    return [source for source in sources["train"] if has_split(source.source, role)] or None


def part_masks(stores: Sequence[TokenStore], part: Part | None, *, val_fraction: float, noun: str) -> list[np.ndarray]:
    """Which rows of each store belong to a part, [R] bool each; all where nothing is divided (`part` None).

    A row's prompt alone decides, so that stores of whatever kind agree. Raises `DataError` when none is left.
    """
    if part is None:
        return [np.ones(len(store), dtype=bool) for store in stores]
    held = [held_out(store.numbers("prompt_hash"), val_fraction=val_fraction) for store in stores]
    masks = [~mask for mask in held] if part == "train" else held
    if not any(mask.any() for mask in masks):
        files = ", ".join(store.report.source for store in stores)
        raise DataError(
            f"{files}: splitting {sum(map(len, stores))} {noun}s by prompt with val_fraction {val_fraction} leaves no "
            f"{'training' if part == 'train' else 'validation'} {noun}; give a validation file with val: FILE, or "
            "another val_fraction"
        )
    return masks
