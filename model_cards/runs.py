"""Two of the runs whose cards are kept here, each in one training with the callbacks (the others are of the recipes):

    python model_cards/runs.py text_classification --data FOLDER --model sentence-transformers/all-MiniLM-L6-v2 --output runs/text
    python model_cards/runs.py image_classification --data FOLDER --output runs/images

FOLDER holds train.csv, validation.csv and test.csv (text, label), or train.parquet and test.parquet (image, label).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

from deeparc_hf import MPruneCallback, WandaCallback, create_model_card

KEPT = ("config.json", "pruning_report.json", "pruning_plan.json", "sparsity_report.json")


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def settings(output: str, cls: Any = TrainingArguments, **more: Any) -> Any:
    """Arguments that the runs share."""
    shared = {"eval_strategy": "epoch", "save_strategy": "no", "seed": 0, "report_to": "none", "logging_strategy": "epoch"}
    return cls(output, **shared, per_device_eval_batch_size=64, **more)


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
            MPruneCallback(num_blocks=[5, 4], start_epoch=2, retrain_epochs=1, heal="lstsq", metric="accuracy", max_drop=0.02),
            WandaCallback(sparsity=0.3, start_epoch=4),
        ],
    )
    told = {"dataset_tags": "dair-ai/emotion", "language": "en", "license": "apache-2.0"}
    return trainer, data["test"], {**told, "finetuned_from": "sentence-transformers/all-MiniLM-L6-v2"}


def image_classification(args: argparse.Namespace) -> tuple[Trainer, Any, dict[str, Any]]:
    """A small bottleneck ResNet from scratch on CIFAR-10 images: the blocks of least effect go, none is frozen."""
    files = {name: str(Path(args.data, f"{name}.parquet")) for name in ("train", "test")}
    data = load_dataset("parquet", data_files=files)
    names = data["train"].features["label"].names

    random = np.random.default_rng(0)

    def pixels(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in batch["image"]])
        return {"pixel_values": torch.from_numpy((images / 127.5 - 1).transpose(0, 3, 1, 2)), "labels": batch["label"]}

    def augmented(batch: dict[str, list[Any]]) -> dict[str, Any]:
        """Mirrored by chance, and shifted by up to 4 pixels."""
        found = pixels(batch)
        shifted = [torch.roll(image, tuple(random.integers(-4, 5, 2)), (1, 2)) for image in found["pixel_values"]]
        mirrored = [image.flip(2) if random.random() < 0.5 else image for image in shifted]
        return {**found, "pixel_values": torch.stack(mirrored)}

    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[64, 128, 256],
        depths=[4, 5, 4],
        layer_type="bottleneck",
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    trainer = Trainer(
        model=ResNetForImageClassification(config),
        args=settings(
            args.output,
            num_train_epochs=46,
            per_device_train_batch_size=64,
            learning_rate=2e-3,
            weight_decay=0.05,
            lr_scheduler_type="cosine",
            remove_unused_columns=False,
        ),
        train_dataset=data["train"].with_transform(augmented),
        eval_dataset=data["test"].with_transform(pixels),
        compute_metrics=accuracy,
        callbacks=[
            MPruneCallback(num_blocks=[11, 9], similarity="effect", linkage="adjacent", start_epoch=30, retrain_epochs=8, heal="lstsq")
        ],
    )
    return trainer, data["test"].with_transform(pixels), {"dataset_tags": "uoft-cs/cifar10", "license": "apache-2.0"}


TASKS = {run.__name__: run for run in (text_classification, image_classification)}


def main() -> None:
    """Run one, and keep its card and what the card is made from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", required=True, help="folder of the data")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="base model of text_classification")
    parser.add_argument("--output", required=True, help="folder of the run")
    parser.add_argument("--keep", help="folder for the card and its sources")
    args = parser.parse_args()
    torch.manual_seed(0)
    trainer, held_out, told = TASKS[args.task](args)
    trainer.train()
    trainer.evaluate(held_out)
    trainer.save_model(args.output)
    told = {"repo_id": f"org/{Path(args.output).name}", "command": f"python model_cards/runs.py {args.task} --data DATA", **told}
    create_model_card(trainer, **told)
    if args.keep is not None:
        Path(args.keep).mkdir(parents=True, exist_ok=True)
        for name in (*KEPT, "README.md", "similarity.png", "tokenizer_config.json"):
            if Path(args.output, name).is_file():
                shutil.copy(Path(args.output, name), args.keep)
        Path(args.keep, "card.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
