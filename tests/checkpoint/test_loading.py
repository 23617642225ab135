"""`load_pruned`: a base checkpoint with only the blocks that stay, equal to load-then-remove to the bit."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from deeparc_hf import PrunedConfig, find_stacks, load_pruned, remove_blocks, save_pruned
from deeparc_hf.errors import RecordError, UnsupportedModelError
from tests.zoo import TEXT, VIT_STACK, ZOO

# what goes; not always the middle, so that keys on both sides of the gap are renumbered
REMOVALS: dict[str, dict[str, list[int]]] = {
    "bert": {"bert.encoder.layer": [0, 2]},
    "deberta_v2": {"deberta.encoder.layer": [1]},
    "gpt2": {"transformer.h": [1]},
    "llama": {"model.layers": [0, 3]},
    "resnet": {"resnet.encoder.stages.1.layers": [1], "resnet.encoder.stages.2.layers": [1, 2]},
    "t5": {"encoder.block": [1, 2], "decoder.block": [1]},
    "vit": {VIT_STACK: [1]},
    "whisper": {"model.encoder.layers": [0], "model.decoder.layers": [2]},
    "xlm": {"transformer.{attentions,layer_norm1,ffns,layer_norm2}": [0, 2]},
    "wrapped_vit": {"timm_model.blocks": [0, 2]},
}
# number of bytes of the largest shard: several blocks to a shard, and several shards to a block
SHARDS = {"one file": None, "shards": "20KB", "many shards": "1KB"}


def save_base(name: str, folder: Path, shard: str | None = None) -> nn.Module:
    """Save a model of the zoo and return it as its Auto class loads it."""
    ZOO[name].model().save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
    assert (folder / "model.safetensors.index.json").exists() == (shard is not None)
    return auto(name).from_pretrained(folder)


def auto(name: str) -> type:
    return getattr(tf, ZOO[name].auto)


def pruned(name: str, folder: Path, shard: str | None = None) -> tuple[nn.Module, PrunedConfig]:
    """The reference: load everything, then remove."""
    model = save_base(name, folder, shard)
    return model, remove_blocks(model, REMOVALS[name])


def assert_equal(found: nn.Module, expected: nn.Module, name: str) -> None:
    own, other = found.state_dict(), expected.state_dict()
    assert list(own) == list(other)
    for key, value in own.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key
    assert not found.training
    assert not any(p.is_meta for p in found.parameters())
    inputs = ZOO[name].batches(1)[0]
    with torch.no_grad():
        assert torch.allclose(found(**inputs).logits, expected(**inputs).logits, rtol=1e-5, atol=1e-5)


def block_keys(folder: Path, removal: dict[str, list[int]], rename: Callable[[str], str] = str) -> set[str]:
    """Keys of the checkpoint that belong to removed blocks, found without the package's own naming."""
    prefixes = tuple(f"{stack}.{index}." for stack, indices in removal.items() for index in indices)
    keys = [key for file in folder.glob("*.safetensors") for key in header(file) if key != "__metadata__"]
    gone = {key for key in keys if rename(key).startswith(prefixes)}
    assert gone and len(gone) < len(keys)
    return gone


