"""Images of a classification data set, made into what a model takes; with random changes for training only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deeparc_hf.errors import ConfigError

from .splits import Splits

__all__ = ["ImageEncoder", "image_processor", "with_images"]


class ImageEncoder:
    """A transform for `Dataset.with_transform`: pixels and labels of a batch of rows.

    Chance comes from torch's global generator, which the Trainer seeds, in each worker too, and restores where it
    resumes. Images move by up to the `shift` share of their sides; their border is mirrored into the gap.
    """

    def __init__(self, processor: Any, column: str, *, mirror: bool = False, shift: float = 0.0) -> None:
        if not 0 <= shift < 0.5:
            raise ConfigError(f"shift must be in [0, 0.5), found {shift:g}. It is a share of an image's sides.")
        self._processor = processor
        self._column = column
        self._mirror = mirror
        self._shift = shift

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in rows[self._column]]
        pixels = self._processor(images, return_tensors="pt")["pixel_values"]
        if self._mirror:
            flipped = torch.rand(len(pixels)) < 0.5
            pixels = torch.where(flipped[:, None, None, None], pixels.flip(3), pixels)
        return {"pixel_values": self._moved(pixels) if self._shift else pixels, "labels": rows["labels"]}

    def _moved(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[2:]
        rows, columns = round(self._shift * height), round(self._shift * width)
        wide = functional.pad(pixels, (columns, columns, rows, rows), mode="reflect")
        tops, lefts = (torch.randint(2 * reach + 1, (len(pixels),)).tolist() for reach in (rows, columns))
        crops = [
            image[:, top : top + height, left : left + width]
            for image, top, left in zip(wide, tops, lefts, strict=True)
        ]
        return torch.stack(crops)


def image_processor(model: str, revision: str | None, image_size: int | None) -> Any:
    """The image processor of a checkpoint; with an image size, one that scales to that size and to [-1, 1].

    Raises:
        ConfigError: if the checkpoint has none, and no size is given.
    """
    from transformers import AutoImageProcessor, ViTImageProcessor

    if image_size is not None:
        size = {"height": image_size, "width": image_size}
        return ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    try:
        return AutoImageProcessor.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{model}: cannot load an image processor ({' '.join(str(error).split())[:200]}). Give image_size, for "
            "plain scaling to that size and to [-1, 1]."
        ) from error


def with_images(splits: Splits, column: str) -> Splits:
    """The splits with a column of images, whatever it held: images, paths of files, or the files' bytes.

    Raises:
        ConfigError: if it holds something else, or is not there.
    """
    from datasets import Image

    splits.need(image_column=column)
    for part in (splits.train, splits.validation, splits.test):
        feature = part.features[column]
        kind = getattr(feature, "dtype", "bytes")
        if not isinstance(feature, (Image, dict)) and kind not in ("string", "large_string", "binary", "large_binary"):
            raise ConfigError(f"image_column: {column!r} holds {kind}, neither images nor paths of image files.")
    return splits.each(lambda part: part.cast_column(column, Image(mode="RGB")))
