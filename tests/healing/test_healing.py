"""Healing of removal sites: planted truth, an independent reference, and the life in a Trainer."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch
import transformers as tf

from deeparc_hf import MPruneCallback, find_stacks, heal_model, prune_model, remove_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.errors import CalibrationError, SurgeryError
from deeparc_hf.healing.heal import find_endings, fit_sites
from deeparc_hf.healing.ridge import RidgeSums, solve, solve_crosswise
from deeparc_hf.healing.sites import Site, healing_text, sites_of
from deeparc_hf.observe.calibration import Calibration
from deeparc_hf.observe.forward import evaluating
from tests.trainer.test_resume import equal, scripted
from tests.trainers import train
from tests.zoo import IMAGE, SEQ2SEQ, TEXT, VOCAB, ZOO, as_trained, spread


def removable(model):
    """A block in the middle of the first stack with one, and its stack."""
    for name, stack in find_stacks(model).items():
        free = [i for i in range(1, len(stack)) if i not in stack.pinned]
        if free and len(stack) > 2:
            return name, free[0]
    raise AssertionError


def outputs(model, block, batches):
    """What a block puts out on batches, by a hook of our own; padding left out."""
    found = []

    def take(module, args, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        found.append(hidden.detach())

    handle = block.register_forward_hook(take)
    with torch.no_grad():
        for batch in batches:
            given = {"x": batch["pixel_values"]} if "pixel_values" in batch and not hasattr(model, "config") else batch
            model.eval()(**given)
    handle.remove()
    rows = []
    for hidden, batch in zip(found, batches, strict=True):
        mask = batch.get("attention_mask")
        fits = mask is not None and hidden.ndim == 3 and mask.shape == hidden.shape[:2]
        rows.append(hidden[mask.bool()] if fits else hidden.flatten(0, -2))
    return torch.cat(rows)


# ---- the mathematics ----


def planted(seed=0, intercept=True):
    generator = torch.Generator().manual_seed(seed)
    x, truth = torch.randn(300, 6, generator=generator), torch.randn(7, 4, generator=generator)
    extended = torch.cat([x, torch.ones(300, 1)], dim=1) if intercept else x
    return extended, extended @ truth[: extended.shape[1]], truth[: extended.shape[1]]


@pytest.mark.parametrize("intercept", [True, False])
def test_a_linear_relation_is_found(intercept):
    x, e, truth = planted(intercept=intercept)
    solution = solve(RidgeSums.of(x[:200], e[:200]), RidgeSums.of(x[200:], e[200:]), intercept)
    assert torch.allclose(solution.change, truth.double(), atol=1e-3)
    assert solution.held_out < 1e-6 and solution.strength == 1e-5


def test_sums_add_up_to_what_ridge_regression_says():
    x, e, _ = planted()
    e = e + torch.randn(e.shape, generator=torch.Generator().manual_seed(3))
    parts = RidgeSums.of(x[:90], e[:90]) + RidgeSums.of(x[90:200], e[90:200])
    solution = solve(parts, RidgeSums.of(x[200:], e[200:]), True, strengths=[0.1])
    a, b = x[:200].double().numpy(), e[:200].double().numpy()
    weights = np.diag([0.1 * np.square(a[:, :6]).sum() / 6] * 6 + [0.0])
    reference = np.linalg.solve(a.T @ a + weights, a.T @ b)
    assert np.allclose(solution.change.numpy(), reference)
    held = e[200:].double().numpy() - x[200:].double().numpy() @ reference
    assert np.isclose(solution.held_out, np.square(held).sum() / np.square(e[200:].double().numpy()).sum())


def test_each_fold_is_fitted_on_the_others():
    """Against ridge regression written out with numpy; the strength is the best by all held-out errors together."""
    x, e, _ = planted()
    e = e + 3 * torch.randn(e.shape, generator=torch.Generator().manual_seed(3))
    strengths, folds = (1e-3, 1e-2, 1e-1, 1.0, 100.0), [slice(0, 80), slice(80, 170), slice(170, 300)]
    solution = solve_crosswise([RidgeSums.of(x[rows], e[rows]) for rows in folds], True, strengths)
    a, b = x.double().numpy(), e.double().numpy()

    def reference(left_out, strength):
        given, wanted = np.delete(a, left_out, axis=0), np.delete(b, left_out, axis=0)
        weights = np.diag([strength * np.square(given).sum(axis=0)[:6].mean()] * 6 + [0.0])
        return np.linalg.solve(given.T @ given + weights, given.T @ wanted)

    errors = {
        strength: sum(np.square(b[rows] - a[rows] @ reference(rows, strength)).sum() for rows in folds)
        for strength in strengths
    }
    assert solution.strength == min(errors, key=errors.get)
    for rows, change in zip([*folds, slice(0, 0)], [*solution.changes, solution.whole], strict=True):
        assert np.allclose(change.numpy(), reference(rows, solution.strength))


def test_noise_is_not_fitted_crosswise():
    generator = torch.Generator().manual_seed(1)
    x, e = torch.randn(40, 30, generator=generator), torch.randn(40, 5, generator=generator)
    halves = [RidgeSums.of(x[rows], e[rows]) for rows in (slice(0, 20), slice(20, 40))]
    solution = solve_crosswise(halves, False, strengths=(1e-5, 1e-4))
    assert solution.changes is None and solution.whole is None and solution.strength is None
    nothing = RidgeSums.of(x, torch.zeros(40, 5))
    assert solve_crosswise([nothing, nothing], False).changes is None


def test_noise_is_not_fitted():
    generator = torch.Generator().manual_seed(1)
    x, e = torch.randn(40, 30, generator=generator), torch.randn(40, 5, generator=generator)
    solution = solve(RidgeSums.of(x[:32], e[:32]), RidgeSums.of(x[32:], e[32:]), False)
    assert solution.change is None or solution.held_out < 1.0


def test_sites_are_runs_with_a_kept_block_before_them():
    assert sites_of({"a": [1, 2, 4], "b": [0, 1], "c": [3]}) == [
        Site("a", 0, (1, 2)),
        Site("a", 3, (4,)),
        Site("c", 2, (3,)),
    ]


# ---- models ----


def test_a_block_that_adds_a_constant_is_healed_completely():
    model = ZOO["vit"].model()
    name, index = removable(model)
    block = find_stacks(model)[name].blocks[index]
    with torch.no_grad():
        # the ends of both branches, as transformers 5.0 calls them, and later versions
        ends = [module for path, module in block.named_modules() if path.endswith(("o_proj", "fc2", "output.dense"))]
        assert len(ends) == 2
        for module in ends:
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
        ends[-1].bias.normal_()
    batches = ZOO["vit"].batches(4)
    pruned = copy.deepcopy(model)
    remove_blocks(pruned, {name: [index]})
    heal_model(pruned, model, batches)
    with torch.no_grad():
        assert torch.allclose(pruned(**batches[0]).logits, model(**batches[0]).logits, atol=1e-3)


HEALED = [
    "bert",
    "roberta",
    "bart",
    "t5",
    "llama",
    "gpt2",
    "vit",
    "timm_vit",
    "resnet",
    "wrapped_resnext",
    "deberta_v2",
    "qwen2",
]


@pytest.mark.parametrize("name", HEALED)
def test_how_these_blocks_end_is_found(name):
    specimen = ZOO[name]
    model = specimen.model()
    subject = describe(model)
    stack, index = removable(model)
    (healing,) = fit_sites(subject, {stack: [index]}, Calibration(specimen.batches(12), 100))
    assert healing.ending is not None, healing.reason
    assert (healing.ending.final is not None) == (
        name in ("bert", "roberta", "bart", "deberta_v2", "resnet", "wrapped_resnext")
    )
    assert (healing.ending.batch_norm is not None) == ("res" in name)


def test_a_batch_norm_trains_on_from_where_it_is_healed():
    """In train mode it normalises by the batch: about what it computes in eval mode, as the statistics are those of the
    changed map.
    """
    specimen = ZOO["resnet"]
    model = specimen.model()
    batches = specimen.batches(12, size=16)
    model.train()
    with torch.no_grad():
        for batch in batches * 4:
            model(**batch)  # statistics of the data
    stack, index = removable(model.eval())
    last = find_stacks(model)[stack].blocks[index].layer[2].normalization
    torch.nn.init.constant_(last.weight, 0.01)
    torch.nn.init.constant_(last.bias, 2.0)
    pruned = copy.deepcopy(model)
    remove_blocks(pruned, {stack: [index]})
    (healing,) = heal_model(pruned, model, batches)
    assert healing.reason is None
    block = find_stacks(pruned)[stack].blocks[index - 1]
    norm = block.get_submodule(healing.ending.batch_norm)
    seen = {}
    handle = norm.register_forward_pre_hook(lambda module, args: seen.update(x=args[0].detach()))
    with torch.no_grad():
        pruned(pixel_values=torch.cat([batch["pixel_values"] for batch in batches]))
    handle.remove()
    mean, variance = seen["x"].mean(dim=(0, 2, 3)), seen["x"].var(dim=(0, 2, 3))
    assert torch.allclose(norm.running_mean, mean, atol=0.05 * float(variance.max().sqrt()))
    assert torch.allclose(norm.running_var, variance, rtol=0.1)


def test_prune_model_heals_what_heal_model_would():
    batches = ZOO["llama"].batches(6)
    one, model = ZOO["llama"].model(), ZOO["llama"].model()
    plan = prune_model(one, batches, num_blocks=2, heal="lstsq", progress=False)
    other = copy.deepcopy(model)
    remove_blocks(other, plan.removed)
    heal_model(other, model, batches)
    assert equal(one.state_dict(), other.state_dict())


def test_what_cannot_be_healed_is_refused_and_nothing_changes():
    model = ZOO["bert"].model()
    pruned = copy.deepcopy(model)
    remove_blocks(pruned, {"bert.encoder.layer": [2]})
    with torch.no_grad():
        pruned.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
    before = {k: v.clone() for k, v in pruned.state_dict().items()}
    with pytest.raises(SurgeryError, match="trained after the removal"):
        heal_model(pruned, model, ZOO["bert"].batches(2))
    assert equal(before, pruned.state_dict())
    with pytest.raises(SurgeryError, match=r"do not belong together|nothing to heal"):
        heal_model(pruned, pruned, ZOO["bert"].batches(2))
    with pytest.raises(CalibrationError, match="iterator"):
        prune_model(model, iter(ZOO["bert"].batches(2)), num_blocks=3, heal="lstsq")


def test_zeroed_weights_are_left_alone():
    from deeparc_hf import sparsify_model

    model = ZOO["bert"].model()
    sparsify_model(model, method="magnitude", progress=False)
    pruned = copy.deepcopy(model)
    remove_blocks(pruned, {"bert.encoder.layer": [2]})
    (healing,) = heal_model(pruned, model, ZOO["bert"].batches(4))
    assert "holds zeros" in healing.reason


def left_alone(model, batches=None):
    subject = describe(model)
    (healing,) = fit_sites(subject, {"bert.encoder.layer": [2]}, Calibration(batches or ZOO["bert"].batches(4), 100))
    assert healing.change is None
    return healing.reason


def test_a_few_zeros_that_the_record_lists_are_enough():
    from deeparc_hf import sparsify_model

    model = ZOO["bert"].model()
    sparsify_model(model, method="magnitude", sparsity=0.03, targets=["*.1.output.dense"], progress=False)
    with torch.no_grad():
        weight = model.bert.encoder.layer[1].output.dense.weight
        weight[:, 5:][weight[:, 5:] == 0] = 0.1  # fewer than would be noticed
    assert "holds zeros" in left_alone(model)


def test_a_tied_map_is_left_alone():
    model = ZOO["bert"].model()
    layers = model.bert.encoder.layer
    layers[3].output.dense.weight = layers[1].output.dense.weight
    assert "is tied to another map" in left_alone(model)


def test_a_norm_with_statistics_at_the_end_is_left_alone():
    class Statistics(torch.nn.BatchNorm1d):
        def forward(self, hidden):
            return super().forward(hidden.transpose(1, 2)).transpose(1, 2)

    model = ZOO["bert"].model()
    for layer in model.bert.encoder.layer:
        layer.output.LayerNorm = Statistics(32)
    assert "whose statistics are those of its own inputs" in left_alone(model.eval())


@pytest.mark.parametrize("how", [{"affine": False}, {"track_running_stats": False}])
def test_a_norm_that_cannot_be_refitted_is_left_alone(how):
    """Behind a map without a bias there is nowhere for an intercept to go, and the statistics could not follow."""
    model = ZOO["resnet"].model()
    name, stack = next((name, stack) for name, stack in find_stacks(model).items() if len(stack) > 2)
    for block in stack.blocks:
        last = block.layer[-1]
        last.normalization = torch.nn.BatchNorm2d(last.normalization.num_features, **how).eval()
    (healing,) = fit_sites(describe(model), {name: [2]}, Calibration(ZOO["resnet"].batches(4), 100))
    assert healing.change is None
    assert "no weights or no running statistics of its own" in healing.reason


def test_positions_in_another_order_than_the_blocks_are_left_alone():
    model = ZOO["bert"].model()
    for layer in model.bert.encoder.layer[1:3]:
        layer.output.dense.register_forward_pre_hook(lambda module, args: (args[0].transpose(0, 1), *args[1:]))
        layer.output.dense.register_forward_hook(lambda module, args, output: output.transpose(0, 1))
    assert "positions in another order than the block puts them out" in left_alone(model)


# ---- in a Trainer ----


def test_a_trainer_heals_and_resumes(tmp_path):
    def run(folder, resume=None):
        model = ZOO["bert"].model()
        callback = MPruneCallback(num_blocks=[3, 2], start_epoch=1, retrain_epochs=1, heal="lstsq")
        train(model, folder, callback, resume=resume, num_train_epochs=3, save_strategy="epoch")
        return model, callback

    whole, callback = run(tmp_path)
    assert [len(attempt["healing"]) for attempt in callback.attempts[1:]] == [1, 1]
    report = (tmp_path / "pruning_report.md").read_text()
    assert all(healing_text(attempt["healing"][0]) in report for attempt in callback.attempts[1:])
    for step in (8, 16):
        resumed, _ = run(tmp_path, str(tmp_path / f"checkpoint-{step}"))
        assert equal(whole.state_dict(), resumed.state_dict())


def test_a_healed_pruning_that_is_taken_back_leaves_no_trace(tmp_path):
    model = ZOO["bert"].model()
    gate = {"max_drop": 0.1, "metric": "accuracy", "k_max": 1, "start_epoch": 0, "baseline": 0.9}
    callback = MPruneCallback(num_blocks=2, retrain_epochs=1, heal="lstsq", **gate)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(
        model,
        tmp_path,
        callback,
        compute_metrics=scripted(model, {2: 0.1, 4: 0.9}),
        num_train_epochs=1,
        eval_strategy="epoch",
    )
    assert equal(before, model.state_dict())


@pytest.mark.parametrize("kind", sorted(ZOO))
def test_blocks_end_alike_in_numbers_with_few_digits(kind):
    """What is left alone in float32 is left alone, what is found is the same; LongT5 may clip in float16."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        subject = describe(ZOO[kind].model().eval().to(dtype))
        inputs = next(Calibration(ZOO[kind].batches(count=1), 100).inputs(subject.host))
        blocks = [block for stack in subject.stacks.values() for block in stack.blocks]
        with evaluating(subject.root):
            found[dtype] = list(find_endings(subject.host, blocks, inputs).values())
    for dtype in (torch.bfloat16, torch.float16):
        for ours, theirs in zip(found[dtype], found[torch.float32], strict=True):
            if kind == "longt5" and dtype is torch.float16 and isinstance(ours, str):
                continue
            assert isinstance(ours, str) == isinstance(theirs, str)
            if not isinstance(ours, str):
                assert (ours.map, ours.batch_norm, ours.final) == (theirs.map, theirs.batch_norm, theirs.final)
                torch.testing.assert_close(
                    ours.scale, theirs.scale, rtol=0.02, atol=0.02 * float(theirs.scale.abs().max())
                )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "resnet", "t5", "vit"])
