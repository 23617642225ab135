"""Models that are more than their weights: with adapters (PEFT), quantized, tied, offloaded, on the meta device. Each
is pruned as any other, or refused with the way out.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

from deeparc_hf import (
    MPruneConfig,
    PrunedConfig,
    analyze,
    find_stacks,
    heal_model,
    prune_model,
    push_to_hub,
    remove_blocks,
    save_pruned,
    search_blocks,
    sparsify_model,
)
from deeparc_hf.architectures import Layout
from deeparc_hf.errors import DeepArcWarning, SurgeryError, UnsupportedModelError
from tests.pruning.test_surgery import assert_unchanged, snapshot
from tests.zoo import CAUSAL, TEXT, ZOO

peft = pytest.importorskip("peft")
STACK = "model.layers"
LORA = {
    "bert": {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "llama": {"target_modules": "all-linear", "use_dora": True},
    "resnet": {"target_modules": ["convolution"]},
    "t5": {"target_modules": ["q", "v"], "use_rslora": True},
    "vit": {"target_modules": "all-linear", "modules_to_save": ["classifier"]},
    "timm_vit": {"target_modules": ["qkv", "fc1"]},
}


def lora(**settings):
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "init_lora_weights": False, **settings})


def adapted(kind="llama", **settings):
    torch.manual_seed(1)
    return peft.get_peft_model(ZOO[kind].model(), lora(**{**LORA.get(kind, {}), **settings})).eval()


def do_nothing(module, args, kwargs, output):
    """A forward hook by which a block gives back what it gets."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def answer(model, batch):
    root = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():
        if not isinstance(root, tf.PreTrainedModel):  # of timm
            return model(batch["pixel_values"])
        return model(**batch).logits


def middle(model):
    """The second block that may go of the first stack that has two, and its stack."""
    for name, stack in find_stacks(model).items():
        free = [index for index in range(len(stack)) if index not in stack.pinned]
        if len(free) > 1:
            return name, free[1]
    raise AssertionError("no stack with two blocks that may go")


# ---- adapters ----


@pytest.mark.parametrize("kind", LORA)
def test_blocks_beneath_adapters_go_and_the_others_keep_theirs(kind):
    batch = ZOO[kind].batches(1)[0]
    model, other = adapted(kind), adapted(kind)
    name, index = middle(model)
    find_stacks(other)[name].blocks[index].register_forward_hook(do_nothing, with_kwargs=True)
    assert find_stacks(model)[name].pinned == find_stacks(ZOO[kind].model())[name].pinned
    trainable = {id(p): p.requires_grad for p in model.parameters()}
    remove_blocks(model, {name: [index]})
    assert torch.equal(answer(model, batch), answer(other, batch))
    assert all(p.requires_grad == trainable[id(p)] for p in model.parameters())
    stock = ZOO[kind].model()
    remove_blocks(stock, {name: [index]})
    bare = {
        key.replace(".base_layer.", ".").replace(".original_module.", ".")
        for key in model.base_model.model.state_dict()
    }
    assert set(stock.state_dict()) <= bare


def test_gradients_reach_the_adapters_that_stay_and_the_optimizer_follows():
    model = adapted()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    batch = ZOO["llama"].batches(1)[0]
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    gone = set(find_stacks(model)[STACK].blocks[1].parameters())
    remove_blocks(model, {STACK: [1]}, optimizer=optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert not gone & set(held) and not gone & set(optimizer.state)
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in held)


SAVED = """
import sys
sys.modules["deeparc_hf"] = None  # so that it cannot be imported
import torch, transformers, peft
for number in range(1, len(sys.argv), 2):
    folder, cls = sys.argv[number : number + 2]
    model, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    model = peft.PeftModel.from_pretrained(model, f"{folder}/adapter").eval()
    with torch.no_grad():
        torch.save(model(**torch.load(f"{folder}/batch.pt")).logits, f"{folder}/answer.pt")
"""


