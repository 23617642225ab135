"""Building modules on the meta device, where they have shapes and no values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["on_meta"]


@contextmanager
def on_meta() -> Iterator[None]:
    """Within, modules are built on the meta device, and their tensors not filled: most of a build's time."""
    with torch.device("meta"), _Valueless():
        yield


class _Valueless(TorchFunctionMode):
    _FILLS = frozenset(
        getattr(torch.Tensor, name) for name in ("uniform_", "normal_", "clamp_", "erfinv_", "mul_", "add_", "zero_")
    )

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in self._FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
