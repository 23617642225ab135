"""What a user goes on to do with a pruned model: train it, with activation checkpointing too, heal it, sparsify it.

Each runs, or is refused with a reason. What the model before the removal cannot do either says nothing of the package.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deeparc_hf import find_stacks, heal_model, sparsify_model
from deeparc_hf.core.block_paths import lists_of
from deeparc_hf.errors import DeepArcError

__all__ = ["GOOD", "Result", "trains", "uses"]

Result = tuple[str, str]  # what became of it, and why
# "yes"; "refused", with a reason; "not offered", by the library; "nor unpruned": the whole model cannot either
GOOD = ("yes", "refused", "not offered", "nor unpruned")
_BATCHES = 5  # healing holds out each fifth


def uses(
    pruned: nn.Module, original: nn.Module, inputs: Mapping[str, Any], reloaded: Callable[[nn.Module], str]
) -> dict[str, Result]:
    """Try all of it on a model that is pruned and one that is not, both of which stay as they are.

    Args:
        reloaded: says how a model differs from what another process loads of it, if it does.
    """
    model = copy.deepcopy(pruned)
    batches = [{key: _varied(value, seed) for key, value in inputs.items()} for seed in range(_BATCHES)]
    found = {
        "training": trains(pruned, original, inputs),
        "healing": _outcome(lambda: heal_model(model, original, batches, progress=False)),
        "sparsifying": _outcome(lambda: _sparsify(model, batches)),
    }
    problem = reloaded(model) if any(found[use][0] == "yes" for use in ("healing", "sparsifying")) else ""
    if problem:
        found["sparsifying"] = ("reload", problem)
    return found


def _outcome(work: Callable[[], object]) -> Result:
    try:
        work()
    except DeepArcError as error:
        return "refused", " ".join(str(error).split())[:300]
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    return "yes", ""


def _varied(value: Any, seed: int) -> Any:
    """Other samples like the one that there is."""
    if seed == 0 or not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value.dtype)
    return value + 0.1 * value.std(correction=0) * noise


def _sparsify(model: nn.Module, batches: list[dict[str, Any]]) -> None:
    report = sparsify_model(model, batches, sparsity=0.5, progress=False)
    named, stacks = dict(model.named_parameters(remove_duplicate=False)), find_stacks(model)
    assert report.matrices
    for name, told in report.matrices.items():
        assert name.startswith(tuple(f"{path}." for stack in stacks for path in lists_of(stack))), name
        zeros = int((named[f"{name}.weight"] == 0).sum())
        assert told.asked <= zeros == told.zeros, name
    # of each output's inputs half goes, rounded down: a depthwise convolution of one keeps its weights
    assert 0.3 <= report.measured <= 0.7


def trains(pruned: nn.Module, original: nn.Module, inputs: Mapping[str, Any]) -> Result:
    """Whether gradients with activation checkpointing are those without."""
    result = _same_gradients(pruned, inputs)
    if result[0] in ("crash", "wrong") and _same_gradients(original, inputs)[0] in ("crash", "wrong"):
        return "nor unpruned", result[1]
    return result


def _same_gradients(model: nn.Module, inputs: Mapping[str, Any]) -> Result:
    try:
        plain = _gradients(copy.deepcopy(model), inputs)
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    model = copy.deepcopy(model)
    try:
        if not _checkpointing_enabled(model):
            return "not offered", ""
        other = _gradients(model, inputs)
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    if not plain or plain.keys() != other.keys():
        return "wrong", "other parameters have gradients with checkpointing"
    for name, value in plain.items():
        scale = value[value.isfinite()].abs().max().item() if value.isfinite().any() else 0.0
        if not torch.allclose(value, other[name], rtol=1e-3, atol=1e-4 * scale + 1e-12, equal_nan=True):
            return "wrong", f"the gradient of {name} differs with checkpointing"
    return "yes", ""


def _checkpointing_enabled(model: nn.Module) -> bool:
    """Turn activation checkpointing on, if the model offers it."""
    if isinstance(model, PreTrainedModel):
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.supports_gradient_checkpointing
    enable = getattr(model, "set_grad_checkpointing", None)  # of timm's models, some of which say that they cannot
    with contextlib.suppress(AssertionError):
        return enable is not None and enable() is None
    return False


def _gradients(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of a scalar made of the first output that has any, by parameter."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):  # dropout, layer dropping
        seed(0)
    model.train()
    value = next(_outputs(model(**inputs)))
    value.masked_fill(~value.isfinite() | (value.abs() > 1e30), 0.0).double().square().mean().backward()
    return {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}


def _outputs(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.requires_grad and value.numel():
            yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _outputs(part)
