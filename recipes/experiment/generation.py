"""Question generation: questions generated from the test data by every process, their scores, and a table of them.

The scores are BLEU, ROUGE and METEOR, one reference a text, as the Hub's metrics "bleu", "rouge" and "meteor" give
them, by evaluate where it has its scripts (`metrics.Metrics`), else, and for intervals, by the libraries beneath:

- BLEU is the corpus BLEU of sacrebleu's counts: up to 4-grams, tokenizer 13a, no smoothing, so 0 where one of the
  precisions is 0.
- ROUGE is the mean of the texts' F1 by rouge_score, without stemming. (The metric "rouge" gives by default the middle
  of a bootstrap without a seed instead.) rouge_score knows the letters a-z and digits only: texts in other scripts
  score 0.
- METEOR is the mean of nltk's single_meteor_score on word_tokenize, alpha=0.9, beta=3, gamma=0.5. Without nltk's data
  it is left out.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Trainer

from deeparc_hf.core.files import write_whole
from deeparc_hf.core.markdown import table
from deeparc_hf.errors import ConfigError, MissingDependencyError

from .metrics import Metrics
from .results import Measured, Row, metric_cell

__all__ = [
    "TITLES",
    "QuestionMeasure",
    "QuestionTrainer",
    "TextScores",
    "can_cache",
    "first_answers",
    "scores_of",
    "scores_table",
    "write_scores",
]

TITLES = {
    "bleu": "BLEU",
    "precision_1": "Precision 1-gram",
    "precision_2": "Precision 2-gram",
    "precision_3": "Precision 3-gram",
    "precision_4": "Precision 4-gram",
    "brevity_penalty": "Brevity Penalty",
    "length_ratio": "Length Ratio",
    "rouge1": "ROUGE-1 F1",
    "rouge2": "ROUGE-2 F1",
    "rougeL": "ROUGE-L F1",
    "rougeLsum": "ROUGE-Lsum F1",
    "meteor": "METEOR",
}
logger = logging.getLogger(__name__)

_ORDER = 4
_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_METEOR = {"alpha": 0.9, "beta": 3.0, "gamma": 0.5}


class TextScores:
    """Scores of generated texts against one reference each.

    Predictions may be empty, even all of them: they score 0, brevity penalty and length ratio included (the limits;
    the Hub's metric divides by zero there). References may be empty too, but not all: the length ratio needs one.

    Args:
        metrics: what evaluate computes; default: nothing.

    Attributes:
        reasons: name of a score that is left out -> why.

    Raises:
        ConfigError: if these are not equally many texts, or cannot be scored.
        MissingDependencyError: if sacrebleu, rouge_score or nltk is missing.
    """

    def __init__(self, predictions: Sequence[str], references: Sequence[str], metrics: Metrics | None = None) -> None:
        if len(predictions) != len(references):
            raise ConfigError(
                f"There must be one reference a prediction, found {len(predictions)} predictions, {len(references)} "
                "references."
            )
        if not predictions:
            raise ConfigError("Scores need at least one prediction, found none.")
        # whether tokenizer_13a finds nothing in them
        if not any(text.replace("<skipped>", "").replace("-\n", "").strip() for text in references):
            raise ConfigError(
                "Scores need a reference that is not empty, found only empty ones: are these the right texts?"
            )
        self._texts, self._metrics = (list(predictions), list(references)), metrics or Metrics()
        self._counts = _bleu_counts(predictions, references)
        self._means = _rouge_f1(predictions, references)  # scores of each text; the score of all is their mean
        meteor, reason = _meteor(predictions, references)
        if meteor is not None:
            self._means["meteor"] = meteor
        self.reasons = {} if reason is None else {"meteor": reason}

    def values(self) -> dict[str, float | None]:
        """The scores by name, in the order of the table; None for one that is left out. All are in [0, 1] but the
        length ratio, which may be more.
        """
        found = _bleu(self._counts.sum(axis=0).tolist())
        found |= {name: float(column.mean()) for name, column in self._means.items()}
        found |= self._by_evaluate()
        return {name: found.get(name) for name in TITLES}

    def _by_evaluate(self) -> dict[str, float]:
        """The scores that evaluate computes."""
        found: dict[str, float] = {}
        compute = partial(self._metrics.compute, predictions=self._texts[0], references=self._texts[1])
        if "bleu" in self._metrics and self._counts[:, -2].any():  # some versions divide by no tokens
            score = compute("bleu", max_order=_ORDER, smooth=False)
            found |= {name: float(score[name]) for name in ("bleu", "brevity_penalty", "length_ratio")}
            found |= {f"precision_{order}": float(part) for order, part in enumerate(score["precisions"], start=1)}
        if "rouge" in self._metrics:
            texts = compute("rouge", rouge_types=list(_ROUGE), use_stemmer=False, use_aggregator=False)
            found |= {name: float(np.mean(texts[name])) for name in _ROUGE}
        if "meteor" in self._metrics and "meteor" in self._means:
            found["meteor"] = float(compute("meteor", **_METEOR)["meteor"])
        return found

    def intervals(self, *, resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """95 % intervals of the scores: the middle of their values over texts drawn anew, with replacement.

        They tell how the scores would vary with other texts of the same kind, not with another training of the model.
        BLEU's parts are computed from the summed counts of the texts drawn; a draw in which all references are empty
        has no BLEU, and does not count for it. Models that are compared on the same texts are drawn alike.
        """
        if resamples < 1:
            raise ConfigError(f"resamples must be at least 1, found {resamples}.")
        # sums of differences from the means keep their last digits
        centers = {name: column.mean() for name, column in self._means.items()}
        differences = [column - centers[name] for name, column in self._means.items()]
        table = np.column_stack([self._counts, *differences]).astype(np.float64)
        rng, n, width = np.random.default_rng(seed), len(table), self._counts.shape[1]
        drawn = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) @ table for _ in range(resamples)])
        bleu = [_bleu(sums) for sums in drawn[:, :width].tolist() if sums[-1]]
        values = {name: [scores[name] for scores in bleu] for name in bleu[0]} if bleu else {}
        values |= {name: centers[name] + sums / n for name, sums in zip(centers, drawn[:, width:].T, strict=True)}
        return {name: tuple(np.percentile(values[name], (2.5, 97.5)).tolist()) for name in TITLES if name in values}


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
                "(those of SQuAD 2 that cannot be answered, say), or write numbers as texts."
            )
        found.append(first)
    return found


class QuestionMeasure:
    """Measures a Trainer's model: the loss on the encoded test data, and the scores of the questions that it generates.

    Attributes:
        metrics: what computes the scores.
        reasons: name of a score that was left out -> why.
    """

    def __init__(
        self,
        test: Any,
        references: Sequence[str],
        tokenizer: Any,
        metrics: Metrics,
        *,
        num_beams: int,
        max_new_tokens: int,
    ) -> None:
        self._test = test
        self._references = list(references)
        self._tokenizer = tokenizer
        self.metrics = metrics
        self._search = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "do_sample": False}
        # said now, not after hours: libraries that are missing are an error, METEOR's data can still be got
        self.reasons = TextScores(["a"], ["a"]).reasons
        for score, reason in self.reasons.items():
            logger.warning("%s will be left out: %s", TITLES[score], reason)
            metrics.leave_out(score, reason)

    def __call__(self, trainer: Trainer) -> Measured:
        """Loss and scores, with bootstrap intervals of the scores over the questions."""
        loss = trainer.evaluate(self._test, metric_key_prefix="test")["test_loss"]
        generated = self.generate(trainer, self._test)
        scores = TextScores(generated, self._references, self.metrics)
        self.reasons = scores.reasons
        values = {name: value for name, value in scores.values().items() if value is not None}
        pairs = zip(generated, self._references, strict=True)
        texts = [{"generated": text, "reference": reference} for text, reference in pairs]
        return Measured({"loss": loss, **values}, len(self._references), scores.intervals(), texts=texts)

    def generate(self, trainer: Trainer, data: Any) -> list[str]:
        """The questions to all rows, in their order: each process generates a part."""
        accelerator = trainer.accelerator
        model = accelerator.unwrap_model(trainer.model).eval()
        pad = self._tokenizer.pad_token_id
        found: list[str] = []
        # a loader of our own: the Trainer's may group rows by length, and references come in the data's order
        rows = DataLoader(data, batch_size=trainer.args.eval_batch_size, collate_fn=trainer.data_collator)
        for batch in accelerator.prepare(rows):
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                ids = model.generate(**inputs, **self._search, use_cache=can_cache(model))
            ids = accelerator.gather_for_metrics(accelerator.pad_across_processes(ids, dim=1, pad_index=pad))
            found += self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in found]


class QuestionTrainer(Seq2SeqTrainer):
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


def scores_of(tokenizer: Any, metrics: Metrics, prediction: Any) -> dict[str, float]:
    """Scores of generated ids, for compute_metrics."""
    pad = tokenizer.pad_token_id
    texts = [
        [text.strip() for text in tokenizer.batch_decode(np.where(ids < 0, pad, ids), skip_special_tokens=True)]
        for ids in (prediction.predictions, prediction.label_ids)
    ]
    return {name: value for name, value in TextScores(*texts, metrics).values().items() if value is not None}


def scores_table(rows: Sequence[Row], reasons: Mapping[str, str]) -> str:
    """A Markdown table with a column for each model; beneath it, why a "-" stands where no score does."""
    lines = []
    for side in ("encoder", "decoder"):
        blocks = [sum(count for name, count in row.blocks.items() if side in name) for row in rows]
        lines.append([f"Num of {side}", *(f"{count:,}" for count in blocks)])
    lines.append(["Num of parameter", *(f"{row.parameters:,}" for row in rows)])
    notes = []
    for score, title in TITLES.items():
        lines.append([title, *(metric_cell(row.measured, score, "to") for row in rows)])
        without = [row.name for row in rows if row.measured.metrics.get(score) is None]
        if without:
            reason = reasons.get(score, "the reason is not known.")
            notes.append(f"{title} is left out for {', '.join(without)}: {reason}")
    if any(row.measured.intervals for row in rows):
        counts = " and ".join(f"{n:,}" for n in sorted({row.measured.samples for row in rows}))
        notes.append(f"In brackets: 95 % bootstrap intervals over the texts, n = {counts}.")
    return "\n\n".join([table(["", *(row.name for row in rows)], lines), *notes])


def write_scores(folder: Path, rows: Sequence[Row], measure: QuestionMeasure) -> None:
    """Write scores.md: a column for the original and for each iteration, the rows of the first experiments' table."""
    shown = [row for row in rows if row.sparsity is None]
    how = (
        f"On {shown[0].measured.samples:,} test questions, one reference each; one run with one seed. {measure.metrics}"
    )
    text = f"# Generated questions\n\n{scores_table(shown, measure.reasons)}\n\n{how}\n"
    write_whole(folder / "scores.md", text)


def _library(name: str) -> Any:
    try:
        importlib.import_module(name.partition(".")[0])
        return importlib.import_module(name)
    except ImportError as error:
        needed = f"Scores of generated texts need {error.name}"
        raise MissingDependencyError(f'{needed}: pip install "deeparc_hf[recipes]".') from error


def _bleu_counts(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """A row a text: clipped counts of n-grams, counts of the prediction's, its tokens, the reference's tokens."""
    bleu = _library("sacrebleu").BLEU
    # texts are tokenized beforehand: sacrebleu would strip their ends first, and tell "-\n" there otherwise than the
    # Hub's metric does
    tokens = bleu(tokenize="13a").tokenizer
    # effective_order is for no warning: counts are counts
    metric = bleu(tokenize="none", smooth_method="none", force=True, effective_order=True)
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        score = metric.sentence_score(tokens(prediction), [tokens(reference)])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.array(rows, dtype=np.int64)


def _bleu(sums: Sequence[float]) -> dict[str, float]:
    """BLEU and its parts from sums of `_bleu_counts`."""
    counts, totals, (predicted, expected) = sums[:_ORDER], sums[_ORDER : 2 * _ORDER], sums[2 * _ORDER :]
    precisions = [count / total if total else 0.0 for count, total in zip(counts, totals, strict=True)]
    ratio = predicted / expected
    penalty = 1.0 if ratio > 1 else math.exp(1 - 1 / ratio) if ratio else 0.0
    # summed as the Hub's metric does, so that the last digit is the same
    mean = math.exp(sum(1 / _ORDER * math.log(precision) for precision in precisions)) if min(precisions) > 0 else 0.0
    named = {f"precision_{order}": precision for order, precision in enumerate(precisions, start=1)}
    return {"bleu": mean * penalty, **named, "brevity_penalty": penalty, "length_ratio": ratio}


def _rouge_f1(predictions: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """F1 of each text by the kinds of ROUGE."""
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(list(_ROUGE), use_stemmer=False)
    rows = [scorer.score(target=wanted, prediction=text) for text, wanted in zip(predictions, references, strict=True)]
    return {name: np.array([row[name].fmeasure for row in rows], dtype=np.float64) for name in _ROUGE}


def _meteor(predictions: Sequence[str], references: Sequence[str]) -> tuple[np.ndarray | None, str | None]:
    """METEOR of each text, or why there is none."""
    nltk = _library("nltk")
    score = _library("nltk.translate.meteor_score").single_meteor_score
    words, wordnet = nltk.word_tokenize, nltk.corpus.wordnet
    absent = []
    for name, load in (("punkt_tab", lambda: words("")), ("wordnet", lambda: wordnet.ensure_loaded())):
        try:
            load()
        except (LookupError, OSError):  # not there, or not whole
            absent.append(name)
    if absent:
        command = f"python -m nltk.downloader {' '.join(absent)}"
        why = f"data of nltk were not found ({', '.join(absent)}), and are not downloaded here. To have it: {command}"
        return None, why
    pairs = zip(predictions, references, strict=True)
    return np.array([score(words(wanted), words(text), wordnet=wordnet, **_METEOR) for text, wanted in pairs]), None
