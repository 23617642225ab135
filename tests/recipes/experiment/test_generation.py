"""Scores of generated texts against values by hand, an independent BLEU, and a WordNet of two words."""

from __future__ import annotations

import json
import math
import os
import random
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

nltk = pytest.importorskip("nltk")
sacrebleu = pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

from deeparc_hf.errors import ConfigError, MissingDependencyError  # noqa: E402
from experiment.generation import TITLES, TextScores  # noqa: E402

ROOT = Path(__file__).parents[3]
PREDICTIONS = ["what is the the capital?", "who wrote this book?"]
REFERENCES = ["what is the capital of France?", "who wrote this book ?"]
WORDS = [
    "What",
    "is",
    "the",
    "the",
    "U.S.",
    "3.14",
    "1,000",
    "e-mail",
    "10-year",
    "naïve",
    "東京",
    "…",
    "—",
    "?",
    "!",
    "don't",
    "(x)",
    "$5.",
    "é",
]
WORDS += ["&amp;", "&quot;no&quot;", "<skipped>", "[1]", "a/b", "٣", "\u00a0", "why?", "Ω,", "x\ny"]


def scored(predictions: list[str], references: list[str]) -> SimpleNamespace:
    """The scores of texts as attributes."""
    return SimpleNamespace(**TextScores(predictions, references).values())


def random_pairs(n: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """References of some words, and predictions that share some of them in the same order."""
    rng = random.Random(seed)
    references = [[rng.choice(WORDS) for _ in range(rng.randint(1, 14))] for _ in range(n)]
    predictions = [
        [rng.choice(WORDS) if rng.random() < 0.25 else word for word in words if rng.random() < 0.9]
        for words in references
    ]
    return [" ".join(words) for words in predictions], [" ".join(words) for words in references]


def tokens_13a(text: str) -> list[str]:
    """By the rule and not by its regular expressions: enough where no two of . and , are neighbours."""
    text = text.replace("<skipped>", "").replace("\n", " ")
    for code, sign in {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}.items():
        text = text.replace(code, sign)
    text, digits = f" {text} ", string.digits
    shown = ""
    for before, sign, after in zip(" " + text[:-1], text, text[1:] + " ", strict=True):
        alone = sign in string.punctuation and sign not in ".,-'"
        alone |= sign in ".," and not (before in digits and after in digits)
        alone |= sign == "-" and before in digits
        shown += f" {sign} " if alone else sign
    return shown.split()


def ngrams(tokens: list[str], order: int) -> Counter:
    return Counter(tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))


def plain_bleu(predictions: list[str], references: list[str]) -> dict[str, float]:
    """BLEU as its paper defines it (Papineni et al. 2002), without smoothing."""
    pairs = [(tokens_13a(text), tokens_13a(reference)) for text, reference in zip(predictions, references, strict=True)]
    predicted, expected = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    result = {"length_ratio": predicted / expected}
    for order in range(1, 5):
        total = sum(ngrams(text, order).total() for text, _ in pairs)
        matched = sum((ngrams(text, order) & ngrams(reference, order)).total() for text, reference in pairs)
        result[f"precision_{order}"] = matched / total if total else 0.0
    result["brevity_penalty"] = 1.0 if predicted > expected else math.exp(1 - expected / predicted)
    result["bleu"] = (
        result["brevity_penalty"] * math.prod(result[f"precision_{order}"] for order in range(1, 5)) ** 0.25
    )
    return result


def tiny_nltk_data(folder: Path, punkt: bool = True) -> Path:
    """A WordNet in which car and auto are one thing (nltk looks up stems, which these are), and an untaught splitter of
    sentences.
    """
    wordnet = folder / "corpora" / "wordnet"
    wordnet.mkdir(parents=True)
    for name in (
        "cntlist.rev",
        "index.sense",
        *(f"{kind}.{part}" for kind in ("index", "data") for part in ("adj", "adv", "noun", "verb")),
    ):
        (wordnet / name).write_text("")
    for part in ("adj", "adv", "noun", "verb"):
        (wordnet / f"{part}.exc").write_text("")
    (wordnet / "lexnames").write_text("00\tnoun.artifact\t1\n")
    (wordnet / "data.noun").write_text("  tiny\n00000007 00 n 02 car 0 auto 0 000 | a vehicle  \n")
    (wordnet / "index.noun").write_text("auto n 1 0 1 0 00000007  \ncar n 1 0 1 0 00000007  \n")
    if punkt:
        english = folder / "tokenizers" / "punkt_tab" / "english"
        english.mkdir(parents=True)
        for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
            (english / name).write_text("")
    return folder


