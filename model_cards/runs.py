"""The run of minilm-emotion-pruned: both callbacks in one training (the other cards are of recipes).

    python model_cards/runs.py --data FOLDER --output runs/text

FOLDER holds train.csv, validation.csv and test.csv (text, label).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from deeparc_hf import MPruneCallback, WandaCallback, create_model_card

KEPT = ("config.json", "pruning_report.json", "pruning_plan.json", "sparsity_report.json")


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def settings(output: str, **more: Any) -> TrainingArguments:
    """Arguments of the training."""
    shared = {
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "seed": 0,
        "report_to": "none",
        "logging_strategy": "epoch",
    }
    return TrainingArguments(output, **shared, per_device_eval_batch_size=64, **more)


def text_classification(args: argparse.Namespace) -> tuple[Trainer, Any, dict[str, Any]]:
    """MiniLM on dair-ai/emotion: two prunings, each judged on the validation texts; accuracy on the test texts."""
    files = {name: str(Path(args.data, f"{name}.csv")) for name in ("train", "validation", "test")}
    names = ["sadness", "joy", "love", "anger", "fear", "surprise"]
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        known = [label if isinstance(label, int) else names.index(label) for label in batch["label"]]
        return {**tokenizer(batch["text"], truncation=True, max_length=64), "labels": known}

    data = load_dataset("csv", data_files=files).map(encode, batched=True, remove_columns=["text", "label"])
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(names), **labels),
        args=settings(args.output, num_train_epochs=5, per_device_train_batch_size=32, learning_rate=5e-5),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
        callbacks=[
            MPruneCallback(
                num_blocks=[5, 4], start_epoch=2, retrain_epochs=1, heal="lstsq", metric="accuracy", max_drop=0.02
            ),
            WandaCallback(sparsity=0.3, start_epoch=4),
        ],
    )
    told = {"dataset_tags": "dair-ai/emotion", "language": "en", "license": "apache-2.0"}
    return trainer, data["test"], {**told, "finetuned_from": "sentence-transformers/all-MiniLM-L6-v2"}


def main() -> None:
    """Run one, and keep its card and what the card is made from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="base model")
    parser.add_argument("--output", required=True, help="folder of the run")
    parser.add_argument("--keep", help="folder for the card and its sources")
    args = parser.parse_args()
    torch.manual_seed(0)
    trainer, held_out, told = text_classification(args)
    trainer.train()
    trainer.evaluate(held_out, metric_key_prefix="test")
    trainer.save_model(args.output)
    told = {"repo_id": f"org/{Path(args.output).name}", "command": "python model_cards/runs.py --data DATA", **told}
    create_model_card(trainer, **told)
    if args.keep is not None:
        Path(args.keep).mkdir(parents=True, exist_ok=True)
        for name in (*KEPT, "README.md", "similarity.png", "tokenizer_config.json"):
            if Path(args.output, name).is_file():
                shutil.copy(Path(args.output, name), args.keep)
        Path(args.keep, "card.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
