"""Hooks on blocks while something is looked at: what a block is given and puts out, and blocks that are skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..architectures import Stack
from ..architectures.base import Heads
from ..architectures.joined import entrance, outlet
from ..core.interrupts import uninterrupted
from ..errors import CalibrationError

__all__ = ["did_not_run", "given_hidden_states", "hidden_states", "hooked", "skipped", "with_hidden_states"]


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Within, hooks are at work; afterwards they are removed, after Ctrl-C too. Give an iterator that registers them as
    it goes: it may fail, and Ctrl-C waits for it.
    """
    made: list[RemovableHandle] = []
    try:
        with uninterrupted():
            made.extend(handles)
        yield
    finally:
        try:
            _remove(made)
        except KeyboardInterrupt:  # it may have come before the first
            _remove(made)
            raise


def _remove(handles: Iterable[RemovableHandle]) -> None:
    with uninterrupted():
        for handle in handles:
            handle.remove()


def hidden_states(output: Any) -> Tensor:
    """The hidden states in what a block puts out: the output itself, or the first entry of a tuple or ModelOutput."""
    if isinstance(output, Tensor):
        return output
    found: Tensor = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return found


def given_hidden_states(args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The hidden states that a block is called with: its first argument, else that of the name, else a tensor."""
    if args:
        return args[0]
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    return next((value for value in kwargs.values() if isinstance(value, Tensor) and value.is_floating_point()), None)


def with_hidden_states(output: Any, hidden: Tensor) -> Any:
    """What a block puts out, with other hidden states in it."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, (tuple, list)):
        return _filled(output, (hidden, *output[1:]))
    return type(output)(**{key: hidden if i == 0 else value for i, (key, value) in enumerate(output.items())})


@contextmanager
def skipped(stack: Stack, index: int, must_run: bool = True) -> Iterator[Callable[[], bool]]:
    """Within, a block gives out what it is given: the hidden states, and what else it puts out in the form of another
    tensor that it is given (the second of two streams). The rest (T5's position bias, attentions) stays.

    It is skipped in its `forward`, so that all hooks, also those by which transformers collects hidden states, see it
    as skipped.

    Yields:
        Whether the block has run, to ask.

    Raises:
        CalibrationError: in the forward pass, if the block changes the shape of its input; at the end, if it did not
            run and must.
    """
    block = stack.blocks[index]
    enters, leaves = entrance(block), outlet(block)
    enter, leave = enters.forward, leaves.forward
    ran, first, given = False, None, []

    def note(*args: Any, **kwargs: Any) -> None:
        nonlocal ran, first, given
        ran, first = True, given_hidden_states(args, kwargs)
        others = [tensor for tensor in _tensors((args, kwargs)) if tensor is not first]
        given = [tensor.clone() for tensor in (first, *others) if isinstance(tensor, Tensor)]  # it may work in place

    def noting(*args: Any, **kwargs: Any) -> Any:
        note(*args, **kwargs)
        return enter(*args, **kwargs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal first, given
        if enters is leaves:
            note(*args, **kwargs)
        output = leave(*args, **kwargs)
        hidden = next(_tensors(output), None)
        # of this call alone: a last part that ran without the first would put out what an earlier call was given
        (read, passed), first, given = (first, given), None, []
        if not isinstance(read, Tensor) or hidden is None or hidden.shape != read.shape:
            raise CalibrationError(
                f"Block {index} of {stack.name} cannot be skipped: it is given {_form(read)} and puts out "
                f"{_form(hidden_states(output))}. It is no residual block, so it cannot be left out."
            )
        return _passed_through(output, passed)

    with ExitStack() as replaced:
        for heads in stack.heads:
            replaced.enter_context(_without_head(heads, index))
        if enters is not leaves:
            replaced.enter_context(_computing(enters, noting))
        replaced.enter_context(_computing(leaves, forward))
        yield lambda: ran
    if must_run and not ran:
        raise did_not_run(stack, index)


@contextmanager
def _without_head(heads: Heads, index: int) -> Iterator[None]:
    """Within, the head of a block is one that adds nothing, or the one before it."""
    own = heads.container[index]
    try:
        with uninterrupted():
            heads.container[index] = _Nothing(own) if heads.adds else _Before(heads.container, index)
        yield
    finally:
        with uninterrupted():
            heads.container[index] = own


class _Nothing(nn.Module):
    """Puts out zeros in the form of what a module does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._form = (module,)  # not as a part of it

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(self._form[0](*args, **kwargs))


class _Before(nn.Module):
    """Puts out what the head before one does, which may stand for another itself; before the first there is none."""

    def __init__(self, container: nn.ModuleList, index: int) -> None:
        super().__init__()
        self._heads, self._index = (container, container[index]), index  # not as parts of it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        container, own = self._heads
        head = container[self._index - 1] if self._index else own
        return head(*args, **kwargs)


@contextmanager
def _computing(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, a module has another `forward`."""
    own = vars(module).get("forward")
    try:
        with uninterrupted():
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        with uninterrupted():
            if own is None:
                vars(module).pop("forward", None)
            else:
                module.forward = own  # type: ignore[method-assign]


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of floating numbers in arguments or an output, in their order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    for part in parts:
        yield from _tensors(part)


def _passed_through(output: Any, given: list[Tensor]) -> Any:
    """An output in which each tensor is the next of those given (which are used up) that has its form."""
    if isinstance(output, Tensor):
        form = (output.shape, output.dtype)
        place = next((i for i, tensor in enumerate(given) if (tensor.shape, tensor.dtype) == form), None)
        return output if place is None else given.pop(place)
    if isinstance(output, Mapping):
        return type(output)(**{key: _passed_through(value, given) for key, value in output.items()})
    if isinstance(output, (tuple, list)):
        return _filled(output, [_passed_through(value, given) for value in output])
    return output


def _filled(output: tuple[Any, ...] | list[Any], values: Sequence[Any]) -> Any:
    """A tuple, a named tuple (Reformer's blocks put out one) or a list like another, with other values."""
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)


def did_not_run(stack: Stack, index: int) -> CalibrationError:
    """What to raise where a block was not reached."""
    return CalibrationError(
        f"Block {index} of {stack.name} did not run in the forward pass over a calibration batch. Give batches that "
        "reach every part of the model (text and images for a model of both), and switch layer skipping (LayerDrop) "
        "off."
    )


def _form(hidden: Any = None) -> str:
    if isinstance(hidden, Tensor):
        return f"a tensor of shape {tuple(hidden.shape)}"
    return "no tensor" if hidden is None else f"a {type(hidden).__name__}"
