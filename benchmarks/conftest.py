"""Fixtures of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .measuring import THREADS


@pytest.fixture
def threads() -> Iterator[None]:
    """The benchmarks' number of threads, instead of the tests' single one."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)
