"""What a pruned model puts out, here and after a load with stock transformers or timm.

Outputs are compared bit for bit: both sides run the same kernels on the same weights, with the same number of threads
and with tensors equally aligned in memory (see stock.py), so that no rounding is left to excuse a difference.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
import transformers
from torch import Tensor, nn

from deeparc_hf import find_stacks

from .stock import StockProcess, aligned, forwarded, generated
from .zoo import Specimen


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
