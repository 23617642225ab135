"""How sets of blocks are tried. One file each; `base` says what a strategy is."""

from .base import Strategy, strategies

__all__ = ["Strategy", "strategies"]
