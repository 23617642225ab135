"""Sentence embeddings: pairs of texts, what sentence-transformers' evaluators measure on them, with intervals, and the
embeddings of a teacher.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from sentence_transformers.sentence_transformer.training_args import BatchSamplers

from deeparc_hf.core.sentence_encoders import module_folders
from deeparc_hf.errors import ConfigError

from .results import Measured
from .splits import Splits

__all__ = [
    "RETRIEVAL",
    "SIMILARITY",
    "RetrievalMeasure",
    "SimilarityMeasure",
    "Trainers",
    "bootstrap_interval",
    "load_encoder",
    "per_query",
    "retrieval_evaluator",
    "similarity_evaluator",
    "text_pairs",
    "with_embeddings",
]

DEPTH = 10  # how far down the ranking is looked at
ANCHOR, POSITIVE, NEGATIVE, SCORE, LABEL = "anchor", "positive", "negative", "score", "label"
_RETRIEVAL = (f"ndcg@{DEPTH}", f"mrr@{DEPTH}", "accuracy@1", "accuracy@5", f"recall@{DEPTH}")
_FUNCTIONS = ("cosine", "dot", "euclidean", "manhattan")
# what the evaluators call their metrics
RETRIEVAL = tuple(f"{function}_{name}" for function in _FUNCTIONS for name in _RETRIEVAL)
SIMILARITY = tuple(f"{name}_{function}" for function in _FUNCTIONS for name in ("spearman", "pearson"))
_RESAMPLES, _BATCH = 1000, 64


def text_pairs(splits: Splits, anchor: str, positive: str, negative: str | None, score: str | None) -> Splits:
    """The splits with the columns anchor, positive and, where they are asked for, negative and score, in this order.

    Raises:
        ConfigError: if a column is not there or holds something else.
    """
    splits.need_texts(anchor_column=anchor, positive_column=positive, negative_column=negative)
    splits.need(score_column=score)
    if negative is not None and score is not None:
        raise ConfigError("negative_column is for pairs that belong together, score_column for others. Give one.")
    columns = {ANCHOR: anchor, POSITIVE: positive, NEGATIVE: negative, SCORE: score}
    named = {name: column for name, column in columns.items() if column is not None}
    if len(set(named.values())) < len(named):
        raise ConfigError(f"The columns must be different ones, found {', '.join(map(repr, named.values()))}.")

    def chosen(part: Any) -> Any:
        part = part.select_columns(list(named.values()))
        if score is not None and not str(part.features[score].dtype).startswith(("float", "int")):
            raise ConfigError(f"score_column: {score!r} holds {part.features[score].dtype}, no numbers.")
        return part.rename_columns({f"{c}": f"_{n}" for n, c in named.items()}).rename_columns(
            {f"_{name}": name for name in named}
        )

    return splits.each(chosen)


def load_encoder(name: str, *, pooling: str = "mean", normalize: bool = False, **settings: Any) -> SentenceTransformer:
    """A sentence encoder by Hub id or folder. A plain transformers model gets a pooling, and is followed by `Normalize`
    where that is asked for; one that has modules of its own keeps these.

    Args:
        settings: as SentenceTransformer takes them: revision, device.
    """
    revision = settings.get("revision")
    if module_folders(name, **({} if revision is None else {"revision": revision})) is not None:
        return SentenceTransformer(name, **settings)
    place = {} if revision is None else {"revision": revision}
    transformer = Transformer(name, model_kwargs=place, config_kwargs=place, processor_kwargs=place)
    modules: list[Any] = [transformer, Pooling(transformer.get_embedding_dimension(), pooling)]
    return SentenceTransformer(modules=[*modules, *([Normalize()] if normalize else [])], device=settings.get("device"))


def with_embeddings(pairs: Any, teacher: SentenceTransformer, batch_size: int = _BATCH) -> Any:
    """The texts of a split, each once, with the teacher's embedding of each in the column "label", as MSELoss takes
    them.
    """
    from datasets import Dataset, Features, List, Value

    columns = [column for column in (ANCHOR, POSITIVE, NEGATIVE) if column in pairs.column_names]
    texts = list(dict.fromkeys(text for column in columns for text in pairs[column]))
    embeddings = teacher.encode(texts, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
    kinds = Features({"sentence": Value("string"), LABEL: List(Value("float32"))})
    return Dataset.from_dict({"sentence": texts, LABEL: list(embeddings.astype(np.float32))}, features=kinds)


class Trainers:
    """Makes the Trainers of an experiment, all with one evaluator on the validation data.

    Args:
        splits: of `text_pairs`.
        load: a model by Hub id or folder.
        scored: whether the pairs have scores (CoSENTLoss); else each text is told from the others of its batch
            (MultipleNegativesRankingLoss).
        distinct: whether no batch holds a text twice, where that matters.
    """

    def __init__(
        self, splits: Splits, load: Callable[[str], Any], scored: bool, batch_size: int, *, distinct: bool = True
    ) -> None:
        self._splits, self._load, self._batch = splits, load, batch_size
        self._loss = losses.CoSENTLoss if scored else losses.MultipleNegativesRankingLoss
        self._distinct = distinct and not scored
        self._evaluator = (similarity_evaluator if scored else retrieval_evaluator)(splits.validation, batch_size)
        self._lessons: dict[str, dict[str, Any]] = {}

    def __call__(self, model: Any, args: Any, callbacks: list[Any]) -> SentenceTransformerTrainer:
        """A Trainer on the pairs."""
        if self._distinct:
            args = dataclasses.replace(args, batch_sampler=BatchSamplers.NO_DUPLICATES)
        parts = {"train_dataset": self._splits.train, "eval_dataset": self._splits.validation}
        return self._made(model, args, callbacks, self._loss, parts)

    def taught(self, teacher: str, model: Any, args: Any, callbacks: list[Any]) -> SentenceTransformerTrainer:
        """A Trainer on the teacher's embeddings of the texts (Reimers and Gurevych 2020, arXiv 2004.09813)."""
        if teacher not in self._lessons:
            parts = (("train_dataset", self._splits.train), ("eval_dataset", self._splits.validation))
            encoder = self._load(teacher)
            self._lessons = {teacher: {name: with_embeddings(part, encoder, self._batch) for name, part in parts}}
        return self._made(model, args, callbacks, losses.MSELoss, self._lessons[teacher])

    def _made(self, model: Any, args: Any, callbacks: list[Any], loss: Any, parts: Mapping[str, Any]) -> Any:
        return SentenceTransformerTrainer(
            model, args, loss=loss(model), evaluator=self._evaluator, callbacks=callbacks, **parts
        )


