"""What recipes whose models generate texts share: the texts, in the data's order and from every process; a Trainer that
generates in its evaluations; scores in a table with a column for each model, and texts of the models side by side.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Trainer

from deeparc_hf.core.files import write_whole
from deeparc_hf.core.markdown import md, table
from deeparc_hf.errors import ConfigError

from .journal import folder_of
from .results import TEXTS, Measured, Row, metric_cell

__all__ = [
    "GeneratingTrainer",
    "GenerationMeasure",
    "can_cache",
    "drawn_sums",
    "padding_of",
    "scores_table",
    "texts_of",
    "texts_table",
    "write_scores",
]

_SHOWN = 10  # texts
_LONGEST = 300  # characters of a text that is shown


class GenerationMeasure(ABC):
    """Measures a Trainer's model: the loss on the encoded test data, and scores of the texts that it generates.

    Args:
        test: the encoded test data.
        references: the text that each row should give.
        tokenizer: decodes what is generated.
        search: settings of `generate`.
    """

    def __init__(self, test: Any, references: Sequence[str], tokenizer: Any, **search: Any) -> None:
        self._test = test
        self._references = list(references)
        self._tokenizer = tokenizer
        self._search = {**search, "do_sample": False}

    @abstractmethod
    def scores(
        self, texts: Sequence[str], references: Sequence[str]
    ) -> tuple[dict[str, float], Mapping[str, tuple[float, float]]]:
        """The scores of the texts by name, and the intervals of those that have one."""

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a batch the model generates from."""
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def __call__(self, trainer: Trainer) -> Measured:
        """Loss and scores, with their intervals."""
        loss = trainer.evaluate(self._test, metric_key_prefix="test")["test_loss"]
        generated = self.generate(trainer, self._test)
        values, intervals = self.scores(generated, self._references)
        pairs = zip(generated, self._references, strict=True)
        texts = [{"generated": text, "reference": reference} for text, reference in pairs]
        return Measured({"loss": loss, **values}, len(self._references), intervals, texts=texts)

    def generate(self, trainer: Trainer, data: Any) -> list[str]:
        """The texts to all rows, in their order: each process generates a part."""
        accelerator = trainer.accelerator
        model = accelerator.unwrap_model(trainer.model).eval()
        pad = padding_of(self._tokenizer)
        found: list[str] = []
        # a loader of our own: the Trainer's may group rows by length, and references come in the data's order
        rows = DataLoader(data, batch_size=trainer.args.eval_batch_size, collate_fn=trainer.data_collator)
        for batch in accelerator.prepare(rows):
            inputs = {name: tensor.to(model.device) for name, tensor in self.inputs(batch).items()}
            with torch.no_grad():
                ids = model.generate(**inputs, **self._search, use_cache=can_cache(model))
            ids = accelerator.gather_for_metrics(accelerator.pad_across_processes(ids, dim=1, pad_index=pad))
            found += self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in found]


class GeneratingTrainer(Seq2SeqTrainer):
    """A Seq2SeqTrainer whose evaluations in the training generate where `predict_with_generate` says so, also without a
    cache. Those with a prefix of their own give the loss alone: what measures scores there generates by itself.
    """

    def evaluate(self, *given: Any, metric_key_prefix: str = "eval", **settings: Any) -> dict[str, float]:
        generates, compute = self.args.predict_with_generate, self.compute_metrics
        if metric_key_prefix != "eval":
            self.args.predict_with_generate, self.compute_metrics = False, None
        elif generates:
            settings["use_cache"] = can_cache(self.accelerator.unwrap_model(self.model))
        try:
            return super().evaluate(*given, metric_key_prefix=metric_key_prefix, **settings)
        finally:
            self.args.predict_with_generate, self.compute_metrics = generates, compute


def can_cache(model: Any) -> bool:
    """Whether a model can generate with a cache: transformers' T5 makes one for as many blocks as the encoder has, and
    fails where the decoder has more. The results are the same without.
    """
    return getattr(model.config, "num_layers", 0) >= getattr(model.config, "num_decoder_layers", 0)


