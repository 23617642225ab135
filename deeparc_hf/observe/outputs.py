"""The outputs of a model for a batch as heads that two models can be compared on, padding left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..architectures import Host
from ..errors import CalibrationError
from ..similarity.divergence import Head
from .batches import padding_masks

__all__ = ["IGNORED", "heads_of", "is_logits", "label_mask", "shifts_labels"]

IGNORED = -100  # torch's and transformers' label of positions that do not count


def heads_of(host: Host, output: Any, inputs: Mapping[str, Any]) -> list[Head]:
    """What a model put out for some inputs: all that is called logits; without any, the first tensor beside the loss
    (an embedding model's hidden states). Labels say which positions count, else the attention mask does.

    Raises:
        CalibrationError: if there is no tensor in the output.
    """
    entries = _entries(output)
    logits = {name: value for name, value in entries.items() if is_logits(name)}
    config = getattr(host.root, "config", None)
    if not logits:
        name, value = next(iter(entries.items()), (None, None))
        if name is None:
            raise CalibrationError(
                f"{type(host.root).__name__} puts out a {type(output).__name__} without logits or hidden states to "
                "compare. Fused losses (Liger kernels) leave them out: switch these off."
            )
        # a tuple (return_dict=False) begins with the logits, where the model has a head
        if isinstance(output, (tuple, list)) and host.tuples_begin_with_logits:
            kind = _kind(config, "logits", value, inputs)
            return [_head(host, "logits", kind, value, inputs)]
        distributes = value.ndim == 2 and host.classifies
        return [_head(host, str(name), "softmax" if distributes else "values", value, inputs)]
    return [
        _head(host, name, kind, value, inputs)
        for name, value in logits.items()
        if (kind := _kind(config, name, value, inputs))
    ]


def is_logits(name: str) -> bool:
    """Whether an entry of a model's output is called logits."""
    return name == "logits" or name.endswith("_logits") or name.startswith("logits_")


def shifts_labels(host: Host) -> bool:
    """Whether position t of the logits predicts the label at t + 1 (causal language models)."""
    if host.is_encoder_decoder:
        return False
    shifting = LOSS_MAPPING.get(getattr(host.root, "loss_type", None)) is ForCausalLMLoss
    return shifting or type(host.root).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def label_mask(host: Host, inputs: Mapping[str, Any]) -> Tensor | None:
    """Which labels count, where they stand among the positions of the logits; None: there are no labels."""
    labels = inputs.get("shift_labels")
    if isinstance(labels, Tensor):
        return labels != IGNORED
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor):
        return None
    mask = labels != IGNORED
    if labels.ndim > 1 and shifts_labels(host):
        return torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], dim=-1)
    return mask


def _entries(output: Any) -> dict[str, Tensor]:
    """The tensors in an output, by name, without the loss."""
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, (tuple, list)):
        output = {f"output {index}": value for index, value in enumerate(output)}
    found = output.items() if isinstance(output, Mapping) else ()
    return {str(k): v for k, v in found if isinstance(v, Tensor) and k != "loss" and v.ndim > 1}


def _kind(config: Any, name: str, value: Tensor, inputs: Mapping[str, Any]) -> str:
    problem, labels = getattr(config, "problem_type", None), inputs.get("labels")
    many = isinstance(labels, Tensor) and labels.is_floating_point() and labels.shape == value.shape
    if problem is None and many and value.shape[-1] > 1:
        # as transformers would note it in the config of the model that is given these labels
        problem = "multi_label_classification"
    if "mask" in name or (problem == "multi_label_classification" and value.ndim == 2):
        return "sigmoid"
    if value.ndim == 2 and (problem == "regression" or value.shape[1] == 1):
        return "values"
    return "softmax"


def _head(host: Host, name: str, kind: str, value: Tensor, inputs: Mapping[str, Any]) -> Head:
    numbers = torch.arange(len(value), device=value.device).reshape(-1, *[1] * (value.ndim - 1))
    one = numbers.expand_as(value[:, :1] if value.ndim != 3 else value[..., :1])
    return Head(name, kind, _rows(host, value, inputs), _rows(host, one, inputs)[:, 0])


def _rows(host: Host, value: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Rows (N, C) of an output (B, C), (B, T, C) or (B, C, H, W)."""
    if value.ndim == 4:
        return value.movedim(1, -1).reshape(-1, value.shape[1])
    if value.ndim != 3:
        return value.reshape(len(value), -1)
    mask = label_mask(host, inputs)
    if mask is None or mask.shape != value.shape[:2]:
        mask = padding_masks(inputs)["decoder" if host.is_encoder_decoder else None]
    flat = value.reshape(-1, value.shape[-1])
    if mask is None or mask.shape != value.shape[:2] or bool(mask.all()):
        return flat
    return flat[mask.flatten().to(flat.device)]