def test_the_model_beneath_and_its_adapters_are_saved_for_stock(tmp_path):
    models, asked = {}, []
    for kind in ("bert", "gpt2", "t5"):
        models[kind] = model = adapted(kind)
        name, index = middle(model)
        remove_blocks(model, {name: [index]})
        folder = tmp_path / kind
        save_pruned(model, folder)
        torch.save(ZOO[kind].batches(1)[0], folder / "batch.pt")
        asked += [str(folder), type(model.get_base_model()).__name__]
        assert PrunedConfig.from_pretrained(folder).removed[name] == (index,)
        assert not any("lora" in key or "base_layer" in key for key in load_file(folder / "model.safetensors"))
    done = subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", SAVED, *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind, model in models.items():
        found = torch.load(tmp_path / kind / "answer.pt")
        assert torch.equal(found, answer(model, ZOO[kind].batches(1)[0]))


def test_merged_after_a_removal_it_is_a_plain_pruned_model(tmp_path):
    model, batch = adapted(), ZOO["llama"].batches(1)[0]
    record = remove_blocks(model, {STACK: [1]})
    before = answer(model, batch)
    merged = model.merge_and_unload()
    assert PrunedConfig.from_model(merged) == record
    torch.testing.assert_close(answer(merged, batch), before, atol=1e-4, rtol=0)
    save_pruned(merged, tmp_path)
    assert PrunedConfig.from_pretrained(tmp_path) == record and not (tmp_path / "adapter").exists()
    assert torch.equal(answer(tf.LlamaForCausalLM.from_pretrained(tmp_path), batch), answer(merged, batch))


def test_each_of_several_adapters_stays_and_is_saved(tmp_path):
    model, batch = adapted(), ZOO["llama"].batches(1)[0]
    model.add_adapter("other", lora(target_modules=["v_proj"], r=3))
    remove_blocks(model, {STACK: [2]})
    save_pruned(model, tmp_path)
    base = tf.LlamaForCausalLM.from_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    again.load_adapter(tmp_path / "adapter" / "other", "other")
    for name in ("default", "other"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(answer(again.eval(), batch), answer(model, batch))


@pytest.mark.parametrize("how", ["inject_adapter_in_model", "add_adapter"])
def test_adapters_without_a_wrapper_are_the_same(how, tmp_path):
    model = ZOO["llama"].model()
    if how == "add_adapter":
        try:
            model.add_adapter(lora(target_modules=["q_proj"]))
        except ValueError as error:  # transformers asks for a later PEFT
            pytest.skip(str(error))
    else:
        peft.inject_adapter_in_model(lora(target_modules=["q_proj"]), model)
    model.eval()
    batch = ZOO["llama"].batches(1)[0]
    remove_blocks(model, {STACK: [1]})
    save_pruned(model, tmp_path)
    again = peft.PeftModel.from_pretrained(tf.LlamaForCausalLM.from_pretrained(tmp_path), tmp_path / "adapter")
    assert torch.equal(answer(again.eval(), batch), answer(model, batch))


CONFIGS = {
    "layers": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2, 3]},
        {"target_modules": {"q_proj"}, "layers_to_transform": [0, 1, 2]},
    ),
    "one layer": (
        {"target_modules": ["q_proj"], "layers_to_transform": 3, "layers_pattern": "layers"},
        {"layers_to_transform": [2], "layers_pattern": "layers"},
    ),
    "a pattern": (
        {"target_modules": r".*layers\.[23].*q_proj"},
        {"target_modules": {"model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj"}},
    ),
    "names, exclusions and ranks": (
        {
            "target_modules": ["model.layers.3.self_attn.q_proj", "v_proj"],
            "exclude_modules": ["layers.0.self_attn.v_proj"],
            "rank_pattern": {"layers.2.self_attn.v_proj": 3},
            "alpha_pattern": {"layers.3.self_attn.q_proj": 7},
        },
        {
            "target_modules": {
                f"model.layers.{n}.self_attn.{m}" for n, m in ((2, "q_proj"), (1, "v_proj"), (2, "v_proj"))
            },
            "exclude_modules": None,
            "rank_pattern": {r"model\.layers\.1\.self_attn\.v_proj": 3},
            "alpha_pattern": {r"model\.layers\.2\.self_attn\.q_proj": 7},
        },
    ),
    "a copy of a part": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "layers.2.mlp"]},
        {"modules_to_save": ["lm_head", "model.layers.1.mlp"]},
    ),
    "what has no number": (
        {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 3}, "modules_to_save": ["lm_head"], "bias": "all"},
        {"target_modules": {"q_proj"}, "rank_pattern": {"q_proj": 3}, "modules_to_save": ["lm_head"]},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_adapters_tell_the_blocks_by_their_new_numbers(name, tmp_path):
    given, wanted = CONFIGS[name]
    model, batch = adapted(**{"use_dora": False, **given}), ZOO["llama"].batches(1)[0]
    mine = model.peft_config["default"]
    before = dict(vars(mine))
    remove_blocks(model, {STACK: [1]})
    found = model.peft_config["default"]
    assert {key: getattr(found, key) for key in wanted} == wanted
    assert vars(mine) == before  # other models may have been made with it
    save_pruned(model, tmp_path)
    again = peft.PeftModel.from_pretrained(tf.LlamaForCausalLM.from_pretrained(tmp_path), tmp_path / "adapter")
    assert torch.equal(answer(again.eval(), batch), answer(model, batch))


