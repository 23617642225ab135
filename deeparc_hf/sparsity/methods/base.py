"""What a sparsity method is: a score for each weight of a linear map;
the lowest scores of each output row are zeroed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from ...core.registry import Registry

__all__ = ["SparsityMethod", "methods", "register"]


class SparsityMethod(ABC):
    """Scores the weights of one linear map. Subclasses are stateless; they register themselves with
    `@register("name")`.

    Attributes:
        name: set by `register`.
        summary: one line for tables.
        needs_inputs: whether `score` uses the norms of the map's inputs, so that calibration data is needed.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    needs_inputs: ClassVar[bool] = False

    @abstractmethod
    def score(self, weight: Tensor, input_norms: Tensor | None = None) -> Tensor:
        """How much each weight matters; at least 0, comparable within an output row.

        Args:
            weight: shape (d_out, d_in).
            input_norms: shape (d_in,); the L2 norm of each input over all unpadded calibration positions. Or shape
                (d_out, d_in), where each output meets inputs of its own, as in a grouped convolution.

        Returns:
            Shape (d_out, d_in), float32 or float64: precise enough that rounding makes no equals of scores that differ,
            where the device has such a type. Without a graph, and not NaN for finite weights and norms.
        """


methods: Registry[SparsityMethod] = Registry("sparsity method", "deeparc_hf.sparsity.methods", SparsityMethod)
register = methods.register