def meteors_with(*cases: tuple[Path, list[str], list[str]]) -> list[dict]:
    """Scores and intervals of each case (a folder of nltk's data, predictions, references), in a process of its own
    that knows only this folder: nltk keeps what it has once loaded, so each is a fork of one that has loaded nothing.
    """
    code = f"""
import json, nltk, os
from experiment.generation import TextScores
for data, predictions, references in {[(str(data), *texts) for data, *texts in cases]!r}:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    nltk.data.path[:] = [data]
    scores = TextScores(predictions, references)
    found = {{"scores": scores.values(), "reasons": scores.reasons, "intervals": scores.intervals(resamples=50)}}
    print(json.dumps(found))
    break
"""
    environment = {
        **os.environ,
        "NLTK_DATA": str(cases[0][0]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "recipes")]),
    }
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_bleu_by_hand():
    found = scored(PREDICTIONS, REFERENCES)
    # "what is the the capital ?" against "what is the capital of France ?": "the" counts once, and so
    #   1-grams what, is, the, capital, ?: 5 of 6; 2-grams what is, is the, the capital: 3 of 5;
    #   3-grams what is the: 1 of 4; 4-grams: 0 of 3
    # "who wrote this book ?" is its reference: 5 of 5, 4 of 4, 3 of 3, 2 of 2
    precisions = [(5 + 5) / (6 + 5), (3 + 4) / (5 + 4), (1 + 3) / (4 + 3), (0 + 2) / (3 + 2)]
    assert [found.precision_1, found.precision_2, found.precision_3, found.precision_4] == precisions
    # 6 + 5 tokens for 7 + 5
    assert found.length_ratio == 11 / 12
    assert found.brevity_penalty == pytest.approx(math.exp(1 - 12 / 11), rel=1e-14)
    assert found.bleu == pytest.approx(math.exp(1 - 12 / 11) * (10 / 11 * 7 / 9 * 4 / 7 * 2 / 5) ** 0.25, rel=1e-14)


def test_rouge_by_hand():
    found = scored(PREDICTIONS, REFERENCES)
    # what is the the capital (5 words) against what is the capital of france (6): 4 words match, F1 = 2 * 4 / (5 + 6);
    # pairs of words: 3 of 4 and of 5, F1 = 2 * 3 / (4 + 5); longest common subsequence: what is the capital, 4. The
    # second text is right.
    assert found.rouge1 == pytest.approx((8 / 11 + 1) / 2, rel=1e-14)
    assert found.rouge2 == pytest.approx((6 / 9 + 1) / 2, rel=1e-14)
    assert found.rougeL == found.rougeLsum == pytest.approx((8 / 11 + 1) / 2, rel=1e-14)


def test_rouge_lsum_splits_at_newlines_only():
    # as one text a b c d has 2 of 4 words in the order of c d a b; line by line all 4 are there
    lines = scored(["a b\nc d"], ["c d\na b"])
    assert (lines.rougeL, lines.rougeLsum) == (0.5, 1.0)
    sentences = scored(["a b. c d."], ["c d. a b."])
    assert (sentences.rougeL, sentences.rougeLsum) == (0.5, 0.5)


def test_rouge_does_not_stem_and_knows_no_case():
    found = scored(["Engines RUN"], ["engine run"])
    assert found.rouge1 == 0.5  # 1 of 2 words


def test_no_match_of_four_words_is_a_bleu_of_zero():
    found = scored(["a b c x d"], ["a b c d"])
    assert (found.precision_1, found.precision_2, found.precision_3, found.precision_4) == (4 / 5, 2 / 4, 1 / 3, 0.0)
    assert found.bleu == 0.0 and found.brevity_penalty == 1.0 and found.length_ratio == 5 / 4


def test_texts_too_short_for_four_words_have_precisions_of_zero():
    found = scored(["why not"], ["why not"])
    assert (found.precision_1, found.precision_2, found.precision_3, found.precision_4) == (1.0, 1.0, 0.0, 0.0)
    assert found.bleu == 0.0 and found.brevity_penalty == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_bleu_is_that_of_an_independent_computation(seed):
    predictions, references = random_pairs(50, seed)
    found, sacre = (
        scored(predictions, references),
        sacrebleu.corpus_bleu(predictions, [references], smooth_method="none"),
    )
    expected = plain_bleu(predictions, references)
    assert 0.1 < expected["bleu"] < 0.9
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-12)
    assert found.bleu == pytest.approx(sacre.score / 100, rel=1e-12) and found.brevity_penalty == pytest.approx(
        sacre.bp, rel=1e-12
    )


