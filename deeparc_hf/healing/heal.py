"""Healing: where blocks were removed, the last linear map of the kept block before them is refitted in closed form.

The block's sum before its end (`block_ends.Ending`), s = scale * map(x) + rest, should have become that of the last
removed block: a change of the map is fitted by ridge least squares, from its inputs x to what is missing, in float64.
Where a norm makes the output of the sum (BERT), the kept block's takes over the last removed one's parameters.

Prior art: ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819: a linear map in place of removed blocks, folded into the
down projection) and LLM-Streamline (Chen et al. 2024, arXiv 2403.19135: a small network trained in their place).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..architectures import Host, Stack, Subject, describe
from ..architectures.joined import JoinedBlock
from ..checkpoint.record import PrunedConfig, current_layout
from ..checkpoint.weights_mark import mark_of_model
from ..core.distributed import gather
from ..core.offload import holding
from ..core.shards import moves_together
from ..core.transaction import Transaction
from ..errors import CalibrationError, SurgeryError
from ..observe.batches import batch_size, cut
from ..observe.calibration import Calibration, Idle
from ..observe.forward import evaluating, forward
from ..observe.hooks import hooked, skipped
from ..observe.rows import with_axes
from ..sparsity.sequential import enough, forward_until
from .block_ends import Ending, find_ending
from .fit import SiteFit
from .sensitivity import output_sensitivities
from .sites import Healing, refuse_healing, sites_of

__all__ = ["apply_healing", "find_endings", "fit_sites", "heal_model", "healed_tensors", "note_healing"]


def fit_sites(
    subject: Subject, removed: Mapping[str, Sequence[int]], calibration: Calibration, *, progress: bool = True
) -> list[Healing]:
    """Fit the changes of all sites, one site after another in forward order. Changes nothing.

    Each site takes a forward and a backward pass over the data: its target is what the unpruned model gives, its input
    what the model gives with the blocks before it removed and healed already.

    Args:
        subject: the unpruned model.
        removed: the blocks that go, by stack.
        calibration: the data, which is gone through once for each site.
    """
    host, stacks = subject.host, subject.stacks
    refuse_healing(host)
    in_order = {name: removed[name] for name in stacks if name in removed}
    order = {name: number for number, name in enumerate(stacks)}
    watched = [SiteFit(host, stacks[site.stack], site) for site in sites_of(in_order)]
    if len(watched) > 1 and not calibration.can_repeat:
        raise CalibrationError(
            f"Healing goes through the calibration data once for each of the {len(watched)} sites, and an iterator can "
            "be used once. Give a list of batches."
        )
    healings: list[Healing] = []
    for number, watch in enumerate(watched, 1):
        before = [
            (stacks[name], index)
            for name in in_order
            for index in sorted(in_order[name])
            if (order[name], index) < (order[watch.site.stack], watch.site.kept)
        ]
        healed = list(zip(watched, healings, strict=False))
        bar = calibration.bar(f"Healing site {number} of {len(watched)}", progress)
        with bar as advance, holding(watch.kept, watch.last):
            look = partial(_look, watched, watch, before, healed, calibration, advance)
            healings.append(watch.finish(calibration.together(look)))
    return healings


def apply_healing(healing: Healing, block: nn.Module, transaction: Transaction) -> None:
    """Change the map of the kept block, in place; nothing where the site is left alone."""
    if healing.reason is None and healing.ending is not None and healing.change is not None:
        with holding(*_parts(healing, block), transaction=transaction):
            _apply(healing, healing.ending, healing.change, block, transaction)


def healed_tensors(healing: Healing, block: nn.Module) -> dict[str, Tensor]:
    """The tensors of the kept block, by name, that its healing changes, as they become. The block stays as it is."""
    with holding(*_parts(healing, block)):
        own = {
            f"{path}.{name}": tensor.detach()
            for path in _paths(healing)
            for part in [block.get_submodule(path)]
            for name, tensor in chain(part.named_parameters(), part.named_buffers())
        }
        before = {name: tensor.clone() for name, tensor in own.items()}
        undo = Transaction()
        try:
            apply_healing(healing, block, undo)
            return {name: tensor.clone() for name, tensor in own.items() if not torch.equal(tensor, before[name])}
        finally:
            undo.roll_back()


def _paths(healing: Healing) -> list[str]:
    """Of the modules of a kept block that its healing changes."""
    ending = healing.ending
    if healing.reason is not None or ending is None:
        return []
    return [path for path in (ending.map, ending.batch_norm, ending.final) if path is not None]


def _parts(healing: Healing, block: nn.Module) -> list[nn.Module]:
    """The modules of a kept block that its healing changes."""
    return [block.get_submodule(path) for path in _paths(healing)]


def _apply(healing: Healing, ending: Ending, change: Tensor, block: nn.Module, transaction: Transaction) -> None:
    paths = (ending.map, ending.batch_norm, ending.final)
    parts: list[Any] = [None if path is None else block.get_submodule(path) for path in paths]
    # not state_dict(), which puts weights back into shards
    for tensor in (t.detach() for part in parts if part is not None for t in chain(part.parameters(), part.buffers())):
        transaction.on_failure(partial(tensor.copy_, tensor.clone()))
    module, norm, final = parts
    with torch.no_grad():
        change = change.T if isinstance(module, Conv1D) else change.reshape(module.weight.shape)
        module.weight.add_(change.to(module.weight))
        intercept = healing.intercept
        if norm is not None and healing.statistics is not None:
            _refit_norm(norm, ending.scale, healing.statistics, intercept)
        elif intercept is not None:
            module.bias.add_(intercept.to(module.bias))
        for name, value in healing.final.items():
            final.get_parameter(name).copy_(value)


def find_endings(host: Host, blocks: Sequence[nn.Module], inputs: Mapping[str, Any]) -> dict[nn.Module, Ending | str]:
    """Find how blocks end, or why not in a way that can be refitted, by running each of them by itself."""
    calls: dict[nn.Module, tuple[Any, Any]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[module] = (tuple(a.clone() if isinstance(a, Tensor) else a for a in args), dict(kwargs))

    with hooked(block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks):
        forward(host, inputs, without_cache=True)
    found: dict[nn.Module, Ending | str] = {}
    for block in blocks:
        if isinstance(block, JoinedBlock):
            found[block] = "its parts stand in several lists, and it cannot be run by itself"
            continue
        if block not in calls:
            found[block] = "it did not run on the calibration data"
            continue
        args, kwargs = calls[block]

        def run(block: nn.Module = block, args: Any = args, kwargs: Any = kwargs) -> Any:
            return block(*(a.clone() if isinstance(a, Tensor) else a for a in args), **kwargs)

        try:
            found[block] = find_ending(block, run)
        except torch.OutOfMemoryError:  # the Trainer may try a smaller batch
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            found[block] = f"it cannot be run by itself ({type(error).__name__}: {error})"
    return found


def _look(
    watched: Sequence[SiteFit],
    watch: SiteFit,
    before: Sequence[tuple[Stack, int]],
    healed: Sequence[tuple[SiteFit, Healing]],
    calibration: Calibration,
    advance: Callable[[int], None],
) -> Any:
    host, seen, is_first = watch.host, calibration.first_number, watch is watched[0]
    with evaluating(host.root):
        batches, axes = with_axes(host, [watch.stack], calibration.inputs(host))
        watch.orient(axes.get(watch.stack.name))
        for inputs in batches:
            if is_first:
                is_first = False
                blocks = list(dict.fromkeys(block for each in watched for block in (each.kept, each.last)))
                endings = find_endings(host, blocks, cut(inputs, 2))
                for each in watched:
                    with holding(each.kept, each.last):
                        each.settle([endings[each.kept], endings[each.last]])
            if moves_together(host.root):  # where one leaves the site alone, the others would wait for it
                watch.reason = next(filter(None, gather(lambda: watch.reason)), None)
            found = None if watch.reason is not None else _pass(watch, before, healed, inputs)
            if isinstance(inputs, Idle):
                continue
            if watch.reason is None:
                watch.take(inputs, seen, found)
            seen += batch_size(inputs)
            advance(batch_size(inputs))
    return watch.part()


def _pass(
    watch: SiteFit, before: Sequence[tuple[Stack, int]], healed: Sequence[tuple[SiteFit, Healing]], inputs: Any
) -> Tensor | None:
    """Run a batch through the whole model; where blocks before the site are gone, once more up to the kept one.

    Returns:
        How sensitive the outputs are to what the last removed block puts out; None where it cannot be told.
    """

    apart = not moves_together(watch.host.root)  # else a pass that ends early would leave the others waiting

    # hooks run in the order in which they are made: what is noted is noted before a pass ends
    def handles(*which: str, end: nn.Module | None = None) -> Iterator[Any]:
        for each in which:
            yield from watch.hooks(each)
        if end is not None and apart:
            yield end.register_forward_hook(enough)

    together = ("last", *(() if before else ("kept",)))
    features = -1 if watch.axes is None else watch.axes.features
    sensitivities = None
    if watch.unit != 0.0:  # else they were not found for the first batch, and are not looked for again
        with hooked(handles(*together)):
            sensitivities = output_sensitivities(watch.host, {watch.last: features}, inputs)
    if sensitivities is None:
        forward_until(watch.host, inputs, handles(*together, end=watch.last))
    found = None if sensitivities is None else sensitivities.get(watch.last)
    if not before:
        return found
    with ExitStack() as inside:
        for earlier, healing in healed:
            inside.enter_context(holding(*(_parts(healing, earlier.kept) if apart else [earlier.kept])))
        undo = Transaction()
        inside.callback(undo.roll_back)
        for earlier, healing in healed:
            apply_healing(healing, earlier.kept, undo)
        for stack, index in before:
            # not all of them need run before the site: a model of texts and images has two towers
            inside.enter_context(skipped(stack, index, must_run=False))
        forward_until(watch.host, inputs, handles("kept", end=watch.kept))
    return found


def _refit_norm(norm: Any, scale: Tensor, statistics: tuple[Tensor, Tensor], intercept: Tensor | None) -> None:
    """Give a BatchNorm the statistics of the changed map, so that it computes what it would have."""
    mean, variance = statistics[0], statistics[1].clamp(min=0)
    moved = mean - norm.running_mean.double().to(mean.device) + (0.0 if intercept is None else intercept)
    scale = scale.to(mean)
    norm.bias.add_((scale * moved).to(norm.bias))
    norm.weight.copy_(scale * (variance + norm.eps).sqrt())
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


def heal_model(
    model: nn.Module, original: nn.Module, dataloader: Iterable[Any], *, samples: int = 512, progress: bool = True
) -> list[Healing]:
    """Heal a model right after blocks were removed from it: refit the kept block before each removal site, in closed
    form, in place.

    Args:
        model: the pruned model, not trained since the removal.
        original: the model that it was pruned from.
        dataloader: calibration batches. Use training data, never the data you evaluate on.
        samples: the most samples to use; each fifth is held out at first, to choose the ridge's strength and to see
            whether a site gains.
        progress: show a progress bar on a terminal.

    Returns:
        The outcome at each site; a site that does not gain is left as it is, with the reason.

    Raises:
        SurgeryError: if nothing was removed, or the kept blocks' weights are not those of the original.
    """
    whole, smaller = describe(original), describe(model)
    refuse_healing(smaller.host)
    record = PrunedConfig.from_model(smaller)
    try:
        step = record.layout.since(current_layout(whole))
        foreign = next((name for name in whole.stacks if name not in smaller.stacks), None)
    except ValueError as error:
        foreign = str(error)
    if foreign is not None:
        raise SurgeryError(
            f"The two models do not belong together: {foreign!r} of the pruned one does not come from the original."
        )
    if not step.removed:
        raise SurgeryError(
            "No block was removed from the model, so there is nothing to heal. Give the pruned model first, then the "
            "original."
        )
    for name, indices in step.kept.items():
        for block, index in zip(smaller.stacks[name].blocks, indices, strict=True):
            odd = _odd(block, whole.stacks[name].blocks[index])
            if odd is not None:
                raise SurgeryError(
                    f"{odd} of block {index} of {name} is not the same in both models: the pruned one was trained "
                    "after the removal, and its sites are fitted on the original's activations. Heal right after the "
                    "removal (heal='lstsq' of prune_model)."
                )
    healings = fit_sites(whole, step.removed, Calibration(dataloader, samples), progress=progress)
    with Transaction() as undo:
        for healing in healings:
            blocks = smaller.stacks[healing.site.stack].blocks
            apply_healing(healing, blocks[step.kept[healing.site.stack].index(healing.site.kept)], undo)
        note_healing(smaller.host, healings)
    return healings


def _odd(block: nn.Module, other: nn.Module) -> str | None:
    """The first tensor of a block that is not the same in another; None where all are."""
    with holding(block, other):
        ours, theirs = block.state_dict(), other.state_dict()
        return next((k for k in ours if k not in theirs or not torch.equal(ours[k].to(theirs[k]), theirs[k])), None)


def note_healing(host: Host, healings: Sequence[Healing]) -> PrunedConfig:
    """Have the model's record say what was healed, in the entry of the last pruning."""
    stored = host.record()
    stored["iterations"][-1]["healing"] = [healing.to_dict() for healing in healings]
    record = PrunedConfig.from_dict(stored).with_mark(mark_of_model(host.root))
    host.set_record(record.to_dict())
    return record
