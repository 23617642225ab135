"""Other callbacks in a Trainer that go through the model and a copy of it side by side, which fails, or pairs other
blocks, once blocks are gone from the model alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..architectures import Subject, describe
from ..core.block_paths import is_inside
from ..core.caller import warn_caller
from ..errors import ConfigError

__all__ = ["refuse_copies", "warn_of_copies"]

_KNOWN = ("SyncRefModelCallback", "BEMACallback")  # of TRL
_ADVICE = "and begin it in a training of its own after the pruning, or call prune_model before the Trainer is made."


def refuse_copies(callbacks: Iterable[Any]) -> None:
    """Refuse callbacks that are known to go through the model and a copy side by side."""
    for callback in callbacks:
        names = [kind.__name__ for kind in type(callback).__mro__]
        averages = any(isinstance(value, AveragedModel) for _, value in _held(callback))
        if averages or not set(_KNOWN).isdisjoint(names):
            option = " (sync_ref_model=False)" if _KNOWN[0] in names else ""
            raise ConfigError(
                f"{names[0]} keeps a copy of the model in step with it, parameter by parameter, and MPruneCallback is "
                f"going to remove blocks from the model alone. Leave it out{option} {_ADVICE}"
            )


def warn_of_copies(callbacks: Iterable[Any], model: nn.Module | Subject) -> bool:
    """Warn of callbacks that hold what looks like a copy of the model's weights; whether there is one."""
    subject = describe(model)
    parameters = dict(subject.root.named_parameters())
    inside = {name for name in parameters if any(is_inside(stack, name) for stack in subject.stacks)}
    held = [(callback, name, value) for callback in callbacks for name, value in _held(callback)]
    found = [(callback, name) for callback, name, value in held if _is_copy(value, parameters, inside)]
    for callback, name in found:
        warn_caller(
            f"{type(callback).__name__} holds what looks like a copy of the model's weights ({name}). If it goes "
            "through both side by side (an average of the weights, say), it will fail or pair other blocks after a "
            f"pruning. Leave it out {_ADVICE}",
        )
    return bool(found)


def _held(callback: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, and what the plain objects that it holds do, by name; what a Trainer holds is no copy."""
    for name, value in getattr(callback, "__dict__", {}).items():
        yield name, value
        inner = getattr(value, "__dict__", {})
        if not isinstance(value, (type, ModuleType, nn.Module, Tensor)) and "callback_handler" not in inner:
            yield from ((f"{name}.{key}", item) for key, item in inner.items())


def _is_copy(value: Any, parameters: Mapping[str, nn.Parameter], inside: set[str]) -> bool:
    if isinstance(value, Mapping):
        return any(key in inside and isinstance(item, Tensor) for key, item in value.items())
    own = list(value.parameters()) if isinstance(value, nn.Module) else value
    if not isinstance(own, (list, tuple)) or not own or not all(isinstance(item, Tensor) for item in own):
        return False
    if any(item is p for item in own for p in parameters.values()):
        return False
    shapes = [item.shape for item in own]
    return shapes in ([p.shape for p in parameters.values()], [p.shape for p in parameters.values() if p.requires_grad])
