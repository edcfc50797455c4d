"""Directories of LoRA adapters, as peft writes them: what they say of the model that they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import ModelError
from rlhf_lightning.files.packages import PACKAGE
from rlhf_lightning.tiny import TINY, resolve_model

CONFIG = "adapter_config.json"
BASE = "base_model_name_or_path"
"""Key of adapter_config.json."""
LANGUAGE_MODEL, CLASSIFIER = "CAUSAL_LM", "SEQ_CLS"
"""What peft calls the task of adapters."""
_WEIGHTS = (
    "model*.safetensors",
    "pytorch_model*.bin",
    "model*.safetensors.index.json",
    "pytorch_model*.bin.index.json",
)


def adapters_alone(name_or_path: str | Path) -> Path | None:
    """The directory of a name where it holds adapters of another model and no whole weights; else None.

    Raises `ModelError` where it holds both: transformers would put the adapters on weights that may have them already.
    """
    directory = Path(resolve_model(str(name_or_path))).expanduser()
    if not (directory / CONFIG).is_file():
        return None
    if any(any(directory.glob(pattern)) for pattern in _WEIGHTS):
        raise ModelError(adapters_beside_weights(str(name_or_path)))
    return directory


def adapters_beside_weights(name: str) -> str:
    """Why a model with both is refused, and what to do."""
    return (
        f"{name}: holds whole weights and adapters, and does not say whether the weights have the adapters "
        f"in them already; remove {CONFIG} if they have, or else the whole weights, so that the adapters are "
        f"put on the model that {CONFIG} names"
    )


def adapter_settings(directory: Path) -> dict[str, Any]:
    """What adapter_config.json says. Raises `ModelError` where it cannot be read or is of other adapters than LoRA."""
    try:
        settings = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        kind = settings.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{directory / CONFIG}: no settings of adapters ({error})") from error
    if kind != "LORA":
        raise ModelError(
            f"{directory}: adapters of peft's kind {kind}, and only LORA can be loaded; merge them with peft's own "
            "merge_and_unload, and give the directory of the result"
        )
    return settings


def adapter_task(directory: Path) -> str:
    """The `task_type` of adapters; that of language models where they say none, as those of many scripts do."""
    return adapter_settings(directory).get("task_type") or LANGUAGE_MODEL


def adapter_base(directory: Path) -> str:
    """The hub name or directory of the model below the adapters of a directory, which may be adapters again.

    A relative path is looked for from the working directory, as peft does, then from the adapters' own directory.
    Raises `ModelError` where none is named, or its directory is not here.
    """
    base = adapter_settings(directory).get(BASE)
    if not base:
        raise ModelError(f"{directory / CONFIG}: names no base model; write its directory or hub name into {BASE}")
    for place in (Path(resolve_model(base)).expanduser(), directory / base):
        if place.exists():
            if place.resolve() == directory.resolve():
                raise ModelError(f"{directory / CONFIG}: names its own directory as the base model, in {BASE}")
            return base if place == Path(base) else str(place)
    if is_local(base):
        raise ModelError(
            f"{directory}: its adapters belong to {base}, which is not here; write the place of that model into {BASE} "
            f"of {CONFIG}"
        )
    return base


def without_adapters(name_or_path: str) -> str:
    """The hub name or directory of the whole model below a model's adapters; the name itself where it has none."""
    while (directory := adapters_alone(name_or_path)) is not None:
        name_or_path = adapter_base(directory)
    return name_or_path


def hub_name(name_or_path: str) -> str | None:
    """The hub name of a model, or of the one below its adapters; None where that is a directory here or is built in."""
    base = without_adapters(name_or_path)
    return None if base == TINY or is_local(base) else base


def check_base_of_others(backbone: str) -> None:
    """Raise `ModelError` where adapters trained on a backbone, alone, would be worth nothing to other programs."""
    if adapters_alone(backbone) is not None:
        raise ModelError(
            f"merge: false would write adapters of {backbone}, which is itself adapters; neither peft nor transformers "
            "loads one on top of the other. Export with merge: true"
        )


def is_local(path: str) -> bool:
    """Whether a name is that of a file or directory, be it here or not, and no name of the hub."""
    return Path(path).exists() or path.startswith((".", "/", "~", PACKAGE)) or path.count("/") > 1
