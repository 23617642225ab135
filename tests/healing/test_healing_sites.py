"""Several sites, positions that are larger than all others, and towers: against least squares written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

from deeparc_hf import find_stacks, heal_model, remove_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.errors import CalibrationError
from deeparc_hf.healing.block_ends import Ending
from deeparc_hf.healing.fit import SiteFit, in_one_unit
from deeparc_hf.healing.heal import fit_sites
from deeparc_hf.healing.sensitivity import output_sensitivities
from deeparc_hf.healing.sites import Site
from deeparc_hf.observe.axes import Axes
from deeparc_hf.observe.calibration import Calibration
from deeparc_hf.observe.forward import evaluating
from tests.zoo import ZOO, spread

LAYERS = "model.layers"


def seen_at(model, path, batches):
    """Inputs of the last map of a layer and outputs of the layer, unpadded positions, with the number of each one's
    sample.
    """
    layer = model.get_submodule(path)
    x, out = [], []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: x.append(a[0])),
        layer.register_forward_hook(lambda m, a, o: out.append(o if torch.is_tensor(o) else o[0])),
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    mask = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    samples = torch.arange(len(mask))[:, None].expand_as(mask)[mask]
    return torch.cat(x)[mask].double(), torch.cat(out)[mask].double(), samples


def weights_at(model, path, batches):
    """How much each unpadded position counts: by how sensitive the outputs are to it, and half of its sample's mean."""
    found = []
    with evaluating(model):
        for batch in batches:
            block = model.get_submodule(path)
            size = output_sensitivities(describe(model).host, {block: 2}, batch)[block][..., 0].double()
            mask = batch["attention_mask"].bool()
            size = size * mask
            mean = size.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            found.append((size + 0.5 * mean)[mask])
    return torch.cat(found)


def ridge(x, e, weights, strength):
    x, e = x * weights.sqrt()[:, None], e * weights.sqrt()[:, None]
    gram = x.T @ x
    return torch.linalg.solve(
        gram + strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype), x.T @ e
    ).T


def test_a_later_site_is_fitted_on_what_the_healed_model_gives_it():
    model = ZOO["llama"].model()
    batches = ZOO["llama"].batches(12)
    pruned = copy.deepcopy(model)
    remove_blocks(pruned, {LAYERS: [1, 3]})
    first, second = heal_model(pruned, model, batches)
    alone = copy.deepcopy(model)
    remove_blocks(alone, {LAYERS: [1]})
    heal_model(alone, model, batches)
    # the first site is as without the second
    assert torch.equal(pruned.model.layers[0].mlp.down_proj.weight, alone.model.layers[0].mlp.down_proj.weight)
    x, kept, samples = seen_at(alone, f"{LAYERS}.1", batches)  # block 2, behind the healed site
    _, target, _ = seen_at(model, f"{LAYERS}.3", batches)
    fit = samples % 5 != 4
    weights = weights_at(model, f"{LAYERS}.3", batches)
    expected = ridge(x, target - kept, weights, second.strength)
    judged = ridge(x[fit], (target - kept)[fit], weights[fit], second.strength)
    found = (pruned.model.layers[1].mlp.down_proj.weight - model.model.layers[2].mlp.down_proj.weight).double()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)
    before, after = (e[~fit].square().sum(1) @ weights[~fit] for e in (target - kept, target - kept - x @ judged.T))
    held = (after / before).item()
    assert second.held_out == pytest.approx(held, rel=1e-3) and first.held_out < 1


