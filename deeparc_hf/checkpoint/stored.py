"""Weights as they lie in safetensors files, local or on the Hub: which file holds what, under which key it goes into a
smaller checkpoint, and writing files from parts of others without reading tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from ..architectures import Layout
from ..errors import RecordError, UnsupportedModelError
from .weights_mark import FLOATS

__all__ = [
    "HUB_SETTINGS",
    "INDEX",
    "WEIGHTS",
    "StoredTensor",
    "new_key",
    "overwrite",
    "stored_tensors",
    "weight_files",
    "write_tensors",
]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_SETTINGS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")
_SHARD = re.compile(r"[\w.\-]+\.safetensors")
_COPIED_AT_ONCE = 2**22  # bytes


def weight_files(
    base: str, hub: Mapping[str, Any], stays: Callable[[str], bool]
) -> Iterator[tuple[list[str] | None, Path]]:
    """The files of a checkpoint that hold a tensor which stays, with its keys in each where an index tells them. Those
    on the Hub are downloaded one after another.

    Raises:
        RecordError: if the index is malformed.
        UnsupportedModelError: if there are no safetensors weights.
    """
    # in the order in which transformers looks for them: an index may be left from an earlier save
    weights = cached_file(base, WEIGHTS, _raise_exceptions_for_missing_entries=False, **hub)
    if weights is not None:
        yield None, Path(weights)
        return
    index = cached_file(base, INDEX, _raise_exceptions_for_missing_entries=False, **hub)
    if index is None:
        raise UnsupportedModelError(
            f"{base} has neither {WEIGHTS} nor {INDEX}. Tensors are read by key, which pickled weights do not allow. "
            "Load the model with from_pretrained, save it again, and use that folder; or call remove_blocks on it."
        )
    shards: dict[str, list[str]] = {}
    for key, shard in _weight_map(base, Path(index)).items():
        if stays(key):
            shards.setdefault(shard, []).append(key)
    for shard, keys in shards.items():
        yield keys, Path(str(cached_file(base, shard, **hub)))


def _weight_map(base: str, index: Path) -> dict[str, str]:
    """Which shard holds each key. The index is downloaded: its names are checked before any of them is opened."""
    try:
        shards: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        names = set(shards.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecordError(
            f"The index of {base} ({INDEX}) is malformed: {type(error).__name__}: {error}. Download the checkpoint "
            "again."
        ) from error
    for name in names:
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise RecordError(f"The index of {base} names a shard outside the checkpoint: {name!r}. It is not read.")
    return shards


def new_key(key: str, namer: Callable[[str], str], layout: Layout) -> str | None:
    """The key under which a tensor of the base goes into the smaller checkpoint; None if its block does not stay.

    Args:
        namer: what the model calls it (`Host.key_namer`).

    Raises:
        RecordError: if the key does not tell which number in it is the block's.
    """
    old = namer(key)
    new = layout.renamed(old)
    if new is None or new == old:
        return None if new is None else key
    # the checkpoint may name it otherwise than the model does, but the block's number stands in both names
    index, place = next(pair for pair in zip(old.split("."), new.split("."), strict=True) if pair[0] != pair[1])
    parts = key.split(".")
    for number, part in enumerate(parts):
        candidate = ".".join((*parts[:number], place, *parts[number + 1 :]))
        if part == index and namer(candidate) == new:
            return candidate
    raise RecordError(
        f"Cannot tell which number in the checkpoint key {key!r} is the block's. Load the model and call remove_blocks."
    )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        entry: what the file's header says of it: dtype and shape.
        begin: where in the file its bytes begin.
        size: how many there are.
    """

    file: Path
    key: str
    entry: Mapping[str, Any]
    begin: int
    size: int


def stored_tensors(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, in the order in which they lie there. Only its header is read.

    Raises:
        RecordError: if it is no valid safetensors file.
    """
    try:
        with safe_open(file, framework="pt"):  # checks the header: sizes, places, no gaps
            pass
    except (SafetensorError, OSError) as error:
        raise RecordError(f"{file.name} cannot be read as safetensors: {error}. Download it again.") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    found = []
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        kept = {name: entry[name] for name in ("dtype", "shape")}
        found.append(StoredTensor(file, key, kept, 8 + length + begin, end - begin))
    return found


def write_tensors(file: Path, tensors: Sequence[tuple[str, StoredTensor]]) -> None:
    """Write a safetensors file with tensors of others under new keys, byte for byte; little of it is in memory at any
    time.
    """
    # as the format's own writer does it: the largest numbers first, so that each lies at a multiple of its size
    tensors = sorted(tensors, key=lambda pair: -(pair[1].size // max(math.prod(pair[1].entry["shape"]), 1)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
    end = 0
    for key, tensor in tensors:
        header[key] = {**tensor.entry, "data_offsets": [end, end + tensor.size]}
        end += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8, as the format wants it
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for source, parts in _by_file(tensor for _, tensor in tensors):
            with source.open("rb") as stream:
                for part in parts:
                    _copy(stream, part, target)


def overwrite(stored: StoredTensor, value: Tensor) -> None:
    """Write other values of a tensor in its place, in the type in which it is stored."""
    kind = getattr(torch, FLOATS[stored.entry["dtype"]])
    data = value.detach().cpu().to(kind).contiguous().view(torch.uint8).numpy().tobytes()
    if len(data) != stored.size:
        raise RecordError(
            f"{stored.key} has {stored.size} bytes in {stored.file.name}, and {len(data)} were to replace them."
        )
    with stored.file.open("r+b") as target:
        target.seek(stored.begin)
        target.write(data)


def _by_file(tensors: Iterable[StoredTensor]) -> Iterator[tuple[Path, list[StoredTensor]]]:
    """Runs of tensors of one file."""
    run: list[StoredTensor] = []
    for tensor in tensors:
        if run and tensor.file != run[0].file:
            yield run[0].file, run
            run = []
        run.append(tensor)
    if run:
        yield run[0].file, run


def _copy(stream: BinaryIO, tensor: StoredTensor, target: BinaryIO) -> None:
    stream.seek(tensor.begin)
    left = tensor.size
    while left:
        part = stream.read(min(left, _COPIED_AT_ONCE))
        if not part:
            raise OSError(f"{tensor.file.name} ended in the middle of {tensor.key}: it is being written to. Try again.")
        target.write(part)
        left -= len(part)
