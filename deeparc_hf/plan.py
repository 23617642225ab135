"""Plans: from similarity matrices to the blocks that go, stay and freeze. Pure: no model, no torch.

The algorithm is MPruner's (arXiv 2408.13482), which descends from DeepArc (ICSE 2023): cluster consecutive blocks, remove
members of each cluster with a stride, freeze what is not next to a removal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .config import MPruneConfig
from .errors import ConfigError, PlanError

__all__ = ["PruningPlan", "StackFacts", "StackPlan", "freezing_set", "make_plan"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class StackFacts:
    """What is known of a stack before a plan is made.

    Attributes:
        similarity: L rows of L values.
        pinned: {index: reason}; these blocks stay.
        parameters: number of parameters of each block.
        next_stack: name of the stack that takes this one's output directly, or None.
    """

    similarity: tuple[tuple[float, ...], ...]
    pinned: Mapping[int, str] = field(default_factory=dict)
    parameters: tuple[int, ...] = ()
    next_stack: str | None = None

    def __len__(self) -> int:
        return len(self.similarity)


@dataclass(frozen=True)
class StackPlan:
    """The plan for one stack; indices are those of the blocks before the removal.

    Attributes:
        facts: the similarities and what else the plan rests on.
        threshold: the threshold that the clusters were made with (found, where a target was given).
        clusters: consecutive blocks that belong together; the first of each is its leader.
        removed, kept: the blocks that go and stay.
        frozen: those kept blocks that are not trained afterwards; empty unless freeze="partial" and something is removed.
        protected: blocks that stay because the user said so.
    """

    facts: StackFacts
    threshold: float
    clusters: tuple[tuple[int, ...], ...]
    removed: tuple[int, ...]
    frozen: tuple[int, ...] = ()
    protected: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.facts)

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self)) if i not in self.removed)

    @property
    def similarity(self) -> tuple[tuple[float, ...], ...]:
        return self.facts.similarity

    @property
    def pinned(self) -> Mapping[int, str]:
        return self.facts.pinned


@dataclass(frozen=True)
class PruningPlan:
    """Which blocks of which stacks stay, go and freeze, and the similarities behind it.

    Attributes:
        stacks: the plan of each stack, by name, in forward order.
        config: the settings that the plan was made with.
        samples: number of calibration samples behind the similarities; 0 if not known.
    """

    stacks: Mapping[str, StackPlan]
    config: MPruneConfig
    samples: int = 0

    @property
    def removed(self) -> dict[str, tuple[int, ...]]:
        """The blocks that go, for the stacks that lose any."""
        return {name: stack.removed for name, stack in self.stacks.items() if stack.removed}

    @property
    def num_blocks(self) -> int:
        """Blocks before the removal."""
        return sum(map(len, self.stacks.values()))

    @property
    def num_kept(self) -> int:
        return sum(len(stack.kept) for stack in self.stacks.values())

    @property
    def num_frozen(self) -> int:
        return sum(len(stack.frozen) for stack in self.stacks.values())

    def replan(self, **settings: Any) -> PruningPlan:
        """A plan from the same similarities with other settings, at once. What decides the similarities must stay.

        Raises:
            ConfigError: if `similarity`, `rows` or another setting of the calibration would change; run `analyze` for that.
        """
        config = self.config.replace(**settings)
        for name in ("similarity", "rows", "calibration_samples", "seed"):
            if getattr(config, name) != getattr(self.config, name):
                raise ConfigError(f"replan cannot change {name!r}, because the similarities depend on it. Call analyze again.")
        return make_plan({name: stack.facts for name, stack in self.stacks.items()}, config, self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "format_version": FORMAT_VERSION,
            "config": self.config.to_dict(),
            "samples": self.samples,
            "stacks": {name: _stack_to_dict(stack) for name, stack in self.stacks.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningPlan:
        """The inverse of `to_dict`.

        Raises:
            PlanError: if the data is not a plan.
        """
        try:
            version = data["format_version"]
            if version != FORMAT_VERSION:
                raise PlanError(f"This plan has format version {version!r}; this version of deeparc_hf reads {FORMAT_VERSION}.")
            stacks = {str(name): _stack_from_dict(stack) for name, stack in data["stacks"].items()}
            return cls(stacks, MPruneConfig.from_dict(data["config"]), int(data["samples"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, (PlanError, ConfigError)):
                raise
            raise PlanError(f"This is not a pruning plan: {type(error).__name__}: {error}. Make one with analyze(...).") from error

    def to_json(self, path: str | Path | None = None) -> str:
        """The plan as JSON text; written to `path` too if one is given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text, "utf-8")
        return text

    @classmethod
    def from_json(cls, text_or_path: str | Path) -> PruningPlan:
        """Read from a JSON text, or from the file at a path."""
        text = text_or_path
        if isinstance(text_or_path, Path) or not text_or_path.lstrip().startswith("{"):
            text = Path(text_or_path).read_text("utf-8")
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise PlanError(f"This is not a pruning plan: {error}.") from error

    def __str__(self) -> str:
        lines = [_table([["stack", "blocks", "kept", "threshold", "clusters", "removed", "frozen"], *self._rows()])]
        for name, stack in self.stacks.items():
            for index, reason in stack.pinned.items():
                lines.append(f"{name}.{index} is pinned: {reason}")
        verb = "remove" if self.removed else "nothing to remove:"
        summary = f"{verb} {self.num_blocks - self.num_kept} of {self.num_blocks} blocks"
        lines.append(f"{summary} ({self.config.similarity}, rows={self.config.effective_rows}, {self.samples} samples)")
        return "\n".join(lines)

    def _rows(self) -> list[list[str]]:
        return [
            [
                name,
                str(len(stack)),
                str(len(stack.kept)),
                f"{stack.threshold:.4f}",
                " ".join(_span(cluster) for cluster in stack.clusters),
                _list(stack.removed),
                _list(stack.frozen),
            ]
            for name, stack in self.stacks.items()
        ]


