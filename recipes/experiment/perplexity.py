"""Perplexity of a causal language model on blocks of tokens, and the blocks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer

from deeparc_hf.errors import ConfigError

from .results import Measured
from .splits import Splits

__all__ = ["PerplexityMeasure", "Z", "block_losses", "collate_blocks", "perplexity_of", "token_blocks"]

Z = 1.959964  # of the normal distribution, for an interval of 95 %


def token_blocks(splits: Splits, tokenizer: Any, column: str, size: int) -> Splits:
    """Join the texts of each split, with an end token behind each, and cut them into blocks of so many tokens; empty
    texts are skipped, what is left over at the end is dropped.

    Raises:
        ConfigError: if there is no such column, it holds no texts, or a split gives no block.
    """
    if size < 2:
        raise ConfigError(f"block_size must be at least 2, found {size}: a block's first token predicts its second.")
    if tokenizer.eos_token_id is None:
        raise ConfigError("The tokenizer has no end token, so texts cannot be joined.")
    splits.need(text_column=column)
    if getattr(splits.train.features[column], "dtype", None) not in ("string", "large_string"):
        raise ConfigError(f"text_column: {column!r} holds no texts.")
    found = splits.each(lambda part: _cut(part, tokenizer, size, column))
    for use in ("train", "validation", "test"):
        if len(getattr(found, use)) == 0:
            raise ConfigError(
                f"The {use} data has fewer than {size} tokens, which is block_size. Give more texts or smaller blocks."
            )
    return found


def collate_blocks(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of blocks: every token but the first is predicted, the end tokens too, which may be what the tokenizer
    pads with: the mask says that nothing is padding.
    """
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def block_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of the tokens of each block, for `preprocess_logits_for_metrics`: all that a Trainer needs to keep."""
    pairs = zip(logits[:, :-1], labels[:, 1:], strict=True)
    return torch.stack([functional.cross_entropy(scores.float(), wanted) for scores, wanted in pairs])


class PerplexityMeasure:
    """Measures a Trainer's model: perplexity = exp(mean loss of a token) on blocks of test data, with a 95 % interval
    over the blocks.

    The Trainer needs `compute_metrics=measure.metrics` and `preprocess_logits_for_metrics=block_losses`.
    """

    def __init__(self, test: Any) -> None:
        self._test = test
        self._losses: list[float] = []

    def metrics(self, prediction: Any) -> dict[str, float]:
        """For compute_metrics."""
        self._losses = [float(loss) for loss in prediction.predictions]
        return {"perplexity": perplexity_of(statistics.fmean(self._losses))}

    def __call__(self, trainer: Trainer) -> Measured:
        """Loss and perplexity of the model as it is."""
        metrics = trainer.evaluate(self._test, metric_key_prefix="test")
        mean = statistics.fmean(self._losses)
        # several processes fill their last batch up with blocks that they have seen, which the Trainer's own loss
        # counts twice
        figures = {**Measured.of_metrics(metrics, len(self._losses)).metrics, "loss": mean}
        if len(self._losses) < 2:
            return Measured(figures, len(self._losses))
        half = Z * statistics.stdev(self._losses) / math.sqrt(len(self._losses))
        intervals = {
            "loss": (mean - half, mean + half),
            "perplexity": (perplexity_of(mean - half), perplexity_of(mean + half)),
        }
        return Measured(figures, len(self._losses), intervals)


def perplexity_of(value: float) -> float:
    """The perplexity of a mean loss; infinite where it is too large for a number."""
    return math.exp(value) if value < 700 else math.inf


def _cut(part: Any, tokenizer: Any, size: int, column: str) -> Any:
    """Blocks of a split's texts, which come in batches: what one leaves over, the next begins with."""
    from datasets import Features, List, Value

    rest: list[int] = []
    end = tokenizer.eos_token_id

    def blocks_of(texts: list[str | None]) -> dict[str, list[list[int]]]:
        given = [text for text in texts if text]
        for ids in tokenizer(given)["input_ids"] if given else ():
            rest.extend(ids if ids and ids[-1] == end else [*ids, end])
        whole = len(rest) - len(rest) % size
        blocks = [rest[start : start + size] for start in range(0, whole, size)]
        del rest[:whole]
        return {"input_ids": blocks}

    kinds = Features({"input_ids": List(Value("int32"))})
    gone = part.column_names
    return part.map(blocks_of, batched=True, input_columns=[column], remove_columns=gone, features=kinds)
