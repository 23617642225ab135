"""The cards that are kept in model_cards/, of real runs: each is what is made today of what lies beside it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from deeparc_hf import create_model_card, save_pruned
from deeparc_hf.checkpoint.weights_mark import mark_of_model
from deeparc_hf.publish import made_by_us
from local_hub.cards import judge
from tests.zoo import ZOO

from .test_card import check_harmless

CARDS = Path(__file__).parents[2] / "model_cards"
KEPT = sorted(path.name for path in CARDS.iterdir() if (path / "card.json").is_file())


def test_there_is_one_of_each_task():
    assert {ModelCard.load(CARDS / name / "README.md").data.get("pipeline_tag") for name in KEPT} >= {
        "text-classification",
        "image-classification",
        "sentence-similarity",
    }
    assert any("t5_qg.py" in (CARDS / name / "README.md").read_text("utf-8") for name in KEPT)


@pytest.mark.parametrize("name", KEPT)
def test_a_card_is_what_is_made_of_its_sources(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(CARDS / name, folder, ignore=shutil.ignore_patterns("README.md", "*.png"))
    kept = (CARDS / name / "README.md").read_text("utf-8")
    _module("keep").put_their_page(CARDS / name, folder)
    assert str(create_model_card(folder, **json.loads((folder / "card.json").read_text("utf-8")))) == kept
    assert made_by_us(kept)
    assert judge(kept).errors == [] and judge(kept).warnings == []
    # a sentence encoder's holds sentence-transformers' own page too, with its links
    ours = re.findall(r"<!-- pruning: begin -->(.*?)(?:<!-- pruning: [^>]*-->\s*)+", kept, re.DOTALL)
    check_harmless("\n".join(ours).replace("(#pruning)", "") or kept)
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {path.name for path in (CARDS / name).glob("*.png")} == {"similarity.png", "quality.png"}


@pytest.mark.parametrize("name", KEPT)
def test_nothing_kept_tells_of_a_machine(name):
    for file in (CARDS / name).iterdir():
        if file.suffix != ".png":
            text = file.read_text("utf-8")
            assert not any(sign in text for sign in ("/home/", "/tmp/", "/root/", "hf_")) or "deeparc_hf" in text
            assert "/tmp/" not in text and "/home/" not in text
        assert file.stat().st_size < 2**20


def test_what_is_kept_is_of_the_weights_that_are_there(tmp_path):
    """A model whose weights were changed since keeps none of its figures."""
    keep = _module("keep").keep
    model = ZOO["bert"].model()
    (tmp_path / "run").mkdir()
    save_pruned(model, tmp_path / "run" / "model")
    entry = {"metrics": {"test_bleu": 0.25}, "data": {"rows": 30}, "weights": mark_of_model(model)}
    answers = [{"prompt": "Once upon", "before": "a time", "generated": "a dime"}]
    noted = {"evaluations": [entry], "speed": None, "answers": answers}
    (tmp_path / "run" / "model" / "evaluations.json").write_text(json.dumps(noted))
    (tmp_path / "run" / "results.md").write_text("# Results\n\n## Answers\n\nOnce upon\n\n## Made with\n\nA command\n")
    keep(tmp_path / "run" / "model", tmp_path / "kept", dataset_tags="org/data")
    card = (tmp_path / "kept" / "README.md").read_text("utf-8")
    assert "| bleu |" in card and "a dime" in card and "Once upon" in (tmp_path / "kept" / "results.md").read_text()
    keep(tmp_path / "run" / "model", tmp_path / "quiet", answers=False)
    assert not [path for path in (tmp_path / "quiet").iterdir() if "Once upon" in path.read_text("utf-8")]
    assert (tmp_path / "quiet" / "results.md").read_text("utf-8") == "# Results\n\n## Made with\n\nA command\n"
    assert "| bleu |" in (tmp_path / "quiet" / "README.md").read_text("utf-8")
    assert not list((tmp_path / "kept").glob("*.safetensors"))
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    save_pruned(model, tmp_path / "run" / "model")
    keep(tmp_path / "run" / "model", tmp_path / "other")
    assert "| bleu |" not in (tmp_path / "other" / "README.md").read_text("utf-8")
    assert not (tmp_path / "other" / "evaluations.json").exists()
    with pytest.raises(FileExistsError, match="is there already"):
        keep(tmp_path / "run" / "model", tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        keep(tmp_path / "nothing", tmp_path / "third")
    assert not (tmp_path / "third").exists()


def _module(name):
    spec = importlib.util.spec_from_file_location(f"model_cards_{name}", CARDS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
