"""Sparsity methods: how much each weight of a linear map matters. One file a method; see CONTRIBUTING.md, "add a
sparsity method".
"""

from __future__ import annotations

from .base import SparsityMethod, methods, register

__all__ = ["SparsityMethod", "methods", "register"]
