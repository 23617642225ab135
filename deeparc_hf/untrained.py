"""Whether a model's weights, or those of its head, are as they were drawn at random."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from torch import nn

__all__ = ["untrained_weights"]

_DRAWN = 4  # changes in place that drawing a parameter takes at most


def untrained_weights(model: nn.Module) -> list[str]:
    """The names of the parameters that were drawn at random and have not been trained since, as far as a model tells.

    `from_pretrained` marks what it finds in a checkpoint, so what it had to draw is known. Of a model that was made from its config, or by
    timm, it is known where all norms and biases, or those of the classifier, are as a fresh model has them.
    """
    parameters = dict(model.named_parameters())
    loaded = {name for name, p in parameters.items() if getattr(p, "_is_hf_initialized", False)}
    if loaded:
        resized = _resized(model)
        lacking = {name: p for name, p in parameters.items() if name not in loaded and p.requires_grad and id(p) not in resized}
        if all("pooler" in name for name in lacking):  # a headless model: it need not be used
            return []
        return sorted(lacking) if _is_fresh(lacking.values()) and all(p._version <= _DRAWN for p in lacking.values()) else []
    if _is_fresh(parameters.values()) and any(p.ndim == 1 for p in parameters.values()):
        return sorted(parameters)
    classifier = model.get_classifier() if callable(getattr(model, "get_classifier", None)) else None
    if isinstance(classifier, nn.Linear) and classifier.bias is not None and _is_fresh([classifier.bias]):
        own = {id(p) for p in classifier.parameters()}
        return sorted(name for name, p in parameters.items() if id(p) in own)
    return []


def _resized(model: nn.Module) -> set[int]:
    """Parameters that `resize_token_embeddings` has made: most of their rows are the checkpoint's."""
    own: list[nn.Parameter] = []
    for side in ("input", "output"):
        with suppress(NotImplementedError, AttributeError):  # not every model has some
            own += getattr(model, f"get_{side}_embeddings")().parameters()
    return {id(p) for p in own} if own and not getattr(own[0], "_is_hf_initialized", False) else set()


def _is_fresh(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether all norms and biases among them are constant, as no training leaves them."""
    flat = [p.detach() for p in parameters if p.ndim == 1 and p.numel() and not p.is_meta]
    return all(bool((p == p[0]).all()) for p in flat)
