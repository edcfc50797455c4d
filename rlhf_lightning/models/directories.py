"""Writing a model as a directory that is never half there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_lightning.errors import ConfigurationError, ModelError

_MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json")
_MARK = "rlhf_lightning.json"
"""Stands in a directory that this package wrote, and so may replace."""


_WEIGHTS = (
    "model*.safetensors",
    "pytorch_model*.bin",
    "model*.safetensors.index.json",
    "pytorch_model*.bin.index.json",
)


def adapters_alone(directory: str | Path) -> bool:
    """Whether a directory holds adapters of another model, and no whole weights.

    Raises `ModelError` where it holds both: transformers would put the adapters on weights that may have them already.
    """
    directory = Path(directory).expanduser()
    if not (directory / "adapter_config.json").is_file():
        return False
    if any(any(directory.glob(pattern)) for pattern in _WEIGHTS):
        raise ModelError(adapters_beside_weights(str(directory)))
    return True


def adapters_beside_weights(name: str) -> str:
    """Why a model with both is refused, and what to do."""
    return (
        f"{name}: holds whole weights and adapters beside them, and does not say whether the weights have the adapters "
        "in them already; remove adapter_config.json if they have, or else the whole weights, so that the adapters are "
        "put on the model that adapter_config.json names"
    )


def check_free(directory: str | Path) -> bool:
    """Refuse a directory that holds anything but a model that this package wrote. Raises `ConfigurationError`.

    Makes the directories above it, so that an impossible path fails now. Returns whether a model is there.
    """
    directory = Path(directory).expanduser()
    directory.parent.mkdir(parents=True, exist_ok=True)
    if not directory.exists():
        return False
    if not directory.is_dir():
        raise ConfigurationError(f"{directory}: is a file; give another directory to export to")
    is_model = any((directory / name).is_file() for name in ("config.json", "adapter_config.json"))
    if any(directory.iterdir()) and not is_model:
        raise ConfigurationError(f"{directory}: holds files that are no model; give an empty or new directory")
    if is_model and not (directory / _MARK).is_file():
        raise ConfigurationError(
            f"{directory}: holds a model that this program did not write, and it will not be replaced; give another "
            "directory, or remove it"
        )
    return is_model


def check_other(directory: str | Path, **models: str | None) -> None:
    """Refuse to write a model over one that it needs: `models` by the names of their keys.

    Raises `ConfigurationError`.
    """
    for key, name in models.items():
        if name and Path(name).expanduser().resolve() == Path(directory).expanduser().resolve():
            raise ConfigurationError(
                f"{directory}: is model.{key} of this run, without which its checkpoints are worth nothing; give "
                "another directory to export to"
            )


@contextmanager
def replaced_model(directory: str | Path) -> Iterator[Path]:
    """A new directory to save a model in; its files then take the place of those of the model in `directory`.

    What `directory` held under other names stays. Saving over the directory that the model was loaded from is safe.
    """
    directory = Path(directory).expanduser()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as made:
        yield Path(made)
        (Path(made) / _MARK).write_text('{"written_by": "rlhf_lightning"}\n')
        for file in Path(made).iterdir():  # safetensors are written for the user alone
            file.chmod(0o666 & ~_umask())
        directory.mkdir(exist_ok=True)
        # An older model may have had other files: shards, or adapters, for which transformers looks first.
        for stale in [*directory.glob("*.safetensors*"), *(directory / name for name in _MODEL_FILES)]:
            stale.unlink(missing_ok=True)
        for file in sorted(Path(made).iterdir(), key=lambda file: file.name in _MODEL_FILES):
            shutil.move(file, directory / file.name)  # the configuration last: it makes the directory a model


def end_at(directory: str | Path, terminator_id: int) -> None:
    """Let `generate` end a reply of the language model in a directory where training did, besides where it did before.

    A base model's own settings may name another token, or none, and then it goes on past its last word. A directory
    without `generation_config.json` is no language model, and stays as it is.
    """
    path = Path(directory) / "generation_config.json"
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    known = settings.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    if terminator_id not in known:
        settings["eos_token_id"] = [terminator_id, *known] if known else terminator_id
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def pad_with(directory: str | Path, pad_id: int) -> None:
    """Write the id that the tokenizer pads with into the settings of the model in a directory, where it has some.

    transformers' own classifiers find the last token of a row by it.
    """
    for name in ("config.json", "generation_config.json"):
        path = Path(directory) / name
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings["pad_token_id"] = pad_id
            path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
