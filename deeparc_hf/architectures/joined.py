"""Blocks whose parts stand in several lists side by side (XLM: attentions, norms and feed-forward networks).

No module is such a block, so one is made up to be looked at: it holds the parts, and its hooks sit on the first and on
the last of them. It is not part of the model and cannot be run by itself: what the model does between the parts is not
known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..core.local_hooks import LocalHook

__all__ = ["JoinedBlock", "entrance", "outlet"]


class JoinedBlock(nn.Module):
    """The parts of one block, by the names of their lists, in the order in which they run.

    It is given what the first part is given, and puts out what the last one does.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("The parts of this block are run by the model that holds them.")

    # the hooks that are used here, in the forms that torch gives them
    def register_forward_pre_hook(
        self, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
    ) -> RemovableHandle:
        """As torch's, on the first part; the hook is given this block as the module. Copies of the model lack it."""

        def on_first(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if with_kwargs:
                return hook(self, args, kwargs)
            changed = hook(self, args)
            return None if changed is None else (changed if isinstance(changed, tuple) else (changed,), kwargs)

        return entrance(self).register_forward_pre_hook(LocalHook(on_first), prepend=prepend, with_kwargs=True)

    def register_forward_hook(
        self,
        hook: Callable[..., Any],
        *,
        prepend: bool = False,
        with_kwargs: bool = False,
        always_call: bool = False,
    ) -> RemovableHandle:
        """As torch's, on the last part; the hook is given this block as the module, and what the first part was given.
        Copies of the model lack it.
        """
        given: list[Any] = [(), {}]

        def on_first(_: nn.Module, args: Any, kwargs: Any) -> None:
            given[:] = args, kwargs

        def on_last(_: nn.Module, args: Any, output: Any) -> Any:
            (args, kwargs), given[:] = given, ((), {})
            return hook(self, args, kwargs, output) if with_kwargs else hook(self, args, output)

        noting = entrance(self).register_forward_pre_hook(LocalHook(on_first), with_kwargs=True)
        handle = outlet(self).register_forward_hook(LocalHook(on_last), prepend=prepend, always_call=always_call)
        return _Handles(handle, noting)


class _Handles(RemovableHandle):
    """The handles of several hooks, removed together."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def entrance(block: nn.Module) -> nn.Module:
    """The module that is given what a block is given: the block itself, or its first part."""
    return next(iter(block.children())) if isinstance(block, JoinedBlock) else block


def outlet(block: nn.Module) -> nn.Module:
    """The module that puts out what a block puts out: the block itself, or its last part."""
    return list(block.children())[-1] if isinstance(block, JoinedBlock) else block
