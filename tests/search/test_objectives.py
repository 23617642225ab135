"""Every registered objective: nothing for the whole model, more with damage, by sample, without padding; intervals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from deeparc_hf import search_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.errors import CalibrationError
from deeparc_hf.observe.calibration import Calibration
from deeparc_hf.observe.forward import evaluating
from deeparc_hf.search.objectives import Answer, AnswerObjective, Score, objectives
from tests.zoo import ZOO

KINDS = ["bert", "gpt2", "resnet", "t5"]
OF_ANSWERS = [name for name in objectives.names() if issubclass(objectives.get(name), AnswerObjective)]
BY_SAMPLE = [name for name in OF_ANSWERS if name != "loss"]  # a batch has one loss


def answer_of(model, batch, labels=True) -> Answer:
    """What a model makes of a batch."""
    subject = describe(model)
    (inputs,) = Calibration([batch], 10**6).inputs(subject.host)
    hidden, handles = {}, []
    for name, stack in subject.stacks.items():

        def note(module, args, output, name=name):
            hidden[name] = output[0] if isinstance(output, tuple) else output

        handles.append(stack.blocks[-1].register_forward_hook(note))
    with evaluating(model):
        given = inputs if labels else {key: value for key, value in inputs.items() if key != "labels"}
        output = model(**given)
    for handle in handles:
        handle.remove()
    return Answer(subject.host, inputs, output, hidden, {name: stack.side for name, stack in subject.stacks.items()})


def labelled(model, batch):
    """A batch whose labels are what the whole model would say."""
    if "labels" in batch:
        del batch["labels"]
        batch["decoder_input_ids"] = torch.randint(5, 100, (8, 7), generator=torch.Generator().manual_seed(3))
    with evaluating(model):
        logits = model(**batch).logits
    labels = logits.argmax(dim=-1)
    if model.config.model_type == "gpt2":
        labels = torch.cat([labels[:, :1], labels[:, :-1]], dim=1).masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


def damaged(model, share: float):
    """A copy whose weights inside the blocks are off by a share of their size."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for stack in describe(other).stacks.values():
            for parameter in (p for block in stack.blocks for p in block.parameters() if p.ndim > 1):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(share * parameter.std() * noise)
    return other


def scores(name, model, batch, shares=(0.0, 0.02, 0.1, 0.5)) -> list[Score]:
    objective = objectives.get(name)()
    wanted = objective.wanted(answer_of(model, batch))
    return [Score.of([objective.losses(answer_of(damaged(model, share), batch), wanted)]) for share in shares]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OF_ANSWERS)
def test_the_whole_model_is_best_and_damage_costs(name, kind):
    assert objectives.get(name).summary and objectives.get(name).unit
    model = ZOO[kind].model()
    batch = labelled(model, ZOO[kind].batches(1)[0])
    found = scores(name, model, batch)
    if objectives.get(name).needs_labels:
        assert found[0].value == pytest.approx(float(answer_of(model, batch).output.loss), rel=1e-6)
    else:
        assert found[0].value == pytest.approx(0, abs=1e-9)
        assert [score.value for score in found] == sorted(score.value for score in found)
    assert found[-1].value > found[0].value + 0.01
    assert all(score.losses.dtype == torch.float64 and score.losses.shape == score.weights.shape for score in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BY_SAMPLE)
