"""Batches of any form that a dataloader gives, turned into what a model's forward takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .architectures import Host, Stack
from .errors import CalibrationError

__all__ = ["batch_size", "columns", "cut", "forward_kwargs", "padding_mask", "padding_masks", "without_labels"]


def columns(host: Host, batch: Any) -> list[Any]:
    """The batches in a batch: more than one where several texts stand side by side, each under a prefix of its own.

    So sentence-transformers collates pairs and triplets: anchor_input_ids, positive_input_ids, ...
    """
    main = _main_input(host)
    if not isinstance(batch, Mapping) or main in batch or host.library == "timm":
        return [batch]
    prefixes = [key.removesuffix(main) for key in batch if isinstance(key, str) and key.endswith(f"_{main}") and key != f"decoder_{main}"]
    return [{key.removeprefix(prefix): v for key, v in batch.items() if key.startswith(prefix)} for prefix in prefixes] or [batch]


def forward_kwargs(host: Host, batch: Any) -> dict[str, Any]:
    """Keyword arguments for `host.root`, on its device; of a batch with several columns of texts those of the first.

    Mappings (dict, BatchEncoding, ModelOutput) are passed on, their tensors only. Of a tuple, a list or a lone tensor the
    first entry is the model's main input; a second one that is 1 just where the first is not padding is the attention mask;
    the others (labels) are left out.

    Raises:
        CalibrationError: if the batch has no input for the model.
    """
    main = _main_input(host)
    batch = columns(host, batch)[0]
    if isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        if host.library == "timm":
            inputs = _timm_input(inputs)
        elif main not in inputs and "inputs_embeds" not in inputs:
            raise CalibrationError(
                f"A calibration batch has no {main!r} for {type(host.root).__name__}; found {_describe(batch)}. Tokenize or process the "
                "samples first, and collate them into tensors (DataCollatorWithPadding, an image processor)."
            )
    else:
        inputs = _positional(host, main, batch)
    parameter = next(host.root.parameters())
    return {key: _place(value, parameter) for key, value in inputs.items()}


def batch_size(inputs: Mapping[str, Any]) -> int:
    """Number of samples: the length of the first tensor that has one."""
    return next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim), 0)


def cut(inputs: dict[str, Any], size: int) -> dict[str, Any]:
    """The first `size` samples of a batch."""
    whole = batch_size(inputs)
    return {k: v[:size] if isinstance(v, Tensor) and v.ndim and len(v) == whole else v for k, v in inputs.items()}


def without_labels(host: Host, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the forward pass needs: labels only where a decoder's inputs are made from them.

    A loss is not asked for, and some models note in their config which kind of loss the labels call for.
    """
    makes_decoder_inputs = host.library == "transformers" and host.root.config.is_encoder_decoder and "decoder_input_ids" not in inputs
    return {key: value for key, value in inputs.items() if makes_decoder_inputs or key != "labels"}


def padding_masks(inputs: Mapping[str, Any]) -> dict[str | None, Tensor | None]:
    """Unpadded positions by side ("encoder", "decoder", None for models of one side), shape (B, T) bool; None: unknown.

    The decoder's follow from `decoder_attention_mask`, else from the labels that are not -100: position t of the decoder's
    input predicts label t.
    """
    mask = inputs.get("attention_mask")
    mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    decoder = inputs.get("decoder_attention_mask")
    labels = inputs.get("labels")
    if isinstance(decoder, Tensor) and decoder.ndim == 2:
        decoder = decoder.bool()
    elif isinstance(labels, Tensor) and labels.ndim == 2 and _goes_with(labels, inputs.get("decoder_input_ids")):
        decoder = labels != -100
    else:
        decoder = None
    return {None: mask, "encoder": mask, "decoder": decoder}


def padding_mask(host: Host, stack: Stack, inputs: Mapping[str, Any]) -> Tensor | None:
    """Unpadded positions of a stack, shape (B, T) bool; None: unknown, or it reads images, of which a text's mask says nothing."""
    return None if reads_images(host, stack) else padding_masks(inputs)[stack.side]


def reads_images(host: Host, stack: Stack) -> bool:
    """Whether a stack belongs to the part of a model of texts and images that reads images."""
    vision = getattr(host.root.config, "vision_config", None) if host.library == "transformers" else None
    if vision is None:
        return False
    parts = stack.name.split(".")
    holders = (host.root.get_submodule(".".join(parts[:count])) for count in range(1, len(parts)))
    return any(type(getattr(holder, "config", None)) is type(vision) for holder in holders)


def _goes_with(labels: Tensor, decoder_ids: Any) -> bool:
    """Whether labels stand for decoder inputs position by position: DataCollatorForSeq2Seq(model=...) puts both into a batch."""
    return decoder_ids is None or (isinstance(decoder_ids, Tensor) and decoder_ids.shape == labels.shape)


def _main_input(host: Host) -> str:
    return "x" if host.library == "timm" else host.root.main_input_name


def _timm_input(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    for key in ("x", "pixel_values", "image", "images"):
        if key in inputs:
            return {"x": inputs[key]}
    raise CalibrationError(
        f"A calibration batch has no images for a timm model; found {_describe(inputs)}. Give tuples (images, labels), or dicts with a "
        "tensor under 'pixel_values'."
    )


def _positional(host: Host, main: str, batch: Any) -> dict[str, Tensor]:
    entries = [batch] if isinstance(batch, Tensor) else list(batch) if isinstance(batch, Sequence) else []
    if isinstance(batch, str) or not entries or not isinstance(entries[0], Tensor):
        raise CalibrationError(
            f"Cannot use a calibration batch of type {type(batch).__name__}: found {_describe(batch)}. Give dicts of tensors, or tuples "
            "whose first entry is the model's input tensor."
        )
    if host.library == "transformers" and host.root.config.is_encoder_decoder:
        raise CalibrationError(
            f"{type(host.root).__name__} has an encoder and a decoder, and a batch of type {type(batch).__name__} does not say which "
            "tensor is for which. Give dicts with input_ids, attention_mask and labels (or decoder_input_ids)."
        )
    inputs = {main: entries[0]}
    if main == "input_ids" and len(entries) > 1 and isinstance(entries[1], Tensor):
        second = entries[1]
        if second.shape == entries[0].shape and bool(((second == 0) | (second == 1)).all()):
            pad = getattr(host.root.config, "pad_token_id", None)
            # token types and token labels hold 0 and 1 too
            if pad is None or not torch.equal(second.bool(), entries[0] != pad):
                raise CalibrationError(
                    "Cannot tell whether the second tensor of a calibration batch is the attention mask: it is not 1 just where the "
                    f"first is not padding (token {pad}). Give dicts with input_ids and attention_mask."
                )
            inputs["attention_mask"] = second
    return inputs


def _place(value: Tensor, parameter: Tensor) -> Tensor:
    # images meet a half-precision model in its own precision, as autocast would have it
    dtype = parameter.dtype if value.is_floating_point() and parameter.is_floating_point() else None
    return value.to(device=parameter.device, dtype=dtype)


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {_kind(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return f"[{', '.join(_kind(value) for value in list(batch)[:4])}]"
    return _kind(batch)


def _kind(value: Any) -> str:
    return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
