"""Tiny models whose blocks put out other dimensions than (samples, positions, features), or whose texts stand beside
something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as tf
from torch import nn
from torch.nn import functional

from .zoo import SEQ2SEQ, T5, TEXT, VOCAB, spread

ENDED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
SAM_VISION = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
    "mlp_dim": 48,
    "window_size": 4,
    "global_attn_indexes": [],
    "num_pos_feats": 8,
}
SAM_MASKS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_dim": 32,
    "iou_head_hidden_dim": 16,
}


@dataclass(frozen=True)
class Odd:
    """One such model.

    Attributes:
        make: builds it, with random weights.
        batch: makes a batch of a number of samples, with so many more positions of padding at the end of its texts.
        stack: the stack that is odd.
        text: whether it reads texts, so that padding can be added.
        targets: the linear maps whose weights can be zeroed; None: all.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator, int], dict[str, torch.Tensor]]
    stack: str
    text: bool = True
    targets: tuple[str, ...] | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return spread(self.make()).eval()

    def batches(self, *sizes: int, padding: int = 0) -> list[dict[str, torch.Tensor]]:
        """The same samples, in batches of these sizes."""
        whole = self.batch(sum(sizes), torch.Generator().manual_seed(1), padding)
        parts = {key: value.split(list(sizes)) for key, value in whole.items()}
        return [{key: value[number] for key, value in parts.items()} for number in range(len(sizes))]


def texts(
    size: int, generator: torch.Generator, padding: int, *more: int, end: int | None = None
) -> dict[str, torch.Tensor]:
    """Texts of 4 to 10 tokens, shape (size, *more, 10 + padding)."""
    ids = torch.randint(5, VOCAB - 5, (size, *more, 10), generator=generator)
    lengths = torch.randint(4, 11, (size, *more, 1), generator=generator)
    mask = torch.arange(10) < lengths
    ids = torch.where(mask, ids, 0)
    if end is not None:
        ids = torch.where(torch.arange(10) == lengths - 1, end, ids)
    return {"input_ids": functional.pad(ids, (0, padding)), "attention_mask": functional.pad(mask.long(), (0, padding))}


def _documents(size: int, generator: torch.Generator, padding: int) -> dict[str, torch.Tensor]:
    found = texts(size, generator, padding)
    boxes = torch.randint(0, 20, (size, 10, 4), generator=generator).sort(dim=-1).values
    return {
        **found,
        "bbox": functional.pad(boxes, (0, 0, 0, padding)),
        "pixel_values": torch.randn(size, 3, 32, 32, generator=generator),
    }


def _with_labels(size: int, generator: torch.Generator, padding: int) -> dict[str, torch.Tensor]:
    return {**texts(size, generator, padding, end=2), "labels": torch.zeros(size, dtype=torch.long)}


def _series(size: int, generator: torch.Generator, padding: int) -> dict[str, torch.Tensor]:
    return {"past_values": torch.randn(size, 32, 3, generator=generator)}


def _points(size: int, generator: torch.Generator, padding: int) -> dict[str, torch.Tensor]:
    points = torch.rand(size, 1, 1, 2, generator=generator) * 64
    return {"pixel_values": torch.randn(size, 3, 64, 64, generator=generator), "input_points": points}


def _patch_tst() -> nn.Module:
    return tf.PatchTSTForPrediction(
        tf.PatchTSTConfig(
            num_input_channels=3,
            context_length=32,
            patch_length=4,
            patch_stride=4,
            d_model=16,
            num_hidden_layers=4,
            num_attention_heads=4,
            ffn_dim=32,
            prediction_length=8,
        )
    )


def _sam() -> nn.Module:
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    return tf.SamModel(
        tf.SamConfig(vision_config=SAM_VISION, prompt_encoder_config=prompt, mask_decoder_config=SAM_MASKS)
    )


def _layout_lm() -> nn.Module:
    config = tf.LayoutLMv3Config(
        **TEXT, input_size=32, patch_size=8, coordinate_size=5, shape_size=6, max_2d_position_embeddings=64
    )
    return tf.LayoutLMv3ForSequenceClassification(config)


def _vilt() -> nn.Module:
    return tf.ViltModel(tf.ViltConfig(**TEXT, image_size=32, patch_size=8, max_position_embeddings=64))


ODD: dict[str, Odd] = {
    "multiple_choice": Odd(
        lambda: tf.BertForMultipleChoice(tf.BertConfig(**TEXT)),
        lambda size, g, padding: texts(size, g, padding, 3),
        "bert.encoder.layer",
    ),
    "bart_classifier": Odd(
        lambda: tf.BartForSequenceClassification(tf.BartConfig(**{**SEQ2SEQ, **ENDED})),
        _with_labels,
        "model.decoder.layers",
    ),
    "t5_classifier": Odd(
        lambda: tf.T5ForSequenceClassification(tf.T5Config(**{**T5, "eos_token_id": 2})),
        _with_labels,
        "transformer.decoder.block",
    ),
    "xlnet": Odd(
        lambda: tf.XLNetForSequenceClassification(
            tf.XLNetConfig(
                d_model=32, n_layer=4, n_head=4, d_inner=48, vocab_size=VOCAB, pad_token_id=0, summary_type="mean"
            )
        ),
        texts,
        "transformer.layer",
        targets=("*.ff.*",),  # the others are tensors of three dimensions
    ),
    "layout_lm": Odd(_layout_lm, _documents, "layoutlmv3.encoder.layer"),
    "vilt": Odd(
        _vilt,
        lambda size, g, padding: {**texts(size, g, padding), "pixel_values": torch.randn(size, 3, 32, 32, generator=g)},
        "encoder.layer",
    ),
    "patch_tst": Odd(_patch_tst, _series, "model.encoder.layers", text=False),
    "sam": Odd(_sam, _points, "vision_encoder.layers", text=False),
}
