"""Intervals and tables of the scores of generated texts."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("nltk")
pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

from experiment.generation import TITLES, TextScores
from experiment.results import Measured, Row
from experiment.seq2seq import scores_table
from tests.recipes.experiment.test_generation import random_pairs, scored


@pytest.mark.parametrize("n", [1, 7, 60])
def test_intervals_are_those_of_texts_drawn_anew(n, no_nltk_data):
    predictions, references = random_pairs(n, 3)
    found = TextScores(predictions, references).intervals(resamples=40, seed=4)
    rng, drawn = np.random.default_rng(4), []
    for _ in range(40):
        chosen = rng.integers(n, size=n)
        drawn.append(scored([predictions[i] for i in chosen], [references[i] for i in chosen]))
    assert list(found) == list(TITLES)[:11]
    for name, bounds in found.items():
        assert bounds == pytest.approx(np.percentile([getattr(row, name) for row in drawn], [2.5, 97.5]), rel=1e-9)


def test_intervals_hold_the_value_shrink_with_n_and_follow_the_seed():
    texts = random_pairs(400, 2)
    few = [side[:40] for side in texts]
    wide, narrow = TextScores(*few).intervals(), TextScores(*texts).intervals()
    for found, sides in ((wide, few), (narrow, texts)):
        point = TextScores(*sides).values()
        assert all(low <= point[name] <= high for name, (low, high) in found.items())
    for name in ("bleu", "precision_1", "precision_4", "length_ratio", "rouge1", "rougeLsum"):
        # by about the root of 10
        assert 0.2 < (narrow[name][1] - narrow[name][0]) / (wide[name][1] - wide[name][0]) < 0.55
    assert TextScores(*few).intervals() == wide
    assert TextScores(*few).intervals(seed=1) != wide


def test_draws_of_empty_references_only_do_not_count():
    # a quarter of the draws has no reference
    found = TextScores(["a b c d", "e"], ["a b c d", ""]).intervals(resamples=200)
    assert found["length_ratio"] == (1.0, 5 / 4) and found["precision_1"] == (4 / 5, 1.0)


def some_row(name: str, encoder: int, without: str | None = None, **intervals: tuple[float, float]) -> Row:
    values = {title: (index + 1) / 16 for index, title in enumerate(TITLES) if title != without}
    blocks = {"encoder.block": encoder, "decoder.block": 3}
    return Row(name, blocks, 222903552, Measured(values, 1500, intervals))


def test_table():
    rows = [some_row("original", 12, bleu=(0.05, 0.07123)), some_row("iteration 1", 6, "meteor")]
    found = scores_table(rows, TITLES, {"meteor": "no WordNet."}, {})
    expected = r"""
|  | original | iteration 1 |
| --- | ---: | ---: |
| Num of encoder | 12 | 6 |
| Num of decoder | 3 | 3 |
| Num of parameter | 222,903,552 | 222,903,552 |
| BLEU | 0.0625 (0.0500 to 0.0712) | 0.0625 |
| Precision 1-gram | 0.1250 | 0.1250 |
| Precision 2-gram | 0.1875 | 0.1875 |
| Precision 3-gram | 0.2500 | 0.2500 |
| Precision 4-gram | 0.3125 | 0.3125 |
| Brevity Penalty | 0.3750 | 0.3750 |
| Length Ratio | 0.4375 | 0.4375 |
| ROUGE-1 F1 | 0.5000 | 0.5000 |
| ROUGE-2 F1 | 0.5625 | 0.5625 |
| ROUGE-L F1 | 0.6250 | 0.6250 |
| ROUGE-Lsum F1 | 0.6875 | 0.6875 |
| METEOR | 0.7500 | - |

METEOR is left out for iteration 1: no WordNet.

In brackets: 95 % bootstrap intervals over the texts, n = 1,500."""
    assert found == expected.lstrip()


def test_table_of_what_needs_no_notes_has_none():
    lines = scores_table([some_row("original", 12)], TITLES, {}, {}).splitlines()
    sizes = ["Num of encoder", "Num of decoder", "Num of parameter"]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == ["", "---", *sizes, *TITLES.values()]
