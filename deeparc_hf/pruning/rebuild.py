"""Rebuilding: the settings of a model without some of its blocks, compared as a stock loader builds them, and put into
the model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..architectures import Host, Layout, Stack, Subject, describe
from ..architectures.adapters import places_of
from ..architectures.base import block_shapes
from ..architectures.entries import asked_for, names_others
from ..architectures.skeleton import Memory, compare
from ..core.block_paths import is_inside
from ..core.caller import warn_caller
from ..core.transaction import Transaction
from ..errors import DeepArcError, DeepArcWarning, SurgeryError, UnsupportedModelError
from ..pruned_type.config import LAYOUT_KEY
from .verify import Expectation

__all__ = ["Builds", "inexpressible", "require_told", "skeletons", "tell_package", "tell_unproven"]

_MAY = {
    "values": "has as many values as there are blocks",
    "indices": "lists numbers of blocks",
    "keys": "has numbers of blocks for keys",
    "runs": "repeats a pattern of blocks",
}


@dataclass(frozen=True)
class Builds:
    """The settings before and after a removal, builds of both, and attributes in which the second differs.

    `by_package`: stock libraries build no such model from any settings; deeparc_hf does, by dropping blocks of a whole
    one (`pruned_type`).
    """

    settings: dict[str, Any]
    shrunk: dict[str, Any]
    before: nn.Module
    after: nn.Module
    updates: list[tuple[str, str, Any]]
    by_package: bool = False


def skeletons(subject: Subject, layout: Layout, memory: Memory | None = None, *, stock_only: bool = True) -> Builds:
    """Build the settings before and after the removal, and compare. With a memory, for several removals from one model.

    Args:
        stock_only: refuse what only the package can build.

    Raises:
        SurgeryError: if the settings do not describe the model, or cannot describe it without these blocks.
    """
    host, name = subject.host, subject.name
    memory = memory or Memory()
    settings = host.settings()
    before = _built_before(subject, settings, memory)
    builds, problem = _by_settings(subject, settings, before, layout, memory)
    if builds is not None:
        return builds
    by_place = _kinds_by_place(subject, layout, before)
    can_drop = host.can_drop and all(subject.stacks[stack].can_drop for stack in layout.removed)
    if not stock_only and can_drop and by_place:
        problem += f"; nor can the blocks be dropped: {by_place}"
    elif not stock_only and can_drop:
        try:
            shrunk = host.dropping(settings, layout)
            return Builds(settings, shrunk, before, host.build(shrunk), [], by_package=True)
        except Exception as error:
            problem += f"; nor can the blocks be dropped as it is built: {type(error).__name__}: {error}"
    way = "Remove other blocks, or protect these."
    if stock_only and can_drop and not by_place:
        way += " Or use remove_blocks with stock_only=False: the result then needs deeparc_hf to be loaded."
    raise SurgeryError(
        f"The settings of {name} (type {host.kind!r}) cannot express the removal: {problem}. Nothing was changed. {way}"
    )


def _kinds_by_place(subject: Subject, layout: Layout, before: nn.Module) -> str:
    """Why dropped blocks would have others taken for what they are not; empty if they would not.

    A whole model's config tells kinds of blocks by their numbers. Where the model's code asks for them as it runs (for
    the mask of a sliding window, which shows on long texts only), it would ask for the wrong ones.
    """
    if not subject.host.can_drop:
        return ""
    left = subject.host.dropping(subject.host.settings(), layout)[LAYOUT_KEY]
    for name in layout.removed:
        path, kept = name.split("."), left[name]["kept"]
        holders = [subject.root.get_submodule(".".join(path[:count])) for count in range(len(path))]
        config = next((holder.config for holder in reversed(holders) if hasattr(holder, "config")), None)
        for key, value in vars(config).items() if config is not None else ():
            kinds = isinstance(value, (list, tuple)) and all(isinstance(kind, str) for kind in value)
            if not kinds or names_others(key) or len(value) != left[name]["length"]:
                continue
            if [value[index] for index in kept] != list(value[: len(kept)]) and asked_for(before, key):
                return f"the config's {key} tells the kinds of {name} by their numbers, and is asked as it runs"
    return ""


def _built_before(subject: Subject, settings: dict[str, Any], memory: Memory) -> nn.Module:
    """A build of the model's settings, which must be what the model is."""
    host, name = subject.host, subject.name
    try:
        before = host.build(settings)
    except Exception as error:
        raise SurgeryError(
            f"{name} cannot be rebuilt from its own settings, so a pruned one could not be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    live, stock = memory.state_shapes(host.plain), memory.state_shapes(before)
    for stack in subject.stacks:
        odd = sorted(k for k in live.keys() | stock.keys() if is_inside(stack, k) and live.get(k) != stock.get(k))
        if odd:
            raise SurgeryError(
                f"{name} is not what its settings describe: {odd[0]} has shape {live.get(odd[0])}, a stock build would "
                f"give it {stock.get(odd[0])}. A checkpoint of it could not be loaded. {host.rebuild_hint}"
            )
    return before


def _by_settings(
    subject: Subject, settings: dict[str, Any], before: nn.Module, layout: Layout, memory: Memory
) -> tuple[Builds | None, str]:
    """The builds where settings express the removal; else None, and why they cannot."""
    try:
        _, shrunk = subject.shrunk_settings(layout)
    except SurgeryError as error:
        return None, str(error)
    try:
        after = subject.host.build(shrunk)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    differences = compare(before, after, layout, memory, subject.per_block)
    if differences.problems:
        return None, differences.problems[0]
    lost = _lost(subject, after, layout)
    return (None, lost) if lost else (Builds(settings, shrunk, before, after, differences.updates), "")


def _lost(subject: Subject, after: nn.Module, layout: Layout) -> str:
    """Why what is left of a stack would not be found to be one; empty if it would. Where blocks are alike it is."""
    for name in layout.removed:
        blocks = subject.stacks[name].blocks
        shapes = block_shapes([blocks[index] for index in layout.kept[name]])
        if len(shapes) < 2 or any(shapes.count(shape) > 1 for shape in shapes):
            continue
        try:
            found = describe(after).lengths.get(name, 0)
        except UnsupportedModelError:
            found = 0
        if found != len(shapes):
            return (
                f"the {len(shapes)} blocks that are left of {name} are of different kinds, and no setting counts them"
            )
    return ""


def inexpressible(subject: Subject, *, stock_only: bool = True) -> dict[str, dict[int, str]]:
    """Blocks that are not to be removed, each with the reason: a stock loader would build something else than the model
    without the block.

    Each unpinned block is rehearsed on its own, on skeletons: one after a removal serves for all blocks that lead to
    the same settings, so that a model of equal blocks takes two. The model may be on the meta device.

    Args:
        stock_only: without, a stack is left out most of whose blocks are such, if the package can build the model
            without them. Stock comes first: of a stack with some such blocks the others can go.

    Returns:
        By stack, the reasons by block.
    """
    found: dict[str, dict[int, str]] = {}
    memory, droppable = Memory(), not stock_only and subject.host.can_drop
    for name, stack in subject.stacks.items():
        free = [index for index in range(len(stack)) if index not in stack.pinned and len(stack) > 1]
        reasons: dict[int, str] = {}
        for index in free:
            try:
                skeletons(subject, subject.without({name: [index]}), memory)
            except DeepArcError as error:
                problem = str(error).partition(" Nothing was changed.")[0].rpartition("cannot express the removal: ")[2]
                reasons[index] = f"the model's settings cannot express its removal: {problem}"
        if reasons and not (droppable and 2 * len(reasons) > len(free)):
            found[name] = reasons
    return found


def tell_unproven(stacks: Mapping[str, Stack], removed: Mapping[str, Sequence[int]]) -> None:
    """Name the entries of the config that may name blocks, and that stay because nothing shows it."""
    for name in removed:
        for entry in stacks[name].entries:
            if entry.proof == "none":
                warn_caller(
                    f"The config's {entry} may name blocks of {name}: it {_MAY[entry.form]}, and the model's code asks "
                    "for it. Nothing shows that it does, so it stays as it is. Compare the outputs before and after, "
                    "and edit the entry if need be."
                )


def tell_package(subject: Subject, builds: Builds) -> None:
    """Warn that a pruned model needs the package to be loaded, if it is the first removal that makes it so."""
    if builds.by_package and not builds.settings.get(LAYOUT_KEY):
        warn_caller(
            f"{subject.name} without these blocks can only be loaded where deeparc_hf is installed, after `import "
            "deeparc_hf`, with an Auto class of transformers: no settings of its library describe it. With "
            "stock_only=True only blocks are removed that stock libraries can do without.",
        )


def require_told(subject: Subject, builds: Builds, expectation: Expectation) -> None:
    """Refuse (SurgeryError) an entry of which only the forward pass shows that it names blocks, where that pass would
    not tell its old value from the new.
    """
    for entry in (entry for stack in subject.stacks.values() for entry in stack.entries if entry.proof == "run"):
        old = entry.read(builds.settings)
        if old == entry.read(builds.shrunk):
            continue
        stale = copy.deepcopy(builds.shrunk)
        entry.write(stale, copy.deepcopy(old))
        if not _tells(expectation.host, builds.after, stale, expectation):
            raise SurgeryError(
                f"{entry} in the settings of {subject.name} tells by number which blocks are of another "
                "kind. Whether the pruned model has it right shows only on inputs where that matters, and on the "
                "example it does not. Give a batch on which it does (a larger image, a longer text): example=batch. "
                "The model is as it was before."
            )


def _tells(host: Host, after: nn.Module, settings: dict[str, Any], expectation: Expectation) -> bool:
    """Whether the expectation refuses the pruned model with other settings. The model is left as it is."""
    try:
        other = host.build(settings)
    except Exception:
        return True  # there is no such model
    attempt = Transaction()
    try:
        host.own_configs(attempt)
        host.follow_builds(after, other, (), attempt)
        for path, attribute, value in compare(after, other, Layout({}, {})).updates:
            for module in places_of(host.root, path):
                attempt.set(module, attribute, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeepArcWarning)
            expectation.check()
    except SurgeryError:
        return True
    finally:
        attempt.roll_back()
    return False
