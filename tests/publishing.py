"""What the tests of publishing run in a client's process: tiny trainings that push, and the parts that they need."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer

from deeparc_hf import MPruneCallback, WandaCallback

from .trainers import text_data, train
from .zoo import VOCAB, ZOO

# what a client's process is told first
BEGIN = """
import torch, transformers, deeparc_hf
from deeparc_hf import push_to_hub, remove_blocks, save_pruned, PrunedConfig, create_model_card
from tests.publishing import tiny_tokenizer, trained
from tests.zoo import ZOO
from safetensors.torch import save_file
torch.set_num_threads(1)
"""
WORDS = ["<pad>", "<unk>", "</s>", "<s>", "<mask>"]


def tiny_tokenizer():
    words = {word: index for index, word in enumerate([*WORDS, *(f"w{i}" for i in range(VOCAB - len(WORDS)))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>"
    )


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trained(folder, callbacks=None, model=None, **settings):
    """A training with both callbacks: fine-tune, remove a block, remove another, zero weights."""
    torch.set_num_threads(1)
    if callbacks is None:
        callbacks = [
            MPruneCallback(num_blocks=[3, 2], start_epoch=1, retrain_epochs=1, heal="lstsq", calibration_samples=32),
            WandaCallback(sparsity=0.3, start_epoch=3, calibration_samples=32),
        ]
    defaults = {
        "num_train_epochs": 4,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "processing_class": tiny_tokenizer(),
    }
    return train(
        ZOO["bert"].model() if model is None else model,
        folder,
        *callbacks,
        compute_metrics=accuracy,
        data=text_data(),
        **{**defaults, **settings},
    )


class TimmTrainer(Trainer):
    """Trains a bare timm model, which knows no labels."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        logits = model(inputs["pixel_values"])
        loss = torch.nn.functional.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def card_of(hub, repo_id, revision="main"):
    """The card in a repository of the tests' Hub."""
    return ModelCard(hub.files(repo_id, revision)["README.md"].decode())


def image_of(folder):
    """An image file."""
    from PIL import Image

    path = Path(folder, "image.jpg")
    Image.new("RGB", (32, 32), (200, 30, 30)).save(path)
    return path