def padding_of(tokenizer: Any) -> int:
    """The token that fills up what is generated, and is no text: the end token where there is none for padding.

    Raises:
        ConfigError: if there is neither.
    """
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), None)
    if pad is None:
        raise ConfigError(
            "The tokenizer has neither a padding token nor an end token, and texts of different lengths are generated. "
            "Give it one: tokenizer.pad_token, in its tokenizer_config.json."
        )
    return int(pad)


def texts_of(tokenizer: Any, prediction: Any) -> list[list[str]]:
    """The generated texts and the references of a prediction, for compute_metrics."""
    pad = padding_of(tokenizer)
    return [
        [text.strip() for text in tokenizer.batch_decode(np.where(ids < 0, pad, ids), skip_special_tokens=True)]
        for ids in (prediction.predictions, prediction.label_ids)
    ]


def drawn_sums(values: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Sums over rows drawn anew, with replacement, for a bootstrap: (resamples, columns). Equally many rows are drawn
    alike.
    """
    rng, n = np.random.default_rng(seed), len(values)
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n) @ values for _ in range(resamples)])


def scores_table(
    rows: Sequence[Row], titles: Mapping[str, str], reasons: Mapping[str, str], more: Mapping[str, Sequence[str]]
) -> str:
    """A Markdown table with a column for each model and a line for each score; beneath it, why a "-" stands where no
    score does. `more` are cells of further lines.
    """
    lines = []
    for side in ("encoder", "decoder"):
        blocks = [sum(count for name, count in row.blocks.items() if side in name) for row in rows]
        lines.append([f"Num of {side}", *(f"{count:,}" for count in blocks)])
    lines.append(["Num of parameter", *(f"{row.parameters:,}" for row in rows)])
    notes = []
    for score, title in titles.items():
        lines.append([title, *(metric_cell(row.measured, score, "to") for row in rows)])
        without = [row.name for row in rows if row.measured.metrics.get(score) is None]
        if without:
            reason = reasons.get(score, "the reason is not known.")
            notes.append(f"{title} is left out for {', '.join(without)}: {reason}")
    lines += [[title, *cells] for title, cells in more.items()]
    if any(row.measured.intervals for row in rows):
        counts = " and ".join(f"{n:,}" for n in sorted({row.measured.samples for row in rows}))
        notes.append(f"In brackets: 95 % bootstrap intervals over the texts, n = {counts}.")
    return "\n\n".join([table(["", *(row.name for row in rows)], lines), *notes])


def texts_table(folder: Path, rows: Sequence[Row]) -> str:
    """The first texts that the models do not all give alike, side by side, of those that an experiment has written."""
    files = [folder / TEXTS / f"{folder_of(row.name)}.jsonl" for row in rows]
    if not files or not all(path.is_file() for path in files):
        return ""
    given = [[json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in files]
    pairs = [
        [entries[0]["reference"], *(entry["generated"] for entry in entries)] for entries in zip(*given, strict=True)
    ]
    told = [texts for texts in pairs if len(set(texts[1:])) > 1] if len(rows) > 1 else pairs
    if not told:
        return f"All models give the same {len(pairs):,} texts."
    lines = [[md(text, _LONGEST) for text in texts] for texts in told[:_SHOWN]]
    which = "that the models do not all give alike" if len(rows) > 1 else "of the test data"
    header = ["reference", *(row.name for row in rows)]
    return f"The first {len(lines)} texts {which}, of {len(told):,}:\n\n{table(header, lines, range(len(header)))}"


def write_scores(
    folder: Path,
    rows: Sequence[Row],
    heading: str,
    titles: Mapping[str, str],
    how: str,
    *,
    reasons: Mapping[str, str] | None = None,
    more: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write scores.md: the scores of the models, how they were measured, and some of the texts."""
    parts = [f"# {heading}", scores_table(rows, titles, reasons or {}, more or {}), how, texts_table(folder, rows)]
    write_whole(folder / "scores.md", "\n\n".join(filter(None, parts)) + "\n")