# ---- retrieval ----


def retrieval_evaluator(pairs: Any, batch_size: int = _BATCH, **settings: Any) -> InformationRetrievalEvaluator:
    """Each different anchor asks for its positives among all positives and negatives of the split."""
    texts = [text for column in (POSITIVE, NEGATIVE) if column in pairs.column_names for text in pairs[column]]
    places = {text: f"d{number}" for number, text in enumerate(dict.fromkeys(texts))}
    asked: dict[str, set[str]] = {}
    for anchor, positive in zip(pairs[ANCHOR], pairs[POSITIVE], strict=True):
        asked.setdefault(anchor, set()).add(places[positive])
    numbers = {f"q{number}": anchor for number, anchor in enumerate(asked)}
    return InformationRetrievalEvaluator(
        numbers,
        {place: text for text, place in places.items()},
        {number: asked[anchor] for number, anchor in numbers.items()},
        mrr_at_k=[DEPTH],
        ndcg_at_k=[DEPTH],
        accuracy_at_k=[1, 5],
        precision_recall_at_k=[DEPTH],
        map_at_k=[DEPTH],
        batch_size=batch_size,
        write_csv=False,
        **settings,
    )


def per_query(found: Sequence[str], wanted: set[str]) -> dict[str, float]:
    """What one query adds to each mean: of the ranking that was found for it, with binary relevance."""
    hits = [place in wanted for place in found[:DEPTH]]
    ideal = sum(1 / math.log2(rank + 2) for rank in range(min(len(wanted), DEPTH)))
    return {
        f"ndcg@{DEPTH}": sum(1 / math.log2(rank + 2) for rank, hit in enumerate(hits) if hit) / ideal,
        f"mrr@{DEPTH}": next((1 / (rank + 1) for rank, hit in enumerate(hits) if hit), 0.0),
        "accuracy@1": float(any(hits[:1])),
        "accuracy@5": float(any(hits[:5])),
        f"recall@{DEPTH}": sum(hits) / len(wanted),
    }


