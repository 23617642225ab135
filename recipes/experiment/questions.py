"""Question generation: questions generated from the test data by every process, scored, and put in the table of the
first experiments.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from deeparc_hf.core.files import write_whole
from deeparc_hf.errors import ConfigError

from .generation import TITLES, GenerationScores, bootstrap_intervals, generation_metrics, scores_table
from .results import Measured, Row

__all__ = ["QuestionMeasure", "first_answers", "scores_report"]


def first_answers(answers: Sequence[Any], column: str) -> list[str]:
    """The answer of each row, or the first of SQuAD's.

    Raises:
        ConfigError: if a row has none, or it is no text.
    """
    found = []
    for answer in answers:
        texts = answer.get("text") if isinstance(answer, dict) else answer
        first = texts[0] if isinstance(texts, list) and texts else texts
        if not isinstance(first, str) or not first.strip():
            raise ConfigError(
                f"answer_column: a row of the column {column!r} holds {answer!r}, no answer. Leave such rows out "
                f"(those of SQuAD 2 that cannot be answered, say), or write numbers as texts."
            )
        found.append(first)
    return found


class QuestionMeasure:
    """Measures a Trainer's model: the loss on the test data, and the scores of the questions that it generates.

    Args:
        test: encoded test data.
        references: the questions asked for, as text.
        tokenizer: decodes what is generated.
        num_beams, max_new_tokens: of the search.

    Attributes:
        scores: of the model that was measured last.
    """

    def __init__(
        self, test: Any, references: Sequence[str], tokenizer: Any, *, num_beams: int, max_new_tokens: int
    ) -> None:
        self.scores: GenerationScores | None = None
        self._test = test
        self._references = list(references)
        self._tokenizer = tokenizer
        self._search = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "do_sample": False}

    def __call__(self, trainer: Trainer) -> Measured:
        """Loss and scores, with bootstrap intervals of the scores over the questions."""
        loss = trainer.evaluate(self._test, metric_key_prefix="test")["test_loss"]
        predictions = self.generate(trainer)
        self.scores = generation_metrics(predictions, self._references)
        values = {name: value for name, value in self.scores.scores().items() if value is not None}
        intervals = {
            name: bounds
            for name, bounds in bootstrap_intervals(predictions, self._references).items()
            if name in values
        }
        return Measured({"loss": loss, **values}, len(self._references), intervals)

    def generate(self, trainer: Trainer) -> list[str]:
        """The questions to all test rows, in their order: each process generates a part."""
        accelerator = trainer.accelerator
        model = accelerator.unwrap_model(trainer.model).eval()
        pad = self._tokenizer.pad_token_id
        # transformers' T5 makes a cache for as many blocks as the encoder has: with more decoder blocks it fails; the
        # results are the same
        cached = getattr(model.config, "num_layers", 0) >= getattr(model.config, "num_decoder_layers", 0)
        found: list[str] = []
        # a loader of our own: the Trainer's may group rows by length, and references come in the data's order
        rows = DataLoader(self._test, batch_size=trainer.args.eval_batch_size, collate_fn=trainer.data_collator)
        for batch in accelerator.prepare(rows):
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                ids = model.generate(**inputs, **self._search, use_cache=cached)
            ids = accelerator.gather_for_metrics(accelerator.pad_across_processes(ids, dim=1, pad_index=pad))
            found += self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in found]


def scores_report(folder: Path, rows: Sequence[Row], measure: QuestionMeasure) -> None:
    """Write scores.md: a column for the original and for each iteration,
    in the rows of the first experiments' table.
    """
    last = measure.scores
    if last is None:
        return
    shown = {row.name: row for row in rows if row.sparsity is None}
    columns = {}
    for name, row in shown.items():
        values = {score: row.measured.metrics.get(score) for score in TITLES}
        columns[name] = GenerationScores(
            **values, samples=row.measured.samples, backend=last.backend, reasons=last.reasons
        )  # type: ignore[arg-type]
    table = scores_table(
        columns,
        encoders={name: _blocks(row, "encoder") for name, row in shown.items()},
        decoders={name: _blocks(row, "decoder") for name, row in shown.items()},
        parameters={name: row.parameters for name, row in shown.items()},
        intervals={
            name: {k: v for k, v in row.measured.intervals.items() if k in TITLES} for name, row in shown.items()
        },
    )
    n = next(iter(shown.values())).measured.samples
    how = f"On {n:,} test questions, one reference each; BLEU and ROUGE by {last.backend}; one run with one seed."
    write_whole(folder / "scores.md", f"# Generated questions\n\n{table}\n\n{how}\n")


def _blocks(row: Row, side: str) -> int:
    return sum(count for name, count in row.blocks.items() if side in name)
