"""Scores and masks of the sparsity methods, against a reference written out in loops."""

from __future__ import annotations

import pytest
import torch

from deeparc_hf.errors import CalibrationError, ConfigError
from deeparc_hf.sparsity import choose_lowest, choose_pattern, methods


def reference(weight, norms, count, start, stop):
    """Rows of sets: the inputs of `start` to `stop` with the lowest |w| * norm, the earlier of equals first."""
    chosen = []
    for row in weight.tolist():
        ranked = sorted(range(start, stop), key=lambda j: (abs(row[j]) * norms[j], j))
        chosen.append(set(ranked[:count]))
    return chosen


def as_sets(mask):
    return [set(row.nonzero().flatten().tolist()) for row in mask]


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 24, generator=generator, dtype=torch.float64)
    weight[2] = weight[2].round()  # ties
    weight[5] = 0.0
    return weight, torch.rand(24, generator=generator, dtype=torch.float64) + 0.1


@pytest.mark.parametrize("name", methods.names())
def test_every_method_scores_each_weight(name, layer):
    weight, norms = layer
    method = methods.get(name)()
    score = method.score(weight, norms)
    assert score.shape == weight.shape and bool((score >= 0).all()) and method.summary
    assert method.score(weight.bfloat16(), norms).dtype == torch.float32
    assert bool((method.score(torch.zeros_like(weight), norms) == 0).all())


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_the_lowest_of_each_row_go(name, sparsity, layer):
    weight, norms = layer
    mask = choose_lowest(methods.get(name)().score(weight, norms), sparsity)
    by = norms.tolist() if name == "wanda" else [1.0] * 24
    assert as_sets(mask) == reference(weight, by, int(24 * sparsity), 0, 24)


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8), (1, 3)])
def test_patterns_hold_in_every_group(keep, group, layer):
    weight, norms = layer
    mask = choose_pattern(methods.get("wanda")().score(weight, norms), keep, group)
    expected = [set() for _ in range(9)]
    for start in range(0, 24, group):
        for row, chosen in enumerate(reference(weight, norms.tolist(), group - keep, start, start + group)):
            expected[row] |= chosen
    assert as_sets(mask) == expected


def test_wanda_without_matching_norms_is_refused(layer):
    weight, norms = layer
    for wrong, found in ((None, "none"), (norms[:5], r"shape \(5,\)")):
        with pytest.raises(CalibrationError, match=f"each of the 24 inputs, found {found}"):
            methods.get("wanda")().score(weight, wrong)


@pytest.mark.parametrize(("sparsity", "message"), [(50, "Did you mean 0.5"), (1.0, r"in \[0, 1\)"), (-0.1, r"in \[0, 1\)")])
def test_impossible_sparsities_are_refused(sparsity, message):
    with pytest.raises(ConfigError, match=message):
        choose_lowest(torch.ones(2, 4), sparsity)


@pytest.mark.parametrize(("keep", "group", "inputs"), [(2, 4, 6), (4, 4, 8), (0, 4, 8)])
def test_impossible_patterns_are_refused(keep, group, inputs):
    with pytest.raises(ConfigError, match="pattern"):
        choose_pattern(torch.ones(2, inputs), keep, group)
