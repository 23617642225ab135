"""What a model puts out, as rows that two models can be compared on: distributions, or plain values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Head", "divergence", "mean_square"]


@dataclass(frozen=True)
class Head:
    """One output of a model.

    Attributes:
        name: its key in the model's output.
        kind: what a row is: "softmax" (unnormalized log-probabilities of classes that exclude each other), "sigmoid"
            (the same of classes each by itself) or "values" (predicted numbers, hidden states).
        values: shape (N, C), without padding.
        samples: shape (N,), which sample of the batch each row is of; None: not known.
    """

    name: str
    kind: str
    values: Tensor
    samples: Tensor | None = None


def divergence(found: Head, wanted: Head, temperature: float = 1.0) -> Tensor:
    """How far each row of `found` is from that of `wanted`; 0 where they are equal, never below.

    For distributions the Kullback-Leibler divergence of `found` from `wanted` in nats, both softened by the temperature
    (Hinton et al. 2015, arXiv 1503.02531, without their factor T^2); for sigmoids its mean over the classes; for values
    the mean squared difference.

    Returns:
        Shape (N,), float32 or better.
    """
    ours, theirs = (head.values.to(torch.promote_types(head.values.dtype, torch.float32)) for head in (found, wanted))
    if wanted.kind == "values":
        return (ours - theirs).square().mean(dim=1)
    ours, theirs = ours / temperature, theirs / temperature
    if wanted.kind == "softmax":
        return functional.kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True).sum(
            dim=1
        )
    parts = [
        functional.kl_div(
            functional.logsigmoid(sign * ours), functional.logsigmoid(sign * theirs), reduction="none", log_target=True
        )
        for sign in (1, -1)
    ]
    return (parts[0] + parts[1]).mean(dim=1)


def mean_square(head: Head) -> Tensor:
    """Mean square of each row, shape (N,): the unit of distances between values."""
    return head.values.to(torch.promote_types(head.values.dtype, torch.float32)).square().mean(dim=1)
