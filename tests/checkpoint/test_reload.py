"""A pruned checkpoint loads with stock transformers or timm, in a process that cannot import deeparc_hf.

Outputs are compared bit for bit: both sides run the same kernels on the same weights, with the same number of threads
and with tensors equally aligned in memory (see stock.py), so that no rounding is left to excuse a difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from deeparc_hf import PrunedConfig, find_stacks, remove_blocks, save_pruned
from tests.stock import StockError, StockProcess, aligned, forwarded, generated
from tests.zoo import ZOO, Specimen

BARE_TIMM = [name for name, specimen in ZOO.items() if specimen.auto is None]


@pytest.fixture(scope="module")
def stock() -> Iterator[StockProcess]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other
    with StockProcess() as process:
        yield process
    torch.set_num_threads(threads)


def middle_blocks(model: nn.Module) -> dict[str, list[int]]:
    """One block of each stack that has one to spare: the middle one, never the first."""
    free = {
        name: [i for i in range(1, len(stack)) if i not in stack.pinned] for name, stack in find_stacks(model).items()
    }
    return {name: [indices[(len(indices) - 1) // 2]] for name, indices in free.items() if indices}


def inputs_of(specimen: Specimen) -> dict[str, Tensor]:
    inputs = specimen.batches(1, seed=5)[0]
    labels = inputs.pop("labels", None)
    if labels is not None:
        inputs["decoder_input_ids"] = labels
    return {"x": inputs["pixel_values"]} if specimen.auto is None else inputs


def outputs_of(model: nn.Module, specimen: Specimen) -> dict[str, Tensor]:
    model, inputs = aligned(model), inputs_of(specimen)
    with torch.no_grad():
        return {"output": forwarded(model, inputs), **(generated(model, inputs) if specimen.generates else {})}


def load_here(specimen: Specimen, folder: Path) -> nn.Module:
    if specimen.auto is None:
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return getattr(transformers, specimen.auto).from_pretrained(folder)


def assert_stock_loads(stock: StockProcess, folder: Path, specimen: Specimen, expected: dict[str, Tensor]) -> None:
    loaded = stock.load(folder, specimen.auto or "timm", inputs_of(specimen), generate=specimen.generates)
    assert (loaded.missing, loaded.unexpected, loaded.mismatched) == ([], [], [])
    assert loaded.outputs.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(loaded.outputs[key], value), (
            f"{key} differs by up to {(loaded.outputs[key] - value).abs().max()}"
        )


@pytest.mark.parametrize("name", ZOO)
def test_a_pruned_checkpoint_loads_in_a_stock_process_with_equal_outputs(name, stock, tmp_path):
    specimen = ZOO[name]
    model = specimen.model()
    whole = outputs_of(model, specimen)["output"]
    gone = middle_blocks(model)
    remove_blocks(model, gone)
    expected = outputs_of(model, specimen)
    assert not torch.allclose(expected["output"], whole, atol=1e-3)  # the blocks did something
    save_pruned(model, tmp_path)
    assert_stock_loads(stock, tmp_path, specimen, expected)
    stored = json.loads((tmp_path / "config.json").read_text("utf-8"))["pruning_config"]
    assert PrunedConfig.from_dict(stored).removed == {n: tuple(gone.get(n, ())) for n in find_stacks(model)}
    if specimen.generates:
        assert torch.equal(expected["cached"], expected["uncached"])  # the cache's indices are right


@pytest.mark.parametrize("name", ZOO)
def test_a_second_pruning_after_a_reload_is_recorded_by_original_indices(name, stock, tmp_path):
    specimen = ZOO[name]
    model = specimen.model()
    lengths = {n: len(stack) for n, stack in find_stacks(model).items()}
    first = middle_blocks(model)
    remove_blocks(model, first)
    save_pruned(model, tmp_path / "once")
    model = load_here(specimen, tmp_path / "once")
    last = {n: [len(s) - 1] for n, s in find_stacks(model).items() if len(s) > 1 and len(s) - 1 not in s.pinned}
    assert last
    record = remove_blocks(model, last)
    save_pruned(model, tmp_path / "twice")
    for stack, length in lengths.items():
        once = [i for i in range(length) if i not in first.get(stack, ())]
        assert record.kept[stack] == tuple(once[:-1] if stack in last else once)
    assert [entry["removed"] for entry in record.iterations] == [
        first,
        {n: [max(i for i in range(lengths[n]) if i not in first.get(n, ()))] for n in last},
    ]
    assert PrunedConfig.from_pretrained(tmp_path / "twice") == record
    assert_stock_loads(stock, tmp_path / "twice", specimen, outputs_of(model, specimen))


@pytest.mark.parametrize("name", BARE_TIMM)
def test_timm_saves_a_pruned_model_by_itself(name, stock, tmp_path):
    if not hasattr(timm.models, "get_model_args"):
        pytest.skip("this timm does not record the arguments of create_model")
    specimen = ZOO[name]
    model = specimen.model()
    remove_blocks(model, middle_blocks(model))
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert_stock_loads(stock, tmp_path, specimen, outputs_of(model, specimen))


def test_a_pruned_checkpoint_loads_without_its_head(stock, tmp_path):
    specimen = ZOO["bert"]
    model = specimen.model()
    remove_blocks(model, {"bert.encoder.layer": [1]})
    save_pruned(model, tmp_path)
    loaded = stock.load(tmp_path, "AutoModel", inputs_of(specimen))
    assert (loaded.model_class, loaded.missing) == ("BertModel", [])
    assert loaded.unexpected == ["classifier.bias", "classifier.weight"]
    with torch.no_grad():
        assert torch.equal(loaded.outputs["output"], model.bert(**inputs_of(specimen)).last_hidden_state)


def test_a_model_pruned_without_its_head_loads_too(stock, tmp_path):
    specimen = ZOO["bert"]
    model = specimen.model().bert
    remove_blocks(model, {"encoder.layer": [1]})
    save_pruned(model, tmp_path)
    loaded = stock.load(tmp_path, "AutoModel", inputs_of(specimen))
    assert loaded.clean
    with torch.no_grad():
        assert torch.equal(loaded.outputs["output"], model(**inputs_of(specimen)).last_hidden_state)


def test_half_precision_survives_the_reload(stock, tmp_path):
    specimen = ZOO["llama"]
    specimen.model().save_pretrained(tmp_path / "whole")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    remove_blocks(model, {"model.layers": [2]})
    save_pruned(model, tmp_path / "pruned")
    assert_stock_loads(stock, tmp_path / "pruned", specimen, outputs_of(model, specimen))


@pytest.mark.parametrize("name", ["bert", "timm_vit"])
def test_the_stock_process_would_notice_a_config_that_was_not_shrunk(name, stock, tmp_path):
    specimen = ZOO[name]
    model = specimen.model()
    remove_blocks(model, middle_blocks(model))
    save_pruned(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    holder, key = (config["model_args"], "depth") if specimen.auto is None else (config, "num_hidden_layers")
    assert holder[key] == 3
    holder[key] = 4
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    if specimen.auto is None:
        with pytest.raises(StockError, match=r"Missing key.*blocks\.3"):
            stock.load(tmp_path, "timm", inputs_of(specimen))
    else:
        loaded = stock.load(tmp_path, specimen.auto, inputs_of(specimen))
        assert all("layer.3." in key for key in loaded.missing) and loaded.missing


def test_a_timm_model_with_random_weights_claims_no_base_on_the_hub():
    model = ZOO["timm_resnet"].model()
    assert model.pretrained_cfg["hf_hub_id"]  # timm names one all the same
    assert remove_blocks(model, {"layer2": [1]}).base_model is None
