"""`search_blocks` end to end: what it finds, what it leaves alone, where it stops."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import transformers as tf

from deeparc_hf import Frontier, PruningPlan, analyze, apply_plan, find_stacks, search_blocks
from deeparc_hf.errors import CalibrationError, CalibrationWarning, ConfigError, PlanError, SurgeryError
from deeparc_hf.observe.forward import evaluating
from deeparc_hf.search.strategies import strategies
from deeparc_hf.search.strategies.exchange import Exchange
from deeparc_hf.search.timing import BlockTimes
from deeparc_hf.search.workbench import Workbench
from tests.zoo import TEXT, ZOO, as_trained, spread

from .judging import divergence
from .test_workbench import bench_of

QUICK = {"measure_times": False, "progress": False}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def total(model) -> int:
    return sum(map(len, find_stacks(model).values()))


def state_of(model):
    """All that a search must leave alone."""
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        [(name, module.training, sorted(vars(module))) for name, module in model.named_modules()],
        [[len(getattr(module, hooks)) for hooks in HOOKS] for module in model.modules()],
        [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()],
        model.config.to_dict(),
        torch.get_rng_state(),
    )


def same(one, other) -> bool:
    return (
        all(torch.equal(value, other[0][key]) for key, value in one[0].items())
        and one[1:5] == other[1:5]
        and torch.equal(one[5], other[5])
    )


def still(module) -> None:
    """Make a block of a model whose blocks add to their input one that adds nothing."""
    with torch.no_grad():
        for part in module.modules():
            if hasattr(part, "weight") and getattr(part.weight, "ndim", 0) == 2:
                part.weight.zero_()
                if getattr(part, "bias", None) is not None:
                    part.bias.zero_()


@pytest.mark.parametrize("kind", ["bert", "t5", "resnet"])
def test_the_model_is_left_as_it_is_and_smaller_ones_are_judged_as_they_are(kind):
    model, batches = ZOO[kind].model().train(), ZOO[kind].batches(count=4, size=16)
    before, seen = state_of(model), []

    def evaluate(smaller) -> float:
        assert not torch.is_grad_enabled() and not smaller.training
        assert "forward" not in {name for module in smaller.modules() for name in vars(module)}
        seen.append(smaller if smaller is model else copy.deepcopy(smaller))
        return float(total(smaller))

    frontier = search_blocks(model, batches, evaluate=evaluate, **QUICK)
    assert same(before, state_of(model)) and model.training
    assert [p.num_blocks for p in frontier.points] == list(range(total(model), -(-total(model) // 2) - 1, -1))
    assert seen[0] is model and len(seen) == len(frontier.points)
    assert [point.metric for point in frontier.points] == [point.num_blocks for point in frontier.points]
    others = ZOO[kind].batches(count=8, size=16, seed=2)
    for point, smaller in zip(frontier.points, seen, strict=True):
        low, high = point.interval
        assert low <= point.value <= high and frontier.samples == 64
        assert point.parameters == sum(p.numel() for p in smaller.parameters())
        assert 0.5 * low <= divergence(model, smaller, others) <= 1.5 * high  # on samples of their own
    gone = [{(n, i) for n, indices in point.removed.items() for i in indices} for point in frontier.points]
    assert [len(blocks) for blocks in gone] == list(range(len(gone)))
    assert frontier.complete and frontier.passes > 1 and frontier.work is None


def test_a_search_that_fails_leaves_the_model_alone_too():
    model, batches, calls = ZOO["bert"].model().train(), ZOO["bert"].batches(), []
    before = state_of(model)

    def evaluate(smaller) -> float:
        calls.append(smaller)
        if len(calls) == 2:
            raise ZeroDivisionError
        return 0.0

    with pytest.raises(ZeroDivisionError):
        search_blocks(model, batches, evaluate=evaluate, **QUICK)
    assert same(before, state_of(model))


@pytest.mark.parametrize("heal", ["lstsq", None])
@pytest.mark.parametrize("search", strategies.names())
@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_blocks_that_do_nothing_are_found_first(kind, search, heal):
    model = ZOO[kind].model()
    (stack,) = find_stacks(model).values()
    for index in (1, 3):
        still(stack.blocks[index])
    frontier = search_blocks(model, ZOO[kind].batches(), search=search, heal=heal, num_blocks=1, **QUICK)
    assert frontier.search == search
    assert frontier.points[2].removed == {stack.name: (1, 3)}
    assert [point.value for point in frontier.points[:3]] == pytest.approx([0, 0, 0], abs=1e-5)
    assert frontier.points[3].value > 1e-3


def test_repairs_find_another_block_than_bare_removals():
    """One block adds a large constant, which the block before it can take over; another adds little, but not a linear
    function of anything.
    """
    model = ZOO["gpt2"].model()
    first, second = model.transformer.h[2], model.transformer.h[3]
    still(first)
    with torch.no_grad():
        first.mlp.c_proj.bias.normal_(0, 2)
        for part in (second.attn.c_proj, second.mlp.c_proj):
            part.weight.mul_(0.2)
    found = {}
    for heal in ("lstsq", None):
        frontier = search_blocks(model, ZOO["gpt2"].batches(count=8), heal=heal, num_blocks=3, protect=["*.1"], **QUICK)
        found[heal] = frontier.points[1]
        assert frontier.plan.config.heal == heal
    assert found["lstsq"].removed == {"transformer.h": (2,)} and found[None].removed == {"transformer.h": (3,)}
    assert found["lstsq"].value < 1e-2 * found[None].value


def test_what_is_redundant_with_a_repair_alone_is_found_by_the_search_and_not_by_likeness():
    """Block 2 adds a vector times a linear function of its normed input: a good deal, and nothing that the block before
    it could not add too. Block 3 adds less, and nothing linear.
    """
    model, batches = ZOO["gpt2"].model(), ZOO["gpt2"].batches(count=12)
    planted, generator = model.transformer.h[2], torch.Generator().manual_seed(0)
    still(planted)
    with torch.no_grad():
        planted.mlp.c_fc.weight[:, 0] = torch.randn(32, generator=generator) * 0.5
        planted.mlp.c_fc.bias[0] = 12.0  # there gelu is a straight line
        planted.mlp.c_proj.weight[0] = torch.randn(32, generator=generator) * 0.5
        planted.mlp.c_proj.bias.copy_(-12.0 * planted.mlp.c_proj.weight[0])
    settings = {"num_blocks": 3, "protect": ["*.1"]}
    healed, bare = (search_blocks(model, batches, heal=heal, **settings, **QUICK).points[1] for heal in ("lstsq", None))
    assert healed.removed == {"transformer.h": (2,)} and bare.removed == {"transformer.h": (3,)}
    assert healed.value < 0.1 * bare.value
    for similarity in ("cka", "cosine", "effect"):
        plan = analyze(model, batches, similarity=similarity, progress=False, **settings)
        assert plan.removed == {"transformer.h": (3,)}


@pytest.mark.parametrize(
    ("kind", "blocks", "left", "most"),
    [
        ("bert", 12, 6, 30),
        pytest.param("llama", 30, 20, 120, marks=pytest.mark.slow),
        pytest.param("llama", 80, 72, 30, marks=pytest.mark.slow),  # 60 if all were tried at each step
    ],
)
def test_what_a_search_costs(kind, blocks, left, most):
    """In forward passes over all samples: what makes it cheap enough to be the default advice."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": blocks}
    shared = {**sizes, "vocab_size": 120, "pad_token_id": 0}
    if kind == "bert":
        model = tf.BertForSequenceClassification(tf.BertConfig(**shared))
    else:
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**shared, num_key_value_heads=2))
    batches = ZOO[kind].batches(count=16, size=32)
    frontier = search_blocks(spread(model), batches, num_blocks=left, **QUICK)
    assert len(frontier.points) == blocks - left + 1
    assert frontier.passes <= most, frontier.passes


