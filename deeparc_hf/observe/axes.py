"""What the dimensions of a block's output mean: features, samples, positions, and which positions are padding. Shapes
alone do not tell, so a few samples are run twice, one sample and some padding changed, and it is seen what changes.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..architectures import Host, Stack
from ..errors import CalibrationError
from .batches import batch_size, padding_masks
from .forward import evaluating, forward, seed_random
from .hooks import given_hidden_states, hidden_states, hooked
from .trials import Changed, changed, trials

__all__ = ["SIDE_BY_SIDE", "Axes", "Padding", "find_axes"]

_OTHER_MASK = re.compile(r"(pixel|feature|frame|image|audio|patch)\w*_mask$")
_MAPS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)

logger = logging.getLogger(__name__)


# why the samples of a stack cannot be compared one by one
SIDE_BY_SIDE = (
    "the positions of all samples stand side by side in what its blocks put out, and which of them belong to a sample "
    "cannot be told (rows='tokens' compares them all)"
)


@dataclass(frozen=True)
class Padding:
    """Which positions count, as `Axes.rows` orders them (None: all); whether there is padding, not known where."""

    mask: Tensor | None
    unknown: bool = False


@dataclass(frozen=True)
class Axes:
    """The dimensions of what the blocks of a stack put out.

    Attributes:
        features: the dimension of the features.
        samples: that of the samples; None: positions of all samples stand side by side (packed patches).
        mask: whose padding the positions follow, "encoder" or "decoder" as `padding_masks` names them; None: there is
            none.
        before: number of positions that stand before those of the mask (prefixes, patches before a text).
        others_count: whether positions beyond those of the mask count (patches), or are padding as well (up to a
            multiple of a window).
        unknown: whether padding changes the positions of this stack in a way that follows no mask.
        asked: whether there was a mask to find this out with.
    """

    features: int
    samples: int | None
    mask: str | None = None
    before: int = 0
    others_count: bool = True
    unknown: bool = False
    asked: bool = False

    def rows(self, hidden: Tensor) -> Tensor:
        """A block's output as (samples, positions, features). Without samples each position is one."""
        hidden = self._in_order(hidden)
        if self.samples is None:
            return hidden.reshape(-1, 1, hidden.shape[-1])
        return hidden.reshape(len(hidden), -1, hidden.shape[-1])

    def rows_at(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Some of the `rows`, (N, features), by their numbers over all samples. Images are not copied whole for it."""
        hidden = self._in_order(hidden)
        if hidden.is_contiguous():
            return hidden.view(-1, hidden.shape[-1])[positions]
        return hidden[torch.unravel_index(positions, hidden.shape[:-1])]

    def extent(self, shape: Sequence[int]) -> tuple[int, int]:
        """Of a block's output of this shape: the number of samples, and of positions of each."""
        everything = math.prod(shape) // shape[self.features]
        count = everything if self.samples is None else shape[self.samples]
        return count, everything // count

    def _in_order(self, hidden: Tensor) -> Tensor:
        """A view with the samples first, if there are any, and the features last."""
        hidden = hidden.movedim(self.features, -1)
        return hidden if self.samples is None else hidden.movedim(self._place, 0)

    def padding(self, inputs: Mapping[str, Any], shape: Sequence[int]) -> Padding:
        """Which positions of a batch count, for a block's output of this shape."""
        masks = padding_masks(inputs)
        # where the first batch had no mask, those of later ones are taken for the positions' own if they are as many
        mask = masks[self.mask] if self.mask is not None else None if self.asked else masks["encoder"]
        text = masks["encoder"]
        if mask is None or self.samples is None:
            padded = text is not None and not bool(text.all())
            return Padding(None, (padded and self.unknown) or _images_are_padded(inputs))
        mask = mask.reshape(-1, mask.shape[-1])
        count, positions = self.extent(shape)
        behind = positions - self.before - mask.shape[1]
        if len(mask) != count or behind < 0 or (self.mask is None and behind > 0):
            return Padding(None, not bool(mask.all()))
        full = functional.pad(mask, (self.before, behind), value=self.others_count)
        return Padding(full, behind + self.before > 0 and self.others_count and _images_are_padded(inputs))

    def as_put_out(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Values of shape (samples, positions) in the order in which a block's output of that shape has them."""
        if self.samples is None:
            return rows.reshape([size for d, size in enumerate(shape) if d != self.features])
        left = [size for d, size in enumerate(shape) if d not in (self.features, self.samples)]
        return rows.reshape(len(rows), *left).movedim(0, self._place)

    def mask_of(self, inputs: Mapping[str, Any], shape: Sequence[int]) -> tuple[Tensor | None, bool]:
        """The positions that count, in the shape of a block's output without the features; whether that is unknown."""
        padding = self.padding(inputs, shape)
        return None if padding.mask is None else self.as_put_out(padding.mask, shape), padding.unknown

    @property
    def _place(self) -> int:
        """The dimension of the samples among those that are left without the features."""
        assert self.samples is not None
        return self.samples - (self.features < self.samples)


def find_axes(host: Host, stacks: Iterable[Stack], inputs: Mapping[str, Any]) -> dict[str, Axes | str]:
    """Find out what the dimensions of the blocks' outputs mean.

    Returns:
        By stack name the axes, or the reason why the blocks cannot be compared. Stacks that these inputs do not reach
        are left out.

    Raises:
        CalibrationError: if the model cannot run on the inputs.
    """
    stacks = list({stack.name: stack for stack in stacks}.values())
    with evaluating(host.root):
        for trial in trials(host, inputs):
            try:
                plain = _outputs(host, stacks, trial, ask=True)
                break
            except CalibrationError as error:
                problem = error
        else:
            raise problem
        other = changed(host, trial)
        try:
            again = _outputs(host, stacks, other.inputs)
        except CalibrationError as error:
            logger.info("The axes of %s follow from shapes alone: %s", type(host.root).__name__, error)
            again = {}
    return {name: _axes_of(host, seen, again.get(name), trial, other) for name, seen in plain.items()}


@dataclass(frozen=True)
class _Seen:
    """What the middle block of a stack put out; features is None too where it could not be told."""

    stack: Stack
    output: Any
    features: int | None
    reshapes: bool  # whether the block is given another shape than it puts out


def _outputs(host: Host, stacks: Sequence[Stack], inputs: Mapping[str, Any], ask: bool = False) -> dict[str, _Seen]:
    """What a block of each stack puts out; with `ask`, the dimension of its features is looked for."""
    outputs: dict[str, Any] = {}
    calls: dict[str, tuple[Any, Any]] = {}

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[name] = _copied(args), _copied(kwargs)

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        hidden = hidden_states(output)
        outputs[name] = hidden.detach().clone() if isinstance(hidden, Tensor) else hidden

    middle = {stack.name: stack.blocks[len(stack) // 2] for stack in stacks}
    handles = (block.register_forward_hook(partial(after, name)) for name, block in middle.items())
    asked = (
        block.register_forward_pre_hook(partial(before, name), with_kwargs=True)
        for name, block in middle.items()
        if ask
    )
    with hooked(chain(handles, asked)):
        seed_random(host.root, 0)  # ViLT takes its patches in a random order
        forward(host, inputs, without_cache=True)
    seen = {}
    # after the pass: within it, what transformers collects of each block would be collected again
    for stack in (stack for stack in stacks if stack.name in outputs):
        output, features, reshapes = outputs[stack.name], None, False
        if stack.name in calls and isinstance(output, Tensor):
            call = calls[stack.name]
            read, free = given_hidden_states(*call), len(stack) > 1 and len(stack) // 2 not in stack.pinned
            reshapes = isinstance(read, Tensor) and read.shape != output.shape and free
            features = _features(middle[stack.name], *call, output)
        seen[stack.name] = _Seen(stack, output, features, reshapes)
    return seen


def _features(block: nn.Module, args: Any, kwargs: Any, output: Tensor) -> int | None:
    """The dimension in which all of a block's output changes where its last maps' outputs change at one place."""
    ran: list[nn.Module] = []

    def note(module: nn.Module, args: Any, result: Any) -> None:
        if isinstance(result, Tensor) and result.numel():
            ran.append(module)

    def run(handles: Iterable[Any]) -> Tensor | None:
        with hooked(handles):
            try:
                found = hidden_states(block(*_copied(args), **_copied(kwargs)))
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                return None  # a block that keeps state, and cannot be run a second time
        return found if isinstance(found, Tensor) and found.shape == output.shape else None

    plain = run(module.register_forward_hook(note) for module in block.modules() if isinstance(module, _MAPS))
    if plain is None:
        return _features_by_size(block, output)
    for module in list(dict.fromkeys(reversed(ran)))[:3]:
        changed = run(each.register_forward_hook(_at_one_place) for each in (module,))
        if changed is None:
            continue
        far = (changed - plain).abs() > 1e-6 * plain.abs().max().clamp(min=1e-30)
        wide = [d for d in range(far.ndim) if int(_along(far, d).sum()) > 1]
        if len(wide) == 1:
            return wide[0]
    return _features_by_size(block, output)


def _at_one_place(module: nn.Module, args: Any, result: Tensor) -> Tensor:
    """The output of a linear map, all its features changed at one position of one sample."""
    result = result.clone()
    if isinstance(module, (nn.Linear, Conv1D)):
        place: tuple[Any, ...] = (*(0,) * (result.ndim - 1), slice(None))
    else:  # a convolution; without a batch dimension the features come first
        place = (*(0,) * (result.ndim - len(module.kernel_size) - 1), slice(None), *(0,) * len(module.kernel_size))
    values = result[place]
    signs = torch.ones_like(values)
    signs[::2] = -1
    result[place] = values + signs * (10 * result.float().std(correction=0) + 1).to(values)
    return result


def _features_by_size(block: nn.Module, output: Tensor) -> int | None:
    """The one dimension that is as large as a norm or a bias of the block; the last of up to three where two are."""
    sizes = {len(parameter) for parameter in block.parameters() if parameter.ndim == 1}
    fitting = [d for d, size in enumerate(output.shape) if size in sizes]
    if len(fitting) == 1:
        return fitting[0]
    return output.ndim - 1 if output.ndim < 4 and output.ndim - 1 in fitting else None


def _axes_of(host: Host, seen: _Seen, again: _Seen | None, trial: Mapping[str, Any], changed: Changed) -> Axes | str:
    """Put together what the two runs showed of a stack."""
    output, size = seen.output, batch_size(trial)
    if not isinstance(output, Tensor):
        return f"its blocks put out a {type(output).__name__} where hidden states were expected"
    shape = tuple(output.shape)
    if seen.reshapes:
        return "its blocks change the shape of what they are given, so they are no residual blocks"
    if seen.features is None:
        return (
            f"its blocks put out a tensor of shape {shape}, and which of its dimensions is that of the features "
            "cannot be told"
        )
    far = None
    if again is not None and isinstance(again.output, Tensor) and again.output.shape == output.shape:
        bound = 1e-4 if output.dtype in (torch.float32, torch.float64) else 1e-2
        # by position: a few may be larger than the others by orders of magnitude
        size_there = output.float().abs().amax(dim=seen.features, keepdim=True)
        far = (again.output.float() - output.float()).abs() > bound * size_there
    samples = _samples(shape, seen.features, size, far, changed)
    axes = Axes(seen.features, samples)
    if samples is None:
        return axes
    return _with_padding(host, axes, seen.stack, shape, trial, far, changed)


def _samples(shape: Sequence[int], features: int, size: int, far: Tensor | None, changed: Changed) -> int | None:
    """The dimension of which the first sample's share changes with it, and the next one's does not."""
    if far is not None and changed.first and bool(far.any()) and size > 1:
        for d in (d for d in range(len(shape)) if d != features and shape[d] % size == 0):
            share = shape[d] // size
            moved = _along(far, d)
            if bool(moved[:share].any()) and not bool(moved[share : 2 * share].any()):
                return d
    # the model mixes samples, or could not be asked: as nearly all do
    return 0 if features != 0 and shape[0] == size and len(shape) > 2 else None


def _with_padding(
    host: Host,
    axes: Axes,
    stack: Stack,
    shape: Sequence[int],
    trial: Mapping[str, Any],
    far: Tensor | None,
    changed: Changed,
) -> Axes:
    """Axes that know which mask the positions of a stack follow, and where they stand."""
    masks = padding_masks(trial)
    count, positions = axes.extent(shape)
    # labels may be classes instead of tokens
    if stack.side == "decoder" and masks["decoder"] is not None and masks["decoder"].shape[1] == positions:
        return replace(axes, mask="decoder", asked=True)
    text = masks["encoder"]
    if text is None:
        return axes
    axes = replace(axes, asked=True)
    text = text.reshape(-1, text.shape[-1])
    length = text.shape[1]
    # images beside the text
    reads_more = "input_ids" in trial and any(
        isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 2 and "embeds" not in key
        for key, v in trial.items()
    )
    fits = len(text) == count and positions >= length
    if far is None or not changed.padding:  # nothing is known but sizes
        if fits and positions == length:
            return replace(axes, mask="encoder")
        return axes if reads_more and host.senses(stack.name) else replace(axes, unknown=True)
    share = count // batch_size(trial)
    moved = axes.rows(far.float())[-share:].any(dim=2)  # the last sample's positions that its padding changes
    if not bool(moved.any()):
        # some embeddings are zero where the text is padded; what reads something else does not change either
        if fits and positions == length and stack.side != "decoder" and not reads_more:
            return replace(axes, mask="encoder")
        # sound, in fewer frames than samples
        return axes if fits or "input_ids" in trial else replace(axes, unknown=True)
    if not fits:
        return replace(axes, unknown=True)
    padded = ~text[-share:]
    for before in range(positions - length + 1):
        if not bool((moved & ~functional.pad(padded, (before, positions - before - length))).any()):
            return replace(axes, mask="encoder", before=before, others_count=reads_more)
    # where as many positions are changed the model attends to its padding
    return replace(axes, mask="encoder") if positions == length else replace(axes, unknown=True)


def _images_are_padded(inputs: Mapping[str, Any]) -> bool:
    """Whether a mask of pixels, frames or features says that some are padding; their positions are not known."""
    found = (value for key, value in inputs.items() if _OTHER_MASK.search(key) and isinstance(value, Tensor))
    return any(not bool(mask.bool().all()) for mask in found)


def _along(far: Tensor, dimension: int) -> Tensor:
    """Along a dimension, whether anything is true there."""
    return far.movedim(dimension, 0).flatten(1).any(dim=1)


def _copied(value: Any) -> Any:
    """The same arguments, hidden states and other tensors copied: a block may work on them in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(item) for item in value)
    return {key: _copied(item) for key, item in value.items()} if type(value) is dict else value