class RetrievalMeasure:
    """Measures a Trainer's model by an InformationRetrievalEvaluator on the test data, with 95 % intervals by the
    bootstrap over its queries (of the rankings that the evaluator writes).
    """

    told = (
        "A sample is a query; it asks for its texts among all of the split. Intervals: by the bootstrap over the "
        "queries (1,000 resamples)."
    )

    def __init__(self, test: Any, batch_size: int = _BATCH) -> None:
        self._evaluator = retrieval_evaluator(test, batch_size, write_predictions=True)

    def __call__(self, trainer: Any) -> Measured:
        """The figures of the model as it is."""
        metrics, lines = self.run(trainer)
        function = next(name for name in _FUNCTIONS if f"{name}_{_RETRIEVAL[0]}" in metrics)
        rankings = [([hit["corpus_id"] for hit in line["results"]], line["query_id"]) for line in lines]
        values = [per_query(found, self._evaluator.relevant_docs[query]) for found, query in rankings]
        figures = {f"{function}_{name}": float(metrics[f"{function}_{name}"]) for name in _RETRIEVAL}
        table = np.array([[value[name] for name in _RETRIEVAL] for value in values])
        bounds = bootstrap_interval(len(table), lambda rows: table[rows].mean(axis=0))
        return Measured(figures, len(values), dict(zip(figures, bounds, strict=True)))

    def run(self, trainer: Any) -> tuple[Mapping[str, float], list[dict[str, Any]]]:
        """The evaluation alone, whose time counts: the metrics, and the ranking of each query."""
        with tempfile.TemporaryDirectory() as scratch:
            metrics = _as_it_was(trainer.accelerator.unwrap_model(trainer.model), self._evaluator, scratch)
            (file,) = Path(scratch).glob("*.jsonl")
            return metrics, [json.loads(line) for line in file.read_text("utf-8").splitlines()]


# ---- scores ----


def similarity_evaluator(pairs: Any, batch_size: int = _BATCH) -> EmbeddingSimilarityEvaluator:
    """How well the similarity of two texts' embeddings follows the scores of the pairs."""
    return EmbeddingSimilarityEvaluator(
        pairs[ANCHOR], pairs[POSITIVE], [float(score) for score in pairs[SCORE]], batch_size, write_csv=False
    )


class SimilarityMeasure:
    """Measures a Trainer's model by the correlation of similarities and scores on the test data, as
    EmbeddingSimilarityEvaluator does, with 95 % intervals by the bootstrap over the pairs.
    """

    told = "A sample is a pair. Intervals: by the bootstrap over the pairs (1,000 resamples)."

    def __init__(self, test: Any, batch_size: int = _BATCH) -> None:
        self._texts, self._batch = (list(test[ANCHOR]), list(test[POSITIVE])), batch_size
        self._scores = np.array(test[SCORE], dtype=float)

    def __call__(self, trainer: Any) -> Measured:
        """The figures of the model as it is."""
        function, found = self.run(trainer)

        def correlations(rows: Any) -> Any:
            return np.array([kind(self._scores[rows], found[rows])[0] for kind in (spearmanr, pearsonr)])

        names = (f"spearman_{function}", f"pearson_{function}")
        bounds = bootstrap_interval(len(found), correlations)
        figures = dict(zip(names, map(float, correlations(np.arange(len(found)))), strict=True))
        return Measured(figures, len(found), dict(zip(names, bounds, strict=True)))

    def run(self, trainer: Any) -> tuple[str, Any]:
        """The similarities alone, whose time counts, and the name of their function."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        settings = {"batch_size": self._batch, "show_progress_bar": False, "convert_to_tensor": True}
        found = model.similarity_pairwise(*(model.encode(texts, **settings) for texts in self._texts))
        return model.similarity_fn_name, found.cpu().numpy().astype(float)


def bootstrap_interval(
    samples: int, figures: Callable[[Any], Any], resamples: int = _RESAMPLES
) -> list[tuple[float, float]]:
    """95 % intervals by the percentile bootstrap (Efron 1979), the same for the same data.

    Args:
        figures: the figures of some samples, given by their numbers.
    """
    draw = np.random.default_rng(0)
    with np.errstate(invalid="ignore"):
        found = np.array([figures(draw.integers(samples, size=samples)) for _ in range(resamples)])
    low, high = np.nanpercentile(found, [2.5, 97.5], axis=0)
    return [(float(one), float(other)) for one, other in zip(low, high, strict=True)]


def _as_it_was(model: Any, evaluator: Any, folder: str) -> Mapping[str, float]:
    """What an evaluator measures. It notes that for sentence-transformers' card, which tells of the validation data."""
    card = model.model_card_data
    known = dict(card.eval_results_dict)
    metrics: Mapping[str, float] = evaluator(model, output_path=folder)
    card.eval_results_dict = known
    return metrics
