"""The effect of blocks: skipped by hooks, against an independent reference that removes them and computes in
float64.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from deeparc_hf import analyze, find_stacks, remove_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.errors import CalibrationError, CalibrationWarning, ConfigError
from deeparc_hf.observe.calibration import Calibration
from deeparc_hf.observe.collect import Observed
from deeparc_hf.observe.skipping import StackSkipper, skip_blocks
from deeparc_hf.similarity import SkippingMetric, metrics
from deeparc_hf.similarity.divergence import Head
from deeparc_hf.similarity.effect import MOST, ROWS, Effect, effects, remaining
from tests.architectures.test_planted_truth import plant
from tests.cli.cli_tools import checkpoints, data, own_cache, run  # noqa: F401
from tests.zoo import TEXT, ZOO, Specimen, spread

NAMES = [metric.name for metric in metrics if issubclass(metric, SkippingMetric)]
HEADLESS = Specimen(lambda: tf.BertModel(tf.BertConfig(**TEXT)), "text")
SPECIMENS = {name: ZOO[name] for name in ("bert", "t5", "gpt2", "llama", "resnet", "timm_vit", "whisper")} | {
    "headless": HEADLESS
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class InProcesses(Calibration):
    """Data that several processes share out, each of which looks at its own in its own way."""

    def __init__(self, looks: list[Callable[[], Any]]) -> None:
        super().__init__([], 10**6)
        self._looks = looks

    def together(self, look: Callable[[], Any]) -> list[Any]:
        return [own() for own in self._looks]


def effects_of(model: nn.Module, given: list[dict[str, Tensor]] | Calibration) -> dict[str, Tensor]:
    """The effect of each block, by stack."""
    calibration = given if isinstance(given, Calibration) else Calibration(given, 10**6)
    subject = describe(model)
    host, stacks = subject.host, subject.stacks
    skippers = [StackSkipper(host, stack, Effect(len(stack))) for stack in stacks.values()]
    _, found = skip_blocks(host, skippers, calibration, progress=False)
    return {name: effects(observed.sums) for name, observed in zip(stacks, found, strict=True)}


# --- an independent reference -----------------------------------------------------------------------------------------


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Rows of what a model puts out, in float64, by what is known of its kind."""
    with torch.no_grad():
        if not hasattr(model, "config"):
            return model(batch["pixel_values"]).double()
        found = model.eval()(**batch)
    value = (found.logits if "logits" in found else found.last_hidden_state).double()
    if value.ndim == 2:
        return value
    if "labels" in batch:
        return value[batch["labels"] != -100]
    return value[batch["attention_mask"].bool()] if "attention_mask" in batch else value.flatten(0, 1)


def distance(found: list[Tensor], wanted: list[Tensor], distributions: bool) -> float:
    ours, theirs = torch.cat(found), torch.cat(wanted)
    if not distributions:
        return float((ours - theirs).square().sum() / theirs.square().sum())
    total = 0.0
    for p, q in zip(theirs.softmax(1).tolist(), ours.softmax(1).tolist(), strict=True):
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return total / len(theirs)


@pytest.mark.parametrize("name", SPECIMENS)
def test_effects_equal_those_of_removed_blocks(name):
    specimen = SPECIMENS[name]
    model, batches = specimen.model(), specimen.batches(4)
    for batch in batches:
        if "labels" in batch:
            batch["labels"][:3, 4:] = -100
    found = effects_of(model, batches)
    wanted = [output(model, batch) for batch in batches]
    for stack_name, stack in find_stacks(model).items():
        for index in range(len(stack)):
            if index in stack.pinned:
                assert found[stack_name][index] == 0
                continue
            smaller = copy.deepcopy(model)
            remove_blocks(smaller, {stack_name: [index]})
            expected = distance([output(smaller, batch) for batch in batches], wanted, distributions=name != "headless")
            assert expected > 1e-3  # else the model would not tell right from wrong
            assert float(found[stack_name][index]) == pytest.approx(expected, rel=2e-4, abs=1e-6), (
                f"{stack_name}.{index}"
            )


