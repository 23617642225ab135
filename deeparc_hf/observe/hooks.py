"""Hooks on blocks while something is looked at: what a block is given and puts out, and blocks that are skipped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..architectures import Stack
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
        return type(output)((hidden, *output[1:]))
    return type(output)(**{key: hidden if i == 0 else value for i, (key, value) in enumerate(output.items())})


@contextmanager
def skipped(stack: Stack, index: int, must_run: bool = True) -> Iterator[None]:
    """Within, a block gives out the hidden states that it is given; what else it puts out (T5's position bias) stays.

    Raises:
        CalibrationError: in the forward pass, if the block changes the shape of its input; at the end, if it did not
            run and must.
    """
    block = stack.blocks[index]
    given: list[Tensor] = []
    ran = False

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = given_hidden_states(args, kwargs)
        given[:] = [hidden.clone()] if isinstance(hidden, Tensor) else []  # the block may work on it in place

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal ran
        ran = True
        hidden = hidden_states(output)
        if not given or not isinstance(hidden, Tensor) or hidden.shape != given[0].shape:
            raise CalibrationError(
                f"Block {index} of {stack.name} cannot be skipped: it is given {_form(*given)} and puts out "
                f"{_form(hidden)}. It is no residual block, so it cannot be left out."
            )
        return with_hidden_states(output, given.pop())

    def handles() -> Iterator[RemovableHandle]:
        # before other hooks: those by which transformers collects hidden states must see the block as skipped
        yield block.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        yield block.register_forward_hook(after, prepend=True)

    with hooked(handles()):
        yield
    if must_run and not ran:
        raise did_not_run(stack, index)


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
