"""Cards that trainers write by themselves, which ours replace; and what a card shows of answers."""

from __future__ import annotations

import json

import datasets
import pytest

from deeparc_hf import create_model_card
from deeparc_hf.checkpoint.weights_mark import mark_of_files
from deeparc_hf.errors import DeepArcWarning, RecordError
from deeparc_hf.publish.merging import may_replace
from tests.publishing import tiny_tokenizer
from tests.trainers import arguments, pruning
from tests.zoo import ZOO

from .test_card import section
from .test_hostile_text import HOSTILE, check


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that TRL's SFTTrainer has trained and pruned, and saved with its own card."""
    trl = pytest.importorskip("trl")
    folder = tmp_path_factory.mktemp("sft")
    settings = {"bf16": False, "gradient_checkpointing": False, "max_length": 16}
    trainer = trl.SFTTrainer(
        ZOO["llama"].model(),
        arguments(folder, trl.SFTConfig, num_train_epochs=1, save_strategy="epoch", **settings),
        train_dataset=datasets.Dataset.from_dict({"text": ["w1 w2 w3 w4"] * 32}),
        processing_class=tiny_tokenizer(),
        callbacks=[pruning(num_blocks=3)],
    )
    trainer.train()
    trainer.save_model()
    return folder


# TRL's own defaults are given by a name that transformers has deprecated
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_the_draft_of_trl_is_replaced_and_an_edited_one_stays(folder):
    card = folder / "README.md"
    draft = card.read_text("utf-8")
    assert "TRL" in draft and may_replace(card)
    card.write_text(f"{draft}\n## What it is for\n\nQuestions.\n", "utf-8")
    with pytest.warns(DeepArcWarning, match="was written or edited by somebody"):
        create_model_card(folder)
    card.write_text(draft, "utf-8")
    create_model_card(folder)
    assert "## What was removed" in card.read_text("utf-8")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_answers_are_shown_as_text(folder):
    entry = {"metrics": {"test_loss": 1.0}, "before": {"test_loss": 2.0}, "weights": mark_of_files(folder)}
    file, parts = folder / "evaluations.json", ("prompt", "before", "generated")
    for text in (HOSTILE, "<b>bold</b> | `x`\n# title"):
        answers = [dict.fromkeys(parts, text), {"prompt": "why?", "before": "", "generated": None}]
        file.write_text(json.dumps({"evaluations": [entry], "speed": None, "answers": answers * 3}))
        card = create_model_card(folder, overwrite=True)
        check(str(card))
        shown = section(card, "Answers")
        assert shown.count("\n| ") == 1 + 4 and "(nothing)" in shown and "<b>" not in shown
    for wrong in (3, ["a"], [{}] * 10**5):
        file.write_text(json.dumps({"evaluations": [entry], "speed": None, "answers": wrong}))
        with pytest.raises(RecordError, match=r"evaluations\.json"):
            create_model_card(folder, overwrite=True)
    file.write_text(json.dumps({"evaluations": [{**entry, "weights": "0" * 32}], "speed": None, "answers": answers}))
    assert "## Answers" not in str(create_model_card(folder, overwrite=True))
