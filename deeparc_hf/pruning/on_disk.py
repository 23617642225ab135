"""Surgery on a checkpoint's files: a smaller checkpoint is written without the model ever being in memory.

What decides whether blocks may go is decided as for a live model, on a skeleton. Of the files only the bytes of the
tensors that stay are copied.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils.modeling import convert_file_size_to_int
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from ..architectures import Layout, Subject, describe
from ..architectures.hosts import quiet
from ..architectures.skeleton import state_shapes
from ..checkpoint.companions import copy_companions
from ..checkpoint.loading import saved_class
from ..checkpoint.record import PrunedConfig, current_record
from ..checkpoint.stored import (
    HUB_SETTINGS,
    INDEX,
    WEIGHTS,
    StoredTensor,
    new_key,
    overwrite,
    stored_tensors,
    weight_files,
    write_tensors,
)
from ..checkpoint.weights_mark import FLOATS, dtype_of_files, mark_of_files
from ..core.block_paths import block_path
from ..core.compat import may_be_missing
from ..core.files import whole_folder
from ..core.offload import blocks_on_disk
from ..core.plain_text import quoted
from ..core.sentence_encoders import copy_modules, module_folders
from ..errors import ConfigError, PlanError, RecordError, SurgeryError, UnsupportedModelError
from ..healing.heal import healed_tensors
from ..healing.sites import Healing
from .plan import PruningPlan
from .rebuild import require_told, skeletons
from .surgery import apply_plan, remove_blocks
from .verify import expect

__all__ = ["DiskSurgery", "in_bytes", "prune_checkpoint", "require_copyable"]


def prune_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    what: PruningPlan | Mapping[str, Sequence[int]],
    *,
    freeze: str = "none",
    auto_class: Any = None,
    example: Any = None,
    verify: bool = True,
    max_shard_size: int | str | None = None,
    **hub: Any,
) -> PrunedConfig:
    """Write a checkpoint without some of its blocks, as `remove_blocks` and `save_pretrained` would, but without having
    the model in memory: tensors are copied from file to file. `out` is there whole afterwards, or not at all.

    Tensors keep their names but for the numbers of the blocks. Of a sharded checkpoint on the Hub only those shards are
    downloaded that hold a tensor which stays, unless the result is verified. Weights, config and generation config are
    written: save the tokenizer or processor beside them. Of a model of sentence-transformers its modules and its
    tokenizer are copied along.

    Args:
        checkpoint: a folder or Hub id, of transformers, with safetensors weights.
        out: the folder to write; it must not hold anything yet.
        what: a plan, or by stack name the indices of the blocks that go.
        freeze: as in `remove_blocks`, for the record; a plan has its own.
        auto_class: the class of transformers that the model is; default: the one that saved the checkpoint.
        example: a batch to verify the result on, as in `remove_blocks`.
        verify: whether a forward pass must show that the new checkpoint computes what the old one computes with these
            blocks skipped. For that all blocks are read from the disk, one at a time (accelerate's offloading). What
            cannot be verified is refused.
        max_shard_size: of a weights file: bytes, or "5GB"; default: as large as the largest that is read.
        hub: as for `from_pretrained`: revision, token, cache_dir, subfolder, local_files_only, ...

    Returns:
        The record, which the config of the new checkpoint carries.

    Raises:
        ConfigError: if `out` holds something, or the plan is one that repairs, for which data are needed.
        PlanError: if the plan does not fit the model, or removes nothing.
        RecordError: if the checkpoint is malformed, or lacks tensors.
        SurgeryError: as `remove_blocks`.
        UnsupportedModelError: if there are no safetensors weights, or the model is of a kind that cannot be pruned.
    """
    most = in_bytes(max_shard_size)
    surgery = DiskSurgery.of(checkpoint, what, freeze=freeze, auto_class=auto_class, **hub)
    with whole_folder(Path(out).expanduser().resolve()) as folder:
        return surgery.write(folder, example=example, verify=verify, max_shard_size=most)


@dataclass(frozen=True, eq=False)
class DiskSurgery:
    """A removal from a checkpoint's files that is settled, and still to be written.

    Attributes:
        frame: the smaller model on the meta device, with its settings and its record.
        removed: by stack, the blocks that go.
        healings: repairs of the blocks before those, which were fitted beforehand.
    """

    frame: Any
    removed: Mapping[str, Sequence[int]]
    healings: Sequence[Healing]
    _base: str
    _hub: Mapping[str, Any]
    _namer: Callable[[str], str]
    _layout: Layout

    @classmethod
    def of(
        cls,
        checkpoint: str | os.PathLike[str],
        what: PruningPlan | Mapping[str, Sequence[int]],
        *,
        freeze: str = "none",
        auto_class: Any = None,
        healings: Sequence[Healing] | None = None,
        **hub: Any,
    ) -> DiskSurgery:
        """Settle it; arguments and errors as those of `prune_checkpoint`. No weights are read.

        Args:
            healings: the repairs that a plan asks for, fitted beforehand (`fit_sites`).
        """
        base = str(checkpoint)
        if healings is None and isinstance(what, PruningPlan) and what.removed and what.config.heal is not None:
            raise ConfigError(
                f"The plan repairs the kept blocks (heal={what.config.heal!r}), which takes data and a model in "
                "memory: prune_model(model, dataloader, plan)."
            )
        if isinstance(what, PruningPlan) and not what.removed:
            raise PlanError("The plan removes no block, so there is nothing to write. Use the checkpoint as it is.")
        odd = sorted(hub.keys() - {*HUB_SETTINGS, "trust_remote_code"})
        if odd:
            raise ConfigError(
                f"prune_checkpoint takes no {odd[0]!r}. Beside its own arguments it takes where the files are: "
                f"{', '.join(HUB_SETTINGS)}."
            )
        module_folders(base, **hub)  # what is wrong with them is said before any work is done
        if isinstance(what, Mapping):  # they are gone through twice
            what = {name: list(blocks) if isinstance(blocks, Iterable) else blocks for name, blocks in what.items()}
        frame = _frame(base, auto_class, hub)
        whole = describe(frame)
        namer = whole.host.key_namer()
        if isinstance(what, PruningPlan):
            removed: Mapping[str, Sequence[int]] = what.removed
            apply_plan(frame, what, verify=False)
        else:
            remove_blocks(frame, what, freeze, verify=False)
            removed = {name: sorted(blocks) for name, blocks in what.items() if len(blocks)}
        require_copyable(whole, removed)
        return cls(frame, removed, healings or (), base, hub, namer, whole.without(removed))

    def write(
        self, folder: Path, *, example: Any = None, verify: bool = True, max_shard_size: int | str | None = None
    ) -> PrunedConfig:
        """Write the checkpoint into a folder that is there; arguments and errors as those of `prune_checkpoint`."""
        most = in_bytes(max_shard_size)
        found = _Found.of(self._base, self._hub, self._namer, self._layout)
        found.require_whole(self._base, self.frame, self._namer)
        _write_weights(folder, found, most)
        _settle_dtype(self.frame.config, folder)
        # a mark of files is one of the live model where tensors are stored as the model has them
        mark = mark_of_files(folder) if found.fits(self.frame, self._namer) else None
        record = self._note(folder, mark)
        if verify:
            self._verify(folder, example)
        if self.healings:
            self._heal(folder)
            record = self._note(folder, None if mark is None else mark_of_files(folder))
        if copy_modules(self._base, folder, **self._hub):
            copy_companions(self._base, folder)
        return record

    def _note(self, folder: Path, mark: str | None) -> PrunedConfig:
        """Write the settings, with a record that has the mark of the weights."""
        smaller = describe(self.frame)
        host, record = smaller.host, current_record(smaller)
        if self.healings and record.iterations:
            *earlier, last = record.iterations
            noted = {**last, "healing": [healing.to_dict() for healing in self.healings]}
            record = dataclasses.replace(record, iterations=(*earlier, noted))
        record = record.with_mark(mark)
        host.set_record(record.to_dict())
        _write_settings(folder, self.frame)
        return record

    def _heal(self, folder: Path) -> None:
        """Change the maps of the kept blocks in the files, in place.

        Raises:
            SurgeryError: if one of them is not stored as the model has it.
        """
        places = self._layout.kept
        stored = {self._namer(t.key): t for file in sorted(folder.glob("*.safetensors")) for t in stored_tensors(file)}
        with TemporaryDirectory(dir=folder) as scratch:
            smaller = describe(_offloaded(type(self.frame), self.frame, str(folder), scratch, {}))
            for healing in self.healings:
                stack = smaller.stacks[healing.site.stack]
                place = places[healing.site.stack].index(healing.site.kept)
                for name, value in healed_tensors(healing, stack.blocks[place]).items():
                    path = block_path(healing.site.stack, place, name)
                    found = stored.get(path)
                    if found is None or tuple(found.entry["shape"]) != tuple(value.shape):
                        raise SurgeryError(
                            f"{path} is not stored as the model has it, so its repair cannot be written. Leave heal "
                            "out."
                        )
                    overwrite(found, value)

    def _verify(self, folder: Path, example: Any) -> None:
        """A forward pass of both checkpoints, whose blocks stay on the disk.

        Raises:
            SurgeryError: if they do not agree, or that cannot be found out.
        """
        cls = type(self.frame)
        with TemporaryDirectory(dir=folder) as scratch:  # for tensors that are stored otherwise than they are used
            frame = _frame(self._base, cls, self._hub)
            whole = describe(_offloaded(cls, frame, self._base, scratch, self._hub))
            builds = skeletons(whole, self._layout)
            expectation = expect(whole, self.removed, example)
            expectation.host = describe(_offloaded(cls, self.frame, str(folder), f"{scratch}/smaller", {})).host
            expectation.check()
            require_told(whole, builds, expectation)


def require_copyable(subject: Subject, stacks: Iterable[str]) -> None:
    """Refuse stacks whose removals change tensors outside of the blocks: from file to file they are copied as they are.

    Raises:
        UnsupportedModelError: naming the first of them.
    """
    found = ((name, tensor.path) for name in stacks for tensor in subject.stacks[name].per_block)
    for name, path in found:
        raise UnsupportedModelError(
            f"{path} of {subject.name} has a part for each block of {name}, and tensors are copied from file to file "
            "as they are. Load the model and call remove_blocks or prune_model on it."
        )


def _frame(base: str, auto_class: Any, hub: Mapping[str, Any]) -> Any:
    """The model of a checkpoint on the meta device, with its settings."""
    if hub.get("trust_remote_code"):
        raise UnsupportedModelError(
            "No code from the Hub is run here (trust_remote_code). Load the model yourself and call remove_blocks."
        )
    config = AutoConfig.from_pretrained(base, **{**hub, "trust_remote_code": False})
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"The weights of {base} are quantized, and how they lie in its files is not known here. Prune the model "
            "that was quantized, and quantize the result."
        )
    cls: Any = auto_class
    if auto_class is None or isinstance(auto_class, str):
        cls = saved_class(config, auto_class)
    usable = isinstance(cls, type) and (issubclass(cls, PreTrainedModel) or hasattr(cls, "from_config"))
    if not usable:
        raise ConfigError(f"auto_class must be a model class of transformers, or its name, found {quoted(auto_class)}.")
    with quiet(), torch.device("meta"):
        frame: Any = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
        frame.tie_weights()
    frame.config.name_or_path = base
    if frame.can_generate() and cached_file(
        base, "generation_config.json", _raise_exceptions_for_missing_entries=False, **hub
    ):
        frame.generation_config = GenerationConfig.from_pretrained(base, **hub)
    return frame


@dataclass(frozen=True)
class _Found:
    """The tensors that stay, under their new keys, and the size of the largest file that they lie in."""

    tensors: Sequence[tuple[str, StoredTensor]]
    largest: int

    @classmethod
    def of(cls, base: str, hub: Mapping[str, Any], namer: Callable[[str], str], layout: Layout) -> _Found:
        tensors: dict[str, StoredTensor] = {}
        largest = 0
        for keys, file in weight_files(base, hub, lambda key: new_key(key, namer, layout) is not None):
            largest = max(largest, file.stat().st_size)
            listed = None if keys is None else set(keys)
            for tensor in stored_tensors(file):
                new = new_key(tensor.key, namer, layout) if listed is None or tensor.key in listed else None
                if new is None:
                    continue
                if new in tensors:
                    raise RecordError(f"{base} has two tensors for {new} (as the smaller model counts).")
                tensors[new] = tensor
                if listed:
                    listed.discard(tensor.key)
            if listed:
                raise RecordError(
                    f"{file.name} of {base} lacks {min(listed)}, which the index says is in it. Download it again."
                )
        return cls(list(tensors.items()), largest)

    def require_whole(self, base: str, frame: Any, namer: Callable[[str], str]) -> None:
        """Refuse a checkpoint that lacks weights of the smaller model, which a loader would make up, or that has them
        in another shape.

        Args:
            frame: the smaller model.
        """
        stored = {namer(key) for key, _ in self.tensors}
        # what is tied is stored under one of its names
        present = {id(p) for name, p in frame.named_parameters(remove_duplicate=False) if name in stored}
        spared = [re.compile(pattern) for pattern in may_be_missing(frame)]
        for name, parameter in frame.named_parameters():
            if id(parameter) not in present and not any(pattern.search(name) for pattern in spared):
                raise RecordError(
                    f"{base} has no weights for {name} (as the smaller model counts) of {type(frame).__name__}, and a "
                    "loader would make them up. Download it again, or give the class that saved it: auto_class=..."
                )
        shapes = state_shapes(frame)
        for key, tensor in self.tensors:
            shape = tuple(tensor.entry["shape"])
            if shapes.get(key, shape) != shape:
                raise RecordError(
                    f"{key} of {base} has shape {shape}, and the config describes one of {shapes[key]}. Download it "
                    "again."
                )

    def fits(self, frame: Any, namer: Callable[[str], str]) -> bool:
        """Whether the tensors are those that the smaller model has in memory: none is converted, put together from
        several (experts), or tied to another.
        """
        shapes, dtype = state_shapes(frame), str(frame.config.dtype).removeprefix("torch.")
        state = frame.state_dict(keep_vars=True)
        names = [namer(key) for key, _ in self.tensors]
        places = {id(state[name]) for name in names if name in state}
        return len(places) == len(names) and all(
            shapes.get(name) == tuple(tensor.entry["shape"]) and FLOATS.get(tensor.entry["dtype"], dtype) == dtype
            for name, (_, tensor) in zip(names, self.tensors, strict=True)
        )


def in_bytes(size: int | str | None) -> int | None:
    """A size as `save_pretrained` takes it."""
    if size is None:
        return None
    try:
        found = convert_file_size_to_int(size) if type(size) in (int, str) else 0
    except ValueError:
        found = 0
    if found < 1:
        raise ConfigError(f'max_shard_size is a number of bytes, or a text as "5GB", found {quoted(size)}.')
    return found


def _write_weights(folder: Path, found: _Found, max_shard_size: int | None) -> None:
    """The weights in one file, or in several with an index."""
    shards: list[list[tuple[str, StoredTensor]]] = [[]]
    most, filled = max_shard_size or found.largest, 0
    for key, tensor in found.tensors:
        if shards[-1] and filled + tensor.size > most:
            shards.append([])
            filled = 0
        shards[-1].append((key, tensor))
        filled += tensor.size
    if len(shards) == 1:
        write_tensors(folder / WEIGHTS, shards[0])
        return
    places = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{WEIGHTS.removesuffix('.safetensors')}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard)
        places.update({key: name for key, _ in shard})
    total = sum(tensor.size for _, tensor in found.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _settle_dtype(config: Any, folder: Path) -> None:
    """Give all parts of a config the type of the whole, as a loader does."""
    dtype = config.dtype or dtype_of_files(folder)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype


def _write_settings(folder: Path, frame: Any) -> None:
    """Config and generation config, as `save_pretrained` writes them."""
    frame.config.architectures = [type(frame).__name__]
    frame.config.save_pretrained(folder)
    if frame.can_generate():
        frame.generation_config.save_pretrained(folder)


def _offloaded(cls: Any, frame: Any, base: str, scratch: str, hub: Mapping[str, Any]) -> nn.Module:
    """A model whose blocks are read from the disk whenever they run (accelerate's offloading)."""
    places = blocks_on_disk(frame, tuple(describe(frame).stacks))
    with quiet(hf_logging.ERROR), _unheard("accelerate.big_modeling"), warnings.catch_warnings():
        # single parameters beside the stacks are no modules
        warnings.filterwarnings("ignore", message="The following device_map keys")
        model: nn.Module = cls.from_pretrained(
            base, config=frame.config, device_map=places, offload_folder=scratch, **hub
        )
    return model.eval()


@contextmanager
def _unheard(name: str) -> Iterator[None]:
    """Within, a library's logger says nothing: it would tell of the offloading, which is meant."""
    logger = logging.getLogger(name)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
