"""Clusters that go on from stack to stack: plans without a model."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from deeparc_hf import MPruneConfig, PruningPlan
from deeparc_hf.errors import PlanError
from deeparc_hf.pruning.plan import ComparedStack, check_possible, make_plan


def network(similarity, lengths, pinned=()):
    """A chain of stacks "a", "b", ... with the similarities of all blocks."""
    compared, first = {}, 0
    names = "abcdef"[: len(lengths)]
    for position, (name, length) in enumerate(zip(names, lengths, strict=True)):
        rows = similarity[first : first + length]
        compared[name] = ComparedStack(
            similarity=tuple(map(tuple, rows[:, first : first + length])),
            before=tuple(map(tuple, rows[:, :first])) if first else (),
            pinned={index: "changes the shape" for owner, index in pinned if owner == name},
            next_stack=names[position + 1] if position + 1 < len(names) else None,
        )
        first += length
    return compared


def random_similarity(count, seed):
    draw = np.random.default_rng(seed)
    places = np.cumsum(draw.uniform(0, 0.1, count))
    return np.exp(-np.abs(places[:, None] - places[None, :]))


def settings(**more):
    return MPruneConfig(rows="flat", across_stacks=True, **more)


def test_a_leader_lies_in_an_earlier_stack():
    ones = np.ones((5, 5))
    plan = make_plan(network(ones, (2, 3), pinned=[("a", 0), ("b", 0)]), settings(threshold=0.9))
    assert plan.removed == {"a": (1,), "b": (1, 2)}
    assert plan.stacks["a"].leader is None
    assert plan.stacks["b"].leader == "a.0"
    assert plan.stacks["b"].clusters == ((0, 1, 2),)
    assert "(a.0) 0-2" in str(plan)


def test_the_stride_goes_on_from_stack_to_stack():
    plan = make_plan(network(np.ones((6, 6)), (3, 3)), settings(threshold=0.9, k=2))
    assert plan.removed == {"a": (1,), "b": (0, 2)}  # members 1, 3 and 5 of one cluster of six


def test_without_the_setting_clusters_end_with_their_stack():
    plan = make_plan(network(np.ones((6, 6)), (3, 3)), settings(threshold=0.9, k=2)).replan(across_stacks=False)
    assert plan.removed == {"a": (1,), "b": (1,)}
    assert plan.stacks["b"].leader is None


def test_min_blocks_counts_in_each_stack():
    plan = make_plan(network(np.ones((6, 6)), (3, 3)), settings(threshold=0.9, min_blocks=2))
    assert [len(stack.kept) for stack in plan.stacks.values()] == [2, 2]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("linkage", ["leader", "adjacent"])
@pytest.mark.parametrize("keep", ["leader", "last"])
def test_one_long_stack_gives_the_same(seed, linkage, keep):
    """A chain is clustered as one stack of all its blocks would be."""
    similarity = random_similarity(12, seed)
    shared = {"threshold": 0.85, "linkage": linkage, "keep": keep, "k": 1 + seed % 3}
    whole = make_plan(network(similarity, (12,)), settings(**shared))
    parts = make_plan(network(similarity, (4, 5, 3)), settings(**shared, min_blocks=1))
    places = list(itertools.chain(*([(name, i) for i in range(n)] for name, n in (("a", 4), ("b", 5), ("c", 3)))))
    gone = {places[index] for index in whole.removed.get("a", ())}
    found = {(name, index) for name, indices in parts.removed.items() for index in indices}
    # a stack is never left without a block, which one long stack knows nothing of
    assert found <= gone
    assert all(len(parts.stacks[name].kept) == 1 for name, _ in gone - found)


def test_a_target_is_reached_over_all_stacks():
    plan = make_plan(network(random_similarity(9, 1), (3, 3, 3)), settings(num_blocks=5))
    assert plan.num_kept == 5
    assert len({stack.threshold for stack in plan.stacks.values()}) == 1


def test_stacks_that_do_not_feed_each_other_stay_apart():
    ones = np.ones((4, 4))
    compared = network(ones, (2, 2))
    compared["a"] = ComparedStack(compared["a"].similarity)  # an encoder, say
    plan = make_plan(compared, settings(threshold=0.9))
    assert plan.removed == {"a": (1,), "b": (1,)}


def test_json_keeps_it_all():
    plan = make_plan(network(random_similarity(9, 2), (3, 3, 3)), settings(threshold=0.8), samples=64, batch_size=16)
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert again.replan(num_blocks=6) == plan.replan(num_blocks=6)


def test_plans_without_these_entries_are_read():
    plan = make_plan(network(random_similarity(6, 3), (3, 3)), MPruneConfig(threshold=0.9), samples=64)
    data = json.loads(plan.to_json())
    assert "batch_size" not in data  # nor are they written where there is nothing to say
    for stack in data["stacks"].values():
        assert "leader" not in stack
        stack.pop("before", None)
    assert PruningPlan.from_dict(data).removed == plan.removed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stack: stack.update(before=[[1.0, 1.0, 1.0]]), "3 rows"),
        (lambda stack: stack.update(before=[[1.0, 1.0, 1.0], [1.0], [1.0, 1.0, 1.0]]), "a list of 3 finite numbers"),
        (lambda stack: stack.update(before=[[1e30] * 3] * 3), "at most 1e"),
        (lambda stack: stack.update(leader=7), "leader"),
    ],
)
def test_malformed_entries_are_refused(change, message):
    plan = make_plan(network(random_similarity(6, 3), (3, 3)), settings(threshold=0.9), samples=64)
    data = json.loads(plan.to_json())
    change(data["stacks"]["b"])
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_dict(data)


def test_what_is_not_known_is_refused():
    compared = network(np.ones((4, 4)), (2, 2))
    for before in ((), ((1.0,), (1.0,))):
        compared["b"] = ComparedStack(compared["b"].similarity, before=before)
        with pytest.raises(PlanError, match=r"is not known\. Run analyze with rows='flat'"):
            make_plan(compared, settings(threshold=0.9))


def test_what_can_be_is_known_before_anything_is_compared():
    blank = network(np.zeros((6, 6)), (3, 3), pinned=[("a", 0), ("b", 0)])
    check_possible(blank, settings(num_blocks=2))
    with pytest.raises(PlanError, match="at most 4 can go"):
        check_possible(blank, settings(num_blocks=1))
