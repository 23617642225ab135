"""A model follows what is loaded into it: first the number of blocks, then, by the record, which blocks these are.

The reference is always a second model, which `remove_blocks` pruned, or one that the stock library builds from what was
saved.
"""

from __future__ import annotations

import pytest
import timm
import torch
import transformers as tf
from torch import nn

from deeparc_hf import PrunedConfig, find_stacks, remove_blocks, save_pruned
from deeparc_hf.architectures import describe
from deeparc_hf.errors import SurgeryError
from deeparc_hf.pruning.freezing import freeze_blocks
from deeparc_hf.trainer.follow_checkpoint import Structure, guard, record_of, settle
from tests.zoo import ZOO, Specimen

TINY_VIT = {
    "num_classes": 5,
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 5,
    "num_heads": 4,
    "drop_path_rate": 0.4,
}
DROPS = Specimen(lambda: timm.create_model("vit_tiny_patch16_224", **TINY_VIT), "image")
SPECIMENS = {
    **{name: ZOO[name] for name in ("bert", "t5", "gemma3", "resnet", "timm_vit", "gpt2")},
    "timm_vit with drop path": DROPS,
}
# what stays are never the first blocks, which a model takes provisionally
GONE = {
    "bert": {"bert.encoder.layer": [0, 2]},
    "t5": {"encoder.block": [1, 2], "decoder.block": [1]},
    "gemma3": {"model.layers": [1, 3, 4]},  # 5 attends to everything, the others to a window
    "resnet": {"resnet.encoder.stages.1.layers": [1], "resnet.encoder.stages.2.layers": [1, 2]},
    "timm_vit": {"blocks": [1]},
    "timm_vit with drop path": {"blocks": [0, 3]},
    "gpt2": {"transformer.h": [0, 1]},
}


def fresh(name, seed=0):
    return SPECIMENS[name].model(seed)


def pruned(name, seed=1, gone=None):
    """A model with other weights, statistics too, pruned; and its record."""
    model = fresh(name, seed)
    if name == "resnet":
        model.train()
        model(**SPECIMENS[name].batches(1)[0])
        model.eval()
    record = remove_blocks(model, GONE[name] if gone is None else gone)
    return model, record


def outputs(model, name):
    inputs = SPECIMENS[name].batches(1, seed=5)[0]
    with torch.no_grad():
        found = model(inputs["pixel_values"]) if SPECIMENS[name].auto is None else model.eval()(**inputs).logits
    return found


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def lengths(model):
    return {name: len(stack) for name, stack in find_stacks(model).items()}


def settings(model):
    """The config, or timm's arguments, without the record."""
    data = model.config.to_dict() if hasattr(model, "config") else dict(getattr(model, "_model_args", {}))
    return {
        key: value
        for key, value in data.items()
        if key not in ("pruning_config", "transformers_version", "_name_or_path")
    }


def attributes(model, training=True):
    """What modules hold beside tensors, by path: indices, kinds of attention, rates. Checkpoints leave out what only
    training uses.
    """
    return {
        f"{path}.{key}": value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, float, str)) and key != "training" and (training or "drop_path" not in path)
    }


