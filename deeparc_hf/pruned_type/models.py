"""Models of the type "deeparc_pruned": what the Auto classes build for such a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..core.compat import auto_classes
from ..core.transaction import Transaction
from ..errors import RecordError
from .config import (
    LAYOUT_KEY,
    DeepArcPrunedConfig,
    PrunedSettings,
    base_settings,
    checked_layout,
    pruned_settings,
)

__all__ = [
    "auto_class_for",
    "can_be_loaded",
    "class_with_dropped_blocks",
    "drop_blocks",
    "layout_of",
    "register",
    "set_layout",
]


def layout_of(config: Any) -> dict[str, dict[str, Any]]:
    """Which blocks of the model that a config describes are left (`checked_layout`); {} if it is whole."""
    return getattr(config, LAYOUT_KEY, None) or {} if isinstance(config, PrunedSettings) else {}


def set_layout(config: PreTrainedConfig, layout: Mapping[str, Mapping[str, Any]]) -> None:
    """Have a live config, wherever it is held, say which blocks are left."""
    config.__class__ = pruned_settings(type(config))
    setattr(config, LAYOUT_KEY, {name: dict(entry) for name, entry in layout.items()})


def can_be_loaded(model: PreTrainedModel) -> bool:
    """Whether an Auto class of transformers knows the model's class, so that it can also load it with less blocks."""
    return auto_class_for(type(model), model.config) is not None


def auto_class_for(cls: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    """The Auto class that builds a class of models from a config; None if there is none."""
    kind = base_settings(type(config))
    for auto, mapping in auto_classes():
        found = mapping.get(kind, ())
        if cls in (found if isinstance(found, (list, tuple)) else (found,)):
            return auto
    return None


def drop_blocks(model: nn.Module, layout: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Take blocks out of a whole model that was just built.

    Args:
        model: with a head or without, whichever the layout was made for.
        layout: as `checked_layout` gives it.

    Returns:
        The layout, with the names that the stacks have in this model.

    Raises:
        RecordError: if the model has no such list of blocks.
    """
    prefix, found = f"{getattr(model, 'base_model_prefix', '')}.", {}
    with Transaction() as transaction:
        for name, entry in layout.items():
            names = (name, name.removeprefix(prefix), prefix + name)
            path = next((path for path in names if _container(model, path) is not None), name)
            container, found[path] = _container(model, path), entry
            children = [] if container is None else list(container.children())
            if container is None or len(children) != entry["length"]:
                raise RecordError(
                    f"The checkpoint says which of the {entry['length']} blocks of {name} are left, but "
                    f"{type(model).__name__} has {len(children) or 'no blocks'} there. Download the checkpoint again."
                )
            transaction.keep_children(container, [children[index] for index in entry["kept"]])
    return found


def _container(model: nn.Module, path: str) -> nn.ModuleList | nn.Sequential | None:
    try:
        found = model.get_submodule(path)
    except AttributeError:
        return None
    return found if isinstance(found, nn.ModuleList | nn.Sequential) else None


@functools.cache
def class_with_dropped_blocks(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A class of the same name whose models lack the blocks that their config's layout lacks."""

    def init(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        set_layout(self.config, drop_blocks(self, checked_layout(getattr(config, LAYOUT_KEY, None))))

    return type(base.__name__, (base,), {"__module__": base.__module__, "__doc__": base.__doc__, "__init__": init})


class PrunedModel:
    """What an Auto class takes for the model's class: it finds the base's, and builds that with less blocks.

    Attributes:
        auto, mapping: the Auto class, and its classes of models by config.
    """

    config_class = DeepArcPrunedConfig
    auto: ClassVar[type[Any]]
    mapping: ClassVar[Any]

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *args: Any, config: DeepArcPrunedConfig, **kwargs: Any) -> Any:
        base = cls._base(config.base)
        loaded = class_with_dropped_blocks(base).from_pretrained(name_or_path, *args, config=config.base, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).__class__ = base
        return loaded

    @classmethod
    def _from_config(cls, config: DeepArcPrunedConfig, **kwargs: Any) -> Any:  # what the Auto classes call
        base = cls._base(config.base)
        model = class_with_dropped_blocks(base)._from_config(config.base, **kwargs)
        model.__class__ = base
        return model

    @classmethod
    def _base(cls, config: PreTrainedConfig) -> type[PreTrainedModel]:
        if type(config) not in cls.mapping:
            raise ValueError(
                f"A pruned model of type {config.model_type!r} cannot be loaded with {cls.auto.__name__}: "
                f"transformers has no such model. It was saved as {', '.join(config.architectures or ['?'])}."
            )
        found = cls.mapping[type(config)]
        if not isinstance(found, (list, tuple)):
            return found
        return next((one for one in found if one.__name__ in (config.architectures or ())), found[0])


def register() -> None:
    """Tell the Auto classes of the type."""
    for auto, mapping in auto_classes():
        loader = type(f"Pruned{auto.__name__}", (PrunedModel,), {"auto": auto, "mapping": mapping})
        auto.register(DeepArcPrunedConfig, loader, exist_ok=True)
