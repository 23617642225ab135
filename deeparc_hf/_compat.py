"""The only place that touches parts of other libraries that are not documented for users. Each entry says why, and when it can go."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

__all__ = ["checkpoint_key_namer"]


def checkpoint_key_namer(model: PreTrainedModel) -> Callable[[str], str]:
    """How `from_pretrained` names the keys of a checkpoint: older layouts, fused tensors and base-model prefixes.

    Why: a checkpoint may store "vit.encoder.layer.3..." for what the model calls "vit.layers.3...", and only transformers
    knows. To be removed when from_pretrained can be told which keys to leave unread.

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
