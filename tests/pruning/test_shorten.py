"""Tensors outside of the blocks that have a part for each of them: what a removal takes out, and when it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

from deeparc_hf import PrunedConfig, find_stacks, load_pruned, prune_checkpoint, remove_blocks, save_pruned
from deeparc_hf.architectures.per_block import AddedBetween, PerBlockTensor, find_per_block
from deeparc_hf.errors import RecordError, SurgeryError, UnsupportedModelError
from tests.stock import StockProcess
from tests.trainers import pruning, text_data, train
from tests.zoo import TEXT, VOCAB, as_trained, spread

LAYERS, STACK = "model.layers", "esm.encoder.layer"
PARTS = "model.embed_tokens_per_layer.weight"
SIZE = 8  # of a layer's part


def gemma(**settings):
    """Gemma 3n: each layer is given embeddings of its own, which lie side by side in one table."""
    config = tf.Gemma3nTextConfig(
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=VOCAB,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=SIZE,
        laurel_rank=8,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 5,
        activation_sparsity_pattern=[0.5, 0.0, 0.5, 0.0, 0.0],
        **settings,
    )
    torch.manual_seed(0)
    return as_trained(spread(tf.Gemma3nForCausalLM(config))).eval()


def esm():
    config = tf.EsmConfig(**TEXT, pad_token_id=0, mask_token_id=1, position_embedding_type="rotary", num_labels=2)
    torch.manual_seed(0)
    return as_trained(spread(tf.EsmForSequenceClassification(config))).eval()


def ids(seed=0):
    return torch.randint(5, VOCAB, (2, 10), generator=torch.Generator().manual_seed(seed))


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids()).logits


def skipping(model, index):
    """The model with one layer that hands on what it is given (four streams, of which Gemma 3n makes one text)."""
    layer = model.get_submodule(f"{LAYERS}.{index}")
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    return model


def test_the_parts_of_a_removed_layer_go_with_it(tmp_path):
    model = gemma()
    expected = logits(skipping(copy.deepcopy(model), 2))
    table, total = model.get_parameter(PARTS).detach().clone(), model.num_parameters()
    record = remove_blocks(model, {LAYERS: [2]}, stock_only=True)
    assert torch.allclose(logits(model), expected, rtol=1e-5, atol=1e-5)
    left = torch.cat([table[:, : 2 * SIZE], table[:, 3 * SIZE :]], dim=1)
    assert torch.equal(model.get_parameter(PARTS), left)
    assert model.model.embed_tokens_per_layer.embedding_dim == 4 * SIZE
    assert model.config.activation_sparsity_pattern == [0.5, 0.0, 0.0, 0.0]
    assert record.iterations[-1]["parameters"] == {"before": total, "after": model.num_parameters()}
    save_pruned(model, tmp_path)
    with StockProcess() as stock:
        loaded = stock.load(tmp_path, "AutoModelForCausalLM", {"input_ids": ids()}, generate=True)
    assert loaded.clean and torch.allclose(loaded.outputs["output"], logits(model), rtol=1e-6, atol=1e-6)
    assert torch.equal(loaded.outputs["cached"], loaded.outputs["uncached"])


def test_two_removals_are_as_one():
    one, other = gemma(), gemma()
    remove_blocks(one, {LAYERS: [1]})
    remove_blocks(one, {LAYERS: [2]})
    remove_blocks(other, {LAYERS: [1, 3]})
    assert torch.equal(one.get_parameter(PARTS), other.get_parameter(PARTS))
    assert torch.equal(logits(one), logits(other))


def test_an_optimizer_goes_on_with_the_shorter_tensor():
    model = gemma()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=ids(), labels=ids()).loss.backward()
    optimizer.step()
    table, before = model.get_parameter(PARTS), model.get_parameter(PARTS).detach().clone()
    remove_blocks(model, {LAYERS: [2]}, optimizer=optimizer)
    assert model.get_parameter(PARTS) is table and table.grad is None and table not in optimizer.state
    model(input_ids=ids(), labels=ids()).loss.backward()
    optimizer.step()
    assert optimizer.state[table]["exp_avg"].shape == table.shape == (VOCAB, 4 * SIZE)
    assert not torch.equal(table, torch.cat([before[:, : 2 * SIZE], before[:, 3 * SIZE :]], dim=1))


def test_parts_that_show_in_no_output_are_not_guessed():
    """Which part is which layer's is read from nothing but what the model computes."""
    model = gemma()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.per_layer_projection.weight.zero_()  # nothing of the parts gets any further
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(SurgeryError, match="has a part for each block, and no output of the example shows"):
        remove_blocks(model, {LAYERS: [2]})
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.config.num_hidden_layers == 5 and not hasattr(model.config, "pruning_config")
    remove_blocks(model, {LAYERS: [2]}, verify=False)  # answered for
    assert model.get_parameter(PARTS).shape == (VOCAB, 4 * SIZE)