def test_labels_say_which_positions_of_a_causal_model_count():
    """Position t predicts the label at t + 1."""
    specimen = ZOO["llama"]
    model, (batch,) = specimen.model(), specimen.batches(1, 40)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :3] = -100  # a prompt
    found = effects_of(model, [{**batch, "labels": labels}])["model.layers"]
    counted = torch.cat([labels[:, 1:] != -100, torch.zeros(40, 1, dtype=torch.bool)], dim=1)
    smaller = copy.deepcopy(model)
    remove_blocks(smaller, {"model.layers": [2]})
    with torch.no_grad():
        wanted, removed = (m(**batch).logits.double()[counted] for m in (model, smaller))
    assert float(found[2]) == pytest.approx(distance([removed], [wanted], True), rel=2e-4)


def test_several_labels_at_once_are_distributions_of_their_own():
    torch.manual_seed(0)
    config = tf.BertConfig(**TEXT, num_labels=3, problem_type="multi_label_classification")
    model, batches = spread(tf.BertForSequenceClassification(config)).eval(), ZOO["bert"].batches(4)
    smaller = copy.deepcopy(model)
    remove_blocks(smaller, {"bert.encoder.layer": [1]})
    ours, theirs = (torch.cat([output(m, batch) for batch in batches]).sigmoid() for m in (smaller, model))
    divergences = theirs * (theirs / ours).log() + (1 - theirs) * ((1 - theirs) / (1 - ours)).log()
    found = effects_of(model, batches)["bert.encoder.layer"]
    assert float(found[1]) == pytest.approx(float(divergences.mean()), rel=2e-4)


# --- the matrix -------------------------------------------------------------------------------------------------------


def test_the_matrix_by_hand():
    effect = torch.tensor([0.1, 0.2, 0.4, 0.8], dtype=torch.float64)
    gone = [[0.0, 0.2, 0.6, 1.4], [0.1, 0.0, 0.4, 1.2], [0.3, 0.2, 0.0, 0.8], [0.7, 0.6, 0.4, 0.0]]
    torch.testing.assert_close(
        remaining(effect), torch.exp(-torch.tensor(gone, dtype=torch.float64)), rtol=1e-12, atol=0
    )


def test_the_matrix_of_extremes_is_finite():
    effect = torch.tensor([math.inf, -1e-9, 1e9, math.inf, 0.0], dtype=torch.float64)
    matrix = remaining(effect)
    assert bool(torch.isfinite(matrix).all()) and bool((matrix <= 1).all())
    assert matrix[0, 1] == matrix[3, 4] == 1 and matrix[1, 2] < 1e-300


def test_something_where_nothing_was_is_the_greatest_effect():
    metric = Effect(2)
    metric.update(1, [Head("x", "values", torch.zeros(4, 3))], [Head("x", "values", torch.ones(4, 3))])
    assert effects(metric.finish()).tolist() == [0.0, MOST]


# --- the contract, over every registered metric of this kind ----------------------------------------------------------


