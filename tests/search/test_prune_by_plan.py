"""Plans of a search carried out by `prune_model`: the model is the one that the search judged."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from deeparc_hf import PrunedConfig, PruningPlan, analyze, find_stacks, prune_model, search_blocks
from deeparc_hf.errors import CalibrationError, ConfigError, PlanError
from tests.zoo import ZOO

from .judging import divergence

KINDS = ["bert", "gpt2", "resnet"]


@pytest.fixture(scope="module", params=KINDS)
def searched(request):
    """A model, its data and its frontier, down to two blocks less."""
    torch.manual_seed(0)
    model = ZOO[request.param].model()
    batches = ZOO[request.param].batches(count=12, size=16)
    fewest = total_blocks(model) - 2
    return (
        request.param,
        model,
        batches,
        search_blocks(model, batches, num_blocks=fewest, measure_times=False, progress=False),
    )


def total_blocks(model) -> int:
    return sum(map(len, find_stacks(model).values()))


def test_the_pruned_model_is_the_one_that_was_planned_and_about_as_good_as_told(searched):
    kind, model, batches, frontier = searched
    for point in frontier.points[1:]:
        smaller = copy.deepcopy(model)
        plan = prune_model(smaller, batches, frontier.choose(num_blocks=point.num_blocks), progress=False)
        assert plan.num_kept == point.num_blocks == total_blocks(smaller)
        assert sum(p.numel() for p in smaller.parameters()) == point.parameters
        # told is what repairs that are fitted on a half give on the other half
        others = ZOO[kind].batches(count=24, size=16, seed=2)
        low, high = point.interval
        assert 0.5 * low < divergence(model, smaller, others) < 1.5 * high


def test_fitted_on_all_samples_it_is_no_worse_on_them(searched):
    _, model, batches, frontier = searched
    smaller = copy.deepcopy(model)
    prune_model(smaller, batches, frontier.plan_of(frontier.points[1]), progress=False)
    assert divergence(model, smaller, batches) <= 1.02 * frontier.points[1].value


@pytest.mark.parametrize("kind", KINDS)
def test_without_repairs_the_pruned_model_is_the_one_that_was_judged(kind):
    model, batches = ZOO[kind].model(), ZOO[kind].batches(count=4, size=16)
    settings = {"num_blocks": total_blocks(model) - 2, "heal": None}
    frontier = search_blocks(model, batches, measure_times=False, progress=False, **settings)
    for point in frontier.points[1:]:
        smaller = copy.deepcopy(model)
        prune_model(smaller, batches, frontier.choose(num_blocks=point.num_blocks), progress=False)
        assert divergence(model, smaller, batches) == pytest.approx(point.value, rel=1e-3)


def test_the_plan_survives_json_and_the_model_carries_the_record(searched):
    _, model, batches, frontier = searched
    plan = frontier.choose(num_blocks=frontier.points[-1].num_blocks)
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan and json.loads(plan.to_json())["choice"]["search"] == "greedy"
    made = [copy.deepcopy(model) for _ in range(2)]
    for smaller, how in zip(made, (plan, again), strict=True):
        assert prune_model(smaller, batches, how, progress=False) is how
    states = [smaller.state_dict() for smaller in made]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    record = PrunedConfig.from_model(made[0])
    assert {name: record.kept[name] for name in plan.removed} == {name: plan.stacks[name].kept for name in plan.removed}
    assert [site["healed"] for site in record.iterations[-1]["healing"]] and record.iterations[-1]["settings"]["heal"]


def test_a_plan_that_does_not_heal_is_the_bare_removal():
    model, batches = ZOO["bert"].model(), ZOO["bert"].batches()
    frontier = search_blocks(model, batches, heal=None, measure_times=False, progress=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = frontier.choose(num_blocks=3)
    prune_model(model, iter(batches), plan, progress=False)
    (index,) = plan.removed["bert.encoder.layer"]
    assert total_blocks(model) == 3 and "healing" not in PrunedConfig.from_model(model).iterations[-1]
    for key, value in model.state_dict().items():
        name, dot, rest = key.partition("bert.encoder.layer.")
        if dot:
            number, _, end = rest.partition(".")
            key = f"{name}{dot}{int(number) + (int(number) >= index)}.{end}"
        assert torch.equal(value, before[key])


def test_a_plan_of_analyze_is_carried_out_too():
    model, batches = ZOO["bert"].model(), ZOO["bert"].batches()
    other = copy.deepcopy(model)
    plan = analyze(model, batches, num_blocks=2, heal="lstsq", progress=False)
    assert prune_model(model, batches, plan, progress=False) == prune_model(
        other, batches, num_blocks=2, heal="lstsq", progress=False
    )
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "data", "settings", "error", "message"),
    [
        ("bert", 2, {"threshold": 0.9}, ConfigError, r"own settings, found threshold beside it.*plan\.replan"),
        ("bert", 0, {}, CalibrationError, "data is empty"),
        ("gpt2", 2, {}, PlanError, r"for a model with 4 blocks in bert\.encoder\.layer"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_changes(kind, data, settings, error, message):
    plan = analyze(ZOO["bert"].model(), ZOO["bert"].batches(), num_blocks=2, heal="lstsq", progress=False)
    model = ZOO[kind].model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        prune_model(model, ZOO[kind].batches(count=data), plan, progress=False, **settings)
    assert total_blocks(model) == 4 and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_iterator_is_refused_where_the_plan_heals():
    plan = analyze(ZOO["bert"].model(), ZOO["bert"].batches(), num_blocks=2, heal="lstsq", progress=False)
    with pytest.raises(CalibrationError, match="an iterator can be used once"):
        prune_model(ZOO["bert"].model(), iter(ZOO["bert"].batches()), plan)


def test_of_neighbours_any_may_go():
    """A search goes by no similarity: what would lead a cluster may go too."""
    model, batches = ZOO["bert"].model(), ZOO["bert"].batches()
    for block in range(4):
        others = [f"bert.encoder.layer.{each}" for each in range(4) if each != block]
        plan = analyze(model, batches, search="greedy", num_blocks=3, protect=others, progress=False)
        assert plan.removed == {"bert.encoder.layer": (block,)}
    settings = {"search": "greedy", "protect": ["bert.encoder.layer.[123]"], "progress": False}
    with pytest.raises(PlanError, match="is to remove 2 of 4 blocks, and 1 may go"):
        analyze(model, batches, num_blocks=2, **settings)
    with pytest.raises(PlanError, match=r"asks for 5 blocks in bert\.encoder\.layer, which has only 4"):
        analyze(model, batches, num_blocks=5, **settings)
    with pytest.raises(PlanError, match="num_blocks names 'layers', which is not a stack of this model"):
        analyze(model, batches, num_blocks={"layers": 2}, **settings)