@pytest.mark.parametrize("greater", [True, False])
def test_the_users_metric_can_be_what_is_sought(greater):
    """A metric that likes models without block 3, then those without block 2: nothing else would find them."""
    model = ZOO["bert"].model()
    marks = [block.output.dense.weight[0, 1].item() for block in model.bert.encoder.layer]

    def evaluate(smaller) -> float:
        assert smaller.config.num_hidden_layers == total(smaller)
        left = {block.output.dense.weight[0, 1].item() for block in smaller.bert.encoder.layer}
        score = sum(worth for worth, mark in zip((0, 0, 1, 3), marks, strict=True) if mark not in left)
        return float(score if greater else -score)

    assert len(set(marks)) == 4
    frontier = search_blocks(
        model,
        ZOO["bert"].batches(),
        objective="metric",
        evaluate=evaluate,
        greater_is_better=greater,
        heal=None,
        **QUICK,
    )
    removed = [point.removed.get("bert.encoder.layer", ()) for point in frontier.points]
    assert removed == [(), (3,), (2, 3)]
    assert [point.value for point in frontier.points] == [0.0, -3.0, -4.0]
    plan = analyze(
        model,
        ZOO["bert"].batches(),
        search="greedy",
        objective="metric",
        evaluate=evaluate,
        greater_is_better=greater,
        num_blocks=2,
        progress=False,
    )
    assert plan.removed == {"bert.encoder.layer": (2, 3)}


