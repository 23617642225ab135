"""Checkpoints of the model type deeparc_pruned: loaded by the Auto classes with the package, refused without it."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from deeparc_hf import PrunedConfig, analyze, find_stacks, load_pruned, remove_blocks
from deeparc_hf.cli import main
from deeparc_hf.errors import DeepArcWarning, RecordError, SurgeryError
from deeparc_hf.pruned_type.config import LAYOUT_KEY, PrunedSettings
from tests.stock import StockError, StockProcess, flattened
from tests.zoo import spread

SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 6], "num_heads": [2, 4], "window_size": 2}
MINICPM = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 120,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
BLOCKS = "swin.encoder.layers.1.blocks"
needs_minicpm = pytest.mark.skipif(not hasattr(tf, "MiniCPM3Config"), reason="this transformers has no MiniCPM3")


def swin() -> nn.Module:
    torch.manual_seed(0)
    return spread(tf.SwinForImageClassification(tf.SwinConfig(**SWIN, num_labels=3))).eval()


def efficientnet() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320}
    config = tf.EfficientNetConfig(image_size=32, num_labels=3, **sizes)
    return spread(tf.EfficientNetForImageClassification(config)).eval()


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def pruned(model: nn.Module, blocks: dict[str, list[int]]) -> nn.Module:
    with pytest.warns(DeepArcWarning, match="only be loaded where deeparc_hf is installed"):
        remove_blocks(model, blocks)
    return model


@pytest.fixture(scope="module")
def swin_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swin")
    pruned(swin(), {BLOCKS: [1, 4]}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def owner():
    """A process of somebody who has the package."""
    with StockProcess(package=True) as process:
        yield process


@pytest.fixture(scope="module")
def stock():
    with StockProcess() as process:
        yield process


MODELS = {
    "swin": (swin, {BLOCKS: [1, 4]}, "AutoModelForImageClassification"),
    "efficientnet": (efficientnet, {"efficientnet.encoder.blocks": [4, 12]}, "AutoModelForImageClassification"),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_loads_with_the_package_and_fails_without(name, owner, stock, tmp_path):
    make, blocks, auto = MODELS[name]
    model = pruned(make(), blocks)
    model.save_pretrained(tmp_path)
    inputs = {"pixel_values": pixels()}
    loaded = owner.load(tmp_path, auto, inputs)
    assert loaded.clean and loaded.model_class == type(model).__name__
    with torch.no_grad():
        torch.testing.assert_close(loaded.outputs["output"], model(**inputs).logits, rtol=0, atol=0)
    with pytest.raises(StockError, match="model type `deeparc_pruned` but Transformers does not recognize"):
        stock.load(tmp_path, auto, inputs)
    for process in (stock, owner):  # its own class would build a whole model of its defaults
        with pytest.raises(StockError, match="needs_deeparc_hf__import_deeparc_hf"):
            process.load(tmp_path, type(model).__name__, inputs)


def test_the_blocks_that_are_left_keep_their_shifts(swin_folder):
    model = tf.AutoModelForImageClassification.from_pretrained(swin_folder)
    shifts = [block.shift_size for block in model.get_submodule(BLOCKS)]
    assert shifts == [0, 0, 1, 1]  # of the blocks 0, 2, 3 and 5


def test_what_looks_at_the_config_sees_the_base(swin_folder):
    config = tf.AutoConfig.from_pretrained(swin_folder)
    assert (config.model_type, config.num_labels, config.embed_dim) == ("deeparc_pruned", 3, 16)
    model = tf.AutoModelForImageClassification.from_pretrained(swin_folder)
    assert type(model) is tf.SwinForImageClassification
    assert isinstance(model.config, tf.SwinConfig) and model.config.model_type == "swin"
    assert PrunedConfig.from_model(model).kept == {"swin.encoder.layers.0.blocks": (0, 1), BLOCKS: (0, 2, 3, 5)} or (
        PrunedConfig.from_model(model).kept[BLOCKS] == (0, 2, 3, 5)
    )


def test_a_headless_model_and_another_head_are_built_from_it(swin_folder):
    base = tf.AutoModel.from_pretrained(swin_folder)
    assert len(base.get_submodule(BLOCKS.removeprefix("swin."))) == 4
    assert list(find_stacks(base))[1] == BLOCKS.removeprefix("swin.")
    other = tf.AutoModelForImageClassification.from_pretrained(swin_folder, num_labels=7, ignore_mismatched_sizes=True)
    assert other.config.num_labels == 7 and other.classifier.out_features == 7
    fresh = tf.AutoModelForImageClassification.from_config(tf.AutoConfig.from_pretrained(swin_folder))
    assert len(fresh.get_submodule(BLOCKS)) == 4


def test_it_is_pruned_again_saved_and_copied(swin_folder, tmp_path):
    model = tf.AutoModelForImageClassification.from_pretrained(swin_folder).eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert isinstance(twin.config, PrunedSettings) and twin.config.deeparc_layout == model.config.deeparc_layout
    remove_blocks(model, {BLOCKS: [2]})  # no warning: it needed the package before
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.config.deeparc_layout[BLOCKS] == {"length": 6, "kept": [0, 2, 5]}
    assert PrunedConfig.from_model(again).kept[BLOCKS] == (0, 2, 5)
    with torch.no_grad():
        assert torch.equal(again(pixels()).logits, model(pixels()).logits)


def test_a_base_is_loaded_with_the_blocks_of_its_record_alone(swin_folder, tmp_path):
    swin().save_pretrained(tmp_path)
    model = load_pruned(tf.AutoModelForImageClassification, tmp_path, swin_folder).eval()
    whole = tf.AutoModelForImageClassification.from_pretrained(swin_folder).eval()
    assert type(model) is tf.SwinForImageClassification and isinstance(model.config, PrunedSettings)
    assert torch.equal(model(pixels()).logits, whole(pixels()).logits)
    # one that is pruned already is a base too
    again = load_pruned(tf.AutoModelForImageClassification, swin_folder, PrunedConfig({}))
    assert again.config.deeparc_layout == whole.config.deeparc_layout


def test_the_command_line_knows_it(swin_folder, capsys):
    assert main(["inspect", str(swin_folder)]) == 0
    out = capsys.readouterr().out
    assert f"{BLOCKS}: 4 blocks" in out and f"{BLOCKS}: 4 of 6 blocks are left: 0 2 3 5" in out


def test_adapters_go_on_top_of_it(swin_folder):
    model = tf.AutoModelForImageClassification.from_pretrained(swin_folder)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert adapted(pixel_values=pixels()).logits.shape == (2, 3)


def test_stock_only_refuses_and_changes_nothing():
    model = swin()
    before = flattened(model(pixels()))
    with pytest.raises(SurgeryError, match=r"cannot express the removal: .*shift_size.*stock_only=False"):
        remove_blocks(model, {BLOCKS: [2]}, stock_only=True)
    assert len(model.get_submodule(BLOCKS)) == 6 and not isinstance(model.config, PrunedSettings)
    torch.testing.assert_close(flattened(model(pixels())), before, rtol=0, atol=0)


def test_what_stock_can_load_is_left_to_stock():
    model = swin()
    remove_blocks(model, {BLOCKS: [2, 3]})  # a pair: the others shift as before
    assert not isinstance(model.config, PrunedSettings) and model.config.depths == [2, 4]


def test_a_plan_tells_that_its_result_needs_the_package():
    batches = [{"pixel_values": torch.randn(64, 3, 32, 32)} for _ in range(5)]
    with pytest.warns(DeepArcWarning, match="only be loaded where deeparc_hf is installed"):
        plan = analyze(swin(), batches, num_blocks={BLOCKS: 5}, protect=[f"{BLOCKS}.[01345]"], progress=False)
    assert list(plan.removed[BLOCKS]) == [2]


@pytest.mark.skipif(not hasattr(tf, "MiniMaxConfig"), reason="this transformers has no MiniMax")
def test_kinds_that_are_asked_by_number_as_the_model_runs_are_no_case_for_dropping():
    """The masks of MiniMax go by the config's layer_types: without block 1 others would get the wrong one."""
    kinds = ["full_attention", "linear_attention"] * 2 + ["full_attention"]
    config = tf.MiniMaxConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, layer_types=kinds, block_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = spread(tf.MiniMaxForCausalLM(config)).eval()
    with pytest.raises(SurgeryError, match=r"layer_types tells the kinds of model\.layers by their numbers"):
        remove_blocks(model, {"model.layers": [1]})
    assert len(model.model.layers) == 5 and not isinstance(model.config, PrunedSettings)


