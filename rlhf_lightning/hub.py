"""The Hugging Face hub, on a machine that cannot reach it."""

from __future__ import annotations

import functools
import socket
import sys
import time
import urllib.parse
import urllib.request

_TRIES, _PAUSE = 2, 0.5
"""Lookups of the hub's host, and seconds between them."""


def use_cache_without_network() -> None:
    """Before something is asked of the hub: when its host has no address here, take it from the cache or nowhere.

    The hub's client would try each file six times, for half a minute, with a line for each, before it looks into its
    cache. Behind a proxy nothing is changed: names are resolved there.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    if not _has_address(urllib.parse.urlsplit(constants.ENDPOINT).hostname or ""):
        constants.HF_HUB_OFFLINE = True
        if (datasets := sys.modules.get("datasets")) is not None:
            datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True


@functools.cache
def _has_address(host: str) -> bool:
    for again in range(_TRIES):
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            if again + 1 < _TRIES:
                time.sleep(_PAUSE)
        else:
            return True
    return False
