"""Where the numbers of a report come from: versions, settings, models and data, so that they can be made again."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version

import torch

from rlhf_lightning.data.sources import Source, Split, fingerprint, source_list
from rlhf_lightning.evaluation.ranks import Ranks
from rlhf_lightning.evaluation.settings import REWARDBENCH_PROMPTS, EvaluationSettings

PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def provenance(
    settings: EvaluationSettings, models: Mapping[str, str], *, seconds: float, ranks: Ranks
) -> dict[str, str | int | float | list[str] | None]:
    """Facts by their names. `models` gives each model's name its fingerprint."""
    plain = asdict(settings)
    hashed = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    kind = torch.device(ranks.device).type
    where = torch.cuda.get_device_name(ranks.device) if kind == "cuda" else platform.machine()
    return {
        "rlhf_lightning": version("rlhf-lightning"),
        "packages": [f"{name} {version(name)}" for name in PACKAGES],
        "python": platform.python_version(),
        "device": f"{ranks.device} ({where})" if ranks.size == 1 else f"{ranks.size} x {kind} ({where})",
        "dtype of the weights": settings.dtype,
        "seed": settings.seed,
        "settings (SHA-256)": hashed[:16],
        "models": [f"{name} ({mark[:16]})" for name, mark in models.items()],
        "data": [f"{name} ({mark[:16]})" for name, mark in _data(settings)],
        "seconds": round(seconds, 1),
    }


def _data(settings: EvaluationSettings) -> list[tuple[str, str]]:
    named: list[tuple[Source | None, Split]] = [(settings.rewardbench, "test"), (settings.rewardbench2, "test")]
    named += [(settings.pairs, settings.pairs_split), (settings.prompts, settings.prompts_split)]
    given = [(source, split) for source, split in named if source is not None and source != REWARDBENCH_PROMPTS]
    each = dict.fromkeys((one.source, split) for source, split in given for one in source_list(source))
    return [(str(source), fingerprint(source, split=split)) for source, split in each]
