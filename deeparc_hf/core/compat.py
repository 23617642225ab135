"""The only place that touches undocumented parts of other libraries; each entry says why, and when it can go."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

from accelerate.hooks import AlignDevicesHook
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # of any number of dimensions
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto import modeling_auto

__all__ = [
    "BatchNorm",
    "accelerate_has_state",
    "align_hook",
    "attention_of",
    "auto_classes",
    "buffers_of",
    "builder_of",
    "calling_trainer",
    "card_of_encoder",
    "checkpoint_key_namer",
    "convolution_of",
    "copy_with_children",
    "forward_pre_hooks",
    "load_pre_hooks",
    "may_be_missing",
    "parameters_of",
    "running_method",
    "set_attention",
    "unsaved_buffers",
    "users_in_deepspeed",
    "version_of",
]


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters, to read and to replace.

    Why: a parametrized weight is no parameter though the attribute is there, and setting an attribute runs hooks and
    checks of the module. To be removed when torch has a way to replace one.
    """
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers, to read and to replace. Why: as for `parameters_of`."""
    return module._buffers


def copy_with_children(
    module: nn.Module, of: Callable[[nn.Module], nn.Module], without: Iterable[str] = ()
) -> nn.Module:
    """A copy of a module that shares its tensors and has other children: `of` each of its own.

    Why: no public copy shares tensors, and what is registered as a child can only be set on a module that runs no
    checks (a parametrized one refuses to be copied). To be removed when PEFT can show the model beneath its adapters.

    Args:
        without: attributes of the module that the copy does not have.
    """
    twin: nn.Module = object.__new__(type(module))
    vars(twin).update((name, value) for name, value in vars(module).items() if name not in without)
    vars(twin)["_modules"] = {name: child if child is None else of(child) for name, child in module._modules.items()}
    return twin


def auto_classes() -> list[tuple[type[Any], Any]]:
    """transformers' Auto classes, each with its classes of models by config. Why: no public name tells which mapping an
    Auto class has.
    """
    found = [value for value in vars(modeling_auto).values() if isinstance(value, type)]
    pairs = [(cls, getattr(cls, "_model_mapping", None)) for cls in found if hasattr(cls, "register")]
    # AutoBackbone loads nothing from a folder
    return [(cls, mapping) for cls, mapping in pairs if mapping is not None and cls.__name__ != "AutoBackbone"]


def may_be_missing(model: PreTrainedModel) -> list[str]:
    """Patterns of the keys that a checkpoint of a model may lack. Why: no public name tells them."""
    return [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Names of a module's own buffers that its checkpoints leave out. Why: no public name tells them."""
    return module._non_persistent_buffers_set


def align_hook(module: nn.Module) -> AlignDevicesHook:
    """The hook by which accelerate brings a module's weights to where it runs, of one that has such a hook.

    Why: accelerate's own helpers load weights for a moment only; none changes them. To be removed when one does.
    """
    hook = module._hf_hook
    assert isinstance(hook, AlignDevicesHook)
    return hook


def forward_pre_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """A module's hooks before its forward pass. Why: the handle by which one is removed goes with who has added it, and
    a later training has to remove it.
    """
    return module._forward_pre_hooks


def load_pre_hooks(module: nn.Module) -> list[Any]:
    """A module's hooks before weights are loaded into it. Why: as for `forward_pre_hooks`."""
    return [getattr(wrapped, "hook", wrapped) for wrapped in module._load_state_dict_pre_hooks.values()]


def users_in_deepspeed(parameter: nn.Parameter) -> set[int]:
    """The modules (by number) that use a parameter just now, for which ZeRO-3 keeps it whole in every process.

    Why: its public context gathers parameters, but a module that runs within puts them back into shards. To be removed
    when it does not.
    """
    users: set[int] = parameter.ds_active_sub_modules  # type: ignore[attr-defined]
    return users


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to in place. Why: the counter that autograd keeps has no public name."""
    return tensor._version


def accelerate_has_state() -> bool:
    """Whether accelerate has been set up in this process. Why: to ask `AcceleratorState` for it sets it up."""
    return bool(AcceleratorState._shared_state)


def convolution_of(kind: type[nn.Module]) -> Any:
    """How a class of convolutions computes with a weight. Why: classes that change the weight first override it."""
    return getattr(kind, "_conv_forward", None)


def attention_of(config: PreTrainedConfig) -> Any:
    """How a config says that attention is computed; its parts are not asked.

    Why: the public setter has all parts of a model do alike. To be removed when a part can be set by itself.
    """
    return config._attn_implementation_internal


def set_attention(config: PreTrainedConfig, attention: Any) -> None:
    """The inverse of `attention_of`."""
    config._attn_implementation_internal = attention


def builder_of(auto_class: Any) -> Callable[[PreTrainedConfig], Any]:
    """What builds a model of a config, without weights. Why: classes of models name it otherwise than auto classes."""
    return auto_class.from_config if hasattr(auto_class, "from_config") else auto_class._from_config


def checkpoint_key_namer(model: PreTrainedModel) -> Callable[[str], str]:
    """How `from_pretrained` names the keys of a checkpoint: older layouts, fused tensors and base-model prefixes.

    Why: a checkpoint may store "vit.encoder.layer.3..." for what the model calls "vit.layers.3...", and only
    transformers knows. To be removed when from_pretrained can be told which keys to leave unread.

    Args:
        model: the full model, on the meta device.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()

    def name(key: str) -> str:
        renamed, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and key in state:
            renamed, _ = rename_source_key(key, [], [], model.base_model_prefix, state)
        return renamed

    return name


def card_of_encoder(encoder: Any) -> str | None:
    """The card that sentence-transformers would save with a model; None where it cannot make one.

    Why: no public method makes it without saving the weights, and the card of the checkpoint that was loaded, which
    stays where nothing was trained, has no public name. To be removed when there is such a method.
    """
    kept = getattr(encoder, "_model_card_text", None)
    data = encoder.model_card_data
    if kept and "generated_from_trainer" not in data.tags:
        return str(kept)
    modules = (sys.modules[kind.__module__] for kind in type(data).__mro__)
    make = next((made for module in modules if (made := getattr(module, "generate_model_card", None))), None)
    return None if make is None else str(make(encoder))


def calling_trainer() -> Any:
    """The Trainer that is calling a callback; None if none is.

    Why: a Trainer does not hand itself to its callbacks, and no event comes before it loads a checkpoint. What is done
    to a model for that must be known to be done by this Trainer: a script loads weights too. To be removed when there
    is such an event.
    """
    return next((owner for owner, _ in _running() if "callback_handler" in getattr(owner, "__dict__", {})), None)


def running_method(owner: Any) -> str | None:
    """The name of the method of an object that is running, the innermost one of several; None if none is. Why: as for
    `calling_trainer`.
    """
    return next((name for running, name in _running() if running is owner), None)


def _running() -> list[tuple[Any, str]]:
    """The methods that are running, the innermost first: their objects and names."""
    running = []
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            running.append((frame.f_locals.get("self"), frame.f_code.co_name))
        frame = frame.f_back
    return running
