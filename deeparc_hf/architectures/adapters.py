"""Adapters of PEFT in a model: they are seen through, so that the model beneath is described as if it had none.

PEFT is not imported: its modules are known by the names of their classes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.compat import copy_with_children
from ..core.offload import is_offloaded
from ..errors import UnsupportedModelError

__all__ = [
    "adapters_of",
    "beneath",
    "is_adapted",
    "is_merged",
    "places_of",
    "refuse_adapters",
    "without_adapters",
]

# where a module of PEFT holds the one that it stands for, by the class that it derives from
_HOLDERS = {"BaseTunerLayer": "base_layer", "AuxiliaryTrainingWrapper": "original_module"}
_FOLLOWING = ("LORA",)
# settings of LoRA by which blocks are used more than once, share something, or are called otherwise
_ACROSS = ("layer_replication", "target_parameters", "megatron_config", "arrow_config", "ensure_weight_tying")
# what tells a model's own library, and PEFT, that it has adapters
_SIGNS = ("peft_config", "_hf_peft_config_loaded")
_WAYS = (
    "Call model.merge_and_unload() where the adapters can be merged, and prune the merged model (its weights are still "
    "frozen: .requires_grad_(True) to train them), or prune first and add the adapters afterwards."
)


def is_adapted(model: nn.Module) -> bool:
    """Whether a model carries PEFT adapters."""
    return type(model).__module__.startswith("peft.") or any(
        type(m).__module__.startswith("peft.tuners.") for m in model.modules()
    )


def adapters_of(root: nn.Module) -> dict[str, Any]:
    """The configs of a model's adapters by their names; {} if it has none."""
    found = getattr(root, _SIGNS[0], None)
    return found if isinstance(found, dict) else {}


def beneath(module: nn.Module) -> nn.Module | None:
    """The module that one of PEFT's stands for; None where it stands for none."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("peft.") and kind.__name__ in _HOLDERS:
            return getattr(module, _HOLDERS[kind.__name__], None)
    return None


def is_merged(root: nn.Module) -> bool:
    """Whether adapters are added to the weights beneath them just now."""
    return any(bool(getattr(m, "merged_adapters", None)) for m in root.modules() if beneath(m) is not None)


def without_adapters(root: nn.Module) -> nn.Module:
    """The model beneath its adapters, to be read and saved: it shares all tensors with the model, and no module that
    holds others. A model without adapters is given back.
    """
    if not is_adapted(root):
        return root
    known: dict[int, nn.Module] = {}

    def bare(module: nn.Module) -> nn.Module:
        inner = beneath(module)
        if inner is not None:
            return bare(inner)
        if id(module) not in known:
            known[id(module)] = copy_with_children(module, bare, without=_SIGNS if module is root else ())
        return known[id(module)]

    return bare(root)


def places_of(root: nn.Module, path: str) -> list[nn.Module]:
    """The modules of an adapted model that stand for what is at a path of the model without adapters: the module
    itself, and the copies of it that are trained in its place (`modules_to_save`).

    Raises:
        AttributeError: if there is none.
    """
    here = [root]
    for name in path.split(".") if path else ():
        here = [version for module in here for version in _versions(module.get_submodule(name))]
    return here


def _versions(module: nn.Module) -> list[nn.Module]:
    inner = beneath(module)
    if inner is None:
        return [module]
    copies = getattr(module, "modules_to_save", None)
    trained = copies.values() if isinstance(copies, nn.ModuleDict) else ()
    return [*_versions(inner), *trained]


def refuse_adapters(model: nn.Module, root: nn.Module) -> None:
    """Refuse adapters that would not follow a removal of blocks.

    Args:
        model: what was given, which may be PEFT's wrapper.
        root: the library's model in it.

    Raises:
        UnsupportedModelError: naming what the adapters are.
    """
    if not is_adapted(model):
        return
    if is_offloaded(root):
        raise UnsupportedModelError(
            f"{type(model).__name__} carries PEFT adapters on weights that accelerate keeps elsewhere (device_map), "
            "and these cannot follow a removal of blocks together. Load the model without offloading, or prune first "
            "and add the adapters afterwards."
        )
    configs = adapters_of(root) or adapters_of(model)
    if not configs:
        raise UnsupportedModelError(
            f"{type(model).__name__} carries PEFT adapters without a config, which cannot follow a removal. {_WAYS}"
        )
    for name, config in configs.items():
        kind = getattr(config, "peft_type", "")
        kind = str(getattr(kind, "value", kind))
        if kind not in _FOLLOWING:
            raise UnsupportedModelError(
                f"{type(model).__name__} carries PEFT adapters of the kind {kind} ({name!r}), which cannot follow a "
                f"removal of blocks; those of the kind {', '.join(_FOLLOWING)} can. {_WAYS}"
            )
        across = next((key for key in _ACROSS if getattr(config, key, None)), None)
        if across is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} carries PEFT adapters with {across} ({name!r}), which are more than one "
                f"adapter for each of its layers and cannot follow a removal of blocks. {_WAYS}"
            )
