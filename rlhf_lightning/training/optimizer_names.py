"""A short name of an optimizer is torch's, whatever else of that name is imported.

jsonargparse 4.53 looks among all imported subclasses, and refuses a name that two of them have: `AdamW`, as soon as
bitsandbytes is imported, and `Adafactor`, as soon as that of transformers is.
"""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse import _typehints

_resolve = _typehints.resolve_class_path_by_name


def take_torch_optimizers() -> None:
    """Let every parser take torch's; others are named by their path, as in `bitsandbytes.optim.AdamW8bit`."""
    _typehints.resolve_class_path_by_name = _torch_first


def _torch_first(kind: Any, name: str) -> str:
    found = getattr(torch.optim, name, None)
    if isinstance(found, type) and isinstance(kind, type) and issubclass(found, kind):
        return f"torch.optim.{name}"
    return _resolve(kind, name)
