"""Clustering of blocks, and the choice of those that go. Pure functions over similarities: no model, no torch.

The algorithm is MPruner's (arXiv 2408.13482), which descends from DeepArc (ICSE 2023).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import PlanError
from .config import MPruneConfig

__all__ = ["ComparedStack", "cluster_blocks", "freezing_set", "reach_target", "removable"]


@dataclass(frozen=True)
class ComparedStack:
    """What is known of a stack before a plan is made.

    Attributes:
        similarity: L rows of L values; row i says how alike the others are to block i, where i stays and they go.
        pinned: {index: reason}; these blocks stay.
        parameters: number of parameters of each block.
        next_stack: name of the stack that takes this one's output directly, or None.
        labels: what each block is called in patterns, where that is not its index: after an earlier pruning of the same
            training, the index that it had when the training began.
        frozen: blocks that an earlier pruning froze, by the model's record.
    """

    similarity: tuple[tuple[float, ...], ...]
    pinned: Mapping[int, str] = field(default_factory=dict)
    parameters: tuple[int, ...] = ()
    next_stack: str | None = None
    labels: tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.similarity)


def freezing_set(
    removed: Mapping[str, Sequence[int]], lengths: Mapping[str, int], next_stack: Mapping[str, str | None]
) -> dict[str, tuple[int, ...]]:
    """Partial freezing: the kept block before and the kept block after each removal site are trained, all others are
    frozen.

    Where a site reaches the end (the start) of a stack that feeds (is fed by) another one, the block beside it is the
    first (the last) kept one of that stack. If nothing is removed, nothing is frozen. Indices are those before.
    """
    if not any(removed.get(name) for name in lengths):
        return dict.fromkeys(lengths, ())
    kept = {name: [i for i in range(length) if i not in removed.get(name, ())] for name, length in lengths.items()}
    feeders = {after: name for name, after in next_stack.items() if after in kept}
    trained: dict[str, set[int]] = {name: set() for name in lengths}
    for name in lengths:
        for index in removed.get(name, ()):
            before = [i for i in kept[name] if i < index]
            after = [i for i in kept[name] if i > index]
            if before:
                trained[name].add(before[-1])
            elif name in feeders:
                trained[feeders[name]].add(kept[feeders[name]][-1])
            if after:
                trained[name].add(after[0])
            elif next_stack.get(name) in kept:
                trained[next_stack[name]].add(kept[next_stack[name]][0])
    return {name: tuple(i for i in kept[name] if i not in trained[name]) for name in lengths}


def cluster_blocks(
    stack: ComparedStack, threshold: float, linkage: str, keep: str = "leader"
) -> tuple[tuple[int, ...], ...]:
    """Split a stack into runs of alike blocks.

    A block joins the run while its similarity to the run's first block (linkage "leader") or to the block before it
    ("adjacent") is at least the threshold; otherwise it starts the next run. Where the similarity of two blocks depends
    on which of them stays, that with the earlier one staying counts, or with the later one where a cluster keeps its
    last member.
    """
    runs: list[list[int]] = []
    for index in range(len(stack)):
        anchor = runs[-1][0 if linkage == "leader" else -1] if runs else None
        if anchor is not None and _alike(stack, anchor, index, keep) >= threshold:
            runs[-1].append(index)
        else:
            runs.append([index])
    return tuple(map(tuple, runs))


def _alike(stack: ComparedStack, earlier: int, later: int, keep: str) -> float:
    stays, goes = (earlier, later) if keep == "leader" else (later, earlier)
    return stack.similarity[stays][goes]


def removable(stack: ComparedStack, threshold: float, protected: set[int], config: MPruneConfig) -> dict[int, float]:
    """The blocks that this threshold removes, each with the similarity that speaks for its removal.

    That is its similarity to the member of its cluster that is sure to stay, or, with adjacent linkage, to the
    neighbour through which it joined.
    """
    removed: dict[int, float] = {}
    for cluster in cluster_blocks(stack, threshold, config.linkage, config.keep):
        order = cluster if config.keep == "leader" else cluster[::-1]
        for position in range(1, len(order), config.k):
            index = order[position]
            if index not in stack.pinned and index not in protected:
                witness = order[0 if config.linkage == "leader" else position - 1]
                removed[index] = stack.similarity[witness][index]
    excess = max(0, config.min_blocks - (len(stack) - len(removed)))
    return dict(_most_similar(removed)[: max(0, len(removed) - excess)])


def _most_similar(removed: Mapping[Any, float]) -> list[tuple[Any, float]]:
    """Most similar first; of equals the later block."""
    return sorted(removed.items(), key=lambda item: (item[1], item[0]), reverse=True)


def reach_target(
    compared: Mapping[str, ComparedStack], protected: Mapping[str, set[int]], config: MPruneConfig
) -> tuple[dict[str, float], dict[str, dict[int, float]]]:
    """The highest threshold that removes enough, and of that the most similar blocks, exactly as many as asked."""
    total = sum(map(len, compared.values()))
    if isinstance(config.num_blocks, dict):
        unknown = sorted(set(config.num_blocks) - set(compared))
        if unknown:
            raise PlanError(
                f"num_blocks names {unknown[0]!r}, which is not a stack of this model. Stacks: {', '.join(compared)}."
            )
        groups = [({name: compared[name]}, config.num_blocks.get(name, len(compared[name]))) for name in compared]
    else:
        groups = [(dict(compared), config.num_blocks or round(total * float(config.keep_ratio)))]  # type: ignore[arg-type]
    thresholds, removed = {}, {}
    for group, stay in groups:
        threshold, gone = _reach(group, stay, protected, config)
        thresholds.update(dict.fromkeys(group, threshold))
        removed.update(gone)
    return thresholds, removed


def _reach(
    compared: Mapping[str, ComparedStack], stay: int, protected: Mapping[str, set[int]], config: MPruneConfig
) -> tuple[float, dict[str, dict[int, float]]]:
    length = sum(map(len, compared.values()))
    wanted = length - stay
    if wanted < 0:
        raise PlanError(
            f"num_blocks asks for {stay} blocks in {', '.join(compared)}, which has only {length}. Ask for at most "
            f"{length}."
        )
    values = {
        _alike(stack, i, j, config.keep)
        for stack in compared.values()
        for i, j in itertools.combinations(range(len(stack)), 2)
    }
    most = 0
    for threshold in sorted({1.0, *values}, reverse=True):
        found = {name: removable(stack, threshold, protected[name], config) for name, stack in compared.items()}
        most = max(most, sum(map(len, found.values())))
        if sum(map(len, found.values())) >= wanted:
            flat = {(name, index): value for name, gone in found.items() for index, value in gone.items()}
            chosen = {key for key, _ in _most_similar(flat)[:wanted]}
            return threshold, {
                name: {index: value for index, value in gone.items() if (name, index) in chosen}
                for name, gone in found.items()
            }
    raise PlanError(
        f"The target keeps {stay} of {length} blocks in {', '.join(compared)}, but with k={config.k}, "
        f"min_blocks={config.min_blocks} and the pinned and protected blocks at most {most} can go. Keep at least "
        f"{length - most}, or lower k or min_blocks.{_pins(compared)}"
    )


def _pins(compared: Mapping[str, ComparedStack]) -> str:
    """Why blocks are pinned: each reason once, with the first block that has it."""
    reasons: dict[str, list[str]] = {}
    for name, stack in compared.items():
        for index, reason in stack.pinned.items():
            reasons.setdefault(reason, []).append(f"{name}.{index}")
    shown = [
        f"{blocks[0]}{f' and {len(blocks) - 1} more' if len(blocks) > 1 else ''}: {reason}"
        for reason, blocks in reasons.items()
    ]
    return f" Pinned are {'; '.join(shown[:3])}{'; ...' if len(shown) > 3 else ''}." if shown else ""
