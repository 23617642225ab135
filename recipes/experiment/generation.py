"""Question generation: scores of the questions that are generated from the test data, and a table of them.

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

from deeparc_hf.errors import ConfigError, MissingDependencyError

from .metrics import Metrics
from .results import Row
from .seq2seq import GenerationMeasure, drawn_sums, texts_of, write_scores

__all__ = ["TITLES", "QuestionMeasure", "TextScores", "first_answers", "scores_of", "write_question_scores"]

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
        n, width = len(table), self._counts.shape[1]
        drawn = drawn_sums(table, resamples=resamples, seed=seed)
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


class QuestionMeasure(GenerationMeasure):
    """Measures a Trainer's model: the loss on the encoded test data, and the scores of the questions that it generates,
    with bootstrap intervals over the questions.

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
        super().__init__(test, references, tokenizer, num_beams=num_beams, max_new_tokens=max_new_tokens)
        self.metrics = metrics
        # said now, not after hours: libraries that are missing are an error, METEOR's data can still be got
        self.reasons = TextScores(["a"], ["a"]).reasons
        for score, reason in self.reasons.items():
            logger.warning("%s will be left out: %s", TITLES[score], reason)
            metrics.leave_out(score, reason)

    def scores(
        self, texts: Sequence[str], references: Sequence[str]
    ) -> tuple[dict[str, float], Mapping[str, tuple[float, float]]]:
        found = TextScores(texts, references, self.metrics)
        self.reasons = found.reasons
        return {name: value for name, value in found.values().items() if value is not None}, found.intervals()


def scores_of(tokenizer: Any, metrics: Metrics, prediction: Any) -> dict[str, float]:
    """Scores of generated ids, for compute_metrics."""
    scores = TextScores(*texts_of(tokenizer, prediction), metrics)
    return {name: value for name, value in scores.values().items() if value is not None}


def write_question_scores(folder: Path, rows: Sequence[Row], measure: QuestionMeasure) -> None:
    """Write scores.md: a column for the original and for each iteration, the rows of the first experiments' table."""
    shown = [row for row in rows if row.sparsity is None]
    how = (
        f"On {shown[0].measured.samples:,} test questions, one reference each; one run with one seed. {measure.metrics}"
    )
    write_scores(folder, shown, "Generated questions", TITLES, how, reasons=measure.reasons)


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
