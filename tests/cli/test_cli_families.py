"""`deeparc families`, and what `deeparc inspect` tells of blocks that no setting leaves out."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf

from deeparc_hf.architectures import families
from deeparc_hf.cli import main
from tests.zoo import TEXT

SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 6], "num_heads": [2, 4], "window_size": 2}


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swin")
    torch.manual_seed(0)
    tf.SwinForImageClassification(tf.SwinConfig(**SWIN)).save_pretrained(folder)
    return folder


def test_families_are_listed_with_a_line_on_each(capsys):
    assert main(["families", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {name: families.get(name).summary for name in families.names()}
    assert main(["families"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(families.names())]][-1] == "auto"


def test_inspect_tells_which_blocks_no_setting_leaves_out(swin, capsys):
    assert main(["inspect", str(swin), "--json"]) == 0
    stack = json.loads(capsys.readouterr().out)["stacks"]["swin.encoder.layers.1.blocks"]
    assert stack["counted_by"] == "depths[1]"
    assert list(stack["beyond_settings"]) == ["0", "1", "2", "3", "4"]
    assert all("shift_size" in reason for reason in stack["beyond_settings"].values())
    assert main(["inspect", str(swin)]) == 0
    assert "no setting leaves out block 0-4 alone; where deeparc_hf is installed" in capsys.readouterr().out


def test_inspect_tells_which_tensors_a_block_takes_its_part_of(tmp_path, capsys):
    tf.EsmForSequenceClassification(tf.EsmConfig(**TEXT, pad_token_id=0, mask_token_id=1)).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    (stack,) = json.loads(capsys.readouterr().out)["stacks"].values()
    assert stack["per_block"] == ["esm.contact_head.regression.weight"]
    assert main(["inspect", str(tmp_path)]) == 0
    assert "a block takes its part of esm.contact_head.regression.weight with it" in capsys.readouterr().out
