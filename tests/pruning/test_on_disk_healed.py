"""Repairs that were fitted beforehand, written into a checkpoint's files: what the live model becomes, to the bit."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from deeparc_hf import PrunedConfig, analyze
from deeparc_hf.architectures import describe
from deeparc_hf.checkpoint.stored import overwrite, stored_tensors
from deeparc_hf.errors import ConfigError, RecordError, SurgeryError
from deeparc_hf.healing.heal import fit_sites, healed_tensors
from deeparc_hf.healing.stored import load_healings, save_healings
from deeparc_hf.observe.calibration import Calibration
from deeparc_hf.pruning.on_disk import DiskSurgery
from deeparc_hf.search.prune import apply_healed
from tests.zoo import ZOO

from .test_on_disk import assert_same, saved, tensors


def planned(kind, folder):
    """A checkpoint, a plan that heals, and its repairs."""
    specimen = ZOO[kind]
    source = saved(specimen.model(), folder / "whole")
    model = getattr(tf, specimen.auto).from_pretrained(source)
    batches = specimen.batches(12)
    plan = analyze(model, batches, keep_ratio=0.7, heal="lstsq", progress=False)
    healings = fit_sites(describe(model), plan.removed, Calibration(batches, 512), progress=False)
    assert any(healing.reason is None for healing in healings)
    return source, model, batches, plan, healings


@pytest.mark.filterwarnings("ignore:Blocks were compared on only")
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "resnet", "t5", "vit"])
def test_it_is_what_the_live_model_becomes(kind, tmp_path):
    source, model, batches, plan, healings = planned(kind, tmp_path)
    save_healings(tmp_path / "repairs", healings)
    read = load_healings(tmp_path / "repairs")
    assert [h.to_dict() for h in read] == [h.to_dict() for h in healings]
    surgery = DiskSurgery.of(source, plan, auto_class=type(model).__name__, healings=read)
    (tmp_path / "out").mkdir()
    record = surgery.write(tmp_path / "out")
    unhealed = tensors(tmp_path / "out")
    apply_healed(model, plan, Calibration(batches, 512), progress=False)
    model.save_pretrained(tmp_path / "lived", max_shard_size="20KB")
    assert_same(tmp_path / "out", tmp_path / "lived")
    assert PrunedConfig.from_pretrained(tmp_path / "out") == record and record.iterations[-1]["healing"]
    surgery = DiskSurgery.of(source, plan, auto_class=type(model).__name__, healings=[])
    (tmp_path / "plain").mkdir()
    surgery.write(tmp_path / "plain", verify=False)
    plain = tensors(tmp_path / "plain")
    assert any(not torch.equal(value, plain[name]) for name, value in unhealed.items())


@pytest.mark.filterwarnings("ignore:Blocks were compared on only")
def test_what_a_repair_changes_is_known_without_changing_it(tmp_path):
    _, model, _, _, healings = planned("bert", tmp_path)
    healing = next(healing for healing in healings if healing.reason is None)
    block = model.bert.encoder.layer[healing.site.kept]
    before = {name: value.clone() for name, value in block.state_dict().items()}
    changed = healed_tensors(healing, block)
    assert "output.dense.weight" in changed and changed.keys() < before.keys()
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@pytest.mark.filterwarnings("ignore:Blocks were compared on only")
def test_what_cannot_be_written_is_refused(tmp_path):
    source, model, _, plan, healings = planned("bert", tmp_path)
    with pytest.raises(ConfigError, match="The plan repairs the kept blocks"):
        DiskSurgery.of(source, plan)
    for healing in healings:  # a map that the files do not have under the model's name
        if healing.ending is not None:
            object.__setattr__(healing.ending, "map", "attention.self.query")
            healing.change = torch.ones(3, 3)
    surgery = DiskSurgery.of(source, plan, auto_class=type(model).__name__, healings=healings)
    (tmp_path / "out").mkdir()
    with pytest.raises((RuntimeError, SurgeryError)):
        surgery.write(tmp_path / "out", verify=False)
    with pytest.raises(RecordError, match=r"repairs in .* cannot be read"):
        load_healings(tmp_path / "nowhere")
    stored = stored_tensors(next(iter(sorted(source.glob("*.safetensors")))))[0]
    with pytest.raises(RecordError, match="were to replace them"):
        overwrite(stored, torch.zeros(1))
