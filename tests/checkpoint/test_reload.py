"""How pruned checkpoints of particular kinds load in a process that cannot import deeparc_hf; tests/test_contract.py
does so for every model of the zoo.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import timm
import torch
import transformers

from deeparc_hf import remove_blocks, save_pruned
from tests.reloading import assert_stock_loads, inputs_of, middle_blocks, outputs_of
from tests.stock import StockError, StockProcess
from tests.zoo import ZOO

BARE_TIMM = [name for name, specimen in ZOO.items() if specimen.auto is None]


@pytest.fixture(scope="module")
def stock() -> Iterator[StockProcess]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other
    with StockProcess() as process:
        yield process
    torch.set_num_threads(threads)


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
