"""Scores and masks of the sparsity methods, against a reference written out in loops."""

from __future__ import annotations

import pytest
import torch

from deeparc_hf.errors import CalibrationError
from deeparc_hf.sparsity import masks
from deeparc_hf.sparsity.masks import choose_lowest, choose_pattern, zero_chosen
from deeparc_hf.sparsity.methods import methods


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
    method, before = methods.get(name)(), weight.clone()
    score = method.score(weight, norms)
    assert score.shape == weight.shape and bool((score >= 0).all()) and method.summary
    assert method.score(torch.nn.Parameter(weight.bfloat16()), norms).dtype in (torch.float32, torch.float64)
    assert torch.equal(weight, before)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wanda_orders_as_float64_does(dtype):
    generator = torch.Generator().manual_seed(1)
    weight = (1 + torch.rand(9, 24, generator=generator) * 1e-2).to(dtype)
    norms = 1 + torch.rand(24, generator=generator, dtype=torch.float64) * 1e-6  # in float32 most of them are equal
    assert as_sets(choose_lowest(methods.get("wanda")().score(weight, norms), 0.5)) == reference(
        weight, norms.tolist(), 12, 0, 24
    )


def test_each_output_may_meet_inputs_of_its_own(layer):
    weight, norms = layer
    own = torch.stack([norms.roll(shift) for shift in range(9)])
    mask = choose_lowest(methods.get("wanda")().score(weight, own), 0.5)
    assert as_sets(mask) == [reference(weight[i, None], own[i].tolist(), 12, 0, 24)[0] for i in range(9)]


def test_wanda_without_matching_norms_is_refused(layer):
    weight, norms = layer
    for wrong, found in ((None, "none"), (norms[:5], r"shape \(5,\)"), (torch.ones(24, 9), r"shape \(24, 9\)")):
        with pytest.raises(
            CalibrationError, match=rf"24 inputs, shape \(24,\), or .* shape \(9, 24\); found {found}\."
        ):
            methods.get("wanda")().score(weight, wrong)


def sorted_mask(score, count):
    """What every way to choose must give: the first of a stable sort."""
    order = torch.sort(score, dim=1, stable=True).indices
    return torch.zeros(score.shape, dtype=torch.bool).scatter_(1, order[:, :count], True)


def scores(kind, dtype):
    score = torch.rand(37, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if kind == "tied":
        score = (score * 4).floor()  # zeros among them
    elif kind == "equal":
        score = torch.ones_like(score)
    elif kind == "zero":
        score = torch.zeros_like(score)
    elif kind == "infinite":
        score = torch.where(score < 0.6, torch.inf, (score * 8).floor())
    return score.to(dtype)


@pytest.fixture(params=["cpu", "other device"])
def way(request, monkeypatch):
    """Few rows at a time, so that there is a last, shorter step; and the sort of the other devices, on the CPU."""
    monkeypatch.setattr(masks, "CHUNK", 5 * 48)
    if request.param == "other device":
        monkeypatch.setattr(masks, "by_selecting", masks.by_sorting)
        monkeypatch.setattr(masks, "by_comparing", masks.by_sorting)


LAYOUTS = {
    "rows": lambda score: score,
    "columns": lambda score: score.t().contiguous().t(),
    "every other": lambda score: score.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "tied", "equal", "zero", "infinite"])
def test_masks_are_those_of_a_stable_sort(kind, dtype, layout):
    score = scores(kind, dtype)
    laid = LAYOUTS[layout](score)
    for count in (0, 1, 2, 23, 24, 46, 47):
        assert torch.equal(choose_lowest(laid, (count + 0.5) / 48), sorted_mask(score, count))
    for keep, group in ((2, 4), (4, 8), (1, 2), (1, 3), (7, 8), (1, 16), (5, 24), (1, 48)):
        expected = sorted_mask(score.reshape(-1, group), group - keep).view(score.shape)
        assert torch.equal(choose_pattern(laid, keep, group), expected)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 1), (4, 1)])
def test_small_and_empty_matrices_have_masks(shape):
    assert torch.equal(choose_lowest(torch.ones(shape), 0.5), sorted_mask(torch.ones(shape), shape[1] // 2))
    if shape[1] % 4 == 0:
        assert torch.equal(
            choose_pattern(torch.ones(shape), 2, 4), sorted_mask(torch.ones(shape).view(-1, 4), 2).view(shape)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeroed_weights_are_plain_zeros_and_the_others_stay(dtype):
    values = torch.tensor([-1.0, torch.inf, -torch.inf, torch.nan, 2.0, -3.0, -0.0], dtype=dtype)
    weight = torch.nn.Parameter(values.repeat(2, 1).t())  # not contiguous
    mask = torch.tensor([[True, False]]).expand(7, 2)
    expected = weight.detach().masked_fill(mask, 0)
    zero_chosen(weight, mask)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    # by their bits: -0.0 equals 0.0, NaN nothing
    assert torch.equal(weight.detach().view(integers), expected.view(integers))
