"""What every strategy promises, and that they find what greedy misses, against all sets of a small model."""

from __future__ import annotations

import random
from functools import cache
from itertools import combinations, product
from math import inf

import pytest
import torch
import transformers as tf

from deeparc_hf.observe.forward import evaluating
from deeparc_hf.search.strategies import strategies
from tests.zoo import TEXT, ZOO, as_trained, spread

from .test_workbench import bench_of, free_blocks

NAMES = strategies.names()
SEEDS = range(5)
COUNT = 2  # batches


def bert(seed=0, depth=6):
    torch.manual_seed(seed)
    config = tf.BertConfig(**{**TEXT, "num_hidden_layers": depth})
    return as_trained(spread(tf.BertForSequenceClassification(config))).eval()


def beside(blocks):
    """`Free`: any but the removed ones."""
    return lambda removed: [block for block in blocks if block not in removed]


def searched(name, bench, free, most):
    return list(strategies.get(name)().run(bench, free, most))


def noting(bench):
    """The sets that the bench computes from now on."""
    sets, follow = [], bench.follow

    def noted(removed, base):
        sets.append(removed)
        return follow(removed, base)

    bench.follow = noted
    return sets


def bests(nodes):
    """By number of removed blocks the best value."""
    values = {}
    for node in nodes:
        count = len(node.removed)
        values[count] = min(node.score.value, values.get(count, inf))
    return values


@cache
def all_of(seed, heals):
    """What every strategy finds on a model with up to four of six blocks removed, and what is the best there is."""
    model, most = bert(seed, depth=7), 4
    with evaluating(model):
        bench, blocks = bench_of(model, ZOO["bert"].batches(count=COUNT), heals), free_blocks(model)
        found = {name: bests(searched(name, bench, beside(blocks), most)) for name in NAMES}
        every = [frozenset(s) for count in range(1, most + 1) for s in combinations(blocks, count)]
        best = bests(bench.follow(removed, bench.root) for removed in every)
    return found, best


def share_found(name):
    """How often the best set of two to four blocks was found."""
    hits = []
    for seed, heals in product(SEEDS, (True, False)):
        found, best = all_of(seed, heals)
        hits += [found[name][count] <= best[count] * 1.001 for count in (2, 3, 4)]
    return sum(hits) / len(hits)


def flat(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


# ---- what each promises ----


@pytest.mark.parametrize("heals", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gives_models_of_each_number_with_their_exact_scores(name, heals):
    model, most = bert(depth=7), 5
    blocks = free_blocks(model)[:-1]  # the last one must stay
    with evaluating(model):
        bench = bench_of(model, ZOO["bert"].batches(count=COUNT), heals)
        nodes = searched(name, bench, beside(blocks), most)
        exact = [bench.follow(node.removed, bench.root).score.value for node in nodes]
    assert list(dict.fromkeys(len(node.removed) for node in nodes)) == [1, 2, 3, 4, 5]
    assert all(node.removed <= set(blocks) for node in nodes)
    assert [node.score.value for node in nodes] == pytest.approx(exact, rel=1e-3)
    best = {}
    for node in nodes:  # a second one of a number is a better one
        assert node.score.value < best.get(len(node.removed), inf)
        best[len(node.removed)] = node.score.value


@pytest.mark.parametrize("name", NAMES)
def test_finds_the_same_again_whatever_was_drawn_before(name):
    model = bert(1)
    with evaluating(model):
        bench, free = bench_of(model, ZOO["bert"].batches(count=COUNT)), beside(free_blocks(model))
        states = random.getstate(), torch.get_rng_state()
        sets = noting(bench)
        first = searched(name, bench, free, 3)
        assert random.getstate() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])
        torch.manual_seed(99)
        random.seed(99)
        another = bench_of(model, ZOO["bert"].batches(count=COUNT))
        sets_again = noting(another)
        again = searched(name, another, free, 3)
    assert sets == sets_again
    assert [(node.removed, node.score.value) for node in first] == [(node.removed, node.score.value) for node in again]


