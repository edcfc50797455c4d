"""Which sources serve training, validation and test, and how one source is divided between the first two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from rlhf_lightning.data.sources import Source, Split, WeightedSource, has_split, source_list
from rlhf_lightning.data.splits import Part, held_out
from rlhf_lightning.data.tokenized import Kind, TokenStore
from rlhf_lightning.errors import ConfigurationError, DataError

Role = Literal["train", "val", "test"]


class RoleSources(NamedTuple):
    """What serves a role."""

    sources: Sequence[WeightedSource]
    split: Split
    """The split to read of them."""
    part: Part | None
    """The part of their rows that it is, where they are divided by prompt."""


def sources_by_role(train: Source, val: Source | None, test: Source | None) -> dict[Role, list[WeightedSource]]:
    """The sources given for some roles. Raises `ConfigurationError` for a weight outside training."""
    given: dict[Role, Source | None] = {"train": train, "val": val, "test": test}
    sources = {role: source_list(source) for role, source in given.items() if source is not None}
    for role in ("val", "test"):
        if any(source.weight != 1 for source in sources.get(role, ())):
            raise ConfigurationError(f"data.{role}: a weight would count rows more than once; leave it out")
    return sources


def roles_of(stage: str) -> tuple[Role, ...]:
    """The roles that a stage of the Trainer reads; `predict` reads what `test` does."""
    stages: dict[str, tuple[Role, ...]] = {"fit": ("train", "val"), "validate": ("val",)}
    return stages.get(stage, ("test",))


def role_sources(given: dict[Role, list[WeightedSource]], role: Role) -> RoleSources:
    """What serves a role: the sources given for it, or the training directories that have files for it.

    Else the training sources are divided into training and validation, and `test` takes what serves validation.
    """
    if role != "train" and (own := _own_sources(given, role)):
        return RoleSources(own, role, None)
    if role == "test":
        return role_sources(given, "val")
    return RoleSources(given["train"], "train", None if _own_sources(given, "val") else role)


def _own_sources(given: dict[Role, list[WeightedSource]], role: Role) -> list[WeightedSource]:
    return given.get(role) or [source for source in given["train"] if has_split(source.source, role)]


def part_masks(stores: Sequence[TokenStore], part: Part | None, *, val_fraction: float, kind: Kind) -> list[np.ndarray]:
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
            f"{files}: splitting {sum(map(len, stores))} {kind} by prompt with val_fraction {val_fraction} leaves no "
            f"{'training' if part == 'train' else 'validation'} {kind}; give a validation file with val: FILE, or "
            "another val_fraction"
        )
    return masks
