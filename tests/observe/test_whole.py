"""rows="flat": whole outputs compared within batches, against the measure written out from its definition."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import transformers as tf

from deeparc_hf import analyze, find_stacks
from deeparc_hf.errors import CalibrationError, CalibrationWarning, ConfigError
from deeparc_hf.observe.hooks import hidden_states
from deeparc_hf.similarity.base import centered_gram, centered_grams
from tests.zoo import ZOO

SIZE = 32


def small_resnet(seed=0, depths=(3, 3, 4, 3), same=0.05):
    """A ResNet whose blocks change their input more or less: from hardly (`same` times the usual) to as usual."""
    torch.manual_seed(seed)
    config = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=list(depths), num_labels=3, layer_type="bottleneck"
    )
    model = tf.ResNetForImageClassification(config).eval()
    with torch.no_grad():
        for stage in model.resnet.encoder.stages:
            for index, block in enumerate(stage.layers):
                block.layer[-1].normalization.weight.mul_(same if index % 2 else 1.0)
    return model


def images(batches=3, size=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(size, 3, SIZE, SIZE, generator=draw)} for _ in range(batches)]


def blocks_of(model):
    return [block for stack in find_stacks(model).values() for block in stack.blocks]


def outputs_of(model, batch):
    """What each block puts out, flattened, in float64; from a forward pass with plain hooks."""
    found = []
    handles = [
        block.register_forward_hook(
            lambda _, args, output: found.append(hidden_states(output).flatten(1).double().numpy())
        )
        for block in blocks_of(model)
    ]
    with torch.no_grad():
        model.eval()(**batch)
    for handle in handles:
        handle.remove()
    return found


def hsic1(x, y):
    """Song et al. 2012, eq. 5, of two matrices of rows, as it stands there."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    ones = np.ones(n)
    trace = np.trace(k @ m)
    corner = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    cross = 2 / (n - 2) * (ones @ k @ m @ ones)
    return (trace + corner - cross) / (n * (n - 3))


def reference(model, batches):
    """Minibatch CKA of all pairs of blocks of the network: the ratio of sums over equally large batches."""
    total = 0
    for batch in batches:
        rows = outputs_of(model, batch)
        total = total + np.array([[hsic1(x, y) for y in rows] for x in rows])
    own = np.sqrt(np.diag(total))
    return total / own[:, None] / own[None, :]


def leaders(similarity, threshold):
    """Runs of a whole network's blocks, each of which is like the first of its run."""
    runs = []
    for index in range(len(similarity)):
        if runs and similarity[runs[-1][0], index] >= threshold:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def joined(plan):
    """The similarities in a plan, as one matrix over the network."""
    count = plan.num_blocks
    full, first = np.eye(count), 0
    for stack in plan.stacks.values():
        last = first + len(stack)
        full[first:last, first:last] = stack.similarity
        if first:
            full[first:last, :first] = stack.compared.before
            full[:first, first:last] = full[first:last, :first].T
        first = last
    return full


def test_the_measure_is_the_one_of_the_definition():
    model, batches = small_resnet(), images()
    plan = analyze(model, batches, rows="flat", calibration_samples=48, progress=False)
    np.testing.assert_allclose(joined(plan), reference(model, batches), atol=1e-6)


def test_a_smaller_last_batch_counts_by_its_samples():
    model, batches = small_resnet(), [*images(2), *images(1, size=8, seed=1)]
    plan = analyze(model, batches, rows="flat", calibration_samples=40, progress=False)
    parts = [outputs_of(model, batch) for batch in batches]
    total = sum(len(p[0]) * np.array([[hsic1(x, y) for y in p] for x in p]) for p in parts)
    own = np.sqrt(np.diag(total))
    np.testing.assert_allclose(joined(plan), total / own[:, None] / own[None, :], atol=1e-6)


@pytest.mark.parametrize("threshold", [0.98, 0.95, 0.7, 0.4])
@pytest.mark.parametrize("k", [1, 2])
def test_clusters_over_the_network_are_those_of_the_definition(threshold, k):
    model, batches = small_resnet(), images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # low thresholds take many blocks
        plan = analyze(
            model,
            batches,
            rows="flat",
            across_stacks=True,
            threshold=threshold,
            k=k,
            calibration_samples=48,
            progress=False,
        )
    names = [(name, index) for name, stack in find_stacks(model).items() for index in range(len(stack))]
    pinned = {(name, index) for name, stack in find_stacks(model).items() for index in stack.pinned}
    gone: dict[str, list[int]] = {}
    for run in leaders(reference(model, batches), threshold):
        for position in run[1::k]:
            if names[position] not in pinned:
                gone.setdefault(names[position][0], []).append(names[position][1])
    assert {name: list(indices) for name, indices in plan.removed.items()} == gone
    assert gone  # the model is such that something goes at each of these thresholds


