"""Models that a trainer asks for the log-probabilities of the labels instead of logits (TRL's SFTTrainer, whose
documented `add_fused_lm_head` never makes the logits). A teacher needs logits: while it teaches, the model makes them,
and what the trainer takes from its fused head is computed from these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import TrainingArguments
from transformers.utils import ModelOutput

from ..core.copies import FUSED
from ..errors import ConfigError
from ..observe.outputs import IGNORED

__all__ = ["FusedHead", "FusedOutput", "is_sft"]

_TAKEN = ("labels", "shift_labels", "num_items_in_batch")


def is_sft(args: TrainingArguments) -> bool:
    """Whether a trainer is TRL's SFTTrainer, by its arguments: its loss is the negative mean of the labels'
    log-probabilities.

    Raises:
        ConfigError: if its loss is another one, to which a teacher's term cannot be added.
    """
    known = any(cls.__name__ == "SFTConfig" and cls.__module__.startswith("trl.") for cls in type(args).__mro__)
    if known and getattr(args, "loss_type", "nll") == "dft":
        raise ConfigError(
            "loss_type='dft' weighs each token by its probability, where the teacher's term cannot be added. Take "
            "loss_type='nll', or leave distill out."
        )
    return known


@dataclass
class FusedOutput(ModelOutput):
    """What a fused head puts out, with the names of TRL's. Tensors have the shape of the labels that are predicted:
    (batch, tokens - 1), or (batch, tokens) where the labels came shifted; 0 where the label does not count.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


class FusedHead:
    """One forward pass for which log-probabilities were asked.

    Args:
        kwargs: of the forward; what the fused head alone takes is taken out of them, so that logits are made.

    Attributes:
        labels: of the position that predicts each, shape (batch, tokens); those that do not count are -100.
    """

    def __init__(self, kwargs: dict[str, Any]) -> None:
        kwargs.pop(FUSED)
        labels, shifted, self._items = (kwargs.pop(name, None) for name in _TAKEN)
        self._came_shifted = shifted is not None
        self.labels = shifted if shifted is not None else functional.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def output(self, made: Any, alpha: float, more: Tensor) -> FusedOutput:
        """What the trainer expects, with the teacher's term in the log-probabilities: their negative sum over the
        labels is (1 - alpha) times that of the labels' loss, plus that of `more`.

        Args:
            made: the model's output, with logits of shape (batch, tokens, vocabulary).
            alpha: weight of the teacher.
            more: what the teacher adds for each label that counts, shape (labels,), in the order of the positions.
        """
        logits, labels = made["logits"], self.labels.to(made["logits"].device)
        if not self._came_shifted:
            logits, labels = logits[:, :-1], labels[:, :-1]
        mask = labels != IGNORED
        chosen, wanted = logits[mask].float(), labels[mask]
        every = chosen.log_softmax(-1)
        taught = (1 - alpha) * every.gather(-1, wanted[:, None])[:, 0] - more
        with torch.no_grad():
            known = {
                "entropy": -(every.exp() * every).sum(-1),
                "log_sum_sq_probs": (2 * every).logsumexp(-1),
                "mean_logits": chosen.mean(-1),
                "is_top1": chosen.argmax(-1) == wanted,
            }
        spread = {name: value.new_zeros(mask.shape).masked_scatter(mask, value) for name, value in known.items()}
        log_probs = taught.new_zeros(mask.shape).masked_scatter(mask, taught)
        loss = -log_probs.sum() / (mask.sum().clamp(min=1) if self._items is None else self._items)
        aux = made.get("aux_loss")
        return FusedOutput(loss=loss, log_probs=log_probs, label_mask=mask, aux_loss=aux, **spread)
