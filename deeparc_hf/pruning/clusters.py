"""Clustering of blocks, and the choice of those that go. Pure functions over similarities: no model, no torch.

The algorithm is MPruner's (arXiv 2408.13482), which descends from DeepArc (ICSE 2023).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ..errors import PlanError
from .config import MPruneConfig

__all__ = [
    "ComparedStack",
    "chains",
    "check_asked",
    "cluster_blocks",
    "freezing_set",
    "pins_told",
    "reach_target",
    "removable",
]


class _Feeding(Protocol):
    @property
    def next_stack(self) -> str | None: ...


Feeding = TypeVar("Feeding", bound=_Feeding)


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
        before: L rows; row i says how alike block i is to each block of the stacks before this one in its chain
            (`chains`). Empty where there are none, or that is not known: only whole outputs are compared from stack to
            stack.
    """

    similarity: tuple[tuple[float, ...], ...]
    pinned: Mapping[int, str] = field(default_factory=dict)
    parameters: tuple[int, ...] = ()
    next_stack: str | None = None
    labels: tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()
    before: tuple[tuple[float, ...], ...] = ()

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


@dataclass(frozen=True)
class Line:
    """Blocks in forward order, over which clusters may reach: those of one stack, or of several.

    Attributes:
        blocks: all of them, as of one stack.
        places: stack and index of each.
    """

    blocks: ComparedStack
    places: tuple[tuple[str, int], ...]

    @classmethod
    def through(cls, stacks: Mapping[str, ComparedStack]) -> Line:
        """The line through stacks of which each takes the output of the one before.

        Raises:
            PlanError: if it is not known how alike blocks of different stacks are.
        """
        places: list[tuple[str, int]] = []
        rows: list[tuple[float, ...]] = []
        pinned: dict[int, str] = {}
        for name, stack in stacks.items():
            known = len(stack.before) == len(stack) and all(len(row) == len(places) for row in stack.before)
            if places and not known:
                raise PlanError(
                    f"How alike the blocks of {name} are to those of the stacks before it is not known. Run analyze "
                    "with rows='flat', or leave across_stacks out."
                )
            pinned |= {len(places) + index: reason for index, reason in stack.pinned.items()}
            before = stack.before if places else ((),) * len(stack)
            rows += [(*earlier, *own) for earlier, own in zip(before, stack.similarity, strict=True)]
            places += [(name, index) for index in range(len(stack))]
        # a row ends with its own stack; what lies beyond is the same, seen from there
        around = range(len(rows))
        full = tuple(tuple(rows[i][j] if j < len(rows[i]) else rows[j][i] for j in around) for i in around)
        return cls(ComparedStack(full, pinned), tuple(places))

    def clusters(self, threshold: float, config: MPruneConfig) -> list[tuple[int, ...]]:
        """Split the line into runs of alike blocks.

        A block joins the run while its similarity to the run's first block (linkage "leader") or to the block before it
        ("adjacent") is at least the threshold; otherwise it starts the next run. Where the similarity of two blocks
        depends on which of them stays, that with the earlier one staying counts, or with the later one where a cluster
        keeps its last member.
        """
        runs: list[list[int]] = []
        for index in range(len(self.places)):
            anchor = runs[-1][0 if config.linkage == "leader" else -1] if runs else None
            if anchor is not None and _alike(self.blocks, anchor, index, config.keep) >= threshold:
                runs[-1].append(index)
            else:
                runs.append([index])
        return list(map(tuple, runs))


def chains(stacks: Mapping[str, Feeding]) -> list[dict[str, Feeding]]:
    """Stacks in forward order, grouped so that each takes the output of the one before it in its group."""
    found: list[dict[str, Feeding]] = []
    for name, stack in stacks.items():
        if found and next(reversed(found[-1].values())).next_stack == name:
            found[-1][name] = stack
        else:
            found.append({name: stack})
    return found


def lines(compared: Mapping[str, ComparedStack], config: MPruneConfig) -> list[Line]:
    """The lines over which clusters may reach: stacks, or where the settings say so chains of stacks."""
    groups = chains(compared) if config.across_stacks else [{name: stack} for name, stack in compared.items()]
    return [Line.through(group) for group in groups]


@dataclass(frozen=True)
class StackClusters:
    """The clusters of one stack.

    Attributes:
        clusters: runs of blocks that belong together; the first of each is its leader.
        leader: path of the first cluster's leader, where that lies in an earlier stack.
    """

    clusters: tuple[tuple[int, ...], ...]
    leader: str | None = None


