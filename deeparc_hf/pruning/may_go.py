"""Which blocks a search may remove, and how many: it goes by no similarity, so that of neighbours any may go. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..errors import PlanError
from .clusters import ComparedStack, check_asked, pins_told
from .config import MPruneConfig

__all__ = ["MayGo", "check_reachable", "may_go", "wanted_removals"]


@dataclass(frozen=True)
class MayGo:
    """Of a stack: the blocks that are neither pinned nor protected, and how many blocks may go at most."""

    blocks: tuple[int, ...]
    room: int

    @property
    def most(self) -> int:
        """How many can go."""
        return min(len(self.blocks), self.room)


def may_go(
    stacks: Mapping[str, ComparedStack], protected: Mapping[str, Collection[int]], config: MPruneConfig
) -> dict[str, MayGo]:
    """What may go of each stack; `protected` are the blocks that stay because the user said so."""
    stay = dict.fromkeys(stacks, config.min_blocks)
    if isinstance(config.num_blocks, dict):
        stay |= {name: len(stack) for name, stack in stacks.items()}
        stay |= {name: max(count, config.min_blocks) for name, count in config.num_blocks.items()}
    found = {}
    for name, stack in stacks.items():
        free = tuple(i for i in range(len(stack)) if i not in stack.pinned and i not in protected[name])
        found[name] = MayGo(free, max(len(stack) - stay[name], 0))
    return found


def check_reachable(
    stacks: Mapping[str, ComparedStack],
    protected: Mapping[str, Collection[int]],
    config: MPruneConfig,
    *,
    at_most: bool = False,
) -> None:
    """Refuse a target that no search reaches.

    Args:
        protected: as in `may_go`.
        at_most: whether fewer may go than the settings ask for, where not so many can.

    Raises:
        PlanError: if not so many blocks can go, or none where the settings do not say how many.
    """
    lengths = {name: len(stack) for name, stack in stacks.items()}
    check_asked(lengths, config)
    free = may_go(stacks, protected, config)
    wanted, most = wanted_removals(lengths, config), sum(stack.most for stack in free.values())
    if most < (1 if wanted is None else min(wanted, 1) if at_most else wanted):
        raise PlanError(
            f"The search is to remove {'blocks' if wanted is None else wanted} of {sum(lengths.values())} blocks, and "
            f"{most} may go: the others are pinned or protected, or min_blocks={config.min_blocks} keeps them. Keep "
            f"more blocks, or protect fewer.{pins_told(stacks)}"
        )


def wanted_removals(lengths: Mapping[str, int], config: MPruneConfig) -> int | None:
    """How many blocks the settings ask to remove; None where they do not say."""
    total = sum(lengths.values())
    if isinstance(config.num_blocks, dict):
        return sum(lengths[name] - count for name, count in config.num_blocks.items())
    if isinstance(config.num_blocks, int):
        return total - config.num_blocks
    return None if config.keep_ratio is None else total - round(total * config.keep_ratio)