def test_a_metric_needs_who_measures_it_and_the_other_way_round():
    model, batches = ZOO["bert"].model(), ZOO["bert"].batches()
    with pytest.raises(ConfigError, match=r"objective='metric' is what evaluate=\.\.\. of analyze or search_blocks"):
        search_blocks(model, batches, objective="metric", **QUICK)
    with pytest.raises(ConfigError, match=r"objective='metric' is what evaluate=\.\.\. of analyze or search_blocks"):
        analyze(model, batches, search="greedy", objective="metric", num_blocks=3)
    for settings in ({"num_blocks": 3}, {"num_blocks": 3, "search": "greedy"}):
        with pytest.raises(ConfigError, match="Give search='greedy' and objective='metric', or leave evaluate out"):
            analyze(model, batches, evaluate=lambda smaller: 0.0, **settings)


def test_an_evaluation_that_leaves_the_model_training_changes_nothing():
    model, batches = ZOO["bert"].model(), ZOO["bert"].batches()

    def evaluate(smaller) -> float:
        smaller.train()
        return 0.5

    plain = search_blocks(model, batches, **QUICK)
    measured = search_blocks(model, batches, evaluate=evaluate, **QUICK)
    assert [(p.removed, p.value) for p in measured.points] == [(p.removed, p.value) for p in plain.points]


def test_a_metric_that_is_no_number_is_left_out_and_told():
    model = ZOO["bert"].model()
    with pytest.warns(CalibrationWarning, match="evaluate gave nan for a model"):
        frontier = search_blocks(
            model, ZOO["bert"].batches(), evaluate=lambda m: float("nan") if total(m) == 3 else 1.0, **QUICK
        )
    for each in (frontier, Frontier.from_json(frontier.to_json())):
        assert [point.metric for point in each.points] == [1.0, None, 1.0]
        assert each.choose(max_drop=0.0).num_kept == 2


@pytest.mark.filterwarnings("ignore:evaluate gave nan")
def test_a_journal_of_a_candidate_without_a_metric_can_be_gone_on_with(tmp_path):
    settings = {"objective": "metric", "evaluate": unsure, "heal": None, "journal": tmp_path / "j", **QUICK}
    first, second = (search_blocks(ZOO["bert"].model(), ZOO["bert"].batches(), **settings) for _ in range(2))
    assert [p.removed for p in first.points] == [p.removed for p in second.points]
    assert Frontier.from_json(first.to_json()).points[-1].num_blocks == 2 and "on 1 samples" not in str(first)
    with pytest.raises(ConfigError, match="is of another search: objective differ"):
        search_blocks(ZOO["bert"].model(), ZOO["bert"].batches(), **settings, greater_is_better=False)


