"""Scores of generated texts, one reference each: BLEU, ROUGE and METEOR as Hugging Face's evaluate gives them, and
their intervals.

evaluate ships no metrics: `evaluate.load` fetches scripts from the Hub and runs them. Where they cannot be had,
sacrebleu, rouge_score and nltk give the same values here; `GenerationScores.backend` says which of the two it was. What
the values are:

- BLEU is the corpus BLEU of the metric "bleu": up to 4-grams, tokenizer_13a, no smoothing, so 0 where one of the
  precisions is 0.
- ROUGE is the mean of the texts' F1 by the metric "rouge" with use_stemmer=False and use_aggregator=False. With its
  default, the aggregator, the metric gives the middle of a bootstrap without a seed instead, which differs from the
  mean by chance, and from call to call. rouge_score knows the letters a-z and digits only: texts in other scripts score
  0.
- METEOR is the mean of nltk's single_meteor_score on word_tokenize, alpha=0.9, beta=3, gamma=0.5. That is all that the
  metric "meteor" does, but for downloading nltk's data when it is loaded; therefore it is nltk's function with both
  backends. Without the data, METEOR is left out.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from huggingface_hub import constants

from deeparc_hf.errors import ConfigError, MissingDependencyError

__all__ = ["TITLES", "GenerationScores", "bootstrap_intervals", "generation_metrics", "scores_table"]

_log = logging.getLogger(__name__)

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
BACKENDS = ("auto", "evaluate", "libraries")
_ORDER = 4
_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_METEOR = {"alpha": 0.9, "beta": 3.0, "gamma": 0.5}
_BOUNDS = (2.5, 97.5)


@dataclass(frozen=True)
class GenerationScores:
    """Scores of generated texts against one reference each; all are in [0, 1] but the length ratio, which may be more.

    Attributes:
        bleu: corpus BLEU.
        precision_1, precision_2, precision_3, precision_4: share of the predictions' n-grams that the references have
            too.
        brevity_penalty: 1 where the predictions are longer than the references in sum, less where they are shorter.
        length_ratio: tokens of the predictions / tokens of the references.
        rouge1, rouge2, rougeL, rougeLsum: means of F1.
        meteor: mean METEOR; None where it was left out.
        samples: number of predictions.
        backend: "evaluate" or "libraries": what computed BLEU and ROUGE.
        reasons: name of a score that is None -> why.
    """

    bleu: float
    precision_1: float
    precision_2: float
    precision_3: float
    precision_4: float
    brevity_penalty: float
    length_ratio: float
    rouge1: float
    rouge2: float
    rougeL: float  # noqa: N815 - evaluate's name of it
    rougeLsum: float  # noqa: N815
    meteor: float | None
    samples: int
    backend: str
    reasons: Mapping[str, str] = field(default_factory=dict)

    def scores(self) -> dict[str, float | None]:
        """The scores alone, by name, in the order of the table."""
        return {name: getattr(self, name) for name in TITLES}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GenerationScores:
        """The inverse of `to_dict`. Entries that this version does not know are left out."""
        known = {spec.name for spec in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})


def generation_metrics(
    predictions: Sequence[str], references: Sequence[str], *, backend: str = "auto"
) -> GenerationScores:
    """Score generated texts against one reference each.

    Predictions may be empty, even all of them: they score 0, brevity penalty and length ratio included (the limits;
    evaluate divides by zero there). References may be empty too, but not all: the length ratio would not be defined.

    Args:
        predictions: the generated texts.
        references: the text that each of them should be.
        backend: "evaluate": by the Hub's metrics "bleu" and "rouge", whose code is fetched from there and run;
            "libraries": by sacrebleu and rouge_score, with equal values; "auto": by evaluate where its metrics can be
                had and the Hub is not offline, else by the
            libraries.

    Raises:
        ConfigError: if these are not equally many texts, or cannot be scored.
        MissingDependencyError: if a library, or with "evaluate" a metric, cannot be had.
    """
    predictions, references = _checked(predictions, references)
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, found {backend!r}.")
    metrics = None if backend == "libraries" else _hub_metrics(needed=backend == "evaluate")
    if metrics is None:
        bleu = _bleu(_bleu_counts(predictions, references).sum(axis=0).tolist())
        rouge = _rouge_f1(predictions, references).mean(axis=0).tolist()
    else:
        bleu, rouge = _by_evaluate(*metrics, predictions, references)
    meteor, reason = _meteor(predictions, references)
    return GenerationScores(
        **bleu,
        **dict(zip(_ROUGE, rouge, strict=True)),
        meteor=None if meteor is None else float(meteor.mean()),
        samples=len(predictions),
        backend="libraries" if metrics is None else "evaluate",
        reasons={} if reason is None else {"meteor": reason},
    )


def bootstrap_intervals(
    predictions: Sequence[str], references: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % intervals of the scores: the middle of their values over texts drawn anew, with replacement.

    They tell how the scores would vary with other texts of the same kind, not with another training of the model.
    BLEU's parts are computed from the summed counts of the texts drawn; a draw in which all references are empty has no
    BLEU, and does not count for it.

    Args:
        predictions, references: as for `generation_metrics`.
        resamples: how often texts are drawn.
        seed: of the draws; models that are compared on the same texts are drawn alike.

    Returns:
        Name of a score -> lower and upper bound, in the order of the table, without scores that are left out.

    Raises:
        ConfigError: if these are not equally many texts, or cannot be scored.
        MissingDependencyError: if sacrebleu, rouge_score or nltk is missing.
    """
    predictions, references = _checked(predictions, references)
    if resamples < 1:
        raise ConfigError(f"resamples must be at least 1, found {resamples}.")
    counts = _bleu_counts(predictions, references)
    meteor, _ = _meteor(predictions, references)
    means = dict(zip(_ROUGE, _rouge_f1(predictions, references).T, strict=True))
    if meteor is not None:
        means["meteor"] = meteor
    centers = {
        name: column.mean() for name, column in means.items()
    }  # sums of differences from these keep their last digits
    table = np.column_stack([counts, *(column - centers[name] for name, column in means.items())]).astype(np.float64)
    rng, n = np.random.default_rng(seed), len(table)
    drawn = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) @ table for _ in range(resamples)])
    width = counts.shape[1]
    bleu = [_bleu(sums) for sums in drawn[:, :width].tolist() if sums[-1]]
    values = {name: [scores[name] for scores in bleu] for name in bleu[0]} if bleu else {}
    values |= {name: centers[name] + sums / n for name, sums in zip(means, drawn[:, width:].T, strict=True)}
    return {name: tuple(np.percentile(values[name], _BOUNDS).tolist()) for name in TITLES if name in values}