def make_plan(facts: Mapping[str, StackFacts], config: MPruneConfig, samples: int = 0) -> PruningPlan:
    """Make a plan from similarities.

    Args:
        facts: what is known of each stack, in forward order.
        config: the settings.
        samples: number of calibration samples behind the similarities, for the record.

    Raises:
        PlanError: if a target cannot be reached, a pattern or a stack name matches nothing, or a similarity is not finite.
    """
    for name, stack in facts.items():
        if any(len(row) != len(stack) or not all(map(math.isfinite, row)) for row in stack.similarity):
            raise PlanError(f"The similarity matrix of {name} is not square or not finite. Run analyze on other calibration data.")
    protected = _protected(facts, config.protect)
    if config.target == "threshold":
        thresholds = dict.fromkeys(facts, float(config.threshold))  # type: ignore[arg-type]
        removed = {name: _removable(stack, thresholds[name], protected[name], config) for name, stack in facts.items()}
    else:
        thresholds, removed = _reach_target(facts, protected, config)
    final = {name: tuple(sorted(removed[name])) for name in facts}
    frozen = dict.fromkeys(facts, ())
    if config.freeze == "partial":
        lengths = {name: len(stack) for name, stack in facts.items()}
        frozen = freezing_set(final, lengths, {name: stack.next_stack for name, stack in facts.items()})
    stacks = {
        name: StackPlan(
            facts=stack,
            threshold=thresholds[name],
            clusters=_clusters(stack, thresholds[name], config.linkage),
            removed=final[name],
            frozen=frozen[name],
            protected=tuple(sorted(protected[name])),
        )
        for name, stack in facts.items()
    }
    return PruningPlan(stacks, config, samples)


def freezing_set(
    removed: Mapping[str, Sequence[int]], lengths: Mapping[str, int], next_stack: Mapping[str, str | None]
) -> dict[str, tuple[int, ...]]:
    """Partial freezing: the kept block before and the kept block after each removal site are trained, all others are frozen.

    Where a site reaches the end of a stack whose output feeds another one, the block after it is the next stack's first kept
    one. If nothing is removed, nothing is frozen.

    Args:
        removed: the blocks that go, by stack.
        lengths: number of blocks of each stack before the removal.
        next_stack: the stack that each stack's output feeds directly, or None.

    Returns:
        The frozen blocks of each stack, as indices before the removal.
    """
    if not any(removed.get(name) for name in lengths):
        return dict.fromkeys(lengths, ())
    kept = {name: [i for i in range(length) if i not in removed.get(name, ())] for name, length in lengths.items()}
    trained: dict[str, set[int]] = {name: set() for name in lengths}
    for name in lengths:
        follower = next_stack.get(name)
        for index in removed.get(name, ()):
            trained[name].update([i for i in kept[name] if i < index][-1:])
            after = [i for i in kept[name] if i > index][:1]
            trained[name].update(after)
            if not after and follower in kept:
                trained[follower].update(kept[follower][:1])
    return {name: tuple(i for i in kept[name] if i not in trained[name]) for name in lengths}


def _clusters(stack: StackFacts, threshold: float, linkage: str) -> tuple[tuple[int, ...], ...]:
    clusters: list[list[int]] = []
    for index in range(len(stack)):
        anchor = clusters[-1][0 if linkage == "leader" else -1] if clusters else None
        if anchor is not None and stack.similarity[anchor][index] >= threshold:
            clusters[-1].append(index)
        else:
            clusters.append([index])
    return tuple(map(tuple, clusters))


def _removable(stack: StackFacts, threshold: float, protected: set[int], config: MPruneConfig) -> dict[int, float]:
    """The blocks that this threshold removes, each with the similarity that speaks for its removal."""
    removed: dict[int, float] = {}
    for cluster in _clusters(stack, threshold, config.linkage):
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


