"""The section of a card on other tools: what was tried for the model's type, and nothing for others."""

from __future__ import annotations

import re

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from deeparc_hf import create_model_card, remove_blocks
from deeparc_hf.publish.elsewhere import within
from deeparc_hf.publish.gather import content_of_folder, content_of_model
from deeparc_hf.publish.ways_out import FAULTS, WAYS_OUT, in_turn
from tests.ways_out.models import CAUSAL_MODELS, IN_TURN, swin
from tests.zoo import ZOO

HEADING = "## Run it elsewhere"


def section(card):
    found = re.search(rf"^{HEADING}$(.*?)^## ", card.content, re.MULTILINE | re.DOTALL)
    return found and found[1]


def pruned(name):
    model = ZOO[name].model()
    remove_blocks(model, {"bert.encoder.layer": [1]} if name == "bert" else {"model.layers": [1]})
    return model


def test_a_card_tells_what_was_tried_for_its_type(tmp_path):
    model = pruned("bert")
    model.save_pretrained(tmp_path)
    text = section(create_model_card(tmp_path, repo_id="org/small"))
    rows = re.findall(r"^\| ([\w.]+) \|", text, re.MULTILINE)
    assert rows[1:] == [name for name, way in WAYS_OUT.items() if "bert" in way.within]
    assert not {"llama.cpp", "MLX"} & set(rows) and "goes wrong" not in text
    assert 'AutoModelForSequenceClassification.from_pretrained("org/small", quantization_config' in text
    assert section(create_model_card(model)) is not None


def test_a_type_that_was_not_tried_has_no_such_section(tmp_path):
    pruned("mistral").save_pretrained(tmp_path)
    assert HEADING not in create_model_card(tmp_path).content
    timm = ZOO["timm_vit"].model()
    remove_blocks(timm, {"blocks": [1]})
    assert content_of_model(timm).model_type is None and HEADING not in create_model_card(timm).content


@pytest.mark.parametrize("name", ["gemma3_text", "smollm3"])
def test_layers_that_do_not_come_in_turn_are_warned_of(name):
    wrong = section(create_model_card(CAUSAL_MODELS[name].pruned()))
    right = section(create_model_card(IN_TURN[name].pruned()))
    faults = [fault for fault in FAULTS if fault.model_type == name and fault.period]
    assert faults
    for fault in faults:
        assert fault.reason in wrong and fault.remedy in wrong and fault.reason not in right


def test_a_checkpoint_that_needs_the_package_claims_what_was_tried_with_it(tmp_path):
    model = swin()
    model.save_pretrained(tmp_path)
    text = section(create_model_card(tmp_path))
    assert "After `import deeparc_hf`" in text and "`swin`" in text
    known = {name for name, way in WAYS_OUT.items() if way.packaged}
    assert set(within(content_of_folder(tmp_path))) == set(within(content_of_model(model))) == known


def test_layers_in_turn():
    assert in_turn(range(7), 6) and in_turn([0, *range(7, 12)], 6) and in_turn([0, 1, 2, 3, 4], 6)
    assert not in_turn([0, 2, 3, 4, 5, 6], 6) and not in_turn([5], 6) and not in_turn([0, 1, 2, 4, 5], 4)


def test_all_that_is_told_is_of_types_and_tools_that_there_are():
    for way in WAYS_OUT.values():
        assert (
            way.versions
            and way.compared
            and way.lines
            and way.within.keys() | way.packaged.keys() <= (CONFIG_MAPPING_NAMES.keys())
        )
    for fault in FAULTS:
        assert fault.model_type in WAYS_OUT[fault.way].within and fault.reason.endswith(".")
