"""The config of a checkpoint of the type "deeparc_pruned", and that of a model which was loaded from one.

In config.json the settings of the whole model stand under `base_config`, its type under `base_model_type` (a class of
transformers takes a part with a model_type of its own for its config), and which of its blocks are left under
`deeparc_layout`. A live model has a config of its base's kind (its `model_type` too, for all that looks at it), which
knows the layout and saves itself in that form.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Mapping
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from ..errors import RecordError
from . import MODEL_TYPE

__all__ = [
    "BASE_KEY",
    "LAYOUT_KEY",
    "DeepArcPrunedConfig",
    "PrunedSettings",
    "base_settings",
    "checked_layout",
    "pruned_settings",
    "register",
]

LAYOUT_KEY, BASE_KEY, TYPE_KEY = "deeparc_layout", "base_config", "base_model_type"
_OWN = ("pruning_config", "architectures", "transformers_version")  # what stands outside of the base's settings
# A class that is not an Auto class would build a whole model of its defaults, and say little. But every class refuses
# an implementation of attention that it does not know, with its name in the message.
_NEEDED = "needs_deeparc_hf__import_deeparc_hf_and_load_this_checkpoint_with_an_Auto_class"


class PrunedSettings:
    """Mixed into a config class of transformers: the settings of the whole model, and which of its blocks are left."""

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written into config.json."""
        base: dict[str, Any] = super().to_diff_dict()  # type: ignore[misc]
        layout = base.pop(LAYOUT_KEY)
        own = {key: base.pop(key) for key in _OWN if key in base}
        kind = base.pop("model_type")
        return {
            "model_type": MODEL_TYPE,
            "attn_implementation": _NEEDED,
            **own,
            TYPE_KEY: kind,
            BASE_KEY: base,
            LAYOUT_KEY: layout,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _revived, (base_settings(type(self)), copy.copy(vars(self)))


def _revived(kind: type[PreTrainedConfig], state: dict[str, Any]) -> PreTrainedConfig:
    config = object.__new__(pruned_settings(kind))
    vars(config).update(state)
    return config


@functools.cache
def pruned_settings(kind: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class of configs of a kind that know which blocks are left. It has the kind's name, by which the Auto classes
    find models, tokenizers and processors.
    """
    if issubclass(kind, PrunedSettings):
        return kind
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (PrunedSettings, kind), names)


def base_settings(kind: type[Any]) -> type[Any]:
    """The class of configs of a kind, of whole models."""
    return next(
        cls for cls in kind.__mro__ if issubclass(cls, PreTrainedConfig) and not issubclass(cls, PrunedSettings)
    )


class DeepArcPrunedConfig(PreTrainedConfig):
    """What AutoConfig gives for a checkpoint of the type: all attributes of the config that the model will have.

    Attributes:
        base: that config.
    """

    model_type = MODEL_TYPE

    def __init__(self, base: PreTrainedConfig | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if base is not None:
            vars(self).update(vars(base))
            self.base = base

    def __getattr__(self, name: str) -> Any:
        base = vars(self).get("base")
        if base is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(base, name)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read what `PrunedSettings.to_diff_dict` has written.

        Raises:
            RecordError: if it is malformed, or its base is of a type that this transformers does not have.
        """
        # only now: the list of models is large, and may be what is just being imported when the type is registered
        importlib.import_module(".models", __package__).register()
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        settings = _settings(config_dict)
        kind = pruned_settings(CONFIG_MAPPING[config_dict[TYPE_KEY]])
        base, unused = kind.from_dict(settings, return_unused_kwargs=True, **kwargs)
        config = cls(base)
        return (config, unused) if wants_unused else config

    def to_diff_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = self.base.to_diff_dict()
        return found


def _settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the whole model, with its layout, from a config.json, which may hold anything."""
    base, kind = stored.get(BASE_KEY), stored.get(TYPE_KEY)
    if not isinstance(base, Mapping) or not isinstance(kind, str):
        raise RecordError(
            f"The config.json has the model_type {MODEL_TYPE!r}, but not the settings and the type of the whole model: "
            f"{BASE_KEY!r} is {type(base).__name__}, {TYPE_KEY!r} {type(kind).__name__}. Download the checkpoint again."
        )
    if kind not in CONFIG_MAPPING or kind == MODEL_TYPE:
        raise RecordError(
            f"The checkpoint was pruned from a model of type {kind!r}, which this version of transformers does not "
            "know. Upgrade it: pip install -U transformers."
        )
    own = {key: stored[key] for key in _OWN if key in stored}
    return {**copy.deepcopy(dict(base)), **copy.deepcopy(own), LAYOUT_KEY: checked_layout(stored.get(LAYOUT_KEY))}


def checked_layout(stored: Any) -> dict[str, dict[str, Any]]:
    """Which blocks of which stacks are left: by path of the list of blocks, its "length" in the whole model and the
    indices that are "kept".

    Raises:
        RecordError: if it is anything else.
    """
    valid = isinstance(stored, Mapping) and all(
        isinstance(name, str)
        and isinstance(entry, Mapping)
        and entry.keys() == {"length", "kept"}
        and type(entry["length"]) is int
        and isinstance(entry["kept"], (list, tuple))
        and all(type(index) is int and 0 <= index < entry["length"] for index in entry["kept"])
        and list(entry["kept"]) == sorted(set(entry["kept"]))
        and entry["kept"]
        for name, entry in stored.items()
    )
    if not valid:
        raise RecordError(
            f"{LAYOUT_KEY!r} in config.json does not say which blocks are left: expected, by the path of each list of "
            'blocks, {"length": number, "kept": [rising indices]}. Download the checkpoint again.'
        )
    return {name: {"length": entry["length"], "kept": list(entry["kept"])} for name, entry in stored.items()}


def register() -> None:
    """Tell AutoConfig of the type."""
    AutoConfig.register(MODEL_TYPE, DeepArcPrunedConfig, exist_ok=True)
