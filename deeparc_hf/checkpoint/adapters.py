"""Saving a model with adapters (PEFT): the model beneath as a checkpoint of its own, the adapters in a folder in it."""

from __future__ import annotations

import copy
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from ..architectures.adapters import adapters_of, is_merged
from ..errors import UnsupportedModelError

__all__ = ["FOLDER", "refuse_merged", "save_adapters"]

FOLDER = "adapter"  # in the folder of the model beneath
_WEIGHTS = "adapter_model.safetensors"
_START = "base_model.model."  # of every key in a file of PEFT's


def refuse_merged(root: nn.Module) -> None:
    """Refuse a model whose adapters are merged for the time being: its base weights are not its own.

    Raises:
        UnsupportedModelError: if any is.
    """
    if is_merged(root):
        raise UnsupportedModelError(
            f"The adapters of {type(root).__name__} are merged into its weights and still there, so that they would be "
            "saved twice. Call model.unmerge_adapter() before saving, or model.merge_and_unload() to save one model."
        )


def save_adapters(root: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write each adapter as PEFT does, to be loaded on the model that lies in `folder`: the one called "default" into
    its folder "adapter", others into folders of their names in there.
    """
    import peft

    for name, config in adapters_of(root).items():
        place = Path(folder, FOLDER, *([] if name == "default" else [name]))
        place.mkdir(parents=True, exist_ok=True)
        # the model beneath lies beside it, with its embeddings
        tensors = peft.get_peft_model_state_dict(root, adapter_name=name, save_embedding_layers=False)
        copies = {f"{_START}{key}": tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        save_file(copies, place / _WEIGHTS, metadata={"format": "pt"})
        saved = copy.deepcopy(config)
        saved.base_model_name_or_path, saved.inference_mode = str(folder), True
        saved.save_pretrained(str(place))
