"""Which blocks are tried next, where they are many."""

from __future__ import annotations

import pytest
import torch

from deeparc_hf.observe.forward import evaluating
from deeparc_hf.search.objectives import Score
from deeparc_hf.search.strategies import strategies
from deeparc_hf.search.strategies.base import MOST_TRIED, Additions, tried
from deeparc_hf.search.workbench import Node
from tests.zoo import ZOO

from .test_strategies import adding, beside
from .test_workbench import bench_of, free_blocks

SAMPLES = 8


class Told:
    """A bench whose models are as bad as it is told."""

    def __init__(self, value):
        self.value = value
        self.screened = []
        self.root = self._node(frozenset())

    def _score(self, removed, samples=SAMPLES):
        losses = torch.full((1, samples), float(self.value(removed)), dtype=torch.float64)
        return Score(losses, torch.ones_like(losses))

    def _node(self, removed):
        return Node(removed, self._score(removed), lambda: ({}, {}))

    def screen(self, base, blocks):
        self.screened.append([index for _, index in blocks])
        return {block: self._score(base.removed | {block}) for block in blocks}

    def complete(self, scores):
        return dict(sorted(scores.items(), key=lambda entry: entry[1].value))

    def follow(self, removed, base):
        return self._node(removed)


def stack(count):
    return [("layers", index) for index in range(count)]


def steps(bench, count, most, blocks):
    additions, node = Additions(bench, beside(blocks), most), bench.root
    for _ in range(count):
        node = additions.best(node, 1)[0]
    return sorted(index for _, index in node.removed)


def test_all_are_tried_where_they_are_not_many():
    bench = Told(lambda removed: sum(index for _, index in removed))
    assert steps(bench, 3, 6, stack(6)) == [0, 1, 2]
    assert bench.screened == [[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [2, 3, 4, 5]]


def test_of_many_those_that_were_missed_least_come_again_and_those_beside_the_new_gap():
    worth = {0: 9, 1: 8, 2: 0, 3: 7, 4: 1, 5: 2, 6: 3, 7: 4, 8: 5, 9: 6}
    bench = Told(lambda removed: sum(worth[index] for _, index in removed))
    assert steps(bench, 3, 4, stack(10)) == [2, 4, 5]
    # 2 goes: 1 and 3 are beside it, 4 and 5 the best of the others; 4 goes: 3 again (it would join both), and 5
    assert bench.screened == [list(range(10)), [1, 3, 4, 5], [3, 5, 6, 7]]


def test_a_block_that_costs_little_once_its_neighbour_has_gone_is_found():
    # alone it is the worst of all
    def value(removed):
        gone = {index for _, index in removed}
        return sum(1 + index / 100 for index in gone - {9}) + (0.1 if {8, 9} <= gone else 100 if 9 in gone else 0)

    least = {8: -0.5}  # which goes first
    bench = Told(lambda removed: value(removed) + sum(least.get(index, 0) for _, index in removed))
    assert steps(bench, 2, 4, stack(12)) == [8, 9]


def test_what_came_last_comes_back_where_those_before_it_have_fallen_back():
    # blocks 0, 2, 4 and 6 can go one at a time: beside another of them they cost much more
    worth = {index: 0.1 * index + (0 if index in (0, 2, 4, 6) else 1) for index in range(16)}

    def value(removed):
        gone = {index for _, index in removed}
        return sum(worth[index] for index in gone) + 10 * max(len(gone & {0, 2, 4, 6}) - 1, 0)

    bench = Told(value)
    removed = steps(bench, 5, 4, stack(16))
    assert removed == [0, 1, 3, 5, 7]  # as where all are tried
    assert removed == steps(Told(value), 5, 16, stack(16))
    assert all(len(tried) <= 4 for tried in bench.screened[1:])


def test_how_much_a_block_was_missed_is_told_on_the_samples_that_judged_it():
    """Blocks that fall out are judged on the first samples alone, and these may be easy ones for any model."""
    easy = torch.tensor([[0.0] * 4 + [8.0] * 4], dtype=torch.float64)

    class Halving(Told):
        def _score(self, removed, samples=SAMPLES):
            return Score(super()._score(removed).losses + easy, torch.ones_like(easy)).first(samples)

        def screen(self, base, blocks):
            full = super().screen(base, blocks)
            best = sorted(blocks, key=lambda block: full[block].value)[:2]
            return {block: score if block in best else score.first(4) for block, score in full.items()}

        def complete(self, scores):
            return super().complete({block: s for block, s in scores.items() if s.samples == SAMPLES})

    bench = Halving(lambda removed: sum(index for _, index in removed))
    assert steps(bench, 3, 3, stack(8)) == [0, 1, 2]
    assert bench.screened[1:] == [[1, 2, 3], [2, 3, 4]]


def test_sets_that_are_left_out_are_not_tried():
    bench = Told(lambda removed: sum(index for _, index in removed))
    additions = Additions(bench, beside(stack(5)))
    assert additions.judged(bench.root, but=[frozenset({("layers", 0)})])[0] == {("layers", 1)}
    assert additions.judged(bench.root, but=[frozenset({block}) for block in stack(5)]) == []
    assert bench.screened == [[1, 2, 3, 4]]


def test_gaps_of_another_stack_are_no_neighbours():
    blocks = [(name, index) for name in ("encoder", "decoder") for index in range(6)]
    bench = Told(lambda removed: sum(index + 10 * (name == "decoder") for name, index in removed))
    additions = Additions(bench, beside(blocks), 3)
    node = additions.best(bench.root, 1)[0]
    assert node.removed == {("encoder", 0)}
    tried = []
    screen = bench.screen
    bench.screen = lambda base, blocks: tried.extend(blocks) or screen(base, blocks)
    additions.judged(node)
    assert tried == [("encoder", 1), ("encoder", 2), ("encoder", 3)]


@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_a_long_stack_loses_the_blocks_that_do_least(name):
    """Planted: 40 blocks, each of which adds a vector, along one of a few directions."""
    least = [7, 8, 30]
    sizes = [0.4 if index in least else 1.0 + 0.1 * (7 * index % 39) for index in range(1, 40)]
    model = adding(*({number % 8: size} for number, size in enumerate(sizes)))
    blocks = free_blocks(model)
    with evaluating(model):
        bench = bench_of(model, ZOO["gpt2"].batches(count=1), heals=False)
        tried, screen = [], bench.screen

        def counted(base, blocks):
            tried.append(len(blocks))
            return screen(base, blocks)

        bench.screen = counted
        node = list(strategies.get(name)().run(bench, beside(blocks), 3))[-1]
    assert sorted(index for _, index in node.removed) == least
    assert tried[0] == len(blocks) == 39
    assert max(tried[2 if name == "beam" else 1 :]) == MOST_TRIED


def test_the_number_of_trials():
    assert [tried(12, gone) for gone in range(3)] == [12, 11, 10]
    assert [tried(80, gone) for gone in (0, 1, 47, 48, 49)] == [80, 32, 32, 32, 31]
