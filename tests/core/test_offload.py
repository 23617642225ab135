"""Models whose weights accelerate keeps on the disk: what is done to them equals what is done to models in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload, disk_offload
from accelerate.utils.modeling import has_offloaded_params
from torch import nn

from deeparc_hf import analyze, find_stacks, heal_model, prune_model, remove_blocks, search_blocks, sparsify_model
from deeparc_hf.architectures import describe
from deeparc_hf.core.offload import blocks_on_disk, fetching_in_backward, holding, is_offloaded
from deeparc_hf.core.transaction import Transaction
from deeparc_hf.errors import CalibrationError, SurgeryError, UnsupportedModelError
from deeparc_hf.healing.sensitivity import output_sensitivities
from deeparc_hf.observe.forward import evaluating
from tests.reloading import middle_blocks
from tests.zoo import CAUSAL, ZOO

FIRST = ("bert", "gpt2", "llama", "resnet", "t5", "vit")
OTHERS = sorted(kind for kind in ZOO if ZOO[kind].auto and kind not in FIRST)
KINDS = [*FIRST, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def saved(kind, tmp_path):
    ZOO[kind].model().save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    return tmp_path / "saved"


def here(kind, saved):
    return getattr(tf, ZOO[kind].auto).from_pretrained(saved)


def elsewhere(kind, saved, folder: Path | None = None):
    """With all blocks on the disk."""
    model = here(kind, saved)
    places = blocks_on_disk(model, list(describe(model).stacks))
    folder = saved.parent / "other" if folder is None else folder
    folder.mkdir(exist_ok=True)
    found = getattr(tf, ZOO[kind].auto).from_pretrained(saved, device_map=places, offload_folder=str(folder))
    assert is_offloaded(found) and not is_offloaded(model)
    assert all(p.is_meta for stack in find_stacks(found).values() for block in stack.blocks for p in block.parameters())
    return found


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def saved_state(model, folder):
    """What a stock loader reads of it."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).state_dict()


def assert_same(one, other, folder):
    first, second = (saved_state(model, folder / name) for model, name in ((one, "one"), (other, "other")))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


# ---- equal results ----


def test_blocks_are_compared(kind, saved):
    batches, models = ZOO[kind].batches(count=20), [here(kind, saved), elsewhere(kind, saved)]
    total = sum(map(len, find_stacks(models[0]).values()))
    one, other = (analyze(model, batches, num_blocks=total - 1, progress=False) for model in models)
    assert one.stacks == other.stacks


def test_blocks_are_removed_and_the_rest_is_healed(kind, saved, tmp_path):
    before, batches = digests(saved), ZOO[kind].batches(count=4)
    models = [here(kind, saved), elsewhere(kind, saved)]
    total = sum(map(len, find_stacks(models[0]).values()))
    plans = [prune_model(model, batches, num_blocks=total - 1, heal="lstsq", progress=False) for model in models]
    assert plans[0].removed == plans[1].removed
    healed = [model.config.pruning_config["iterations"][0]["healing"] for model in models]
    assert healed[0] == healed[1]
    assert_same(*models, tmp_path)
    assert digests(saved) == before  # the checkpoint that it lies in is not written to


@pytest.mark.parametrize("sequential", [True, False])
def test_weights_are_zeroed(sequential, kind, saved, tmp_path):
    before, batches = digests(saved), ZOO[kind].batches(count=2)
    models = [here(kind, saved), elsewhere(kind, saved)]
    reports = [sparsify_model(model, batches, sequential=sequential, progress=False) for model in models]
    assert reports[0].to_dict() == reports[1].to_dict()
    assert reports[0].measured > 0.4
    assert_same(*models, tmp_path)
    assert digests(saved) == before


# ---- in detail, by one kind ----


@pytest.fixture
def llama(tmp_path):
    ZOO["llama"].model().save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    return tmp_path / "saved"


def test_blocks_that_are_named_are_removed(llama, tmp_path):
    models = [here("llama", llama), elsewhere("llama", llama)]
    for model in models:
        remove_blocks(model, middle_blocks(here("llama", llama)))
    assert_same(*models, tmp_path)


