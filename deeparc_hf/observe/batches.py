"""Batches of any form that a dataloader gives, turned into what a model's forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..architectures import Host
from ..core.offload import device_of
from ..core.sentence_encoders import tokenized
from ..errors import CalibrationError

__all__ = ["batch_size", "columns", "cut", "forward_kwargs", "is_cuttable", "padding_masks", "without_labels"]

# of these the first dimension is that of the samples, whatever else stands in a batch
_PER_SAMPLE = ("input_ids", "inputs_embeds", "attention_mask", "decoder_input_ids")


def columns(host: Host, batch: Any) -> list[Any]:
    """The batches in a batch: several where sentence-transformers has collated pairs (anchor_input_ids, ...), or leaves
    texts to be tokenized by its model.
    """
    main = host.main_input
    if isinstance(batch, Mapping) and host.inputs_in(batch).get(main) is not None:
        return [batch]
    texts = [] if host.outer is None else tokenized(host.outer, batch)
    if texts or not isinstance(batch, Mapping):
        return texts or [batch]
    prefixes = [
        key.removesuffix(main)
        for key in batch
        if isinstance(key, str) and key.endswith(f"_{main}") and key != f"decoder_{main}"
    ]
    return [
        {key.removeprefix(prefix): v for key, v in batch.items() if key.startswith(prefix)} for prefix in prefixes
    ] or [batch]


def forward_kwargs(host: Host, batch: Any) -> dict[str, Any]:
    """Keyword arguments for `host.root`, on its device; of a batch with several columns of texts those of the first.

    Of mappings (dict, BatchEncoding, ModelOutput) all tensors are passed on, and what else the forward has an argument
    for (`interpolate_pos_encoding=True`, lists of tensors). Of a tuple, a list or a lone tensor the first entry is the
    model's main input; a second one that is 1 just where the first is not padding is the attention mask; the others
    (labels) are left out.

    Raises:
        CalibrationError: if the batch has no input for the model.
    """
    batch = columns(host, batch)[0]
    if isinstance(batch, Mapping):
        inputs = host.inputs_in(batch)
        if not inputs:
            what, advice = host.lacking
            raise CalibrationError(f"A calibration batch has no {what}; found {_describe(batch)}. {advice}")
    else:
        inputs = _positional(host, batch)
    device, dtype = device_of(host.root), next(host.root.parameters()).dtype
    return {key: _place(value, device, dtype) for key, value in inputs.items()}


def batch_size(inputs: Mapping[str, Any]) -> int:
    """Number of samples: the length of the texts, else of the first tensor that has one."""
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
    first = next((tensors[key] for key in _PER_SAMPLE if key in tensors), next(iter(tensors.values()), None))
    return 0 if first is None else len(first)


def is_cuttable(inputs: Mapping[str, Any]) -> bool:
    """Whether samples can be taken out of a batch: all its tensors have one entry a sample, or positions for them all;
    not where the patches of all images stand in one tensor (Qwen2-VL).
    """
    whole = batch_size(inputs)
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
    return all(len(value) == whole or (len(value) == 1 and "position" in key) for key, value in tensors.items())


def cut(inputs: Mapping[str, Any], size: int | Sequence[int]) -> dict[str, Any]:
    """The first `size` samples of a batch, or those of these indices; the whole batch if it is not cuttable."""
    whole = batch_size(inputs)
    indices = list(range(min(size, whole))) if isinstance(size, int) else list(size)
    if not is_cuttable(inputs) or indices == list(range(whole)):
        return dict(inputs)

    def chosen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == whole:
            return value[indices]
        return (
            [value[index] for index in indices] if isinstance(value, (list, tuple)) and len(value) == whole else value
        )

    return {key: chosen(value) for key, value in inputs.items()}


def without_labels(host: Host, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the forward pass needs: labels only where it cannot do without, or makes a decoder's inputs from them."""
    if host.needs_labels:
        return dict(inputs)
    known = host.parameters
    dropped = {
        name for name in host.label_names if name not in known or known[name].default is not inspect.Parameter.empty
    }
    if host.is_encoder_decoder and "decoder_input_ids" not in inputs:
        dropped.discard("labels")
    return {key: value for key, value in inputs.items() if key not in dropped}


def padding_masks(inputs: Mapping[str, Any]) -> dict[str | None, Tensor | None]:
    """Unpadded positions by side ("encoder", "decoder", None for models of one side), bool; None: unknown.

    Their shape is (B, T), in multiple choice (B, choices, T). The decoder's follow from `decoder_attention_mask`, else
    from the labels that are not -100: position t of the decoder's input predicts label t.
    """
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    known = isinstance(mask, Tensor) and (mask.ndim == 2 or (isinstance(ids, Tensor) and mask.shape == ids.shape))
    mask = mask.bool() if known else None
    decoder, labels, fed = (inputs.get(key) for key in ("decoder_attention_mask", "labels", "decoder_input_ids"))
    if isinstance(decoder, Tensor) and decoder.ndim == 2:
        decoder = decoder.bool()
    elif (
        isinstance(labels, Tensor)
        and labels.ndim == 2
        # DataCollatorForSeq2Seq(model=...) puts both into a batch
        and (fed is None or (isinstance(fed, Tensor) and fed.shape == labels.shape))
    ):
        decoder = labels != -100
    else:
        decoder = None
    return {None: mask, "encoder": mask, "decoder": decoder}


def _positional(host: Host, batch: Any) -> dict[str, Tensor]:
    entries = [batch] if isinstance(batch, Tensor) else list(batch) if isinstance(batch, Sequence) else []
    if isinstance(batch, str) or not entries or not isinstance(entries[0], Tensor):
        raise CalibrationError(
            f"Cannot use a calibration batch of type {type(batch).__name__}: found {_describe(batch)}. Give dicts of "
            "tensors, or tuples whose first entry is the model's input tensor."
        )
    if host.is_encoder_decoder:
        raise CalibrationError(
            f"{type(host.root).__name__} has an encoder and a decoder, and a batch of type {type(batch).__name__} does "
            "not say which tensor is for which. Give dicts with input_ids, attention_mask and labels (or "
            "decoder_input_ids)."
        )
    main = host.main_input
    inputs = {main: entries[0]}
    if main == "input_ids" and len(entries) > 1 and isinstance(entries[1], Tensor):
        second = entries[1]
        if second.shape == entries[0].shape and bool(((second == 0) | (second == 1)).all()):
            pad = getattr(host.root.config, "pad_token_id", None)
            # token types and token labels hold 0 and 1 too
            if pad is None or not torch.equal(second.bool(), entries[0] != pad):
                raise CalibrationError(
                    "Cannot tell whether the second tensor of a calibration batch is the attention mask: it is not 1 "
                    f"just where the first is not padding (token {pad}). Give dicts with input_ids and attention_mask."
                )
            inputs["attention_mask"] = second
    return inputs


def _place(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return [_place(item, device, dtype) for item in value]
    if isinstance(value, Mapping):
        return {key: _place(item, device, dtype) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    # images meet a half-precision model in its own precision, as autocast would have it
    return value.to(device, dtype if value.is_floating_point() and dtype.is_floating_point else None)


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {_kind(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return f"[{', '.join(_kind(value) for value in list(batch)[:4])}]"
    return _kind(batch)


def _kind(value: Any) -> str:
    return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
