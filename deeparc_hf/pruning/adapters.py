"""Adapters of PEFT after a removal: those of the blocks that stay keep their blocks, and their configs are made to say
so. A config is right if PEFT, told by it, puts adapters of the same shapes into the same places of the pruned model.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..architectures import Layout
from ..architectures.adapters import adapters_of, beneath
from ..core.shards import shape_of
from ..core.transaction import Transaction
from ..errors import SurgeryError

__all__ = ["follow_in_configs"]

_Places = dict[str, tuple[Any, ...]]


def follow_in_configs(root: nn.Module, step: Layout, after: nn.Module, transaction: Transaction) -> None:
    """Have the configs of a model's adapters tell where they are, once the blocks are removed.

    Args:
        step: the removal.
        after: what a stock loader builds of the pruned model, without adapters.

    Raises:
        SurgeryError: if no adapter of that name is left, or no config tells where they are.
    """
    configs = adapters_of(root)
    for name, config in configs.items():
        wanted = _places(root, name)
        if not wanted:
            raise SurgeryError(
                f"All layers that the adapter {name!r} is in would go. Remove other blocks, or the adapter first: "
                f"model.delete_adapter({name!r}). Nothing was changed."
            )
        problem = ""
        for follower in _candidates(config, step, root, name):
            found = _tried(follower, name, after)
            if found == wanted:
                break
            problem = problem or _difference(wanted, found)
        else:
            raise SurgeryError(
                f"No config of PEFT tells where the adapter {name!r} of the pruned {type(root).__name__} is: {problem}"
                ". Merge it (model.merge_and_unload()) and prune the merged model, or prune first and add the adapter "
                "afterwards. The model is as it was before."
            )
        if follower is not config:
            transaction.on_failure(lambda key=name, old=config: configs.__setitem__(key, old))  # type: ignore[misc]
            configs[name] = follower


def _candidates(config: Any, step: Layout, root: nn.Module, name: str) -> Iterator[Any]:
    """Configs that may be right, the plainest first."""
    layers = config.layers_to_transform
    for stack in step.removed if layers is not None else ():
        numbers = [layers] if isinstance(layers, int) else list(layers)
        yield _changed(config, layers_to_transform=list(step.places({stack: numbers})[stack]))
    yield config
    yield _by_name(config, root, name)


def _by_name(config: Any, root: nn.Module, name: str) -> Any:
    """A config that names each module by its whole path."""
    targets, ranks, alphas, whole = [], {}, {}, []
    for path, module in _holders(root, name):
        if hasattr(module, "lora_alpha"):
            targets.append(path)
            if module.r[name] != config.r:
                ranks[re.escape(path)] = module.r[name]
            if module.lora_alpha[name] != config.lora_alpha:
                alphas[re.escape(path)] = module.lora_alpha[name]
        elif hasattr(module, "modules_to_save"):
            whole.append(path)
    kept = config.modules_to_save
    return _changed(
        config,
        target_modules=set(targets),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        modules_to_save=kept and sorted(whole),
    )


def _changed(config: Any, **entries: Any) -> Any:
    changed = copy.deepcopy(config)
    for key, value in entries.items():
        setattr(changed, key, value)
    return changed


def _tried(config: Any, name: str, skeleton: nn.Module) -> _Places:
    """Where PEFT puts adapters of a config; {} if it refuses to."""
    import peft

    model = copy.deepcopy(skeleton)
    # no weights are made, so none can be set to begin with
    config = _changed(config, init_lora_weights=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)
    except Exception:  # a config may name what is gone
        return {}
    return _places(model, name)


def _places(root: nn.Module, name: str) -> _Places:
    """The modules that have tensors of an adapter: by path, their shapes and what the adapter is multiplied by."""
    places = {}
    for path, module in _holders(root, name):
        # a wrapper hands out what its module calls so
        scaling = vars(module).get("scaling", {}).get(name)
        places[path] = (sorted(_tensors(module, name).items()), scaling)
    return places


def _holders(root: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of PEFT that have tensors of an adapter, by their paths in the model beneath."""
    for path, module in root.named_modules():
        if beneath(module) is not None and _tensors(module, name):
            yield path, module


def _tensors(module: nn.Module, name: str) -> Mapping[str, tuple[int, ...]]:
    return {
        key: shape_of(tensor)
        for key, tensor in module.state_dict(keep_vars=True).items()
        if name in key.split(".") and not key.startswith(("base_layer.", "original_module."))
    }


def _difference(wanted: _Places, found: _Places) -> str:
    odd = min(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
    if odd not in found:
        return f"by its config there would be none at {odd}"
    return f"by its config there would be one at {odd}" if odd not in wanted else f"it would be another at {odd}"
