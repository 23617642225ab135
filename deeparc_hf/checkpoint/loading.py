"""Loading and saving: a base checkpoint with only the blocks that stay, and a checkpoint that stock libraries load."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from ..architectures import Host, Layout, Subject, describe, find_host
from ..architectures.adapters import is_adapted
from ..architectures.generation import follow_generation
from ..architectures.hosts import RECORD_KEY, copy_attention
from ..architectures.per_block import PerBlockTensor, left_by_path
from ..architectures.skeleton import compare
from ..core.block_paths import is_inside
from ..core.compat import builder_of
from ..core.transaction import Transaction
from ..errors import RecordError, UnsupportedModelError
from ..pruned_type.config import LAYOUT_KEY, DeepArcPrunedConfig, base_settings
from ..pruned_type.models import auto_class_for, class_with_dropped_blocks, set_layout
from .adapters import refuse_merged, save_adapters
from .record import PrunedConfig, current_record, renumbered
from .stored import HUB_SETTINGS, new_key, weight_files

__all__ = ["load_pruned", "save_pruned", "saved_class"]


def load_pruned(
    auto_class: Any,
    base_repo_or_path: str | os.PathLike[str],
    pruned_config: PrunedConfig | Mapping[str, Any] | str | os.PathLike[str],
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a base checkpoint with only the blocks that a record keeps. The other blocks' tensors are never read.

    The result equals loading everything and removing the blocks afterwards, to the bit. Of a sharded checkpoint on the
    Hub only those shards are downloaded that hold a tensor which stays.

    Args:
        auto_class: `AutoModelFor...`, or a model class of transformers.
        base_repo_or_path: the checkpoint that was pruned first: Hub id or folder, with safetensors weights.
        pruned_config: the record, its dict, or the folder or Hub id of a pruned checkpoint to take it from.
        kwargs: passed on to `from_pretrained` (dtype, device_map, revision, token, num_labels, ...).

    Raises:
        RecordError: if the record is malformed or does not fit the base.
        UnsupportedModelError: if the base has no safetensors weights, or is of a kind that cannot be pruned.
    """
    if kwargs.pop("trust_remote_code", False):
        raise UnsupportedModelError(
            "load_pruned runs no code from the Hub (trust_remote_code). Load the model yourself and call remove_blocks."
        )
    hub = {key: kwargs[key] for key in HUB_SETTINGS if key in kwargs}
    record = _record(pruned_config, {k: v for k, v in hub.items() if k in ("token", "cache_dir", "local_files_only")})
    config = kwargs.pop("config", None)
    # "auto" means the dtype of the checkpoint, which its config and its tensors tell; a config cannot hold the word
    kwargs = {key: value for key, value in kwargs.items() if not (key in ("dtype", "torch_dtype") and value == "auto")}
    if config is None:
        config, kwargs = AutoConfig.from_pretrained(base_repo_or_path, return_unused_kwargs=True, **kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key not in HUB_SETTINGS}
    with torch.device("meta"):
        full = builder_of(auto_class)(config)
    subject = describe(full)
    record = record.renamed(subject.host.base_prefix, subject.stacks)
    layout = _layout(record, subject)
    # what the base's own record says of zeroed weights comes with its weights, whatever the other record lists
    record = dataclasses.replace(record, sparsity=renumbered(current_record(subject).sparsity, layout))
    settings = _settings(subject, layout, record)
    base, commit = subject.host.loaded_from(hub.get("cache_dir"))
    left = settings.pop(LAYOUT_KEY, None)
    pruned = base_settings(type(full.config)).from_dict(settings)
    copy_attention(full.config, pruned)  # the one setting that is not part of a config's dict
    if left:
        set_layout(pruned, left)
    setattr(
        pruned,
        RECORD_KEY,
        {**record.to_dict(), "base_model": record.base_model or base, "base_revision": record.base_revision or commit},
    )
    folder_or_id = str(base_repo_or_path)
    state = _read(subject, folder_or_id, layout, hub, {} if left else subject.per_block)
    wants_info = kwargs.pop("output_loading_info", False)
    cls: Any = class_with_dropped_blocks(cast(Hashable, type(full))) if left else type(full)
    model, info = cls.from_pretrained(None, config=pruned, state_dict=state, output_loading_info=True, **kwargs)
    model.__class__ = type(full)
    _require_blocks(info["missing_keys"], folder_or_id, layout)
    model.config.name_or_path = folder_or_id
    if model.can_generate():
        # the base's own, as from_pretrained takes it over from a checkpoint that it loads by name
        if cached_file(folder_or_id, "generation_config.json", _raise_exceptions_for_missing_entries=False, **hub):
            model.generation_config = GenerationConfig.from_pretrained(folder_or_id, **hub)
        follow_generation(model, subject.stacks, layout, Transaction())
    # a pair for those who ask for it, as from_pretrained gives one
    return cast(PreTrainedModel, (model, info) if wants_info else model)


