"""Weights that accelerate keeps outside of a model (`device_map`): on the disk, or on the CPU beside an accelerator. A
module has them while it runs.

To look at weights, or to change them, they are held: until the end they are in memory, whatever runs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from accelerate.utils.modeling import has_offloaded_params, named_module_tensors
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..errors import UnsupportedModelError
from .block_paths import lists_of
from .compat import align_hook, unsaved_buffers
from .shards import whole_weights
from .transaction import Transaction

__all__ = ["UNKNOWN", "blocks_on_disk", "device_of", "fetching_in_backward", "first_missing", "holding", "is_offloaded"]


UNKNOWN = (
    "is kept outside of the model by accelerate in a way that is not known here (preload_module_classes, or several "
    "hooks on one module). Load the model with from_pretrained(..., device_map=..., offload_folder=...)."
)


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights of a model are kept elsewhere."""
    return any(has_offloaded_params(module) for module in model.modules())


def first_missing(model: nn.Module) -> str | None:
    """The first parameter that is not in memory, and that no hook of its own module brings when it runs; None if there
    is none.
    """
    for path, module in model.named_modules():
        if not has_offloaded_params(module):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    return f"{path}.{name}" if path else name
    return None


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where its first weights are, or are brought to when they are kept elsewhere."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    owner = next(filter(has_offloaded_params, model.modules()), None)
    return device if owner is None else torch.empty(0, device=align_hook(owner).execution_device).device


def blocks_on_disk(model: nn.Module, stacks: Sequence[str]) -> dict[str, str]:
    """A `device_map` of a model: the blocks of its stacks on the disk, all else on the CPU. So are blocks with buffers
    that no file has (Swin's masks), which accelerate cannot bring back.
    """
    return dict(_places(model, tuple(path for stack in stacks for path in lists_of(stack))))


def _places(module: nn.Module, stacks: tuple[str, ...], path: str = "") -> Iterator[tuple[str, str]]:
    if path in stacks:
        for name, block in module.named_children():
            computed = any(True for part in block.modules() for _ in unsaved_buffers(part))
            yield f"{path}.{name}", "cpu" if computed else "disk"
        return
    if path and not any(name.startswith(f"{path}.") for name in stacks):
        yield path, "cpu"
        return
    prefix = f"{path}." if path else ""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    yield from ((f"{prefix}{name}", "cpu") for name, _ in own)
    for name, child in module.named_children():
        yield from _places(child, stacks, f"{prefix}{name}")


@contextmanager
def holding(*modules: nn.Module, transaction: Transaction | None = None) -> Iterator[bool]:
    """Within, the weights of these modules are in memory, whole; what holds already goes on to. Gives whether any were
    kept elsewhere.

    Args:
        transaction: weights that change within are written back where they are kept; it notes how to take that back.
            Without one, changes must be undone before the end.

    Raises:
        UnsupportedModelError: if they are kept in a way that is not known, or are to be written back and cannot.
    """
    with ExitStack() as stack:
        stack.enter_context(whole_weights(modules))
        owners = [owner for module in modules for owner in module.modules() if has_offloaded_params(owner)]
        for owner in dict.fromkeys(owners):
            stack.enter_context(_held(owner, align_hook(owner)))
        bare = next((name for module in modules for name, p in module.named_parameters() if p.is_meta), None)
        if bare is not None:
            raise UnsupportedModelError(f"{bare} {UNKNOWN}")
        yield bool(owners)
        if transaction is not None:
            for owner in dict.fromkeys(owners):
                _write_back(owner, align_hook(owner), transaction)


@contextmanager
def _held(owner: nn.Module, hook: AlignDevicesHook) -> Iterator[None]:
    hook.pre_forward(owner)
    hook.offload = False  # neither loads nor drops them
    try:
        for name, tensor in _tensors(owner, hook):
            # on one device they may be the very ones that are kept, which only writing back is to change
            in_memory, whole_name = _in_memory(hook.weights_map, name)
            if in_memory is not None and tensor.data_ptr() == in_memory[whole_name].data_ptr():
                tensor.data = tensor.data.clone()
        yield
    finally:
        hook.offload = True
        hook.post_forward(owner, None)