def test_bleu_of_single_pairs_is_that_of_an_independent_computation():
    pairs = [pair for pair in zip(*random_pairs(200, 9), strict=True) if all(map(tokens_13a, pair))]
    assert len(pairs) > 150
    for text, reference in pairs:
        expected = plain_bleu([text], [reference])
        found = scored([text], [reference])
        assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-12), (
            text,
            reference,
        )


# evaluate's Tokenizer13a gives the same numbers; sacrebleu's BLEU, which strips the ends of a text first, does not for
# "a-\n" and "-\n"
TOKENS = {
    "": 0,
    " \u00a0": 0,
    "?!": 2,
    "…": 1,
    "東京 です。": 2,
    "3.14": 1,
    "U.S.": 4,
    "10-year": 3,
    "e-mail": 1,
    "don't": 1,
    "$5.": 3,
}
TOKENS |= {"a-\n": 1, "-\n": 0, "<skipped>": 0, "&quot;x&quot;": 3, ".,1": 2, "x\u2028y": 2, "...": 3}


@pytest.mark.parametrize(("text", "tokens"), TOKENS.items())
def test_texts_are_split_as_by_tokenizer_13a(text, tokens):
    assert scored([text], ["one"]).length_ratio == tokens


def test_empty_predictions_score_zero():
    found = scored(["", "  "], ["why?", ""])
    assert set(vars(found).values()) <= {0.0, None} and found.brevity_penalty == found.length_ratio == 0.0
    some = scored(["", "who wrote this book?"], REFERENCES)
    assert some.precision_4 == 1.0 and some.length_ratio == 5 / 12 and some.rouge1 == 0.5


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], ["a", "b"], "found 1 predictions, 2 references"),
        ([], [], "at least one prediction"),
        (["a", "b"], ["", " -\n"], "found only empty ones"),
    ],
)
def test_what_cannot_be_scored_is_refused(predictions, references, message):
    with pytest.raises(ConfigError, match=message):
        TextScores(predictions, references)


def test_other_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="resamples must be at least 1, found 0"):
        TextScores(["a"], ["a"]).intervals(resamples=0)


@pytest.mark.parametrize("library", ["sacrebleu", "rouge_score", "nltk"])
def test_a_missing_library_is_named(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependencyError, match=rf'need {library}.*: pip install "deeparc_hf\[recipes\]"'):
        TextScores(["a"], ["a"])


def test_meteor_is_left_out_without_data(no_nltk_data):
    found = TextScores(PREDICTIONS, REFERENCES)
    assert found.values()["meteor"] is None
    assert found.reasons["meteor"].endswith("To have it: python -m nltk.downloader punkt_tab wordnet")
    assert "meteor" not in found.intervals(resamples=10)
    assert found.values()["bleu"] > 0  # the others are there


def test_meteor_by_hand_and_which_data_is_missing(tmp_path):
    predictions = ["the auto stops here", "here the car", ""]
    references = ["the car stopped here", "the car stops here", "the car"]
    no_punkt = tiny_nltk_data(tmp_path / "no_punkt", punkt=False)
    not_whole = tiny_nltk_data(tmp_path / "not_whole", punkt=False)
    (not_whole / "corpora" / "wordnet" / "lexnames").unlink()
    *missing, found = meteors_with(
        (not_whole, ["a"], ["a"]),
        (no_punkt, ["a"], ["a"]),
        (tiny_nltk_data(tmp_path / "whole"), predictions, references),
    )
    assert [each["scores"]["meteor"] for each in missing] == [None, None]
    assert missing[0]["reasons"]["meteor"].endswith("nltk.downloader punkt_tab wordnet")
    assert missing[1]["reasons"]["meteor"].endswith("nltk.downloader punkt_tab")
    # 1: the and here match, stops and stopped by their stem, auto and car by WordNet: 4 of 4, in one piece: 1 - 0.5 *
    # (1 / 4)^3 2: here, the, car: precision 3/3, recall 3/4, mean 3/4 / (0.9 * 1 + 0.1 * 3/4) = 10/13; two pieces: 1 -
    # 0.5 * (2 / 3)^3 = 23/27
    assert found["scores"]["meteor"] == pytest.approx((127 / 128 + 10 / 13 * 23 / 27 + 0) / 3, rel=1e-12)
    assert found["reasons"] == {}
    low, high = found["intervals"]["meteor"]
    assert 0 <= low < found["scores"]["meteor"] < high <= 127 / 128


def test_scores_come_in_the_order_of_the_table():
    assert list(TextScores(PREDICTIONS, REFERENCES).values()) == list(TITLES)