def followed(name, donor, seed=0):
    model = fresh(name, seed)
    guard(model)
    result = model.load_state_dict(donor.state_dict(), strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    return model


# --- number of blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECIMENS)
def test_a_model_follows_a_state_dict_with_fewer_blocks(name):
    donor, _ = pruned(name)
    model = followed(name, donor)
    assert lengths(model) == lengths(donor) != lengths(fresh(name))
    assert equal(state(model), state(donor))


@pytest.mark.parametrize("name", SPECIMENS)
def test_what_has_followed_is_what_a_stock_library_loads(name, tmp_path):
    donor, _ = pruned(name)
    model = followed(name, donor)
    save_pruned(model, tmp_path)
    if SPECIMENS[name].auto is None:
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    else:
        loaded, info = getattr(tf, SPECIMENS[name].auto).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert settings(loaded) == settings(model)
    assert equal(state(loaded), state(model))
    for stack in lengths(model):
        assert attributes(loaded.get_submodule(stack), training=False) == attributes(
            model.get_submodule(stack), training=False
        )
    torch.testing.assert_close(outputs(loaded, name), outputs(model, name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_a_model_that_is_not_guarded_does_not_follow(name):
    donor, _ = pruned(name)
    model = fresh(name)
    assert model.load_state_dict(donor.state_dict(), strict=False).missing_keys
    assert lengths(model) == lengths(fresh(name))


def test_a_model_inside_a_wrapper_follows_too():
    donor, _ = pruned("bert")
    wrapper = nn.Module()
    wrapper.inner, wrapper.extra = fresh("bert"), nn.Linear(2, 2)
    guard(wrapper.inner)
    saved = {f"inner.{key}": value for key, value in donor.state_dict().items()}
    result = wrapper.load_state_dict(saved, strict=False)
    assert sorted(result.missing_keys) == ["extra.bias", "extra.weight"]
    assert equal(state(wrapper.inner), state(donor))


def test_guarding_twice_and_a_state_dict_of_the_same_layout_change_nothing():
    model, other = fresh("bert"), fresh("bert", 1)
    guard(model)
    guard(model)
    config, blocks = model.config, list(model.bert.encoder.layer)
    model.load_state_dict(other.state_dict())
    assert equal(state(model), state(other))
    assert model.config is config
    assert list(model.bert.encoder.layer) == blocks
    assert record_of(model) is None


@pytest.mark.parametrize("name", ["bert", "t5", "resnet", "timm_vit"])
def test_more_blocks_than_the_model_has_are_refused_and_nothing_changes(name):
    donor = fresh(name, 1)
    model, _ = pruned(name, 0)
    guard(model)
    before, config, blocks = state(model), settings(model), lengths(model)
    with pytest.raises(
        SurgeryError, match=r"holds \d blocks in .*, the model has \d.*from the checkpoint's own folder"
    ):
        model.load_state_dict(donor.state_dict(), strict=False)
    assert equal(state(model), before)
    assert settings(model) == config
    assert lengths(model) == blocks


def test_one_stack_with_more_blocks_refuses_those_with_fewer_too():
    donor, _ = pruned("t5", 1, {"encoder.block": [2]})
    model, _ = pruned("t5", 0, {"decoder.block": [2]})
    guard(model)
    before = state(model)
    with pytest.raises(SurgeryError, match=r"holds 3 blocks in decoder\.block, the model has 2"):
        model.load_state_dict(donor.state_dict(), strict=False)
    assert equal(state(model), before)
    assert lengths(model) == {"encoder.block": 4, "decoder.block": 2}


SHARDS = {
    "the first blocks": lambda key, stack: key.startswith((f"{stack}.0.", f"{stack}.1.")),
    "what comes before and the first blocks": lambda key, stack: (
        "embed" in key or "wte" in key or "wpe" in key or key.startswith((f"{stack}.0.", f"{stack}.1."))
    ),
    "the last blocks and the head": lambda key, stack: (
        not key.startswith((f"{stack}.0.", f"{stack}.1.")) and "embed" not in key
    ),
    "one block": lambda key, stack: key.startswith(f"{stack}.0."),
    "no block": lambda key, stack: not key.startswith(stack),
    "nothing": lambda key, stack: False,
}


@pytest.mark.parametrize("takes", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize(
    ("name", "stack"), [("bert", "bert.encoder.layer"), ("gemma3", "model.layers"), ("timm_vit", "blocks")]
)
def test_a_shard_is_loaded_and_the_layout_left_alone(name, stack, takes):
    donor, model = fresh(name, 1), fresh(name)
    guard(model)
    before = state(model)
    shard = {key: value for key, value in donor.state_dict().items() if takes(key, stack)}
    model.load_state_dict(shard, strict=False)
    assert lengths(model) == lengths(donor)
    assert record_of(model) is None
    tied = {"lm_head.weight", "model.embed_tokens.weight"} if name == "gemma3" else set()
    for key, value in state(model).items():
        if key not in tied:
            assert torch.equal(value, shard.get(key, before[key])), key


@pytest.mark.parametrize(("name", "stack"), [("bert", "bert.encoder.layer"), ("timm_vit", "blocks")])
def test_fewer_blocks_of_other_shapes_are_refused_and_nothing_changes(name, stack):
    donor, _ = pruned(name)
    saved = donor.state_dict()
    key = next(key for key in saved if key.startswith(f"{stack}.1.") and saved[key].ndim == 2)
    saved[key] = torch.zeros(saved[key].shape[0] + 1, saved[key].shape[1])
    model = fresh(name)
    guard(model)
    before = state(model)
    with pytest.raises(SurgeryError, match="they do not fit"):
        model.load_state_dict(saved, strict=False)
    assert equal(state(model), before)
    assert record_of(model) is None


def test_blocks_of_a_stage_land_where_their_shapes_fit():
    # without its last blocks a stage still begins with the block that changes the shape
    donor, _ = pruned("resnet", 1, {"resnet.encoder.stages.2.layers": [1, 2, 3]})
    model = followed("resnet", donor)
    assert lengths(model)["resnet.encoder.stages.2.layers"] == 1
    assert model.config.depths == donor.config.depths == [2, 3, 1, 2]
    torch.testing.assert_close(outputs(model, "resnet"), outputs(donor, "resnet"), rtol=0, atol=1e-5)


# --- which blocks -----------------------------------------------------------------------------------------------------


def held(optimizer):
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]


def shared(model):
    """Tensors that lie in two blocks."""
    owners = {}
    for name, stack in find_stacks(model).items():
        for index, block in enumerate(stack.blocks):
            for tensor in block.state_dict(keep_vars=True).values():
                owners.setdefault(tensor.data_ptr(), set()).add((name, index))
    return [places for places in owners.values() if len(places) > 1]


@pytest.mark.parametrize("name", SPECIMENS)
def test_settled_weights_lie_in_the_blocks_that_the_record_keeps(name):
    donor, record = pruned(name)
    model = followed(name, donor)
    optimizer = torch.optim.AdamW(model.parameters())
    before = held(optimizer)
    undo, frozen = settle(model, Structure(), Structure(), Structure(record))
    assert undo is not None
    assert frozen == []
    assert equal(state(model), state(donor))
    assert settings(model) == settings(donor)
    assert attributes(model) == attributes(donor)
    assert record_of(model).kept == record.kept
    torch.testing.assert_close(outputs(model, name), outputs(donor, name), rtol=0, atol=1e-5)
    # the optimizer was made for the provisional model, and state is loaded into it by the order of its parameters
    assert held(optimizer) == before == [id(parameter) for parameter in model.parameters()]


@pytest.mark.parametrize("name", SPECIMENS)
def test_going_back_gives_the_first_structure_with_tensors_of_its_own(name):
    donor, record = pruned(name)
    whole = fresh(name)
    model = followed(name, donor)
    undo, _ = settle(model, Structure(), Structure(), Structure(record))
    undo.roll_back()
    assert lengths(model) == lengths(whole)
    assert settings(model) == settings(whole)
    assert attributes(model) == attributes(whole)
    assert record_of(model) is None
    assert shared(model) == shared(whole) == []
    # as a snapshot is put back, after which every block must hold what is its own
    guard(model)
    model.load_state_dict(whole.state_dict())
    assert equal(state(model), state(whole))
    torch.testing.assert_close(outputs(model, name), outputs(whole, name), rtol=0, atol=1e-5)


def test_kinds_of_attention_are_those_of_the_kept_blocks():
    donor, record = pruned("gemma3")
    model = followed("gemma3", donor)
    assert "full_attention" not in model.config.layer_types  # provisionally: the first four
    settle(model, Structure(), Structure(), Structure(record))
    expected = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert model.config.layer_types == expected
    assert [layer.self_attn.is_sliding for layer in model.model.layers] == [
        kind.startswith("sliding") for kind in expected
    ]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]


def test_the_way_back_leads_to_the_accepted_model_only():
    first = pruned("gemma3", 1, {"model.layers": [1, 4]})[0]
    accepted = PrunedConfig.from_model(first)
    current = remove_blocks(first, {"model.layers": [1, 2]})  # of 0, 2, 3, 5, 6
    assert current.kept == {"model.layers": (0, 5, 6)}
    model = followed("gemma3", first)
    undo, _ = settle(model, Structure(), Structure(accepted), Structure(current))
    assert equal(state(model), state(first))
    assert record_of(model) == current
    undo.roll_back()
    assert record_of(model).kept == {"model.layers": (0, 2, 3, 5, 6)}
    assert model.config.layer_types == [
        f"{kind}_attention" for kind in ("sliding", "sliding", "sliding", "full", "sliding")
    ]
    assert shared(model) == []


def test_a_model_that_began_pruned_follows_by_its_own_record():
    def begin(seed):
        return pruned("gemma3", seed, {"model.layers": [1]})[0]

    donor, start = begin(1), PrunedConfig.from_model(begin(0))
    current = remove_blocks(donor, {"model.layers": [0, 2]})
    assert current.kept == {"model.layers": (2, 4, 5, 6)}
    model = begin(0)
    guard(model)
    model.load_state_dict(donor.state_dict(), strict=False)
    undo, _ = settle(model, Structure(start), Structure(start), Structure(current))
    assert equal(state(model), state(donor))
    assert settings(model) == settings(donor)
    undo.roll_back()
    assert record_of(model) == start
    assert shared(model) == []


def test_what_the_user_froze_stays_frozen_in_its_place():
    donor, record = pruned("bert")  # 1 and 3 stay
    model = fresh("bert")
    model.bert.encoder.layer[3].requires_grad_(False)
    guard(model)
    model.load_state_dict(donor.state_dict(), strict=False)
    undo, _ = settle(model, Structure(), Structure(), Structure(record))
    assert [any(p.requires_grad for p in block.parameters()) for block in model.bert.encoder.layer] == [True, False]
    undo.roll_back()
    assert [all(p.requires_grad for p in block.parameters()) for block in model.bert.encoder.layer] == [
        True,
        True,
        True,
        False,
    ]


def test_what_the_run_froze_is_frozen_again_and_told():
    donor, record = pruned("bert")
    model = followed("bert", donor)
    _, frozen = settle(model, Structure(), Structure(), Structure(record, {"bert.encoder.layer": [1]}))
    reference, _ = pruned("bert")
    subject = describe(reference)
    freeze_blocks(subject, {"bert.encoder.layer": [1]})
    expected = {name for name, parameter in reference.named_parameters() if not parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == expected
    assert {id(p) for p in frozen} == {id(p) for name, p in model.named_parameters() if name in expected}
    assert any(name.startswith("bert.encoder.layer.1.") for name in expected)
    assert not any(name.startswith("bert.encoder.layer.0.") for name in expected)


def test_without_prunings_nothing_is_to_do():
    model, donor = fresh("bert"), fresh("bert", 1)
    guard(model)
    model.load_state_dict(donor.state_dict())
    undo, frozen = settle(model, Structure(), Structure(), Structure())
    assert undo is not None
    assert frozen == []
    undo.roll_back()
    assert equal(state(model), state(donor))


def test_a_model_loaded_in_the_checkpoints_structure_has_no_way_back():
    model, record = pruned("bert")
    guard(model)
    before = state(model)
    model.load_state_dict(model.state_dict())
    undo, _ = settle(model, Structure(), Structure(), Structure(record))
    assert undo is None
    assert equal(state(model), before)
    # where the pruning is accepted there is nothing to go back to
    assert settle(model, Structure(), Structure(record), Structure(record))[0] is not None


def test_a_model_pruned_otherwise_is_refused():
    _, record = pruned("bert")
    model, _ = pruned("bert", 0, {"bert.encoder.layer": [3, 1]})
    with pytest.raises(SurgeryError, match="pruned otherwise than the one in the checkpoint"):
        settle(model, Structure(), Structure(), Structure(record))


def test_a_record_with_another_number_of_blocks_than_was_loaded_is_refused():
    donor, _ = pruned("bert", 1, {"bert.encoder.layer": [2]})
    _, record = pruned("bert")
    with pytest.raises(
        SurgeryError, match=r"By its record the checkpoint has .*2.* blocks, but what was loaded has .*3"
    ):
        settle(followed("bert", donor), Structure(), Structure(), Structure(record))
    with pytest.raises(SurgeryError, match="By its record the checkpoint has all blocks"):
        settle(followed("bert", donor), Structure(), Structure(), Structure())
