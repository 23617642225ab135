"""Plans: worked by hand where the answer is known, by brute force over all thresholds where a target is given.

JSON, tables and replan: test_plan_files.py.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping

import pytest

from deeparc_hf import MPruneConfig
from deeparc_hf.errors import PlanError
from deeparc_hf.pruning.plan import ComparedStack, first_threshold, freezing_set, make_plan

Matrix = tuple[tuple[float, ...], ...]


def matrix(length: int, value: Callable[[int, int], float]) -> Matrix:
    """A symmetric matrix with `value(i, j)` for i < j."""
    return tuple(tuple(1.0 if i == j else value(min(i, j), max(i, j)) for j in range(length)) for i in range(length))


def alike(length: int) -> ComparedStack:
    return ComparedStack(matrix(length, lambda i, j: 0.99))


def by_leader(*similarities: float) -> ComparedStack:
    """One cluster whose block i + 1 has the i-th similarity to block 0, and 0.5 to all others."""
    return ComparedStack(matrix(len(similarities) + 1, lambda i, j: similarities[j - 1] if i == 0 else 0.5))


def random_stacks(seed: int, *lengths: int, pinned: bool = False) -> dict[str, ComparedStack]:
    rng = random.Random(seed)
    compared = {}
    for number, length in enumerate(lengths):
        values = {pair: rng.uniform(0.0, 0.999) for pair in itertools.combinations(range(length), 2)}
        pins = {rng.randrange(length): "planted"} if pinned else {}
        compared[f"stack{number}"] = ComparedStack(matrix(length, lambda i, j, v=values: v[i, j]), pins)
    return compared


def plan_one(compared: ComparedStack, **settings):
    return make_plan({"enc": compared}, MPruneConfig(**settings)).stacks["enc"]


# --- clusters and stride ----------------------------------------------------------------------------------------------

# neighbours are all 0.99 alike, but a block two away is only 0.9 alike, and one three away 0.8
DRIFT = ComparedStack(matrix(6, lambda i, j: {1: 0.99, 2: 0.9, 3: 0.8}.get(j - i, 0.1)))


@pytest.mark.parametrize(
    ("linkage", "threshold", "clusters", "removed"),
    [
        ("leader", 0.98, ((0, 1), (2, 3), (4, 5)), (1, 3, 5)),
        ("leader", 0.85, ((0, 1, 2), (3, 4, 5)), (1, 2, 4, 5)),
        ("leader", 0.8, ((0, 1, 2, 3), (4, 5)), (1, 2, 3, 5)),
        ("adjacent", 0.98, ((0, 1, 2, 3, 4, 5),), (1, 2, 3, 4, 5)),
        ("adjacent", 0.995, ((0,), (1,), (2,), (3,), (4,), (5,)), ()),
    ],
)
def test_linkages_differ_where_similarity_drifts(linkage, threshold, clusters, removed):
    stack = plan_one(DRIFT, linkage=linkage, threshold=threshold)
    assert stack.clusters == clusters
    assert stack.removed == removed
    assert stack.threshold == threshold


def test_adjacent_breaks_where_the_leader_does_not():
    # 1 and 2 differ from each other, but both are like 0
    compared = ComparedStack(matrix(3, lambda i, j: 0.99 if i == 0 else 0.2))
    assert plan_one(compared, linkage="leader").clusters == ((0, 1, 2),)
    assert plan_one(compared, linkage="adjacent").clusters == ((0, 1), (2,))


def test_threshold_is_inclusive():
    assert plan_one(by_leader(0.98), threshold=0.98).removed == (1,)
    assert plan_one(by_leader(0.9799999), threshold=0.98).removed == ()


@pytest.mark.parametrize(
    ("k", "keep", "removed"),
    [
        (1, "leader", (1, 2, 3, 4, 5, 6)),
        (2, "leader", (1, 3, 5)),
        (3, "leader", (1, 4)),
        (9, "leader", (1,)),
        (1, "last", (0, 1, 2, 3, 4, 5)),
        (2, "last", (1, 3, 5)),
        (3, "last", (2, 5)),
    ],
)
def test_stride_in_one_cluster_of_seven(k, keep, removed):
    assert plan_one(alike(7), k=k, keep=keep).removed == removed


@pytest.mark.parametrize(("k", "removed"), [(1, (1, 2, 3, 5, 6)), (2, (1, 3, 5)), (3, (1, 5))])
def test_stride_starts_anew_in_each_cluster(k, removed):
    compared = ComparedStack(matrix(7, lambda i, j: 0.99 if (i < 4) == (j < 4) else 0.1))
    stack = plan_one(compared, k=k)
    assert stack.clusters == ((0, 1, 2, 3), (4, 5, 6))
    assert stack.removed == removed
    assert stack.kept == tuple(i for i in range(7) if i not in removed)


# --- what must stay ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["leader", "last"])
@pytest.mark.parametrize("linkage", ["leader", "adjacent"])
@pytest.mark.parametrize("settings", [{"threshold": 0.5}, {"num_blocks": 3}, {"threshold": 0.5, "k": 2}], ids=str)
def test_pinned_blocks_stay(settings, linkage, keep):
    pinned = {0: "owns the bias", 3: "changes shape"}
    stack = plan_one(ComparedStack(alike(6).similarity, pinned), linkage=linkage, keep=keep, **settings)
    assert not set(stack.removed) & set(pinned)
    assert stack.removed
    assert dict(stack.pinned) == pinned


@pytest.mark.parametrize(
    ("protect", "stay"),
    [
        ("enc.3", {0, 3}),
        (["enc.1", "enc.4"], {0, 1, 4}),
        ("enc.[23]", {0, 2, 3}),
        ("*.5", {0, 5}),
        ("enc.1*", {0, 1, 10, 11}),
        ("enc.*", set(range(12))),
    ],
)
def test_protected_blocks_stay(protect, stay):
    stack = plan_one(alike(12), protect=protect)
    assert set(stack.kept) == stay
    assert set(stack.protected) <= stay


@pytest.mark.parametrize("pattern", ["enc.12", "encoder.*", "ENC.1", "1", ""])
def test_pattern_that_matches_nothing_is_an_error(pattern):
    with pytest.raises(PlanError, match=rf"protect: '{pattern.replace('*', '.')}' matches no block.*enc\.0") as caught:
        plan_one(alike(12), protect=("enc.1", pattern))
    assert repr(pattern) in str(caught.value)


@pytest.mark.parametrize(
    ("min_blocks", "removed"), [(1, (1, 2, 3, 4)), (2, (1, 3, 4)), (3, (3, 4)), (4, (4,)), (5, ()), (9, ())]
)
def test_min_blocks_spares_the_least_similar(min_blocks, removed):
    assert plan_one(by_leader(0.985, 0.981, 0.995, 0.999), min_blocks=min_blocks).removed == removed


def test_min_blocks_counts_in_each_stack():
    plan = make_plan({"a": alike(5), "b": alike(3)}, MPruneConfig(min_blocks=2))
    assert [len(stack.kept) for stack in plan.stacks.values()] == [2, 2]


@pytest.mark.parametrize(
    "bad",
    [((1.0, 0.5),), ((1.0, float("nan")), (float("nan"), 1.0)), ((1.0, float("inf")), (float("inf"), 1.0))],
    ids=str,
)
def test_similarities_that_are_no_finite_square_are_refused_by_name(bad):
    with pytest.raises(PlanError, match="similarity matrix of enc"):
        plan_one(ComparedStack(bad))


@pytest.mark.parametrize("seed", range(20))
def test_first_block_always_stays_and_no_stack_empties(seed):
    compared = random_stacks(seed, 3, 8, 12)
    for step in range(1, 40):
        for linkage, k in itertools.product(("leader", "adjacent"), (1, 2, 3)):
            plan = make_plan(compared, MPruneConfig(threshold=step / 40, linkage=linkage, k=k))
            assert all(stack.kept[0] == 0 for stack in plan.stacks.values())
        last = make_plan(compared, MPruneConfig(threshold=step / 40, keep="last"))
        assert all(stack.kept[-1] == len(stack) - 1 for stack in last.stacks.values())


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("linkage", ["leader", "adjacent"])
def test_clusters_are_runs_that_cover_the_stack(seed, linkage):
    for threshold in (0.01, 0.3, 0.6, 0.9):
        stack = plan_one(random_stacks(seed, 9)["stack0"], threshold=threshold, linkage=linkage)
        assert list(itertools.chain(*stack.clusters)) == list(range(9))
        assert sorted((*stack.kept, *stack.removed)) == list(range(9))


# --- targets ----------------------------------------------------------------------------------------------------------


def reference_removal(
    compared: Mapping[str, ComparedStack], threshold: float, linkage: str, k: int
) -> dict[tuple[str, int], float]:
    """What a threshold removes, with each block's similarity to its cluster's leader."""
    gone = {}
    for name, stack in compared.items():
        leader, position = 0, 0
        for index in range(1, len(stack)):
            anchor = leader if linkage == "leader" else index - 1
            if stack.similarity[anchor][index] < threshold:
                leader, position = index, 0
                continue
            position += 1
            if (position - 1) % k == 0 and index not in stack.pinned:
                gone[name, index] = stack.similarity[leader][index]
    return gone


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("linkage", ["leader", "adjacent"])
@pytest.mark.parametrize("seed", range(6))
def test_target_is_met_exactly_at_the_highest_threshold_that_suffices(seed, linkage, k):
    compared = random_stacks(seed, 5, 7, pinned=True)
    every = sorted({v for stack in compared.values() for row in stack.similarity for v in row}, reverse=True)
    candidates = sorted({*every, *((a + b) / 2 for a, b in itertools.pairwise(every))}, reverse=True)
    removals = {t: reference_removal(compared, t, linkage, k) for t in candidates}
    for stay in range(1, 13):
        wanted = 12 - stay
        feasible = [t for t in candidates if len(removals[t]) >= wanted]
        if not feasible:
            with pytest.raises(PlanError):
                make_plan(compared, MPruneConfig(num_blocks=stay, linkage=linkage, k=k))
            continue
        plan = make_plan(compared, MPruneConfig(num_blocks=stay, linkage=linkage, k=k))
        found = {(name, index) for name, indices in plan.removed.items() for index in indices}
        assert plan.num_kept == stay
        assert {stack.threshold for stack in plan.stacks.values()} == {max(feasible)}
        assert found <= set(removals[max(feasible)])
        if linkage == "leader":  # those most similar to their leader go first
            ranked = sorted(removals[max(feasible)], key=removals[max(feasible)].__getitem__, reverse=True)
            assert found == set(ranked[:wanted])


@pytest.mark.parametrize(
    ("stay", "removed", "threshold"),
    [(5, (), 1.0), (4, (1,), 0.95), (3, (3, 4), 0.9), (2, (1, 3, 4), 0.9), (1, (1, 2, 3, 4), 0.9)],
)
def test_most_similar_go_first(stay, removed, threshold):
    # above 0.9 block 2 is a leader, which 3 and 4 do not resemble; so 0.9 removes them all at once, and the most
    # similar are taken
    stack = plan_one(by_leader(0.95, 0.9, 0.97, 0.99), num_blocks=stay)
    assert (stack.removed, stack.threshold) == (removed, threshold)


def test_target_over_all_stacks_takes_from_where_similarity_is_highest():
    compared = {"a": by_leader(0.95, 0.91), "b": by_leader(0.99, 0.93)}
    plan = make_plan(compared, MPruneConfig(num_blocks=4))
    assert plan.removed == {"a": (1,), "b": (1,)}
    assert make_plan(compared, MPruneConfig(num_blocks=5)).removed == {"b": (1,)}
    assert make_plan(compared, MPruneConfig(num_blocks=3)).removed == {"a": (1,), "b": (1, 2)}


def test_target_by_stack_leaves_the_unnamed_alone():
    compared = {"a": by_leader(0.95, 0.91, 0.9), "b": by_leader(0.99, 0.93), "c": alike(4)}
    plan = make_plan(compared, MPruneConfig(num_blocks={"a": 2, "b": 2}))
    assert plan.removed == {"a": (1, 2), "b": (1,)}
    assert {name: stack.threshold for name, stack in plan.stacks.items()} == {"a": 0.91, "b": 0.99, "c": 1.0}


@pytest.mark.parametrize(("ratio", "kept"), [(1.0, 12), (0.75, 9), (0.5, 6), (0.34, 4), (0.25, 3)])
def test_keep_ratio_is_a_share_of_all_blocks(ratio, kept):
    assert make_plan(random_stacks(3, 5, 7), MPruneConfig(keep_ratio=ratio)).num_kept == kept


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"num_blocks": 1},
            ["keeps 1 of 12", "enc, dec", "at most 8 can go", "Keep at least 4", "k=1", "min_blocks=1", "pinned"],
        ),
        ({"keep_ratio": 0.01}, ["keeps 0 of 12", "at most 8", "Keep at least 4"]),
        ({"num_blocks": 4, "min_blocks": 3}, ["at most 6", "Keep at least 6", "min_blocks=3", "lower k or min_blocks"]),
        ({"num_blocks": 4, "k": 2}, ["k=2", "Keep at least"]),
        ({"num_blocks": 4, "protect": "dec.*"}, ["protected", "at most 4", "Keep at least 8"]),
        ({"num_blocks": 13}, ["13 blocks", "only 12", "at most 12"]),
        ({"num_blocks": {"dec": 9}}, ["9 blocks in dec", "only 6"]),
        ({"num_blocks": {"dec": 1}}, ["keeps 1 of 6 blocks in dec", "at most 4", "Keep at least 2"]),
        ({"num_blocks": {"decoder": 2}}, ["'decoder'", "not a stack", "enc, dec"]),
    ],
    ids=str,
)
def test_target_out_of_reach_names_the_limits(settings, parts):
    # of each stack block 0 stays as a leader and block 4 because it is pinned
    compared = {name: ComparedStack(alike(6).similarity, {4: "owns the bias"}) for name in ("enc", "dec")}
    with pytest.raises(PlanError) as caught:
        make_plan(compared, MPruneConfig(**settings))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_the_limit_that_the_error_names_can_be_reached(seed, k):
    compared = random_stacks(seed, 6, 8, pinned=True)
    with pytest.raises(PlanError) as caught:
        make_plan(compared, MPruneConfig(num_blocks=1, k=k))
    least = int(re.search(r"Keep at least (\d+)", str(caught.value))[1])
    assert make_plan(compared, MPruneConfig(num_blocks=least, k=k)).num_kept == least
    with pytest.raises(PlanError):
        make_plan(compared, MPruneConfig(num_blocks=least - 1, k=k))


# --- partial freezing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("removed", "frozen"),
    [
        ((), ()),
        ((2,), (0, 4, 5, 6, 7)),
        ((2, 3), (0, 5, 6, 7)),
        ((2, 4), (0, 6, 7)),
        ((1, 5, 6), (3,)),
        ((6, 7), (0, 1, 2, 3, 4)),
        ((0, 1), (3, 4, 5, 6, 7)),
        ((1, 2, 3, 4, 5, 6, 7), ()),
    ],
)
def test_blocks_beside_a_site_are_trained_and_all_others_frozen(removed, frozen):
    assert freezing_set({"enc": removed}, {"enc": 8}, {"enc": None}) == {"enc": frozen}


@pytest.mark.parametrize(
    ("removed", "frozen"),
    [
        ({"a": (3,)}, {"a": (0, 1), "b": (1, 2), "c": (0, 1)}),  # the block after it opens the next stage
        ({"a": (1,)}, {"a": (3,), "b": (0, 1, 2), "c": (0, 1)}),
        ({"a": (3,), "b": (0,)}, {"a": (0, 1), "b": (2,), "c": (0, 1)}),  # one site across the border
        ({"b": (0,)}, {"a": (0, 1, 2), "b": (2,), "c": (0, 1)}),  # the block before it closes the stage before
        ({"c": (1,)}, {"a": (0, 1, 2, 3), "b": (0, 1, 2), "c": ()}),  # nothing takes c's output
        ({}, {"a": (), "b": (), "c": ()}),
        ({"a": ()}, {"a": (), "b": (), "c": ()}),
    ],
    ids=str,
)
def test_sites_reach_into_the_stage_beside(removed, frozen):
    assert freezing_set(removed, {"a": 4, "b": 3, "c": 2}, {"a": "b", "b": "c", "c": None}) == frozen


def test_plan_freezes_only_when_asked():
    compared = {"a": ComparedStack(DRIFT.similarity, next_stack="b"), "b": ComparedStack(matrix(3, lambda i, j: 0.1))}
    assert make_plan(compared, MPruneConfig()).num_frozen == 0
    plan = make_plan(compared, MPruneConfig(freeze="partial"))
    assert plan.removed == {"a": (1, 3, 5)}
    assert {name: stack.frozen for name, stack in plan.stacks.items()} == {"a": (), "b": (1, 2)}
    assert make_plan(compared, MPruneConfig(freeze="partial", threshold=1.0)).num_frozen == 0


def test_which_block_stays_decides_where_similarity_depends_on_it():
    """As by effect: block 1 is hard to do without, so that it may stand for its neighbours, but not they for it."""
    values = ((1.0, 0.5, 0.5), (0.99, 1.0, 0.99), (0.5, 0.5, 1.0))
    compared = {"a": ComparedStack(values)}
    first = make_plan(compared, MPruneConfig(threshold=0.9))
    assert first.stacks["a"].clusters == ((0,), (1, 2)) and first.removed == {"a": (2,)}
    last = make_plan(compared, MPruneConfig(threshold=0.9, keep="last"))
    assert last.stacks["a"].clusters == ((0, 1), (2,)) and last.removed == {"a": (0,)}
    for keep, gone in (("leader", 2), ("last", 0)):
        plan = make_plan(compared, MPruneConfig(num_blocks=2, keep=keep))
        assert plan.removed == {"a": (gone,)} and plan.stacks["a"].threshold == 0.99


def test_the_first_threshold_removes_one_block_and_of_one_block_there_is_none():
    stack = by_leader(0.9, 0.7)
    plan = make_plan({"a": stack}, MPruneConfig(threshold=1.0))
    first = first_threshold(plan)
    assert len(make_plan({"a": stack}, MPruneConfig(threshold=first)).removed["a"]) == 1
    assert not make_plan({"a": stack}, MPruneConfig(threshold=min(1.0, first + 1e-9))).removed
    assert first_threshold(make_plan({"a": alike(1)}, MPruneConfig(threshold=0.5))) is None
