"""The cards that are kept in model_cards/, of real runs: each is what is made today of what lies beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from deeparc_hf import create_model_card
from deeparc_hf.card import made_by_us

from ..hub.cards import judge
from .test_model_card import check_harmless

CARDS = Path(__file__).parents[2] / "model_cards"
KEPT = sorted(path.name for path in CARDS.iterdir() if (path / "card.json").is_file())


def test_there_is_one_of_each_task():
    assert {ModelCard.load(CARDS / name / "README.md").data.get("pipeline_tag") for name in KEPT} >= {
        "text-classification",
        "image-classification",
    }
    assert any("t5_qg.py" in (CARDS / name / "README.md").read_text("utf-8") for name in KEPT)


@pytest.mark.parametrize("name", KEPT)
def test_a_card_is_what_is_made_of_its_sources(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(CARDS / name, folder, ignore=shutil.ignore_patterns("README.md", "*.png"))
    kept = (CARDS / name / "README.md").read_text("utf-8")
    assert str(create_model_card(folder, **json.loads((folder / "card.json").read_text("utf-8")))) == kept
    assert made_by_us(kept)
    assert judge(kept).errors == [] and judge(kept).warnings == []
    check_harmless(kept)
    assert (folder / "similarity.png").is_file() and (CARDS / name / "similarity.png").is_file()


@pytest.mark.parametrize("name", KEPT)
def test_nothing_kept_tells_of_a_machine(name):
    for file in (CARDS / name).iterdir():
        if file.suffix != ".png":
            text = file.read_text("utf-8")
            assert not any(sign in text for sign in ("/home/", "/tmp/", "/root/", "hf_")) or "deeparc_hf" in text
            assert "/tmp/" not in text and "/home/" not in text
        assert file.stat().st_size < 2**20