def test_what_is_tied_counts_once(tmp_path):
    config = tf.LlamaConfig(**{**CAUSAL, "tie_word_embeddings": True})
    saved = tmp_path / "saved"
    tf.LlamaForCausalLM(config).save_pretrained(saved)
    counts = []
    for model in (here("llama", saved), elsewhere("llama", saved), cpu_offload(here("llama", saved), "cpu")):
        record = remove_blocks(model, {"model.layers": [1]})
        counts.append(record.iterations[-1]["parameters"])
    assert counts[0] == counts[1] == counts[2]


def test_two_models_on_the_disk_are_healed(llama, tmp_path):
    batches, removed = ZOO["llama"].batches(count=4), {"model.layers": [1, 3]}
    pairs = [[make("llama", llama), make("llama", llama)] for make in (here, elsewhere)]
    for model, original in pairs:
        remove_blocks(model, removed)
        heal_model(model, original, batches, progress=False)
    assert_same(pairs[0][0], pairs[1][0], tmp_path)


def test_one_after_another(llama, tmp_path):
    """Healed weights are zeroed: what was written to the disk is read again."""
    batches, models = ZOO["llama"].batches(count=4), [here("llama", llama), elsewhere("llama", llama)]
    for model in models:
        prune_model(model, batches, num_blocks=3, heal="lstsq", progress=False)
        sparsify_model(model, batches, progress=False)
    assert_same(*models, tmp_path)


def on_the_cpu(llama, folder):
    model = here("llama", llama)
    return cpu_offload(model, execution_device="cpu")


def on_the_disk(llama, folder):
    return elsewhere("llama", llama, folder / "files")


@pytest.mark.parametrize("make", [on_the_cpu, on_the_disk])
@pytest.mark.parametrize("error", [RuntimeError("planted"), KeyboardInterrupt("planted")])
def test_an_error_leaves_the_model_as_it_was(error, make, llama, tmp_path):
    model, batches = make(llama, tmp_path), ZOO["llama"].batches(count=2)
    before = state_of(model)
    with torch.no_grad():
        logits = model(**batches[0]).logits

    def fail(module, args):
        raise error

    # passes of a later block fail when others are zeroed; the error is kept, as an interactive session keeps it
    handle = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(fail)
    with pytest.raises((CalibrationError, RuntimeError, KeyboardInterrupt), match="planted") as kept:
        sparsify_model(model, batches, progress=False)
    handle.remove()
    assert state_of(model) == before
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, logits)
    assert "pruning_config" not in model.config.to_dict()
    assert not list(tmp_path.rglob("changed-*"))
    # and is done by the next try
    other = here("llama", llama)
    for each in (model, other):
        sparsify_model(each, batches, progress=False)
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, other(**batches[0]).logits)
    assert kept.value is not None


