"""Forward passes that leave no trace: modes, random states and what a model changes about itself are put back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..architectures import Host
from ..core.offload import UNKNOWN, first_missing, is_offloaded
from ..errors import CalibrationError, DeepArcError
from .batches import without_labels

__all__ = ["evaluating", "forward", "keeping_random_states", "require_weights", "seed_random", "without_caches"]

_REGISTERED = ("_modules", "_buffers")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module's mode, its attributes and submodules, and all random states
    are what they were.

    Some models change themselves for good where inputs are short or long (BigBird's attention, rotary frequencies):
    that is undone too.
    """
    states = [(module, _state(module)) for module in model.modules()]
    configs = [getattr(module, "config", None) for module in model.modules()]
    # some models note there what labels they were given
    problems = [(config, config.problem_type) for config in configs if hasattr(config, "problem_type")]
    try:
        with keeping_random_states(model), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, state in states:
            _put_back(module, state)
        for config, problem in problems:
            config.problem_type = problem


@contextmanager
def keeping_random_states(model: nn.Module | None) -> Iterator[None]:
    """Afterwards the random states of torch (on the CPU, and where the model is), numpy and python are as before."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=_gpus(model)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def seed_random(model: nn.Module | None, seed: int) -> None:
    """Seed torch on the CPU and where the model is: the states that `keeping_random_states` puts back.
    (`torch.manual_seed` would seed all other GPUs too.)
    """
    torch.default_generator.manual_seed(seed)
    for index in _gpus(model):
        torch.cuda.default_generators[index].manual_seed(seed)


def _gpus(model: nn.Module | None) -> list[int]:
    parameters = () if model is None else model.parameters()
    return sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})


def forward(host: Host, inputs: Mapping[str, Any], without_cache: bool = False) -> Any:
    """Run the model on calibration inputs, without labels where it can do without; gives its output.

    `without_cache`: make none of keys and values, which would be taken again when a block is run again.

    Raises:
        CalibrationError: if it cannot.
    """
    bare = without_labels(host, inputs)
    try:
        with ExitStack() as within:
            more = within.enter_context(without_caches(host)) if without_cache else {}
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
        told = f"{type(error).__name__}: {error}".rstrip(". ")
        raise CalibrationError(
            f"{type(host.root).__name__} cannot run on a calibration batch ({shapes}): {told}. Give batches as your "
            "training loop gives them to the model."
        ) from error


@contextmanager
def without_caches(host: Host) -> Iterator[dict[str, Any]]:
    """Within, the model makes no cache of keys and values: one that a block is given grows each time that it is run.

    Yields:
        What its forward has to be given too. Parts of it go by their configs (the text decoder of BLIP).
    """
    configs = {id(config): config for module in host.root.modules() if (config := getattr(module, "config", None))}
    making = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    try:
        for config in making:
            config.use_cache = False
        yield {"use_cache": False} if host.takes_cache else {}
    finally:
        for config in making:
            config.use_cache = True


def require_weights(
    host: Host, error: type[DeepArcError] = CalibrationError, otherwise: str = "", offloaded: bool = False
) -> None:
    """Refuse a model that has no weights in memory.

    Args:
        offloaded: whether weights may lie elsewhere (accelerate's offloading): they are there when their module runs.

    Raises:
        DeepArcError: of the given kind, saying whether they lie elsewhere or were never loaded; then it ends with
            `otherwise`, what else can be done.
    """
    bare = next((name for name, p in host.root.named_parameters() if p.device.type == "meta"), None)
    if bare is None:
        return
    if is_offloaded(host.root):
        missing = first_missing(host.root)
        if offloaded and missing is None:
            return
        if offloaded:
            raise error(f"{missing} of {host.label} {UNKNOWN}")
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
    own = {key: value for key, value in vars(module).items() if _is_own(key)}
    return own | {key: dict(vars(module)[key]) for key in _REGISTERED}


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