@pytest.mark.parametrize("name", ["bert", "t5", "resnet", "vit", "gpt2", "bart"])
def test_sites_in_every_stack_leave_the_unpruned_model_as_it_was(name):
    specimen = ZOO[name]
    model, batches = specimen.model(), specimen.batches(12)
    removed = {n: [i for i in range(1, len(s), 2) if i not in s.pinned] for n, s in find_stacks(model).items()}
    removed = {n: indices for n, indices in removed.items() if indices}
    subject = describe(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    healings = fit_sites(subject, removed, Calibration(batches, 100))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert len(healings) > 1 and any(healing.reason is None for healing in healings)


def test_an_error_on_the_way_leaves_the_unpruned_model_as_it_was():
    model, batches = ZOO["llama"].model(), ZOO["llama"].batches(12)
    subject = describe(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    calls = []

    class Broken(list):
        def __iter__(self):
            calls.append(1)
            yield from batches[:3]
            if len(calls) == 2:
                raise KeyboardInterrupt
            yield from batches[3:]

    with pytest.raises(KeyboardInterrupt):
        fit_sites(subject, {LAYERS: [1, 3]}, Calibration(Broken(), 100))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(CalibrationError, match="once for each of the 2 sites"):
        fit_sites(subject, {LAYERS: [1, 3]}, Calibration(iter(batches), 100))


def test_two_towers():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    text = {
        **sizes,
        "vocab_size": 120,
        "max_position_embeddings": 20,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    model = spread(tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))).eval()
    images, texts = ZOO["vit"].batches(6), ZOO["llama"].batches(6)
    batches = [{**image, **words} for image, words in zip(images, texts, strict=True)]
    pruned = copy.deepcopy(model)
    remove_blocks(pruned, {name: [2] for name in find_stacks(model)})
    assert [healing.reason for healing in heal_model(pruned, model, batches)] == [None, None]


def test_the_share_that_is_left_is_of_every_batch():
    """Of as many held-out positions as come, not of the first of them."""
    model = ZOO["vit"].model()
    batches = ZOO["vit"].batches(8, size=64)
    for batch in batches[4:]:
        batch["pixel_values"] = 5 * batch["pixel_values"]  # others than the first
    pruned = copy.deepcopy(model)
    remove_blocks(
        pruned, {"vit.layers": [1]} if "vit.layers" in find_stacks(model) else {next(iter(find_stacks(model))): [1]}
    )
    (healing,) = heal_model(pruned, model, batches)
    name = next(iter(find_stacks(model)))
    outputs = []
    for net, index in ((model, 0), (pruned, 0), (model, 1)):
        seen = []
        handle = (
            find_stacks(net)[name]
            .blocks[index]
            .register_forward_hook(lambda m, a, o, seen=seen: seen.append(o if torch.is_tensor(o) else o[0]))
        )
        with torch.no_grad():
            for batch in batches:
                net(**batch)
        handle.remove()
        outputs.append(torch.cat(seen)[4::5].double())
    before, after, target = outputs
    share = ((after - target).square().sum() / (before - target).square().sum()).item()
    assert healing.held_out == pytest.approx(share, rel=0.05)


def test_a_few_huge_positions_count_no_more_than_a_hundred_others():
    """Planted: the first position of each sample is sent far away, the others through a linear map; weights written out
    by hand.
    """
    model = ZOO["llama"].model()
    subject = describe(model)
    host, stacks = subject.host, subject.stacks
    site = SiteFit(host, stacks[LAYERS], Site(LAYERS, 2, (3,)))
    width, size = model.config.hidden_size, model.config.intermediate_size
    site.endings = [Ending("mlp.down_proj", None, None, torch.ones(width))] * 2
    site.orient(Axes(features=2, samples=0))
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(width, size, generator=generator, dtype=torch.float64)
    xs, kepts, targets = [], [], []
    for batch in range(10):
        x, kept, noise = (torch.randn(8, 20, n, generator=generator, dtype=torch.float64) for n in (size, width, width))
        missing = x @ planted.T + noise
        missing[:, 0] = 1e4
        site.seen = {"x": x, "kept output": kept.float(), "last output": (kept + missing).float()}
        site.take({"input_ids": torch.zeros(8, 20)}, 8 * batch)
        xs, kepts, targets = [*xs, x.flatten(0, 1)], [*kepts, kept.flatten(0, 1)], [*targets, missing.flatten(0, 1)]
    healing = site.finish([site.part()])
    weight = torch.cat([(100 * m.square().sum(1).median() / m.square().sum(1)).clamp(max=1) for m in targets])[:, None]
    x, missing = torch.cat(xs), torch.cat(targets)
    fit = torch.arange(80).repeat_interleave(20) % 5 != 4
    expected = ridge(x, missing, weight[:, 0], healing.strength)
    torch.testing.assert_close(healing.change.double(), expected, atol=1e-4, rtol=1e-4)
    judged = ridge(x[fit], missing[fit], weight[fit, 0], healing.strength)
    held = weight * (missing - x @ judged.T).square(), weight * missing.square()
    assert healing.held_out == pytest.approx(float(held[0][~fit].sum() / held[1][~fit].sum()), rel=1e-4)
    assert int((weight < 1).sum()) == 80
    plain = ridge(x, missing, torch.ones(len(x), dtype=x.dtype), healing.strength)
    assert (expected - planted).square().sum() < 0.1 * (plain - planted).square().sum()


@pytest.mark.parametrize("known", [[True, False, True], [False, True, True], [True, True, True]])
def test_what_is_not_known_to_be_sensitive_counts_like_the_mean(known):
    """Of the first batch; if nothing is known of that, all positions count alike. Weights written out by hand."""
    model = ZOO["llama"].model()
    subject = describe(model)
    site = SiteFit(subject.host, subject.stacks[LAYERS], Site(LAYERS, 2, (3,)))
    width, size = model.config.hidden_size, model.config.intermediate_size
    site.endings = [Ending("mlp.down_proj", None, None, torch.ones(width))] * 2
    site.orient(Axes(features=2, samples=0))
    generator = torch.Generator().manual_seed(0)
    xs, wanted, weights, first = [], [], [], 0.0
    for number, is_known in enumerate(known):
        x, kept, missing = (torch.randn(10, 6, n, generator=generator).double() for n in (size, width, width))
        found = torch.rand(10, 6, 1, generator=generator) * 1e-3
        found[:, 4:] = torch.nan if number == 2 and all(known) else 0.0
        site.seen = {"x": x, "kept output": kept.float(), "last output": (kept + missing).float()}
        site.take({"input_ids": torch.zeros(10, 6)}, 10 * number, found if is_known else None)
        size_of = found[..., 0].double().nan_to_num(0.0)
        counted = size_of + 0.5 * size_of.mean(1, keepdim=True)
        first = float(size_of.mean()) if number == 0 else first
        counted = counted if is_known else torch.full_like(counted, 1.5 * first)
        weights.append(counted if known[0] else torch.ones_like(counted))
        xs, wanted = [*xs, x.flatten(0, 1)], [*wanted, missing.flatten(0, 1)]
    fit = torch.arange(30).repeat_interleave(6) % 5 != 4
    x, e, weights = (torch.cat(parts)[fit] for parts in (xs, wanted, [each.reshape(-1, 1) for each in weights]))
    torch.testing.assert_close(site.sums[False].inputs, (x * weights).T @ x)
    torch.testing.assert_close(site.sums[False].cross, (x * weights).T @ e, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gains", [True, False])
def test_each_fold_is_repaired_by_what_the_others_show(gains):
    """Planted: what is missing is linear in the inputs, in each fold by another map; or it is noise."""
    subject = describe(ZOO["llama"].model())
    site = SiteFit(subject.host, subject.stacks[LAYERS], Site(LAYERS, 2, (3,)), folds=3)
    width, size = 32, 48
    site.endings = [Ending("mlp.down_proj", None, None, torch.ones(width))] * 2
    site.orient(Axes(features=2, samples=0))
    generator = torch.Generator().manual_seed(0)
    shared, *apart = (torch.randn(width, size, generator=generator).double() for _ in range(4))
    maps = [shared + 0.1 * each for each in apart]
    for number in range(9):
        x, kept, missing = (torch.randn(20, 6, n, generator=generator).double() for n in (size, width, width))
        missing = x @ maps[number % 3].T if gains else missing
        site.seen = {"x": x, "kept output": kept.float(), "last output": (kept + missing).float()}
        site.take({"input_ids": torch.zeros(20, 6)}, 20 * number, fold=number % 3)
    fit = site.cross([site.part()])
    if not gains:
        assert {each.reason for each in (*fit.folds, fit.whole)} == {fit.whole.reason} != {None}
        return
    assert all(each.reason is None for each in (*fit.folds, fit.whole)) and fit.whole.positions == 1080
    means = [sum(maps[:k] + maps[k + 1 :]) / 2 for k in range(3)]
    for each, expected in zip((*fit.folds, fit.whole), (*means, sum(maps) / 3), strict=True):
        assert (each.change - expected).norm() < 0.4 * (maps[1] - maps[0]).norm() / 2
    # what is left is the distance from the map of the others: no repair has seen the samples that judge it
    left = sum((own - mean).square().sum() for own, mean in zip(maps, means, strict=True))
    assert fit.whole.held_out == pytest.approx(float(left / sum(own.square().sum() for own in maps)), rel=0.15)


def test_a_process_that_does_not_know_what_counts_counts_like_the_mean_of_the_others():
    subject = describe(ZOO["llama"].model())
    width, size = 32, 48
    generator = torch.Generator().manual_seed(0)

    def seen(unit):
        site = SiteFit(subject.host, subject.stacks[LAYERS], Site(LAYERS, 2, (3,)))
        site.endings = [Ending("mlp.down_proj", None, None, torch.ones(width))] * 2
        site.orient(Axes(features=2, samples=0))
        x, kept, missing = (torch.randn(10, 6, n, generator=generator).double() for n in (size, width, width))
        site.seen = {"x": x, "kept output": kept.float(), "last output": (kept + missing).float()}
        site.take({"input_ids": torch.zeros(10, 6)}, 0, None if unit is None else torch.full((10, 6, 1), unit))
        return site.part()

    parts = in_one_unit([seen(1e-3), seen(None), seen(3e-3)])
    first, second, third = (part.sums[False].inputs.trace().item() for part in parts)
    assert second == pytest.approx((first + third) / 2, rel=0.2) and third == pytest.approx(3 * first, rel=0.2)
    assert parts[1].held[True][0][-1].mean().item() == pytest.approx(3e-3)
    alone = seen(None)
    assert in_one_unit([alone])[0] is alone


def test_a_site_whose_samples_cannot_be_told_apart_is_left_alone():
    """Its reason stays, whatever is found out about its blocks."""
    subject = describe(ZOO["llama"].model())
    host, stacks = subject.host, subject.stacks
    site = SiteFit(host, stacks[LAYERS], Site(LAYERS, 2, (3,)))
    site.orient(Axes(features=1, samples=None))
    site.settle([Ending("mlp.down_proj", None, None, torch.ones(32))] * 2)
    assert site.reason == "which positions belong to a sample cannot be told, so none can be held out"