def _reach_target(
    facts: Mapping[str, StackFacts], protected: Mapping[str, set[int]], config: MPruneConfig
) -> tuple[dict[str, float], dict[str, dict[int, float]]]:
    """The highest threshold that removes enough, and of what it removes the most similar blocks, exactly as many as asked."""
    total = sum(map(len, facts.values()))
    if isinstance(config.num_blocks, dict):
        unknown = sorted(set(config.num_blocks) - set(facts))
        if unknown:
            raise PlanError(f"num_blocks names {unknown[0]!r}, which is not a stack of this model. Stacks: {', '.join(facts)}.")
        groups = [({name: facts[name]}, config.num_blocks.get(name, len(facts[name]))) for name in facts]
    elif config.num_blocks is not None:
        groups = [(dict(facts), config.num_blocks)]
    else:
        groups = [(dict(facts), round(total * float(config.keep_ratio)))]  # type: ignore[arg-type]
    thresholds, removed = {}, {}
    for group, stay in groups:
        threshold, gone = _reach(group, stay, protected, config)
        thresholds.update(dict.fromkeys(group, threshold))
        removed.update(gone)
    return thresholds, removed


def _reach(
    facts: Mapping[str, StackFacts], stay: int, protected: Mapping[str, set[int]], config: MPruneConfig
) -> tuple[float, dict[str, dict[int, float]]]:
    length = sum(map(len, facts.values()))
    wanted = length - stay
    if wanted < 0:
        raise PlanError(f"num_blocks asks for {stay} blocks in {', '.join(facts)}, which has only {length}. Ask for at most {length}.")
    values = {v for stack in facts.values() for i, row in enumerate(stack.similarity) for j, v in enumerate(row) if i < j}
    most = 0
    for threshold in sorted({1.0, *values}, reverse=True):
        found = {name: _removable(stack, threshold, protected[name], config) for name, stack in facts.items()}
        most = max(most, sum(map(len, found.values())))
        if sum(map(len, found.values())) >= wanted:
            flat = {(name, index): value for name, gone in found.items() for index, value in gone.items()}
            chosen = {key for key, _ in _most_similar(flat)[:wanted]}
            return threshold, {
                name: {index: value for index, value in gone.items() if (name, index) in chosen} for name, gone in found.items()
            }
    raise PlanError(
        f"The target keeps {stay} of {length} blocks in {', '.join(facts)}, but with k={config.k}, min_blocks={config.min_blocks} and the "
        f"pinned and protected blocks at most {most} can go. Keep at least {length - most}, or lower k or min_blocks."
    )


def _protected(facts: Mapping[str, StackFacts], patterns: Sequence[str]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {name: set() for name in facts}
    for pattern in patterns:
        hits = [(n, i) for n, stack in facts.items() for i in range(len(stack)) if fnmatchcase(f"{n}.{i}", pattern)]
        if not hits:
            first = next(iter(facts))
            raise PlanError(
                f"protect: {pattern!r} matches no block. Blocks are named like {first}.0; patterns may hold * and ?, for example {first}.*"
            )
        for name, index in hits:
            found[name].add(index)
    return found


def _stack_to_dict(stack: StackPlan) -> dict[str, Any]:
    return {
        "length": len(stack),
        "similarity": [list(row) for row in stack.similarity],
        "pinned": {str(index): reason for index, reason in stack.pinned.items()},
        "parameters": list(stack.facts.parameters),
        "next_stack": stack.facts.next_stack,
        "threshold": stack.threshold,
        "clusters": [list(cluster) for cluster in stack.clusters],
        "removed": list(stack.removed),
        "kept": list(stack.kept),
        "frozen": list(stack.frozen),
        "protected": list(stack.protected),
    }


def _stack_from_dict(data: Mapping[str, Any]) -> StackPlan:
    facts = StackFacts(
        similarity=tuple(tuple(map(float, row)) for row in data["similarity"]),
        pinned={int(index): str(reason) for index, reason in data["pinned"].items()},
        parameters=tuple(map(int, data["parameters"])),
        next_stack=data["next_stack"],
    )
    blocks = {key: tuple(map(int, data[key])) for key in ("removed", "frozen", "protected", "kept")}
    for key, indices in blocks.items():
        if any(not 0 <= index < len(facts) for index in indices) or len(set(indices)) != len(indices):
            raise PlanError(f"{key} has an index outside 0..{len(facts) - 1}, or one twice: {list(indices)}.")
    if set(blocks["kept"]) != set(range(len(facts))) - set(blocks["removed"]):
        raise PlanError("kept and removed do not add up to the blocks of the stack.")
    clusters = tuple(tuple(map(int, cluster)) for cluster in data["clusters"])
    return StackPlan(facts, float(data["threshold"]), clusters, blocks["removed"], blocks["frozen"], blocks["protected"])


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _span(cluster: Sequence[int]) -> str:
    return str(cluster[0]) if len(cluster) == 1 else f"{cluster[0]}-{cluster[-1]}"


def _list(indices: Sequence[int]) -> str:
    return ",".join(map(str, indices)) or "-"
