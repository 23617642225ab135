"""Nothing of these tests stays in the cache of the datasets library, and collecting garbage passes over what is loaded
already.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

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


@pytest.fixture
def evaluate_cache(tmp_path, monkeypatch):
    """An empty cache of evaluate's scripts; nothing of it stays in this process."""
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not (Path(place) / "evaluate_modules").is_dir()])
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("evaluate_modules")}
    yield tmp_path / "modules" / "evaluate_modules" / "metrics"
    for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
        del sys.modules[name]
    sys.modules.update(before)
