"""Fine-tune a text classifier and prune it on the way, with its parameters sharded over GPUs (FSDP2, DeepSpeed):

    deeparc run examples/sharded.yaml

`deeparc run` launches this script again and again: until the next pruning, after it, and once more for what it does
after its training. Without it, in one process or in DistributedDataParallel, the script is one training:

    python examples/sharded.py --model google-bert/bert-base-uncased --output_dir runs/one
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from deeparc_hf import MPruneCallback


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="Hub id or folder; deeparc run says which")
    parser.add_argument("--output_dir", required=True, help="deeparc run says which")
    parser.add_argument("--resume_from_checkpoint", help="deeparc run says which, where a link was interrupted")
    for split in ("train", "validation", "test"):
        parser.add_argument(f"--{split}_file", help="a .csv file with the columns text and label")
    parser.add_argument("--epochs", type=float, default=7)
    parser.add_argument("--batch_size", type=int, default=16, help="of each process")
    parser.add_argument("--use_cpu", action="store_true")
    given = parser.parse_args()

    if given.train_file is None:  # from the Hub
        data = load_dataset("dair-ai/emotion")
    else:
        files = {"train": given.train_file, "validation": given.validation_file, "test": given.test_file}
        data = load_dataset("csv", data_files=files)
    labels = len(set(data["train"]["label"]))
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    data = {name: part.map(lambda row: tokenizer(row["text"], truncation=True)) for name, part in data.items()}

    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=labels),
        args=TrainingArguments(
            given.output_dir,
            num_train_epochs=given.epochs,
            per_device_train_batch_size=given.batch_size,
            eval_strategy="epoch",
            save_strategy="epoch",
            average_tokens_across_devices=False,  # a classifier's loss does not follow the number of tokens
            use_cpu=given.use_cpu,
        ),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
        callbacks=[
            MPruneCallback(num_blocks=[10, 8], start_epoch=3, retrain_epochs=2, heal="lstsq", similarity="cka"),
        ],
    )
    trainer.train(resume_from_checkpoint=given.resume_from_checkpoint)
    print(trainer.evaluate(data["test"], metric_key_prefix="test"))  # with the model that is left, once


if __name__ == "__main__":
    main()