def heads(rows: int, kind: str = "softmax", seed: int = 0) -> tuple[list[Head], list[list[Head]]]:
    """Outputs of a model, and with each of 4 blocks skipped, ever further away."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(rows, 7, generator=generator)
    steps = [full + size * torch.randn(rows, 7, generator=generator) for size in (0.1, 0.2, 0.4, 0.8)]
    return [Head("out", kind, full)], [[Head("out", kind, step)] for step in steps]


def part(given: list[Head], start: int, stop: int) -> list[Head]:
    return [Head(head.name, head.kind, head.values[start:stop]) for head in given]


def sums_of(name: str, full: list[Head], skipped: list[list[Head]], size: int) -> dict[str, Tensor]:
    metric = metrics.get(name)(len(skipped))
    for start in range(0, len(full[0].values), size):
        for block, found in enumerate(skipped):
            metric.update(block, part(full, start, start + size), part(found, start, start + size))
    return metric.finish()


@pytest.mark.parametrize("name", NAMES)
def test_describes_itself(name):
    metric = metrics.get(name)
    assert metric.name == name and metric.summary and "\n" not in metric.summary
    assert metric.rows == "outputs" and metric.min_rows >= 1


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "values"])
@pytest.mark.parametrize("name", NAMES)
def test_contract(name, kind):
    full, skipped = heads(2 * ROWS + 100, kind)
    whole = sums_of(name, full, skipped, 10**6)
    assert all(value.dtype == torch.float64 for value in whole.values())
    before = {key: value.clone() for key, value in whole.items()}
    matrix = metrics.get(name).matrix(whole)
    assert all(torch.equal(whole[key], before[key]) for key in before)
    assert matrix.shape == (4, 4) and matrix.dtype == torch.float64
    assert torch.equal(matrix.diagonal(), torch.ones(4, dtype=torch.float64))
    assert bool((matrix <= 1).all())
    assert matrix[0, 1] > matrix[1, 2] > matrix[2, 3]  # of blocks by themselves
    assert matrix[0, 1] > matrix[0, 2] > matrix[0, 3]  # of ever more
    for size in (1, 7, ROWS):
        torch.testing.assert_close(
            metrics.get(name).matrix(sums_of(name, full, skipped, size)), matrix, rtol=0, atol=1e-6
        )
    halves = [
        sums_of(name, part(full, a, b), [part(s, a, b) for s in skipped], 64) for a, b in ((0, ROWS), (ROWS, 10**6))
    ]
    assert whole.keys() == halves[0].keys()
    for key, value in whole.items():
        torch.testing.assert_close(halves[0][key] + halves[1][key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_without_rows_nothing_has_an_effect(name):
    assert torch.equal(metrics.get(name).matrix(metrics.get(name)(3).finish()), torch.ones(3, 3, dtype=torch.float64))


# --- in models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "timm_vit"])
def test_a_planted_identity_is_the_one_that_goes(name):
    specimen = ZOO[name]
    model = specimen.model()
    ((stack_name, stack),) = find_stacks(model).items()
    plant(stack.blocks[2], None)
    assert abs(float(effects_of(model, specimen.batches())[stack_name][2])) < 1e-6
    for settings in ({}, {"keep": "last"}, {"linkage": "adjacent"}):
        plan = analyze(model, specimen.batches(), similarity="effect", num_blocks=3, progress=False, **settings)
        assert plan.removed == {stack_name: (2,)}
    assert "effect, rows=outputs, 48 samples" in str(plan)


def test_padding_does_not_matter():
    specimen = ZOO["llama"]
    model, batches = specimen.model(), specimen.batches()
    padded = [{key: nn.functional.pad(value, (0, 5)) for key, value in batch.items()} for batch in batches]
    found, expected = effects_of(model, padded), effects_of(model, batches)
    torch.testing.assert_close(found["model.layers"], expected["model.layers"], rtol=1e-4, atol=1e-6)


def test_blocks_that_work_in_place_are_given_back_what_they_got():
    class InPlace(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return x.copy_(self.block(x))

    specimen = ZOO["timm_vit"]
    model, batches = specimen.model(), specimen.batches()
    expected = effects_of(model, batches)["blocks"]
    subject = describe(model)
    host, stacks = subject.host, subject.stacks
    stack = stacks["blocks"]
    for index, block in enumerate(stack.blocks):
        stack.container[index] = InPlace(block)
    skipper = StackSkipper(host, stack, Effect(len(stack)))
    _, (found,) = skip_blocks(host, [skipper], Calibration(batches, 100), progress=False)
    torch.testing.assert_close(effects(found.sums), expected)


def test_processes_add_up():
    """Also where one has no data."""
    specimen = ZOO["bert"]
    model, batches = specimen.model(), specimen.batches()
    whole = effects_of(model, batches)["bert.encoder.layer"]
    subject = describe(model)
    host, stacks = subject.host, subject.stacks
    stack = stacks["bert.encoder.layer"]

    def seen(share: list[dict[str, Tensor]]) -> tuple[int, list[Observed]]:
        skipper = StackSkipper(host, stack, Effect(len(stack)))
        for batch in share:
            with torch.no_grad():
                skipper.take(batch, [Head("logits", "softmax", model(**batch).logits)])
        return sum(len(batch["input_ids"]) for batch in share), [skipper.observed()]

    for shares in ([batches[:2], batches[2:]], [batches, []]):
        found = effects_of(model, InProcesses([partial(seen, share) for share in shares]))["bert.encoder.layer"]
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=0)


def test_the_command_line_takes_it(capsys, checkpoints, data, tmp_path):  # noqa: F811
    common = ("prune", checkpoints / "bert", "--data", data / "d.csv", "--num-blocks", "3", "--similarity", "effect")
    code, out, _ = run(capsys, *common, "-o", tmp_path / "out", "--dry-run")
    assert code == 0 and "effect, rows=outputs" in out
    assert "By effect (rows: outputs) on 64 calibration samples" in (tmp_path / "out" / "report.md").read_text()
    code, _, error = run(capsys, *common, "--rows", "mean", "--dry-run")
    assert code != 0 and "Leave rows out" in error


# --- the model is left as it was, and what cannot be compared is refused ----------------------------------------------


@pytest.mark.parametrize("failure", [None, OSError, KeyboardInterrupt])
def test_the_model_and_the_random_states_are_left_as_they_were(failure):
    specimen = ZOO["bert"]
    model, batches = specimen.model().train(), specimen.batches()
    model.bert.encoder.layer[2].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = count_hooks(model)
    calls = []

    def break_off(module, args):
        calls.append(module)
        if failure is not None and len(calls) > 8:
            raise failure("in the middle of a skipped block")

    handle = model.classifier.register_forward_pre_hook(break_off)
    torch.manual_seed(3), random.seed(3)
    expected = torch.rand(1), random.random()
    torch.manual_seed(3), random.seed(3)
    if failure is None:
        analyze(model, batches, similarity="effect", num_blocks=3, progress=False)
    else:
        with pytest.raises(failure):
            analyze(model, batches, similarity="effect", num_blocks=3, progress=False)
    handle.remove()
    assert (torch.rand(1), random.random()) == expected
    assert count_hooks(model) == hooks
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # one pass, and one for each of 4 blocks
    assert calls[:1] and (failure is not None or len(calls) == len(batches) * 5)


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_what_is_not_finite_is_named():
    specimen = ZOO["bert"]
    model, batches = specimen.model(), specimen.batches()
    handle = model.bert.encoder.layer[2].register_forward_pre_hook(lambda m, args: (args[0] * math.nan, *args[1:]))
    with pytest.raises(
        CalibrationError, match=r"BertForSequenceClassification puts out NaN.*logits, torch\.float32.*Check its weights"
    ):
        analyze(model, batches, similarity="effect")
    handle.remove()
    # only where block 1 does not tame what block 0 puts out
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.weight.zero_()
        model.bert.encoder.layer[2].attention.self.query.weight.fill_(1e38)
    with pytest.raises(CalibrationError, match=r"without block 1 of bert\.encoder\.layer puts out NaN"):
        effects_of(model, batches)


def test_a_block_that_changes_the_shape_cannot_be_skipped():
    specimen = ZOO["timm_resnet"]
    subject = describe(specimen.model())
    host, stacks = subject.host, subject.stacks
    stack = stacks["layer2"]
    assert 0 in stack.pinned
    free = type(stack)(stack.name, stack.container)
    with pytest.raises(
        CalibrationError,
        match=r"Block 0 of layer2 cannot be skipped: it is given a tensor of shape .* no residual block",
    ):
        skip_blocks(
            host, [StackSkipper(host, free, Effect(len(free)))], Calibration(specimen.batches(), 100), progress=False
        )


def test_a_model_that_always_puts_out_the_same_is_refused():
    specimen = ZOO["bert"]
    model = specimen.model()
    nn.init.zeros_(model.classifier.weight)
    with pytest.raises(
        CalibrationError, match=r"BertForSequenceClassification .logits. puts out the same for every calibration sample"
    ):
        analyze(model, specimen.batches(), similarity="effect")


def test_too_little_data_is_refused_or_warned_of():
    specimen = ZOO["bert"]
    model = specimen.model()
    with pytest.raises(CalibrationError, match="gave no samples"):
        analyze(model, [], similarity="effect")
    with pytest.raises(CalibrationError, match="only 1 calibration sample"):
        analyze(model, specimen.batches(1, 1), similarity="effect")
    with pytest.warns(CalibrationWarning, match="only 8 samples"):
        analyze(model, specimen.batches(1, 8), similarity="effect", num_blocks=3)


def test_another_metric_needs_another_pass():
    specimen = ZOO["bert"]
    plan = analyze(specimen.model(), specimen.batches(), similarity="effect", num_blocks=3, progress=False)
    assert (
        plan.replan(keep="last").stacks["bert.encoder.layer"].similarity == plan.stacks["bert.encoder.layer"].similarity
    )
    with pytest.raises(ConfigError, match="cannot change 'similarity'"):
        plan.replan(similarity="cka")
