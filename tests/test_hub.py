"""A hub that cannot be reached: its client is not left to try for half a minute, and its cache is still read."""

from __future__ import annotations

import socket

import datasets
import pytest
from huggingface_hub import constants

from rlhf_lightning import hub
from rlhf_lightning.data.sources import read_rows
from rlhf_lightning.data.tokenizer import load_tokenizer
from rlhf_lightning.errors import DataError, ModelError
from rlhf_lightning.models.configuration import load_config


@pytest.fixture
def lookups(monkeypatch):
    """Hosts that were looked up; none has an address."""
    asked = []

    def refuse(host, port):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(hub, "_PAUSE", 0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setattr(datasets.config, name, False)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    hub._has_address.cache_clear()
    yield asked
    hub._has_address.cache_clear()


def test_a_host_without_address_is_asked_nothing(lookups):
    hub.use_cache_without_network()
    hub.use_cache_without_network()
    assert lookups == ["huggingface.co"] * 2, "looked up again, as it may come back, and then no more"
    assert constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE
    assert datasets.config.HF_DATASETS_OFFLINE


def test_a_user_who_is_offline_waits_for_no_lookup(lookups, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.use_cache_without_network()
    assert lookups == []


def test_a_mirror_is_the_host(lookups, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example:8443/hub")
    hub.use_cache_without_network()
    assert set(lookups) == {"mirror.example"}


def test_a_host_with_an_address_is_asked(lookups, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: lookups.append(host))
    hub.use_cache_without_network()
    assert (lookups, constants.HF_HUB_OFFLINE) == (["huggingface.co"], False)


def test_behind_a_proxy_nothing_is_looked_up(lookups, monkeypatch):
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    hub.use_cache_without_network()
    assert (lookups, constants.HF_HUB_OFFLINE) == ([], False)


@pytest.mark.parametrize(
    ("load", "error"),
    [
        (load_config, ModelError),
        (load_tokenizer, ModelError),
        (lambda name: list(read_rows(name, split="train")), DataError),
    ],
)
def test_whatever_names_something_of_the_hub_looks_first(lookups, monkeypatch, load, error):
    """The client's own waiting is shut off, so that it would be seen."""
    monkeypatch.setattr("time.sleep", lambda seconds: seconds and pytest.fail(f"waits {seconds} s"))
    with pytest.raises(error, match="nobody/nothing"):
        load("nobody/nothing")
    assert set(lookups) == {"huggingface.co"}


def test_a_local_model_asks_for_nothing(lookups, tiny_qwen2):
    load_config(str(tiny_qwen2))
    load_tokenizer(str(tiny_qwen2))
    assert lookups == []
