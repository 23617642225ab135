"""Fixtures of the experiments' tests: nothing of them stays in the cache of the datasets library."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="package", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture
def no_nltk_data(tmp_path, monkeypatch):
    """nltk as it is without any data, also if another test has loaded some."""
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    if hasattr(nltk.tokenize, "_get_punkt_tokenizer"):
        nltk.tokenize._get_punkt_tokenizer.cache_clear()
    nltk.corpus.wordnet._unload()