def test_copies_of_a_part_that_are_trained_in_its_place_follow_too():
    model = adapted(target_modules=["v_proj"], modules_to_save=["layers.3.self_attn"], use_dora=False)
    remove_blocks(model, {STACK: [1]})
    attention = model.get_base_model().model.layers[2].self_attn
    assert attention.original_module.layer_idx == attention.modules_to_save["default"].layer_idx == 2
    ids = ZOO["llama"].batches(1)[0]["input_ids"][:1]
    cached, plain = (model.generate(input_ids=ids, max_new_tokens=5, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, plain)


def test_a_removal_that_fails_takes_nothing_from_the_adapters():
    model = adapted(target_modules=r".*layers\.[23].*q_proj", use_dora=False)
    root, config = model.get_base_model(), model.peft_config["default"]
    before = snapshot(root)
    last, layers = root.model.layers[3], root.model.layers
    last.forward = lambda hidden, *args, **kwargs: hidden + len(layers)  # it depends on how many there are
    with pytest.raises(SurgeryError, match="does not compute what the original computes"):
        remove_blocks(model, {STACK: [1]})
    del last.forward
    assert_unchanged(root, before)
    assert model.peft_config["default"] is config


OTHERS = {
    "prefixes": (
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        "of the kind PREFIX_TUNING",
    ),
    "prompts": (
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        "of the kind PROMPT_TUNING",
    ),
    "adaption prompts": (
        lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=2, task_type="CAUSAL_LM"),
        "of the kind ADAPTION_PROMPT",
    ),
    "ia3": (lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "of the kind IA3"),
    "norms": (lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]), "of the kind LN_TUNING"),
    "adalora": (lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), "of the kind ADALORA"),
    "blocks used twice": (
        lambda: lora(target_modules=["q_proj"], layer_replication=[[0, 3], [1, 4]]),
        "with layer_replication",
    ),
    "whole blocks": (lambda: lora(target_modules=["q_proj"], modules_to_save=["layers.2"]), "copies of whole blocks"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_adapters_that_would_not_follow_are_refused_with_the_way_out(name):
    make, words = OTHERS[name]
    model = peft.get_peft_model(ZOO["llama"].model(), make())
    with pytest.raises(UnsupportedModelError, match=rf"{words}.*cannot follow.*merge_and_unload.*prune first and add"):
        remove_blocks(model, {STACK: [1]})


def test_blocks_that_no_setting_leaves_out_are_dropped_from_beneath_adapters(tmp_path):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 120, "bos_token_id": 1, "eos_token_id": 2}
    config = tf.GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True, attn_implementation="eager")
    model, batch = tf.GPT2LMHeadModel(config), ZOO["gpt2"].batches(1)[0]
    model = peft.get_peft_model(model, lora(target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    with pytest.warns(DeepArcWarning, match="can only be loaded where deeparc_hf is installed"):
        remove_blocks(model, {"transformer.h": [1]})
    save_pruned(model, tmp_path)
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert len(base.transformer.h) == 3
    assert torch.equal(answer(again, batch), answer(model, batch))


def test_the_only_adapters_of_a_model_do_not_go_with_their_blocks():
    model = adapted(target_modules=["q_proj"], layers_to_transform=[1, 2], use_dora=False)
    with pytest.raises(SurgeryError, match=r"All layers that the adapter 'default' is in would go.*delete_adapter"):
        remove_blocks(model, {STACK: [1, 2]})
    assert len(find_stacks(model)[STACK]) == 4


def test_adapted_models_are_compared_searched_and_pruned_but_not_healed_or_published(tmp_path):
    model, batches = adapted(), ZOO["llama"].batches(4)
    whole = adapted()
    plan = analyze(model, batches, num_blocks=3, progress=False)
    assert search_blocks(adapted(), batches, num_blocks=3, heal=None, progress=False).points
    for refused in (
        lambda: prune_model(model, batches, num_blocks=3, heal="lstsq", progress=False),
        lambda: search_blocks(model, batches, num_blocks=3, progress=False),
        lambda: analyze(model, batches, MPruneConfig(num_blocks=3, search="greedy", heal="lstsq"), progress=False),
    ):
        with pytest.raises(UnsupportedModelError, match=r"weights beneath the PEFT adapters.*heal=None"):
            refused()
    assert len(find_stacks(model)[STACK]) == 4
    prune_model(model, batches, plan, progress=False)
    assert len(find_stacks(model)[STACK]) == 3
    with pytest.raises(UnsupportedModelError, match="weights beneath the PEFT adapters"):
        heal_model(model, whole, batches, progress=False)
    with pytest.raises(UnsupportedModelError, match=r"carries PEFT adapters, and what is published.*save_pruned"):
        push_to_hub(model, "somebody/something")


def test_adapters_that_are_merged_for_the_time_being_are_not_saved_twice(tmp_path):
    model = adapted(use_dora=False)
    model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match=r"saved twice.*unmerge_adapter\(\)"):
        save_pruned(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# ---- quantized ----

SKIPPED = ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn", "model.layers.3"]
LEFT = ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.2"]
WIDE = {**CAUSAL, "hidden_size": 64, "intermediate_size": 128}  # bitsandbytes packs 64 values at a time


def by_torchao(**settings):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return tf.TorchAoConfig(torchao.Int8WeightOnlyConfig(), **settings)


def by_names(names):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    how = {"_default": torchao.Int8WeightOnlyConfig(), **dict.fromkeys(names)}
    return tf.TorchAoConfig(torchao.FqnToConfig(how))


def by_bitsandbytes(**settings):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return tf.BitsAndBytesConfig(**settings)


# how a model is quantized, and the entry of the config that lists modules
QUANTIZED = {
    "torchao": (by_torchao, None),
    "torchao, modules left out": (lambda: by_torchao(modules_to_not_convert=list(SKIPPED)), "modules_to_not_convert"),
    "torchao, by name": (lambda: by_names(["model.layers.2.mlp.up_proj", "model.layers.1.mlp.up_proj"]), None),
    "8 bits": (lambda: by_bitsandbytes(load_in_8bit=True), None),
    "8 bits, modules left out": (
        lambda: by_bitsandbytes(load_in_8bit=True, llm_int8_skip_modules=list(SKIPPED)),
        "llm_int8_skip_modules",
    ),
    "4 bits": (lambda: by_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), None),
    "4 bits, statistics too": (lambda: by_bitsandbytes(load_in_4bit=True, bnb_4bit_use_double_quant=True), None),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint to be quantized."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide")
    tf.LlamaForCausalLM(tf.LlamaConfig(**WIDE)).save_pretrained(folder)
    return folder


def quantized(wide, name):
    return tf.LlamaForCausalLM.from_pretrained(wide, quantization_config=QUANTIZED[name][0]())


@pytest.mark.parametrize("name", QUANTIZED)
def test_packed_blocks_go_whole(name, wide, tmp_path):
    entry, batch = QUANTIZED[name][1], ZOO["llama"].batches(1)[0]
    model, whole = quantized(wide, name), quantized(wide, name)
    assert find_stacks(model)[STACK].pinned == {}
    counts = remove_blocks(model, {STACK: [1]}).iterations[-1]["parameters"]
    block = tf.LlamaForCausalLM.from_pretrained(wide).model.layers[1]
    assert counts["before"] - counts["after"] == sum(p.numel() for p in block.parameters())
    if entry is not None:
        assert getattr(model.config.quantization_config, entry) == LEFT
        assert getattr(model.hf_quantizer.quantization_config, entry) == LEFT
    # bitsandbytes packs weights anew, in fewer digits, when they run on some CPUs, and again when their state is asked
    # for: both models have run, and neither was asked
    handle = whole.model.layers[1].register_forward_hook(do_nothing, with_kwargs=True)
    assert torch.equal(answer(model, batch), answer(whole, batch))
    handle.remove()
    save_pruned(model, tmp_path / "pruned")
    whole.save_pretrained(tmp_path / "whole")
    found, tensors = (load_file(tmp_path / kind / "model.safetensors") for kind in ("pruned", "whole"))
    expected = Layout.without({STACK: 4}, {STACK: [1]}).renamed_keys(tensors)
    assert found.keys() == expected.keys() and all(torch.equal(value, expected[key]) for key, value in found.items())
    again, reference = (tf.LlamaForCausalLM.from_pretrained(tmp_path / kind) for kind in ("pruned", "whole"))
    reference.model.layers[1].register_forward_hook(do_nothing, with_kwargs=True)
    assert torch.equal(answer(again, batch), answer(reference, batch))
    remove_blocks(again, {STACK: [0]})
    assert PrunedConfig.from_model(again).kept[STACK] == (2, 3)


def test_modules_named_in_lists_side_by_side_follow(tmp_path):
    """XLM's blocks have parts in several lists."""
    ZOO["xlm"].model().save_pretrained(tmp_path)
    named = by_names(["transformer.attentions.1.q_lin", "transformer.ffns.2.lin1", "transformer.ffns.3.lin2"])
    model = tf.XLMForSequenceClassification.from_pretrained(tmp_path, quantization_config=named)
    (stack,) = find_stacks(model)
    remove_blocks(model, {stack: [1]}, verify=False)  # torchao cannot run all of it
    left = model.config.quantization_config.quant_type.fqn_to_config
    assert set(left) == {"_default", "transformer.ffns.1.lin1", "transformer.ffns.2.lin2"}


UNCLEAR = {
    "a pattern of modules left out": lambda: by_torchao(modules_to_not_convert=["lm_head", r"model.layers.[23].mlp"]),
    "the end of a name": lambda: by_bitsandbytes(load_in_8bit=True, llm_int8_skip_modules=["layers.2.mlp.up_proj"]),
    "a pattern of packed modules": lambda: by_names([r"re:model\.layers\.[23]\..*up_proj"]),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_quantization_config_that_cannot_be_renumbered_is_refused(name, wide):
    model = tf.LlamaForCausalLM.from_pretrained(wide, quantization_config=UNCLEAR[name]())
    config, quantization = model.config, copy.deepcopy(model.config.quantization_config.to_dict())
    with pytest.raises(SurgeryError, match=r"quantization config of LlamaForCausalLM names modules by patterns.*whole"):
        remove_blocks(model, {STACK: [1]})
    assert len(model.model.layers) == 4 and model.config is config
    assert model.config.quantization_config.to_dict() == quantization
    assert model.hf_quantizer.quantization_config is model.config.quantization_config


@pytest.mark.parametrize("name", ["torchao", "8 bits"])
def test_quantized_models_are_compared_and_pruned_but_not_changed_otherwise(name, wide):
    model, batches = quantized(wide, name), ZOO["llama"].batches(4)
    with pytest.raises(UnsupportedModelError, match=r"is quantized, and healing cannot change.*heal=None"):
        search_blocks(model, batches, num_blocks=3, progress=False)
    with pytest.raises(UnsupportedModelError, match=r"is quantized: weights that are packed.*quantize it afterwards"):
        sparsify_model(model, batches, progress=False)
    prune_model(model, batches, num_blocks=3, progress=False)
    assert len(model.model.layers) == model.config.num_hidden_layers == 3


@pytest.mark.parametrize("name", ["torchao", "8 bits", "4 bits"])
def test_blocks_go_from_beneath_adapters_on_packed_weights(name, wide, tmp_path):
    batch = ZOO["llama"].batches(1)[0]
    model = peft.get_peft_model(quantized(wide, name), lora(target_modules=["q_proj", "v_proj"])).eval()
    remove_blocks(model, {STACK: [1]})
    save_pruned(model, tmp_path)
    base = tf.LlamaForCausalLM.from_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(answer(again, batch), answer(model, batch))


# ---- tied weights ----


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_tied_embeddings_stay_tied(kind, tmp_path):
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**CAUSAL, "tie_word_embeddings": True})).eval()
    model = model if kind == "llama" else ZOO[kind].model()
    name, index = middle(model)
    remove_blocks(model, {name: [index]})
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    save_pruned(model, tmp_path)
    again, batch = type(model).from_pretrained(tmp_path), ZOO[kind].batches(1)[0]
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(answer(again, batch), answer(model, batch))