def test_a_recipe_loads_the_base_with_the_same_parts(tmp_path):
    base = gemma()
    base.save_pretrained(tmp_path)
    record = remove_blocks(base, {LAYERS: [0, 3]})
    loaded = load_pruned(tf.AutoModelForCausalLM, tmp_path, record)
    assert torch.equal(logits(loaded), logits(base))
    # one that somebody has written: no forward pass has shown which part is which layer's
    written = PrunedConfig(record.stacks)
    with pytest.raises(RecordError, match="the record does not say that it was cut"):
        load_pruned(tf.AutoModelForCausalLM, tmp_path, written)


def test_files_are_not_copied_where_a_tensor_would_have_to_change(tmp_path):
    gemma().save_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedModelError, match="Load the model and call remove_blocks"):
        prune_checkpoint(tmp_path / "base", tmp_path / "out", {LAYERS: [2]})
    assert not (tmp_path / "out").exists()


def test_offloaded_weights_are_not_taken_apart(tmp_path):
    from accelerate import disk_offload

    model = gemma()
    disk_offload(model, str(tmp_path), offload_buffers=False)
    with pytest.raises(SurgeryError, match="offloaded or sharded"):
        remove_blocks(model, {LAYERS: [2]})
    assert len(find_stacks(model)[LAYERS]) == 5


def test_the_contact_head_of_esm_weighs_the_layers_that_are_left():
    """No output of its forward pass shows it; its family answers for it."""
    model = esm()
    (tensor,) = find_stacks(model)[STACK].per_block
    assert tensor == PerBlockTensor("esm.contact_head.regression.weight", 1, known=True)
    text, mask = ids(), torch.ones_like(ids())
    remove_blocks(model, {STACK: [1]}, stock_only=True)
    weight = model.esm.contact_head.regression.weight.detach()
    whole = esm().esm.contact_head.regression.weight.detach().view(4, 4)  # layers, heads
    assert torch.equal(weight.view(3, 4), whole[[0, 2, 3]])
    model.set_attn_implementation("eager")
    contacts = model.esm.predict_contacts(text, mask)
    assert contacts.isfinite().all()
    # by hand: a regression over the attention maps of the layers that are left, made symmetric and corrected
    with torch.no_grad():
        maps = torch.cat(model(input_ids=text, attention_mask=mask, output_attentions=True).attentions, dim=1)
    eos = text.ne(model.esm.contact_head.eos_idx).to(maps)
    maps = (maps * (eos[:, None, :] * eos[:, :, None])[:, None])[..., 1:-1, 1:-1]
    maps = maps + maps.transpose(-1, -2)
    rows, columns = maps.sum(-1, keepdim=True), maps.sum(-2, keepdim=True)
    maps = maps - rows * columns / maps.sum((-1, -2), keepdim=True)
    by_hand = (maps * weight.view(1, -1, 1, 1)).sum(1) + model.esm.contact_head.regression.bias
    assert torch.allclose(contacts, by_hand.sigmoid(), atol=1e-5)


def yolos():
    """YOLOS with trained position embeddings between its layers (fresh ones are zeros)."""
    config = tf.YolosConfig(
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=[32, 48],
        patch_size=8,
        num_detection_tokens=5,
        num_labels=3,
    )
    torch.manual_seed(0)
    return as_trained(spread(tf.YolosForObjectDetection(config))).eval()


