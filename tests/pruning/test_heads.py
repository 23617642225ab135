"""Detectors with heads for each decoder layer: they go with their layers, and what is left is what the whole model says
without these.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import ExitStack

import pytest
import torch
import transformers as tf
from torch import nn

from deeparc_hf import MPruneCallback, find_stacks, load_pruned, prune_checkpoint, remove_blocks, save_pruned
from deeparc_hf.errors import DeepArcError, SurgeryError, UnsupportedModelError
from deeparc_hf.observe.hooks import skipped
from tests.stock import StockProcess
from tests.zoo import as_trained, spread

LAYERS = "model.decoder.layers"
BACKBONE = {
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
SMALL = {
    "d_model": 32,
    "num_labels": 3,
    "decoder_layers": 5,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "num_queries": 6,
}


def rt_detr(cls="RTDetrForObjectDetection", **settings):
    config = tf.RTDetrConfig(
        **SMALL,
        backbone_config=tf.RTDetrResNetConfig(**BACKBONE),
        encoder_hidden_dim=32,
        encoder_in_channels=[8, 16, 16],
        decoder_in_channels=[32, 32, 32],
        feat_strides=[8, 16, 32],
        num_denoising=0,
        **settings,
    )
    torch.manual_seed(0)
    return as_trained(spread(getattr(tf, cls)(config))).eval()


def deformable(**settings):
    config = tf.DeformableDetrConfig(
        **SMALL,
        backbone_config=tf.ResNetConfig(**BACKBONE),
        use_timm_backbone=False,
        backbone=None,
        encoder_layers=2,
        num_feature_levels=3,
        **settings,
    )
    torch.manual_seed(0)
    return as_trained(spread(tf.DeformableDetrForObjectDetection(config))).eval()


def images(seed=1):
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def said(model):
    """What a detector says: classes and boxes."""
    with torch.no_grad():
        out = model(pixel_values=images())
    return out.logits, out.pred_boxes


def by_hand(model, kept):
    """RT-DETR's decoder, layer by layer, over some of its layers."""
    decoder, given = model.model.decoder, {}
    with torch.no_grad():
        handle = decoder.register_forward_pre_hook(lambda *call: given.update(call[-1]), with_kwargs=True)
        model(pixel_values=images())
        handle.remove()
        hidden, boxes = given.pop("inputs_embeds"), given.pop("reference_points").sigmoid()
        for index in kept:
            positions = decoder.query_pos_head(boxes)
            hidden = decoder.layers[index](
                hidden,
                object_queries_position_embeddings=positions,
                reference_points=boxes.unsqueeze(2),
                encoder_attention_mask=None,
                **{key: given[key] for key in given if key.startswith(("encoder_hidden", "spatial", "level"))},
            )
            boxes = (decoder.bbox_embed[index](hidden) + boxes.clamp(1e-5, 1 - 1e-5).logit()).sigmoid()
        return decoder.class_embed[kept[-1]](hidden), boxes


def same(one, other):
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("gone", [[0, 3], [1, 4]])
def test_what_is_left_is_the_decoder_without_these_layers(gone, tmp_path):
    model = rt_detr()
    kept = [index for index in range(5) if index not in gone]
    expected, whole = by_hand(model, kept), copy.deepcopy(model)
    assert not same(expected, said(model))
    record = remove_blocks(model, {LAYERS: gone}, stock_only=True)
    assert model.config.decoder_layers == len(kept) and same(said(model), expected)
    for name in ("class_embed", "bbox_embed"):
        left, before = (getattr(each.model.decoder, name) for each in (model, whole))
        for place, index in enumerate(kept):
            pairs = zip(left[place].parameters(), before[index].parameters(), strict=True)
            assert len(left) == len(kept) and all(torch.equal(a, b) for a, b in pairs)
    lost = sum(p.numel() for i in gone for p in whole.model.decoder.layers[i].parameters())
    lost += sum(p.numel() for i in gone for p in whole.model.decoder.class_embed[i].parameters())
    lost += sum(p.numel() for i in gone for p in whole.model.decoder.bbox_embed[i].parameters())
    counted = record.iterations[-1]["parameters"]
    assert counted["before"] - counted["after"] == lost == whole.num_parameters() - model.num_parameters()
    save_pruned(model, tmp_path)
    with StockProcess() as stock:
        loaded = stock.load(tmp_path, "AutoModelForObjectDetection", {"pixel_values": images()})
    assert loaded.clean and torch.equal(loaded.outputs["output"], said(model)[0])