@pytest.mark.parametrize("name", NAMES)
def test_leaves_the_model_as_it_was(name):
    model = bert(2)
    weights, attributes = flat(model), [dict(vars(module)) for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with evaluating(model):
        bench = bench_of(model, ZOO["bert"].batches(count=COUNT))
        inside = [set(vars(module)) for module in model.modules()]
        for _ in strategies.get(name)().run(bench, beside(free_blocks(model)), 3):
            # also between two models: whoever takes one may run the model
            assert all("forward" not in vars(module) for module in model.modules())
            assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        assert [set(vars(module)) for module in model.modules()] == inside
    after = flat(model)
    assert list(after) == list(weights)
    assert all(torch.equal(after[key], weights[key]) for key in weights)
    assert [set(vars(module)) for module in model.modules()] == [set(each) for each in attributes]
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize("name", NAMES)
def test_ends_where_no_block_is_free(name):
    model = bert(depth=4)
    blocks = free_blocks(model)
    with evaluating(model):
        bench = bench_of(model, ZOO["bert"].batches(count=COUNT))
        two = searched(name, bench, lambda removed: beside(blocks)(removed) if len(removed) < 2 else [], 3)
        none = searched(name, bench, lambda removed: [], 3)
    assert {len(node.removed) for node in two} == {1, 2}
    assert none == []


@pytest.mark.parametrize("name", NAMES)
def test_keeps_to_blocks_that_may_go_together(name):
    model = bert()
    blocks = free_blocks(model)
    pairs = [set(blocks[start : start + 2]) for start in (0, 2)]

    def free(removed):  # of each pair one
        return [block for pair in pairs if not pair & removed for block in sorted(pair)]

    with evaluating(model):
        bench = bench_of(model, ZOO["bert"].batches(count=COUNT))
        sets = noting(bench)
        nodes = searched(name, bench, free, 4)
    assert {len(node.removed) for node in nodes} == {1, 2}
    assert all(len(pair & removed) <= 1 for pair in pairs for removed in sets)


@pytest.mark.parametrize(("depth", "most"), [(6, 5), (8, 3), pytest.param(11, 4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("repaired", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_of_its_passes_is_of_the_right_size(name, repaired, depth, most):
    assert_estimated(name, repaired, bert(depth=depth), most, ZOO["bert"].batches(count=COUNT))


@pytest.mark.slow
@pytest.mark.parametrize("repaired", [True, False])
def test_the_estimate_knows_that_of_many_blocks_few_are_tried_again(repaired):
    assert_estimated("greedy", repaired, bert(depth=42), 6, ZOO["bert"].batches(count=8, size=32))


def assert_estimated(name, repaired, model, most, batches):
    with evaluating(model):
        bench, blocks = bench_of(model, batches, heals=repaired), free_blocks(model)
        before = bench.passes
        searched(name, bench, beside(blocks), most)
        counted = bench.passes - before
    assert counted / 2 <= strategies.get(name).passes(len(blocks), most, repaired) <= counted * 2


# ---- how good they are ----


@pytest.mark.parametrize("heals", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("name", ["beam", "exchange"])
def test_is_never_worse_than_greedy(name, heals):
    better = 0
    for seed in SEEDS:
        found, _ = all_of(seed, heals)
        assert all(found[name][count] <= value for count, value in found["greedy"].items())
        better += sum(found[name][count] < value for count, value in found["greedy"].items())
    assert better >= 3  # lower at several numbers


# found: 30, 25 and 24 of 30; by greedy 10
@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("evolution", 0.95), ("exchange", 0.7), ("beam", 0.7)])
def test_mostly_finds_the_best_set_of_all_where_greedy_does_not(name, least):
    assert share_found(name) >= least
    assert share_found("greedy") < 0.5


# ---- planted: blocks that each add one vector to the stream ----


def adding(*vectors):
    """A GPT-2 whose first block does nothing, and the others add these vectors, given by their parts along some
    directions.
    """
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    config = tf.GPT2Config(n_embd=32, n_head=4, n_layer=len(vectors) + 1, vocab_size=120, **special)
    model = tf.GPT2LMHeadModel(config).eval()
    directions = torch.linalg.qr(torch.randn(32, 8)).Q.T
    with torch.no_grad():
        model.transformer.wte.weight.normal_()  # much larger than what is added
        model.lm_head.weight.normal_(0.0, 0.2)
        for block, parts in zip(model.transformer.h, [{}, *vectors], strict=True):
            for layer in (block.attn.c_proj, block.mlp.c_proj):
                layer.weight.zero_()
                layer.bias.zero_()
            for direction, size in parts.items():
                block.mlp.c_proj.bias += 0.1 * size * directions[direction]
    return model


def found_in(model, name, most):
    blocks = free_blocks(model)
    with evaluating(model):
        bench = bench_of(model, ZOO["gpt2"].batches(count=COUNT), heals=False)
        nodes = searched(name, bench, beside(blocks), most)
        best = min(nodes, key=lambda node: (len(node.removed) != most, node.score.value))
    assert len(best.removed) == most
    return sorted(index for _, index in best.removed)


@pytest.mark.parametrize("name", ["beam", "evolution"])
def test_finds_two_blocks_that_only_together_do_nothing(name):
    # 2 and 5 cancel; each alone is missed more than 3
    model = adding({1: 1.3}, {0: 1.0}, {2: 0.7}, {3: 1.4}, {0: -1.0}, {4: 1.5})
    assert found_in(model, "greedy", 1) == [3]
    assert 3 in found_in(model, "greedy", 2)
    assert found_in(model, name, 2) == [2, 5]


@pytest.mark.parametrize("name", ["beam", "evolution", "exchange"])
def test_takes_back_a_block_that_was_the_best_to_remove_first(name):
    # 3 is missed least alone, and nearly cancels 5; 2 cancels it in full
    model = adding({1: 1.3}, {0: 1.0}, {0: 0.9}, {3: 1.4}, {0: -1.0}, {4: 1.5})
    assert found_in(model, "greedy", 1) == [3]
    assert found_in(model, "greedy", 2) == [3, 5]
    assert found_in(model, name, 2) == [2, 5]