def unsure(model) -> float:
    return float("nan") if total(model) == 3 and model.bert.encoder.layer[1].output.dense.weight[0, 0] > 0 else 1.0


@pytest.mark.parametrize("change", ["weights", "config"])
def test_a_journal_of_another_model_is_refused(tmp_path, change):
    model, batches = ZOO["bert"].model(), ZOO["bert"].batches()
    search_blocks(model, batches, journal=tmp_path / "j", **QUICK)
    if change == "weights":
        with torch.no_grad():
            model.bert.encoder.layer[2].output.dense.weight[9:].zero_()
    else:
        model.config.layer_norm_eps = 0.5
    with pytest.raises(ConfigError, match=f"is of another search: {change} differ"):
        search_blocks(model, batches, journal=tmp_path / "j", **QUICK)


@pytest.mark.parametrize("settings", [{"num_blocks": 4}, {"keep_ratio": 1.0}, {"keep_ratio": 0.9}])
def test_where_nothing_is_to_go_the_plan_removes_nothing(settings):
    plan = analyze(ZOO["bert"].model(), ZOO["bert"].batches(), search="greedy", progress=False, **settings)
    assert not plan.removed and plan.num_kept == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_blocks": [3, 2]}, "num_blocks lists 2 targets"),
        ({"num_blocks": 9}, "num_blocks asks for 9 blocks"),
        ({"num_blocks": {"nope": 2}}, "names 'nope', which is not a stack"),
        ({"max_drop": 0.1}, "judged after a retraining"),
    ],
)
def test_targets_that_a_plan_cannot_have_are_refused_as_without_a_search(settings, message):
    with pytest.raises((PlanError, ConfigError), match=message):
        analyze(ZOO["bert"].model(), ZOO["bert"].batches(), search="greedy", progress=False, **settings)


@pytest.mark.parametrize("settings", [{"num_blocks": 3}, {"speedup": 1.05}])
def test_a_plan_tells_the_measured_time_beside_the_predicted_one(settings, monkeypatch):
    timed = []

    def compare(whole, smaller, work):
        timed.append(tuple(sum(map(len, find_stacks(host.root).values())) for host in (whole, smaller)))
        return 1.01, (1.0, 1.02)  # less than what was asked for: the plan stands

    monkeypatch.setattr("deeparc_hf.search.found.compare_times", compare)
    plan = analyze(ZOO["bert"].model(), ZOO["bert"].batches(), search="greedy", progress=False, **settings)
    assert timed == [(4, plan.num_blocks - sum(map(len, plan.removed.values())))]
    assert plan.choice.measured == 1.01 and plan.choice.speedup > 1.0
    assert f"1.01 times as fast (by the times of its blocks {plan.choice.speedup:.2f})" in str(plan)
    again = PruningPlan.from_dict(plan.to_dict())
    assert again.choice == plan.choice


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, TypeError])
def test_a_model_that_cannot_be_copied_is_not_timed(error):
    """A time decides nothing."""
    model = ZOO["bert"].model()

    class Single:
        def __deepcopy__(self, memo):
            raise error("not twice")

    model.extra = Single()
    plan = analyze(model, ZOO["bert"].batches(), search="greedy", progress=False, num_blocks=3)
    assert plan.choice.measured is None and "times as fast" in str(plan.choice) and "by the times" not in str(plan)