def test_without_its_last_layers_a_detector_says_what_it_said_before_them():
    """The choice of a number of decoder layers after training, as in section 4.3 of RT-DETR's paper."""
    model = rt_detr()
    with torch.no_grad():
        whole = model(pixel_values=images())
    earlier = whole.intermediate_logits[:, 2], whole.intermediate_reference_points[:, 2]
    remove_blocks(model, {LAYERS: [3, 4]}, stock_only=True)
    assert same(said(model), earlier)


def test_from_file_to_file_and_from_a_record(tmp_path):
    rt_detr().save_pretrained(tmp_path / "base")
    model = rt_detr()
    record = remove_blocks(model, {LAYERS: [1, 3]})
    prune_checkpoint(tmp_path / "base", tmp_path / "out", {LAYERS: [1, 3]})
    for loaded in (
        load_pruned(tf.AutoModelForObjectDetection, tmp_path / "base", record),
        tf.AutoModelForObjectDetection.from_pretrained(tmp_path / "out"),
    ):
        assert all(map(torch.equal, said(loaded.eval()), said(model)))


def test_an_optimizer_lets_go_of_the_heads():
    model = rt_detr()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    remove_blocks(model, {LAYERS: [1]}, optimizer=optimizer)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert known == {id(p) for p in model.parameters()}


def test_a_training_with_boxes_for_labels_prunes_and_resumes(tmp_path):
    """With labels a detector puts out losses of each layer, which are as many as there are layers."""
    shown = torch.Generator().manual_seed(0)
    rows = [
        {
            "pixel_values": torch.randn(3, 64, 64, generator=shown),
            "labels": {"class_labels": torch.tensor([i % 3]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.1 + i / 20]])},
        }
        for i in range(8)
    ]

    def together(rows):
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": [row["labels"] for row in rows],
        }

    def run(**resume):
        model = rt_detr(auxiliary_loss=True)
        arguments = tf.TrainingArguments(
            tmp_path,
            num_train_epochs=2,
            per_device_train_batch_size=4,
            save_strategy="epoch",
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        callback = MPruneCallback(
            num_blocks={LAYERS: 3}, start_epoch=1, retrain_epochs=1, calibration_samples=8, freeze="partial"
        )
        trainer = tf.Trainer(model, arguments, train_dataset=rows, data_collator=together, callbacks=[callback])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Blocks were compared on only")
            trainer.train(**resume)
        assert model.config.decoder_layers == len(model.model.decoder.bbox_embed) == 3
        return model

    whole = run()
    loaded = tf.AutoModelForObjectDetection.from_pretrained(tmp_path / "checkpoint-4").eval()
    assert all(map(torch.equal, said(loaded), said(whole.eval())))
    again = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())


def test_heads_are_back_after_a_look_and_after_a_refusal(monkeypatch):
    model = rt_detr()
    before = [list(heads.container) for heads in find_stacks(model)[LAYERS].heads]
    stack = find_stacks(model)[LAYERS]
    for gone in ([2, 1], [1, 2], [4, 3], [3, 4, 0]):  # in any order
        with ExitStack() as skips:
            for index in gone:
                skips.enter_context(skipped(stack, index))
            without = said(model)
        assert same(without, by_hand(model, [index for index in range(5) if index not in gone]))
    with pytest.raises(KeyboardInterrupt), skipped(stack, 2):
        raise KeyboardInterrupt

    def fails(*args):
        raise SurgeryError("no")

    monkeypatch.setattr("deeparc_hf.pruning.verify.Expectation.check", fails)
    with pytest.raises(SurgeryError, match="no"):
        remove_blocks(model, {LAYERS: [2]})
    after = [list(heads.container) for heads in find_stacks(model)[LAYERS].heads]
    assert after == before and all(len(heads) == 5 for heads in after)


def test_one_head_more_proposes_the_first_boxes_and_stays():
    """Two-stage Deformable DETR has one for what its encoder sees."""
    model = deformable(two_stage=True, with_box_refine=True, two_stage_num_proposals=6)
    (stack,) = [stack for name, stack in find_stacks(model).items() if name == LAYERS]
    assert {heads.path: (len(heads.container), heads.adds) for heads in stack.heads} == {
        "class_embed": (6, False),
        "bbox_embed": (6, True),
        "model.decoder.class_embed": (6, False),
        "model.decoder.bbox_embed": (6, True),
    }
    last = model.model.decoder.class_embed[5]
    remove_blocks(model, {LAYERS: [1, 4]}, stock_only=True)
    assert len(model.class_embed) == len(model.model.decoder.bbox_embed) == 4
    assert model.model.decoder.class_embed[3] is last and model.config.decoder_layers == 3


