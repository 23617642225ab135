"""Quantized models: linear maps whose weights are packed. They are described as if they were not, and go whole, with
their blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..core.compat import copy_with_children
from ..core.offload import is_offloaded
from ..errors import UnsupportedModelError

__all__ = ["is_quantized", "quantization_method", "quantization_of", "refuse_quantized", "without_packing"]

# by whose quantization a removal was tried: packed, saved, and loaded again with equal outputs
_TRIED = ("bitsandbytes", "torchao")


def quantization_of(root: nn.Module) -> Any:
    """The quantization config that a model carries; None if it carries none."""
    config = getattr(root, "config", None)
    return getattr(config, "quantization_config", None) if isinstance(config, PreTrainedConfig) else None


def is_quantized(root: nn.Module) -> bool:
    """Whether a model is quantized, or says so."""
    loaded = getattr(root, "hf_quantizer", None) is not None or bool(getattr(root, "is_quantized", False))
    return loaded or quantization_of(root) is not None


def quantization_method(root: nn.Module) -> str:
    """The library or format by which a model is quantized, as its config names it; empty where it does not."""
    quantization = quantization_of(root)
    settings = quantization if isinstance(quantization, dict) else {}
    method = settings.get("quant_method") or getattr(quantization, "quant_method", "")
    return str(getattr(method, "value", method))  # of an enum member, whose str() is not the name that users know


def refuse_quantized(root: nn.Module) -> None:
    """Refuse a quantized model of a kind whose pruning was not tried, or that no loader of transformers has made.

    Raises:
        UnsupportedModelError: with the way out.
    """
    if not is_quantized(root):
        return
    if is_offloaded(root):
        raise UnsupportedModelError(
            f"{type(root).__name__} is quantized, and accelerate keeps weights of it elsewhere (device_map): such "
            "blocks cannot be removed. Load it without offloading, or prune the model before it is quantized."
        )
    method = quantization_method(root)
    if method in _TRIED and getattr(root, "hf_quantizer", None) is not None:
        return
    raise UnsupportedModelError(
        f"{type(root).__name__} is quantized{f' ({method})' if method else ''}. Load it without quantization_config "
        "(in bfloat16, say), prune it, save it, and quantize the pruned checkpoint. Of quantized models those are "
        f"pruned as they are that from_pretrained has loaded with {' or '.join(_TRIED)}."
    )


def without_packing(root: nn.Module) -> nn.Module:
    """The model as its config describes it without quantization, to be looked at: maps whose weights are packed in
    other shapes stand there on the meta device. A model that is not quantized is given back.
    """
    if not is_quantized(root):
        return root
    known: dict[int, nn.Module] = {}

    def plain(module: nn.Module) -> nn.Module:
        if id(module) not in known:
            known[id(module)] = _unpacked(module) or copy_with_children(module, plain)
        return known[id(module)]

    return plain(root)


def _unpacked(module: nn.Module) -> nn.Module | None:
    """A linear map as it was before it was packed, without weights; None for what is no map of bitsandbytes.

    What torchao packs keeps its shape and its class.
    """
    if not isinstance(module, nn.Linear) or not type(module).__module__.startswith("bitsandbytes."):
        return None
    with torch.device("meta"):
        return nn.Linear(module.in_features, module.out_features, module.bias is not None)