def test_a_new_plan_of_a_searched_one_is_one_by_similarity():
    frontier = search_blocks(ZOO["bert"].model(), ZOO["bert"].batches(), **QUICK)
    plan = frontier.choose(num_blocks=2)
    assert plan.config.search == "greedy" and plan.choice is not None
    again = plan.replan(num_blocks=3)
    assert again.config.search is None and again.choice is None and again.num_kept == 3


def test_ctrl_c_in_a_plan_or_a_training_is_no_answer():
    """It ends what asked for the plan, and does not go on with half a search."""
    model, calls = ZOO["bert"].model(), []
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def interrupt(module, args):
        calls.append(module)
        if len(calls) == stop:
            raise KeyboardInterrupt

    handle = model.classifier.register_forward_pre_hook(interrupt)
    for stop in (10, 40, 60):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            analyze(model, ZOO["bert"].batches(), search="greedy", heal="lstsq", num_blocks=1, progress=False)
        assert len(calls) == stop and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    handle.remove()


def test_ctrl_c_gives_what_was_found():
    model, batches, calls = ZOO["bert"].model(), ZOO["bert"].batches(), []

    def evaluate(smaller) -> float:
        calls.append(smaller)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 0.5

    before = state_of(model)
    with pytest.warns(CalibrationWarning, match=r"broken off after 1 of 3 numbers of blocks"):
        frontier = search_blocks(model, batches, evaluate=evaluate, num_blocks=1, **QUICK)
    assert same(before, state_of(model)) and not frontier.complete
    whole = search_blocks(model, batches, num_blocks=3, **QUICK)
    assert [point.removed for point in frontier.points] == [point.removed for point in whole.points]
    assert frontier.choose(num_blocks=3).num_kept == 3
    calls[:] = [None, None]
    with pytest.raises(KeyboardInterrupt):  # nothing was found
        search_blocks(model, batches, evaluate=evaluate, num_blocks=1, **QUICK)


def test_a_value_that_is_too_large_ends_the_search():
    model, batches = ZOO["bert"].model(), ZOO["bert"].batches()
    values = [point.value for point in search_blocks(model, batches, heal=None, num_blocks=1, **QUICK).points]
    assert len(values) == 4
    for limit in values:
        frontier = search_blocks(model, batches, heal=None, num_blocks=1, max_value=limit, **QUICK)
        expected = [0.0, *itertools.takewhile(lambda value, limit=limit: value <= limit, values[1:])]
        assert [point.value for point in frontier.points] == expected and frontier.complete
    assert len(expected) > 1


@pytest.fixture(scope="module")
def refined():
    """A model, its batches, and by number of removed blocks the sets that exchanges find, the first one first; of some
    number a better one comes later, and no fewer blocks cost as much as the first.
    """
    for seed in range(10):
        torch.manual_seed(seed)
        config = tf.BertConfig(**{**TEXT, "num_hidden_layers": 6})
        model = as_trained(spread(tf.BertForSequenceClassification(config)))
        batches, found = ZOO["bert"].batches(8), {}
        blocks = [("bert.encoder.layer", index) for index in range(6)]
        with evaluating(model):
            bench = bench_of(model, batches, heals=False)
            for node in Exchange().run(bench, lambda gone, all=blocks: [b for b in all if b not in gone], 4):
                found.setdefault(len(node.removed), []).append(node)
        if brought_down(found):
            return model, batches, found
    raise AssertionError("there is no such model")


def brought_down(found):
    """Numbers of removed blocks of which the first set costs too much for some bound, and no other set that counts."""
    best = {count: min(node.score.value for node in nodes) for count, nodes in found.items()}
    first = {count: nodes[0].score.value for count, nodes in found.items()}
    return [
        count
        for count in found
        if best[count] < first[count] and all(best[less] < first[count] for less in range(1, count))
    ]