def scores_table(
    columns: Mapping[str, GenerationScores],
    *,
    encoders: Mapping[str, int] | None = None,
    decoders: Mapping[str, int] | None = None,
    parameters: Mapping[str, int] | None = None,
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> str:
    """A Markdown table with a row for each score and a column for each model; beneath it, why a "-" stands where no
    value does.

    Args:
        columns: name of a model -> its scores.
        encoders, decoders: name of a model -> number of its encoder's or decoder's blocks; None: no such row.
        parameters: name of a model -> number of its parameters; None: no such row.
        intervals: name of a model -> what `bootstrap_intervals` gave for it; shown in brackets.

    Raises:
        ConfigError: if there is no model, or something is given for a model that is none of the columns.
    """
    if not columns:
        raise ConfigError("A table of scores needs at least one model, found none.")
    sizes = {"Num of encoder": encoders, "Num of decoder": decoders, "Num of parameter": parameters}
    for given in (*sizes.values(), intervals):
        unknown = sorted(set(given or {}) - set(columns))
        if unknown:
            raise ConfigError(f"{', '.join(unknown)} is none of the table's columns, which are: {', '.join(columns)}.")
    lines = [["", *(name.replace("|", "\\|") for name in columns)], ["---", *["---:"] * len(columns)]]
    notes = []
    for title, numbers in sizes.items():
        if numbers is not None:
            lines.append([title, *(f"{numbers[name]:,}" if name in numbers else "-" for name in columns)])
            notes += [f"{title} is not known of {name}." for name in columns if name not in numbers]
    for score, title in TITLES.items():
        lines.append(
            [
                title,
                *(
                    _cell(getattr(row, score), (intervals or {}).get(name, {}).get(score))
                    for name, row in columns.items()
                ),
            ]
        )
        reasons: dict[str, list[str]] = {}
        for name, row in columns.items():
            if getattr(row, score) is None:
                reasons.setdefault(row.reasons.get(score, "the reason is not known."), []).append(name)
        notes += [f"{title} is left out for {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    if intervals:
        sizes_of = sorted({row.samples for row in columns.values()})
        notes.append(
            f"In brackets: 95 % bootstrap intervals over the texts, n = {' and '.join(f'{n:,}' for n in sizes_of)}."
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, *notes])


def _checked(predictions: Sequence[str], references: Sequence[str]) -> tuple[list[str], list[str]]:
    """Both as lists, if they can be scored."""
    for name, texts in (("predictions", predictions), ("references", references)):
        if isinstance(texts, str) or not hasattr(texts, "__iter__"):
            raise ConfigError(f"{name} must be a list of texts, found {type(texts).__name__}.")
    predictions, references = list(predictions), list(references)
    for name, texts in (("predictions", predictions), ("references", references)):
        wrong = next((index for index, text in enumerate(texts) if not isinstance(text, str)), None)
        if wrong is not None:
            hint = (
                " There is one reference a prediction."
                if name == "references" and isinstance(texts[wrong], (list, tuple))
                else ""
            )
            raise ConfigError(f"{name} must be texts, found {type(texts[wrong]).__name__} at {wrong}.{hint}")
    if len(predictions) != len(references):
        raise ConfigError(
            f"There must be one reference a prediction, found {len(predictions)} predictions, {len(references)} "
            f"references."
        )
    if not predictions:
        raise ConfigError("Scores need at least one prediction, found none.")
    if all(map(_blank, references)):
        raise ConfigError(
            "Scores need a reference that is not empty, found only empty ones: are these the right texts?"
        )
    return predictions, references


def _blank(text: str) -> bool:
    """Whether tokenizer_13a finds nothing in it."""
    return not text.replace("<skipped>", "").replace("-\n", "").strip()


def _missing(error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(f'Scores of generated texts need {error.name}: pip install "deeparc_hf[recipes]".')


def _bleu_counts(predictions: list[str], references: list[str]) -> np.ndarray:
    """A row a text: clipped counts of 1- to 4-grams, counts of the prediction's 1- to 4-grams, its tokens, the
    reference's tokens.
    """
    try:
        from sacrebleu import BLEU
    except ImportError as error:
        raise _missing(error) from error
    # texts are tokenized beforehand: sacrebleu would strip their ends first, and tell "-\n" there otherwise than
    # evaluate does
    tokens = BLEU(tokenize="13a").tokenizer
    metric = BLEU(
        tokenize="none", smooth_method="none", force=True, effective_order=True
    )  # the latter for no warning: counts are counts
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        score = metric.sentence_score(tokens(prediction), [tokens(reference)])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.array(rows, dtype=np.int64)


def _bleu(sums: Sequence[float]) -> dict[str, float]:
    """BLEU and its parts from sums of `_bleu_counts`, with evaluate's arithmetic,
    so that the last digit is the same.
    """
    counts, totals, (predicted, expected) = sums[:_ORDER], sums[_ORDER : 2 * _ORDER], sums[2 * _ORDER :]
    precisions = [count / total if total else 0.0 for count, total in zip(counts, totals, strict=True)]
    ratio = predicted / expected
    penalty = 1.0 if ratio > 1 else math.exp(1 - 1 / ratio) if ratio else 0.0
    mean = math.exp(sum(1 / _ORDER * math.log(precision) for precision in precisions)) if min(precisions) > 0 else 0.0
    return _bleu_parts(mean * penalty, precisions, penalty, ratio)


def _bleu_parts(bleu: float, precisions: Sequence[float], penalty: float, ratio: float) -> dict[str, float]:
    named = {f"precision_{order}": float(value) for order, value in enumerate(precisions, start=1)}
    return {"bleu": float(bleu), **named, "brevity_penalty": float(penalty), "length_ratio": float(ratio)}


def _rouge_f1(predictions: list[str], references: list[str]) -> np.ndarray:
    """A row a text, a column for each kind of ROUGE."""
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise _missing(error) from error
    scorer = rouge_scorer.RougeScorer(list(_ROUGE), use_stemmer=False)
    rows = [
        scorer.score(target=reference, prediction=text) for text, reference in zip(predictions, references, strict=True)
    ]
    return np.array([[row[name].fmeasure for name in _ROUGE] for row in rows], dtype=np.float64)


def _meteor(predictions: list[str], references: list[str]) -> tuple[np.ndarray | None, str | None]:
    """METEOR of each text, or why there is none."""
    try:
        import nltk
        from nltk.translate.meteor_score import single_meteor_score
    except ImportError as error:
        raise _missing(error) from error
    absent = []
    for name, load in (
        ("punkt_tab", lambda: nltk.word_tokenize("")),
        ("wordnet", lambda: nltk.corpus.wordnet.ensure_loaded()),
    ):
        try:
            load()
        except (LookupError, OSError):  # not there, or not whole
            absent.append(name)
    if absent:
        command = f"python -m nltk.downloader {' '.join(absent)}"
        return (
            None,
            f"data of nltk were not found ({', '.join(absent)}), and are not downloaded here. To have it: {command}",
        )
    words, wordnet = nltk.word_tokenize, nltk.corpus.wordnet
    pairs = zip(predictions, references, strict=True)
    return np.array(
        [single_meteor_score(words(wanted), words(text), wordnet=wordnet, **_METEOR) for text, wanted in pairs]
    ), None


def _hub_metrics(*, needed: bool) -> tuple[Any, Any] | None:
    """evaluate's "bleu" and "rouge"; None where they cannot be had.

    Raises:
        MissingDependencyError: if they cannot be had, but are needed.
    """
    remedy = 'Take backend="libraries", which gives the same values'
    cause: Exception | None = None
    if constants.HF_HUB_OFFLINE:  # evaluate itself would ask the Hub in spite of it
        why = "HF_HUB_OFFLINE is set, and evaluate's metrics lie on the Hub"
        remedy += ", or unset it"
    else:
        try:
            import evaluate

            # by their full names: a short one may be a folder here
            return evaluate.load("evaluate-metric/bleu", module_type="metric"), evaluate.load(
                "evaluate-metric/rouge", module_type="metric"
            )
        except (
            Exception
        ) as error:  # the Hub's and the connection's errors are of many kinds, and scripts from there may raise any
            cause, why = error, f"evaluate's metrics cannot be had: {type(error).__name__}: {error}".rstrip(".")
            if isinstance(error, ImportError) and error.name:
                remedy += f", or install {error.name}"
    if needed:
        raise MissingDependencyError(f"{why}. {remedy}.") from cause
    _log.info("BLEU and ROUGE are computed by sacrebleu and rouge_score, with equal values: %s.", why)
    return None


def _by_evaluate(
    bleu: Any, rouge: Any, predictions: list[str], references: list[str]
) -> tuple[dict[str, float], list[float]]:
    """BLEU and its parts, and the means of ROUGE, by evaluate's metrics."""
    if all(map(_blank, predictions)):
        parts = _bleu_parts(0.0, [0.0] * _ORDER, 0.0, 0.0)
    else:
        found = bleu.compute(predictions=predictions, references=references, max_order=_ORDER, smooth=False)
        parts = _bleu_parts(found["bleu"], found["precisions"], found["brevity_penalty"], found["length_ratio"])
    f1 = rouge.compute(
        predictions=predictions,
        references=references,
        rouge_types=list(_ROUGE),
        use_stemmer=False,
        use_aggregator=False,
    )
    return parts, np.array([f1[name] for name in _ROUGE], dtype=np.float64).T.mean(axis=0).tolist()


def _cell(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if interval is None else f"{value:.4f} ({interval[0]:.4f} to {interval[1]:.4f})"
