"""Writing a model as a directory that is never half there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_lightning.errors import ConfigurationError

_MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json")


def check_free(directory: str | Path) -> bool:
    """Refuse a directory that holds anything but a model, which may be replaced. Raises `ConfigurationError`.

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
    return is_model


@contextmanager
def replaced_model(directory: str | Path) -> Iterator[Path]:
    """A new directory to save a model in; its files then take the place of those of the model in `directory`.

    What `directory` held under other names stays. Saving over the directory that the model was loaded from is safe.
    """
    directory = Path(directory).expanduser()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as made:
        yield Path(made)
        directory.mkdir(exist_ok=True)
        # An older model may have had other files: shards, or adapters, for which transformers looks first.
        for stale in [*directory.glob("*.safetensors*"), *(directory / name for name in _MODEL_FILES)]:
            stale.unlink(missing_ok=True)
        for file in sorted(Path(made).iterdir(), key=lambda file: file.name in _MODEL_FILES):
            shutil.move(file, directory / file.name)  # the configuration last: it makes the directory a model
