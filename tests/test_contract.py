"""What holds for every model of the zoo: blocks are removed, put back and healed, weights are zeroed, the result is
saved and loaded, and a training is resumed. A new family needs an entry in the zoo, and is tested by all of this.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from deeparc_hf import (
    PrunedConfig,
    analyze,
    apply_plan,
    find_stacks,
    heal_model,
    load_pruned,
    remove_blocks,
    save_pruned,
    sparsify_model,
)
from deeparc_hf.core.transaction import Transaction
from deeparc_hf.errors import RecordError

from .healing.test_healing import outputs, removable
from .reloading import assert_stock_loads, inputs_of, load_here, middle_blocks, outputs_of
from .sparsity.test_sparsify import check
from .stock import StockProcess, forwarded
from .trainer.test_resume import equal
from .trainers import pruning, train
from .zoo import ZOO, Specimen

WITH_AUTO = {name: specimen for name, specimen in ZOO.items() if specimen.auto is not None}
# two stacks and a tied head; layers that attend differently; BatchNorm and stages; sound
QUICKLY_RESUMED = {"bert", "gemma3", "resnet", "t5", "whisper"}
every_model = pytest.mark.parametrize("specimen", ZOO.values(), ids=ZOO)


@pytest.fixture(scope="module")
def stock() -> Iterator[StockProcess]:
    with StockProcess() as process:
        yield process


def total(model: nn.Module) -> int:
    return sum(map(len, find_stacks(model).values()))


def kept_blocks(model: nn.Module, gone: dict[str, list[int]]) -> dict[str, list[list[nn.Module]]]:
    """The blocks that stay, or their parts, in each of the lists that hold them."""
    return {
        name: [[m for index, m in enumerate(held) if index not in gone.get(name, ())] for held in stack.containers]
        for name, stack in find_stacks(model).items()
    }


def pass_through(module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
    """Put out what came in: the hook of a block that is to be skipped."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def assert_equal_states(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@every_model
def test_remove(specimen):
    """What is left are the blocks themselves, in their order, and the model computes what it did with the others
    skipped.
    """
    model = specimen.model()
    whole, gone = outputs_of(model, specimen)["output"], middle_blocks(model)
    assert gone
    stays = kept_blocks(model, gone)
    skipping = copy.deepcopy(model)
    for name, stack in find_stacks(skipping).items():
        for index in gone.get(name, ()):
            stack.blocks[index].register_forward_hook(pass_through, with_kwargs=True)
    with torch.no_grad():
        expected = forwarded(skipping, inputs_of(specimen))
    record = remove_blocks(model, gone)
    assert kept_blocks(model, {}) == stays
    assert record.removed == {name: tuple(gone.get(name, ())) for name in stays}
    assert record == PrunedConfig.from_model(model)
    found = outputs_of(model, specimen)["output"]
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, whole, atol=1e-3)  # the blocks did something


@every_model
def test_undo(specimen):
    """A pruning that is taken back leaves the model as it was: the same modules, parameters and settings."""
    model = specimen.model()
    plan = analyze(model, specimen.batches(1, 40), num_blocks=total(model) - 1, progress=False)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    values = copy.deepcopy(model.state_dict())
    settings = copy.deepcopy(settings_of(model))
    with Transaction() as changes:
        apply_plan(model, plan, transaction=changes)
        assert total(model) == plan.num_kept == plan.num_blocks - 1
    changes.roll_back()
    assert dict(model.named_modules()) == modules
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert_equal_states(model.state_dict(), values)
    assert settings_of(model) == settings
    with pytest.raises(RecordError, match="carries no pruning record"):
        PrunedConfig.from_model(model)