@needs_minicpm
@pytest.mark.parametrize("gone", [[0], [2], [1, 3]])
def test_a_language_model_generates_alike_with_its_cache_and_without(gone):
    torch.manual_seed(0)
    model = pruned(spread(tf.MiniCPM3ForCausalLM(tf.MiniCPM3Config(**MINICPM))).eval(), {"model.layers": gone})
    prompt = torch.arange(5, 15)[None]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with_cache, without = (model.generate(prompt, use_cache=cached, **settings) for cached in (True, False))
    assert torch.equal(with_cache, without)


def broken(config: dict) -> list[dict]:
    layout = config[LAYOUT_KEY]
    return [
        {**config, "base_config": None},
        {**config, "base_model_type": 3},
        {**config, "base_model_type": "no such type"},
        {**config, "base_model_type": "deeparc_pruned"},
        {**config, LAYOUT_KEY: None},
        {**config, LAYOUT_KEY: {BLOCKS: {"length": 6, "kept": [5, 0]}}},
        {**config, LAYOUT_KEY: {BLOCKS: {"length": 6, "kept": [0, 6]}}},
        {**config, LAYOUT_KEY: {BLOCKS: {"length": 6, "kept": []}}},
        {**config, LAYOUT_KEY: {BLOCKS: {"length": 7, "kept": [0, 6]}}},
        {**config, LAYOUT_KEY: {**layout, "swin.encoder": {"length": 2, "kept": [0]}}},
        {**config, LAYOUT_KEY: {**layout, "__class__": {"length": 2, "kept": [0]}}},
    ]


@pytest.mark.parametrize("number", range(11))
def test_a_malformed_config_is_refused(number, swin_folder, tmp_path):
    config = broken(json.loads((swin_folder / "config.json").read_text("utf-8")))[number]
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "model.safetensors").symlink_to(swin_folder / "model.safetensors")
    with pytest.raises(RecordError, match=r"Download the checkpoint again|Upgrade it"):
        tf.AutoModelForImageClassification.from_pretrained(tmp_path)
