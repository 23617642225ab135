"""The published figures of the method's first experiments: parameters to the last digit, from the real architectures.

Blocks and parameters follow from the blocks removed, so they are checked on the meta device, where a ResNet-152 costs
nothing; one row of each family is repeated with weights.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import transformers as tf
from torch import nn

from deeparc_hf import find_stacks, remove_blocks

RESNET_BLOCKS = {50: (3, 4, 6, 3), 152: (3, 8, 36, 3)}
RESNET_TOTALS = {50: 25_557_032, 152: 60_192_808}
# depth, blocks removed by stage, blocks left, parameters left
RESNET_ROWS = {
    "152 K1 it1 T99": (152, (0, 2, 21, 1), 26, 31_709_224),
    "152 K1 it1 T98": (152, (0, 2, 25, 1), 22, 27_240_488),
    "152 K2 it1 T99": (152, (0, 2, 14, 1), 33, 39_529_512),
    "152 K2 it1 T98": (152, (0, 2, 15, 1), 32, 38_412_328),
    "152 K1 it2 T99": (152, (0, 3, 26, 1), 20, 25_843_240),
    "152 K1 it2 T98": (152, (0, 4, 31, 1), 14, 19_977_256),
    "152 K1 it2 T99 Part": (152, (0, 3, 29, 1), 17, 22_491_688),
    "152 K1 it2 T98 Part": (152, (0, 4, 28, 1), 17, 23_328_808),
    "152 K2 it2 T99": (152, (0, 3, 19, 1), 27, 33_663_528),
    "152 K2 it2 T98": (152, (0, 4, 22, 1), 23, 30_031_912),
    "152 K2 it2 T98 Part": (152, (0, 3, 24, 1), 22, 28_077_608),
    "50 it1 T98": (50, (0, 1, 1, 0), 14, 24_159_784),
    "50 it1 T95": (50, (1, 2, 3, 0), 10, 21_574_952),
    "50 it2 T98": (50, (0, 2, 1, 0), 13, 23_879_720),
    "50 it2 T95": (50, (2, 3, 3, 0), 8, 21_224_488),
    "50 it2 T98 Part": (50, (0, 2, 3, 0), 11, 21_645_352),
    "50 it2 T95 Part": (50, (1, 3, 3, 0), 9, 21_294_888),
}
# classes, layers left, parameters left
BERT_ROWS = [
    (6, 12, 109_486_854),
    (6, 10, 95_311_110),
    (6, 8, 81_135_366),
    (6, 6, 66_959_622),
    (10, 12, 109_489_930),
    (10, 9, 88_226_314),
]
# encoder blocks, decoder blocks, parameters left
T5_ROWS = [(12, 12, 222_903_552), (9, 5, 135_588_864), (8, 3, 109_630_464), (7, 3, 102_551_040)]


def hf_resnet(depth: int) -> nn.Module:
    return tf.ResNetForImageClassification(tf.ResNetConfig(depths=list(RESNET_BLOCKS[depth]), num_labels=1000))


def timm_resnet(depth: int) -> nn.Module:
    return timm.create_model(f"resnet{depth}")


def bert_base(labels: int) -> nn.Module:
    return tf.BertForSequenceClassification(tf.BertConfig(num_labels=labels))


def t5_base() -> nn.Module:
    model = tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0)
    )
    model.tie_weights()  # early versions 5 of transformers leave this out on the meta device
    return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def blocks(model: nn.Module) -> int:
    return sum(map(len, find_stacks(model).values()))


def on_meta(model: nn.Module) -> bool:
    return next(model.parameters()).is_meta


def remove_by_stage(model: nn.Module, removed: tuple[int, ...]) -> None:
    """Take that many blocks out of each stage; never the first, which changes the shape."""
    gone = {name: list(range(1, 1 + count)) for name, count in zip(find_stacks(model), removed, strict=True) if count}
    remove_blocks(model, gone, verify=not on_meta(model))


def keep_first(model: nn.Module, kept: dict[str, int]) -> None:
    removed = {name: list(range(kept[name], len(stack))) for name, stack in find_stacks(model).items()}
    if any(removed.values()):
        remove_blocks(model, removed, verify=not on_meta(model))


@pytest.mark.parametrize("make", [hf_resnet, timm_resnet])
@pytest.mark.parametrize("depth", RESNET_BLOCKS)
def test_resnet_totals_and_identity_blocks(depth, make):
    with torch.device("meta"):
        model = make(depth)
    stacks = list(find_stacks(model).values())
    assert tuple(map(len, stacks)) == RESNET_BLOCKS[depth]
    assert parameters(model) == RESNET_TOTALS[depth]
    assert [sum(p.numel() for p in stack.blocks[1].parameters()) for stack in stacks] == [
        70_400,
        280_064,
        1_117_184,
        4_462_592,
    ]


@pytest.mark.parametrize("make", [hf_resnet, timm_resnet])
@pytest.mark.parametrize("row", RESNET_ROWS)
def test_resnet_rows(row, make: Callable[[int], nn.Module]):
    depth, removed, left, expected = RESNET_ROWS[row]
    with torch.device("meta"):
        model = make(depth)
    remove_by_stage(model, removed)
    assert blocks(model) == left
    assert parameters(model) == expected


@pytest.mark.parametrize(("labels", "left", "expected"), BERT_ROWS)
def test_bert_rows(labels, left, expected):
    with torch.device("meta"):
        model = bert_base(labels)
    keep_first(model, {"bert.encoder.layer": left})
    assert blocks(model) == left
    assert parameters(model) == expected


@pytest.mark.parametrize(("encoders", "decoders", "expected"), T5_ROWS)
def test_t5_rows(encoders, decoders, expected):
    with torch.device("meta"):
        model = t5_base()
    keep_first(model, {"encoder.block": encoders, "decoder.block": decoders})
    assert blocks(model) == encoders + decoders
    assert parameters(model) == expected


def test_a_row_of_each_family_with_weights():
    resnet = hf_resnet(50).eval()
    depth, removed, left, expected = RESNET_ROWS["50 it1 T95"]
    assert depth == 50
    remove_by_stage(resnet, removed)
    assert (blocks(resnet), parameters(resnet)) == (left, expected)
    assert resnet(torch.randn(1, 3, 64, 64)).logits.shape == (1, 1000)


@pytest.mark.slow
def test_the_largest_rows_with_weights():
    ids = torch.arange(12)[None]
    bert = bert_base(10)
    keep_first(bert, {"bert.encoder.layer": 9})
    assert parameters(bert) == 88_226_314
    assert bert(input_ids=ids).logits.shape == (1, 10)
    t5 = t5_base()
    keep_first(t5, {"encoder.block": 8, "decoder.block": 3})
    assert parameters(t5) == 109_630_464
    assert t5(input_ids=ids, labels=ids).logits.shape == (1, 12, 32128)
    resnet = hf_resnet(152)
    remove_by_stage(resnet, RESNET_ROWS["152 K1 it2 T98"][1])
    assert parameters(resnet) == 19_977_256
    assert resnet(torch.randn(2, 3, 64, 64)).logits.shape == (2, 1000)
