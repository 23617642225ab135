"""Blocks whose parts stand in several lists side by side, as they are looked at."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers as tf
from torch import nn

from deeparc_hf import find_stacks, heal_model, remove_blocks
from deeparc_hf.architectures.joined import JoinedBlock, entrance, outlet
from deeparc_hf.errors import CalibrationError, SurgeryError, UnsupportedModelError
from deeparc_hf.observe.hooks import skipped
from tests.zoo import ZOO

STACK = "transformer.{attentions,layer_norm1,ffns,layer_norm2}"


@pytest.fixture
def model():
    return ZOO["xlm"].model()


def test_hooks_see_what_the_block_is_given_and_puts_out(model):
    block, following = find_stacks(model)[STACK].blocks[1:3]
    seen = {}

    def before(module, args, kwargs):
        seen["given"], seen["named"] = args[0].clone(), kwargs

    def after(module, args, output):
        seen["module"], seen["at the end"], seen["output"] = module, args[0].clone(), output.clone()

    def following_given(module, args):
        seen["following"] = args[0].clone()

    handles = [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after),
        following.register_forward_pre_hook(following_given),
    ]
    batch = ZOO["xlm"].batches(1)[0]
    with torch.no_grad():
        model(**batch)
    assert seen["module"] is block and torch.equal(seen["given"], seen["at the end"])
    assert "cache" in seen["named"]
    mask = batch["attention_mask"].bool()  # the model clears padding between its blocks
    assert torch.equal(seen["output"][mask], seen["following"][mask])
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_can_change_what_goes_in_and_out(model):
    block = find_stacks(model)[STACK].blocks[1]
    batch = ZOO["xlm"].batches(1)[0]
    with torch.no_grad():
        with skipped(find_stacks(model)[STACK], 1):
            expected = model(**batch).logits
        given = []
        handles = [
            block.register_forward_pre_hook(lambda module, args: given.append(args[0].clone())),
            block.register_forward_hook(lambda module, args, output: given.pop()),
        ]
        assert torch.equal(model(**batch).logits, expected)
        for handle in handles:
            handle.remove()
        zeroed = block.register_forward_pre_hook(lambda module, args: (torch.zeros_like(args[0]), *args[1:]))
        assert not torch.equal(model(**batch).logits, expected)
        zeroed.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_copies_and_pickles_of_the_model_have_no_such_hooks(model):
    block, seen, batch = find_stacks(model)[STACK].blocks[1], [], ZOO["xlm"].batches(1)[0]
    block.register_forward_pre_hook(lambda module, args: seen.append("given"))
    block.register_forward_hook(lambda module, args, output: seen.append("output"))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other(**batch)
        assert seen == []
    model(**batch)
    assert seen == ["given", "output"]


def test_skipping_leaves_the_model_as_it_was(model):
    stack = find_stacks(model)[STACK]
    with skipped(stack, 0, must_run=False) as has_run:
        assert not has_run()
    block = stack.blocks[0]
    assert not any("forward" in vars(module) for module in (entrance(block), outlet(block)))


def test_a_last_part_that_runs_without_the_first_is_told(model):
    """It must not put out what an earlier call of the block was given."""
    stack, batch = find_stacks(model)[STACK], ZOO["xlm"].batches(1)[0]
    with torch.no_grad(), skipped(stack, 1):
        model(**batch)
        with pytest.raises(CalibrationError, match="it is given no tensor"):
            outlet(stack.blocks[1])(torch.zeros(8, 10, 32))


def test_such_a_block_cannot_be_run_by_itself(model):
    block = find_stacks(model)[STACK].blocks[0]
    assert isinstance(block, JoinedBlock) and entrance(block) is model.transformer.attentions[0]
    with pytest.raises(NotImplementedError, match="run by the model"):
        block(torch.zeros(1, 2, 32))


def test_one_of_the_lists_is_no_stack_but_a_hint(model):
    with pytest.raises(SurgeryError, match=r"no stack 'transformer\.ffns'\. Did you mean 'transformer\.\{attentions,"):
        remove_blocks(model, {"transformer.ffns": [1]})


def test_healing_leaves_it_alone_and_says_why(model):
    whole = copy.deepcopy(model)
    remove_blocks(model, {STACK: [1]})
    (healing,) = heal_model(model, whole, ZOO["xlm"].batches(5), progress=False)
    assert healing.reason == "block 0: its parts stand in several lists, and it cannot be run by itself"


def test_an_ordinary_block_is_its_own_entrance():
    linear = nn.Linear(2, 2)
    assert entrance(linear) is outlet(linear) is linear


def test_a_failure_puts_all_lists_back(model):
    class Broken:
        def __init__(self):
            self.state = {}

        @property
        def param_groups(self):
            assert len(model.transformer.layer_norm2) == len(model.transformer.attentions) == 3
            raise KeyboardInterrupt

    before = dict(model.named_modules())
    with pytest.raises(KeyboardInterrupt):
        remove_blocks(model, {STACK: [1]}, optimizer=Broken())
    assert dict(model.named_modules()) == before and model.config.n_layers == 4


def test_lists_of_other_lengths_are_not_cut(model):
    """What is not as the config says is refused, before anything is changed."""
    del model.transformer.layer_norm2[3]
    before = dict(model.named_modules())
    with pytest.raises(SurgeryError, match=r"is not what its settings describe: transformer\.layer_norm2\.3"):
        remove_blocks(model, {STACK: [1]})
    assert dict(model.named_modules()) == before


def test_flaubert_with_norms_in_the_branches_is_refused():
    sizes = {"emb_dim": 32, "n_layers": 4, "n_heads": 4, "vocab_size": 50}
    assert list(find_stacks(tf.FlaubertModel(tf.FlaubertConfig(**sizes)))) == [STACK.removeprefix("transformer.")]
    with pytest.raises(UnsupportedModelError, match=r"pre_norm=True no module of it puts out.*pre_norm=False"):
        find_stacks(tf.FlaubertModel(tf.FlaubertConfig(**sizes, pre_norm=True)))