@contextmanager
def fetching_in_backward(model: nn.Module) -> Iterator[None]:
    """Within, a forward pass that is recorded for a way back keeps no weights that are kept elsewhere: the way back
    gets them again, one module's at a time.
    """
    running: list[nn.Module] = []

    def pack(tensor: Tensor) -> Any:
        for owner in reversed(running):
            hook = align_hook(owner)
            for name, parameter in owner.named_parameters() if hook.offload else ():
                past = tensor.data_ptr() - parameter.data_ptr() if parameter.device.type != "meta" else -1
                if 0 <= past < parameter.nbytes and tensor.dtype == parameter.dtype:
                    return owner, name, tensor.shape, tensor.stride(), past // tensor.itemsize
        return tensor

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        owner, name, shape, stride, offset = packed
        hook = align_hook(owner)
        weight: Tensor = hook.weights_map[name].to(hook.execution_device)
        return weight.as_strided(shape, stride, weight.storage_offset() + offset)

    owners = [module for module in model.modules() if has_offloaded_params(module)]
    if not owners:
        yield
        return
    with ExitStack() as stack:
        for owner in owners:
            before = owner.register_forward_pre_hook(lambda module, args: running.append(module))
            after = owner.register_forward_hook(lambda module, args, output: running.pop() and None)
            stack.callback(before.remove)
            stack.callback(after.remove)
        stack.enter_context(saved_tensors_hooks(pack, unpack))
        yield


def _tensors(owner: nn.Module, hook: AlignDevicesHook) -> list[tuple[str, Tensor]]:
    """What a hook brings and takes away."""
    found = named_module_tensors(
        owner, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
    )
    return list(found)


def _write_back(owner: nn.Module, hook: AlignDevicesHook, transaction: Transaction) -> None:
    for name, tensor in _tensors(owner, hook):
        kept = hook.weights_map[name]
        new = tensor.detach().cpu()
        if not torch.equal(new, kept.cpu()):
            _replace(hook.weights_map, name, new, transaction)


def _in_memory(place: Any, name: str) -> tuple[dict[str, Tensor] | None, str]:
    """The dict in which a tensor is kept, None if it is not in memory; and its name there."""
    place, name = _unwrapped(place, name)
    kept = place.state_dict if isinstance(place, OffloadedWeightsLoader) else place
    return (kept if isinstance(kept, dict) and name in kept else None), name


def _unwrapped(place: Any, name: str) -> tuple[Any, str]:
    while isinstance(place, PrefixedDataset):
        place, name = place.dataset, f"{place.prefix}{name}"
    return place, name


def _replace(place: Any, name: str, new: Tensor, transaction: Transaction) -> None:
    """Keep another tensor under a name."""
    in_memory, whole_name = _in_memory(place, name)
    if in_memory is not None:
        name = whole_name
        transaction.on_failure(partial(in_memory.__setitem__, name, in_memory[name]))
        in_memory[name] = new.clone()
        return
    place, name = _unwrapped(place, name)
    if not isinstance(place, OffloadedWeightsLoader) or place.save_folder is None:
        raise UnsupportedModelError(
            f"{name} is kept on the disk, and there is no folder for its new values. Load the model with "
            "offload_folder=FOLDER. Nothing was changed."
        )
    # a file of its own: the one before may belong to a checkpoint, and is what is gone back to
    number, path = tempfile.mkstemp(".safetensors", "changed-", place.save_folder)
    os.close(number)
    file = Path(path)
    transaction.on_failure(partial(file.unlink, missing_ok=True))
    try:
        save_file({name: new.contiguous()}, file)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    transaction.on_failure(partial(place.index.__setitem__, name, place.index[name]))
    place.index[name] = {
        "safetensors_file": str(file),
        "weight_name": name,
        "dtype": str(new.dtype).removeprefix("torch."),
    }
