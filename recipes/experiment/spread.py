"""Blocks that stay spread evenly over a stack, the first and the last among them: what DistilBERT (Sanh et al. 2019,
arXiv 1910.01108) and Distil-Whisper (Gandhi et al. 2023, arXiv 2311.00430) take of their teacher, and what other
choices are to be held against.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deeparc_hf.errors import ConfigError

__all__ = ["evenly_spread", "spread_blocks"]


def evenly_spread(length: int, count: int) -> list[int]:
    """Indices of `count` of `length` blocks, as far apart as they can be, rounded down; of one the last, as
    Distil-Whisper has it.
    """
    return [*(index * (length - 1) // (count - 1) for index in range(count - 1)), length - 1]


def spread_blocks(lengths: Mapping[str, int], num_blocks: Any) -> tuple[str, ...]:
    """The paths of the blocks that stay, of stacks with so many blocks: those of the target evenly spread, of others
    all.

    Raises:
        ConfigError: if the target names a stack that is not there, or asks for more blocks than it has.
    """
    if isinstance(num_blocks, int):
        if len(lengths) > 1:
            raise ConfigError(
                f"spread_evenly needs num_blocks for each stack, found {num_blocks} for all of {', '.join(lengths)}. "
                "Give STACK=N,OTHER=M."
            )
        num_blocks = dict.fromkeys(lengths, num_blocks)
    for name, count in num_blocks.items():
        if name not in lengths or not 1 <= count <= lengths[name]:
            there = ", ".join(f"{stack} with {length} blocks" for stack, length in lengths.items())
            raise ConfigError(f"num_blocks asks for {count} blocks of {name}. There are {there}.")
    kept = {name: evenly_spread(length, num_blocks.get(name, length)) for name, length in lengths.items()}
    return tuple(f"{name}.{index}" for name, indices in kept.items() for index in indices)
