"""What a sparsified model says of itself: the report, the record in its config, and both after saving, loading and
pruning.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from deeparc_hf import PrunedConfig, WandaConfig, remove_blocks, save_pruned, sparsify_model
from deeparc_hf.errors import RecordError
from deeparc_hf.sparsity.sparsify import recorded_matrices
from tests.stock import StockProcess, aligned, forwarded

from .test_sparsify import batches, made


@pytest.fixture
def bert():
    return made("bert")


def entries(model):
    return model.config.pruning_config["sparsity"]["matrices"]


def zeros(model, name):
    weight = model.get_submodule(name).weight
    return {"zeros": int((weight == 0).sum()), "size": weight.numel()}


def test_the_record_lists_each_matrix_with_the_zeros_that_it_has(bert):
    report = sparsify_model(bert, batches("bert"), sparsity=0.3, progress=False)
    sparsity = bert.config.pruning_config["sparsity"]
    assert WandaConfig.from_dict(sparsity["settings"]) == report.config == WandaConfig(sparsity=0.3)
    assert sparsity["samples"] == report.samples == 7
    assert list(entries(bert)) == list(report.matrices) and len(entries(bert)) == 24
    for name, entry in entries(bert).items():
        assert entry == zeros(bert, name)
    assert (
        PrunedConfig.from_model(bert).stacks == {}
        and PrunedConfig.from_model(bert).versions["transformers"] == tf.__version__
    )


def test_the_report_says_what_was_asked_for_and_what_is_there(bert):
    with torch.no_grad():
        bert.bert.encoder.layer[0].output.dense.weight[:4] = 0.0  # 4 of 32 rows are zero already
    report = sparsify_model(bert, batches("bert"), sparsity=0.3, progress=False)
    parts = report.matrices.values()
    one = report.matrices["bert.encoder.layer.0.output.dense"]
    assert (one.asked, one.size, one.stack, one.role) == (
        32 * int(48 * 0.3),
        32 * 48,
        "bert.encoder.layer",
        "output.dense",
    )
    assert one.zeros == one.asked + 4 * (48 - int(48 * 0.3))
    assert report.asked == sum(m.asked for m in parts) / sum(m.size for m in parts)
    assert report.measured == sum(m.zeros for m in parts) / sum(m.size for m in parts) > report.asked


def test_the_report_reads_as_a_table_and_as_json(bert, tmp_path):
    report = sparsify_model(bert, batches("bert"), pattern="2:4", sequential=False, progress=False)
    text = str(report)
    assert "wanda, the 2:4 pattern, inputs measured in one pass of the dense model on 7 samples" in text
    assert "50.00 % asked and 50.00 % measured over the weights of 24 matrices" in text
    assert "| bert.encoder.layer | attention.self.query | 4 | 4,096 | 50.00 | 50.00 |" in text
    assert report.to_markdown().startswith("# Sparsity report\n") and text.splitlines()[-1] in report.to_markdown()
    assert "neither smaller nor faster" in report.to_markdown()
    report.to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == report.to_dict()
    assert WandaConfig.from_dict(report.to_dict()["config"]) == report.config
    without = sparsify_model(bert, method="magnitude", sparsity=0.6, progress=False)
    assert "magnitude, 60 % of each output row, without data:" in str(without)


def test_other_targets_later_are_added_to_the_record(bert):
    sparsify_model(bert, batches("bert"), targets=["*.query"], progress=False)
    first = entries(bert)
    sparsify_model(bert, method="magnitude", sparsity=0.25, targets=["*.key"], progress=False)
    assert len(entries(bert)) == 8 and {name: entries(bert)[name] for name in first} == first
    assert all(entry == zeros(bert, name) for name, entry in entries(bert).items())
    assert len(recorded_matrices(bert, PrunedConfig.from_model(bert))) == 8


def test_more_zeros_later_replace_the_entry(bert):
    for share in (0.25, 0.5):
        sparsify_model(bert, batches("bert"), sparsity=share, progress=False)
        assert entries(bert)["bert.encoder.layer.1.output.dense"] == {"zeros": int(1536 * share), "size": 1536}


def test_models_that_share_a_config_do_not_share_the_record():
    model, other = made("bert"), made("bert")
    other.config = other.bert.config = model.config
    sparsify_model(model, method="magnitude", progress=False)
    assert getattr(other.config, "pruning_config", None) is None
    assert model.config is model.bert.config


@pytest.mark.parametrize("name", ["bert", "t5", "resnet_basic"])
def test_zeros_and_record_survive_saving_and_loading(name, tmp_path):
    model = made(name)
    sparsify_model(model, batches(name), sparsity=0.4, progress=False)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.pruning_config == model.config.pruning_config
    own, other = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(own[key], other[key]) for key in own)
    found = recorded_matrices(loaded, PrunedConfig.from_pretrained(tmp_path))
    assert {n: {"zeros": count, "size": m.weight.numel()} for n, (m, count) in found.items()} == entries(model)


def test_a_stock_process_loads_and_runs_the_zeros(bert, tmp_path):
    sparsify_model(bert, batches("bert"), progress=False)
    bert.save_pretrained(tmp_path)
    with StockProcess() as stock:
        loaded = stock.load(tmp_path, "AutoModelForSequenceClassification", batches("bert")[0])
    assert loaded.clean
    with torch.no_grad():
        assert torch.equal(loaded.outputs["output"], forwarded(aligned(bert), batches("bert")[0]))
    saved = load_file(tmp_path / "model.safetensors")
    assert all(int((saved[f"{name}.weight"] == 0).sum()) == entry["zeros"] for name, entry in entries(bert).items())


def test_a_bare_timm_model_keeps_zeros_and_record(tmp_path):
    import timm

    model = made("timm_vit")
    sparsify_model(model, batches("timm_vit"), pattern="4:8", progress=False)
    save_pruned(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    found = recorded_matrices(loaded, PrunedConfig.from_model(loaded))
    assert len(found) == 16 and all(2 * count == matrix.weight.numel() for matrix, count in found.values())


def test_another_head_finds_the_matrices_under_its_own_names(bert, tmp_path):
    sparsify_model(bert, batches("bert"), targets=["*.query"], progress=False)
    bert.save_pretrained(tmp_path)
    bare = tf.AutoModel.from_pretrained(tmp_path)
    assert list(recorded_matrices(bare, PrunedConfig.from_model(bare))) == [
        f"encoder.layer.{i}.attention.self.query" for i in range(4)
    ]
    bare.save_pretrained(tmp_path / "bare")
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare")
    assert list(recorded_matrices(again, PrunedConfig.from_model(again))) == list(entries(bert))


def test_removed_blocks_take_their_entries_with_them_and_the_others_follow(bert):
    for index, share in enumerate((0.1, 0.2, 0.3, 0.4)):
        sparsify_model(bert, batches("bert"), sparsity=share, targets=[f"*.layer.{index}.*"], progress=False)
    before = entries(bert)
    remove_blocks(bert, {"bert.encoder.layer": [1]})
    after = entries(bert)
    assert len(after) == 18 and all(entry == zeros(bert, name) for name, entry in after.items())
    for new, old in enumerate((0, 2, 3)):
        role = "intermediate.dense"
        assert after[f"bert.encoder.layer.{new}.{role}"] == before[f"bert.encoder.layer.{old}.{role}"]
    assert len(recorded_matrices(bert, PrunedConfig.from_model(bert))) == 18


def test_a_pruned_model_can_be_sparsified_and_keeps_its_history(bert):
    remove_blocks(bert, {"bert.encoder.layer": [1]})
    sparsify_model(bert, batches("bert"), progress=False)
    record = PrunedConfig.from_model(bert)
    assert record.kept == {"bert.encoder.layer": (0, 2, 3)} and len(record.iterations) == 1
    assert len(recorded_matrices(bert, record)) == 18


def test_a_record_of_more_zeros_than_there_are_is_refused(bert):
    sparsify_model(bert, batches("bert"), targets=["*.query"], progress=False)
    record = PrunedConfig.from_model(bert)
    name = "bert.encoder.layer.2.attention.self.query"
    with torch.no_grad():
        bert.get_submodule(name).weight.add_(1.0)
    with pytest.raises(
        RecordError,
        match=rf"By the record 512 of the 1,024 weights of {name} are zero, but in the model 0 are.*Sparsify",
    ):
        recorded_matrices(bert, record)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "bert.encoder.layer.2.attention.self.query",
            99,
            "lists 'bert.*' with 99 weights as sparse, but the model has 1,024 there",
        ),
        (
            "bert.encoder.layer.2.attention.self.other",
            9,
            "lists 'bert.*self.other' with 9 weights as sparse, but the model lacks it",
        ),
        (
            "bert.encoder.layer.9.attention.self.query",
            1024,
            "lists 'bert.*layer.9.*' with 1,024 weights as sparse, but the model lacks it",
        ),
        ("classifier", 64, "lists 'classifier' with 64 weights as sparse, but the model lacks it"),
        ("bert.encoder.layer.[0-9].*", 64, "but the model lacks it"),
    ],
)
def test_a_record_of_matrices_that_the_model_lacks_is_refused(bert, name, size, message):
    record = PrunedConfig({}, sparsity={"matrices": {name: {"zeros": 4, "size": size}}})
    with pytest.raises(RecordError, match=message):
        recorded_matrices(bert, record)


def test_a_record_without_zeroed_weights_lists_nothing(bert):
    assert recorded_matrices(bert, PrunedConfig({})) == {}