def header(file: Path) -> dict[str, dict]:
    with open(file, "rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(size))


def spoil(file: Path, keys: set[str]) -> int:
    """Overwrite the bytes of these tensors with NaN; returns how many tensors were hit."""
    entries = header(file)
    hit = sorted(keys & entries.keys())
    with open(file, "r+b") as stream:
        start = 8 + struct.unpack("<Q", stream.read(8))[0]
        for key in hit:
            begin, end = entries[key]["data_offsets"]
            stream.seek(start + begin)
            stream.write(b"\xff" * (end - begin))
    return len(hit)


def lose(folder: Path, removal: dict[str, list[int]]) -> None:
    """Delete the shards that hold nothing but removed blocks, and spoil these in the others."""
    gone, deleted = block_keys(folder, removal), 0
    for file in folder.glob("model-*.safetensors"):
        if header(file).keys() - {"__metadata__"} <= gone:
            file.unlink()
            deleted += 1
        else:
            spoil(file, gone)
    assert deleted >= 3


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("name", REMOVALS)
def test_it_equals_load_then_remove_to_the_bit(name, shard, tmp_path):
    expected, record = pruned(name, tmp_path, SHARDS[shard])
    found = load_pruned(auto(name), tmp_path, record)
    assert_equal(found, expected, name)
    own, other = (model.config.to_dict() for model in (found, expected))
    assert (
        PrunedConfig.from_dict(own.pop("pruning_config")).kept
        == PrunedConfig.from_dict(other.pop("pruning_config")).kept
    )
    assert own == other
    assert found.config._name_or_path == str(tmp_path)


def test_it_generates_as_load_then_remove_does(tmp_path):
    expected, record = pruned("llama", tmp_path, "20KB")
    found = load_pruned(tf.AutoModelForCausalLM, tmp_path, record)
    ids = torch.randint(5, 100, (2, 6))
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(found.generate(ids, **settings), expected.generate(ids, **settings))


def vit_names(key: str) -> str:
    # the layout on disk may be older than the model's: transformers renames such keys when it loads them
    return re.sub(r"^vit\.(encoder\.layer|layers)\.", f"{VIT_STACK}.", key)


def wrapped_names(key: str) -> str:
    return key if key.startswith("timm_model.") else f"timm_model.{key}"


@pytest.mark.parametrize(
    ("name", "rename"),
    [("bert", str), ("t5", str), ("vit", vit_names), ("resnet", str), ("wrapped_vit", wrapped_names)],
)
def test_bytes_of_removed_blocks_do_not_matter(name, rename, tmp_path):
    expected, record = pruned(name, tmp_path)
    gone = block_keys(tmp_path, REMOVALS[name], rename)
    assert spoil(tmp_path / "model.safetensors", gone) == len(gone)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert all(file.get_tensor(key).isnan().all() for key in gone if file.get_tensor(key).is_floating_point())
    assert_equal(load_pruned(auto(name), tmp_path, record), expected, name)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_shards_that_hold_only_removed_blocks_need_not_be_there(name, tmp_path):
    expected, record = pruned(name, tmp_path, "1KB")
    lose(tmp_path, REMOVALS[name])
    with pytest.raises(OSError):
        auto(name).from_pretrained(tmp_path)
    assert_equal(load_pruned(auto(name), tmp_path, record), expected, name)


def test_another_head_of_the_same_base_takes_the_same_record(tmp_path):
    expected, record = pruned("bert", tmp_path)
    found = load_pruned(tf.AutoModel, tmp_path, record)
    assert isinstance(found, tf.BertModel)
    assert list(find_stacks(found)) == ["encoder.layer"]
    assert PrunedConfig.from_model(found).kept == {"encoder.layer": (1, 3)}
    own, other = found.state_dict(), expected.bert.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)


def test_a_headless_record_serves_a_model_with_a_head(tmp_path):
    expected, _ = pruned("bert", tmp_path)
    record = remove_blocks(tf.AutoModel.from_pretrained(tmp_path), {"encoder.layer": [0, 2]})
    assert_equal(load_pruned(auto("bert"), tmp_path, record), expected, "bert")


def test_a_model_class_serves_as_well_as_an_auto_class(tmp_path):
    expected, record = pruned("bert", tmp_path)
    assert_equal(load_pruned(tf.BertForSequenceClassification, tmp_path, record), expected, "bert")


@pytest.mark.parametrize("form", ["record", "dict", "folder", "folder as text", "json file"])
def test_every_form_of_a_record_will_do(form, tmp_path):
    expected, record = pruned("bert", tmp_path / "base")
    save_pruned(expected, tmp_path / "pruned")
    forms = {
        "record": record,
        "dict": record.to_dict(),
        "folder": tmp_path / "pruned",
        "folder as text": str(tmp_path / "pruned"),
        "json file": tmp_path / "pruned" / "config.json",
    }
    assert_equal(load_pruned(auto("bert"), tmp_path / "base", forms[form]), expected, "bert")


def test_a_record_of_several_prunings_is_one_recipe(tmp_path):
    expected = save_base("bert", tmp_path)
    remove_blocks(expected, {"bert.encoder.layer": [1]})
    record = remove_blocks(expected, {"bert.encoder.layer": [1]})
    assert record.kept == {"bert.encoder.layer": (0, 3)}
    found = load_pruned(auto("bert"), tmp_path, record)
    assert_equal(found, expected, "bert")
    again = remove_blocks(found, {"bert.encoder.layer": [0]})
    assert again.kept == {"bert.encoder.layer": (3,)} and len(again.iterations) == 3


