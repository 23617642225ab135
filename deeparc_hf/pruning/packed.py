"""The quantization config of a quantized model after a removal: what names blocks follows, and a loader that goes by it
must pack the same maps of the pruned model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.quantizers import AutoHfQuantizer

from ..architectures import Layout
from ..architectures.packed import is_quantized, quantization_of
from ..core.block_paths import is_inside
from ..core.transaction import Transaction
from ..errors import SurgeryError

__all__ = ["follow_in_quantization"]

_SKIPPED = ("modules_to_not_convert", "llm_int8_skip_modules")  # lists of modules that are not packed
_BY_NAME = ("fqn_to_config", "module_fqn_to_config")  # how modules are packed, by their names
_NUMBER = re.compile(r"(^|[^\w])\d")  # of a block, and not of a module such as fc1


def follow_in_quantization(
    root: nn.Module, step: Layout, before: nn.Module, after: nn.Module, transaction: Transaction
) -> None:
    """Have the quantization config of a model name its blocks as they are numbered once some are removed. The model's
    config is its own already.

    Args:
        step: the removal.
        before, after: what a stock loader builds of the model with and without these blocks, not quantized.

    Raises:
        SurgeryError: if a loader would pack other maps of the pruned model.
    """
    if not is_quantized(root):
        return
    quantization, quantizer = quantization_of(root), root.hf_quantizer
    wanted = {step.renamed(name) for name in _packed(quantization, before)} - {None}
    unclear = _follow(quantization, step)
    if unclear or _packed(quantization, after) != wanted:
        raise SurgeryError(
            f"The quantization config of {type(root).__name__} names modules by patterns"
            f"{f' ({unclear[0]})' if unclear else ''}, by which others would be packed, or otherwise, once blocks are "
            "numbered anew. Name each by its whole path, or prune the model before it is quantized. The model is as it "
            "was before."
        )
    transaction.set(quantizer, "quantization_config", quantization)


def _follow(quantization: Any, step: Layout) -> list[str]:
    """Rename the modules that a config names, in place; patterns with numbers that tell how modules are packed, which
    cannot be.
    """
    for key in _SKIPPED:
        names = getattr(quantization, key, None)
        if names:
            setattr(quantization, key, _renamed(names, step))
    kind, unclear = getattr(quantization, "quant_type", None), []
    for key in _BY_NAME:
        by_name = getattr(kind, key, None)
        if isinstance(by_name, dict):
            numbered = [name for name in by_name if _NUMBER.search(name)]
            unclear += [name for name in numbered if not any(is_inside(stack, name) for stack in step.kept)]
            entries = list(step.renamed_keys(by_name).items())
            by_name.clear()  # it stays the same object, to which the config may refer by another name too
            by_name.update(entries)
            break
    return unclear


def _renamed(names: Iterable[str], step: Layout) -> list[str]:
    return [new for name in names if (new := step.renamed(name)) is not None]


def _packed(quantization: Any, skeleton: nn.Module) -> set[str]:
    """The parameters that a loader packs, going by a quantization config."""
    quantizer = AutoHfQuantizer.from_config(copy.deepcopy(quantization), pre_quantized=True)
    model: Any = copy.deepcopy(skeleton)
    quantizer.preprocess_model(model=model, device_map=None)
    return {name for name, _ in model.named_parameters() if quantizer.param_needs_quantization(model, name)}