@every_model
def test_heal(specimen):
    """Where a site can be healed, the block before it comes nearer to what the removed one put out, on other data;
    else nothing is changed, and the reason is told.
    """
    model = specimen.model()
    stack, index = removable(model)
    batches, others = specimen.batches(12, seed=1), specimen.batches(6, seed=9)
    plain, healed = copy.deepcopy(model), copy.deepcopy(model)
    for pruned in (plain, healed):
        remove_blocks(pruned, {stack: [index]})
    (healing,) = heal_model(healed, model, batches)
    assert {k: v.shape for k, v in healed.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    target = outputs(model, find_stacks(model)[stack].blocks[index], others)
    errors = [
        (outputs(pruned, find_stacks(pruned)[stack].blocks[index - 1], others) - target).square().sum()
        for pruned in (plain, healed)
    ]
    if healing.reason is None:
        assert errors[1] < errors[0] and healing.held_out < 1
        assert not equal(plain.state_dict(), healed.state_dict())
    else:
        assert equal(plain.state_dict(), healed.state_dict()) and errors[0] == errors[1]
    assert PrunedConfig.from_model(healed).iterations[-1]["healing"] == [healing.to_dict()]


@every_model
def test_sparsify(specimen):
    """The zeros are those of the paper, by a reference that shares no code with the package."""
    check(specimen.model(), specimen.batches(2, 3))


@every_model
def test_save(specimen, stock, tmp_path):
    """A stock library loads the checkpoint, and generation's cache has the right indices."""
    model = specimen.model()
    gone = middle_blocks(model)
    remove_blocks(model, gone)
    expected = outputs_of(model, specimen)
    save_pruned(model, tmp_path)
    assert_stock_loads(stock, tmp_path, specimen, expected)
    stored = json.loads((tmp_path / "config.json").read_text("utf-8"))["pruning_config"]
    assert PrunedConfig.from_dict(stored).removed == {n: tuple(gone.get(n, ())) for n in find_stacks(model)}
    if specimen.generates:
        assert torch.equal(expected["cached"], expected["uncached"])


@every_model
def test_reload(specimen, stock, tmp_path):
    """A model that was loaded from a checkpoint is pruned again; the record goes on counting as the first model did."""
    model = specimen.model()
    lengths = {n: len(stack) for n, stack in find_stacks(model).items()}
    first = middle_blocks(model)
    remove_blocks(model, first)
    sparsify_model(model, specimen.batches(1, 4), progress=False)
    save_pruned(model, tmp_path / "once")
    model = load_here(specimen, tmp_path / "once")
    last = {n: [len(s) - 1] for n, s in find_stacks(model).items() if len(s) > 1 and len(s) - 1 not in s.pinned}
    assert last
    record = remove_blocks(model, last)
    save_pruned(model, tmp_path / "twice")
    for stack, length in lengths.items():
        once = [i for i in range(length) if i not in first.get(stack, ())]
        assert record.kept[stack] == tuple(once[:-1] if stack in last else once)
    assert [entry["removed"] for entry in record.iterations if "removed" in entry] == [
        first,
        {n: [max(i for i in range(lengths[n]) if i not in first.get(n, ()))] for n in last},
    ]
    matrices = record.sparsity["matrices"]
    assert matrices
    assert all(entry["zeros"] == (model.get_submodule(m).weight == 0).sum() for m, entry in matrices.items())
    assert PrunedConfig.from_pretrained(tmp_path / "twice") == record
    assert_stock_loads(stock, tmp_path / "twice", specimen, outputs_of(model, specimen))


@pytest.mark.parametrize("specimen", WITH_AUTO.values(), ids=WITH_AUTO)
def test_load_pruned(specimen, tmp_path):
    """The base checkpoint with the blocks that the record keeps is the model that was pruned, to the bit."""
    auto = getattr(transformers, specimen.auto)
    specimen.model().save_pretrained(tmp_path / "base")
    model = auto.from_pretrained(tmp_path / "base")
    record = remove_blocks(model, middle_blocks(model))
    loaded = load_pruned(auto, tmp_path / "base", record)
    assert_equal_states(loaded.state_dict(), model.state_dict())
    assert PrunedConfig.from_model(loaded) == record


@pytest.mark.filterwarnings("ignore::deeparc_hf.errors.CalibrationWarning")  # 16 samples are few
@pytest.mark.parametrize(
    "specimen",
    [pytest.param(s, id=n, marks=[] if n in QUICKLY_RESUMED else pytest.mark.slow) for n, s in WITH_AUTO.items()],
)
def test_resume(specimen, tmp_path):
    """A training with a pruning that is accepted and one that is taken back, resumed in the middle of the second
    retraining, ends as the whole one: to the bit.
    """
    whole, blocks = train_with_two_prunings(specimen, tmp_path / "whole")
    assert total(whole) == blocks - 1
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", again)
    resumed, _ = train_with_two_prunings(specimen, again, resume=str(again / "checkpoint-3"))
    assert_equal_states(resumed.state_dict(), whole.state_dict())
    assert PrunedConfig.from_model(resumed).stacks == PrunedConfig.from_model(whole).stacks


def train_with_two_prunings(specimen: Specimen, folder: Path, resume: str | None = None) -> tuple[nn.Module, int]:
    """Two steps of training after each pruning; the second is taken back.

    Returns:
        The model, and the number of its blocks at the beginning.
    """
    model = specimen.model()
    blocks = total(model)
    accuracy = {blocks: 0.9, blocks - 1: 0.9, blocks - 2: 0.1}
    callback = pruning(
        num_blocks=[blocks - 1, blocks - 2],
        baseline=0.9,
        metric="accuracy",
        max_drop=0.05,
        k_max=1,
        freeze="partial",
        keep_snapshots=True,
    )
    train(
        model,
        folder,
        callback,
        data=training_rows(specimen),
        resume=resume,
        compute_metrics=lambda _: {"accuracy": accuracy[total(model)]},
        eval_strategy="epoch",
        save_strategy="steps",
        save_steps=3,
        learning_rate=1e-3,
    )
    return model, blocks


def training_rows(specimen: Specimen) -> list[dict[str, Tensor]]:
    """16 samples with labels: two steps of an epoch."""
    (batch,) = specimen.batches(1, 16)
    if specimen.kind == "causal":
        batch["labels"] = batch["input_ids"]
    elif specimen.kind == "audio":
        batch["labels"] = batch["decoder_input_ids"]
    elif specimen.kind in ("text", "image"):
        batch["labels"] = torch.arange(16) % 2
    return [{key: value[row] for key, value in batch.items()} for row in range(16)]


def settings_of(model: nn.Module) -> object:
    """The settings from which a library builds the model."""
    return model.config.to_dict() if hasattr(model, "config") else vars(model).get("pretrained_cfg")