def test_models_of_numbers_with_few_digits_are_healed_as_others(kind, dtype):
    """How their blocks end is found, and what is left is what is left of the same model in float32."""
    left = {}
    for number in (torch.float32, dtype):
        model = ZOO[kind].model().to(number)
        batches = [
            {name: value.to(number) if value.is_floating_point() else value for name, value in batch.items()}
            for batch in ZOO[kind].batches(count=4, size=16)
        ]
        name, index = removable(model)
        pruned = copy.deepcopy(model)
        remove_blocks(pruned, {name: [index]})
        (healing,) = heal_model(pruned, model, batches, progress=False)
        assert healing.reason is None, str(healing)
        left[number] = healing.held_out
    assert left[dtype] == pytest.approx(left[torch.float32], rel=0.05, abs=0.02)


def test_a_part_that_makes_a_cache_by_its_config_is_healed():
    """BLIP's forward takes no use_cache, its text decoder makes one all the same: blocks are run again by themselves,
    and what was cached would be attended to twice.
    """
    config = tf.BlipConfig(
        text_config={**TEXT, "encoder_hidden_size": 32, "projection_dim": 32, "max_position_embeddings": 32},
        vision_config={**IMAGE, "projection_dim": 32},
    )
    torch.manual_seed(0)
    model = as_trained(spread(tf.BlipForConditionalGeneration(config))).eval()
    assert config.text_config.use_cache and "use_cache" not in inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "pixel_values": torch.randn(4, 3, 32, 32, generator=generator),
            "input_ids": torch.randint(5, VOCAB, (4, 8), generator=generator),
        }
        for _ in range(6)
    ]
    stack = "text_decoder.bert.encoder.layer"
    pruned = copy.deepcopy(model)
    remove_blocks(pruned, {stack: [2]}, example=batches[0])
    unhealed = copy.deepcopy(pruned)
    (healing,) = heal_model(pruned, model, batches, progress=False)
    assert healing.reason is None and healing.ending is not None
    with torch.no_grad():
        whole, before, after = (each(**batches[0]).logits for each in (model, unhealed, pruned))
    assert (after - whole).square().mean() < (before - whole).square().mean()
    assert model.text_decoder.config.use_cache and pruned.text_decoder.config.use_cache


