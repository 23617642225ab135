"""Small batches to try a model on: a few samples with some padding, and the same with some of it changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..architectures import Host
from ..architectures.inputs import most_positions
from .batches import batch_size, cut, is_cuttable, padding_masks

__all__ = ["Changed", "changed", "trials"]

_EXTRA = 2  # positions of padding that a text without any is given


@dataclass(frozen=True)
class Changed:
    """A batch whose first sample is another, and whose last sample has other padding, where that could be done."""

    inputs: dict[str, Any]
    first: bool
    padding: bool


def trials(host: Host, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Small batches to try, the best first: three samples, the last with padding."""
    size = batch_size(inputs)
    if not is_cuttable(inputs):
        grown = _padded(host, inputs)
        yield from [dict(inputs)] if grown is None else [grown, dict(inputs)]
        return
    mask = padding_masks(inputs)["encoder"]
    most = 0 if mask is None or len(mask) != size else int((~mask).reshape(size, -1).sum(dim=1).argmax())
    others = [index for index in range(size) if index != most] or [most]
    small = cut(inputs, [others[0], others[1 % len(others)], most])
    if batch_size(small) != 3:  # one sample, which `cut` gives as it is
        small = {
            k: torch.cat([v] * 3) if isinstance(v, Tensor) and v.ndim and len(v) == size else v
            for k, v in small.items()
        }
    grown = _padded(host, small)
    if grown is not None:
        yield grown
    yield small
    yield dict(inputs)


def _padded(host: Host, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same texts with more padding; None if the last one has some, there is no mask, or no room for it.

    Where the model has no more positions (an error that a GPU does not recover from) the last text is shortened.
    """
    mask = padding_masks(inputs)["encoder"]
    if mask is None or not bool(mask[-1].reshape(-1, mask.shape[-1]).all(dim=1).any()):
        return None
    left = not bool(mask.reshape(-1, mask.shape[-1])[:, 0].all())
    config = getattr(host.root, "config", None)
    pad, most = getattr(config, "pad_token_id", None), None if config is None else most_positions(config)
    if most is not None and mask.shape[-1] + _EXTRA > most:
        return _shortened(inputs, mask, left, pad) if mask.shape[-1] > 2 * _EXTRA else None

    def longer(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[: mask.ndim] != mask.shape:
            return value
        fill = -100 if "label" in key else pad or 0 if key.endswith("input_ids") else 0
        sides = [0, 0] * (value.ndim - mask.ndim) + ([_EXTRA, 0] if left else [0, _EXTRA])
        return functional.pad(value, sides, value=fill)

    return {key: longer(key, value) for key, value in inputs.items()}


def _shortened(inputs: Mapping[str, Any], mask: Tensor, left: bool, pad: int | None) -> dict[str, Any]:
    """The same texts, of which the last one has padding where it began or ended."""
    gone = slice(None, _EXTRA) if left else slice(-_EXTRA, None)
    result = dict(inputs)
    for key, fill in (("attention_mask", 0), ("input_ids", pad or 0)):
        value = inputs.get(key)
        if isinstance(value, Tensor) and value.shape == mask.shape:
            result[key] = value.clone()
            result[key][-1][..., gone] = fill
    return result


def changed(host: Host, inputs: Mapping[str, Any]) -> Changed:
    """The first sample another one, the last one's padding other padding."""
    size, mask = batch_size(inputs), padding_masks(inputs)["encoder"]
    padded = None if mask is None or size < 3 or bool(mask[-1].all()) else ~mask[-1]
    result, first, padding = dict(inputs), False, False
    for key, value in inputs.items():
        if not isinstance(value, Tensor) or not value.ndim or len(value) != size or "mask" in key:
            continue
        if key == "input_ids" and not value.is_floating_point():
            other = _other_tokens(host, value, mask, padded)
        elif value.ndim > 1 and value.is_floating_point():
            other = value.clone()
            other[0] = 0.4 - value[0].flip(-1)
            if padded is not None and value.shape[1 : 1 + padded.ndim] == padded.shape:
                other[-1][padded] += 1.0
        else:
            continue
        result[key] = other
        first = first or bool((other[0] != value[0]).any())
        padding = padding or (size > 2 and bool((other[-1] != value[-1]).any()))
    return Changed(result, first, padding)


def _other_tokens(host: Host, ids: Tensor, mask: Tensor | None, padded: Tensor | None) -> Tensor:
    """Ids of which the first sample has other tokens, and the last one's padding is tokens too."""
    usual = ~_special(host, ids)
    tokens = ids[usual & mask if mask is not None and mask.shape == ids.shape else usual].unique()
    if not len(tokens):
        return ids
    one, other = tokens[0], tokens[-1] if len(tokens) > 1 else (tokens[0] - 1).abs()
    ids = ids.clone()
    ids[0] = torch.where(usual[0], torch.where(ids[0] == one, other, one), ids[0])
    if padded is not None and padded.shape == ids.shape[1:]:
        ids[-1] = torch.where(padded, one, ids[-1])
    return ids


def _special(host: Host, ids: Tensor) -> Tensor:
    """Which ids are special tokens, by the config: ends of texts, and those that stand for images, stay in place."""
    config = getattr(host.root, "config", None)
    known: set[int] = set()
    for part in (config, getattr(config, "text_config", None)):
        for key, value in vars(part).items() if part is not None else ():
            if key.endswith(("token_id", "token_index")):
                known |= {v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int)}
    return torch.isin(ids, torch.tensor(sorted(known), dtype=ids.dtype, device=ids.device))
