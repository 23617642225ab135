"""Snapshots: the weights from before a pruning, on disk as long as the run or one of its checkpoints may need them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import nn

from ..architectures.packed import is_quantized, quantization_method
from ..errors import SurgeryError, UnsupportedModelError
from ..publish.files import checkpoints_in

__all__ = [
    "FOLDER",
    "drop_unused",
    "free_name",
    "read_plans",
    "require_saving",
    "restore_weights",
    "save_snapshot",
    "set_groups",
]

FOLDER = "_pruning_snapshots"  # in the Trainer's output folder; its pushes to the Hub leave out what begins with "_"
_WEIGHTS, _NOTES = "weights.safetensors", "snapshot.json"


def require_saving(model: nn.Module) -> None:
    """Refuse a model whose weights cannot be written into a snapshot.

    Raises:
        UnsupportedModelError: naming what packs them.
    """
    method = quantization_method(model)
    if is_quantized(model) and method != "bitsandbytes":
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantized ({method}), and packed weights of that kind cannot be kept in a "
            "snapshot, from which a pruning is taken back and a teacher made. Leave max_drop and distill out, or "
            "quantize the model with bitsandbytes."
        )


def save_snapshot(
    output: Path,
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    plan: Mapping[str, Any],
    carried_out: Mapping[str, Any] | None = None,
) -> None:
    """Write a snapshot: all of it, or nothing.

    Args:
        optimizer: the order of its parameters is noted by name.
        plan: the comparison of the accepted model's blocks, as a plan's dict.
        carried_out: the plan that led to the accepted model; None if it was not pruned in this run.
    """
    final, draft = output / FOLDER / name, output / FOLDER / f".{name}.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    held = [] if optimizer is None else [group["params"] for group in optimizer.param_groups]
    groups = [[names[id(p)] for p in parameters if id(p) in names] for parameters in held]
    save_model(model, str(draft / _WEIGHTS))
    (draft / _NOTES).write_text(json.dumps({"groups": groups, "plan": plan, "carried_out": carried_out}), "utf-8")
    old = draft.with_name(f"{draft.name}.old")
    if final.exists():
        final.rename(old)
    draft.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def read_plans(output: Path, name: str) -> tuple[Any, Any]:
    """What was noted with a snapshot: the comparison of blocks, and the plan that led to its model (or None)."""
    notes = _notes(output, name)
    return notes["plan"], notes["carried_out"]


def restore_weights(output: Path, name: str, model: nn.Module) -> None:
    """Put a snapshot's weights back into a model of the same structure, bit for bit.

    Raises:
        SurgeryError: if the snapshot is not there, damaged, or of another structure; nothing is changed then.
    """
    file = output / FOLDER / name / _WEIGHTS
    try:
        saved = load_file(file)
    except (OSError, SafetensorError) as error:
        raise _missing(output, name, error) from error
    live = model.state_dict()
    # tensors that share memory are saved once
    groups: dict[tuple[int, int], set[str]] = {}
    for key, tensor in live.items():
        groups.setdefault((tensor.data_ptr(), tensor.numel()) if tensor.numel() else (-1, len(groups)), set()).add(key)
    lacking = [min(keys) for keys in groups.values() if not keys & saved.keys()]
    odd = [k for k, t in saved.items() if k not in live or live[k].shape != t.shape or live[k].dtype != t.dtype]
    if lacking or odd:
        raise SurgeryError(
            f"The snapshot {name} in {FOLDER} is of another model: {min(lacking or odd)} is not the same in both."
        )
    with torch.no_grad():
        for key, tensor in saved.items():
            live[key].copy_(tensor)


def set_groups(output: Path, name: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer the parameters that it had when the snapshot was made, in the same order, and no state.

    Parameters of others than the model (a loss with weights, say) stay.
    """
    parameters = dict(model.named_parameters())
    own = {id(parameter) for parameter in parameters.values()}
    for group, names in zip(optimizer.param_groups, _notes(output, name)["groups"], strict=True):
        others = [parameter for parameter in group["params"] if id(parameter) not in own]
        group["params"][:] = [*(parameters[key] for key in names), *others]
    optimizer.state.clear()


def drop_unused(output: Path, *current: str | None, ended: bool = False) -> None:
    """Delete the snapshots that neither the run (`current`) nor a checkpoint needs.

    Args:
        ended: the run has ended well, so that its checkpoints, those right under the output folder, need none any more.
    """
    folder = output / FOLDER
    if not folder.is_dir():
        return
    states = _states(output, trials_only=ended)
    for path in folder.iterdir():
        if path.name not in current and json.dumps(path.name) not in states:
            shutil.rmtree(path, ignore_errors=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def free_name(output: Path, name: str) -> str:
    """The name, or one like it, that no checkpoint uses: trials of a hyperparameter search prune at the same steps."""
    states, names = _states(output), chain([name], (f"{name}-{number}" for number in count(2)))
    return next(free for free in names if not (output / FOLDER / free).exists() or json.dumps(free) not in states)


def _states(output: Path, trials_only: bool = False) -> str:
    """What the checkpoints of a Trainer, and of its trials, keep of its state."""
    folders = [folder for folder in checkpoints_in(output) if not (trials_only and folder.parent == output)]
    files = [folder / "trainer_state.json" for folder in folders]
    return "".join(file.read_text("utf-8", errors="replace") for file in files if file.is_file())


def _notes(output: Path, name: str) -> Any:
    try:
        return json.loads((output / FOLDER / name / _NOTES).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _missing(output, name, error) from error


def _missing(output: Path, name: str, error: Exception) -> SurgeryError:
    return SurgeryError(
        f"The model from before a pruning is needed, and its snapshot {name} in the folder {FOLDER} of {output} cannot "
        f"be read ({type(error).__name__}: {error}). A run that ends well deletes it, unless keep_snapshots=True. "
        "Resume from a checkpoint that is older than the pruning, or put the folder back."
    )
