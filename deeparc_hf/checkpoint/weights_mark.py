"""A mark of a model's weights, the same of a live model and of its files: which evaluation, and which report, is of the
weights at hand. A few values of each tensor go into it: it changes with every training step, and is no proof of origin.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..architectures.packed import is_quantized

__all__ = ["FLOATS", "SIZES", "dtype_of_files", "mark_of_files", "mark_of_model"]

SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a number
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_VALUES = 16  # of each tensor
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def mark_of_model(model: nn.Module) -> str | None:
    """The mark of a model's state; None where its tensors are sharded, packed, or not there (meta device)."""
    if is_quantized(model):
        return None  # bitsandbytes changes a model on the CPU when its state is asked for
    found, seen = [], set()
    for tensor in model.state_dict(keep_vars=True).values():
        if not isinstance(tensor, Tensor):
            continue
        if (
            hasattr(tensor, "ds_id")
            or tensor.is_meta
            or type(tensor.data) is not Tensor
            or tensor.layout != torch.strided
        ):
            return None
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if place not in seen:  # tied tensors are one in a file
            seen.add(place)
            found.append((tuple(tensor.shape), tensor.detach()))
    return _mark(found)


def mark_of_files(folder: Path) -> str | None:
    """The mark of the weights in a folder, of which little is read; None where there are none, or not all."""
    files = _files(folder)
    try:
        return None if files is None else _mark(entry for file in files for entry in _beginnings(file))
    except (SafetensorError, OSError):
        return None


def dtype_of_files(folder: Path) -> str | None:
    """The type of the first floating-point tensor in a folder's weights, by its header; None where there is none."""
    try:
        for file in _files(folder) or ():
            with safe_open(file, "pt") as stored:
                for key in stored.keys():  # noqa: SIM118  (not a mapping)
                    kind = FLOATS.get(stored.get_slice(key).get_dtype())
                    if kind is not None:
                        return kind
    except (SafetensorError, OSError):
        pass
    return None


def _files(folder: Path) -> list[Path] | None:
    """The files of a folder's weights; None where there are none, or not all."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    try:
        names = set(json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    known = all(isinstance(name, str) and Path(name).name == name and (folder / name).is_file() for name in names)
    return [folder / name for name in sorted(names)] if known else None


def _beginnings(file: Path) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Of each tensor the whole shape, and the first rows."""
    with safe_open(file, "pt") as stored:
        for key in stored.keys():  # noqa: SIM118  (not a mapping)
            part = stored.get_slice(key)
            shape = part.get_shape()
            yield tuple(shape), part[: _rows(shape)] if shape else stored.get_tensor(key)


def _rows(shape: Sequence[int]) -> int:
    """How many rows hold the values that count."""
    return -(-_VALUES // max(1, math.prod(shape[1:])))


def _mark(tensors: Iterable[tuple[tuple[int, ...], Tensor]]) -> str:
    shapes, parts = [], []
    for shape, tensor in tensors:
        shapes.append(shape)
        rows = tensor[: _rows(tensor.shape)] if tensor.dim() else tensor
        parts.append(rows.reshape(-1)[:_VALUES].to(torch.float32))
    values = torch.cat(parts).cpu().split(list(map(len, parts))) if parts else ()
    digests = [
        hashlib.sha256(repr(shape).encode() + part.numpy().tobytes()).digest()
        for shape, part in zip(shapes, values, strict=True)
    ]
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:32]
