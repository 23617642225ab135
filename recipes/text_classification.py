# /// script
# requires-python = ">=3.11"
# dependencies = ["deeparc_hf[recipes]"]
# ///
r"""Text classification: fine-tune a BERT-like model, remove layers in iterations, retrain, zero weights, and measure
every model.

    python recipes/text_classification.py --config recipes/configs/bert_base_emotion.yaml
    accelerate launch recipes/text_classification.py --config recipes/configs/bert_base_emotion.yaml --threshold 0.98

Every setting of the config file may be given on the command line, which wins. Any data set with a text column and a
label column will do:

    python recipes/text_classification.py --model distilbert-base-uncased --dataset stanfordnlp/imdb --num_blocks 4 \
        --output_dir runs/imdb
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from deeparc_hf.core.settings import setting


@dataclass
class TextArguments:
    """Columns and lengths."""

    text_column: str = setting("text", "column of the texts")
    text_pair_column: str | None = setting(None, "column of second texts, where the task has pairs")
    label_column: str = setting("label", "column of the labels, numbers or names")
    max_length: int = setting(128, "longest text in tokens")


def main(argv: list[str] | None = None) -> list[Any]:
    """Run the experiment and return the rows of its table."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer

    from experiment.arguments import begin
    from experiment.labels import encode_labels
    from experiment.metrics import Accuracy, Metrics
    from experiment.models import loader, named_classes
    from experiment.provenance import provenance
    from experiment.sequence import Experiment
    from experiment.splits import load_splits

    data, text, pruning, training = begin(TextArguments, argv, __doc__)
    splits = load_splits(data, training.seed)
    splits.need_texts(text_column=text.text_column, text_pair_column=text.text_pair_column)
    splits, names = encode_labels(splits, text.label_column, named_classes(data, pruning))
    tokenizer = AutoTokenizer.from_pretrained(data.model, revision=data.model_revision)

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [rows[column] for column in (text.text_column, text.text_pair_column) if column is not None]
        return dict(tokenizer(*texts, truncation=True, max_length=text.max_length))

    splits = splits.map(encode, keep=["labels"])

    metrics = Metrics(["accuracy"], data.evaluate_scripts)
    trainer = partial(
        Trainer,
        train_dataset=splits.train,
        eval_dataset=splits.validation,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=Accuracy(metrics),
    )
    load = loader(AutoModelForSequenceClassification, data, pruning, labels=names)
    made_by = provenance(__file__, argv, data, text, training, splits, metrics.told)
    return Experiment(
        data, pruning, training, load, trainer, splits, provenance=made_by, notes=[f"{metrics}"], known=["accuracy"]
    ).run()


if __name__ == "__main__":
    from experiment.command import run

    run(main)
