"""Nothing of these tests stays in the cache of the datasets library, and collecting garbage passes over what is loaded
already.
"""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="package", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="package", autouse=True)
def _quick_garbage_collection():
    """Every experiment collects garbage many times, which takes long in a process that has loaded much."""
    gc.freeze()
    yield
    gc.unfreeze()
