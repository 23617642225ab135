r"""Trains a small bottleneck ResNet or ViT of transformers from scratch, as a subject for the benchmarks of blocks.

The ResNet: 14 blocks in four stages. transformers' stem divides the sides by four, so the images are scaled up first:
from 32 to 64 pixels the first stage works on 16x16 positions. The ViT: 12 blocks on patches of 4 x 4 pixels. Each epoch
sees every image once, mirrored by chance and shifted by up to 4 pixels. The held-out images are looked at only to
report: the last epoch's weights are saved, whatever their accuracy.

    python -m benchmarks.train_images --train train.parquet --heldout test.parquet --output FOLDER
    python -m benchmarks.train_images --kind vit --image-size 32 --train train.parquet --heldout test.parquet \
        --output FOLDER

Data: .parquet files with an image and a label column (CIFAR-10 and its like).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional

from deeparc_hf.core.environment import hardware, package_versions
from deeparc_hf.core.statistics import wilson_interval

from .images import model_input, read_images

SHIFT = 4


def build_resnet(classes: dict[str, Any], args: argparse.Namespace) -> nn.Module:
    """The untrained ResNet."""
    config = tf.ResNetConfig(
        layer_type="bottleneck",
        depths=args.depths,
        hidden_sizes=args.hidden_sizes,
        embedding_size=args.embedding_size,
        **classes,
    )
    return tf.ResNetForImageClassification(config)


def build_vit(classes: dict[str, Any], args: argparse.Namespace) -> nn.Module:
    """The untrained ViT."""
    config = tf.ViTConfig(
        hidden_size=128,
        num_hidden_layers=12,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=args.image_size,
        patch_size=4,
        **classes,
    )
    return tf.ViTForImageClassification(config)


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored by chance and shifted by up to 4 pixels; the border is reflected."""
    count, _, height, width = pixels.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
    padded = functional.pad(pixels.float(), [SHIFT] * 4, mode="reflect")
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, count), generator=generator)
    rows = (down[:, None] + torch.arange(height))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(count)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]


def evaluate(model: nn.Module, pixels: Tensor, labels: Tensor, size: int) -> tuple[int, float]:
    """How many are classified right, and the mean loss."""
    with torch.no_grad():
        logits = torch.cat([model.eval()(model_input(part, size)).logits for part in pixels.split(100)])
    return int((logits.argmax(1) == labels).sum()), float(functional.cross_entropy(logits, labels))


def train(model: nn.Module, pixels: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """SGD with momentum, AdamW for the ViT; the rate rises for a fifth of the steps and then falls along a cosine."""
    generator = torch.Generator().manual_seed(args.seed)
    if args.kind == "vit":
        args.rate = args.rate or 1e-3
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.05)
    else:
        args.rate = args.rate or 0.05
        optimizer = torch.optim.SGD(model.parameters(), lr=args.rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(pixels) // args.batch_size  # what is left of an epoch's images waits for another epoch
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.rate, epochs=args.epochs, steps_per_epoch=steps, pct_start=0.2
    )
    for epoch in range(args.epochs):
        model.train()
        start, total, right = time.perf_counter(), 0.0, 0
        for chosen in torch.randperm(len(pixels), generator=generator)[: steps * args.batch_size].split(
            args.batch_size
        ):
            output = model(model_input(augmented(pixels[chosen], generator), args.image_size), labels=labels[chosen])
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
            total, right = (
                total + float(output.loss.detach()),
                right + int((output.logits.argmax(1) == labels[chosen]).sum()),
            )
        seconds = time.perf_counter() - start
        print(
            f"epoch {epoch + 1}: loss {total / steps:.3f} accuracy {right / steps / args.batch_size:.3f} "
            f"({seconds:.1f} s)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("resnet", "vit"), default="resnet")
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--heldout", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path, help="folder for the model and training.json")
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 4, 4, 3])
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--embedding-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=64, help="sides that the images are scaled to")
    parser.add_argument("--epochs", type=int, default=70)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, help="highest learning rate; default: 0.05, of the ViT 0.001")
    parser.add_argument("--rows", type=int, help="training images; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tf.set_seed(args.seed)
    pixels, labels, names = read_images(args.train)
    pixels, labels = pixels[: args.rows], labels[: args.rows]
    heldout = read_images(args.heldout)
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    build = build_vit if args.kind == "vit" else build_resnet
    model = build(classes, args).to(memory_format=torch.channels_last)
    start = time.perf_counter()
    train(model, pixels, labels, args)
    seconds = time.perf_counter() - start
    facts = {"seconds": round(seconds), "training images": len(pixels), "epochs": args.epochs, "seed": args.seed}
    for name, part in (("training", (pixels, labels)), ("held-out", heldout[:2])):
        right, loss = evaluate(model, *part, args.image_size)
        low, high = wilson_interval(right, len(part[1]))
        facts[name] = {"images": len(part[1]), "accuracy": right / len(part[1]), "interval": [low, high], "loss": loss}
        print(f"{name}: accuracy {right / len(part[1]):.4f} ({low:.4f} .. {high:.4f}), loss {loss:.4f}", flush=True)
    model.save_pretrained(args.output)
    (args.output / "training.json").write_text(
        json.dumps({**facts, **hardware(), **package_versions()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
