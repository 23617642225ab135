"""What the dimensions of blocks' outputs mean is found out by trying: padding never counts, and batch sizes make no
difference.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as tf
from torch.nn import functional

from deeparc_hf import MPruneConfig, analyze, find_stacks, sparsify_model
from deeparc_hf.architectures import describe
from deeparc_hf.errors import CalibrationError, CalibrationWarning
from deeparc_hf.observe.axes import Axes, find_axes
from deeparc_hf.observe.batches import forward_kwargs
from tests.odd_models import ODD, Odd
from tests.zoo import CAUSAL, ZOO, Specimen, spread

PADDING = 30
SIZES = (9, 8, 8, 8)  # 33 samples
TEXTS = {
    name: item
    for name, item in [*ZOO.items(), *ODD.items()]
    if (item.text if isinstance(item, Odd) else item.kind not in ("image", "audio"))
}


def padded(batch: dict[str, torch.Tensor], more: int) -> dict[str, torch.Tensor]:
    return {
        key: functional.pad(value, (0, more)) if key in ("input_ids", "attention_mask") else value
        for key, value in batch.items()
    }


def samples(item: Specimen | Odd, padding: int = 0, sizes: Sequence[int] = SIZES) -> list[dict[str, Any]]:
    if isinstance(item, Odd):
        return item.batches(*sizes, padding=padding)
    (whole,) = item.batches(1, sum(sizes))
    whole = padded(whole, padding)
    parts = {key: value.split(list(sizes)) for key, value in whole.items()}
    return [{key: value[number] for key, value in parts.items()} for number in range(len(sizes))]


def similarities(
    model: torch.nn.Module, batches: list[dict[str, Any]], rows: str, similarity: str = "cosine"
) -> torch.Tensor:
    plan = analyze(model, batches, MPruneConfig(threshold=1.0, rows=rows, similarity=similarity))
    return torch.cat([torch.tensor(stack.similarity).flatten() for stack in plan.stacks.values()])


@pytest.mark.parametrize("name", TEXTS)
def test_more_padding_changes_neither_similarities_nor_zeros(name):
    item = TEXTS[name]
    model = item.model()
    plain, more = samples(item), samples(item, PADDING)
    for rows in ("tokens", "mean", "first"):
        torch.testing.assert_close(similarities(model, more, rows), similarities(model, plain, rows), atol=1e-4, rtol=0)
    zeros = []
    for batches in (plain, more):
        sparse = copy.deepcopy(model)
        sparsify_model(sparse, batches, sparsity=0.5, targets=getattr(item, "targets", None))
        zeros.append([parameter == 0 for parameter in sparse.parameters()])
    elsewhere = sum(int((a != b).sum()) for a, b in zip(*zeros, strict=True))
    # the same sums in another order: of two scores that are equal to the last bits either may be the lower one
    assert elsewhere <= 4, f"{elsewhere} zeros are elsewhere"


@pytest.mark.parametrize("name", [*ZOO, *ODD])
def test_rows_do_not_depend_on_the_batch_size(name):
    item = ZOO.get(name) or ODD[name]
    model = item.model()
    for rows in ("mean", "first"):
        found = [similarities(model, samples(item, sizes=sizes), rows) for sizes in (SIZES, (5, 7, 2, 19))]
        torch.testing.assert_close(*found, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "stack", "shape"), [("patch_tst", "model.encoder.layers", 16), ("sam", "vision_encoder.layers", 32)]
)
def test_features_may_be_last_in_four_dimensions(name, stack, shape):
    """By hand: the mean cosine along the dimension that is as large as the model is wide."""
    item = ODD[name]
    model, (batch,) = item.model(), item.batches(33)
    outputs: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda module, args, output: outputs.append(output if torch.is_tensor(output) else output[0])
        )
        for block in find_stacks(model)[stack].blocks
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    assert outputs[0].shape[-1] == shape
    expected = float(torch.cosine_similarity(outputs[0], outputs[-1], dim=-1).mean())
    assert analyze(model, [batch], keep_ratio=0.9, similarity="cosine").stacks[stack].similarity[0][
        -1
    ] == pytest.approx(expected, abs=1e-5)


def axes_of(item: Specimen | Odd, stack: str | None = None, batch: dict[str, Any] | None = None) -> Axes:
    model = item.model()
    subject = describe(model)
    host, stacks = subject.host, subject.stacks
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = find_axes(host, stacks.values(), forward_kwargs(host, batch or samples(item)[0]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks
        for block in stacks.values()
        for module in block.container.modules()
    )
    axes = found[stack or next(iter(stacks))]
    assert isinstance(axes, Axes)
    return axes


def test_samples_may_be_the_second_dimension():
    assert axes_of(ODD["xlnet"], "transformer.layer").samples == 1


@pytest.mark.parametrize("axes", [Axes(2, 0), Axes(1, 0), Axes(3, 0), Axes(2, 1), Axes(0, 2), Axes(1, None)], ids=repr)
def test_some_rows_are_those_of_all_rows(axes):
    hidden = torch.arange(4 * 5 * 6 * 3).reshape(4, 5, 6, 3).float()
    rows = axes.rows(hidden)
    assert axes.extent(hidden.shape) == rows.shape[:2]
    some = torch.tensor([7, 2, 2, 11])
    assert torch.equal(axes.rows_at(hidden, some), rows.flatten(0, 1)[some])


def test_a_text_may_stand_beside_patches_which_count():
    axes = axes_of(ODD["layout_lm"])
    (batch,) = ODD["layout_lm"].batches(9)
    padding = axes.padding(batch, (9, 10 + 17, 32))
    assert padding.mask is not None and bool(padding.mask[:, 10:].all())
    assert torch.equal(padding.mask[:, :10], batch["attention_mask"].bool())


def test_a_convolutions_features_are_found_where_all_dimensions_are_equally_large():
    """(B, C, H, W) of 8 x 8 x 8: no size tells which is which."""
    config = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[3], layer_type="basic", downsample_in_first_stage=False
    )
    model = tf.ResNetModel(config).eval()
    subject = describe(model)
    host, stacks = subject.host, subject.stacks
    found = find_axes(host, stacks.values(), {"pixel_values": torch.randn(4, 3, 32, 32)})
    (axes,) = found.values()
    assert isinstance(axes, Axes) and (axes.features, axes.samples) == (1, 0)


def test_one_sample_is_enough_to_find_out():
    assert axes_of(ODD["xlnet"], batch=ODD["xlnet"].batches(1)[0]).samples == 1


def test_left_padding_is_found():
    item = ZOO["llama"]
    (batch,) = item.batches(1, 8)
    flipped = {key: value.flip(1) for key, value in batch.items()}
    axes = axes_of(item, batch=flipped)
    padding = axes.padding(flipped, (8, 10, 32))
    assert padding.mask is not None and torch.equal(padding.mask, flipped["attention_mask"].bool())


def packed(size: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 90, (size, 20), generator=torch.Generator().manual_seed(size))
    ids[:, 2], ids[:, 3:7], ids[:, 7] = 102, 100, 103
    patches, grids = (
        torch.randn(size * 16, 96, generator=torch.Generator().manual_seed(size)),
        torch.tensor([[1, 4, 4]] * size),
    )
    kinds = (ids == 100).long()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
        "pixel_values": patches,
        "image_grid_thw": grids,
    }


def qwen2_vl() -> torch.nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 4, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2}
    tokens = {"image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102, "vision_end_token_id": 103}
    config = tf.Qwen2VLConfig(text_config={**CAUSAL, "rope_parameters": rope}, vision_config=vision, **tokens)
    torch.manual_seed(0)
    return spread(tf.Qwen2VLForConditionalGeneration(config)).eval()


def test_where_patches_of_all_images_are_packed_the_language_blocks_are_compared():
    model, data = qwen2_vl(), [packed(8) for _ in range(5)]
    assert analyze(model, data, keep_ratio=0.5).stacks["model.visual.blocks"].removed  # each patch is a row
    plan = analyze(model, data, num_blocks={"model.language_model.layers": 3}, rows="mean")
    assert len(plan.stacks["model.language_model.layers"].removed) == 1
    pinned = plan.stacks["model.visual.blocks"].pinned
    assert len(pinned) == 4 and all("not compared" in why for why in pinned.values())
    with pytest.warns(
        CalibrationWarning, match=r"model\.visual\.blocks cannot be compared, so all of them stay: the positions of all"
    ):
        analyze(model, data, keep_ratio=0.9, rows="mean")
    # without a warning: nothing of it was to go
    analyze(model, data, keep_ratio=0.9, rows="mean", protect="model.visual.*")


def test_a_batch_that_cannot_be_cut_is_taken_whole_or_left_out():
    model = qwen2_vl()
    data = [packed(8) for _ in range(6)]
    target = {"model.language_model.layers": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # few samples
        assert analyze(model, data, num_blocks=target, calibration_samples=20).samples == 16
        assert analyze(model, data, num_blocks=target, calibration_samples=5).samples == 8


def test_blocks_that_change_the_shape_are_not_compared():
    sizes = {"width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320}
    model = tf.EfficientNetForImageClassification(tf.EfficientNetConfig(image_size=64, **sizes)).eval()
    with pytest.raises(CalibrationError, match=r"cannot be compared: (its blocks change the shape|they put out)"):
        analyze(model, [{"pixel_values": torch.randn(8, 3, 64, 64)} for _ in range(4)], keep_ratio=0.5)


@pytest.mark.parametrize("length", [300, 512])
def test_torchs_default_dtype_makes_no_difference(length):
    model = ZOO["llama"].model().bfloat16()
    ids = torch.randint(5, 120, (33, length), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(11)]
    expected = similarities(model, data, "tokens", "cka")
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = similarities(model, data, "tokens", "cka")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.float(), expected.to(torch.bfloat16).float()) or torch.allclose(
        found.float(), expected, atol=1e-2
    )


# ---- found by reading ----


def llava() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**sizes, "model_type": "llama", "vocab_size": 120, "num_key_value_heads": 4, "pad_token_id": 0}
    vision = {**sizes, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=119)
    return spread(tf.LlavaForConditionalGeneration(config)).eval()


def seen(size: int, padding: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(5, 110, (size, 6), generator=generator)
    ids = functional.pad(torch.cat([torch.full((size, 16), 119), words], dim=1), (0, padding))
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "pixel_values": torch.randn(size, 3, 32, 32, generator=generator),
    }


def test_a_model_that_collects_hidden_states_while_it_runs_is_compared():
    """LLaVA takes its image features from hidden states that are collected by hooks: no block may be run again within
    the pass.
    """
    plans = [analyze(llava(), [seen(33, padding)], keep_ratio=0.8, similarity="cosine") for padding in (0, 20)]
    for name, stack in plans[0].stacks.items():
        other = plans[1].stacks[name].similarity
        torch.testing.assert_close(torch.tensor(stack.similarity), torch.tensor(other), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "roberta"])
def test_a_text_of_full_length_is_not_made_longer(name):
    """A position that a model does not have is an error that a GPU does not recover from."""
    limit = {"gpt2": {"n_positions": 16}, "roberta": {"max_position_embeddings": 18}}[name]
    specimen = ZOO[name]
    config = type(specimen.model().config).from_dict({**specimen.model().config.to_dict(), **limit})
    model = spread(type(specimen.model())(config)).eval()
    longest: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: longest.append(args[0].shape[1]))
    subject = describe(model)
    host, stacks = subject.host, subject.stacks
    ids = torch.randint(5, 110, (4, 16))
    (axes,) = find_axes(host, stacks.values(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).values()
    assert isinstance(axes, Axes) and axes.mask == "encoder" and max(longest) == 16


def test_labels_of_several_classes_are_no_positions():
    item = ODD["bart_classifier"]
    (batch,) = item.batches(9)
    several = {**batch, "labels": torch.zeros(9, 3)}
    axes = axes_of(item, "model.decoder.layers", several)
    padding = axes.padding(several, (9, 10, 32))
    assert padding.mask is not None and torch.equal(padding.mask, batch["attention_mask"].bool())


def test_a_mask_that_comes_later_counts():
    specimen = ZOO["bert"]
    model, (batch,) = specimen.model(), specimen.batches(1, 40)
    whole = {"input_ids": torch.randint(5, 110, (8, 10), generator=torch.Generator().manual_seed(3))}
    first = similarities(model, [whole, batch], "tokens")
    torch.testing.assert_close(first, similarities(model, [batch, whole], "tokens"), atol=1e-6, rtol=0)


def test_padding_of_sound_and_of_images_is_told():
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "conv_dim": (16, 16),
    }
    convolutions = {
        "conv_kernel": (10, 3),
        "conv_stride": (5, 2),
        "num_feat_extract_layers": 2,
        "feat_extract_norm": "layer",
    }
    model = spread(tf.Wav2Vec2Model(tf.Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embeddings=4))).eval()
    sound = {"input_values": torch.randn(33, 400), "attention_mask": torch.ones(33, 400, dtype=torch.long)}
    sound["attention_mask"][:, 300:] = 0
    with pytest.warns(CalibrationWarning, match="Which positions of encoder.layers are padding cannot be told"):
        analyze(model, [sound], keep_ratio=0.9)
    axes = axes_of(ZOO["vit"])
    masks = torch.ones(3, 32, 32, dtype=torch.long)
    assert not axes.padding({"pixel_mask": masks}, (3, 17, 32)).unknown
    masks[0, 20:] = 0
    assert axes.padding({"pixel_mask": masks}, (3, 17, 32)).unknown


def test_a_batch_of_plain_lists_is_told_to_be_no_tensors():
    with pytest.raises(CalibrationError, match=r"found \{input_ids: list.*collate them into tensors"):
        analyze(ZOO["bert"].model(), [{"input_ids": [[5, 6, 7]] * 40, "attention_mask": [[1, 1, 1]] * 40}])