def test_planted_blocks_that_do_nothing_go_and_no_others():
    """Blocks whose last normalization gives zeros put out what they are given (after a relu that was there before)."""
    torch.manual_seed(0)
    model = small_resnet(same=1.0)
    planted = {"resnet.encoder.stages.1.layers": [1], "resnet.encoder.stages.2.layers": [2, 3]}
    with torch.no_grad():
        for name, indices in planted.items():
            for index in indices:
                last = find_stacks(model)[name].blocks[index].layer[-1].normalization
                last.weight.zero_()
                last.bias.zero_()
    for across in (True, False):
        plan = analyze(
            model,
            images(),
            rows="flat",
            across_stacks=across,
            threshold=0.9999,
            calibration_samples=48,
            progress=False,
        )
        assert {name: list(indices) for name, indices in plan.removed.items()} == planted


def test_columns_taken_in_parts_give_the_same():
    rows = torch.randn(16, 1000, generator=torch.Generator().manual_seed(0))
    whole = centered_gram(rows)
    np.testing.assert_allclose(centered_gram(rows, columns=37), whole, rtol=1e-12, atol=1e-10)
    centered = rows.double() - rows.double().mean(0)
    np.testing.assert_allclose(whole, centered @ centered.T, rtol=1e-12, atol=1e-10)


def test_many_rows_of_many_blocks_give_what_each_block_gives_alone():
    rows = torch.randn(6, 300, 20, generator=torch.Generator().manual_seed(0))
    grams = centered_grams(rows)
    centered = (rows.double() - rows.double().mean(1, keepdim=True)).numpy()
    for gram, block, own in zip(grams, rows, centered, strict=True):
        np.testing.assert_allclose(gram, own @ own.T, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(gram, centered_gram(block), rtol=1e-12, atol=1e-12)


def test_the_batch_size_stands_in_the_plan_and_its_texts():
    model = small_resnet()
    plan = analyze(model, images(size=16), rows="flat", calibration_samples=48, progress=False)
    assert plan.batch_size == 16
    assert plan.samples_text == "48 calibration samples in batches of 16"
    assert "48 samples in batches of 16" in str(plan)
    assert analyze(model, images(), calibration_samples=48, progress=False).batch_size == 0


@pytest.mark.parametrize("kind", ["bert", "vit", "resnet_basic"])
def test_other_outputs_of_one_shape_too(kind):
    model, batches = ZOO[kind].model(), [whole_texts(batch) for batch in ZOO[kind].batches()]
    plan = analyze(model, batches, rows="flat", calibration_samples=48, progress=False)
    np.testing.assert_allclose(joined(plan), reference(model, batches), atol=1e-5)


def whole_texts(batch):
    """The same batch without padding."""
    return {
        **batch,
        **({"attention_mask": torch.ones_like(batch["attention_mask"])} if "attention_mask" in batch else {}),
    }


def test_shapes_that_differ_between_batches_are_refused():
    model = small_resnet()
    other = {"pixel_values": torch.randn(16, 3, 2 * SIZE, SIZE)}
    with pytest.raises(CalibrationError, match=r"outputs of one shape: block 0 .* 16 x 8 x 8 .* 16 x 16 x 8"):
        analyze(model, [*images(1), other], rows="flat", calibration_samples=32, progress=False)


def test_batches_that_are_too_small_are_refused():
    with pytest.raises(CalibrationError, match=r"at most 2 sample\(s\).*cka needs at least 4"):
        analyze(small_resnet(), images(batches=16, size=2), rows="flat", calibration_samples=32, progress=False)


def test_padding_is_refused():
    batches = ZOO["bert"].batches()
    assert not batches[0]["attention_mask"].all()
    with pytest.raises(CalibrationError, match="has padding"):
        analyze(ZOO["bert"].model(), batches, rows="flat", calibration_samples=48, progress=False)


def test_a_block_that_puts_out_no_numbers_is_named():
    model = small_resnet()
    with torch.no_grad():
        model.resnet.encoder.stages[1].layers[1].layer[-1].normalization.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match=r"Block 1 of resnet\.encoder\.stages\.1\.layers puts out NaN"):
        analyze(model, images(), rows="flat", calibration_samples=48, progress=False)


def test_a_block_that_never_varies_is_named():
    model = small_resnet()
    with torch.no_grad():
        block = model.resnet.encoder.stages[0].layers[0]
        for layer in (block.layer[-1].normalization, block.shortcut.normalization):
            layer.weight.zero_()
    with pytest.raises(CalibrationError, match=r"Block 0 of resnet\.encoder\.stages\.0\.layers hardly varies"):
        analyze(model, images(), rows="flat", calibration_samples=48, progress=False)


def test_settings_that_go_together():
    for similarity in ("cka_biased", "cosine"):
        with pytest.raises(ConfigError, match=r"compares rows of 'tokens', 'mean', 'first'"):
            analyze(small_resnet(), [], similarity=similarity, rows="flat")
    with pytest.raises(ConfigError, match="across_stacks compares blocks whose outputs differ in shape"):
        analyze(small_resnet(), [], across_stacks=True)
    with pytest.raises(ConfigError, match="there is one for all"):
        analyze(small_resnet(), [], across_stacks=True, rows="flat", num_blocks={"a": 3})


def test_hooks_are_gone_afterwards():
    model = small_resnet()
    analyze(model, images(), rows="flat", calibration_samples=48, progress=False)
    assert not any(module._forward_hooks for module in model.modules())
