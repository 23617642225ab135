"""Surgery: take blocks out of a live model, in place, all or nothing: any failure, Ctrl-C too, restores the model."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures import Layout, Stack, Subject, describe
from ..architectures.adapters import places_of
from ..architectures.base import Container
from ..architectures.generation import follow_generation
from ..checkpoint.record import PrunedConfig, current_layout, current_record
from ..checkpoint.weights_mark import mark_of_model
from ..core.block_paths import lists_of
from ..core.offload import is_offloaded
from ..core.sentence_encoders import forget_figures
from ..core.transaction import Transaction
from ..errors import ConfigError, PlanError, SurgeryError
from .adapters import follow_in_configs
from .freezing import freeze_blocks
from .packed import follow_in_quantization
from .plan import PruningPlan, freezing_set
from .rebuild import Builds, require_told, skeletons, tell_package, tell_unproven
from .shorten import Shortening
from .verify import expect

__all__ = ["apply_plan", "follow_record", "forget_parameters", "refuse_wrapped", "remove_blocks", "require_fitting"]


def remove_blocks(
    model: nn.Module,
    blocks: Mapping[str, Sequence[int]],
    freeze: str = "none",
    *,
    optimizer: torch.optim.Optimizer | None = None,
    example: Any = None,
    verify: bool = True,
    stock_only: bool = False,
) -> PrunedConfig:
    """Remove blocks from a live model, in place, all or nothing.

    Args:
        model: a model that `find_stacks` knows.
        blocks: by stack name the indices of the blocks that go.
        freeze: "partial" freezes all kept blocks but those beside a removal site, and what runs before the first stack.
        optimizer: an optimizer over the model's parameters that is to follow: the removed ones leave it, and the state
            of frozen ones is freed.
        example: a batch to verify the result on; made-up inputs otherwise. It must reach every part of the model that
            the blocks may be fed by (images, for a model of texts and images).
        verify: whether a forward pass must show that the pruned model computes what the original computes with these
            blocks skipped. What cannot be verified is refused, a model on the meta device too. Without, the settings
            alone are checked.
        stock_only: refuse a removal after which stock libraries could not load the model. Otherwise, where no settings
            can express it, the model becomes one of the type "deeparc_pruned", and a warning says so.

    Returns:
        The record, which the model carries in its config from now on.

    Raises:
        SurgeryError: if a stack or block does not exist, a block is pinned, nothing would be left, the model's settings
            cannot express the removal, the result does not compute what it should, or that cannot be verified. Nothing
            is changed then.
        UnsupportedModelError: if the model cannot be pruned at all.
    """
    if freeze not in ("none", "partial"):
        raise ConfigError(f"freeze must be 'none' or 'partial', found {freeze!r}.")
    subject = describe(model)
    removed = _checked(subject.stacks, blocks)
    frozen: Mapping[str, Sequence[int]] = {}
    if freeze == "partial":
        frozen = freezing_set(removed, subject.lengths, {n: s.next_stack for n, s in subject.stacks.items()})
    entry = {"settings": {"freeze": freeze}, "removed": removed, "frozen": frozen}
    refuse_wrapped(model)
    return _operate(
        subject, removed, frozen, entry, optimizer=optimizer, example=example, verify=verify, stock_only=stock_only
    )


def apply_plan(
    model: nn.Module | Subject,
    plan: PruningPlan,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    example: Any = None,
    verify: bool = True,
    transaction: Transaction | None = None,
) -> PrunedConfig:
    """Carry a plan out on a live model, in place, all or nothing.

    Args:
        model: the model that the plan was made for, or one with the same stacks.
        plan: from `analyze`.
        optimizer: as in `remove_blocks`.
        example: as in `remove_blocks`.
        verify: as in `remove_blocks`.
        transaction: notes how to take the removal back later; it holds on to the removed blocks.

    Returns:
        The record. If the plan removes nothing, the model is left alone and the record is the one it carries, or an
        empty one.

    Raises:
        PlanError: if the plan does not fit the model.
        SurgeryError, UnsupportedModelError: as in `remove_blocks`.
    """
    subject = describe(model)
    if not isinstance(plan, PruningPlan):
        raise PlanError(
            f"A plan is carried out, found {type(plan).__name__}. Make one: analyze(...), or frontier.choose(...)."
        )
    if plan.removed:
        refuse_wrapped(model)
    require_fitting(subject, plan)
    if not plan.removed:
        return current_record(subject)
    removed = _checked(subject.stacks, plan.removed)
    frozen = {name: stack.frozen for name, stack in plan.stacks.items() if stack.frozen}
    settings = plan.config.to_dict()
    if plan.config.freeze == "record":  # what was frozen is frozen again, and no more
        settings["freeze_inputs"] = _freezes_inputs(current_record(subject))
    entry = {
        "settings": settings,
        "samples": plan.samples,
        "thresholds": {name: stack.threshold for name, stack in plan.stacks.items()},
        "removed": removed,
        "frozen": frozen,
        **({} if plan.choice is None else {"search": plan.choice.judged}),
    }
    return _operate(
        subject,
        removed,
        frozen,
        entry,
        optimizer=optimizer,
        example=example,
        verify=verify,
        stock_only=plan.config.stock_only,
        transaction=transaction,
    )


def require_fitting(subject: Subject, plan: PruningPlan) -> None:
    """Refuse a plan for other stacks.

    Raises:
        PlanError: naming the first stack that differs.
    """
    stacks = subject.stacks
    for name, stack in plan.stacks.items():
        if name not in stacks or len(stacks[name]) != len(stack):
            found = f"{len(stacks[name])} blocks" if name in stacks else f"no such stack (it has {', '.join(stacks)})"
            raise PlanError(
                f"The plan is for a model with {len(stack)} blocks in {name}; {subject.name} has {found}. "
                "Call analyze on this model."
            )


def follow_record(
    model: nn.Module | Subject,
    record: PrunedConfig,
    frozen: Mapping[str, Sequence[int]],
    transaction: Transaction | None = None,
) -> list[nn.Parameter]:
    """Give a model the structure of a record, weights aside, and freeze blocks, by their places then.

    Returns:
        The parameters that were trainable and no longer are.

    Raises:
        SurgeryError: if the model lacks a block that the record keeps.
    """
    subject = describe(model)
    try:
        step = record.layout.since(current_layout(subject))
        odd = next((name for name in record.stacks if name not in subject.stacks), None)
    except ValueError as error:
        odd = str(error)
    if odd is not None:
        raise SurgeryError(
            f"{subject.host.label} lacks blocks of {odd!r} that are to stay. Load the model from the checkpoint's own "
            "folder."
        )
    if step.removed:
        _operate(subject, step.removed, {}, None, optimizer=None, transaction=transaction, known=record)
    if not any(frozen.values()):
        return []
    return freeze_blocks(describe(subject), frozen, transaction, inputs=_freezes_inputs(record))


def _freezes_inputs(record: PrunedConfig) -> bool:
    """Whether the last pruning froze embeddings and stem beside blocks."""
    return record.iterations[-1].get("settings", {}).get("freeze_inputs") is not False if record.iterations else True


def forget_parameters(
    optimizer: torch.optim.Optimizer,
    removed: Iterable[nn.Parameter],
    stateless: Iterable[Tensor] = (),
    transaction: Transaction | None = None,
) -> None:
    """Make a live optimizer forget parameters: removed ones leave their group (the groups stay, for a scheduler's
    rates), those that are frozen or become shorter lose only their state, so that group sizes agree when training is
    resumed.
    """
    groups = [list(group["params"]) for group in optimizer.param_groups]
    state = dict(optimizer.state)

    def restore() -> None:
        for group, parameters in zip(optimizer.param_groups, groups, strict=True):
            group["params"][:] = parameters
        optimizer.state.clear()
        optimizer.state.update(state)

    if transaction is not None:
        transaction.on_failure(restore)
    gone = {id(p) for p in removed}
    for group in optimizer.param_groups:
        group["params"][:] = [p for p in group["params"] if id(p) not in gone]
    forgotten = gone | {id(p) for p in stateless}
    for parameter in [p for p in optimizer.state if id(p) in forgotten]:
        del optimizer.state[parameter]


def _operate(
    subject: Subject,
    removed: Mapping[str, Sequence[int]],
    frozen: Mapping[str, Sequence[int]],
    entry: Mapping[str, Any] | None,
    *,
    optimizer: torch.optim.Optimizer | None,
    example: Any = None,
    verify: bool = True,
    stock_only: bool = False,
    transaction: Transaction | None = None,
    known: PrunedConfig | None = None,
) -> PrunedConfig:
    """Remove blocks. With a record that is `known` from a checkpoint, which was verified when it was made, nothing is
    verified again.
    """
    host, stacks = subject.host, subject.stacks
    step = subject.without(removed)
    builds = skeletons(subject, step, stock_only=stock_only)
    counted = host.plain
    if is_offloaded(host.root):  # which does not tell what is tied
        counted = builds.before
        if isinstance(counted, PreTrainedModel):
            counted.tie_weights()
    shortening = Shortening(subject, step, builds)
    entry = {**(entry or {}), "parameters": _parameters(counted, step, shortening.fewer())}
    if builds.by_package:
        entry["dropped"] = True
    if shortening.tensors:
        entry["shortened"] = True
    record = known or current_record(subject).compose(step, entry)
    expectation = None
    if verify and known is None:
        expectation = expect(subject, removed, example, by_package=builds.by_package)
    going = [
        entries[index]
        for name, indices in removed.items()
        for entries in _lists_by_block(stacks[name])
        for index in indices
    ]
    with transaction or Transaction() as transaction:
        _take_out(subject, step, builds, shortening, record, transaction)
        if expectation is not None:
            expectation.check()
            if not builds.by_package:
                require_told(subject, builds, expectation)
                shortening.require_told(expectation)
        if known is None and builds.by_package:
            tell_package(subject, builds)
        elif known is None:
            tell_unproven(stacks, removed)
        changed = []
        if any(frozen.values()):
            changed = freeze_blocks(subject, step.places(frozen), transaction, inputs=_freezes_inputs(record))
        if optimizer is not None:
            still_used = {id(p) for p in host.root.parameters()}
            lost = [p for module in going for p in module.parameters() if id(p) not in still_used]
            forget_parameters(optimizer, lost, [*changed, *shortening.tensors], transaction)
        if known is None:
            record = record.with_mark(mark_of_model(host.bare))
            host.set_record(record.to_dict())
            forget_figures(host.outer, transaction)
        # a frame compiled before the removal may be reused wrongly (pytorch issue 139476)
        torch.compiler.reset()
    return record


def _take_out(
    subject: Subject,
    step: Layout,
    builds: Builds,
    shortening: Shortening,
    record: PrunedConfig,
    transaction: Transaction,
) -> None:
    """Take the blocks out of the live model, and have its configs, its record, and what stands beside follow."""
    host, stacks = subject.host, subject.stacks
    lists = [(container, name) for name in step.removed for container in _lists_by_block(stacks[name])]
    left = [(c, [c[index] for index in step.entries_left(name, len(c))]) for c, name in lists]
    host.own_configs(transaction)
    host.follow_builds(builds.before, builds.after, stacks, transaction)
    host.set_record(record.to_dict())
    follow_generation(host.root, stacks, step, transaction)
    for path, attribute, value in builds.updates:
        for module in places_of(host.root, path):
            transaction.set(module, attribute, value)
    for container, modules in left:
        transaction.keep_children(container, modules)
    shortening.carry_out(transaction)
    follow_in_configs(host.root, step, builds.after, transaction)
    follow_in_quantization(host.root, step, builds.before, builds.after, transaction)


def _lists_by_block(stack: Stack) -> list[Container]:
    """The lists with an entry for each block, which goes with it."""
    return [*stack.containers, *(heads.container for heads in stack.heads)]


def _parameters(root: nn.Module, step: Layout, fewer: Mapping[int, int]) -> dict[str, int]:
    """Number of parameters before and after a removal; what the blocks that go share with others stays.

    Args:
        fewer: how many numbers a tensor outside of them loses, by its `id`.
    """
    paths = step.renamed_keys(dict(root.named_parameters(remove_duplicate=False)))
    left = {id(parameter): parameter.numel() - fewer.get(id(parameter), 0) for parameter in paths.values()}
    return {"before": sum(p.numel() for p in root.parameters()), "after": sum(left.values())}


def _checked(stacks: Mapping[str, Stack], blocks: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The removal, sorted and without empty entries; raises if it is not possible."""
    checked: dict[str, list[int]] = {}
    if not isinstance(blocks, Mapping):
        raise SurgeryError(
            f"Expected a dict of stack names to lists of block indices, found {type(blocks).__name__}. Stacks: "
            f"{', '.join(stacks)}."
        )
    for name, given in blocks.items():
        indices = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else given
        if name not in stacks:
            near = [stack for stack in stacks if name in lists_of(stack)]  # one of several lists side by side
            near = near or difflib.get_close_matches(str(name), stacks, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SurgeryError(f"There is no stack {name!r}.{hint} Stacks: {', '.join(stacks)}. Nothing was changed.")
        stack = stacks[name]
        whole = isinstance(indices, Iterable) and all(
            isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in indices
        )
        if not whole:
            raise SurgeryError(
                f"Blocks of {name} are given as a list of whole numbers, found {indices!r}. Nothing was changed."
            )
        for index in indices:
            if not 0 <= index < len(stack):
                raise SurgeryError(
                    f"{name} has blocks 0 to {len(stack) - 1}; there is no block {index}. Nothing was changed."
                )
            if index in stack.pinned:
                raise SurgeryError(
                    f"Block {index} of {name} is pinned: {stack.pinned[index]}. Remove other blocks. Nothing was "
                    "changed."
                )
        if len(set(indices)) != len(indices):
            raise SurgeryError(f"A block of {name} is named twice: {list(indices)}. Nothing was changed.")
        if len(indices) == len(stack):
            raise SurgeryError(
                f"All {len(stack)} blocks of {name} would go. At least one must stay. Nothing was changed."
            )
        if indices:
            checked[name] = sorted(map(int, indices))
    if not checked:
        raise SurgeryError("No block was named, so there is nothing to remove.")
    return checked


def refuse_wrapped(model: nn.Module | Subject) -> None:
    """Refuse a model whose wrapper (DistributedDataParallel, FSDP, DeepSpeed) would not follow a removal."""
    model = model.root if isinstance(model, Subject) else model
    names = {type(module).__name__ for module in (model, getattr(model, "module", None)) if module is not None}
    parameters = [type(p).__name__ for p in model.parameters()]
    if "DistributedDataParallel" in names:
        raise SurgeryError(
            "The model is wrapped in DistributedDataParallel, whose buckets would not follow. Prune it before it is "
            "wrapped."
        )
    if "DTensor" in parameters or any(
        name.startswith(("FullyShardedDataParallel", "DeepSpeedEngine")) for name in names
    ):
        raise SurgeryError(
            "The model's parameters are sharded (FSDP, DeepSpeed). Prune it with prune_model before it is wrapped."
        )