def test_boxes_that_each_head_tells_by_itself_are_those_of_the_layer_before():
    """Deformable DETR without refinement: nothing is added up."""
    model = deformable()
    assert not any(heads.adds for heads in find_stacks(model)[LAYERS].heads)
    with torch.no_grad():
        hidden, reference = [], []
        handles = [
            layer.register_forward_hook(lambda _, __, out: hidden.append(out[0] if isinstance(out, tuple) else out))
            for layer in model.model.decoder.layers
        ]
        reference = model(pixel_values=images()).init_reference_points
        for handle in handles:
            handle.remove()
        boxes = model.bbox_embed[3](hidden[3])
        boxes[..., :2] += reference[..., :2].clamp(1e-5, 1 - 1e-5).logit()
        expected = model.class_embed[3](hidden[3]), boxes.sigmoid()
    remove_blocks(model, {LAYERS: [4]}, stock_only=True)
    assert same(said(model), expected)


def test_a_model_without_heads_is_counted_as_any_other():
    model = rt_detr("RTDetrModel")
    stack = find_stacks(model)["decoder.layers"]
    assert not stack.heads and not stack.entries  # encode_proj_layers is the encoder's
    remove_blocks(model, {"decoder.layers": [2]}, stock_only=True)
    assert model.config.decoder_layers == 4


def test_adapters_stay_on_the_layers_that_are_left():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=r".*decoder\.(layers|bbox_embed)\..*(fc1|layers\.0)", init_lora_weights=False
    )
    model = peft.get_peft_model(rt_detr(), config).eval()
    whole = copy.deepcopy(model)
    remove_blocks(model, {LAYERS: [1, 2]}, stock_only=True)
    assert same(said(model), by_hand(whole.base_model.model, [0, 3, 4]))
    copied = peft.get_peft_model(rt_detr(), peft.LoraConfig(target_modules=["fc1"], modules_to_save=["class_embed.1"]))
    with pytest.raises(UnsupportedModelError, match="or of their heads"):
        remove_blocks(copied, {LAYERS: [1]})


def test_what_else_is_called_intermediate_is_compared():
    """SAM-HQ's mask decoder is given the outputs of some layers, which are not those of each layer."""
    from tests.census import tiny
    from tests.census.inputs import inputs_for

    model = tiny.build("sam_hq_vision_model")
    inputs = inputs_for(model, lambda given: [])
    with pytest.raises(SurgeryError, match="puts out something else"):
        remove_blocks(model, {"vision_encoder.layers": [2]}, example=dict(inputs))


def test_a_list_of_another_length_is_no_list_of_heads():
    """Its entries would be taken for those of other layers."""
    model = rt_detr()
    model.model.decoder.class_embed = nn.ModuleList(list(model.model.decoder.class_embed)[:3])
    with pytest.raises(DeepArcError):
        remove_blocks(model, {LAYERS: [1]}, stock_only=True)


def test_one_head_for_all_layers_is_shared_by_those_that_are_left():
    """DEIMv2 may have one head for boxes, which its list holds once for each layer."""
    from tests.census import tiny
    from tests.census.inputs import inputs_for, run

    config = tiny.build("deimv2").config
    config.share_bbox_head = True
    model = as_trained(spread(tf.Deimv2ForObjectDetection(config))).eval()
    boxes = model.model.decoder.bbox_embed
    assert len(boxes) == 4 and len({id(head) for head in boxes}) == 1
    heads = {h.path: h for h in find_stacks(model)[LAYERS].heads}
    assert {h.adds for path, h in heads.items() if path.endswith("bbox_embed")} == {True}
    inputs = inputs_for(model, lambda given: [])
    with skipped(find_stacks(model)[LAYERS], 2):
        expected = run(model, inputs)
    remove_blocks(model, {LAYERS: [2]}, stock_only=True, example=dict(inputs))
    found = run(model, inputs)
    assert torch.allclose(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert len(model.model.decoder.bbox_embed) == len(model.model.decoder.lqe_layers) == 3
    with pytest.raises(SurgeryError, match="the boxes that the others correct"):
        remove_blocks(model, {LAYERS: [0]})