def save_pruned(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a model so that its own library loads it, record included; safetensors only.

    For a transformers model this is `save_pretrained`. A bare timm model is saved in timm's Hub layout, for
    `timm.create_model("local-dir:FOLDER", pretrained=True)` or, once uploaded,
    `timm.create_model("hf-hub:ORG/NAME", pretrained=True)`.

    A model of sentence-transformers is saved whole, by its own `save_pretrained`: its modules, and its card.

    A model with adapters (PEFT) is saved as two things: the model beneath them in `folder`, and the adapters in
    `folder/adapter`, for `PeftModel.from_pretrained(AutoModel...from_pretrained(folder), f"{folder}/adapter")`.

    Args:
        model: a model of transformers or timm, pruned or not.
        folder: where to write; made if need be.

    Raises:
        UnsupportedModelError: if it is neither a transformers model nor a timm model, or its adapters are merged and
            still there (`merge_adapter`).
    """
    host = find_host(model)  # which stacks it has need not be searched for
    refuse_merged(host.root)
    if host.outer is not None:
        _save_encoder(host, folder)
        return
    host.save(folder)
    save_adapters(host.root, folder)


def _save_encoder(host: Host, folder: str | os.PathLike[str]) -> None:
    """Save a model of sentence-transformers with its modules."""
    if is_adapted(host.root):
        raise UnsupportedModelError(
            f"{type(host.outer).__name__} carries PEFT adapters, and sentence-transformers saves these alone, without "
            "the pruned model beneath them. Merge them before: "
            "model[0].auto_model = model[0].auto_model.merge_and_unload()."
        )
    outer: Any = host.outer
    outer.save_pretrained(str(folder))


def saved_class(config: Any, name: str | None = None) -> Any:
    """The class of transformers by its name, by default of the one that saved the checkpoint; the bare model's where
    there is none of that name. None where one was asked for by name and there is none.
    """
    asked = name or next(iter(getattr(config, "architectures", None) or ()), "AutoModel")
    cls = getattr(transformers, asked, None) if isinstance(asked, str) else None
    if isinstance(cls, type) and (issubclass(cls, PreTrainedModel) or hasattr(cls, "from_config")):
        if isinstance(config, DeepArcPrunedConfig) and issubclass(cls, PreTrainedModel):
            return auto_class_for(cls, config.base)  # its own class would build the whole model
        return cls
    return transformers.AutoModel if name is None else None


def _record(source: Any, hub: Mapping[str, Any]) -> PrunedConfig:
    if isinstance(source, PrunedConfig):
        return source
    if isinstance(source, Mapping):
        return PrunedConfig.from_dict(source)
    return PrunedConfig.from_pretrained(source, **hub)


def _layout(record: PrunedConfig, subject: Subject) -> Layout:
    """Which blocks of the base stay."""
    stacks = subject.stacks
    for name, stack in record.stacks.items():
        if name not in stacks:
            raise RecordError(
                f"The pruning record names the stack {name!r}, which the base model lacks. Its stacks: "
                f"{', '.join(stacks)}."
            )
        if stack.length != len(stacks[name]):
            raise RecordError(
                f"The pruning record is for a base model with {stack.length} blocks in {name}; this one has "
                f"{len(stacks[name])}. Give the checkpoint that was pruned first."
            )
        pinned = [index for index in record.removed[name] if index in stacks[name].pinned]
        if pinned:
            raise RecordError(
                f"The pruning record removes block {pinned[0]} of {name}, which is pinned: "
                f"{stacks[name].pinned[pinned[0]]}."
            )
    return subject.without(record.removed)


def _settings(subject: Subject, layout: Layout, record: PrunedConfig) -> dict[str, Any]:
    """The settings of the smaller model. A recipe is refused that surgery on the live model would refuse. Blocks are
    dropped, and tensors outside of them shortened, only where the record says that surgery did so, which a forward pass
    has shown to be right.
    """
    host = subject.host
    dropped, shortened = (any(i.get(what) is True for i in record.iterations) for what in ("dropped", "shortened"))
    if host.merges_inputs:
        raise UnsupportedModelError(
            f"{host.label} merges images into its text, and which blocks do so may be told by their place, which only "
            "a forward pass shows. Load the whole model and call remove_blocks(model, ..., example=batch), or load a "
            "checkpoint that was pruned so."
        )
    try:
        _, settings = subject.shrunk_settings(layout)
        problems = compare(subject.root, host.build(settings), layout, per_block=subject.per_block).problems
    except Exception as error:
        problems = [f"{type(error).__name__}: {error}"]
    unclear = [tensor.path for tensor, *_ in left_by_path(subject.per_block, layout).values() if not tensor.known]
    if unclear and not shortened:
        problems = problems or [f"{unclear[0]} has a part for each block, and the record does not say that it was cut"]
    if not problems:
        return settings
    if host.can_drop and (dropped or not layout.removed):
        return host.dropping(host.settings(), layout)
    raise RecordError(f"The settings of {host.label} cannot express what the pruning record keeps: {problems[0]}.")


def _require_blocks(missing: Iterable[str], base: str, layout: Layout) -> None:
    """Refuse a checkpoint that lacks tensors of a block that stays: from_pretrained has made them up."""
    lacking = sorted(key for key in missing if any(is_inside(name, key) for name in layout.kept))
    if lacking:
        raise RecordError(
            f"{base} has no weights for {lacking[0]} (as the smaller model counts), which the record keeps. Download "
            "it again."
        )


def _read(
    subject: Subject,
    base: str,
    layout: Layout,
    hub: Mapping[str, Any],
    per_block: Mapping[str, Sequence[PerBlockTensor]],
) -> dict[str, Tensor]:
    """The tensors that stay, under the keys of the smaller checkpoint."""
    namer = subject.host.key_namer()
    state: dict[str, Tensor] = {}
    shortened = left_by_path(per_block, layout)
    for keys, file in weight_files(base, hub, lambda key: new_key(key, namer, layout) is not None):
        try:
            with safe_open(file, framework="pt") as handle:
                for key in keys or handle.keys():
                    new = new_key(key, namer, layout)
                    if new is not None:
                        stored = handle.get_tensor(key)
                        tensor, length, kept = shortened.get(namer(key), (None, 0, ()))
                        state[new] = stored if tensor is None else tensor.left(stored, length, kept)
        except SafetensorError as error:
            raise RecordError(
                f"{file.name} of {base} cannot be read as safetensors: {error}. Download it again."
            ) from error
    return state