def test_arguments_of_from_pretrained_pass_through(tmp_path):
    expected, record = pruned("bert", tmp_path)
    found = load_pruned(
        auto("bert"), tmp_path, record, num_labels=7, dtype=torch.bfloat16, ignore_mismatched_sizes=True
    )
    assert found.config.num_labels == 7 and found.classifier.weight.shape[0] == 7
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    key = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(found.state_dict()[key], expected.state_dict()[key].to(torch.bfloat16))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.bfloat16, None])
def test_a_base_in_half_precision_has_the_dtype_that_from_pretrained_gives_it(dtype, tmp_path):
    ZOO["llama"].model().to(torch.bfloat16).save_pretrained(tmp_path)
    settings = {} if dtype is None else {"dtype": dtype}
    expected = tf.AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
    record = remove_blocks(expected, {"model.layers": [1]})
    assert_equal(load_pruned(tf.AutoModelForCausalLM, tmp_path, record, **settings), expected, "llama")


def test_the_attention_implementation_passes_through(tmp_path):
    _, record = pruned("llama", tmp_path)
    found = load_pruned(tf.AutoModelForCausalLM, tmp_path, record, attn_implementation="eager")
    assert found.config._attn_implementation == "eager"


def test_loading_info_passes_through(tmp_path):
    expected, record = pruned("bert", tmp_path)
    found, info = load_pruned(auto("bert"), tmp_path, record, output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    assert_equal(found, expected, "bert")


def test_the_generation_config_of_the_base_comes_along(tmp_path):
    model = ZOO["llama"].model()
    model.generation_config.eos_token_id = [2, 7]
    model.generation_config.repetition_penalty = 1.25
    model.save_pretrained(tmp_path)
    record = remove_blocks(tf.AutoModelForCausalLM.from_pretrained(tmp_path), {"model.layers": [1]})
    found = load_pruned(tf.AutoModelForCausalLM, tmp_path, record).generation_config
    assert (found.eos_token_id, found.repetition_penalty) == ([2, 7], 1.25)


def test_a_config_may_be_given(tmp_path):
    _, record = pruned("bert", tmp_path)
    config = tf.AutoConfig.from_pretrained(tmp_path, hidden_dropout_prob=0.25)
    found = load_pruned(auto("bert"), tmp_path, record, config=config)
    assert found.config.hidden_dropout_prob == 0.25
    assert (config.num_hidden_layers, found.config.num_hidden_layers) == (4, 2)
    assert not hasattr(config, "pruning_config")


def test_the_result_saves_and_loads_with_plain_transformers(tmp_path):
    expected, record = pruned("t5", tmp_path / "base", "20KB")
    load_pruned(auto("t5"), tmp_path / "base", record).save_pretrained(tmp_path / "small")
    again, info = auto("t5").from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    assert_equal(again, expected, "t5")


def record_of(stacks: dict[str, tuple[int, list[int]]]) -> dict:
    return {
        "format_version": 1,
        "stacks": {name: {"length": length, "kept": kept} for name, (length, kept) in stacks.items()},
    }


@pytest.mark.parametrize(
    ("name", "stacks", "message"),
    [
        (
            "bert",
            {"bert.encoder.layer": (12, [0, 1])},
            r"with 12 blocks in bert\.encoder\.layer; this one has 4\. Give the checkpoint",
        ),
        (
            "bert",
            {"model.layers": (4, [0])},
            r"names the stack 'model\.layers', which the base model lacks.*bert\.encoder\.layer",
        ),
        (
            "t5",
            {"encoder.block": (4, [1, 2])},
            r"removes block 0 of encoder\.block, which is pinned: owns.*relative_attention_bias",
        ),
        (
            "resnet",
            {"resnet.encoder.stages.2.layers": (4, [3])},
            r"removes block 0 of .*stages\.2\.layers, which is pinned: first block",
        ),
        ("bert", {"bert.encoder.layer": (4, [2, 1])}, r"malformed: stacks\.bert\.encoder\.layer\.kept"),
        ("bert", {"bert.encoder.layer": (4, [])}, r"malformed: stacks\.bert\.encoder\.layer\.kept"),
    ],
)
def test_a_record_that_does_not_fit_the_base_is_refused(name, stacks, message, tmp_path):
    save_base(name, tmp_path)
    with pytest.raises(RecordError, match=message):
        load_pruned(auto(name), tmp_path, record_of(stacks))


def test_a_pruned_checkpoint_is_not_its_own_base(tmp_path):
    model, record = pruned("bert", tmp_path / "base")
    save_pruned(model, tmp_path / "pruned")
    with pytest.raises(RecordError, match=r"with 4 blocks in bert\.encoder\.layer; this one has 2"):
        load_pruned(auto("bert"), tmp_path / "pruned", record)


def test_a_checkpoint_without_a_record_is_refused_as_one(tmp_path):
    save_base("bert", tmp_path)
    with pytest.raises(RecordError, match="has no pruning record"):
        load_pruned(auto("bert"), tmp_path, tmp_path)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    model, record = pruned("bert", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        UnsupportedModelError, match=r"neither model\.safetensors nor.*pickled.*from_pretrained, save it again"
    ):
        load_pruned(auto("bert"), tmp_path, record)


def test_remote_code_is_refused(tmp_path):
    _, record = pruned("bert", tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"trust_remote_code.*remove_blocks"):
        load_pruned(auto("bert"), tmp_path, record, trust_remote_code=True)
    load_pruned(auto("bert"), tmp_path, record, trust_remote_code=False)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/x.safetensors", "inner/x.safetensors", "..\\x.safetensors", "..", ""]
)
def test_a_shard_outside_the_checkpoint_is_not_read(shard, tmp_path):
    folder = tmp_path / "base"
    _, record = pruned("bert", folder, "20KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text("utf-8"))
    key = next(key for key in content["weight_map"] if "layer.1." in key)
    (tmp_path / "x.safetensors").write_bytes((folder / content["weight_map"][key]).read_bytes())
    content["weight_map"][key] = shard
    index.write_text(json.dumps(content), "utf-8")
    with pytest.raises(RecordError, match="names a shard outside the checkpoint"):
        load_pruned(auto("bert"), folder, record)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"bert.encoder.layer.1.x": 3}}']
)
def test_an_index_that_is_none_is_refused_as_one(content, tmp_path):
    _, record = pruned("bert", tmp_path, "20KB")
    (tmp_path / "model.safetensors.index.json").write_text(content, "utf-8")
    with pytest.raises(RecordError, match="index"):
        load_pruned(auto("bert"), tmp_path, record)


