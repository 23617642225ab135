"""Hosts: the libraries that models come from. A host reads and writes a model's settings (transformers' config, or the
arguments of `timm.create_model`) and builds its skeleton.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import find_labels
from transformers.utils import logging as hf_logging

from ..core.block_paths import is_inside
from ..core.compat import attention_of, checkpoint_key_namer, set_attention
from ..core.meta_builds import on_meta
from ..core.offload import device_of
from ..core.sentence_encoders import is_sentence_encoder
from ..core.transaction import Transaction
from ..errors import UnsupportedModelError
from ..pruned_type.config import LAYOUT_KEY, base_settings
from ..pruned_type.models import can_be_loaded, drop_blocks, layout_of, set_layout
from .adapters import refuse_adapters, without_adapters
from .inputs import example_inputs, main_input, merges_inputs
from .layout import Layout
from .packed import is_quantized, refuse_quantized, without_packing

__all__ = ["RECORD_KEY", "Host", "TimmHost", "TransformersHost", "find_host", "quiet"]

RECORD_KEY = "pruning_config"
_REMEMBERED = 8  # skeletons of a host
_SENSES = re.compile(r"vision|visual|image|video|audio|speech")

logger = logging.getLogger(__name__)


class Host(ABC):
    """A model together with the knowledge of how its library describes it.

    Attributes:
        root: the model of the library; the model that was given, or the one inside it. Stacks are named by their path
            in the root, so that a wrapper does not change the names.
        outer: the model of sentence-transformers that it was found in; None where there is none.
        kind: the model's type, for messages and for `matches` ("bert", "resnet50").
        base_prefix: path of the headless model inside models with a head; stack names may start with it or not.
        main_input: the argument of the forward that takes the tokens, or the images.
        lacking: what a batch lacks that has no input for the model, and the advice, for messages.
        batch_code: a batch as code, for messages.
        needs_labels: whether the forward pass was found to need labels.
        generates: whether the model generates text.
        tuples_begin_with_logits: whether a tuple that the model puts out begins with logits.
        classifies: whether the model puts out a bare tensor that holds logits of classes.
        merges_inputs: whether images take the place of tokens in the text, so that inputs cannot be made up.
    """

    library: str
    kind: str
    base_prefix: str
    main_input: str
    lacking: tuple[str, str]
    batch_code: str
    outer: nn.Module | None = None
    needs_labels = is_encoder_decoder = generates = tuples_begin_with_logits = classifies = merges_inputs = False
    rebuild_hint = "Load it with the settings that it was built with."

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._built: list[tuple[Any, nn.Module]] = []  # the last skeletons, each after what it was built from

    @property
    def label(self) -> str:
        """The model's class and type, for messages."""
        return f"{type(self.root).__name__} (type {self.kind!r})"

    @property
    def bare(self) -> nn.Module:
        """The model as it is now without adapters, to be read and saved: the root itself, where it has none."""
        return without_adapters(self.root)

    @property
    def plain(self) -> nn.Module:
        """The model as its settings describe it, to be looked at: without adapters, and not quantized."""
        return without_packing(self.bare)

    def as_described(self) -> Host:
        """The model as its settings describe it; this host, where the model is just that."""
        plain = self.plain
        if plain is self.root:
            return self
        host = copy.copy(self)
        host.root = plain
        return host

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """A deep copy of the settings as plain data, free to edit."""

    def build(self, settings: dict[str, Any]) -> nn.Module:
        """The skeleton (meta device) of what a stock loader builds from these settings, to be looked at only: settings
        that were built from before give the same one again.

        Raises:
            Exception: whatever the library raises where the settings are not valid for it.
        """
        made_from = copy.deepcopy((settings, self._switches()))
        skeleton = next((skeleton for known, skeleton in self._built if known == made_from), None)
        if skeleton is None:
            skeleton = self._build(copy.deepcopy(settings))
        others = [entry for entry in self._built if entry[1] is not skeleton]
        self._built[:] = [(made_from, skeleton), *others[: _REMEMBERED - 1]]  # in place: views of the model share it
        return skeleton

    @abstractmethod
    def _build(self, settings: dict[str, Any]) -> nn.Module:
        """Build a skeleton; the settings may be changed."""

    def _switches(self) -> Any:
        """What a build depends on beside the settings."""
        return None

    @property
    def layout(self) -> dict[str, dict[str, Any]]:
        """Which blocks of the model that the settings describe are left, where settings alone cannot say it (the model
        type "deeparc_pruned"); {} if they can.
        """
        return {}

    @property
    def can_drop(self) -> bool:
        """Whether a checkpoint can lack blocks that its settings cannot leave out: as "deeparc_pruned"."""
        return False

    def dropping(self, settings: dict[str, Any], step: Layout) -> dict[str, Any]:
        """The settings of the model after a removal that they cannot describe themselves. Only where `can_drop`."""
        raise NotImplementedError(f"{self.library} has no model type for that.")

    def whole(self) -> Host:
        """The skeleton of the model with all its blocks."""
        return self

    @abstractmethod
    def record(self) -> Any:
        """The pruning record that the model carries, as it was stored; None if it carries none."""

    @abstractmethod
    def set_record(self, record: dict[str, Any]) -> None:
        """Have the model carry this record, and save it with its config."""

    @abstractmethod
    def own_configs(self, transaction: Transaction) -> None:
        """Have what is noted in the model's config, the record too, be true of this model only (others may share it),
        until the transaction takes it back.
        """

    @abstractmethod
    def follow_builds(
        self, before: nn.Module, after: nn.Module, stacks: Iterable[str], transaction: Transaction
    ) -> None:
        """Change the settings that the model carries outside of these stacks as two skeletons differ. Its configs are
        its own already; settings made at run time stay.
        """

    @abstractmethod
    def loaded_from(self, cache_dir: str | os.PathLike[str] | None = None) -> tuple[str | None, str | None]:
        """Hub id and commit that the model was loaded from; None for a local folder, whose path is nobody else's
        business. The commit is known where the Hub's cache holds just one of that repository.
        """

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save the model as its library does, with its record; safetensors only."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the library writes of the model's kind into a config.json, as plain data."""

    def key_namer(self) -> Callable[[str], str]:
        """How the library names the keys of a checkpoint when it loads them."""
        return lambda key: key

    # ---- what the model takes and gives ----

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """What the forward takes, by name."""
        return inspect.signature(self.root.forward).parameters

    @property
    def takes_cache(self) -> bool:
        """Whether the forward can be told to make no cache of keys and values."""
        return "use_cache" in self.parameters

    @property
    def label_names(self) -> set[str]:
        """Arguments of the forward that take labels."""
        return {"labels"}

    def inputs_in(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch goes into the forward: tensors, and what else it has an argument for. Empty if there is no
        input for the model in it.
        """
        known = self.parameters
        return {key: v for key, v in batch.items() if isinstance(v, Tensor) or (key in known and v is not None)}

    def senses(self, stack: str) -> bool:
        """Whether a stack belongs to the part of the model that reads images or sound."""
        return False

    @abstractmethod
    def example_inputs(self) -> dict[str, Tensor] | None:
        """Small valid inputs on the model's device, or None where they cannot be known; it raises nothing."""


class TransformersHost(Host):
    """A `PreTrainedModel`, described by its config."""

    library = "transformers"
    root: PreTrainedModel

    def __init__(self, root: PreTrainedModel) -> None:
        super().__init__(root)
        self.kind = getattr(root.config, "model_type", "") or type(root).__name__
        self.base_prefix, self.main_input = root.base_model_prefix, main_input(root)
        self.is_encoder_decoder = bool(root.config.is_encoder_decoder)
        self.generates = root.can_generate()
        self.tuples_begin_with_logits = root.base_model is not root
        self.merges_inputs = merges_inputs(root.config)
        self.lacking = (
            f"{self.main_input!r} for {type(root).__name__}",
            "Tokenize or process the samples first, and collate them into tensors (DataCollatorWithPadding, an image "
            "processor).",
        )
        text = self.main_input == "input_ids"
        inputs = '"input_ids": ids, "attention_mask": mask' if text else f'"{self.main_input}": tensor'
        labels = ', "labels": labels' if self.is_encoder_decoder else ""
        self.batch_code = f"{{{inputs}{labels}}}"

    @property
    def label(self) -> str:
        architecture = getattr(self.root.config, "architecture", None) if self.kind == "timm_wrapper" else None
        return f"{type(self.root).__name__} (type {self.kind!r}{f', {architecture} of timm' if architecture else ''})"

    def settings(self) -> dict[str, Any]:
        # deepcopy: some configs (timm wrapper) hand out their own nested dicts
        settings = copy.deepcopy(self.root.config.to_dict())
        settings.pop(RECORD_KEY, None)
        settings.pop("quantization_config", None)  # it tells how weights are kept, and follows by itself
        return settings

    def _build(self, settings: dict[str, Any]) -> nn.Module:
        layout = settings.pop(LAYOUT_KEY, None)
        with quiet(), on_meta():
            kind = base_settings(type(self.root.config))
            # as a checkpoint keeps it, which leaves out what is the default and has no keys but strings
            config = kind.from_dict(json.loads(json.dumps(kind.from_dict(settings).to_diff_dict())))
            copy_attention(self.root.config, config)
            skeleton = type(self.root)(config)
        if layout:
            set_layout(skeleton.config, drop_blocks(skeleton, layout))
            skeleton.tie_weights()  # as a loader does; it fails where weights are tied to those of a block that is gone
        return skeleton

    @property
    def layout(self) -> dict[str, dict[str, Any]]:
        return layout_of(self.root.config)

    @property
    def can_drop(self) -> bool:
        return can_be_loaded(self.root) and not is_quantized(self.root)

    def dropping(self, settings: dict[str, Any], step: Layout) -> dict[str, Any]:
        layout = copy.deepcopy(settings.get(LAYOUT_KEY) or {})
        for name in step.removed:
            length = step.lengths[name]
            entry = layout.get(name, {"length": length, "kept": list(range(length))})
            layout[name] = {**entry, "kept": [entry["kept"][index] for index in step.kept[name]]}
        return {**settings, LAYOUT_KEY: layout}

    def whole(self) -> Host:
        settings = self.settings()
        settings.pop(LAYOUT_KEY, None)
        return TransformersHost(self.build(settings))

    def _switches(self) -> Any:
        return _attention_of(self.root.config)

    def record(self) -> Any:
        return getattr(self.root.config, RECORD_KEY, None)

    def set_record(self, record: dict[str, Any]) -> None:
        setattr(self.root.config, RECORD_KEY, copy.deepcopy(record))

    def own_configs(self, transaction: Transaction) -> None:
        copies: dict[int, Any] = {}
        for _, module, attribute, config in self._configs(self.root):
            transaction.set(module, attribute, copy.deepcopy(config, copies))

    def follow_builds(
        self, before: nn.Module, after: nn.Module, stacks: Iterable[str], transaction: Transaction
    ) -> None:
        # T5 and others hold several configs; each follows its own counterpart
        stacks, patched = list(stacks), set()
        for path, _, attribute, config in self._configs(self.bare):
            if not any(is_inside(stack, path) for stack in stacks) and id(config) not in patched:
                patched.add(id(config))
                old, new = (getattr(skeleton.get_submodule(path), attribute) for skeleton in (before, after))
                _patch(config, old, new)
                if layout_of(new):
                    set_layout(config, layout_of(new))

    def _configs(self, root: nn.Module) -> Iterator[tuple[str, nn.Module, str, PreTrainedConfig]]:
        """The configs that modules hold: path and module, attribute, config."""
        for path, module in root.named_modules():
            for attribute, config in list(vars(module).items()):
                if isinstance(config, PreTrainedConfig):
                    yield path, module, attribute, config

    def loaded_from(self, cache_dir: str | os.PathLike[str] | None = None) -> tuple[str | None, str | None]:
        name = getattr(self.root.config, "_name_or_path", None)
        try:
            validate_repo_id(name or "")
        except HFValidationError:
            return None, None
        if os.path.exists(name):
            return None, None
        # early versions 5 of transformers noted the commit; later ones leave it to the cache
        return name, getattr(self.root.config, "_commit_hash", None) or _cached_commit(name, cache_dir)

    def save(self, folder: str | os.PathLike[str]) -> None:
        bare: Any = self.bare
        bare.save_pretrained(folder)

    def identity(self) -> dict[str, Any]:
        return self.root.config.to_dict()

    def key_namer(self) -> Callable[[str], str]:
        return checkpoint_key_namer(self.root)

    @property
    def label_names(self) -> set[str]:
        return {"labels", *find_labels(type(self.root))}

    def inputs_in(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs, main = super().inputs_in(batch), self.main_input
        if main in inputs:
            return inputs if isinstance(inputs[main], Tensor) else {}
        return inputs if "inputs_embeds" in inputs or self.parameters.keys() & inputs.keys() - self.label_names else {}

    def senses(self, stack: str) -> bool:
        parts = vars(self.root.config).items()
        kinds = {type(part) for key, part in parts if isinstance(part, PreTrainedConfig) and _SENSES.search(key)}
        path = stack.split(".")
        holders = (self.root.get_submodule(".".join(path[:count])) for count in range(1, len(path)))
        return any(type(getattr(holder, "config", None)) in kinds for holder in holders)

    def example_inputs(self) -> dict[str, Tensor] | None:
        try:
            if self.kind == "timm_wrapper":
                return {"pixel_values": TimmHost(self.root.timm_model).example_inputs()["x"]}
            return example_inputs(self.root)
        except Exception as error:  # a config may lack or hold anything
            logger.info("No inputs can be made up for %s: %s: %s", self.label, type(error).__name__, error)
            return None


def copy_attention(source: PreTrainedConfig, target: PreTrainedConfig) -> None:
    """Have each part of a config compute attention as its counterpart does, which a config's dict does not tell.

    For every part by itself: the public setter would have all parts do alike (DETR's backbone knows no sdpa).
    """
    set_attention(target, attention_of(source))
    for name, part in vars(source).items():
        other = vars(target).get(name)
        if isinstance(part, PreTrainedConfig) and isinstance(other, PreTrainedConfig):
            copy_attention(part, other)


def _attention_of(config: PreTrainedConfig) -> list[Any]:
    parts = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]
    return [attention_of(config), *map(_attention_of, parts)]


def _patch(config: PreTrainedConfig, before: PreTrainedConfig, after: PreTrainedConfig) -> None:
    """Change in `config` what differs between two others."""
    for key, value in vars(after).items():
        old = vars(before).get(key)
        if isinstance(value, PreTrainedConfig) and isinstance(old, PreTrainedConfig):
            _patch(getattr(config, key), old, value)
        elif old != value:
            setattr(config, key, copy.deepcopy(value))
    for key in vars(before).keys() - vars(after).keys():
        vars(config).pop(key, None)


@contextmanager
def quiet(least: int = hf_logging.WARNING) -> Iterator[None]:
    """Within, transformers logs nothing below this level (every skeleton's config, at level info)."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity(max(level, least))
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)


class TimmHost(Host):
    """A model that `timm.create_model` made, described by its architecture name and model_args."""

    library = "timm"
    rebuild_hint = (
        "timm before 1.0.31 does not record the arguments of create_model: pip install -U timm, and build "
        "the model again."
    )

    base_prefix = "timm_model"  # what transformers' TimmWrapper calls it
    main_input = "x"
    batch_code = "(images,)"
    lacking = (
        "images for a timm model",
        "Give tuples (images, labels), or dicts with a tensor under 'pixel_values'.",
    )

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        self.kind = str(self._pretrained_cfg().get("architecture") or type(root).__name__)
        self.classifies = (getattr(root, "num_classes", 0) or 0) > 1

    def _pretrained_cfg(self) -> dict[str, Any]:
        cfg = getattr(self.root, "pretrained_cfg", None) or {}
        return cfg if isinstance(cfg, dict) else cfg.to_dict()

    def settings(self) -> dict[str, Any]:
        try:
            from timm.models import get_model_args
        except ImportError:
            # timm before 1.0.31 records but the number of classes: a model built with other arguments is refused later
            classes = getattr(self.root, "num_classes", 1000)
            return {**copy.deepcopy(getattr(self.root, "_model_args", {})), "num_classes": classes}
        return copy.deepcopy(get_model_args(self.root))

    def _build(self, settings: dict[str, Any]) -> nn.Module:
        import timm

        with on_meta():
            return timm.create_model(self.kind, pretrained=False, **settings)

    def record(self) -> Any:
        stored = getattr(self.root, RECORD_KEY, None)
        # timm does not keep what it does not know of a checkpoint's config.json, but it does keep where it came from
        return stored if stored is not None else _stored_record(self._pretrained_cfg())

    def set_record(self, record: dict[str, Any]) -> None:
        setattr(self.root, RECORD_KEY, copy.deepcopy(record))

    def own_configs(self, transaction: Transaction) -> None:
        transaction.set(self.root, RECORD_KEY, getattr(self.root, RECORD_KEY, None))  # it has no config to share

    def follow_builds(
        self, before: nn.Module, after: nn.Module, stacks: Iterable[str], transaction: Transaction
    ) -> None:
        old, new = (getattr(skeleton, "_model_args", {}) for skeleton in (before, after))
        changed = {key: value for key, value in new.items() if old.get(key) != value}
        transaction.set(self.root, "_model_args", {**getattr(self.root, "_model_args", {}), **changed})

    def loaded_from(self, cache_dir: str | os.PathLike[str] | None = None) -> tuple[str | None, str | None]:
        cfg = self._pretrained_cfg()
        # timm names a Hub id for models with random weights too; only one that was asked for by id is known to come
        # from there
        name = (cfg.get("hf_hub_id") or None) if cfg.get("source") == "hf-hub" else None
        return name, _cached_commit(name, cache_dir)

    def save(self, folder: str | os.PathLike[str]) -> None:
        from timm.models import save_for_hf

        extra = {} if self.record() is None else {RECORD_KEY: self.record()}
        save_for_hf(self.bare, str(folder), model_config=extra, model_args=self.settings(), safe_serialization=True)
        # the layout has a place of its own for the number of classes, and transformers' TimmWrapper cannot hear of it
        # twice
        path = Path(folder, "config.json")
        config = json.loads(path.read_text("utf-8"))
        if config.get("model_args", {}).get("num_classes") == config["num_classes"]:
            del config["model_args"]["num_classes"]
            path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    def identity(self) -> dict[str, Any]:
        classes = getattr(self.root, "num_classes", None)
        return {"architecture": self.kind, "pretrained_cfg": {}, "num_classes": classes}

    def inputs_in(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs = super().inputs_in(batch)
        return next(({"x": inputs[key]} for key in ("x", "pixel_values", "image", "images") if key in inputs), {})

    def example_inputs(self) -> dict[str, Tensor]:
        device, dtype = device_of(self.root), next(self.root.parameters()).dtype
        given, cfg = self.settings(), self._pretrained_cfg()
        channels, size = given.get("in_chans", 3), given.get("img_size")
        if size is None:  # most CNNs take images of any size
            size = cfg["input_size"][1:] if cfg.get("fixed_input_size") and "input_size" in cfg else 64
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        pixels = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
        return {"x": pixels.to(device, dtype)}


def _cached_commit(name: str | None, cache_dir: str | os.PathLike[str] | None) -> str | None:
    found = None if name is None else try_to_load_from_cache(name.partition("@")[0], "config.json", cache_dir=cache_dir)
    if not isinstance(found, str):
        return None
    snapshot = Path(found).parent
    return snapshot.name if len(list(snapshot.parent.iterdir())) == 1 else None


def _stored_record(cfg: dict[str, Any]) -> Any:
    """The record in the config.json that a timm model was created from (a folder, or a file of the Hub's cache)."""
    path = None
    if cfg.get("source") == "local-dir" and cfg.get("file"):
        path = Path(cfg["file"], "config.json")
    elif cfg.get("source") == "hf-hub" and cfg.get("hf_hub_id"):
        name, _, revision = str(cfg["hf_hub_id"]).partition("@")
        found = try_to_load_from_cache(name, "config.json", revision=revision or None)
        path = Path(found) if isinstance(found, str) else None
    if path is None or not path.is_file():
        return None
    return json.loads(path.read_text("utf-8")).get(RECORD_KEY)


def find_host(model: nn.Module) -> Host:
    """Find the model of a known library in the model that was given, through wrappers (DDP, torch.compile).

    Raises:
        UnsupportedModelError: if there is none or more than one, or it is quantized or has adapters (PEFT) in a way
            that could not follow a removal.
    """
    if not isinstance(model, nn.Module):
        advice = "Load it first, for example with AutoModelForSequenceClassification.from_pretrained(...)."
        if isinstance(getattr(model, "model_body", None), nn.Module):  # SetFit
            advice = (
                "Prune its encoder, model.model_body: between train_embeddings and train_classifier of SetFit's "
                "trainer, which hands its callbacks no model that they could prune."
            )
        raise UnsupportedModelError(f"Expected a model (torch.nn.Module), found {type(model).__name__}. {advice}")
    model = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    found: dict[str, Host] = {}
    for name, module in model.named_modules():
        if any(outer == "" or name.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(module, PreTrainedModel):
            found[name] = TransformersHost(module)
        elif type(module).__module__.startswith("timm.models.") and hasattr(module, "pretrained_cfg"):
            found[name] = TimmHost(module)
    if len(found) == 1:
        (host,) = found.values()
        host.outer = model if is_sentence_encoder(model) else None
        refuse_adapters(model, host.root)
        refuse_quantized(host.root)
        return host
    if found:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(found)} models side by side ({', '.join(found)}). Prune each of them "
            "by itself."
        )
    raise UnsupportedModelError(
        f"{type(model).__name__} is neither a transformers model nor a timm model, and holds none. deeparc_hf prunes "
        "models whose own library can rebuild them smaller; see 'add a family' in CONTRIBUTING.md."
    )
