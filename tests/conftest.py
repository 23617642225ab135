"""Fixtures of the tests: a Hub on this machine, and its clients."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest

# before torch comes in, here and in processes that tests start: two workers share the cores, and models are tiny
os.environ.setdefault("OMP_NUM_THREADS", "1")

from local_hub import Client, HubServer


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[HubServer]:
    """A Hub on this machine. "owner" is also a member of "org" and has a second token, with which it cannot write."""
    tokens = ["owner=hf_owner", "owner=hf_owner_reads:read", "visitor=hf_visitor", "me=hf_me"]
    with HubServer(tmp_path_factory.mktemp("hub"), tokens=tokens, orgs=["org=owner"]) as server:
        yield server


@pytest.fixture(scope="module")
def hub_client(hub) -> Iterator[Callable[..., Client]]:
    """`hub_client("hf_owner")` is the process that has this token, `hub_client()` the one that has none; one each for a
    module.
    """
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


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Within, Ctrl-C raises KeyboardInterrupt, in a process that was started to ignore it too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
