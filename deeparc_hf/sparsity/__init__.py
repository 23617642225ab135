"""Sparsity methods: how much each weight of a linear map matters, and which ones are zeroed. One file a method.

Pure functions over tensors. What applies them to models, in and outside a Trainer, is not part of this version.
See CONTRIBUTING.md, "add a sparsity method".
"""

from __future__ import annotations

from .base import SparsityMethod, methods, register
from .masks import choose_lowest, choose_pattern

__all__ = ["SparsityMethod", "choose_lowest", "choose_pattern", "methods", "register"]