def test_each_sample_has_a_loss_of_its_own(name, kind):
    model = ZOO[kind].model()
    batch = ZOO[kind].batches(1)[0]
    (whole,) = scores(name, model, batch, (0.5,))
    parts = [scores(name, model, {k: v[i : i + 2] for k, v in batch.items()}, (0.5,))[0] for i in range(0, 8, 2)]
    assert whole.samples == 8
    for key in ("losses", "weights"):
        found = torch.cat([getattr(part, key) for part in parts], dim=1)
        torch.testing.assert_close(found, getattr(whole, key), rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("name", BY_SAMPLE)
def test_padding_does_not_count(name, kind):
    model = ZOO[kind].model()
    batch = ZOO[kind].batches(1)[0]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert not mask.all()
    longer = {**batch, "input_ids": torch.cat([ids, torch.zeros(8, 3, dtype=torch.long)], dim=1)}
    longer["attention_mask"] = torch.cat([mask, torch.zeros(8, 3, dtype=torch.long)], dim=1)
    other = {**batch, "input_ids": torch.where(mask.bool(), ids, 7)}  # what stands there does not matter either
    (whole,) = scores(name, model, batch, (0.5,))
    for padded in (longer, other):
        (found,) = scores(name, model, padded, (0.5,))
        torch.testing.assert_close(found.losses, whole.losses, rtol=2e-3, atol=1e-7)
        torch.testing.assert_close(found.weights, whole.weights, rtol=2e-3, atol=1e-7)


def test_a_loss_that_is_not_there_is_refused():
    with pytest.raises(CalibrationError, match=r"BertForSequenceClassification puts out none.*objective='divergence'"):
        search_blocks(ZOO["bert"].model(), ZOO["bert"].batches(), objective="loss", progress=False)


# ---- intervals ----


def jackknife(values: np.ndarray) -> float:
    """Half of the 95 % interval, from the values without each sample."""
    n = len(values)
    return 1.959964 * np.sqrt((n - 1) / n * np.square(values - values.mean()).sum())


def without_each(losses: np.ndarray, weights: np.ndarray) -> np.ndarray:
    found = []
    for left_out in range(losses.shape[1]):
        rest = [i for i in range(losses.shape[1]) if i != left_out]
        found.append(sum(losses[row, rest].sum() / weights[row, rest].sum() for row in range(len(losses))))
    return np.array(found)


def made_up(seed: int, outputs: int = 2, samples: int = 30) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.gamma(2, 1, (outputs, samples)), rng.integers(1, 9, (outputs, samples)).astype(float)


def test_values_and_intervals_are_those_of_the_jackknife():
    losses, weights = made_up(0)
    score = Score.of([(torch.tensor(losses[:, i : i + 10]), torch.tensor(weights[:, i : i + 10])) for i in (0, 10, 20)])
    value = sum(losses[row].sum() / weights[row].sum() for row in range(2))
    half = jackknife(without_each(losses, weights))
    assert score.samples == 30 and score.value == pytest.approx(value, rel=1e-12)
    assert score.interval == pytest.approx((value - half, value + half), rel=1e-9)
    assert 0.02 < half / value < 0.5


def test_a_difference_is_measured_sample_by_sample():
    one, other = made_up(1), made_up(1)
    other[0][:] += 0.3 * one[1] + np.random.default_rng(2).normal(0, 0.01, one[0].shape)
    scores = [Score(*map(torch.tensor, pair)) for pair in (other, one)]
    value, (low, high) = scores[0].difference(scores[1])
    half = jackknife(without_each(*other) - without_each(*one))
    assert value == pytest.approx(scores[0].value - scores[1].value) == pytest.approx(0.6, abs=0.01)
    assert (low, high) == pytest.approx((value - half, value + half), rel=1e-6)
    assert high - low < 0.1 * (scores[1].interval[1] - scores[1].interval[0])  # what both have in common is no doubt


def test_intervals_cover_what_they_are_to_cover():
    """Of 400 sets of 60 samples each, about 95 % have the true mean in their interval."""
    rng, hits = np.random.default_rng(3), 0
    for _ in range(400):
        losses = rng.gamma(4, 1, (1, 60))
        low, high = Score(torch.tensor(losses), torch.ones(1, 60, dtype=torch.float64)).interval
        hits += low <= 4 <= high
    assert 0.90 < hits / 400 < 0.985


def test_one_sample_has_no_interval_and_nothing_over_nothing_is_no_loss():
    one = Score(torch.ones(1, 1).double(), torch.ones(1, 1).double())
    assert one.value == 1 and one.interval is None and one.difference(one) == (0, None)
    assert Score(torch.zeros(1, 3).double(), torch.zeros(1, 3).double()).value == 0


def test_a_model_that_overflows_is_worse_than_any_other():
    bad = torch.tensor([[1.0, float("nan"), float("inf")]]).double()
    score = Score.of([(bad, torch.ones(1, 3).double())])
    assert 1e29 < score.value < 1e31 and all(map(np.isfinite, score.interval))
