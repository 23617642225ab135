"""Forward passes that leave no trace: modes, random states and what a model changes about itself are put back; blocks
can be skipped.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..architectures import Host, Stack
from ..errors import CalibrationError, DeepArcError
from .batches import without_labels

__all__ = [
    "did_not_run",
    "evaluating",
    "forward",
    "given_hidden_states",
    "hidden_states",
    "removed",
    "require_weights",
    "skipped",
    "with_hidden_states",
]

_REGISTERED = ("_modules", "_buffers")


def hidden_states(output: Any) -> Tensor:
    """The hidden states in what a block puts out: the output itself, or the first entry of a tuple or ModelOutput."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = next(iter(output.values()))
        return output
    return output[0]


def given_hidden_states(args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The hidden states that a block is called with: its first argument, else the one of that name, else its first
    tensor.
    """
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
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module's mode, its attributes and submodules, and all random states
    are what they were.

    Some models change themselves for good where inputs are short or long (BigBird's attention, rotary frequencies):
    that is undone too.
    """
    states = [(module, _state(module)) for module in model.modules()]
    configs = {
        id(c): c for c in (getattr(module, "config", None) for module in model.modules()) if hasattr(c, "problem_type")
    }
    problems = [
        (config, config.problem_type) for config in configs.values()
    ]  # some models note there what labels they were given
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, state in states:
            _put_back(module, state)
        for config, problem in problems:
            config.problem_type = problem


def forward(host: Host, inputs: Mapping[str, Any], without_cache: bool = False) -> Any:
    """Run the model on calibration inputs, without labels where it can do without; gives its output.

    Args:
        without_cache: make no cache of keys and values, which would hold on to them, and take them again when a block
            is run again.

    Raises:
        CalibrationError: if it cannot.
    """
    more = {"use_cache": False} if without_cache and host.takes_cache else {}
    bare = without_labels(host, inputs)
    try:
        try:
            return host.root(**{**bare, **more})
        except (AttributeError, TypeError, ValueError):
            if bare.keys() == inputs.keys():
                raise
            output = host.root(**{**inputs, **more})  # a forward that always makes a loss
            host.needs_labels = True
            return output
    except (CalibrationError, torch.OutOfMemoryError):  # the Trainer may try a smaller batch
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        shapes = ", ".join(
            f"{key}: {tuple(value.shape) if isinstance(value, Tensor) else value!r:.40}"
            for key, value in inputs.items()
        )
        raise CalibrationError(
            f"{type(host.root).__name__} cannot run on a calibration batch ({shapes}): {_told(error)}. Give batches "
            "as your training loop gives them to the model."
        ) from error


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

    # before other hooks: those by which transformers collects hidden states must see the block as skipped
    handles = [
        block.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        block.register_forward_hook(after, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if must_run and not ran:
        raise did_not_run(stack, index)


@contextmanager
def removed(handles: Sequence[Any]) -> Iterator[None]:
    """Within, hooks are at work; afterwards they are removed, whatever happened."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def did_not_run(stack: Stack, index: int) -> CalibrationError:
    """What to raise where a block was not reached."""
    return CalibrationError(
        f"Block {index} of {stack.name} did not run in the forward pass over a calibration batch. Give batches that "
        "reach every part of the model (text and images for a model of both), and switch layer skipping (LayerDrop) "
        "off."
    )


def require_weights(host: Host, error: type[DeepArcError] = CalibrationError, otherwise: str = "") -> None:
    """Refuse a model that has no weights in memory.

    Args:
        host: the model.
        error: what is raised.
        otherwise: what else can be done about weights that were never loaded; ends the message.

    Raises:
        DeepArcError: of the given kind, saying whether they lie on the disk (accelerate's offloading) or were never
            loaded.
    """
    bare = next((name for name, p in host.root.named_parameters() if p.device.type == "meta"), None)
    if bare is None:
        return
    if any(hasattr(module, "_hf_hook") for module in host.root.modules()):
        raise error(
            f"{bare} of {host.label} is kept outside of the model by accelerate: on the disk, or on the CPU beside an "
            "accelerator. Load the model without offloading: leave device_map out, or give one without 'disk' and "
            "'cpu'."
        )
    raise error(
        f"{bare} of {host.label} has no weights (meta device). Load the model's checkpoint with "
        f"from_pretrained.{otherwise}"
    )


def _state(module: nn.Module) -> dict[str, Any]:
    own = vars(module)
    return {
        **{key: value for key, value in own.items() if _is_own(key)},
        **{key: dict(own[key]) for key in _REGISTERED},
    }


def _put_back(module: nn.Module, state: Mapping[str, Any]) -> None:
    own = vars(module)
    for key in [key for key in own if _is_own(key) and key not in state]:
        del own[key]
    for key, value in state.items():
        if key not in _REGISTERED:
            own[key] = value
        elif list(map(id, own[key].values())) != list(map(id, value.values())) or own[key].keys() != value.keys():
            own[key].clear()
            own[key].update(value)


def _is_own(key: str) -> bool:
    # torch's and transformers' own bookkeeping has names that begin so (which hooks are installed, say)
    return not key.startswith("_")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(". ")


def _form(hidden: Any = None) -> str:
    return (
        f"a tensor of shape {tuple(hidden.shape)}"
        if isinstance(hidden, Tensor)
        else "no tensor"
        if hidden is None
        else f"a {type(hidden).__name__}"
    )
