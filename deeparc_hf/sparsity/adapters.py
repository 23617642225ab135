"""Adapters (PEFT) on a sparse model: merging them without losing the zeros."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..architectures.adapters import is_adapted
from ..architectures.hosts import RECORD_KEY, find_host
from ..checkpoint.record import PrunedConfig
from ..errors import SparsityError, UnsupportedModelError
from .masks import zero_chosen

__all__ = ["merge_keeping_zeros"]


def merge_keeping_zeros(model: nn.Module) -> nn.Module:
    """Merge the adapters of a PEFT model into its sparse base model, and unload them, as `merge_and_unload` does.

    A merge adds a dense matrix (B times A, for LoRA) to every adapted weight, zeros included. Here the weights that are
    zero in the base stay zero: the merged model computes W + BA where W is not zero, so evaluate it again.

    Args:
        model: a PEFT model whose adapters are not merged yet, on a base whose record lists zeros.

    Returns:
        The base model, merged, with its record. The PEFT model is used up.

    Raises:
        UnsupportedModelError: if the model is not a PEFT model that can merge.
        SparsityError: if the base's record lists no zeros, or they are not there any more (adapters were merged
            before).
    """
    if not is_adapted(model) or not hasattr(model, "merge_and_unload"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a PEFT model with adapters that can be merged. Give what get_peft_model "
            "returned."
        )
    adapted: Any = model  # of PEFT, which this package does not import
    base = adapted.get_base_model()
    weights: dict[str, Any] = {
        path.removesuffix(".base_layer"): module for path, module in base.named_modules() if hasattr(module, "weight")
    }
    stored = getattr(getattr(base, "config", base), RECORD_KEY, None)
    sparsity = None if stored is None else PrunedConfig.from_dict(stored).sparsity
    entries = {}
    prefix = f"{getattr(base, 'base_model_prefix', '')}."
    for name, entry in (sparsity or {}).get("matrices", {}).items():
        paths = (name, f"{prefix}{name}", name.removeprefix(prefix))  # the record may be of a model with another head
        entries[next((path for path in paths if path in weights), name)] = entry
    if not entries:
        raise SparsityError(
            f"The record of {type(base).__name__} lists no zeros, so there are none to keep. Call merge_and_unload(); "
            "or sparsify the base model first, with sparsify_model."
        )
    masks = {}
    for name, entry in entries.items():
        if name not in weights:
            raise SparsityError(
                f"The record lists zeros in {name!r}, which {type(base).__name__} lacks. Load the base model again."
            )
        if type(weights[name]).__name__ == "ModulesToSaveWrapper":
            raise SparsityError(
                f"{name} was trained as a whole (modules_to_save), so its zeros are lost. Leave it out there, and "
                "adapt it instead."
            )
        masks[name] = weights[name].weight.detach() == 0
        if int(masks[name].sum()) < entry["zeros"]:
            raise SparsityError(
                f"By the record {entry['zeros']:,} weights of {name} are zero, but {int(masks[name].sum()):,} are. If "
                "the adapters are merged already, call model.unmerge_adapter() first."
            )
    merged: nn.Module = adapted.merge_and_unload()
    root = find_host(merged).root
    for name, mask in masks.items():
        zero_chosen(root.get_submodule(name).get_parameter("weight"), mask)
    return merged
