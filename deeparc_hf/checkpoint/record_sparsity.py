"""The part of a record that lists zeroed weights: {"settings": {...}, "samples": n, "matrices": {path: {"zeros": n,
"size": n}}}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..architectures import Layout
from ..core.plain_text import is_plain, plain
from ..errors import RecordError

__all__ = ["check_sparsity", "rename_matrices", "renumber_matrices"]

MAX_MATRICES = 65536
MAX_NAME = 512
_MAX_SIZE = 2**40


def check_sparsity(sparsity: Any, expect: Callable[[bool, str, Any, str], None]) -> None:
    """Check what a downloaded record says of zeroed weights.

    Args:
        expect: raises where its first argument is false; the others say where, what was found and what was expected.
    """
    if sparsity is None:
        return
    expect(isinstance(sparsity, Mapping), "sparsity", sparsity, "null or an object")
    matrices = sparsity.get("matrices", {})
    known = isinstance(matrices, Mapping) and len(matrices) <= MAX_MATRICES
    expect(known, "sparsity.matrices", matrices, f"an object with at most {MAX_MATRICES} matrices")
    for name, entry in matrices.items():
        good = is_plain(name, MAX_NAME) and name != ""
        expect(good, "sparsity.matrices", name, f"named by texts of at most {MAX_NAME} visible characters")
        numbers = [entry.get(key) for key in ("zeros", "size")] if isinstance(entry, Mapping) else []
        whole = bool(numbers) and all(type(number) is int for number in numbers)
        expect(
            whole and 0 <= numbers[0] <= numbers[1] <= _MAX_SIZE,
            f"sparsity.matrices[{plain(name, 80)}]",
            entry,
            "an object of whole numbers, zeros and size, with 0 <= zeros <= size",
        )


def rename_matrices(sparsity: Mapping[str, Any] | None, prefix: str, stacks: Iterable[str]) -> Mapping[str, Any] | None:
    """Name matrices as a model with these stacks names them: with or without the prefix of the headless model."""
    if sparsity is None:
        return None
    bare = {stack.removeprefix(f"{prefix}."): stack for stack in stacks}

    def name(old: str) -> str:
        path = old.removeprefix(f"{prefix}.")
        stack = next((short for short in bare if path.startswith(f"{short}.")), None)
        return old if stack is None else bare[stack] + path[len(stack) :]

    matrices = sparsity.get("matrices", {})
    renamed = {name(old): entry for old, entry in matrices.items()}
    if len(renamed) < len(matrices):
        raise RecordError("The pruning record lists the zeros of one matrix twice. Download the checkpoint again.")
    return {**sparsity, "matrices": renamed}


def renumber_matrices(sparsity: Mapping[str, Any] | None, step: Layout) -> Mapping[str, Any] | None:
    """The same after blocks were removed: those of removed blocks are gone, the others follow their blocks."""
    return None if sparsity is None else {**sparsity, "matrices": step.renamed_keys(sparsity.get("matrices", {}))}