def cluster_blocks(
    compared: Mapping[str, ComparedStack], thresholds: Mapping[str, float], config: MPruneConfig
) -> dict[str, StackClusters]:
    """The clusters of each stack at its threshold."""
    parts: dict[str, list[tuple[int, ...]]] = {name: [] for name in compared}
    leaders: dict[str, str] = {}
    for line in lines(compared, config):
        for cluster in line.clusters(thresholds[line.places[0][0]], config):
            for name, group in itertools.groupby(
                (line.places[position] for position in cluster), lambda place: place[0]
            ):
                parts[name].append(tuple(index for _, index in group))
                leader, index = line.places[cluster[0]]
                if leader != name:
                    leaders[name] = f"{leader}.{index}"
    return {name: StackClusters(tuple(runs), leaders.get(name)) for name, runs in parts.items()}


def _alike(stack: ComparedStack, earlier: int, later: int, keep: str) -> float:
    stays, goes = (earlier, later) if keep == "leader" else (later, earlier)
    return stack.similarity[stays][goes]


def removable(
    compared: Mapping[str, ComparedStack], threshold: float, protected: Mapping[str, set[int]], config: MPruneConfig
) -> dict[str, dict[int, float]]:
    """The blocks that this threshold removes from each stack, each with the similarity that speaks for its removal.

    That is its similarity to the member of its cluster that is sure to stay, or, with adjacent linkage, to the
    neighbour through which it joined.
    """
    removed: dict[str, dict[int, float]] = {name: {} for name in compared}
    for line in lines(compared, config):
        for cluster in line.clusters(threshold, config):
            order = cluster if config.keep == "leader" else cluster[::-1]
            for position in range(1, len(order), config.k):
                name, index = line.places[order[position]]
                if index not in compared[name].pinned and index not in protected[name]:
                    witness = order[0 if config.linkage == "leader" else position - 1]
                    removed[name][index] = line.blocks.similarity[witness][order[position]]
    return {name: _leaving(config.min_blocks, len(compared[name]), gone) for name, gone in removed.items()}


def _leaving(least: int, length: int, removed: Mapping[int, float]) -> dict[int, float]:
    """Of the blocks that may go the most similar ones, so that enough stay."""
    excess = max(0, least - (length - len(removed)))
    return dict(_most_similar(removed)[: max(0, len(removed) - excess)])


def _most_similar(removed: Mapping[Any, float]) -> list[tuple[Any, float]]:
    """Most similar first; of equals the later block."""
    return sorted(removed.items(), key=lambda item: (item[1], item[0]), reverse=True)


def reach_target(
    compared: Mapping[str, ComparedStack], protected: Mapping[str, set[int]], config: MPruneConfig
) -> tuple[dict[str, float], dict[str, dict[int, float]]]:
    """The highest threshold that removes enough, and of that the most similar blocks, exactly as many as asked."""
    total = sum(map(len, compared.values()))
    check_asked({name: len(stack) for name, stack in compared.items()}, config)
    if isinstance(config.num_blocks, dict):
        groups = [({name: compared[name]}, config.num_blocks.get(name, len(compared[name]))) for name in compared]
    else:
        groups = [(dict(compared), config.num_blocks or round(total * float(config.keep_ratio)))]  # type: ignore[arg-type]
    thresholds, removed = {}, {}
    for group, stay in groups:
        threshold, gone = _reach(group, stay, protected, config)
        thresholds.update(dict.fromkeys(group, threshold))
        removed.update(gone)
    return thresholds, removed


def check_asked(lengths: Mapping[str, int], config: MPruneConfig) -> None:
    """Refuse a target of stacks that there are not, or of more blocks than there are.

    Raises:
        PlanError: as said.
    """
    asked = config.num_blocks
    if isinstance(asked, dict) and (unknown := sorted(set(asked) - set(lengths))):
        raise PlanError(
            f"num_blocks names {unknown[0]!r}, which is not a stack of this model. Stacks: {', '.join(lengths)}."
        )
    counts = asked if isinstance(asked, dict) else {", ".join(lengths): asked} if isinstance(asked, int) else {}
    for name, stay in counts.items():
        length = lengths.get(name, sum(lengths.values()))
        if stay > length:
            raise PlanError(
                f"num_blocks asks for {stay} blocks in {name}, which has only {length}. Ask for at most {length}."
            )


def _reach(
    compared: Mapping[str, ComparedStack], stay: int, protected: Mapping[str, set[int]], config: MPruneConfig
) -> tuple[float, dict[str, dict[int, float]]]:
    length = sum(map(len, compared.values()))
    wanted = length - stay
    values = {
        _alike(line.blocks, i, j, config.keep)
        for line in lines(compared, config)
        for i, j in itertools.combinations(range(len(line.places)), 2)
    }
    most = 0
    for threshold in sorted({1.0, *values}, reverse=True):
        found = removable(compared, threshold, protected, config)
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
        f"{length - most}, or lower k or min_blocks.{pins_told(compared)}"
    )


def pins_told(compared: Mapping[str, ComparedStack]) -> str:
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
