"""Whether a model's weights, or those of its head, are as they were drawn at random."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from torch import nn

from ..architectures.adapters import is_adapted
from ..core.compat import version_of
from ..pruning.config import MPruneConfig

__all__ = ["pruned_untrained", "untrained_weights"]

_DRAWN = 8  # changes in place that drawing a parameter takes at most


def pruned_untrained(config: MPruneConfig, model: nn.Module) -> str | None:
    """Why it is doubtful to prune the model when the training begins, and what to do; None where it is not."""
    # an adapter begins at random, and changes nothing then
    names = untrained_weights(model) if config.start_epoch == 0 and not is_adapted(model) else []
    if not names:
        return None
    which = " and ".join(names) if len(names) < 3 else f"{names[0]}, {names[1]} and {len(names) - 2} more parameters"
    return (
        f"The model is pruned when the training begins (start_epoch=0), and it cannot do its task yet: {which} "
        f"{'is' if len(names) == 1 else 'are'} as drawn at random. Such a model does not tell which blocks can go. "
        "Fine-tune it first: give start_epoch=1 or more, and as many more epochs of training."
    )


def untrained_weights(model: nn.Module) -> list[str]:
    """The names of the parameters that were drawn at random and have not been trained since, as far as a model tells.

    `from_pretrained` marks what it finds in a checkpoint. Of a model that was made from its config, or by timm, it is
    known where all norms, or the biases of its classifier, are as a fresh model has them.
    """
    parameters = dict(model.named_parameters())
    found = {name: p for name, p in parameters.items() if getattr(p, "_is_hf_initialized", False)}
    if found:
        known = {id(p) for p in found.values()} | _resized(model)
        drawn = {name: p for name, p in parameters.items() if p.requires_grad and id(p) not in known}
        if all("pooler" in name for name in drawn):  # a headless model: it need not be used
            return []
        touched = any(version_of(p) for p in found.values())  # weights that were loaded once more
        return [] if touched or not _as_drawn(drawn.values()) else sorted(drawn)
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    scales = [p for norm in norms for p in norm.parameters(recurse=False)]
    if scales and all(map(_is_constant, scales)):
        return sorted(parameters)
    classifier = model.get_classifier() if callable(getattr(model, "get_classifier", None)) else None
    if isinstance(classifier, nn.Linear) and classifier.bias is not None and _is_constant(classifier.bias):
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


def _as_drawn(parameters: Collection[nn.Parameter]) -> bool:
    """Whether a head is as it was drawn."""
    # where it has no biases only this tells; fused optimizers do not count their changes
    if any(version_of(p) > _DRAWN for p in parameters):
        return False
    if all(_is_constant(p) for p in parameters if p.ndim == 1):
        return True
    # torch draws a linear map and its bias from the same interval, and training leaves it
    reach = [float(p.detach().abs().max()) * p.shape[1] ** 0.5 for p in parameters if p.ndim == 2]
    return bool(reach) and all(0.9 < far <= 1 + 1e-6 for far in reach)


def _is_constant(parameter: nn.Parameter) -> bool:
    """Whether all values are the same, which training does not leave."""
    values = parameter.detach().flatten()
    return not values.is_meta and bool((values == values[:1]).all())
