"""Blocks that are spread evenly, and that a plan leaves just these."""

from __future__ import annotations

import itertools

import pytest

from deeparc_hf.errors import ConfigError
from deeparc_hf.pruning.plan import ComparedStack, make_plan
from experiment.arguments import PruningArguments
from experiment.spread import evenly_spread, spread_blocks


def test_the_ends_stay_and_gaps_are_alike():
    assert evenly_spread(32, 2) == [0, 31]  # Distil-Whisper's decoder of large-v2
    assert evenly_spread(12, 6) == [0, 2, 4, 6, 8, 11]
    assert evenly_spread(4, 3) == [0, 1, 3] and evenly_spread(6, 1) == [5]
    for length in range(1, 33):
        for count in range(1, length + 1):
            kept = evenly_spread(length, count)
            gaps = {after - before for before, after in itertools.pairwise(kept)}
            assert len(set(kept)) == count and kept[-1] == length - 1 and (count == 1 or kept[0] == 0)
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_the_blocks_of_each_stack():
    assert spread_blocks({"a": 4, "b": 3}, {"a": 2}) == ("a.0", "a.3", "b.0", "b.1", "b.2")
    assert spread_blocks({"a": 4}, 3) == ("a.0", "a.1", "a.3")
    with pytest.raises(ConfigError, match=r"needs num_blocks for each stack, found 3 for all of a, b"):
        spread_blocks({"a": 4, "b": 3}, 3)
    with pytest.raises(ConfigError, match=r"asks for 5 blocks of a\. There are a with 4 blocks"):
        spread_blocks({"a": 4}, {"a": 5})
    with pytest.raises(ConfigError, match="asks for 2 blocks of c"):
        spread_blocks({"a": 4}, {"c": 2})


def test_a_plan_leaves_just_these_whatever_is_alike():
    """Also where by similarity others would go."""
    pruning = PruningArguments(num_blocks=["a=3,b=2"], spread_evenly=True)
    config = pruning.pruning(0, lengths={"a": 6, "b": 4})
    alike = tuple(tuple(1.0 if i == j else -0.5 + 0.01 * (i + j) for j in range(6)) for i in range(6))
    compared = {"a": ComparedStack(alike), "b": ComparedStack(tuple(row[:4] for row in alike[:4]))}
    plan = make_plan(compared, config)
    assert {name: stack.kept for name, stack in plan.stacks.items()} == {"a": (0, 2, 5), "b": (0, 3)}
    assert pruning.pruning(0).protect == ()


def test_what_else_would_choose_is_refused():
    for settings in ({"search": "greedy"}, {"protect": ["a.1"]}, {"max_drop": 0.1}, {"speedup": 1.5}):
        with pytest.raises(ConfigError, match="spread_evenly says which blocks stay"):
            PruningArguments(num_blocks=["a=3"] if "speedup" not in settings else None, spread_evenly=True, **settings)
    with pytest.raises(ConfigError, match="found no num_blocks"):
        PruningArguments(spread_evenly=True)


def test_a_pattern_of_blocks_is_frozen():
    assert PruningArguments(freeze="model.encoder.layers.*").pruning(0).freeze == ("model.encoder.layers.*",)
    assert PruningArguments(freeze="partial").pruning(0).freeze == "partial"