def test_a_family_that_is_refused_is_refused_here_too(tmp_path):
    tf.AlbertModel(tf.AlbertConfig(**TEXT, embedding_size=16)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="layers that are run many times"):
        load_pruned(tf.AutoModel, tmp_path, record_of({"encoder.layer": (4, [0])}))


def test_a_recipe_that_surgery_would_refuse_is_refused_too(tmp_path):
    config = tf.GPT2Config(
        n_embd=32,
        n_layer=4,
        n_head=4,
        vocab_size=120,
        scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=False,
    )
    model = tf.GPT2LMHeadModel(config)
    with_attribute = "scaling" in vars(model.transformer.h[0].attn)
    if not with_attribute:
        pytest.skip(
            "this version of transformers scales by the layer's index while it runs, which a config cannot show"
        )
    model.save_pretrained(tmp_path)
    record = PrunedConfig.from_dict(
        {"format_version": 1, "stacks": {"transformer.h": {"length": 4, "kept": [0, 2, 3]}}}
    )
    with pytest.raises(
        RecordError, match=r"cannot express what the pruning record keeps.*depends on the block's place"
    ):
        load_pruned(tf.AutoModelForCausalLM, tmp_path, record)


@pytest.mark.parametrize(
    ("name", "lacking", "told"),
    [
        ("bert", "bert.encoder.layer.3.", r"bert\.encoder\.layer\.1\."),
        ("xlm", "transformer.ffns.3.lin2.weight", r"transformer\.ffns\.1\.lin2\.weight"),
    ],
)
def test_a_base_that_lacks_a_block_that_stays_is_refused(name, lacking, told, tmp_path):
    """from_pretrained would make its weights up."""
    _, record = pruned(name, tmp_path)  # blocks 1 and 3 stay
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if not k.startswith(lacking)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(RecordError, match=rf"has no weights for {told}"):
        load_pruned(auto(name), tmp_path, record)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100])
def test_broken_safetensors_are_named(content, tmp_path):
    _, record = pruned("bert", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(RecordError, match=r"model\.safetensors of .* cannot be read as safetensors.*Download it again"):
        load_pruned(auto("bert"), tmp_path, record)
