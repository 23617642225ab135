"""Small trainings for the tests: data, arguments, a callback, and a Trainer that runs them."""

from __future__ import annotations

import dataclasses

import datasets
import torch
from transformers import Trainer, TrainingArguments

from deeparc_hf import MPruneCallback

from .zoo import VOCAB

ROWS = 64


def text_data(labels="class", rows=ROWS):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, VOCAB, (rows, 10), generator=generator)
    data = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    data["labels"] = (ids[:, 0] % 2).tolist() if labels == "class" else ids[:, :6].tolist()
    return datasets.Dataset.from_dict(data)


def image_data(classes=5):
    pixels = torch.randn(ROWS, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return datasets.Dataset.from_dict(
        {"pixel_values": pixels.numpy(), "labels": [i % classes for i in range(ROWS)]}
    ).with_format("torch")


def arguments(folder, cls=TrainingArguments, **kwargs):
    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 7,
    }
    return cls(str(folder), **{**defaults, "logging_strategy": "no", **kwargs})


def pruning(config=None, **settings):
    """A callback for trainings of one epoch or more."""
    return MPruneCallback(config, **{"retrain_epochs": 1, **settings})


def without_stages(record):
    """A record without what the callback measured of each step: a run that is resumed just at a pruning measures that
    on other data.
    """
    if record is None:
        return None
    iterations = [{key: value for key, value in entry.items() if key != "stages"} for entry in record.iterations]
    return dataclasses.replace(record, iterations=tuple(iterations))


def train(
    model,
    folder,
    *callbacks,
    data=None,
    resume=None,
    cls=Trainer,
    args=TrainingArguments,
    compute_metrics=None,
    processing_class=None,
    **kwargs,
):
    data = text_data() if data is None else data
    trainer = cls(
        model=model,
        args=arguments(folder, args, **kwargs),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=compute_metrics,
        processing_class=processing_class,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer
