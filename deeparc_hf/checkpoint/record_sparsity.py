"""The part of a record that lists zeroed weights: {"settings": {...}, "samples": n, "matrices": {path: {"zeros": n,
"size": n}}}.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..architectures import Layout
from ..errors import RecordError

__all__ = ["rename_matrices", "renumber_matrices"]


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
