"""Images of .parquet files, with an image and a label column, as the benchmarks read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def read_images(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    """The pixels (N, 3, height, width) as bytes, the labels, and the names of the classes."""
    import datasets

    table = datasets.Dataset.from_parquet(str(path))
    image, label = table.column_names[:2]
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in table[image]])
    return (
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(table[label]),
        list(table.features[label].names),
    )


def model_input(pixels: Tensor, size: int | None) -> Tensor:
    """Bytes as numbers from -1 to 1, scaled to `size` pixels a side (None: as they are)."""
    values = pixels.float() / 127.5 - 1
    if size is not None and size != values.shape[-1]:
        values = functional.interpolate(values, size=(size, size), mode="bilinear", align_corners=False)
    return values.contiguous(memory_format=torch.channels_last)
