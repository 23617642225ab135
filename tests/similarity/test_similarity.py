"""Similarity metrics: a contract that every registered one keeps, and values against references written from the
papers.

Metrics that compare the model's outputs with a block skipped have their contract in test_effect.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deeparc_hf.similarity import ROW_KINDS, SimilarityMetric, SkippingMetric, metrics

NAMES = [metric.name for metric in metrics if issubclass(metric, SimilarityMetric)]
CKAS = ("cka", "cka_biased")
COUNTS = (4, 5, 511, 512, 1023, 1024, 1500)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def related_rows(
    n: int, width: int = 6, blocks: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Blocks that are random steps apart and off the origin: shape (n, width) each."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, width, generator=generator, dtype=torch.float64) + 2.0]
    for _ in range(blocks - 1):
        rows.append(rows[-1] + 0.7 * torch.randn(n, width, generator=generator, dtype=torch.float64) + 0.1)
    return [block.to(dtype) for block in rows]


def sums_of(
    name: str, rows: list[Tensor], samples: Tensor | None = None, portions: list[int] | None = None
) -> dict[str, Tensor]:
    """Feed rows in portions of these sizes (default: all at once)."""
    samples = torch.arange(len(rows[0])) if samples is None else samples
    metric = metrics.get(name)()
    start = 0
    for size in portions or [len(rows[0])]:
        metric.update([block[start : start + size] for block in rows], samples[start : start + size])
        start += size
    assert start == len(rows[0])
    return metric.finish()


def matrix_of(
    name: str, rows: list[Tensor], samples: Tensor | None = None, portions: list[int] | None = None
) -> Tensor:
    return metrics.get(name).matrix(sums_of(name, rows, samples, portions))


def even_portions(n: int, size: int) -> list[int]:
    return [min(size, n - start) for start in range(0, n, size)]


# --- references, from the papers --------------------------------------------------------------------------------------


def hsic_unbiased(x: Tensor, y: Tensor) -> float:
    """Song et al. 2012, eq. 5: grams with a zero diagonal, no centring; rows in float64."""
    n, one = len(x), torch.ones(len(x), dtype=torch.float64)
    k, m = x @ x.T, y @ y.T
    k, m = k - torch.diag(k.diagonal()), m - torch.diag(m.diagonal())
    ends = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    middle = 2 / (n - 2) * (one @ k @ m @ one)
    return float((torch.trace(k @ m) + ends - middle) / (n * (n - 3)))


def hsic_biased(x: Tensor, y: Tensor) -> float:
    """tr(K H L H) / (n - 1)^2 with the centring matrix H written out."""
    n = len(x)
    h = torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1 / n, dtype=torch.float64)
    return float(torch.trace(x @ x.T @ h @ y @ y.T @ h)) / (n - 1) ** 2


def grouped(n: int, size: int) -> list[slice]:
    """Full groups of `size` rows; what is left over joins the last of them."""
    full = max(1, n // size)
    starts = [size * i for i in range(full)]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], n], strict=True)]


def reference_debiased(rows: list[Tensor]) -> list[list[float]]:
    """The ratio of sums over groups, each weighted by its rows."""
    rows = [block.double() for block in rows]
    groups = grouped(len(rows[0]), 512)

    def total(x: Tensor, y: Tensor) -> float:
        return sum((group.stop - group.start) * hsic_unbiased(x[group], y[group]) for group in groups)

    own = [total(x, x) for x in rows]
    return [[total(x, y) / math.sqrt(own[i] * own[j]) for j, y in enumerate(rows)] for i, x in enumerate(rows)]


def reference_biased(rows: list[Tensor], groups: list[slice]) -> list[list[float]]:
    """Each group's own CKA, then the mean over the groups."""

    def cka(x: Tensor, y: Tensor) -> float:
        return hsic_biased(x, y) / math.sqrt(hsic_biased(x, x) * hsic_biased(y, y))

    rows = [block.double() for block in rows]
    return [[sum(cka(x[g], y[g]) for g in groups) / len(groups) for y in rows] for x in rows]


def reference_cosine(rows: list[Tensor]) -> list[list[float]]:
    lists = [block.double().tolist() for block in rows]

    def mean(xs: list[list[float]], ys: list[list[float]]) -> float:
        total = 0.0
        for x, y in zip(xs, ys, strict=True):
            dot = sum(a * b for a, b in zip(x, y, strict=True))
            total += dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in y))
        return total / len(xs)

    return [[mean(xs, ys) for ys in lists] for xs in lists]