def test_what_is_added_between_layers_is_added_at_once(tmp_path):
    """At an image size of its own and at another, to which the embeddings are interpolated."""
    model, stack = yolos(), "vit.encoder.layer"
    path = "vit.encoder.interpolation.mid_position_embeddings"
    whole = model.get_parameter(path).detach().clone()
    images = [torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)) for size in ((32, 48), (64, 40))]
    skipping = copy.deepcopy(model)
    for index in (1, 2, 4):
        skipping.get_submodule(f"{stack}.{index}").forward = lambda hidden_states, *args, **kwargs: hidden_states
    record = remove_blocks(model, {stack: [1, 2, 4]}, stock_only=True)
    assert torch.equal(model.get_parameter(path), torch.stack([whole[:3].sum(0), whole[3] + whole[4]]))
    save_pruned(model, tmp_path / "pruned")
    yolos().save_pretrained(tmp_path / "base")
    by_record = load_pruned(tf.AutoModelForObjectDetection, tmp_path / "base", record)
    with StockProcess() as stock, torch.no_grad():
        for image in images:
            expected, found = skipping(pixel_values=image).logits, model(pixel_values=image).logits
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(by_record(pixel_values=image).logits, found)
            loaded = stock.load(tmp_path / "pruned", "AutoModelForObjectDetection", {"pixel_values": image})
            assert loaded.clean and torch.allclose(loaded.outputs["output"], found, rtol=1e-6, atol=1e-6)


def test_the_layers_around_what_is_added_between_them_stay():
    model = yolos()
    stack = find_stacks(model)["vit.encoder.layer"]
    assert list(stack.pinned) == [0, 5] and not stack.can_drop  # the parts would be added behind other layers
    with pytest.raises(SurgeryError, match="position embeddings are added after it"):
        remove_blocks(model, {"vit.encoder.layer": [0]})
    model.config.use_mid_position_embeddings = False
    without = tf.YolosForObjectDetection(model.config)
    assert not find_stacks(without)["vit.encoder.layer"].pinned
    remove_blocks(without, {"vit.encoder.layer": [0, 5]}, stock_only=True)


def test_a_training_prunes_takes_back_and_resumes(tmp_path):
    """Two prunings, the second of which is taken back; resumed from each checkpoint it ends the same, to the bit."""

    def run(folder, **settings):
        model = esm()
        accuracy = {4: 0.9, 3: 0.88, 2: 0.1}
        callback = pruning(
            iterations=2,
            num_blocks=[3, 2],
            start_epoch=1,
            max_drop=0.1,
            metric="accuracy",
            k_max=1,
            keep_snapshots=True,
        )
        train(
            model,
            folder,
            callback,
            data=text_data(),
            eval_strategy="epoch",
            save_strategy="epoch",
            num_train_epochs=3,
            compute_metrics=lambda _: {"accuracy": accuracy[len(model.esm.encoder.layer)]},
            **settings,
        )
        return model, callback

    model, callback = run(tmp_path)
    assert [a.get("decision") for a in callback.attempts[1:]] == ["accepted", "rolled back"]
    weight = model.esm.contact_head.regression.weight
    assert weight.shape == (1, 3 * 4) and model.esm.contact_head.regression.in_features == 12
    for step in (8, 16, 24):
        again, _ = run(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"))
        ours, theirs = model.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ((7, 12), (7, 9), [1]),  # three of four parts
        ((12, 7), (9, 7), [0]),
        ((12, 12), (9, 9), []),  # two dimensions at once
        ((7, 13), (7, 10), []),  # no four equal parts
        ((7, 12), (7, 8), []),  # not shorter by a part
        ((7, 12), (7, 12), []),
        ((7, 12), (9,), []),
    ],
)
def test_what_is_shorter_by_a_part_for_each_block_is_found(before, after, found):
    shapes = {"other": (4, 4)}
    tensors = find_per_block({**shapes, "table": before}, {**shapes, "table": after}, 4, 3)
    assert [tensor.dim for tensor in tensors] == found


def test_parts_lie_in_the_order_of_the_blocks():
    tensor = torch.arange(24.0).view(2, 12)
    left = PerBlockTensor("table", 1).left(tensor, 4, [0, 3])
    assert left.tolist() == [[0, 1, 2, 9, 10, 11], [12, 13, 14, 21, 22, 23]]


def test_parts_between_blocks_are_summed_in_one_step_as_in_two():
    tensor, between = torch.arange(10.0).view(2, 5), AddedBetween("table", 1)  # of six blocks
    left = between.left(tensor, 6, [0, 1, 4, 5])
    assert left.tolist() == [[0, 1 + 2 + 3, 4], [5, 6 + 7 + 8, 9]] and between.shape_left((2, 5), 6, 4) == left.shape
    assert torch.equal(between.left(left, 4, [0, 3]), between.left(tensor, 6, [0, 5]))
