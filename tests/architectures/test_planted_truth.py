"""Planted truth: blocks made exact identities at known places are found, removed, and nobody notices.

A block is planted by zeroing what it adds to its input: all its linear maps and convolutions (its residual branch then
adds nothing; in post-norm models it then normalises twice, which is once), or the last norm of a CNN's block.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deeparc_hf import Stack, analyze, find_stacks, prune_model, remove_blocks
from deeparc_hf.similarity import metrics
from tests.zoo import ZOO, Specimen

# identities score 1 up to rounding; no other block of these models comes near (see zoo.spread)
THRESHOLD = 0.9995
# where more than half of the blocks are planted, a warning says how many go: as it should
pytestmark = pytest.mark.filterwarnings("ignore:The threshold .* takes")
MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)


def places(stack: Stack) -> list[int]:
    """Where to plant: the middle block and the last, none of them pinned or the first."""
    length = len(stack)
    return sorted({i for i in ((length - 1) // 2, length - 1) if i > 0 and i not in stack.pinned})


def plant(block: nn.Module, last_norm: str | None) -> None:
    chosen = [
        module
        for name, module in block.named_modules()
        if (name.endswith(last_norm) if last_norm is not None else isinstance(module, MAPS))
    ]
    assert chosen, f"nothing to zero in {block}"
    with torch.no_grad():
        for module in chosen:
            for parameter in module.parameters(recurse=False):
                parameter.zero_()


def planted(specimen: Specimen) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    model = specimen.model()
    truth = {}
    for name, stack in find_stacks(model).items():
        indices = places(stack)
        for index in indices:
            plant(stack.blocks[index], specimen.last_norm)
        if indices:
            truth[name] = tuple(indices)
    assert truth
    return model, truth


def logits(model: nn.Module, specimen: Specimen) -> Tensor:
    """Logits on data that the calibration has not seen."""
    (batch,) = specimen.batches(1, seed=77)
    with torch.no_grad():
        output = model(**batch) if specimen.auto is not None else model(batch["pixel_values"])
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("name", ZOO)
def test_planted_identities_are_found_and_removed_without_a_trace(name):
    specimen = ZOO[name]
    model, truth = planted(specimen)
    before = logits(model, specimen)
    plan = prune_model(model, specimen.batches(), threshold=THRESHOLD, progress=False)
    assert plan.removed == truth
    assert (
        plan.num_kept == sum(map(len, find_stacks(model).values())) == plan.num_blocks - sum(map(len, truth.values()))
    )
    after = logits(model, specimen)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", ZOO)
def test_every_metric_finds_exactly_the_planted_identities(name):
    specimen = ZOO[name]
    model, truth = planted(specimen)
    for metric in metrics.names():
        plan = analyze(model, specimen.batches(), threshold=THRESHOLD, similarity=metric, progress=False)
        assert plan.removed == truth, metric


@pytest.mark.parametrize("name", ZOO)
def test_without_a_planted_identity_nothing_is_found_and_each_removal_shows(name):
    specimen = ZOO[name]
    whole = specimen.model()
    assert analyze(whole, specimen.batches(), threshold=THRESHOLD, progress=False).removed == {}
    before = logits(whole, specimen)
    for stack_name, stack in find_stacks(whole).items():
        for index in places(stack):
            model = specimen.model()
            remove_blocks(model, {stack_name: [index]})
            assert (logits(model, specimen) - before).abs().max() > 1e-3 * before.abs().max(), f"{stack_name}.{index}"


def test_a_target_takes_the_planted_identities_first():
    specimen = ZOO["bert"]
    model, truth = planted(specimen)
    plan = analyze(model, specimen.batches(), num_blocks=2, progress=False)
    assert plan.removed == truth
