"""Sparsity methods: how much each weight of a linear map matters, and which ones are zeroed. One file a method.

Pure functions over tensors; `sparsify.py` applies them to models. See CONTRIBUTING.md, "add a sparsity method".
"""

from __future__ import annotations

from .base import SparsityMethod, methods, register
from .masks import choose_lowest, choose_pattern, zero_chosen, zero_others

__all__ = ["SparsityMethod", "choose_lowest", "choose_pattern", "methods", "register", "zero_chosen", "zero_others"]
