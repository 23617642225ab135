"""The processes that load what the census has saved."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .trial import Loaders


@pytest.fixture(scope="module")
def loaders() -> Iterator[Loaders]:
    found = Loaders.started()
    yield found
    for process in (found.stock, found.package):
        process.__exit__()
