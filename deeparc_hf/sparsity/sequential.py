"""Calibration block by block: each block sees what the blocks before it put out after they were changed.

Usually the blocks' calls are noted once for every batch, and then each block is run by itself on the inputs that are
held. Where blocks hand each other more than hidden states, the model is run up to the block at hand instead: nothing is
held, but time grows with the square of the number of blocks. Both give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..architectures import Host, Stack
from ..core.offload import holding
from ..observe.forward import forward
from ..observe.hooks import hidden_states, hooked

__all__ = ["EnoughError", "Inputs", "Passes", "block_by_block", "enough", "forward_until"]

Inputs = Mapping[str, Any]
Passes = Iterable[tuple[Inputs, Callable[[], Any]]]  # for each batch: its inputs, and what runs the model on them
_STATELESS = (Tensor, bool, int, float, str, torch.dtype, torch.device)  # what can be handed over again


class EnoughError(Exception):
    """Ends a forward pass where no more of it is needed."""


def enough(module: nn.Module, args: Any, output: Any) -> None:
    """A hook behind which no more of a forward pass is needed."""
    raise EnoughError


def forward_until(host: Host, inputs: Inputs, handles: Iterable[Any]) -> None:
    """A forward pass, as far as the hooks let it go; the hooks are removed."""
    with hooked(handles), suppress(EnoughError):
        forward(host, inputs, without_cache=True)


class _Call(NamedTuple):
    """What a block was called with. The hidden states are the first argument, or go by that name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Any:
        return self.args[0] if self.args else self.kwargs.get("hidden_states")

    def on(self, hidden: Tensor | None) -> _Call:
        """The same call on other hidden states; None: without any, for keeping."""
        if self.args:
            return _Call((hidden, *self.args[1:]), self.kwargs)
        return _Call((), {**self.kwargs, "hidden_states": hidden})

    def run(self, block: nn.Module) -> Any:
        return block(*self.args, **self.kwargs)


def block_by_block(
    host: Host,
    stack: Stack,
    batches: Callable[[], Iterator[Inputs]],
    last: int,
    together: Callable[[Callable[[], Any]], list[Any]],
) -> Iterator[Callable[[], Passes]]:
    """Go through the blocks of a stack in their order, up to the block `last`; each may be changed before the next.

    Args:
        host: the model, evaluating.
        batches: gives the calibration batches, as the model takes them; they are gone through again and again.
        together: runs a function in every process and returns all results; all go through the blocks alike.

    Yields:
        For each block what gives, for each batch, its inputs and what runs the block on it.
    """
    if not all(together(lambda: all(independent(host, stack, inputs) for inputs in islice(batches(), 1)))):
        for index in range(last + 1):
            yield partial(_passes_through, host, stack, batches, index)
        return
    calls: list[list[_Call]] = []
    hidden: list[Tensor] = []

    def begin() -> None:
        for inputs in batches():
            noted = _calls(host, stack, inputs, last)
            hidden.append(noted[0].hidden)
            calls.append([noted[0].on(None), *noted[1:]])

    def advance(index: int) -> None:
        with holding(stack.blocks[index]):
            for number, noted in enumerate(calls):
                hidden[number] = hidden_states(noted[index].on(hidden[number]).run(stack.blocks[index]))
                noted[index] = _Call((), {})  # not needed any more

    def passes(index: int) -> Passes:
        for inputs, noted, state in zip(batches(), calls, hidden, strict=True):
            # a block may work on its input in place
            yield inputs, partial(noted[index].on(state.clone()).run, stack.blocks[index])

    together(begin)
    for index in range(last + 1):
        yield partial(passes, index)
        if index < last:
            together(partial(advance, index))


def _calls(
    host: Host, stack: Stack, inputs: Inputs, last: int, whole: bool = False, disturbed: bool = False
) -> list[_Call]:
    """The calls of the blocks up to `last` in a forward pass, which may be `disturbed` in the first; with hidden states
    only there, unless the calls are wanted `whole`.
    """
    calls: list[_Call] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = _Call(args, kwargs)
        first = not calls
        keeps = (whole or first) and isinstance(call.hidden, Tensor)
        calls.append(call.on(call.hidden.clone() if keeps else None))  # the block may work on it in place
        if len(calls) > last:
            raise EnoughError
        # another order of the features: whatever is chosen by them is chosen otherwise
        return call.on(call.hidden.flip(-1 if call.hidden.ndim == 3 else 1) * 1.5) if disturbed and first else None

    first_blocks = stack.blocks[: last + 1]
    forward_until(host, inputs, (block.register_forward_pre_hook(note, with_kwargs=True) for block in first_blocks))
    return calls


def independent(host: Host, stack: Stack, inputs: Inputs) -> bool:
    """Whether blocks hand each other nothing but hidden states, directly, and keep no state: tried on one batch, where
    what else they are called with must not change when the input of the first block does.
    """
    if stack.beside:
        return False  # no block can be run by itself
    blocks = stack.blocks
    outputs: list[Any] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        hidden = hidden_states(output)
        outputs.append(hidden.clone() if isinstance(hidden, Tensor) else None)

    with hooked(block.register_forward_hook(keep) for block in blocks):
        seen = _calls(host, stack, inputs, len(blocks), whole=True)
    given = [call.hidden for call in seen]
    known = [leaf for call in seen for leaf in _leaves(call.on(None))]
    if not (
        len(seen) == len(blocks)
        and all(leaf is None or isinstance(leaf, _STATELESS) for leaf in known)
        and all(isinstance(hidden, Tensor) for hidden in [*given, *outputs])
        and all(map(torch.equal, outputs, given[1:]))
        and torch.equal(hidden_states(seen[0].on(given[0].clone()).run(blocks[0])), outputs[0])
    ):
        return False
    again = _calls(host, stack, inputs, len(blocks) - 1, disturbed=True)
    found = [leaf for call in again for leaf in _leaves(call.on(None))]
    return len(found) == len(known) and all(map(_same, known, found))


def _passes_through(host: Host, stack: Stack, batches: Callable[[], Iterator[Inputs]], index: int) -> Passes:
    """Runs of the model up to the end of one block."""

    def run(inputs: Inputs) -> None:
        forward_until(host, inputs, (block.register_forward_hook(enough) for block in (stack.blocks[index],)))

    for inputs in batches():
        yield inputs, partial(run, inputs)


def _leaves(value: Any) -> Iterator[Any]:
    """What nested tuples, lists and dicts hold, names included."""
    if isinstance(value, (tuple, list)) or type(value) is dict:
        for part in chain(*value.items()) if type(value) is dict else value:
            yield from _leaves(part)
    else:
        yield value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
