"""Several processes: the same decision in each, and a DistributedDataParallel wrapper that follows its model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from ..errors import DeepArcError, SurgeryError

__all__ = ["agree", "follow_in_wrapper", "gather", "process_count", "process_index", "rebuild_reducer"]


def process_count() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(work: Callable[[], Any], *, together: bool = False) -> list[Any]:
    """Run `work` in every process; each gets the results of all, in the order of the processes.

    If it fails in any process, it fails in all, elsewhere with an error of the same kind if that is one of ours, else
    with a SurgeryError: none is left waiting for the others.

    Args:
        together: the processes need each other within the work. One that fails cannot tell the others, which wait for
            it there: it raises at once, and whoever launched them ends the others.
    """
    if process_count() == 1:
        return [work()]
    result: Any = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        if together:
            raise
        error = caught
    report = None if error is None else (type(error) if isinstance(error, DeepArcError) else SurgeryError, f"{error}")
    outcomes: list[Any] = [None] * process_count()
    dist.all_gather_object(outcomes, (result, report))
    if error is not None:
        raise error
    for index, (_, failure) in enumerate(outcomes):
        if failure is not None:
            kind, message = failure
            raise kind(f"In process {index}: {message}")
    return [outcome[0] for outcome in outcomes]


def agree(work: Callable[[], Any], *, together: bool = False) -> Any:
    """The first process's result of `work`, in every process.

    Args:
        together: the work takes all processes, which do it at once (`gather`).
    """
    return gather(work if together or process_index() == 0 else lambda: None, together=together)[0]


def follow_in_wrapper(model: nn.Module) -> None:
    """Have the DistributedDataParallel wrapper around a model follow changes of its parameters, before its next forward
    pass.

    The Trainer keeps the wrapper to itself, so it is met when it is called: a hook on all modules waits for it, and is
    gone afterwards, or with the model. Two that wait do the same twice.
    """
    # one process that a launcher has started is wrapped too
    if not (dist.is_available() and dist.is_initialized()):
        return
    followed = weakref.ref(model)

    def meet(module: nn.Module, args: Any) -> None:
        if followed() is None:
            handle.remove()
        elif isinstance(module, DistributedDataParallel) and any(inner is followed() for inner in module.modules()):
            handle.remove()
            rebuild_reducer(module)

    handle = register_module_forward_pre_hook(meet)


def rebuild_reducer(wrapper: DistributedDataParallel) -> None:
    """Rebuild what DistributedDataParallel derived from the parameters of its module when it was made: buckets, hooks,
    buffers.

    Without it, removed and frozen parameters would be waited for, and parameters that came back would not be reduced.
    The private names are those that the wrapper's own `__setstate__` calls; the tests run them in real processes.
    """
    parameters, sparse = wrapper._build_params_for_reducer()
    if not parameters:
        raise SurgeryError(
            "No parameter is trained any more, so there is nothing to reduce over the processes. Freeze fewer blocks."
        )
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._module_parameters = [
        p for name, p in wrapper.module.named_parameters() if name not in wrapper.parameters_to_ignore
    ]
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    wrapper._has_rebuilt_buckets = False
    for hook, state in getattr(wrapper, "_comm_hooks", []):
        dist._register_comm_hook(wrapper.reducer, state, hook)
    if wrapper.static_graph:
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()
