# /// script
# requires-python = ">=3.11"
# dependencies = ["deeparc_hf[recipes,sentences]"]
# ///
r"""Sentence embeddings: fine-tune a sentence-transformers model on pairs of texts, remove layers in iterations,
retrain, zero weights, and measure every model by retrieval, or by the similarity of pairs that have scores.

    python recipes/sentence_embeddings.py --config recipes/configs/minilm_pairs.yaml
    accelerate launch recipes/sentence_embeddings.py --config recipes/configs/mpnet_natural_questions.yaml

Every setting of the config file may be given on the command line, which wins. Pairs are texts that belong together
(a question and its answer), in two columns; a third may hold texts that do not. With --score_column they are pairs with
a score each, as in STS benchmarks:

    python recipes/sentence_embeddings.py --model sentence-transformers/all-MiniLM-L6-v2 \
        --dataset sentence-transformers/stsb --anchor_column sentence1 --positive_column sentence2 \
        --score_column score --num_blocks 4 --output_dir runs/stsb

With --distill_embeddings the retraining learns the embeddings of the model before pruning (its training needs no pairs,
only their texts), instead of the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deeparc_hf.core.settings import setting


@dataclass
class SentenceArguments:
    """Columns and lengths, and how embeddings are trained."""

    anchor_column: str = setting("anchor", "column of the texts that ask, or of the first sentences")
    positive_column: str = setting("positive", "column of the texts that belong to them, or of the second sentences")
    negative_column: str | None = setting(None, "column of texts that do not belong to them")
    score_column: str | None = setting(None, "column of the similarity of two sentences, a number")
    max_length: int | None = setting(None, "longest text in tokens; default: as the model has it")
    pooling: str = setting("mean", "mean, cls, max or lasttoken, of a model that has no modules of its own")
    normalize: bool = setting(False, "embeddings of length 1, of a model that has no modules of its own")
    distill_embeddings: bool = setting(False, "retrain on the embeddings of the model before pruning (MSELoss)")
    no_duplicates: bool = setting(True, "no batch holds a text twice, which would be its own wrong answer")


def check(text: SentenceArguments, pruning: Any) -> None:
    """Refuse settings that make no sense together, before any work is done."""
    from deeparc_hf.errors import ConfigError

    if pruning.distill_alpha is not None:
        raise ConfigError(
            "distill_alpha teaches the outputs of a classifier or a language model, and the loss of sentence "
            "embeddings is not the model's. Give distill_embeddings."
        )
    if pruning.lora_rank is not None:
        raise ConfigError(
            "lora_rank puts adapters around a model of transformers, and a sentence encoder has modules beside it. "
            "Leave it out (and freeze partial, to train less)."
        )
    if pruning.test_each_epoch:
        raise ConfigError(
            "test_each_epoch: in this recipe a training evaluates the validation data alone. Leave it out."
        )
    if text.distill_embeddings and pruning.retrain_epochs == 0:
        raise ConfigError("distill_embeddings is about the retraining, and retrain_epochs is 0. Leave one of them out.")
    loss = (pruning.metric or "loss").removeprefix("eval_") == "loss"
    if text.distill_embeddings and pruning.max_drop is not None and loss:
        raise ConfigError(
            "With distill_embeddings the loss is another one after the pruning than before, and max_drop would compare "
            "the two. Give a metric: cosine_ndcg@10, or spearman_cosine with scores."
        )


def training_type() -> type:
    """The Trainer's arguments: those of sentence-transformers.

    Raises:
        MissingDependencyError: if it is not installed.
    """
    from deeparc_hf.errors import MissingDependencyError

    try:
        from sentence_transformers import SentenceTransformerTrainingArguments
    except ImportError as error:
        raise MissingDependencyError(
            'Sentence embeddings need sentence-transformers: pip install "deeparc_hf[sentences]".'
        ) from error
    arguments: type = SentenceTransformerTrainingArguments
    return arguments


def main(argv: list[str] | None = None) -> list[Any]:
    """Run the experiment and return the rows of its table."""
    arguments = training_type()  # first: what is missing is said at once
    from experiment import embeddings
    from experiment.arguments import begin
    from experiment.provenance import provenance
    from experiment.sequence import Experiment
    from experiment.splits import load_splits

    data, text, pruning, training = begin(SentenceArguments, argv, __doc__, arguments)
    check(text, pruning)
    columns = (text.anchor_column, text.positive_column, text.negative_column, text.score_column)
    splits = embeddings.text_pairs(load_splits(data, training.seed), *columns)

    def load(name: str) -> Any:
        settings = {"revision": data.model_revision} if name == data.model else {}
        made = {"pooling": text.pooling, "normalize": text.normalize, "device": "cpu" if training.use_cpu else None}
        model = embeddings.load_encoder(name, **made, **settings)
        if text.max_length is not None:
            model.max_seq_length = text.max_length
        return model

    size, scored = training.per_device_eval_batch_size, text.score_column is not None
    trainers = embeddings.Trainers(splits, load, scored, size, distinct=text.no_duplicates)
    measure = (embeddings.SimilarityMeasure if scored else embeddings.RetrievalMeasure)(splits.test, size)
    notes = [measure.told]
    if text.distill_embeddings:
        notes.append("The retrainings learn the embeddings of the original, so their loss is another than its own.")
    told = {"provenance": provenance(__file__, argv, data, text, training, splits), "notes": notes}
    return Experiment(
        data,
        pruning,
        training,
        load,
        trainers,
        splits,
        measure,
        timed=measure.run,
        known=embeddings.SIMILARITY if scored else embeddings.RETRIEVAL,
        taught=trainers.taught if text.distill_embeddings else None,
        **told,
    ).run()


if __name__ == "__main__":
    from experiment.command import run

    run(main)
