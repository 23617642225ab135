"""Layouts of blocks, on random ones: what composes, what is undone, what follows."""

from __future__ import annotations

import random
from fnmatch import fnmatchcase

import pytest

from deeparc_hf.architectures.layout import Layout

STACKS = ("encoder.layer", "encoder.layers", "decoder.block", "layer1", "layer10")
SEEDS = range(40)


def chance(seed: int, lengths: dict[str, int] | None = None) -> Layout:
    """A random layout, of random stacks or of these."""
    dice = random.Random(seed)
    if lengths is None:
        lengths = {name: dice.randint(1, 14) for name in dice.sample(STACKS, dice.randint(1, len(STACKS)))}
    kept = {name: sorted(dice.sample(range(n), dice.randint(1, n))) for name, n in lengths.items()}
    return Layout(lengths, {name: tuple(indices) for name, indices in kept.items()})


def chain(seed: int, links: int = 3) -> list[Layout]:
    """Random removals, each of what the one before it has left."""
    found = [chance(seed)]
    for number in range(1, links):
        found.append(chance(1000 * number + seed, found[-1].counts))
    return found


def paths(lengths: dict[str, int]) -> list[str]:
    inside = [f"{name}.{i}{rest}" for name, n in lengths.items() for i in range(n) for rest in ("", ".attn.q.weight")]
    return [*inside, "head.weight", "encoder.layernorm.0.bias", "layer100.0.weight", *lengths]


@pytest.mark.parametrize("seed", SEEDS)
def test_composing_is_associative_and_a_whole_layout_changes_nothing(seed):
    a, b, c = chain(seed)
    assert a.then(b).then(c) == a.then(b.then(c))
    assert Layout.whole(a.lengths).then(a) == a == a.then(Layout.whole(a.counts)) == a.then(Layout({}, {}))
    assert Layout({}, {}).then(a) == a


@pytest.mark.parametrize("seed", SEEDS)
def test_what_came_since_an_earlier_layout_composes_to_the_later_one(seed):
    a, b, c = chain(seed)
    assert a.then(b).since(a) == b
    assert a.then(b).then(c).since(a) == b.then(c)
    assert a.since(Layout({}, {})) == a
    assert a.since(a) == Layout.whole(a.counts)


@pytest.mark.parametrize("seed", SEEDS)
def test_places_and_indices_are_inverse_on_what_is_kept(seed):
    layout = chance(seed)
    everything = {name: range(n) for name, n in layout.lengths.items()}
    assert layout.indices(layout.places(everything)) == layout.kept
    assert layout.places(layout.kept) == {name: tuple(range(n)) for name, n in layout.counts.items()}
    assert layout.places(layout.removed) == dict.fromkeys(layout.removed, ())
    assert Layout.without(layout.lengths, layout.removed) == layout


@pytest.mark.parametrize("seed", SEEDS)
def test_renaming_keeps_the_order_drops_what_is_gone_and_composes(seed):
    a, b = chain(seed, 2)
    names = paths(a.lengths)
    now = a.renamed_keys({name: name for name in names})
    assert list(now) == paths(a.counts)
    gone = [f"{stack}.{index}" for stack, indices in a.removed.items() for index in indices]
    assert {name for name in names if a.renamed(name) is None} == {
        name for name in names if any(name == block or name.startswith(f"{block}.") for block in gone)
    }
    assert a.then(b).renamed_keys(dict.fromkeys(names)) == b.renamed_keys(a.renamed_keys(dict.fromkeys(names)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("end", ["", ".*", ".attn.*", ".attn.?.weight", "*"])
def test_a_pattern_matches_after_a_removal_what_it_matched_before(seed, end):
    layout = chance(seed)
    inside = [f"{name}.{i}.attn.q.weight" for name, n in layout.lengths.items() for i in range(n)]
    for stack, length in layout.lengths.items():
        numbers = ["*", "?", *range(length)] if end != "*" else ["*"]
        for pattern in (f"{stack}.{number}{end}" for number in numbers):
            new = layout.renamed(pattern)
            for path in inside:
                moved = layout.renamed(path)
                if moved is not None and "?" not in pattern.removesuffix(end):
                    assert fnmatchcase(path, pattern) == (new is not None and fnmatchcase(moved, new))


def test_a_stack_that_is_not_named_is_whole():
    layout = Layout.without({"a": 3}, {"a": [1]})
    assert layout.places({"b": [0, 2]}) == {"b": (0, 2)} and layout.indices({"b": [2]}) == {"b": (2,)}
    assert layout.renamed("b.2.weight") == "b.2.weight"
    assert layout.then(Layout.without({"b": 2}, {"b": [0]})).kept == {"a": (0, 2), "b": (1,)}
    assert layout.since(Layout.without({"b": 2}, {"b": [0]})).kept == {"a": (0, 2), "b": (0,)}


@pytest.mark.parametrize(
    "kept", [{"a": (1, 0)}, {"a": (0, 0)}, {"a": (0, 3)}, {"a": (-1, 0)}, {"b": (0,)}, {}], ids=str
)
def test_what_is_no_layout_is_refused(kept):
    with pytest.raises(ValueError, match="a"):
        Layout({"a": 3}, kept)


def test_layouts_of_other_models_do_not_compose():
    layout = Layout.without({"a": 3}, {"a": [1]})
    with pytest.raises(ValueError, match="2 blocks of a are left, not 3"):
        layout.then(Layout.whole({"a": 3}))
    with pytest.raises(ValueError, match="a"):
        Layout.whole({"a": 3}).since(layout)
