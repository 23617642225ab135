"""Partial freezing on a live model: what is frozen has no gradient, and its normalisation statistics stay put."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..architectures import Host, Stack, Subject
from ..architectures.joined import entrance
from ..core.compat import BatchNorm, forward_pre_hooks
from ..core.local_hooks import LocalHook
from ..core.offload import is_offloaded
from ..core.transaction import Transaction
from ..observe.forward import evaluating
from ..observe.hooks import hooked
from .clusters import chains

__all__ = ["freeze_blocks", "let_statistics_go", "thaw"]

logger = logging.getLogger(__name__)


def freeze_blocks(
    subject: Subject,
    frozen: Mapping[str, Sequence[int]],
    transaction: Transaction | None = None,
    *,
    inputs: bool = True,
) -> list[nn.Parameter]:
    """Freeze blocks, and with `inputs` everything that runs before the lowest block that is trained.

    Embeddings and stems are frozen then: otherwise the backward pass would still walk through every frozen block to
    reach them. Heads, final norms and poolers stay trainable, but a head that is tied to the embeddings is frozen with
    them. A model with an encoder and a decoder has a lowest trained block in each.

    Returns:
        The parameters that were trainable and no longer are.
    """
    stacks, host = subject.stacks, subject.host
    chosen = [p for name, indices in frozen.items() for i in indices for p in stacks[name].blocks[i].parameters()]
    in_blocks = {id(p) for stack in stacks.values() for c in stack.containers for p in c.parameters()}
    for module in _upstream(subject, frozen) if inputs else ():
        # scalars (CLIP's temperature) belong to the head, wherever they are kept
        chosen += [p for p in module.parameters(recurse=False) if id(p) not in in_blocks and p.ndim > 0]
    changed = [p for p in {id(p): p for p in chosen}.values() if p.requires_grad]
    undo = transaction or Transaction()
    for parameter in changed:
        _set_trainable(parameter, False, undo)
    just_frozen = {id(parameter) for parameter in changed}
    for module in host.root.modules():
        # a norm that the user froze before keeps the behaviour that the user knows
        ours = isinstance(module, BatchNorm) and id(module.weight) in just_frozen
        if ours and _KEEP_STATISTICS not in forward_pre_hooks(module).values():
            undo.on_failure(module.register_forward_pre_hook(_KEEP_STATISTICS).remove)
    return changed


def let_statistics_go(root: nn.Module, frozen: Iterable[nn.Parameter]) -> None:
    """Have BatchNorms follow the model's mode again: those with these parameters, and those that are trained."""
    gone = {id(parameter) for parameter in frozen}
    for module in root.modules():
        keys = [key for key, hook in forward_pre_hooks(module).items() if hook is _KEEP_STATISTICS]
        if keys and (module.weight.requires_grad or id(module.weight) in gone):  # type: ignore[union-attr]
            for key in keys:
                del forward_pre_hooks(module)[key]
            module.train(root.training)


def thaw(parameters: Iterable[nn.Parameter], transaction: Transaction) -> None:
    """Make parameters trainable again that `freeze_blocks` froze."""
    for parameter in parameters:
        if not parameter.requires_grad:
            _set_trainable(parameter, True, transaction)


def _set_trainable(parameter: nn.Parameter, trainable: bool, transaction: Transaction) -> None:
    transaction.on_failure(partial(setattr, parameter, "grad", parameter.grad))
    transaction.on_failure(partial(parameter.requires_grad_, not trainable))
    parameter.requires_grad_(trainable)
    parameter.grad = None


def _upstream(subject: Subject, frozen: Mapping[str, Sequence[int]]) -> list[nn.Module]:
    """Modules that run before the lowest trained block of their part of the model; embeddings wherever they are."""
    host, stacks = subject.host, subject.stacks
    order = _execution_order(host)
    found: list[nn.Module] = [module for module in host.root.modules() if isinstance(module, nn.Embedding)]
    blocks = {id(m) for stack in stacks.values() for block in stack.blocks for m in block.modules()}
    for scope, chain in _scopes(stacks).items():
        trained = [block for s in chain for i, block in enumerate(s.blocks) if i not in frozen.get(s.name, ())]
        lowest = trained[0] if trained else chain[-1].blocks[-1]
        for module in host.root.get_submodule(scope).modules():
            if id(module) not in blocks and order.get(id(module), 1) < order.get(id(entrance(lowest)), 0):
                found.append(module)
    return found


def _scopes(stacks: Mapping[str, Stack]) -> dict[str, list[Stack]]:
    """Stacks that feed each other, under the path of the part of the model that is theirs alone ("": all of it)."""
    chained = [list(chain.values()) for chain in chains(stacks)]
    scopes = {}
    for chain in chained:
        parts = chain[0].name.split(".")
        others = [zip(parts, other[0].name.split("."), strict=False) for other in chained if other is not chain]
        alike = [list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)) for pairs in others]
        shared = max(map(len, alike), default=-1)
        scopes[".".join(parts[: shared + 1])] = chain
    return scopes


def _execution_order(host: Host) -> dict[int, int]:
    """When each module starts in a forward pass; the order in which they are registered where none can be run.

    BART and DeBERTa register a norm after the layers and run it before them, so registration alone would be wrong.
    """
    order: dict[int, int] = {}

    def note(module: nn.Module, args: Any) -> None:
        order.setdefault(id(module), len(order))

    registered = {id(module): place for place, module in enumerate(host.root.modules())}
    bare = any(p.device.type == "meta" for p in host.root.parameters()) and not is_offloaded(host.root)
    inputs = None if bare else host.example_inputs()
    if inputs is None:
        return registered
    try:
        with hooked(m.register_forward_pre_hook(note) for m in host.root.modules()), evaluating(host.root):
            host.root(**inputs)
    except Exception as error:
        logger.info("Freezing follows the order in which modules are registered: %s: %s", type(error).__name__, error)
        return registered
    return order


def _keep_statistics(module: nn.Module, args: Any) -> None:
    """Run a frozen BatchNorm on its running statistics, whatever mode the Trainer has put the model in."""
    if not module.weight.requires_grad:  # type: ignore[union-attr]
        module.training = False


# a copy is frozen as the model is; one that is loaded is not
_KEEP_STATISTICS = LocalHook(_keep_statistics, copied=True)