def test_a_value_that_an_exchange_brings_down_does_not_end_the_search(refined):
    model, batches, found = refined
    for count in brought_down(found):
        best = min(node.score.value for node in found[count])
        least = max([best, *(min(node.score.value for node in found[less]) for less in range(1, count))])
        limit = (found[count][0].score.value + least) / 2
        settings = {"search": "exchange", "heal": None, "num_blocks": 2, "max_value": limit, **QUICK}
        frontier = search_blocks(model, batches, **settings)
        assert frontier.points[count].value == pytest.approx(best) and frontier.complete
        assert all(point.value <= limit for point in frontier.points)


@pytest.mark.parametrize("search", ["exchange", "evolution"])
def test_a_set_that_is_fast_enough_is_kept_beside_a_better_one_that_is_not(refined, search, monkeypatch):
    """As in a model whose blocks take different times."""
    model, batches, found = refined
    for count in brought_down(found):
        first, best = found[count][0], min(found[count], key=lambda node: node.score.value)
        fast = first.removed - best.removed
        blocks = [("bert.encoder.layer", index) for index in range(6)]
        times = BlockTimes(1.0, {block: 0.2 if block in fast else 0.05 for block in blocks}, "made up", 1)
        monkeypatch.setattr("deeparc_hf.search.found.time_blocks", lambda *args, times=times: times)
        wanted = times.speedup(first.removed) - 1e-6
        assert times.speedup(best.removed) < wanted
        plan = analyze(model, batches, speedup=wanted, search=search, heal=None, progress=False)
        assert plan.choice.speedup >= wanted
        assert sum(map(len, plan.removed.values())) <= len(first.removed)


def test_a_search_for_a_speed_up_goes_no_further_than_it_must(monkeypatch):
    model, seen = ZOO["bert"].model(), []
    times = BlockTimes(1.0, {("bert.encoder.layer", index): 0.2 for index in range(4)}, "made up", 1)
    monkeypatch.setattr("deeparc_hf.search.found.time_blocks", lambda *args: times)
    follow = Workbench.follow

    def noted(self, removed, base):
        seen.append(len(removed))
        return follow(self, removed, base)

    monkeypatch.setattr(Workbench, "follow", noted)
    plan = analyze(model, ZOO["bert"].batches(), speedup=1.2, progress=False)
    assert sum(map(len, plan.removed.values())) == 1 and set(seen) == {1}


def test_what_measures_sees_the_whole_model_as_it_is():
    """Repairs of a candidate are in it while the candidate is computed."""
    model, batches = ZOO["bert"].model(), ZOO["bert"].batches()
    before, seen = state_of(model), []

    def evaluate(smaller) -> float:
        seen.append(same(before, state_of(model)))
        return -divergence(model, smaller, batches)

    for objective in ("metric", "divergence"):
        frontier = search_blocks(model, batches, objective=objective, evaluate=evaluate, **QUICK)
        assert all(seen) and len(seen) >= 3 and frontier.whole.metric == 0.0
        seen.clear()
    frontier = search_blocks(model, batches, objective="metric", evaluate=evaluate, **QUICK)
    assert [point.value for point in frontier.points[1:]] == [-point.metric for point in frontier.points[1:]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "evaluate must give a number, found None"),
        ({"eval_loss": 0.5, "eval_accuracy": 1.0}, r"Give one of its entries: 'eval_loss', 'eval_accuracy'"),
        (torch.ones(2), "evaluate must give a number, found tensor"),
        ("good", "evaluate must give a number, found 'good'"),
    ],
    ids=str,
)
def test_an_evaluation_that_gives_no_number_is_refused_before_any_work(value, message):
    model = ZOO["bert"].model()
    with pytest.raises(ConfigError, match=message):
        search_blocks(model, ZOO["bert"].batches(), evaluate=lambda smaller: value, **QUICK)


