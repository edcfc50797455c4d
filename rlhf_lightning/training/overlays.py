"""A later layer of the configuration replaces what it names: a whole list, or a class with all of its arguments.

Layers are the defaults, the `--config` files in their order, and the command line. Keys of one class are merged. Where
a later layer names another class, jsonargparse 4.53 keeps those arguments of the earlier one that fit (the weight decay
of AdamW under SGD); and of two lists of one length it lays the second over the first, place by place (the `mode: max`
of one ModelCheckpoint under the next one's `monitor: val/loss`).
"""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import _typehints

_Action = _typehints.ActionTypeHint
_check_type = _Action._check_type


def replace_in_later_layers() -> None:
    """Let the parser replace lists and classes whole. `key+` still appends, and `key.name` still sets one argument."""
    _typehints.discard_init_args_on_class_path_change = _discard_arguments
    _Action._check_type = _check_without_earlier_list


def _discard_arguments(parser_or_action: Any, earlier: Any, given: Any) -> None:
    """Drop the arguments of an earlier layer's class where the later one names another class."""
    if earlier and "init_args" in earlier and earlier["class_path"] != given["class_path"]:
        earlier.pop("init_args")
        earlier.pop("dict_kwargs", None)


def _check_without_earlier_list(action: Any, value: Any, append: bool = False, cfg: Any = None, **named: Any) -> Any:
    """Check a value; what the key held before matters only where the value is no list, or is appended."""
    return _check_type(action, value, append=append, cfg=cfg if append or not _is_list(value) else None, **named)


def _is_list(value: Any) -> bool:
    """Whether a value is a list, or the text of one, as on the command line."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "- ")):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            return False
    return isinstance(value, list)
