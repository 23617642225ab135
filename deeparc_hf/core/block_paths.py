"""Paths of blocks and of what is in them.

A stack has the name of the list that holds its blocks ("bert.encoder.layer"). Where the parts of a block stand in
several lists side by side, all of them are named: "transformer.{attentions,ffns}", whose block 3 is
"transformer.attentions.3" and "transformer.ffns.3".
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["block_path", "is_inside", "lists_of", "place_in", "stack_name"]


def stack_name(lists: Sequence[str]) -> str:
    """The name of a stack: of the list that holds its blocks, or of several of one module that hold parts of them."""
    if len(lists) == 1:
        return lists[0]
    parent = lists[0].rpartition(".")[0]
    names = ",".join(path.rpartition(".")[2] for path in lists)
    return f"{parent}.{{{names}}}" if parent else f"{{{names}}}"


def lists_of(stack: str) -> tuple[str, ...]:
    """The module paths of the lists that hold a stack's blocks."""
    if not stack.endswith("}"):
        return (stack,)
    parent, _, names = stack[:-1].rpartition("{")
    return tuple(parent + name for name in names.split(","))


def place_in(stack: str, path: str) -> tuple[int, str] | None:
    """In which block of a stack a module or a tensor is: the block's index, and its path seen from the block ("" for
    the block itself); None if it is in none.
    """
    for held_by in (lists := lists_of(stack)):
        if path.startswith(f"{held_by}."):
            index, _, rest = path[len(held_by) + 1 :].partition(".")
            if index.isdecimal():
                part = (held_by.rpartition(".")[2],) if len(lists) > 1 else ()
                return int(index), ".".join((*part, *([rest] if rest else [])))
    return None


def is_inside(stack: str, path: str) -> bool:
    """Whether a module or a tensor is in the lists of a stack, below them."""
    return path.startswith(tuple(f"{held_by}." for held_by in lists_of(stack)))


def block_path(stack: str, index: int, inner: str = "") -> str:
    """The path of what is in a block; the other way round than `place_in`."""
    lists = lists_of(stack)
    if len(lists) > 1 and inner:
        part, _, inner = inner.partition(".")
        stack = next(path for path in lists if path.rpartition(".")[2] == part)
    return f"{stack}.{index}" + (f".{inner}" if inner else "")