def test_a_block_that_cannot_be_run_again_is_left_alone():
    """One that keeps something of the pass that it was in (a cache of its own)."""
    model = ZOO["bert"].model()
    block, calls = model.bert.encoder.layer[1], []

    def once(*_):
        calls.append(None)
        if len(calls) > 1:
            raise RuntimeError("the sizes differ")

    block.register_forward_pre_hook(once)
    subject = describe(model)
    inputs = next(Calibration(ZOO["bert"].batches(count=1), 100).inputs(subject.host))
    with evaluating(subject.root):
        found = find_endings(subject.host, list(model.bert.encoder.layer), inputs)
    assert found[block] == "it cannot be run by itself (RuntimeError: the sizes differ)"
    assert not any(isinstance(ending, str) for other, ending in found.items() if other is not block)


def test_a_map_that_runs_on_tokens_of_two_kinds_is_left_alone():
    """PEGASUS-X runs its feed-forward maps on the text, and on global tokens by themselves."""
    config = tf.PegasusXConfig(
        **{**SEQ2SEQ, "encoder_layers": 3, "decoder_layers": 2},
        block_size=8,
        num_global_tokens=4,
        stagger_local_blocks=True,
    )
    torch.manual_seed(0)
    model = as_trained(spread(tf.PegasusXForConditionalGeneration(config))).eval()
    subject = describe(model)
    with evaluating(subject.root):
        inputs = {"input_ids": torch.randint(5, VOCAB, (2, 16)), "decoder_input_ids": torch.randint(5, VOCAB, (2, 6))}
        found = find_endings(subject.host, list(model.model.encoder.layers), inputs)
    assert all(isinstance(ending, str) and "runs more than once" in ending for ending in found.values())