def test_weights_that_blocks_share_stay_with_the_block_that_stays(tmp_path):
    model = ZOO["llama"].model()
    layers = model.model.layers
    layers[2].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = remove_blocks(model, {STACK: [1]}, optimizer=optimizer)
    counts = record.iterations[-1]["parameters"]
    own = sum(p.numel() for p in layers[0].parameters())
    assert counts["before"] - counts["after"] == own - layers[1].mlp.up_proj.weight.numel()
    assert any(p is layers[1].mlp.up_proj.weight for group in optimizer.param_groups for p in group["params"])
    save_pruned(model, tmp_path)
    batch = ZOO["llama"].batches(1)[0]
    assert torch.equal(answer(tf.LlamaForCausalLM.from_pretrained(tmp_path), batch), answer(model, batch))


def test_a_model_whose_blocks_are_one_is_refused():
    model = tf.AlbertForSequenceClassification(tf.AlbertConfig(**TEXT, embedding_size=16))
    with pytest.raises(UnsupportedModelError, match=r"layers that are run.*shared"):
        find_stacks(model)


# ---- offloaded (more in tests/core/test_offload.py), and on the meta device ----


def test_blocks_go_from_a_model_that_is_partly_on_the_disk(tmp_path):
    whole = ZOO["llama"].model()
    whole.save_pretrained(tmp_path / "whole")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"{STACK}.{index}": "disk" for index in range(4)}
    folder = str(tmp_path / "offload")
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "whole", device_map=places, offload_folder=folder)
    assert all(p.is_meta for p in model.model.layers[2].parameters())
    remove_blocks(model, {STACK: [1]})
    remove_blocks(whole, {STACK: [1]})
    save_pruned(model, tmp_path / "pruned")
    again, batch = tf.LlamaForCausalLM.from_pretrained(tmp_path / "pruned"), ZOO["llama"].batches(1)[0]
    assert torch.equal(answer(again, batch), answer(whole, batch))


def test_adapters_on_weights_that_lie_elsewhere_are_refused(tmp_path):
    ZOO["llama"].model().save_pretrained(tmp_path / "whole")
    places = {"model": "disk", "lm_head": "cpu"}
    folder = str(tmp_path / "offload")
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "whole", device_map=places, offload_folder=folder)
    model = peft.get_peft_model(model, lora(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match=r"adapters on weights that accelerate keeps.*without offloading"):
        remove_blocks(model, {STACK: [1]})


def test_a_model_on_the_meta_device_is_described_and_pruned_by_its_settings_alone():
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**CAUSAL))
    assert len(find_stacks(model)[STACK]) == 4
    with pytest.raises(SurgeryError, match=r"has no weights \(meta device\).* say verify=False"):
        remove_blocks(model, {STACK: [1]})
    assert len(model.model.layers) == 4
    record = remove_blocks(model, {STACK: [1]}, verify=False)
    assert record.kept[STACK] == (0, 2, 3) and model.config.num_hidden_layers == 3
    assert isinstance(model.model.layers, nn.ModuleList) and all(p.is_meta for p in model.parameters())
    assert json.loads(model.config.to_json_string())["pruning_config"] == record.to_dict()