@pytest.mark.parametrize("search", strategies.names())
def test_what_is_pinned_protected_or_needed_stays(search):
    model, batches = ZOO["t5"].model(), ZOO["t5"].batches()
    settings = {"protect": ["encoder.block.2"], "min_blocks": 2, "num_blocks": 1}
    frontier = search_blocks(model, batches, search=search, **settings, **QUICK)
    assert frontier.points[-1].removed["encoder.block"] == (1, 3)
    assert [len(point.removed.get("decoder.block", ())) for point in frontier.points][-1] == 1
    assert frontier.points[-1].num_blocks == 4 and frontier.plan.config.protect == ("encoder.block.2",)
    assert frontier.plan_of(frontier.points[-1]).stacks["encoder.block"].protected == (2,)


def test_samples_are_those_that_were_asked_for():
    frontier = search_blocks(ZOO["bert"].model(), ZOO["bert"].batches(), samples=40, num_blocks=3, **QUICK)
    assert frontier.plan.samples == frontier.samples == 40
    bare = search_blocks(ZOO["bert"].model(), ZOO["bert"].batches(), samples=40, heal=None, num_blocks=3, **QUICK)
    assert bare.samples == 40


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"search": "greddy"}, ConfigError, "Did you mean 'greedy'"),
        ({"objective": "divergense"}, ConfigError, "Did you mean 'divergence'"),
        ({"heal": "lsq"}, ConfigError, "Did you mean 'lstsq'"),
        ({"num_blocks": 0}, ConfigError, "must be a whole number from 1, found 0"),
        ({"num_blocks": {"bert.encoder.layer": 3}}, ConfigError, "must be a whole number from 1, found {"),
        ({"num_blocks": "3"}, ConfigError, "found '3'"),
        ({"num_blocks": 4}, PlanError, r"has 4 blocks, found 4\. Give a smaller number"),
        ({"max_value": float("nan")}, ConfigError, "max_value must be a finite number"),
        ({"min_blocks": 0}, ConfigError, "min_blocks must be at least 1"),
        ({"samples": 0}, ConfigError, "^samples must be a whole number from 1, found 0"),
        ({"protect": None}, ConfigError, "protect must be"),
        ({"evaluate": "accuracy"}, ConfigError, "it must be a function, found 'accuracy'"),
        ({"samples": 1}, CalibrationError, "only 1 calibration sample"),
        ({"protect": "*"}, PlanError, r"The search is to remove 2 of 4 blocks, and 0 may go"),
        ({"protect": ["nothing"]}, PlanError, "matches no block"),
        ({"freeze": ["nothing"]}, PlanError, "matches no block"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        search_blocks(ZOO["bert"].model(), ZOO["bert"].batches(), **{**QUICK, **settings})


def test_a_wrapped_model_is_refused():
    class DistributedDataParallel(torch.nn.DataParallel):
        """As far as its name goes."""

    with pytest.raises(SurgeryError, match="wrapped in DistributedDataParallel"):
        search_blocks(DistributedDataParallel(ZOO["bert"].model()), ZOO["bert"].batches(), **QUICK)


def test_data_that_is_none_is_refused():
    with pytest.raises(CalibrationError, match=r"must be batches, in a list or a DataLoader, found NoneType"):
        search_blocks(ZOO["bert"].model(), None, **QUICK)


def test_a_frontier_is_no_plan():
    model = ZOO["bert"].model()
    frontier = search_blocks(model, ZOO["bert"].batches(), num_blocks=3, heal=None, **QUICK)
    with pytest.raises(PlanError, match=r"found Frontier\. Make one: .* frontier\.choose\(\.\.\.\)"):
        apply_plan(model, frontier)
    assert total(model) == 4


def test_numbers_of_numpy_are_numbers():
    settings = {"num_blocks": np.int64(3), "max_value": np.float32(100.0), "samples": np.int32(40)}
    frontier = search_blocks(ZOO["bert"].model(), ZOO["bert"].batches(), heal=None, **settings, **QUICK)
    assert frontier.points[-1].num_blocks == 3 and frontier.samples == 40
    assert analyze(ZOO["bert"].model(), ZOO["bert"].batches(), num_blocks=np.int64(3), progress=False).num_kept == 3
