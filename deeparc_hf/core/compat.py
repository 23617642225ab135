"""The only place that touches parts of other libraries that are not documented for users. Each entry says why, and when
it can go.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

__all__ = ["calling_trainer", "checkpoint_key_namer", "running_method"]


def checkpoint_key_namer(model: PreTrainedModel) -> Callable[[str], str]:
    """How `from_pretrained` names the keys of a checkpoint: older layouts, fused tensors and base-model prefixes.

    Why: a checkpoint may store "vit.encoder.layer.3..." for what the model calls "vit.layers.3...", and only
    transformers knows. To be removed when from_pretrained can be told which keys to leave unread.

    Args:
        model: the full model, on the meta device.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()

    def name(key: str) -> str:
        renamed, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and key in state:
            renamed, _ = rename_source_key(key, [], [], model.base_model_prefix, state)
        return renamed

    return name


def calling_trainer() -> Any:
    """The Trainer that is calling a callback; None if none is.

    Why: a Trainer does not hand itself to its callbacks, and no event comes before it loads a checkpoint. What is done
    to a model for that must be known to be done by this Trainer: a script loads weights too. To be removed when there
    is such an event.
    """
    return next((owner for owner, _ in _running() if "callback_handler" in getattr(owner, "__dict__", {})), None)


def running_method(owner: Any) -> str | None:
    """The name of the method of an object that is running, the innermost one of several; None if none is. Why: as for
    `calling_trainer`.
    """
    return next((name for running, name in _running() if running is owner), None)


def _running() -> list[tuple[Any, str]]:
    """The methods that are running, the innermost first: their objects and names."""
    running = []
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            running.append((frame.f_locals.get("self"), frame.f_code.co_name))
        frame = frame.f_back
    return running