def state_of(model):
    """Where weights are, and the hooks of modules."""
    return (
        [(name, p.is_meta, p.requires_grad) for name, p in model.named_parameters()],
        [(name, has_offloaded_params(module)) for name, module in model.named_modules()],
        [[*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules()],
    )


def test_weights_that_another_module_brings_are_refused(llama, tmp_path):
    """accelerate's preload_module_classes: a whole block's come with the block, and none of its maps has a hook."""
    model = here("llama", llama)
    model = disk_offload(model, str(tmp_path / "files"), "cpu", preload_module_classes=["LlamaDecoderLayer"])
    batches = ZOO["llama"].batches(count=4)
    for work, error in (
        (lambda: prune_model(model, batches, num_blocks=3, heal="lstsq", progress=False), CalibrationError),
        (lambda: sparsify_model(model, batches, progress=False), UnsupportedModelError),
        (lambda: remove_blocks(model, {"model.layers": [1]}), SurgeryError),
    ):
        with pytest.raises(error, match=r"in a way that is not known here.*device_map"):
            work()


def test_a_search_needs_the_weights_in_memory(llama):
    with pytest.raises(CalibrationError, match="without offloading"):
        search_blocks(elsewhere("llama", llama), ZOO["llama"].batches(count=8), num_blocks=3, progress=False)


# ---- holding weights ----


def test_what_is_held_is_there_until_the_end(llama):
    model = elsewhere("llama", llama)
    block, expected = model.model.layers[1], here("llama", llama).model.layers[1]
    with holding(block) as kept_elsewhere:
        assert kept_elsewhere
        assert all(torch.equal(p, expected.get_parameter(name)) for name, p in block.named_parameters())
        with holding(block.mlp) as again:
            assert not again
        with torch.no_grad():
            model(**ZOO["llama"].batches(count=1)[0])
        assert not any(p.is_meta for p in block.parameters())
    assert all(p.is_meta for p in block.parameters())
    with holding(here("llama", llama).model.layers[1]) as kept_elsewhere:
        assert not kept_elsewhere


def change(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight.mul_(2.0)


def test_what_changes_is_written_back_and_can_be_taken_back(llama, tmp_path):
    before = digests(llama)
    model, other, undo = elsewhere("llama", llama), here("llama", llama), Transaction()
    maps = [each.model.layers[1].mlp.down_proj for each in (model, other)]
    for factor in (2.0, 4.0):  # twice: the second time from a file of ours
        with holding(maps[0], transaction=undo):
            change(maps[0])
        with holding(maps[0]):
            assert torch.equal(maps[0].weight, factor * maps[1].weight)
    undo.roll_back()
    with holding(maps[0]):
        assert torch.equal(maps[0].weight, maps[1].weight)
    assert_same(other, model, tmp_path)
    assert digests(llama) == before


def test_an_error_within_writes_nothing(llama, tmp_path):
    model = elsewhere("llama", llama)
    owner = model.model.layers[1].mlp.down_proj
    with pytest.raises(RuntimeError, match="planted"), Transaction() as undo, holding(owner, transaction=undo):
        change(owner)
        raise RuntimeError("planted")
    assert owner.weight.is_meta
    assert_same(here("llama", llama), model, tmp_path)


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_other_ways_to_offload(offload, llama, tmp_path):
    """On the CPU the weights lie in a dict; accelerate's own files on the disk are of another kind."""
    model, other = here("llama", llama), here("llama", llama)
    if offload is disk_offload:
        offload = partial(offload, offload_dir=str(tmp_path / "files"))
    offload(model, execution_device="cpu")
    assert is_offloaded(model)
    batches = ZOO["llama"].batches(count=2)
    for each in (model, other):
        sparsify_model(each, batches, progress=False)
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, other(**batches[0]).logits)


def test_without_a_folder_nothing_can_be_written_back(llama):
    model = elsewhere("llama", llama)
    owner = model.model.layers[1].mlp.down_proj
    owner._hf_hook.weights_map.dataset.save_folder = None
    with pytest.raises(UnsupportedModelError, match="offload_folder=FOLDER"), holding(owner, transaction=Transaction()):
        change(owner)
    assert owner.weight.is_meta


# ---- the way back ----


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "resnet", "t5"], indirect=True)
def test_gradients_of_outputs_are_the_same_and_keep_no_weights(kind, saved):
    found = []
    for model in (here(kind, saved), elsewhere(kind, saved)):
        subject = describe(model)
        stack = next(iter(subject.stacks.values()))
        features = 1 if kind == "resnet" else -1
        with evaluating(model):
            inputs = next(iter(subject.host.inputs_in(batch) for batch in ZOO[kind].batches(count=1)))
            found.append(output_sensitivities(subject.host, {stack.blocks[0]: features}, inputs))
    values = [list(each.values()) for each in found]
    assert values[0] and all(torch.equal(one, other) for one, other in zip(*values, strict=True))


class Counting(Mapping):
    """Counts how often weights are read."""

    def __init__(self, kept):
        self.kept, self.read = kept, 0

    def __getitem__(self, name):
        self.read += 1
        return self.kept[name]

    def __iter__(self):
        return iter(self.kept)

    def __len__(self):
        return len(self.kept)


def test_a_recorded_pass_keeps_no_weights(llama):
    """The way back reads them again, of a module that is held not."""
    model, batch = elsewhere("llama", llama), ZOO["llama"].batches(count=1)[0]
    maps = [model.model.layers[index].mlp.down_proj for index in (1, 2)]
    counts = [Counting(each._hf_hook.weights_map) for each in maps]
    for each, count in zip(maps, counts, strict=True):
        each._hf_hook.weights_map = count
    table = model.model.embed_tokens.weight.requires_grad_()
    hooks = [[*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules()]
    with fetching_in_backward(model), holding(maps[1]):
        loss = model(**batch).logits.square().mean()
        assert [count.read for count in counts] == [1, 1]
        gradient = torch.autograd.grad(loss, table)[0]
        assert [count.read for count in counts] == [2, 1]
    other = here("llama", llama)
    expected = torch.autograd.grad(other(**batch).logits.square().mean(), other.model.embed_tokens.weight)[0]
    assert torch.equal(gradient, expected)
    assert hooks == [[*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules()]
