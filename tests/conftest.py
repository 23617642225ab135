"""Settings and fixtures of all tests: few threads, no Hub, no telemetry."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

for name, value in {
    # idle threads must not spin: on a busy machine torch is several times slower if they do
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)

import pytest
import torch

from .hub import Client, HubServer

torch.set_num_threads(1)  # models are tiny: more threads only get into each other's way


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[HubServer]:
    """A Hub on this machine. "owner" is also a member of "org" and has a second token, with which it cannot write."""
    tokens = ["owner=hf_owner", "owner=hf_owner_reads:read", "visitor=hf_visitor", "me=hf_me"]
    with HubServer(tmp_path_factory.mktemp("hub"), tokens=tokens, orgs=["org=owner"]) as server:
        yield server


@pytest.fixture(scope="module")
def hub_client(hub) -> Iterator[Callable[..., Client]]:
    """`hub_client("hf_owner")` is the process that has this token, `hub_client()` the one that has none; one each for a module."""
    with ExitStack() as stack:

        @cache
        def client(token: str | None = None) -> Client:
            return stack.enter_context(Client(hub.environment(token)))

        yield client


@pytest.fixture(scope="module")
def publisher(hub_client) -> Client:
    """The process of "owner", with what publishing needs."""
    from .publishing import BEGIN

    client = hub_client("hf_owner")
    client.run(BEGIN)
    return client