def assert_close(found: Tensor, expected: list[list[float]], tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


# --- the contract -----------------------------------------------------------------------------------------------------


def test_the_three_metrics_are_registered():
    assert {"cka", "cka_biased", "cosine"} <= set(NAMES)


def test_every_metric_is_of_one_of_two_kinds():
    assert all(issubclass(metric, SimilarityMetric) != issubclass(metric, SkippingMetric) for metric in metrics)


@pytest.mark.parametrize("name", NAMES)
def test_describes_itself(name):
    metric = metrics.get(name)
    assert metric.name == name
    assert metric.summary
    assert "\n" not in metric.summary
    assert metric.rows in ROW_KINDS
    assert metric.min_rows >= 1
    assert metric.tokens_per_sample is None or metric.tokens_per_sample >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_matrix_is_symmetric_with_ones_on_the_diagonal(name, dtype):
    matrix = matrix_of(name, related_rows(200, dtype=dtype))
    assert matrix.shape == (4, 4)
    assert matrix.dtype == torch.float64
    assert torch.equal(matrix.diagonal(), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-12)
    assert bool((matrix.abs() <= 1 + 1e-9).all())


@pytest.mark.parametrize("name", NAMES)
def test_equal_blocks_score_one(name):
    rows = related_rows(80)
    assert matrix_of(name, [rows[0], rows[1], rows[0].clone()])[0, 2] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_nearer_blocks_score_higher(name):
    matrix = matrix_of(name, related_rows(600, width=16))
    assert matrix[0, 1] > matrix[0, 2] > matrix[0, 3]


@pytest.mark.parametrize("name", NAMES)
def test_sums_of_halves_add_up(name):
    rows = related_rows(2048)
    whole = sums_of(name, rows)
    halves = [sums_of(name, [block[part] for block in rows]) for part in (slice(0, 1024), slice(1024, 2048))]
    assert whole.keys() == halves[0].keys()
    assert all(value.dtype == torch.float64 for value in whole.values())
    for key, value in whole.items():
        torch.testing.assert_close(halves[0][key] + halves[1][key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_matrix_leaves_the_sums_alone(name):
    sums = sums_of(name, related_rows(100))
    before = {key: value.clone() for key, value in sums.items()}
    first = metrics.get(name).matrix(sums)
    assert all(torch.equal(sums[key], before[key]) for key in before)
    assert torch.equal(first, metrics.get(name).matrix(sums))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [40, 511, 1300])
@pytest.mark.parametrize("name", NAMES)
def test_batch_size_does_not_matter(name, n, dtype):
    rows = related_rows(n, dtype=dtype)
    whole = matrix_of(name, rows)
    for size in (1, 7, 64):
        torch.testing.assert_close(matrix_of(name, rows, portions=even_portions(n, size)), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "lengths", [(5, 2, 9, 3, 7, 4, 6, 8) * 20, (1, 5, 1, 6, 1, 1, 9, 3) * 20], ids=["sentences", "with single tokens"]
)
def test_batch_size_does_not_matter_where_rows_are_tokens(name, lengths):
    samples = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rows = related_rows(len(samples))
    whole = matrix_of(name, rows, samples)
    for size in (1, 7, 64):
        # a batch never cuts a sentence in two
        portions = [sum(lengths[start : start + size]) for start in range(0, len(lengths), size)]
        torch.testing.assert_close(matrix_of(name, rows, samples, portions), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_empty_portions_do_not_matter(name):
    rows = related_rows(50)
    torch.testing.assert_close(
        matrix_of(name, rows, portions=[0, 20, 0, 30, 0]), matrix_of(name, rows), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("odd", [(49, 6), (1, 6), (50, 1)])
def test_blocks_with_rows_of_other_shapes_are_refused(name, odd):
    rows = [*related_rows(50), torch.zeros(odd, dtype=torch.float64)]
    with pytest.raises((IndexError, RuntimeError, ValueError), match=r"shape|size"):
        metrics.get(name)().update(rows, torch.arange(50))


@pytest.mark.parametrize("name", NAMES)
def test_fewer_rows_than_needed_give_no_sums(name):
    least = metrics.get(name).min_rows
    assert metrics.get(name)().finish() == {}
    assert sums_of(name, related_rows(least - 1)) == {}
    assert sums_of(name, related_rows(least)) != {}


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", COUNTS)
def test_debiased_cka_equals_its_reference(n, dtype):
    rows = related_rows(n, dtype=dtype)
    assert_close(matrix_of("cka", rows), reference_debiased(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", COUNTS)
def test_biased_cka_equals_its_reference_where_rows_are_samples(n, dtype):
    rows = related_rows(n, dtype=dtype)
    assert_close(matrix_of("cka_biased", rows), reference_biased(rows, grouped(n, 64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_biased_cka_equals_its_reference_where_rows_are_tokens(dtype):
    lengths = [5, 2, 30, 3, 17, 100, 2]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = related_rows(sum(lengths), dtype=dtype)
    samples = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    sentences = [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    assert_close(matrix_of("cka_biased", rows, samples), reference_biased(rows, sentences))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", COUNTS)
def test_cosine_equals_its_reference(n, dtype):
    rows = related_rows(n, dtype=dtype)
    assert_close(matrix_of("cosine", rows), reference_cosine(rows))


@pytest.mark.parametrize("name", CKAS)
def test_float32_rows_far_from_the_origin_keep_their_digits(name):
    # a common offset 1,000 times as large as the signal: centring in float32 would lose it
    rows = [block + 1000.0 for block in related_rows(100, dtype=torch.float32)]
    near = [block.double() - 1000.0 for block in rows]
    expected = reference_debiased(near) if name == "cka" else reference_biased(near, grouped(100, 64))
    assert_close(matrix_of(name, rows), expected)


def noise_scores(name: str, n: int, seeds: int) -> Tensor:
    scores = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randn(n, 768, generator=generator) for _ in range(2)]
        scores.append(matrix_of(name, rows, torch.zeros(n, dtype=torch.long))[0, 1])
    return torch.stack(scores)


@pytest.mark.parametrize(("n", "seeds"), [(20, 100), (512, 10)])
def test_independent_noise_scores_zero_debiased(n, seeds):
    scores = noise_scores("cka", n, seeds)
    assert abs(scores.mean()) < 4 * scores.std() / math.sqrt(seeds)
    assert scores.abs().max() < 0.5  # so that a wide spread cannot pass for zero


def test_independent_noise_scores_near_one_biased():
    # the published figures: 0.973 with 20 rows, 0.9965 with 3
    assert noise_scores("cka_biased", 20, 10).mean() == pytest.approx(0.973, abs=0.003)
    assert noise_scores("cka_biased", 3, 10).mean() == pytest.approx(0.9965, abs=0.002)


def random_rotation(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q


CHANGES = {
    "rotation": lambda block, i: block @ random_rotation(block.shape[1], i),
    "scale": lambda block, i: block * (0.01, 3.0, 250.0, 1.0)[i],
    "translation": lambda block, i: block + torch.linspace(-5, 40, block.shape[1], dtype=torch.float64) * (i + 1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CKAS)
def test_cka_does_not_see(name, change):
    rows = related_rows(300, width=12)
    changed = [CHANGES[change](block, i) for i, block in enumerate(rows)]
    torch.testing.assert_close(matrix_of(name, changed), matrix_of(name, rows), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CKAS)
def test_cka_sees_a_change_that_is_not_a_similarity(name):
    # a stretch along one axis only; without it, the test above would pass for a metric that sees nothing
    rows = related_rows(300, width=12)
    stretched = [rows[0] * torch.tensor([20.0] + [1.0] * 11, dtype=torch.float64), *rows[1:]]
    assert abs(matrix_of(name, stretched)[0, 1] - matrix_of(name, rows)[0, 1]) > 0.05


def test_cosine_does_not_see_scale_or_a_common_rotation():
    rows = related_rows(300, width=12)
    changed = [CHANGES["scale"](block, i) @ random_rotation(12, 9) for i, block in enumerate(rows)]
    torch.testing.assert_close(matrix_of("cosine", changed), matrix_of("cosine", rows), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [20, 100, 512, 1500])
@pytest.mark.parametrize("name", CKAS)
def test_a_constant_block_gives_nan_and_the_others_their_values(name, n, dtype):
    rows = related_rows(n, dtype=dtype)
    constant = torch.randn(1, 6, dtype=dtype).expand(n, 6)
    matrix = matrix_of(name, [rows[0], constant, rows[1]])
    assert bool(matrix[1].isnan().all())
    assert bool(matrix[:, 1].isnan().all())
    others = matrix[[0, 2]][:, [0, 2]]
    torch.testing.assert_close(others, matrix_of(name, rows[:2]), rtol=0, atol=1e-12)


def test_a_zero_block_has_no_direction():
    rows = related_rows(50)
    matrix = matrix_of("cosine", [rows[0], torch.zeros_like(rows[0]), rows[1]])
    assert bool(matrix[1].isnan().all())
    assert torch.equal(matrix[[0, 2], [0, 2]], torch.ones(2, dtype=torch.float64))
